"""Text for TensorBoard's Markdown, and for one line of a log."""

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


def one_line(text: str) -> str:
    r"""Without line breaks and control characters: the name of a layer may hold what a terminal would obey.

    Example:
        >>> one_line("a\n\x1b[31mb")
        'a [31mb'
    """
    return " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())
