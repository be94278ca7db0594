"""Task from source text to target text, such as summaries, data to text, and translation."""

from __future__ import annotations

import re
from typing import Any

from lora_lightning.config.schema import SummarizationConfig

from .columns import as_text, check_texts, need_columns, pick_column, texts_of, which_column
from .generation import GenerativeTask

SOURCE_COLUMNS = (
    *("source", "document", "dialogue", "article", "text", "body", "content", "input"),
    *("meaning_representation", "mr"),
)
TARGET_COLUMNS = (
    *("target", "summary", "highlights", "abstract", "headline", "title", "output"),
    *("human_reference", "reference", "ref"),
)
PROMPTS = {"causal": "{source}\n\nSummary:\n", "encoder-decoder": "summarize: {source}"}
"""Default prompts. T5 was pretrained with the second."""


class SummarizationTask(GenerativeTask):
    """Task that turns a source text into a target text.

    A source that is too long is cut at its end. The prompt around it and the target stay whole.
    The room for the target is `max_new_tokens`, or the length of a longer target of a training row.
    """

    name = "summarization"
    config: SummarizationConfig

    def __init__(self, config: SummarizationConfig | None = None) -> None:
        super().__init__(config or SummarizationConfig())
        self.source_column: str | None = None
        self.target_column: str | None = None

    def learn(self, splits: dict[str, Any]) -> None:
        columns = (splits.get("train") or next(iter(splits.values()))).column_names
        self.find_inputs(columns)
        candidates = [name for name in TARGET_COLUMNS if name != self.source_column]
        self.target_column = pick_column(
            self.config.target_column, candidates, columns, "task.target_column"
        )
        if self.target_column is None:
            raise which_column("target", columns)
        for split, rows in splits.items():
            needed = [self.source_column, self.target_column]
            need_columns(split, rows, needed)
            for column in needed:
                check_texts(split, column, rows[column][:])

    def learn_from_settings(self) -> None:
        self.source_column = self.config.source_column or SOURCE_COLUMNS[0]
        self.target_column = self.config.target_column or TARGET_COLUMNS[0]

    def find_inputs(self, columns: list[str]) -> None:
        known = (self.source_column, *SOURCE_COLUMNS) if self.source_column else SOURCE_COLUMNS
        self.source_column = pick_column(
            self.config.source_column, known, columns, "task.source_column"
        )
        if self.source_column is None:
            raise which_column("source", columns)

    def examples(
        self, rows: dict[str, list[Any]], max_length: int, *, targets: bool
    ) -> list[dict[str, Any]]:
        assert self.source_column is not None
        before, after = self.tokens(self._prompt().split("{source}"))
        sources = [text.strip() for text in texts_of(rows, self.source_column)]
        answers: list[list[int] | None] = [None] * len(sources)
        if targets:
            written = [text.strip() for text in texts_of(rows, self.target_column)]
            answers = list(self.tokens(written))
        found = []
        for source, answer in zip(self.tokens(sources), answers, strict=True):
            length = len(answer or [])
            room = max_length - self.special_count() - len(before) - len(after)
            if not self.encoder_decoder:
                room -= max(self.config.generation.max_new_tokens, length)
            lost = room < 1 or length > max_length - self.special_count()
            if not source or answer == [] or lost:
                found.append(self.nothing(targets=targets))
                continue
            prompt = [*before, *source[:room], *after]
            found.append(self.example(prompt, answer, truncated=len(source) > room))
        return found

    def _prompt(self) -> str:
        if self.config.prompt is None:
            return PROMPTS["encoder-decoder" if self.encoder_decoder else "causal"]
        return self.config.prompt.replace("\\n", "\n")  # line breaks are hard to type

    def input_columns(self) -> list[str]:
        assert self.source_column is not None
        return [self.source_column]

    def describe(self, raw: dict[str, Any]) -> dict[str, str]:
        assert self.source_column is not None
        target = raw.get(self.target_column) if self.target_column else None
        return {"input": as_text(raw[self.source_column]), "target": as_text(target)}

    def baseline(self, raws: list[dict[str, Any]]) -> tuple[str, dict[str, float]] | None:
        if not self.config.text_metrics:
            return None
        described = [self.describe(raw) for raw in raws]
        leads = [lead_sentence(row["input"]) for row in described]
        return "lead sentence", self.compare(leads, [row["target"] for row in described])

    def state(self) -> dict[str, Any]:
        return {
            "source_column": self.source_column,
            "target_column": self.target_column,
            "encoder_decoder": self.encoder_decoder,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.source_column = state["source_column"]
        self.target_column = state["target_column"]
        self.encoder_decoder = state["encoder_decoder"]


def lead_sentence(text: str) -> str:
    """Return a text up to its first full stop, question or exclamation mark, or blank line."""
    start = re.split(r"(?<=[.!?])\s|\n\s*\n", text.strip(), maxsplit=1)[0]
    return " ".join(start.split())
