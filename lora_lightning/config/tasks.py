"""Settings of the tasks as plain dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lora_lightning.errors import UserError
from lora_lightning.utils.checks import check_choice, check_range

from .monitor import MONITORS, TEXT_METRICS


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
        check_choice("task.monitor", self.monitor, MONITORS)
        check_choice("task.mode", self.mode, ("max", "min", None))


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
            check_range(f"task.generation.{name}", getattr(self, name), "[1, inf)", words=())
        if self.temperature == 0:
            raise UserError(
                "task.generation.temperature=0: must be above 0. For the most probable tokens, set "
                "task.generation.do_sample=false."
            )
        check_range("task.generation.temperature", self.temperature, "(0, inf)", words=())
        check_range("task.generation.top_p", self.top_p, "(0, 1]", words=())


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
        check_range("task.generate_rows", self.generate_rows, "[-1, inf)", words=())
        for metric in self.text_metrics:
            check_choice("task.text_metrics", metric, TEXT_METRICS)
        check_choice("task.mode", self.mode, ("max", "min", None))

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
                    f"task.{name}={value}: is an alias of task.generation.{name}={given[name]}. "
                    "Remove one of the two."
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
                f"task.prompt={self.prompt!r}: must hold {{source}} once, where the source goes."
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
                f"task.generate_rows={self.generate_rows}: not supported with task=lm, whose rows "
                "have no target to compare a text with."
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
