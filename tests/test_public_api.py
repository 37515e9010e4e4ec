"""What `import lightning_interp` gives, and what it costs."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_interp

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "torchvision", "pytorch_lightning", "lightning", "numpy", "sklearn", "matplotlib"}


def run(code: str) -> str:
    """Output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_is_sorted_and_every_name_exists():
    """A name that is listed can be had, and is listed once."""
    assert sorted(set(lightning_interp.__all__)) == lightning_interp.__all__
    assert [name for name in lightning_interp.__all__ if not hasattr(lightning_interp, name)] == []


def test_type_checkers_see_the_same_names():
    """The block for type checkers imports exactly `__all__`."""
    tree = ast.parse((ROOT / "lightning_interp" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(seen) == lightning_interp.__all__


def test_dir_offers_all_names():
    """Completion works before anything is loaded."""
    assert set(lightning_interp.__all__) <= set(dir(lightning_interp))


def test_import_loads_neither_torch_nor_lightning():
    """TensorBoard imports the package at every start."""
    code = "import sys, lightning_interp; print(*sys.modules, sep='\\n')"
    loaded = {name.split(".")[0] for name in run(code).splitlines()}
    assert loaded & HEAVY == set()
    assert "lightning_interp" in loaded


def test_version_costs_nothing_either():
    """Nor does asking for the version load anything."""
    code = "import sys, lightning_interp; print(lightning_interp.__version__, 'torch' in sys.modules)"
    assert run(code).split() == [lightning_interp.__version__, "False"]


def test_callbacks_load_what_is_heavy_only_when_it_is_needed():
    """A script that adds `Interp()` does not pay for plots that it never asks for.

    Lightning itself loads some of it where it is installed: only what comes on top is ours.
    """
    code = (
        "import sys, pytorch_lightning, lightning.pytorch\n"
        "before = {*sys.modules}\n"
        "from lightning_interp import Interp\n"
        "Interp()\n"
        "print(*{name.split('.')[0] for name in {*sys.modules} - before})"
    )
    loaded = set(run(code).split())
    assert "lightning_interp" in loaded
    assert loaded & HEAVY == set()


def test_unknown_name_is_an_attribute_error():
    """As in any module."""
    with pytest.raises(AttributeError, match="no attribute 'Interpp'"):
        _ = lightning_interp.Interpp


def test_functional_is_a_module():
    """It is used as `lightning_interp.functional.sparsity(...)`."""
    assert inspect.ismodule(lightning_interp.functional)


def test_public_objects_have_docstrings():
    """What a user can import explains itself."""
    values = {name: getattr(lightning_interp, name) for name in lightning_interp.__all__ if name != "__version__"}
    assert [name for name, value in values.items() if not inspect.getdoc(value)] == []


def test_version_equals_the_changelog():
    """The top entry is the version that is being made."""
    entries = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert entries[0] == lightning_interp.__version__


def test_lower_bounds_equal_the_oldest_environment():
    """`make test-oldest` runs exactly the lowest versions that pyproject.toml allows."""
    project = (ROOT / "pyproject.toml").read_text()
    bounds = dict(re.findall(r'^    "([a-z-]+)>=([\d.]+)', project, flags=re.MULTILINE))
    required = project.split("\ndependencies = [")[1].split("\n]")[0]
    names = re.findall(r'"([a-z-]+)>=', required)
    pins = dict(
        re.findall(r"^([a-z-]+)==([\d.]+)$", (ROOT / "requirements/oldest.txt").read_text(), flags=re.MULTILINE)
    )
    assert {name: pins[name] for name in names} == {name: _padded(bounds[name]) for name in names}


def _padded(version: str) -> str:
    return version if version.count(".") == 2 else f"{version}.0"
