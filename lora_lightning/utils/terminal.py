"""Text for a terminal or a report, with harmless control characters."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Callable
from html import escape
from typing import Any, TextIO

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # tab and line feed stay
    "\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"  # line separators, direction, surrogates
)


def printable(text: str, *, json: bool = False) -> str:
    """Return a text with its control characters escaped, an ESC as its code in hex.

    A terminal obeys control characters, which can clear it, set its title, or fill the clipboard.

    Args:
        text: labels, errors, generated text, or any other text from a file.
        json: whether to escape as JSON does, so that the text means the same when it is read.
            False by default.
    """

    def escaped(match: re.Match[str]) -> str:
        number = ord(match.group())
        return f"\\u{number:04x}" if json or number > 0xFF else f"\\x{number:02x}"

    return _CONTROL.sub(escaped, text)


def command(verb: str, **settings: object) -> str:
    """Return a `lora-lightning VERB KEY=VALUE` command as it can be typed in a shell."""
    words = [verb, *(f"{key}={value}" for key, value in settings.items())]
    return f"lora-lightning {shlex.join(words)}"


def is_text(name: str) -> bool:
    """Return whether a name is UTF-8.

    On a command line and in a file system a name may be any bytes.
    """
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def one_line(value: object) -> str:
    """Return a value as one line of Markdown without HTML, links or cell separators."""
    text = escape(str(value), quote=False).replace("\n", "\\n")
    for mark, shown in (("|", "&#124;"), ("`", "&#96;"), ("](", "]&#40;")):
        text = text.replace(mark, shown)
    return text


def fenced(command: str) -> list[str]:
    """Return the lines of Markdown that show a command, which cannot end its own block."""
    longest = max((len(run) for run in re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}bash", command, fence]


class Terminal:
    """Stream of a terminal that shows nothing once the terminal is closed during a run.

    The system reports this by SIGHUP and by an error (EIO) in the next write, whichever is first.

    Args:
        stream: sys.stdout or sys.stderr.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._tried(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)


def say(text: Any, *, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """Print a text with its control characters escaped."""
    print(printable(str(text)), file=file, end=end, flush=flush)
