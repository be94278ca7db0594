"""The presets of conf/data are understood, with the columns and splits that the hub's sets have.

No network: a folder of files with the hub's splits and columns stands in for the set.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from helpers.data import to_jsonl
from lora_lightning.config.compose import compose_config, settings_of
from lora_lightning.data.loading import load_splits
from lora_lightning.lora import UserError
from lora_lightning.tasks import build_task

USUAL = ("train", "validation", "test")
HUB = {
    "sst2": ("stanfordnlp/sst2", "sentiment", USUAL, {"idx": 1, "sentence": "a", "label": 1}),
    "imdb": (
        "stanfordnlp/imdb",
        "sentiment",
        ("train", "test", "unsupervised"),
        {"text": "a", "label": 1},
    ),
    "dialogsum": (
        "knkarthick/dialogsum",
        "summarization",
        USUAL,
        {"id": "x", "dialogue": "a", "summary": "b", "topic": "c"},
    ),
    "samsum": (
        "knkarthick/samsum",
        "summarization",
        USUAL,
        {"id": "x", "dialogue": "a", "summary": "b"},
    ),
    "cnn_dailymail": (
        "abisee/cnn_dailymail",
        "summarization",
        USUAL,
        {"article": "a", "highlights": "b", "id": "x"},
    ),
    "xsum": (
        "EdinburghNLP/xsum",
        "summarization",
        USUAL,
        {"document": "a", "summary": "b", "id": "x"},
    ),
    "e2e_nlg": (
        "tuetschek/e2e_nlg",
        "summarization",
        USUAL,
        {"meaning_representation": "a", "human_reference": "b"},
    ),
    "alpaca": (
        "tatsu-lab/alpaca",
        "instruct",
        ("train",),
        {"instruction": "a", "input": "", "output": "b", "text": "c"},
    ),
}


def stand_in(folder: Path, splits: tuple[str, ...], row: dict) -> Path:
    """A folder that load_dataset reads as a set with these splits and columns."""
    rows = [{**row, "label": i % 2} if "label" in row else dict(row) for i in range(4)]
    for split in splits:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        lines = to_jsonl(rows)
        (folder / "data" / f"{split}.jsonl").write_text(lines)
    listed = "\n".join(f"  - split: {s}\n    path: data/{s}.jsonl" for s in splits)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}\n---\n"
    )
    return folder


def test_every_preset_is_here():
    conf = Path(__file__).parents[3] / "conf" / "data"
    others = {"files", "hub", "reviews", "docstrings"}
    assert {path.stem for path in conf.glob("*.yaml")} == {*HUB, *others}


@pytest.mark.parametrize("name", HUB)
def test_preset_finds_its_columns(name, tmp_path):
    path, task_name, splits, row = HUB[name]
    composed = settings_of(compose_config([f"data={name}", f"task={task_name}"]))
    assert composed.data.path == path
    local = stand_in(tmp_path / name, splits, row)
    config = settings_of(
        compose_config(
            [
                f"data={name}",
                f"task={task_name}",
                f"data.path={local}",
                "data.name=null",
                "data.revision=null",
            ]
        )
    )
    found = load_splits(config.data)
    expected = {"sst2": {"train", "test"}, "imdb": {"train", "test"}, "alpaca": {"train"}}
    assert set(found) == expected.get(name, {"train", "val", "test"})
    task = build_task(config.task)
    task.learn(found)
    columns = {
        "sentiment": ["sentence"] if name == "sst2" else ["text"],
        "summarization": [next(c for c in row if row[c] == "a")],
        "instruct": ["instruction", "input"],
    }[task_name]
    assert task.input_columns() == columns
    if task_name == "summarization":
        assert task.target_column == next(c for c in row if row[c] == "b")


def test_unknown_split_is_told(tmp_path):
    local = stand_in(tmp_path / "unknown", USUAL, HUB["xsum"][3])
    settings = [f"data.path={local}", "data=hub", "+data.splits={train: train, test: validaton}"]
    with pytest.raises(
        UserError, match="split 'validaton' not found in .*Did you mean 'validation'"
    ):
        load_splits(settings_of(compose_config(settings)).data)
    with pytest.raises(UserError, match="must be train, val or test"):
        settings_of(compose_config([*settings[:2], "+data.splits={dev: validation}"]))


def test_stand_in_is_what_the_library_reads(tmp_path):
    from datasets import load_dataset

    found = load_dataset(str(stand_in(tmp_path / "plain", USUAL, {"a": "b"})))
    assert isinstance(found, DatasetDict)
    assert set(found) == set(USUAL)
    assert isinstance(found["train"], Dataset)
