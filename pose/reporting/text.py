"""Text that came from elsewhere (names of documents, folders, licenses), made safe for where people read it."""

import html
import re

# What moves a terminal's cursor or turns the reading direction, and what no file can hold: controls but for new lines
# and tabs, bidirectional marks, separators of lines and paragraphs, surrogates (of file names that are not UTF-8).
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is only itself


def printable(text: str) -> str:
    """A text without what is not printed; its lines stay."""
    return _CONTROLS.sub("", text)


def one_line(text: object) -> str:
    """A text without what is not printed, in one line."""
    return " ".join(printable(" ".join(str(text).split())).split())


def markdown(text: object) -> str:
    """A text in one line that Markdown, in a table too, shows as it is: no markup, no HTML."""
    return _MARKDOWN.sub(r"\\\g<0>", html.escape(one_line(text), quote=False))
