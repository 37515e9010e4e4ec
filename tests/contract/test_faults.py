"""The table of faults is true: each is tried somewhere, and each test of the odd stands in it."""

import pytest

from tests.contract.faults import FAULTS, cases, collected

WHOLLY_OF_FAULTS = ("test_odd_layers", "test_odd_numbers", "test_odd_names", "test_processes", "test_random_models")


@pytest.fixture(scope="module")
def ids():
    return collected()


@pytest.mark.slow
def test_every_fault_is_tried_in_tests_that_exist(ids):
    """By each of the tests that it names."""
    for fault in FAULTS:
        for test in fault.tests:
            assert any(each.startswith(test) for each in ids), (fault.name, test)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.slow
def test_every_odd_test_stands_in_the_table(ids):
    """Else the README's figure would be too small."""
    named = {each for fault in FAULTS for each in cases(fault, ids)}
    odd = {each for each in ids if any(f"{file}.py::" in each for file in WHOLLY_OF_FAULTS)}
    assert {each.split("[")[0] for each in odd} - {each.split("[")[0] for each in named} <= {
        "contract/test_odd_numbers.py::test_what_is_not_finite_is_said_in_an_alert"
    }
