"""Predictions of a trained model for rows and texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_lightning.config.compose import settings_of
from lora_lightning.data.collators import PaddingCollator
from lora_lightning.lora import UserError
from lora_lightning.lora.embeddings import vocabulary_rows
from lora_lightning.models.model_config import load_model_config, max_positions
from lora_lightning.models.tokenizer import check_tokens_known
from lora_lightning.tasks import to_device
from lora_lightning.training.module import LoraModule
from lora_lightning.utils.quiet import quiet_libraries

from .loading import load_trained
from .overrides import changed_config, model_settings


class Predictor:
    """Predictor with a trained module, in batches of rows of similar length.

    Args:
        module: Module from `load_trained`.
        batch_size: Rows per batch. Defaults to 32.
        max_length: Longest input in tokens. Defaults to None: 512, or less if the model's limit is
            lower.
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
        for number, example in enumerate(examples, first):
            if not example["input_ids"]:
                raise UserError(
                    f"row {number} below the header: no text in column "
                    f"{task.input_columns()[0]!r}. Fill it in or remove the row."
                )
            self.check_tokens(example["input_ids"], where=f"row {number} below the header")
        order = sorted(range(len(rows)), key=lambda i: -len(examples[i]["input_ids"]))
        predictions: list[dict[str, Any]] = [{} for _ in rows]
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.collate([examples[i] for i in chosen])
            for i, prediction in zip(chosen, self._predict(batch), strict=True):
                predictions[i] = prediction
        return predictions

    def check_tokens(self, ids: list[int], *, where: str) -> None:
        """Raise UserError for a text with a token that has no embedding in the model."""
        rows = vocabulary_rows(self.module.model)
        check_tokens_known(ids, rows, self.module.tokenizer, where=where)

    @torch.inference_mode()
    def _predict(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        device = next(self.module.parameters()).device
        return self.module.predict_step(to_device(batch, device), 0)


def predictor_for(
    folder: str | Path, overrides: Sequence[str], *, verb: str = "predict"
) -> Predictor:
    """Return a predictor with an adapter's saved settings, changed by overrides.

    Args:
        folder: Adapter folder of a run.
        overrides: Overrides in Hydra's grammar.
        verb: See `changed_config`. Defaults to "predict".
    """
    config = changed_config(folder, overrides, verb=verb)
    quiet_libraries()
    settings = settings_of(config)
    module = load_trained(folder, model=model_settings(config))
    module.task.config = type(module.task.config)(**settings.task)
    batch_size = settings.data.eval_batch_size or 2 * settings.data.batch_size
    return Predictor(module, batch_size=batch_size, max_length=settings.data.max_length)


def predict_text(predictor: Predictor, text: str) -> dict[str, Any]:
    """Return a text as a row of the task, with its `prediction`, as a line of a file has it."""
    row = row_of(predictor, text)
    return {**row, "prediction": predictor([row])[0]}


def row_of(predictor: Predictor, text: str) -> dict[str, Any]:
    """Return a text as a row of the predictor's task.

    Raises:
        UserError: The text is empty.
    """
    if not text.strip():
        raise UserError('text is empty. Type one: text="...".')
    return predictor.module.task.row_of(text)
