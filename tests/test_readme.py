"""The README's Python blocks run, in order, in one namespace, in an empty folder."""

import re
import warnings
from pathlib import Path

import yaml

import lightning_interp
from lightning_interp.rules import default_rules

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


def test_table_of_callbacks_names_what_they_log():
    """Every tag in the table belongs to a quantity that its callback provides."""
    rows = re.findall(r"^\| `([A-Z]\w+)` \| (`interp.+?) \|", README, flags=re.MULTILINE)
    assert len(rows) == 11
    for name, tags in rows:
        provides = getattr(lightning_interp, name).provides
        for tag in re.findall(r"`interp[./](\w+)`", tags):
            assert tag.startswith(provides), f"{name} does not log {tag}"


def test_table_of_alerts_names_the_default_rules():
    """All of them, and no other."""
    table = README.split("## The alerts")[1].split("\n## ")[0]
    assert {rule.name for rule in default_rules()} == set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE))


def test_layout_lists_every_file():
    """CONTRIBUTING has a line for each file of the package; `make layout` writes them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = set(re.findall(r"^\| `(lightning_interp/\S+\.py)` \|", text, flags=re.MULTILINE))
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_interp").rglob("*.py")}
    assert listed - files == set()
    assert files - listed == set()


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
