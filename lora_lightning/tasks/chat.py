"""Task that learns the assistant's turns of conversations."""

from __future__ import annotations

from typing import Any

from lora_lightning.config.schema import InstructConfig
from lora_lightning.errors import UserError

from .base import IGNORE
from .columns import need_columns, pick_column, texts_of
from .generation import GenerativeTask

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES = ("system", "user", "assistant", "tool")


class InstructTask(GenerativeTask):
    """Task on conversations in the tokenizer's own chat template.

    Rows are lists of messages ({role, content}, or {from, value}), or pairs of prompt and
    completion (text, or lists of messages). They may also be Alpaca's instruction, input and
    output.

    Only the assistant's turns are learned, each from its first token to the token that ends it. A
    conversation that is too long loses its earliest exchanges, never the end of an answer. The
    system message stays.
    """

    name = "instruct"
    causal_only = True
    dropped_means = "no turn of the assistant, or one that is longer than data.max_length allows"
    dropped_advice = "Give conversations in which the assistant speaks, or raise data.max_length."
    config: InstructConfig

    def __init__(self, config: InstructConfig | None = None) -> None:
        super().__init__(config or InstructConfig())
        self.columns: list[str] = []

    # Rows to conversations -------------------------------------------------------------------

    def learn(self, splits: dict[str, Any]) -> None:
        self.find_inputs((splits.get("train") or next(iter(splits.values()))).column_names)
        for split, rows in splits.items():
            need_columns(split, rows, self.columns)
            for number, row in enumerate(rows, 1):
                self.conversation(row, where=f"the {split} data, row {number}")

    def learn_from_settings(self) -> None:
        self.columns = [self.config.messages_column or MESSAGE_COLUMNS[0]]

    def find_inputs(self, columns: list[str]) -> None:
        known = (self.columns[0], *MESSAGE_COLUMNS) if len(self.columns) == 1 else MESSAGE_COLUMNS
        messages = pick_column(self.config.messages_column, known, columns, "task.messages_column")
        pair = next((pair for pair in PAIRS if set(pair) <= set(columns)), None)
        if messages is not None:
            self.columns = [messages]
        elif pair is not None:
            self.columns = [
                *pair,
                *(["input"] if pair[0] == "instruction" and "input" in columns else []),
            ]
        elif self.columns and set(self.input_columns()) <= set(columns):
            return
        else:
            raise UserError(
                "task=instruct: no conversations found in the columns "
                f"{', '.join(columns)}. Name a column of messages, task.messages_column=NAME, or "
                "give prompt and completion, question and answer, or instruction, input and output."
            )

    def row_of(self, text: str) -> dict[str, Any]:
        if len(self.columns) == 1:
            return {self.columns[0]: [{"role": "user", "content": text}]}
        return {self.columns[0]: text}

    def input_columns(self) -> list[str]:
        if len(self.columns) == 1:
            return self.columns
        return [self.columns[0], *self.columns[2:]]

    def conversation(self, row: dict[str, Any], *, where: str = "row") -> list[dict[str, str]]:
        """Return a row as a list of {role, content}.

        Raises:
            UserError: a role or content is missing or of the wrong type.
        """
        if len(self.columns) == 1:
            found = _messages(row[self.columns[0]], where)
        else:
            question, answer = row[self.columns[0]], row.get(self.columns[1])
            extra = row.get("input") if "input" in self.columns else None
            if isinstance(question, str) and extra not in (None, ""):
                (added,) = texts_of({"input": [extra]}, "input")
                question = f"{question}\n\n{added}"
            found = _messages(question, where, role="user")
            found += _messages(answer, where, role="assistant") if answer is not None else []
        if self.config.system and (not found or found[0]["role"] != "system"):
            found.insert(0, {"role": "system", "content": self.config.system})
        return found

    # Conversations to examples ---------------------------------------------------------------

    def examples(
        self, rows: dict[str, list[Any]], max_length: int, *, targets: bool
    ) -> list[dict[str, Any]]:
        count = len(next(iter(rows.values())))
        found = []
        for index in range(count):
            row = {name: values[index] for name, values in rows.items()}
            found.append(self._example(self.conversation(row), max_length, targets=targets))
        return found

    def _example(
        self, messages: list[dict[str, str]], max_length: int, *, targets: bool
    ) -> dict[str, Any]:
        last = "assistant" if targets else "user"
        while messages and messages[-1]["role"] != last:
            messages = messages[:-1]
        head = [m for m in messages[:1] if m["role"] == "system"]
        body = messages[len(head) :]
        room = max_length if targets else max_length - self.config.generation.max_new_tokens
        truncated = False
        while body:
            ids, labels = self.render([*head, *body], targets=targets)
            if len(ids) <= room:
                if targets and all(label == IGNORE for label in labels):
                    break
                example = {"input_ids": ids, "truncated": truncated}
                return {**example, "labels": labels} if targets else example
            # Drop the earliest exchange, up to the next turn of the user.
            later = (i for i, m in enumerate(body[1:], 1) if m["role"] == "user")
            body, truncated = body[next(later, len(body)) :], True
        return self.nothing(targets=targets)

    def render(
        self, messages: list[dict[str, str]], *, targets: bool = True
    ) -> tuple[list[int], list[int]]:
        """Return the token ids and the labels of a conversation.

        Labels are the ids of the assistant's turns, and IGNORE elsewhere.

        Raises:
            UserError: there is no chat template, or it refuses the conversation.
        """
        text = self._template(messages, add_generation_prompt=not targets)
        spans = []
        for index, message in enumerate(messages if targets else ()):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:index], add_generation_prompt=True)
            after = self._template(messages[: index + 1])
            if not (after.startswith(before) and text.startswith(after.rstrip())):
                raise UserError(
                    "task=instruct: the chat template must write a turn in the same way when "
                    "others follow, and does not. Give conversations of one exchange, or a "
                    "tokenizer with another template: model.tokenizer=NAME."
                )
            spans.append((len(before), len(after.rstrip())))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, labels = list(encoded["input_ids"]), []
        for token, (start, stop) in zip(ids, encoded["offset_mapping"], strict=True):
            inside = any(first <= start and stop <= last for first, last in spans)
            labels.append(token if inside and stop > start else IGNORE)
        if targets and spans and not self._ends_turn(ids, labels):
            ids, labels = _with_end(ids, labels, self.tokenizer.eos_token_id)
        return ids, labels

    def _ends(self, model: Any) -> set[int]:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        labels = self.render(turn)[1]
        return super()._ends(model) | {[label for label in labels if label != IGNORE][-1]}

    def _ends_turn(self, ids: list[int], labels: list[int]) -> bool:
        learned = [label for label in labels if label != IGNORE]
        return bool(learned) and learned[-1] in self.tokenizer.all_special_ids

    def _template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                "task=instruct: requires a tokenizer with a chat template. Choose an "
                "instruction-tuned model, or its tokenizer: model.tokenizer=NAME."
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # templates raise jinja2 errors of any kind
            raise UserError(
                "task=instruct: the chat template rejects the roles "
                f"{[message['role'] for message in messages]}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from None

    def describe(self, raw: dict[str, Any]) -> dict[str, str]:
        messages = self.conversation(raw)
        answer = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        asked = messages[:-1] if answer else messages
        return {"input": " | ".join(m["content"] for m in asked), "target": answer}

    def state(self) -> dict[str, Any]:
        return {"columns": self.columns}

    def restore(self, state: dict[str, Any]) -> None:
        self.columns = list(state["columns"])


def _messages(value: Any, where: str, *, role: str | None = None) -> list[dict[str, str]]:
    """Return messages in one spelling. A text becomes one message of `role`."""
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise UserError(
            f"{where}: a conversation must be a list of messages, and is {type(value).__name__}: "
            f"{str(value)[:60]!r}."
        )
    found = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise UserError(f"{where}: message {number} must be an object, and is {message!r}.")
        speaker = message.get("role") or message.get("from")
        content = (
            message.get("content") if message.get("content") is not None else message.get("value")
        )
        if speaker is None:
            raise UserError(
                f"{where}: message {number} must have a role. Known: {', '.join(ROLES)}."
            )
        speaker = SPEAKERS.get(speaker, speaker)
        if speaker not in ROLES:
            raise UserError(
                f"{where}: message {number}: role {speaker!r} not found. Known: {', '.join(ROLES)}."
            )
        if not isinstance(content, str):
            raise UserError(
                f"{where}: message {number} ({speaker}) must hold text, and holds "
                f"{type(content).__name__}."
            )
        found.append({"role": speaker, "content": content})
    return found


def _with_end(ids: list[int], labels: list[int], eos: int) -> tuple[list[int], list[int]]:
    """Cut everything after the last learned token, and append EOS as a learned token."""
    stop = max(i for i, label in enumerate(labels) if label != IGNORE) + 1
    return [*ids[:stop], eos], [*labels[:stop], eos]
