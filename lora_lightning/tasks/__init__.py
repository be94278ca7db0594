"""Tasks that can be learned. `TASKS` names them all."""

from typing import Any

from lora_lightning.config.tasks import (
    TASK_ALIASES,
    TASK_CONFIGS,
    ClassificationConfig,
    SentimentConfig,
)
from lora_lightning.errors import UserError, did_you_mean

from .base import (
    IGNORE,
    LossOutput,
    Task,
    to_device,
)
from .chat import InstructTask
from .classification import ClassificationTask, SentimentTask
from .language_modeling import LanguageModelTask
from .text_to_text import SummarizationTask

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (ClassificationTask, SummarizationTask, InstructTask, LanguageModelTask)
}


def build_task(settings: dict[str, Any]) -> Task:
    """Return the task that `settings["name"]` names.

    Raises:
        UserError: there is no such task, or a setting is unknown to it.
    """
    name = settings.get("name", "classification")
    name = TASK_ALIASES.get(name, name)
    if name not in TASKS:
        raise UserError(
            f"task.name={name!r}: task not found.{did_you_mean(str(name), TASKS)} "
            f"Known: {', '.join(TASKS)}."
        )
    return TASKS[name](TASK_CONFIGS[name](**{**settings, "name": name}))  # type: ignore[call-arg]


__all__ = [
    "IGNORE",
    "TASKS",
    "ClassificationConfig",
    "ClassificationTask",
    "InstructTask",
    "LossOutput",
    "SentimentConfig",
    "SentimentTask",
    "Task",
    "build_task",
    "to_device",
]
