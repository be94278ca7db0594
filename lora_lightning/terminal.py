"""Text for a terminal or a report, in which a control character of a file acts on nothing."""

from __future__ import annotations

import re
from html import escape
from typing import Any, TextIO

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # a tab and a line feed stay
    "\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"  # line separators, direction, halves
)


def printable(text: str, *, json: bool = False) -> str:
    """Return a text whose control characters are shown escaped, an ESC as its code in hex.

    A terminal obeys them: they clear it, set its title, or fill the clipboard.

    Args:
        text: labels, errors, generated text, whatever came from a file.
        json: escape as JSON does, so that the text means the same when it is read.
    """

    def escaped(found: re.Match[str]) -> str:
        number = ord(found.group())
        return f"\\u{number:04x}" if json or number > 0xFF else f"\\x{number:02x}"

    return _CONTROL.sub(escaped, text)


def is_text(name: str) -> bool:
    """Whether a name is UTF-8: on a command line, and in a file system, it may be any bytes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def one_line(value: object) -> str:
    """Return a value as a line of Markdown in which it is no HTML, no link and no second cell."""
    text = escape(str(value), quote=False).replace("\n", "\\n")
    for mark, shown in (("|", "&#124;"), ("`", "&#96;"), ("](", "]&#40;")):
        text = text.replace(mark, shown)
    return text


def fenced(command: str) -> list[str]:
    """Return the lines of Markdown that show a command, which cannot end its own block."""
    longest = max((len(run) for run in re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}bash", command, fence]


def say(text: Any, *, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """Print a text with its control characters escaped."""
    print(printable(str(text)), file=file, end=end, flush=flush)
