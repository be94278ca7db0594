"""Measurement of what a run retains and forgets of its base's knowledge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lora_lightning.data.collators import PaddingCollator
from lora_lightning.data.local_files import load_rows
from lora_lightning.lora import UserError
from lora_lightning.tasks import IGNORE, to_device
from lora_lightning.training.module import LoraModule
from lora_lightning.utils.output_folders import expanded

from .loggers import log_after

COLUMNS = ("text", "sentence", "document", "content")
POSITIONS = 2048
"""Number of tokens, with padding, that are computed at a time."""


class Retention(Callback):
    """A callback that measures on texts unrelated to the task how much of the base is retained.

    For a causal language model it logs `val/retained_loss`, the loss per token of those texts. For
    any other model it logs `val/retained_similarity`. For each pair of texts, the cosine
    similarity of their mean hidden states is computed. The metric is the correlation of these
    similarities with the base's own over all pairs. It is 1 if nothing has moved
    (representational similarity analysis, Kriegeskorte et al. 2008).

    Both are measured before the first step (kept in `before`) and in every validation.

    Args:
        texts: File of texts, as JSONL, CSV, or plain text with one text per line. Defaults to
            None, which disables the measurement.
        count: Number of texts used, from the first on. Defaults to 64.
        max_length: Maximum length in tokens. Longer texts are truncated. Defaults to 256.
    """

    def __init__(self, texts: str | None = None, count: int = 64, max_length: int = 256) -> None:
        self.texts = texts
        self.count = count
        self.max_length = max_length
        self._batches: list[dict[str, Any]] = []
        self._reference: Tensor | None = None
        self.before: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.texts is not None and not self._batches:
            assert isinstance(pl_module, LoraModule)
            self._batches = _batches(self._read(), pl_module.tokenizer, self.max_length)

    def _read(self) -> list[str]:
        assert self.texts is not None
        option = "callbacks.retention.texts"
        rows = load_rows(option, expanded(self.texts, option))
        column = next((name for name in COLUMNS if name in rows.column_names), None)
        if column is None:
            raise UserError(
                f"{option}={self.texts} has no column {' or '.join(COLUMNS)}; its columns are "
                f"{', '.join(rows.column_names)}."
            )
        texts = [str(text).strip() for text in rows[column][:] if str(text or "").strip()]
        if len(texts) < 3:
            raise UserError(f"{option}={self.texts} holds {len(texts)} texts: give at least 3.")
        return texts[: self.count]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._batches or trainer.global_step > 0:
            return
        assert isinstance(pl_module, LoraModule)
        if not _has_loss(pl_module):
            adapter = pl_module.adapter
            with nullcontext() if adapter is None else adapter.disabled():
                self._reference = self._similarities(pl_module)
        self.before = self._measure(pl_module)
        log_after(trainer, self.before, 0)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._batches or trainer.sanity_checking:
            return
        assert isinstance(pl_module, LoraModule)
        for name, value in self._measure(pl_module).items():
            pl_module.log(name, value, sync_dist=True)  # the same on all ranks

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self._reference, "before": self.before} if self.before else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint's measurements of the model before training.

        Raises:
            UserError: If they are not a list of similarities, or a metric is not a number.
        """
        reference, before = state_dict.get("reference"), state_dict.get("before", {})
        numbers = isinstance(before, dict) and all(
            isinstance(name, str) and isinstance(value, float) for name, value in before.items()
        )
        is_list = isinstance(reference, torch.Tensor) and reference.dim() == 1
        if not numbers or not (is_list or reference is None):
            raise UserError("the checkpoint's state of Retention was not written by a run.")
        self._reference, self.before = reference, before

    def _measure(self, module: LoraModule) -> dict[str, float]:
        if _has_loss(module):
            return {"val/retained_loss": self._loss(module)}
        if self._reference is None:  # validation without a preceding training
            return {}
        pair = torch.stack([self._reference, self._similarities(module)])
        return {"val/retained_similarity": float(torch.corrcoef(pair)[0, 1])}

    @torch.no_grad()
    def _loss(self, module: LoraModule) -> float:
        total, count = 0.0, 0
        for batch in self._on(module):
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
            output = module.task.loss(module.model, {**batch, "labels": labels})
            total, count = total + float(output.total), count + int(output.count)
        return total / count

    @torch.no_grad()
    def _similarities(self, module: LoraModule) -> Tensor:
        """Return the cosine similarity of each pair of texts, in fp32 on the CPU."""
        model: Any = module.model
        backbone = getattr(model, model.base_model_prefix)
        if model.config.is_encoder_decoder:
            backbone = backbone.encoder
        means = []
        for batch in self._on(module):
            hidden = backbone(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            means.append((hidden * mask).sum(1) / mask.sum(1))
        unit = nn.functional.normalize(torch.cat(means), dim=-1)
        first, second = torch.triu_indices(len(unit), len(unit), 1, device="cpu")
        return (unit @ unit.t()).cpu()[first, second]

    def _on(self, module: LoraModule) -> Iterator[dict[str, Any]]:
        """Yield the batches on the module's device, with the module in eval mode meanwhile."""
        training = module.training
        module.eval()
        for batch in self._batches:
            yield to_device(batch, module.device)
        module.train(training)


def _has_loss(module: LoraModule) -> bool:
    """Return whether the model gives the probability of a text."""
    model: Any = module.model
    return module.task.generative and not model.config.is_encoder_decoder


def _batches(texts: list[str], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Return batches of texts of similar length, padded on the right."""
    rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    rows = sorted((row for row in rows if len(row) > 1), key=len, reverse=True)
    collate = PaddingCollator(tokenizer.pad_token_id)
    batches = []
    while rows:
        size = max(1, POSITIONS // len(rows[0]))
        chunk, rows = rows[:size], rows[size:]
        batches.append(collate([{"input_ids": ids} for ids in chunk]))
    return batches
