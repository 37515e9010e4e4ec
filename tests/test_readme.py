"""The README's Python blocks run, in order, in one namespace, in an empty folder."""

import re
import warnings
from pathlib import Path

import yaml

import lightning_interp

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    """Each block sees the names of those above it."""
    monkeypatch.chdir(tmp_path)
    assert blocks("python")
    namespace = {"__name__": "readme"}
    for number, block in enumerate(blocks("python"), start=1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's hints about workers and the like
            warnings.simplefilter("error", lightning_interp.errors.InterpWarning)
            exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    assert list(tmp_path.rglob("alerts.jsonl"))


def test_yaml_blocks_name_what_exists():
    """Class paths and options in the YAML blocks are real."""
    assert blocks("yaml")
    for block in blocks("yaml"):
        for callback in yaml.safe_load(block)["trainer"]["callbacks"]:
            package, name = callback["class_path"].rsplit(".", 1)
            assert package == "lightning_interp"
            getattr(lightning_interp, name)(**callback.get("init_args", {}))


def test_links_to_files_lead_somewhere():
    """No dead link into the repository."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_make_target_exists():
    """What the README and CONTRIBUTING tell one to type is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    told = re.findall(
        r"`make ([a-z-]+)`|^ +make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE
    )
    assert told
    assert {first or second for first, second in told} <= targets
