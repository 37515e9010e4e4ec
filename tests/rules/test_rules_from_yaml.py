import dataclasses

import pytest
from jsonargparse import ArgumentParser

from lightning_interp import rules
from lightning_interp.rules import Rule, default_rules


@pytest.mark.parametrize("rule", default_rules(), ids=lambda rule: rule.name)
def test_jsonargparse_builds_each_rule_with_its_thresholds(rule):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rules", type=list[Rule] | None)
    kind = f"lightning_interp.rules.{type(rule).__name__}"
    values = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    config = parser.parse_object({"rules": [{"class_path": kind, "init_args": values}]})
    (built,) = parser.instantiate(config).rules
    assert built == rule


def test_rules_are_frozen_and_have_names_and_needs():
    for rule in default_rules():
        assert dataclasses.is_dataclass(rule)
        assert rule.needs
        assert rule.check.__doc__
    names = [rule.name for rule in default_rules()]
    assert len(names) == len(set(names)) == 17


def test_all_names_are_there_and_sorted():
    assert rules.__all__ == sorted(rules.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert all(hasattr(rules, name) for name in rules.__all__)


def test_needs_name_series_and_facts_of_the_table():
    table = rules.history.__doc__
    for rule in default_rules():
        for quantity in rule.needs:
            assert f"`{quantity}`" in table
