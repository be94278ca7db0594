"""Readers of single files that keep texts as written, whatever they look like."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
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
                "Copy the whole file again."
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
                f"{os.path.dirname(target.name)} has no room for more. Set another folder for "
                "temporary files, TMPDIR=DIR, or unpack it yourself."
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
            "Put double quotes around a text that holds the separator."
        )
    features = Features({str(name): Value("string") for name in head.columns})
    return Dataset.from_csv(path, features=features, cache_dir=cache_dir, **how)


def reason_of(error: BaseException) -> str:
    """Return the first line of the root cause of an error."""
    error = causes(error)[-1]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".") + "."
