"""Text for TensorBoard's Markdown."""

from __future__ import annotations


def escape(text: str) -> str:
    r"""What would break out of a cell of a Markdown table, or be taken for markup, made harmless.

    Raw HTML needs nothing: TensorBoard shows it as text.

    Example:
        >>> escape("a|b\nc")
        'a\\|b c'
    """
    for mark in "\\|`*[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
