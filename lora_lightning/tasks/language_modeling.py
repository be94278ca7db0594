"""Language modeling on plain text, with every token learned."""

from __future__ import annotations

from typing import Any

from lora_lightning.config.schema import LanguageModelConfig

from .base import IGNORE
from .columns import as_text, check_texts, need_columns, pick_column, texts_of, which_column
from .generation import GenerativeTask

MIN_PIECE = 8
"""Minimum free tokens in a block for a document to begin in it."""
SAMPLE_PROMPT = 16
"""Tokens of a document that samples continue."""
TEXT_COLUMNS = ("text", "content", "document", "body", "article", "story")


class LanguageModelTask(GenerativeTask):
    """Task that learns every token of a text, from BOS to EOS.

    Documents fill blocks of the full length one after the other. A document that does not fit
    continues in the next block, without BOS, so no token is lost. EOS appears only at the very end
    of a document. Position ids restart with each document, and attention ends there (see
    `PackingCollator`).
    """

    name = "lm"
    causal_only = True
    headline = "perplexity"
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
            check_texts(split, self.text_column, rows[self.text_column][:])

    def learn_from_settings(self) -> None:
        self.text_column = self.config.text_column or TEXT_COLUMNS[0]

    def find_inputs(self, columns: list[str]) -> None:
        known = (self.text_column, *TEXT_COLUMNS) if self.text_column else TEXT_COLUMNS
        self.text_column = pick_column(self.config.text_column, known, columns, "task.text_column")
        if self.text_column is None:
            raise which_column("text", columns)

    def examples(
        self, rows: dict[str, list[Any]], max_length: int, *, targets: bool
    ) -> list[dict[str, Any]]:
        assert self.text_column is not None
        texts = [text.strip() for text in texts_of(rows, self.text_column)]
        if not targets:
            room = max_length - self.config.generation.max_new_tokens - self.special_count()
            return [
                self.example(ids[-room:], None, truncated=len(ids) > room)
                if ids
                else self.nothing(targets=False)
                for ids in self.tokens(texts)
            ]
        found: list[dict[str, Any]] = []
        block: dict[str, Any] | None = None
        for row, ids in enumerate(self.tokens(texts)):
            if not ids:
                found.append({**self.nothing(), "position_ids": [], "row": row})
                continue
            ids = [*self.frame[0], *ids, self.tokenizer.eos_token_id]
            start = 0
            while start < len(ids) - 1:
                room = max_length - (len(block["input_ids"]) if block else 0)
                if block is None or room < MIN_PIECE or not self.config.blocks:
                    block, room = {"truncated": False, "row": row}, max_length
                    block |= {"input_ids": [], "labels": [], "position_ids": []}
                    found.append(block)
                piece = ids[start : start + room]
                block["input_ids"] += piece
                block["labels"] += [IGNORE, *piece[1:]]
                block["position_ids"] += range(len(piece))
                # The next piece begins with this one's last token, so each token is predicted.
                start += len(piece) - 1
        return found

    @property
    def joins_rows(self) -> bool:
        return self.config.blocks

    def _prompts(self, batch: dict[str, Any]) -> list[list[int]]:
        """Return inputs without labels as they are, or the start of an example's first document."""
        prompts = super()._prompts({name: batch[name] for name in batch if name != "labels"})
        if "labels" not in batch:
            return prompts
        found = []
        for prompt, labels in zip(prompts, batch["labels"].tolist(), strict=True):
            end = next((i for i, label in enumerate(labels[1:], 1) if label == IGNORE), len(labels))
            found.append(prompt[: min(SAMPLE_PROMPT, max(1, end - 1))])
        return found

    def input_columns(self) -> list[str]:
        assert self.text_column is not None
        return [self.text_column]

    def describe(self, raw: dict[str, Any]) -> dict[str, str]:
        assert self.text_column is not None
        return {"input": as_text(raw[self.text_column]), "target": ""}

    def state(self) -> dict[str, Any]:
        return {"text_column": self.text_column}

    def restore(self, state: dict[str, Any]) -> None:
        self.text_column = state["text_column"]
