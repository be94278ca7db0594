"""Use of a trained adapter: load, predict, evaluate, merge."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, replace
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, TextIO

import torch
from torch import Tensor

from lora_lightning.adapters.folder import (
    base_fingerprint,
    belongs_to_quantised,
    damaged,
    read_sidecar,
    refuse_quantised,
    refuse_run,
    save_tokenizer,
)
from lora_lightning.config.compose import settings_saved
from lora_lightning.config.schema import ModelConfig
from lora_lightning.config.untrusted import refuse_links
from lora_lightning.data.collators import PaddingCollator
from lora_lightning.data.files import load_rows
from lora_lightning.lora import UserError, load_adapter
from lora_lightning.lora.embeddings import vocabulary_rows
from lora_lightning.lora.initialization.loftq import copy_quantized_values
from lora_lightning.lora.serialization.checksums import check_files
from lora_lightning.models.loading import (
    fingerprint,
    load_model_config,
    load_tokenizer,
    max_positions,
)
from lora_lightning.models.tokenizer import refuse_unknown
from lora_lightning.tasks import build_task, to_device
from lora_lightning.training.module import LoraModule
from lora_lightning.utils.atomic_write import replace_synced
from lora_lightning.utils.locks import locked_output, open_file
from lora_lightning.utils.output_folders import refuse_loss, replaced_folder
from lora_lightning.utils.terminal import printable

from .output_files import refuse_other_file


def load_trained(
    folder: str | Path,
    *,
    model: dict[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> LoraModule:
    """Return a LoraModule in eval mode, with the adapter of a run in `folder`.

    Args:
        folder: adapter folder of a run.
        model: changes to how the base model is loaded, such as {"dtype": "bfloat16"}, or
            {"name_or_path": "..."} if the base model has moved.
        device: target device; None: a GPU if there is one.

    Raises:
        UserError: the folder is damaged, or the base model differs from the one used in training.
    """
    folder = Path(folder)
    sidecar = read_sidecar(folder)
    settings = settings_saved(sidecar["settings"])
    task = build_task(settings.task)
    try:
        task.restore(sidecar["task_state"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(folder, error) from None
    model_settings = {**asdict(settings.model), **(model or {})}
    if settings.lora is None:
        check_files(folder)  # an adapter's files are checked when it is loaded
        model_settings["name_or_path"] = str(folder)
    config = ModelConfig(**model_settings)
    refuse_quantised(folder, on=config.quantization)
    if config.new_tokens != settings.model.new_tokens:
        raise UserError(f"adapter {folder} has its own model.new_tokens: leave that setting out.")
    own = {"tokenizer": str(folder), "new_tokens": []}  # the saved tokenizer has the new tokens
    tokenizer = load_tokenizer(ModelConfig(**{**asdict(config), **own}))
    module = LoraModule(task, config, settings.lora, tokenizer=tokenizer)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with device:  # load weights directly to the device
        base, _ = task.build_model(config, tokenizer)
    module.adopt(base, None if settings.lora is None else load_adapter(base, folder))
    _check_base(module, sidecar.get("base_fingerprint", ""), folder)
    return module.to(device).eval()


def _check_base(module: LoraModule, recorded: str, folder: Path) -> None:
    dtypes = {parameter.dtype for parameter in module.model.parameters()}
    if not recorded or not dtypes <= {torch.float32, torch.bfloat16}:
        return
    if base_fingerprint(module) != recorded:
        raise UserError(
            f"adapter {folder} was trained on another base model than "
            f"{module.model_config.name_or_path}: the shapes agree, the weights do not. "
            "Give the right one: model.name_or_path=..."
        )


class Predictor:
    """Predictor with a trained module, in batches of rows of similar length.

    Args:
        module: module from `load_trained`.
        batch_size: rows per batch.
        max_length: longest input in tokens; None: 512, or less if the model's limit is lower.
    """

    def __init__(
        self, module: LoraModule, *, batch_size: int = 32, max_length: int | None = None
    ) -> None:
        self.module = module
        self.batch_size = batch_size
        limit = max_positions(load_model_config(module.model_config)) or 10**9
        self.max_length = min(max_length or 512, limit)
        self.collate = PaddingCollator(module.tokenizer.pad_token_id)

    def __call__(self, rows: list[dict[str, Any]], *, first: int = 1) -> list[dict[str, Any]]:
        """Return predictions for raw rows in their order; messages count rows from `first`."""
        task, tokenizer = self.module.task, self.module.tokenizer
        columns = {name: [row.get(name) for row in rows] for name in task.input_columns()}
        encoded = task.encode(columns, tokenizer, self.max_length, targets=False)
        encoded.pop("truncated")
        examples = [{name: values[i] for name, values in encoded.items()} for i in range(len(rows))]
        for index, example in enumerate(examples):
            if not example["input_ids"]:
                raise UserError(
                    f"row {first + index} below the header holds no text in "
                    f"{task.input_columns()[0]!r}: fill it in or remove the row."
                )
            self.refuse_unknown(example["input_ids"], where=f"row {first + index} below the header")
        order = sorted(range(len(rows)), key=lambda i: -len(examples[i]["input_ids"]))
        found: list[dict[str, Any]] = [{} for _ in rows]
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.collate([examples[i] for i in chosen])
            for i, prediction in zip(chosen, self._predict(batch), strict=True):
                found[i] = prediction
        return found

    def refuse_unknown(self, ids: list[int], *, where: str) -> None:
        """Raise UserError for a text with a token that has no embedding in the model."""
        rows = vocabulary_rows(self.module.model)
        refuse_unknown(ids, rows, self.module.tokenizer, where=where)

    @torch.inference_mode()
    def _predict(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        device = next(self.module.parameters()).device
        return self.module.predict_step(to_device(batch, device), 0)


def predict_text(predictor: Predictor, text: str) -> dict[str, Any]:
    """Return the prediction for one text."""
    return {"text": text, **predictor([row_of(predictor, text)])[0]}


def row_of(predictor: Predictor, text: str) -> dict[str, Any]:
    """Return a text as a row of the predictor's task.

    Raises:
        UserError: the text is empty.
    """
    if not text.strip():
        raise UserError('text is empty: give text="...".')
    return predictor.module.task.row_of(text)


def predict_file(predictor: Predictor, source: Path, output: Path | None) -> int:
    """Predict for the rows of a file, and write JSONL, one line per row, to `output` or stdout.

    Rows are written when they are done, to a partial file beside `output` that is renamed at the
    end. After an interruption, the same call resumes from the partial file.

    Returns:
        The number of rows.

    Raises:
        UserError: a row has no text, the output cannot be written, or it is another program's file.
    """
    if output is not None:
        refuse_other_file(output, by="predict", sources=[source])
    rows = load_rows("input", source)
    task = predictor.module.task
    task.find_inputs(rows.column_names)
    for column in task.input_columns()[:1]:
        blank = [
            row for row, value in enumerate(rows[column][:], 1) if not str(value or "").strip()
        ]
        if blank:
            raise UserError(
                f"{len(blank)} of {len(rows)} rows hold no text in {column!r}, the first is row "
                f"{blank[0]} below the header: fill it in or remove the row."
            )
    size = (4 if task.generative else 50) * predictor.batch_size
    if output is None:
        return _write_predictions(predictor, rows, sys.stdout, size=size)
    with locked_output(output):
        return _write_whole(predictor, rows, output, size=size)


def _write_whole(predictor: Predictor, rows: Any, output: Path, *, size: int) -> int:
    """Write predictions to a partial file, resuming an earlier call, then rename it to `output`.

    Raises:
        UserError: the output cannot be written, or another process has written to the file.
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
                f"{partial} holds {written} lines for {count} rows: another program has changed "
                "it. Remove it and run the same command again."
            )
        replace_synced(partial, output)
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error}.") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {partial} holds what is done. The same command goes on with it."
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
    kept = sum(line.endswith(b"\n") for line in lines) // size * size
    handle.seek(handle.truncate(sum(map(len, lines[:kept]))))
    return kept


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


def merge(folder: str | Path, output: str | Path, *, model: dict[str, Any] | None = None) -> float:
    """Merge an adapter into its base model and write a plain Hugging Face folder.

    Returns:
        The largest logit difference between the adapter model and the merged model, over a few
        texts. The merged model is read back from disk for this.
    """
    refuse_links(Path(folder))
    refuse_run(Path(output))
    refuse_loss(Path(output), by="merge", sources=[folder])
    module = _unquantised(Path(folder), model or {})
    if module.adapter is None:
        raise UserError(f"adapter={folder} is a fully fine-tuned model: there is nothing to merge.")
    before = _probe(module)
    sources = (folder, module.model_config.name_or_path)
    with replaced_folder(Path(output), by="merge", sources=sources) as staging:
        merged = module.adapter.merge_and_unload()
        merged.save_pretrained(staging)  # type: ignore[operator]
        save_tokenizer(module.tokenizer, staging)
        dtype = str(next(merged.parameters()).dtype).removeprefix("torch.")
        config = ModelConfig(name_or_path=str(staging), dtype=dtype)
        module.adopt(module.task.build_model(config, module.tokenizer)[0].eval(), None)
        gap = (_probe(module) - before).abs().max().item()
    return gap


def quantisation_gap(folder: Path, merged: Path, *, model: dict[str, Any]) -> float:
    """Return the largest logit difference between an adapter and its merged model.

    The adapter runs on its quantized base. The maximum is over a few texts.
    """
    module = load_trained(folder, model=model, device="cpu")
    before = _probe(module)
    config = ModelConfig(name_or_path=str(merged))
    module.adopt(module.task.build_model(config, module.tokenizer)[0].eval(), None)
    return (_probe(module) - before).abs().max().item()


def _unquantised(folder: Path, model: dict[str, Any]) -> LoraModule:
    """Return an adapter on its floating-point base, ready to merge.

    The base has its values from before quantization. An adapter that compensates for the
    quantization instead gets the values that remain after it.
    """
    if not belongs_to_quantised(folder):
        return load_trained(folder, model={**model, "quantization": None}, device="cpu")
    module = load_trained(folder, model=model, device="cpu")
    config = replace(module.model_config, quantization=None)
    base, _ = module.task.build_model(config, module.tokenizer)
    assert module.adapter is not None
    copy_quantized_values(base, module.adapter.remove())
    module.adopt(base, load_adapter(base, folder))
    return module.eval()


PROBES = (
    "A short text.",
    "Nothing about this was worth the wait, and yet I would not have missed it.",
    "It arrived on Tuesday, two days early, in a box far too large for what was in it.",
    "no",
)


@torch.inference_mode()
def _probe(module: LoraModule) -> Tensor:
    encoded = module.tokenizer(list(PROBES))["input_ids"]
    batch = PaddingCollator(module.tokenizer.pad_token_id)([{"input_ids": ids} for ids in encoded])
    return module.task.logits(module.model, batch).float()
