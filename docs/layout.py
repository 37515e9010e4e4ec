"""Rewrites the list of files in CONTRIBUTING.md from the first sentence of each file's docstring: `make layout`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- layout: made by `make layout` -->\n", "<!-- end of layout -->\n"


def rows() -> list[str]:
    """One row of a Markdown table per file of the package: folders first come, first served, the top level first."""
    files = sorted((ROOT / "lightning_interp").rglob("*.py"), key=lambda file: (len(file.parts), file))
    return [f"| `{file.relative_to(ROOT).as_posix()}` | {_sentence(file)} |" for file in files]


def _sentence(file: Path) -> str:
    paragraph = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return " ".join(paragraph.split()).rstrip(".").replace("|", "\\|")


def main() -> None:
    """Rewrites the file."""
    guide = ROOT / "CONTRIBUTING.md"
    before, rest = guide.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    table = "\n".join(["| file | what |", "|---|---|", *rows()])
    guide.write_text(f"{before}{BEGIN}\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
