"""Check of text files before they are read, and reading of plain text."""

from __future__ import annotations

import re
from pathlib import Path

from lora_lightning.errors import UserError

from .json_files import check_object


def read_text(option: str, path: Path, file: Path) -> str:
    """Return the content of a text file. Lines end at a line feed, with or without a CR."""
    check_text(option, path, file)
    return file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")


def check_text(option: str, path: Path, file: Path) -> None:
    """Raise UserError for a file that is not UTF-8, is broken JSONL, or has no rows.

    The message names the line where there is one.

    Args:
        option: name of the setting in messages.
        path: name of the file in messages.
        file: file to read, which is `path` decompressed.
    """
    kind = file.suffix.lower()
    header = kind in (".csv", ".tsv")
    filled = 0
    with file.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(
                    f"{option}: {path} must be UTF-8, and line {number} is not. Convert it: "
                    f"iconv -f latin1 -t utf-8 {path.name} > utf8{path.suffix}"
                ) from None
            if "\x00" in decoded:
                raise UserError(
                    f"{option}: {path} must be UTF-8 text, and line {number} holds a zero byte. "
                    f"Convert it: iconv -f utf-16 -t utf-8 {path.name}"
                )
            filled += sum(bool(part.strip()) for part in re.split("[\r\n]", decoded))
            if kind in (".jsonl", ".ndjson") and decoded.strip():
                check_object(option, path, number, decoded)
    if filled <= header and kind != ".txt":
        raise UserError(f"{option}: {path} must hold rows{' below its header' if header else ''}.")
