"""What is learned. `TASKS` names them all."""

from typing import Any

from ..lora.errors import UserError, did_you_mean
from ..settings import SentimentConfig
from .base import IGNORE, LossOutput, Task
from .sentiment import SentimentTask

TASKS: dict[str, tuple[type[Any], type[Task]]] = {"sentiment": (SentimentConfig, SentimentTask)}


def build_task(settings: dict[str, Any]) -> Task:
    """The task that `settings["name"]` names.

    Raises:
        UserError: there is no such task, or a setting is unknown to it.
    """
    name = settings.get("name", "sentiment")
    if name not in TASKS:
        raise UserError(
            f"task.name={name!r}: there is no such task.{did_you_mean(str(name), TASKS)} "
            f"Known: {', '.join(TASKS)}."
        )
    config_class, task_class = TASKS[name]
    return task_class(config_class(**settings))  # type: ignore[call-arg]


__all__ = [
    "IGNORE",
    "TASKS",
    "LossOutput",
    "SentimentConfig",
    "SentimentTask",
    "Task",
    "build_task",
]
