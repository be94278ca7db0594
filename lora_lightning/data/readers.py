"""Readers of single files that keep texts as written, whatever they look like."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from lora_lightning.errors import UserError, causes

# Only an empty cell is missing. A text may hold the words "null", "None" and "NA".
CSV = {"keep_default_na": False, "na_values": [""]}
BUILDERS = {
    ".csv": ("csv", CSV),
    ".tsv": ("csv", {**CSV, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
"""File endings with the type of reader and its arguments."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Endings that may follow an ending of `BUILDERS`, with pyarrow's name of the format."""
PART, FREE = 2**23, 2**30
"""Bytes to decompress at a time, and bytes to leave free on a large disk."""
LARGEST = 2**63
"""Integers from this value up, and below its negative, have no exact column type."""
MAY_LOSE = re.compile(rb"-?(?:\d+\.\d|\d+[eE]|(?<=-)0)")
"""Pattern in a line of JSON with a number that Python may write differently."""
_LIKE_A_TIME = re.compile(rb'"(?=\d{4}-\d\d-\d\d[^"\\]*"\s*[,}\]])')


def kind_of(path: Path) -> tuple[str, str]:
    """Return a file's format ending and its compression ending, in lower case."""
    last = path.suffix.lower()
    if last in COMPRESSED and Path(path.stem).suffix.lower() != ".parquet":
        return Path(path.stem).suffix.lower(), last
    return last, ""


def is_known(path: Path) -> bool:
    """Return whether a file has an ending that can be read."""
    return kind_of(path)[0] in BUILDERS


@contextmanager
def plain_file(option: str, path: Path) -> Iterator[Path]:
    """Provide a file without compression, and under a name of ours, within the block.

    `datasets` 5 treats brackets, stars and :: in a path as patterns and chains.

    Raises:
        UserError: the file cannot be decompressed.
    """
    kind, packed = kind_of(path)
    with TemporaryDirectory(prefix="lora_lightning-") as folder:
        plain = Path(folder) / f"rows{kind}"
        if not packed:
            plain.symlink_to(path.resolve())
            yield plain
            return
        import pyarrow as pa

        try:
            with (
                pa.input_stream(str(path), compression=COMPRESSED[packed]) as source,
                plain.open("wb") as target,
            ):
                _unpack(source, target, option, path)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise UserError(
                f"{option}: {path} cannot be decompressed as {packed[1:]}: {reason_of(error)} "
                "Is it whole?"
            ) from None
        yield plain


def _unpack(source: Any, target: IO[bytes], option: str, path: Path) -> None:
    """Decompress a file while some of the disk stays free.

    Raises:
        UserError: the disk has no room for more.
    """
    while part := source.read(PART):
        target.write(part)
        target.flush()
        disk = shutil.disk_usage(os.path.dirname(target.name))
        if target.tell() >= PART and disk.free < min(FREE, disk.total // 20):
            raise UserError(
                f"{option}: {path} has unpacked to {target.tell() / 2**20:.0f} MiB so far, and "
                f"{os.path.dirname(target.name)} has no room for more. If that is its size, give "
                "another folder for temporary files (TMPDIR=DIR), or unpack it yourself."
            )


def csv_as_written(path: str, cache_dir: str, **how: Any) -> Any:
    """Return the rows of a table with all cells as text.

    For example, 007 stays 007, and 0.10 stays 0.10.

    Args:
        path: file to read.
        cache_dir: folder where `datasets` puts the rows.
        how: further arguments of pandas.

    Raises:
        UserError: rows have more cells than the header.
    """
    import pandas as pd
    from datasets import Dataset, Features, Value

    head = pd.read_csv(path, nrows=1, dtype=str, **how)
    if not isinstance(head.index, pd.RangeIndex):  # pandas takes the first cells as row names
        raise UserError(
            f"its rows have more cells than the header, which has {len(head.columns)}. "
            "A text that holds the separator must stand in double quotes."
        )
    features = Features({str(name): Value("string") for name in head.columns})
    return Dataset.from_csv(path, features=features, cache_dir=cache_dir, **how)


def json_as_written(path: str, cache_dir: str) -> Any:
    """Return the rows of JSON lines with all strings as text.

    pyarrow turns strings that look like times into times. To avoid this, the types are inferred
    from a copy with a letter in front of such strings. The file is then read with these types. A
    column becomes text if it holds numbers that would not stay as written.

    Args:
        path: file to read.
        cache_dir: folder where `datasets` puts the rows.
    """
    from datasets import Dataset, Value

    times, found = False, set()
    with open(path, "rb") as lines:
        for number, line in enumerate(lines):
            times = times or _LIKE_A_TIME.search(line) is not None
            if MAY_LOSE.search(line):
                found.update(odd_numbers(_text(number, line)))
    odd = sorted(found)
    if not times and not odd:
        return Dataset.from_json(path, cache_dir=cache_dir)
    lettered = Path(cache_dir) / "lettered.jsonl"
    with open(path, "rb") as lines, lettered.open("wb") as copy:
        copy.writelines(_LIKE_A_TIME.sub(b'"x', line) for line in lines)
    features = Dataset.from_json(str(lettered), cache_dir=str(lettered.parent)).features
    features.update({name: Value("string") for name in odd})
    # `datasets` would take a list among the arguments for shards.
    how = {"path": path, "columns": tuple(features), "odd": tuple(odd)}
    return Dataset.from_generator(_objects, features=features, gen_kwargs=how, cache_dir=cache_dir)


def _objects(path: str, columns: tuple[str, ...], odd: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines):
            if line.strip():
                row = written_numbers(_text(number, line), odd)
                yield {name: row.get(name) for name in columns}


def _text(number: int, line: bytes) -> str:
    return line.decode("utf-8-sig" if number == 0 else "utf-8")


class Number(str):
    """JSON number as written."""


def with_numbers(text: str) -> Any:
    """Parse JSON with each number as a `Number`."""
    return json.loads(text, parse_float=Number, parse_int=Number)


def is_odd(value: Any) -> bool:
    """Return whether a value of `with_numbers` is a number that Python writes differently."""
    return isinstance(value, Number) and str(json.loads(value)) != value


def odd_numbers(line: str) -> list[str]:
    """Return the columns of an object whose number Python writes differently (0.10, 1e5)."""
    return [name for name, value in with_numbers(line).items() if is_odd(value)]


def written_numbers(line: str, odd: Iterable[str]) -> dict[str, Any]:
    """Parse a JSON object, and keep the values of the `odd` columns as text, as written."""
    row: dict[str, Any] = json.loads(line)
    if odd:
        raw = with_numbers(line)
        row |= {name: as_written(raw[name]) for name in odd if name in raw}
    return row


def as_written(value: Any) -> str | None:
    """Return a value of `with_numbers` as text."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


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
                    f"{option}: {path} is not UTF-8 in line {number}. Convert it, for instance: "
                    f"iconv -f latin1 -t utf-8 {path.name} > utf8{path.suffix}"
                ) from None
            if "\x00" in decoded:
                raise UserError(
                    f"{option}: {path} holds a zero byte in line {number}: it is no text, or not "
                    f"UTF-8. Convert it, for instance: iconv -f utf-16 -t utf-8 {path.name}"
                )
            filled += sum(bool(part.strip()) for part in re.split("[\r\n]", decoded))
            if kind in (".jsonl", ".ndjson") and decoded.strip():
                _check_object(option, path, number, decoded)
    if filled <= header and kind != ".txt":
        raise UserError(
            f"{option}: {path} holds no rows{' below its header' if header else ''}. "
            "Give a file that does."
        )


def _check_object(option: str, path: Path, number: int, line: str) -> None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option}: {path} is not JSON in line {number}: {error}.") from None
    if not isinstance(row, dict):
        raise UserError(
            f"{option}: {path} holds no object in line {number}: each line must be "
            '{"column": value, ...}.'
        )
    for name, value in row.items():
        if isinstance(value, int) and not -LARGEST <= value < LARGEST:
            raise UserError(
                f"{option}: {path} holds a number in line {number}, column {name!r}, that would "
                f"lose digits: {value}. Write it in double quotes."
            )


def reason_of(error: BaseException) -> str:
    """Return the first line of the root cause of an error."""
    error = causes(error)[-1]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".") + "."
