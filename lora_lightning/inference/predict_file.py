"""Predictions for the rows of a file, which resume after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, TextIO

from lora_lightning.data.local_files import load_rows
from lora_lightning.lora import UserError
from lora_lightning.models.fingerprint import fingerprint
from lora_lightning.utils.atomic_write import replace_synced
from lora_lightning.utils.locks import locked_output, open_file
from lora_lightning.utils.terminal import printable

from .output_files import check_output_file
from .predictor import Predictor


def predict_file(predictor: Predictor, source: Path, output: Path | None) -> int:
    """Predict for the rows of a file, and write JSONL, one line per row, to `output` or stdout.

    Rows are written when they are done, to a partial file beside `output` that is renamed at the
    end. After an interruption, the same call resumes from the partial file.

    Returns:
        The number of rows.

    Raises:
        UserError: A row has no text, the output cannot be written, or it is another program's file.
    """
    if output is not None:
        check_output_file(output, by="predict", sources=[source])
    rows = load_rows("input", source)
    task = predictor.module.task
    task.find_inputs(rows.column_names)
    for column in task.input_columns()[:1]:
        blank = [
            row for row, value in enumerate(rows[column][:], 1) if not str(value or "").strip()
        ]
        if blank:
            raise UserError(
                f"input={source}: {len(blank)} of {len(rows)} rows have no text in column "
                f"{column!r}, the first is row {blank[0]} below the header. Fill it in or remove "
                "the row."
            )
    size = (4 if task.generative else 50) * predictor.batch_size
    if output is None:
        return _write_predictions(predictor, rows, sys.stdout, size=size)
    with locked_output(output):
        return _write_output(predictor, rows, output, size=size)


def _write_output(predictor: Predictor, rows: Any, output: Path, *, size: int) -> int:
    """Write predictions to a partial file, resuming an earlier call, then rename it to `output`.

    Raises:
        UserError: The output cannot be written, or another process has written to the file.
    """
    partial = output.with_name(f"{output.name}.{_identity(predictor, rows)}.partial")
    try:
        with open_file(partial, os.O_RDWR | os.O_CREAT) as lines:
            done = _keep_lines(lines, size)
            with TextIOWrapper(lines, encoding="utf-8", newline="\n") as handle:
                count = _write_predictions(predictor, rows, handle, size=size, done=done)
                os.fsync(handle.fileno())
                lines.seek(0)
                written = sum(line.endswith(b"\n") for line in lines)
        if written != count:
            raise UserError(
                f"{partial}: holds {written} lines for {count} rows, so another program changed "
                "it. Remove it and run the same command again."
            )
        replace_synced(partial, output)
    except OSError as error:
        raise UserError(f"output={output}: cannot be written: {error}.") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {partial} holds the finished rows. The same command resumes from it."
        ) from None
    except BaseException:
        if partial.is_file() and not partial.stat().st_size:
            partial.unlink()
        raise
    return count


def _identity(predictor: Predictor, rows: Any) -> str:
    """Return a hash of the inputs that predictions depend on: rows, adapter, settings."""
    module = predictor.module
    digest = hashlib.sha256(fingerprint(module.trainable_tensors().items()).encode())
    settings = {**asdict(module.task.config), "max_length": predictor.max_length}
    digest.update(json.dumps([settings, module.model_config.name_or_path], default=str).encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:8]


def _keep_lines(handle: IO[bytes], size: int) -> int:
    """Cut a file to full groups of `size` lines, seek to its end, and return its line count."""
    lines = handle.readlines()
    count = sum(line.endswith(b"\n") for line in lines) // size * size
    handle.seek(handle.truncate(sum(map(len, lines[:count]))))
    return count


def _write_predictions(
    predictor: Predictor, rows: Any, handle: TextIO, *, size: int, done: int = 0
) -> int:
    from tqdm import tqdm

    with tqdm(total=len(rows), initial=done, unit="row", file=sys.stderr, disable=None) as bar:
        for start in range(done, len(rows), size):
            chunk = [dict(row) for row in rows.select(range(start, min(start + size, len(rows))))]
            predictions = predictor(chunk, first=start + 1)
            for row, prediction in zip(chunk, predictions, strict=True):
                line = {**row, "prediction": prediction}
                text = json.dumps(line, ensure_ascii=False, default=str)
                handle.write(printable(text, json=True) + "\n")
            handle.flush()
            bar.update(len(chunk))
    return len(rows)
