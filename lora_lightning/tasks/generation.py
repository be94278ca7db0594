"""Common base of summarization, conversations and language modeling, whose target is text."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import MetricCollection

from lora_lightning.config.schema import GenerativeConfig, ModelConfig
from lora_lightning.distributed.parallel_dims import ParallelDims
from lora_lightning.errors import UserError
from lora_lightning.models.forward import causal_inputs
from lora_lightning.models.lm_head import logits_at, loss_at
from lora_lightning.models.loading import load_generator

from .base import IGNORE, LossOutput
from .metrics import Perplexity, TokenAccuracy, text_metrics
from .text_generation import TextGenerator

MIN_PROMPT = 2
"""Minimum tokens that must remain for a prompt, including special tokens."""


class GenerativeTask(TextGenerator):
    """Task that learns the tokens of a target, given the tokens of a prompt.

    Causal models see one sequence, BOS prompt target EOS. They predict each target token from the
    tokens before it. Encoder-decoders read the prompt and write the target. BOS appears where the
    tokenizer itself puts one. EOS is always a target.
    """

    headline = "rougeL"
    dropped_means = "an empty source or target, or a target longer than data.max_length allows"
    dropped_advice = (
        "Name the right columns (task.source_column, task.target_column), or raise data.max_length."
    )
    causal_only: ClassVar[bool] = False
    """Whether an encoder-decoder cannot learn the task."""
    config: GenerativeConfig

    def __init__(self, config: GenerativeConfig) -> None:
        self.config = config
        self.encoder_decoder = False
        self.tokenizer: Any = None
        self.frame: tuple[list[int], list[int]] = ([], [])

    @property
    def peft_task_type(self) -> str:  # type: ignore[override]
        """PEFT's name for the kind of model."""
        return "SEQ_2_SEQ_LM" if self.encoder_decoder else "CAUSAL_LM"

    def prepare(self, model_config: Any) -> None:
        self.encoder_decoder = bool(getattr(model_config, "is_encoder_decoder", False))
        if self.encoder_decoder and self.causal_only:
            raise UserError(
                f"task={self.name}: requires a causal model, and this one is an encoder-decoder. "
                "Choose another model, or task=summarization with a source and a target."
            )

    # Rows to examples ------------------------------------------------------------------------

    def strata(self, raw: Any) -> list[Any] | None:
        return None

    def signature(self) -> dict[str, Any]:
        encoding = ("prompt", "system", "blocks")
        settings = {name: getattr(self.config, name, None) for name in encoding}
        settings["max_new_tokens"] = self.config.generation.max_new_tokens
        return {"task": self.name, **settings, **self.state()}

    def encode(
        self, rows: dict[str, list[Any]], tokenizer: Any, max_length: int, *, targets: bool = True
    ) -> dict[str, Any]:
        self.tokenizer, self.frame = tokenizer, _frame(tokenizer)
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"task={self.name}: requires a tokenizer with an end-of-sequence token. Choose "
                "another: model.tokenizer=NAME."
            )
        new = self.config.generation.max_new_tokens
        if not self.encoder_decoder and max_length - new < MIN_PROMPT:
            raise UserError(
                f"task.generation.max_new_tokens={new}: must leave room for a prompt in "
                f"data.max_length={max_length}. Lower the former or raise the latter."
            )
        examples = self.examples(rows, max_length, targets=targets)
        names = {name for example in examples for name in example}
        return {name: [example[name] for example in examples] for name in sorted(names)}

    @abstractmethod
    def examples(
        self, rows: dict[str, list[Any]], max_length: int, *, targets: bool
    ) -> list[dict[str, Any]]:
        """Return `input_ids`, `truncated` and, with targets, `labels` for each row.

        A row with nothing to learn gives `nothing()`.
        """

    @staticmethod
    def nothing(*, targets: bool = True) -> dict[str, Any]:
        """Return the placeholder for a row to drop."""
        return {"input_ids": [], "truncated": False, **({"labels": []} if targets else {})}

    def example(
        self, prompt: list[int], target: list[int] | None, *, truncated: bool
    ) -> dict[str, Any]:
        """Build an example from token ids without special tokens.

        A `target` of None means that the target is to be predicted.
        """
        before, after = self.frame
        if self.encoder_decoder:
            found = {"input_ids": [*before, *prompt, *after], "truncated": truncated}
            if target is not None:
                found["labels"] = self._ended([*before, *target, *after])
            return found
        prompt = [*before, *prompt]
        if target is None:
            return {"input_ids": prompt, "truncated": truncated}
        target = self._ended(target)
        return {
            "input_ids": [*prompt, *target],
            "labels": [IGNORE] * len(prompt) + target,
            "truncated": truncated,
        }

    def special_count(self) -> int:
        """Return the number of special tokens in an example, in addition to prompt and target."""
        before, after = self.frame
        return len(before) + (len(after) if self.encoder_decoder else 1)

    def _ended(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts, without special tokens."""
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [list(ids) for ids in found]

    # Model and loss --------------------------------------------------------------------------

    def build_model(
        self, config: ModelConfig, tokenizer: Any, shards: ParallelDims | None = None
    ) -> tuple[nn.Module, list[str]]:
        self.tokenizer = tokenizer
        return load_generator(config, tokenizer, shards), []

    def locate(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add `places` too, the positions of the logits that predict the batch's targets.

        A batch without a target gets one place with an ignored label. A rank with such a batch
        then takes the same steps as the other ranks. A batch for prediction has no `places`.
        """
        batch = super().locate(batch)
        if "labels" not in batch or "places" in batch:
            return batch
        learned = (self._wanted(batch) != IGNORE).flatten().nonzero().flatten()
        return {**batch, "places": learned if len(learned) else learned.new_zeros(1)}

    def _wanted(self, batch: dict[str, Any]) -> Tensor:
        """Return the label predicted at each position.

        For a causal model, this is the label one position later.
        """
        labels: Tensor = batch["labels"]
        if self.encoder_decoder:
            return labels
        return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
        if "places" not in batch:
            batch = self.locate(batch)
        targets = self._wanted(batch).flatten()[batch["places"]]
        total, correct = loss_at(model, self._inputs(model, batch), batch["places"], targets)
        return LossOutput(total, (targets != IGNORE).sum(), correct)

    def _inputs(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs that the model reads from a batch."""
        if not self.encoder_decoder:
            return causal_inputs(model, batch)
        shifted = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])  # type: ignore[operator]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return {**inputs, "decoder_input_ids": shifted}

    def logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        shown = batch["attention_mask"] == 1
        if self.encoder_decoder:
            batch = {**batch, "labels": batch["input_ids"].masked_fill(~shown, IGNORE)}
        return logits_at(model, self._inputs(model, batch), shown.flatten().nonzero().flatten())

    # Metrics and generation ------------------------------------------------------------------

    def metrics(self) -> MetricCollection:
        metrics: dict[str, Any] = {"perplexity": Perplexity(), "token_accuracy": TokenAccuracy()}
        if self.generate_rows:
            metrics |= text_metrics(self.config.text_metrics)
        return MetricCollection(metrics, compute_groups=False)

    def metric_names(self) -> list[str]:
        names = ["perplexity", "token_accuracy"]
        if not self.generate_rows:
            return names
        rouge = ["rouge1", "rouge2", "rougeL"]
        return names + [
            one
            for name in self.config.text_metrics
            for one in (rouge if name == "rouge" else [name])
        ]

    @property
    def packs(self) -> bool:
        return not self.encoder_decoder

    @property
    def generate_rows(self) -> int:
        return self.config.generate_rows

    def update_metrics(
        self,
        metrics: MetricCollection,
        model: nn.Module,
        batch: dict[str, Any],
        output: LossOutput,
    ) -> None:
        metrics["perplexity"].update(output.total, output.count)
        metrics["token_accuracy"].update(output.outputs, output.count)

    # What people see -------------------------------------------------------------------------

    def show_prediction(self, prediction: dict[str, Any]) -> str:
        return str(prediction["generated"])

    def show_example(self, example: dict[str, Any], tokenizer: Any) -> str:
        ids, labels = example["input_ids"], example["labels"]
        if self.encoder_decoder:
            return f"{tokenizer.decode(ids)} => [{tokenizer.decode(labels)}]"
        parts: list[tuple[bool, list[int]]] = []
        for token, label in zip(ids, labels, strict=True):
            learned = label != IGNORE
            if not parts or parts[-1][0] != learned:
                parts.append((learned, []))
            parts[-1][1].append(token)
        shown = [(learned, tokenizer.decode(tokens)) for learned, tokens in parts]
        return "".join(f"[{text}]" if learned else text for learned, text in shown)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of the special tokens that a tokenizer puts before and after a text."""
    whole = tokenizer("a")["input_ids"]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(inner) + 1)
    start = next(i for i in starts if whole[i : i + len(inner)] == inner)
    return whole[:start], whole[start + len(inner) :]
