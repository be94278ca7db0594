"""Chat with a trained model in a terminal."""

from __future__ import annotations

import sys
from typing import Any

from lora_lightning.lora import UserError
from lora_lightning.tasks import InstructTask

from .predictor import Predictor, row_of

HELP = "Type a message; an empty line or Ctrl-D ends, /reset starts over."


def answer(predictor: Predictor, text: str) -> str:
    """Print the answer to one text as it is generated, and return it."""
    return _reply(predictor, row_of(predictor, text))


def chat(predictor: Predictor) -> None:
    """Read lines and answer them, until an empty line or the end of input.

    A model of the task `instruct` sees the whole conversation; any other sees each line alone.

    Raises:
        UserError: The task does not generate text.
    """
    task = predictor.module.task
    if not task.generative:
        raise UserError(
            f"chat: requires a task that writes text, and this adapter has task={task.name}. "
            'Use: lora-lightning predict adapter=DIR text="..."'
        )
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            break
        if not line:
            break
        if line == "/reset":
            messages = []
            continue
        if not isinstance(task, InstructTask):
            answer(predictor, line)
            continue
        messages.append({"role": "user", "content": line})
        task.columns = ["messages"]
        reply = _reply(predictor, {"messages": messages})
        messages.append({"role": "assistant", "content": reply})


def _reply(predictor: Predictor, row: dict[str, Any]) -> str:
    module = predictor.module
    task: Any = module.task
    columns = {name: [row.get(name)] for name in task.input_columns()}
    prompt = task.encode(columns, module.tokenizer, predictor.max_length, targets=False)
    if not prompt["input_ids"][0]:
        raise UserError("the text is too long. Shorten it, or raise data.max_length.")
    predictor.check_tokens(prompt["input_ids"][0], where="the text")
    return str(task.stream(module.model, prompt["input_ids"][0]))
