"""Text for TensorBoard's Markdown."""

from __future__ import annotations


def escape(text: str) -> str:
    r"""Makes a name safe inside a table cell.

    Example:
        >>> print(escape("a|b`c"))
        a\|b\`c
    """
    for mark in "\\|`*_<>[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")
