"""Text that came from elsewhere (names of documents, folders, licenses), as Markdown shows it safely."""

import html
import re

from pose.errors import one_line

_MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is only itself


def markdown(text: object) -> str:
    """A text in one line that Markdown, in a table too, shows as it is: no markup, no HTML."""
    return _MARKDOWN.sub(r"\\\g<0>", html.escape(one_line(text), quote=False))
