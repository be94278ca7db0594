"""Generation of text by a task, and its comparison with targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lora_lightning.config.schema import GenerativeConfig
from lora_lightning.distributed.parallel_dims import gathers_layers, max_over_ranks
from lora_lightning.models.forward import uncompiled
from lora_lightning.utils.terminal import printable, say

from .base import IGNORE, Task
from .metrics import text_metrics


class TextGenerator(Task):
    """Part of a task that generates text, for metrics, predictions and chat."""

    config: GenerativeConfig
    encoder_decoder: bool
    """Whether the model is an encoder-decoder."""
    tokenizer: Any

    @property
    def generative(self) -> bool:
        return True

    def stream(self, model: nn.Module, prompt: list[int]) -> str:
        """Continue a prompt and print the text to stdout as it comes.

        With beam search, the text comes at the end.
        """
        from transformers import TextStreamer

        class Printer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                super().on_finalized_text(printable(text), stream_end=stream_end)

        beams = self.config.generation.num_beams > 1
        printer = Printer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            ids = self.generate(model, [prompt], **({} if beams else {"streamer": printer}))[0]
        text = self.decode(ids)
        if beams:
            say(text)
        return text

    def collect(self, batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
        """Return the prompt and the answer of each row to generate text for."""
        marked = [row for row, generate in enumerate(batch.get("generate", [])) if generate]
        if not marked:
            return []
        names = ("input_ids", "attention_mask", "labels")
        rows = {name: batch[name].cpu()[marked] for name in names}
        return list(zip(self._prompts(rows), self._answers(rows), strict=True))

    def finish_epoch(
        self,
        metrics: MetricCollection,
        model: nn.Module,
        rows: list[tuple[list[int], list[int]]],
        batch_size: int,
    ) -> None:
        """Generate text for the rows, with similar lengths batched together, and compare it."""
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        predictions = [""] * len(rows)
        for number in range(max_over_ranks(model, len(batches))):
            if (
                self.stop_requested is not None
                and self.stop_requested()
                and not gathers_layers(model)
            ):
                return
            if number >= len(batches):  # another process needs this one's shard of the base
                self.generate(model, [[self.tokenizer.eos_token_id]])
                continue
            prompts = [rows[row][0] for row in batches[number]]
            texts = self.generate(model, prompts, **self._stopping_criteria())
            for row, ids in zip(batches[number], texts, strict=True):
                predictions[row] = self.decode(ids)
        if rows:
            self._compare(metrics, predictions, [self.decode(answer) for _, answer in rows])

    def _stopping_criteria(self) -> dict[str, Any]:
        """Return arguments that stop `generate`, within a text, once the run was asked to end."""
        from transformers import StoppingCriteria

        if self.stop_requested is None:
            return {}
        stop_requested: Callable[[], bool] = self.stop_requested

        class StopRequested(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
                return torch.full((len(input_ids),), stop_requested(), device=input_ids.device)

        return {"stopping_criteria": [StopRequested()]}

    def _compare(
        self, metrics: MetricCollection, predictions: list[str], references: list[str]
    ) -> None:
        """Add texts to the metrics that compare texts."""
        for name, metric in metrics.items(keep_base=True):
            if name in self.config.text_metrics:
                nested = [[reference] for reference in references]
                metric.update(predictions, references if name == "rouge" else nested)

    def compare(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """Return the task's text metrics of predictions."""
        metrics = MetricCollection(text_metrics(self.config.text_metrics), compute_groups=False)
        self._compare(metrics, predictions, references)
        return {name: float(value) for name, value in metrics.compute().items()}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"generated": self.decode(ids)} for ids in self.generate(model, self._prompts(batch))
        ]

    @torch.no_grad()
    def generate(
        self, model: nn.Module, prompts: list[list[int]], **changes: Any
    ) -> list[list[int]]:
        """Continue prompts with the task's settings.

        Prompts are padded on the left if the model is causal.

        Returns:
            Only the new ids of each prompt, up to the end token.
        """
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(prompts), width), pad, dtype=torch.long, device="cpu")
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            place = (
                slice(0, len(prompt)) if self.encoder_decoder else slice(width - len(prompt), width)
            )
            ids[row, place] = torch.tensor(prompt, device="cpu")
            mask[row, place] = 1
        device = next(model.parameters()).device
        ends = self._ends(model)
        was_training = model.training
        model.eval()
        try:
            with uncompiled(model):
                found = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    **{**self._generation(ends), **changes},
                )
        finally:
            model.train(was_training)
        new = found[:, 1 if self.encoder_decoder else width :].tolist()
        return [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in new]

    def _ends(self, model: nn.Module) -> set[int]:
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        others = own if isinstance(own, list) else [own]
        return {token for token in (self.tokenizer.eos_token_id, *others) if token is not None}

    def _generation(self, ends: set[int]) -> dict[str, Any]:
        settings = {**asdict(self.config.generation), "top_k": 0}
        if not settings["do_sample"]:
            settings |= dict.fromkeys(("temperature", "top_p", "top_k"))
        return {
            **settings,
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": sorted(ends),
            "use_cache": True,
        }

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _prompts(self, batch: dict[str, Any]) -> list[list[int]]:
        """Return each row's tokens up to its last target."""
        ids, shown = batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        stops = [len(row) for row in ids]
        if "labels" in batch and not self.encoder_decoder:
            stops = [start for start, _ in map(_last_run, batch["labels"].tolist())]
        return [
            [token for token, seen in zip(row[:stop], mask[:stop], strict=True) if seen]
            for row, mask, stop in zip(ids, shown, stops, strict=True)
        ]

    def _answers(self, batch: dict[str, Any]) -> list[list[int]]:
        """Return each row's last target."""
        labels = batch["labels"].tolist()
        if self.encoder_decoder:
            return [[label for label in row if label != IGNORE] for row in labels]
        return [row[slice(*_last_run(row))] for row in labels]


def _last_run(labels: list[int]) -> tuple[int, int]:
    """Return the start and stop of a row's last run of labels, or its length twice if none."""
    stop = len(labels)
    while stop and labels[stop - 1] == IGNORE:
        stop -= 1
    if not stop:
        return len(labels), len(labels)
    start = stop
    while start and labels[start - 1] != IGNORE:
        start -= 1
    return start, stop
