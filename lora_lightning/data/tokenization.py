"""Tokenization of raw rows, once per set of rows, with several processes for many rows."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from lora_lightning.tasks import Task
from lora_lightning.utils.cache_folder import cache_folder

from .cache import is_whole, report_damage, write_sums
from .rows_cache import unwritable_cache

CACHE_VERSION = 4
"""Version of encoded rows. It increases when their meaning changes."""
BATCH = 1000
"""Rows that a task encodes together. Blocks of documents end with these rows."""
ROWS_ALONE = 10_000
"""Largest number of rows that one process encodes alone."""
MOST_PROCESSES = 16
FEW_CORES = 3
"""Cores up to which several processes gain nothing over one with a threaded tokenizer."""


@dataclass
class Encoding:
    """Encoder from a batch of raw rows, given by column, to examples with their length and row.

    Args:
        task: task that encodes the rows.
        tokenizer: tokenizer of the base model.
        max_length: longest example in tokens.
    """

    task: Task
    tokenizer: Any
    max_length: int

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that the result depends on beside the rows, as plain values."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            content = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        else:
            # Encoding changes the padding and truncation state, so the key omits both.
            state = json.loads(backend.to_str())
            content = json.dumps({**state, "padding": None, "truncation": None}, sort_keys=True)
        return {
            "version": CACHE_VERSION,
            "tokenizer": hashlib.sha256(content.encode()).hexdigest(),
            "max_length": self.max_length,
            **self.task.signature(),
        }

    def __call__(self, rows: dict[str, list[Any]], indices: Sequence[int]) -> dict[str, Any]:
        examples = self.task.encode(rows, self.tokenizer, self.max_length)
        examples["length"] = [len(ids) for ids in examples["input_ids"]]
        examples["row"] = [indices[row] for row in examples.get("row", range(len(indices)))]
        return examples


@dataclass
class _Slices:
    """Encoder of the rows from a start index, in a process with its own copy of this object."""

    encoding: Encoding
    rows: Any

    def __call__(self, starts: dict[str, list[int]]) -> dict[str, Any]:
        (start,) = starts["start"]
        rows = self.rows[start : start + BATCH]
        count = len(next(iter(rows.values())))
        return self.encoding(rows, range(start, start + count))


def encode_cached(rows: Any, encoding: Encoding, cache_dir: str | None) -> Any:
    """Return encoded rows, from the cache if the same rows were encoded before.

    Raises:
        UserError: the cache cannot be written.
    """
    key = {**encoding.key, "rows": rows._fingerprint}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    folder = cache_folder(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return encode_rows(rows, encoding, folder / f"{digest[:32]}.arrow")
    except OSError as error:
        raise unwritable_cache(folder, error) from None


def encode_rows(rows: Any, encoding: Encoding, file: Path) -> Any:
    """Return encoded rows as a dataset, which is read from a file or written to it.

    A file that does not match its checksum is written again.

    Args:
        rows: dataset of raw rows.
        encoding: encoder of the rows.
        file: cache file, named after everything that the result depends on.

    Raises:
        OSError: the file cannot be written.
    """
    sums = file.with_suffix(".json")
    ready = is_whole([file], sums)
    if not ready and sums.exists():
        report_damage(file)
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
        desc="tokenizing",
    )
    if not ready and file.exists():
        write_sums([file], sums)
    return encoded


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # missing on some systems
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def in_main_thread() -> bool:
    """Return whether this process can be forked.

    The runs of a pack cannot be forked, because they are threads next to other threads.
    """
    return threading.current_thread() is threading.main_thread()


def _processes(rows: Any, encoding: Encoding) -> int:
    """Return the number of processes to encode rows with."""
    # Rows that are only in memory, not in a file, would be copied to each process.
    apart = len(rows) > ROWS_ALONE and rows.cache_files and in_main_thread()
    if not apart or cores() <= FEW_CORES:
        return 1
    try:
        ForkingPickler.dumps(encoding)  # as a process receives it
    except Exception:  # a user's own task may hold anything
        return 1
    return min(cores(), MOST_PROCESSES, -(-len(rows) // BATCH))


def _write_by_processes(rows: Any, encoding: Encoding, file: Path, processes: int) -> None:
    """Write the file that one process would write, with the same batches in the same order."""
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
                desc="tokenizing",
            )
        finally:
            # datasets disables parallel tokenizers for its processes, and does not undo it here.
            os.environ = environment  # noqa: B003, datasets puts a copy there
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
