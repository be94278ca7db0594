"""Raw rows to token ids: once for each set of rows, by several processes where there are many."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from lora_lightning.tasks import Task

from .cache import is_whole, tell_damage, write_sums

BATCH = 1000
"""Rows that a task encodes together; blocks of documents end with them."""
ROWS_ALONE = 10_000
"""Rows up to which one process encodes them."""
MOST_PROCESSES = 16
FEW_CORES = 3
"""Cores up to which several processes gain nothing over one, whose tokenizer has threads."""


@dataclass
class Encoding:
    """Encodes a batch of raw rows, given by column, as examples with their length and row.

    Args:
        task: encodes.
        tokenizer: of the base model.
        max_length: longest example in tokens.
    """

    task: Task
    tokenizer: Any
    max_length: int

    def __call__(self, rows: dict[str, list[Any]], indices: Sequence[int]) -> dict[str, Any]:
        examples = self.task.encode(rows, self.tokenizer, self.max_length)
        examples["length"] = [len(ids) for ids in examples["input_ids"]]
        examples["row"] = [indices[row] for row in examples.get("row", range(len(indices)))]
        return examples


@dataclass
class _Slices:
    """Encodes the rows that begin at a number, in a process that has this object to itself."""

    encoding: Encoding
    rows: Any

    def __call__(self, starts: dict[str, list[int]]) -> dict[str, Any]:
        (start,) = starts["start"]
        rows = self.rows[start : start + BATCH]
        count = len(next(iter(rows.values())))
        return self.encoding(rows, range(start, start + count))


def encode_rows(rows: Any, encoding: Encoding, file: Path) -> Any:
    """Encoded rows as a dataset, which is read from a file or written to it.

    A file that is not what its checksum says is written again.

    Args:
        rows: a dataset of raw rows.
        encoding: how.
        file: named after all that the result depends on.

    Raises:
        OSError: the file cannot be written.
    """
    sums = file.with_suffix(".json")
    ready = is_whole([file], sums)
    if not ready and sums.exists():
        tell_damage(file)
    processes = 1 if ready else _processes(rows, encoding)
    if processes > 1:
        _write_by_processes(rows, encoding, file, processes)
    encoded = rows.map(
        encoding,
        batched=True,
        batch_size=BATCH,
        with_indices=True,
        remove_columns=rows.column_names,
        cache_file_name=str(file),
        load_from_cache_file=ready or processes > 1,
        new_fingerprint=file.stem,
        desc="tokenising",
    )
    if not ready and file.exists():
        write_sums([file], sums)
    return encoded


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def in_main_thread() -> bool:
    """Whether this process can be forked: a pack's runs are threads beside others."""
    return threading.current_thread() is threading.main_thread()


def _processes(rows: Any, encoding: Encoding) -> int:
    """Processes to encode rows with."""
    # Rows that are in memory, and in no file, would be copied to each.
    apart = len(rows) > ROWS_ALONE and rows.cache_files and in_main_thread()
    if not apart or cores() <= FEW_CORES:
        return 1
    try:
        ForkingPickler.dumps(encoding)  # as a process is given it
    except Exception:  # a task of a user's own may hold anything
        return 1
    return min(cores(), MOST_PROCESSES, -(-len(rows) // BATCH))


def _write_by_processes(rows: Any, encoding: Encoding, file: Path, processes: int) -> None:
    """Writes the file that one process would write: the same batches, in the same order."""
    from datasets import Dataset

    environment = os.environ
    tokenizers = environment.get("TOKENIZERS_PARALLELISM")
    starts = Dataset.from_dict({"start": list(range(0, len(rows), BATCH))})
    with tempfile.TemporaryDirectory(
        dir=file.parent, prefix=f".{file.stem}-", ignore_cleanup_errors=True
    ) as folder:
        try:
            parts = starts.map(
                _Slices(encoding, rows),
                batched=True,
                batch_size=1,
                remove_columns=["start"],
                num_proc=processes,
                cache_file_name=str(Path(folder) / "part.arrow"),
                new_fingerprint=file.stem,
                desc="tokenising",
            )
        finally:
            # datasets turns parallel tokenizers off for its processes, and leaves it so here.
            os.environ = environment  # noqa: B003, it puts a copy there
            environment.pop("TOKENIZERS_PARALLELISM", None)
            if tokenizers is not None:
                environment["TOKENIZERS_PARALLELISM"] = tokenizers
        parts.with_format("arrow").map(
            lambda table: table,
            batched=True,
            cache_file_name=str(file),
            load_from_cache_file=False,
            new_fingerprint=file.stem,
            desc="writing",
        )
        del parts
