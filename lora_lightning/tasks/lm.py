"""Language modelling: plain text, every token learned."""

from __future__ import annotations

from typing import Any

from ..settings import LanguageModelConfig
from .base import IGNORE, need_columns, pick_column
from .generative import GenerativeTask
from .summarization import check_texts, which_column

TEXT_COLUMNS = ("text", "content", "document", "body", "article", "story")


class LanguageModelTask(GenerativeTask):
    """Every token of a text is learned, from BOS to EOS.

    A text that is longer than an input goes on in further examples, without BOS, so no token is
    lost; EOS stands at the end of the last one alone.
    """

    name = "lm"
    causal_only = True
    dropped_means = "empty text"
    dropped_advice = "Name the column with the text: task.text_column=NAME."
    config: LanguageModelConfig

    def __init__(self, config: LanguageModelConfig | None = None) -> None:
        super().__init__(config or LanguageModelConfig())
        self.text_column: str | None = None

    def learn(self, splits: dict[str, Any]) -> None:
        self.find_inputs((splits.get("train") or next(iter(splits.values()))).column_names)
        for split, rows in splits.items():
            need_columns(split, rows, [self.text_column])
            check_texts(split, self.text_column, rows[self.text_column])

    def find_inputs(self, columns: list[str]) -> None:
        known = (self.text_column, *TEXT_COLUMNS) if self.text_column else TEXT_COLUMNS
        self.text_column = pick_column(self.config.text_column, known, columns, "task.text_column")
        if self.text_column is None:
            raise which_column("text", columns)

    def examples(
        self, rows: dict[str, list[Any]], max_length: int, *, targets: bool
    ) -> list[dict[str, Any]]:
        assert self.text_column is not None
        texts = [str(text or "").strip() for text in rows[self.text_column]]
        if not targets:
            room = max_length - self.config.max_new_tokens - self.special_count()
            return [
                self.example(ids[-room:], None, truncated=len(ids) > room)
                if ids
                else self.nothing(targets=False)
                for ids in self.tokens(texts)
            ]
        found: list[dict[str, Any]] = []
        for row, ids in enumerate(self.tokens(texts)):
            if not ids:
                found.append({**self.nothing(), "row": row})
                continue
            ids = [*self.frame[0], *ids, self.tokenizer.eos_token_id]
            # A piece begins with the last token of the one before, so that each token is predicted.
            for start in range(0, len(ids) - 1, max_length - 1):
                piece = ids[start : start + max_length]
                labels = [IGNORE, *piece[1:]]
                found.append({"input_ids": piece, "labels": labels, "truncated": False, "row": row})
        return found

    def input_columns(self) -> list[str]:
        assert self.text_column is not None
        return [self.text_column]

    def describe(self, raw: dict[str, Any]) -> dict[str, str]:
        assert self.text_column is not None
        return {"input": str(raw[self.text_column]), "target": ""}

    def state(self) -> dict[str, Any]:
        return {"text_column": self.text_column}

    def restore(self, state: dict[str, Any]) -> None:
        self.text_column = state["text_column"]
