"""Prepared data that was damaged, or whose source has changed, is built again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers.asserts import flip_bit
from helpers.data import make_rows, write_jsonl
from lora_lightning.config.schema import DataConfig
from lora_lightning.data import docstrings, hub
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.data.loading import load_splits
from lora_lightning.lora import UserError
from lora_lightning.tasks import build_task
from lora_lightning.utils.cache_folder import cache_folder


def write_rows(path: Path, words: list[str]) -> None:
    if path.suffix in (".csv", ".tsv"):
        path.write_text("text\n" + "".join(f"{word}\n" for word in words))
    elif path.suffix == ".txt":
        path.write_text("".join(f"{word}\n" for word in words))
    elif path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_dict({"text": words}).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps({"text": word}) + "\n" for word in words))


def read(path: Path) -> list[str]:
    return load_splits(DataConfig(train=str(path)))["train"]["text"][:]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet", "txt"])
def test_rows_are_those_that_the_file_holds_now(ending, tmp_path):
    """rsync, tar and cp -p keep the time of a file that they replace."""
    path = tmp_path / f"rows.{ending}"
    for words in (["old"] * 5, ["new"] * 5):
        write_rows(path, words)
        os.utime(path, ns=(10**18, 10**18))
        assert read(path) == words


def test_rows_of_one_content_are_one_set_of_rows(tmp_path):
    """What was tokenised serves a copy of the file too."""
    found = []
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / name, ["one", "two"])
        found.append(load_splits(DataConfig(train=str(tmp_path / name)))["train"]._fingerprint)
    assert found[0] == found[1]


def test_endings_are_part_of_the_content(tmp_path):
    """The same bytes are other rows for a reader of commas than for one of tabs."""

    def columns(path):
        return load_splits(DataConfig(train=str(path)))["train"][:]

    content = "text\tmore,other\n" + "good film\tbad, room\n" * 3
    for name in ("a.csv", "a.tsv", "b.csv"):
        (tmp_path / name).write_text(content.replace(",", "") if name == "b.csv" else content)
    tabs = columns(tmp_path / "a.tsv")
    assert tabs != columns(tmp_path / "b.csv")
    (tmp_path / "c.tsv").write_text((tmp_path / "b.csv").read_text())
    assert columns(tmp_path / "c.tsv") != columns(tmp_path / "b.csv")


def test_rows_of_one_content_are_read_once(tmp_path, capsys):
    """Neither another time nor another place of the file makes them new, or damaged."""
    words = ["not", "new", "not", "damaged"]
    before = set(cache_folder().rglob("*.*"))
    for turn in range(4):
        path = tmp_path / str(turn % 2) / "rows.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_rows(path, words)
        os.utime(path, ns=(10**18 + turn, 10**18 + turn))
        assert read(path) == words
    assert capsys.readouterr().err.count("is damaged") == 0
    made = set(cache_folder().rglob("*.*")) - before
    assert sorted(path.name for path in made) == ["00000.arrow", "sums.json"]


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ["one"])
    (tmp_path / "file").write_text("no folder")
    config = DataConfig(train=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write the cache in .*file"):
        load_splits(config)


def test_a_damaged_parquet_file_is_the_files_fault(tmp_path):
    write_rows(tmp_path / "rows.parquet", [f"row {n}" for n in range(2000)])
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    content[8:4000] = bytes(3992)
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as PARQUET"):
        read(tmp_path / "rows.parquet")


DAMAGES = {
    "turned bit": flip_bit,
    "emptied": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "lost": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_damaged_copies_of_rows_are_made_again(ending, damage, tmp_path, capsys):
    path, words = tmp_path / f"rows.{ending}", [f"{ending} {damage} {n}" for n in range(99)]
    write_rows(path, words)
    before = set(cache_folder().rglob("*.arrow"))
    assert read(path) == words
    (made,) = set(cache_folder().rglob("*.arrow")) - before
    DAMAGES[damage](made)
    capsys.readouterr()
    assert read(path) == words
    assert capsys.readouterr().err.count("is damaged and is built again") == 1
    assert read(path) == words
    assert capsys.readouterr().err.count("is damaged") == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_splits_of_a_folder_are_those_of_its_files_now(damage, tmp_path, capsys):
    """data.path: by content, and whole; a file's name and time may stay."""
    before = set(cache_folder().rglob("*.arrow"))
    for word in (f"old {damage}", f"new {damage}"):
        for split in ("train", "validation"):
            write_rows(tmp_path / f"{split}.jsonl", [f"{split} {word}"] * 9)
            os.utime(tmp_path / f"{split}.jsonl", ns=(10**18, 10**18))
        for turn in range(2):
            found = load_splits(DataConfig(path=str(tmp_path)))
            rows = {split: rows["text"][:] for split, rows in found.items()}
            assert rows == {"train": [f"train {word}"] * 9, "val": [f"validation {word}"] * 9}
            made = sorted(set(cache_folder().rglob("*.arrow")) - before)
            if turn == 0:
                DAMAGES[damage](made[0])
                capsys.readouterr()
            else:
                before |= set(made)
                assert capsys.readouterr().err.count("is built again") == 1


def test_damaged_rows_of_the_hub_are_made_again(tmp_path, monkeypatch, capsys):
    import datasets

    write_rows(tmp_path / "rows.parquet", [f"row {n}" for n in range(999)])
    build = datasets.load_dataset_builder
    where = {"data_files": str(tmp_path / "rows.parquet"), "cache_dir": str(tmp_path / "hub")}
    monkeypatch.setattr(hub, "REMOTE", ("/",))
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *_, **__: build("parquet", **where)
    )
    config = DataConfig(path="me/rows", cache_dir=str(tmp_path / "cache"))

    def read_all() -> list[str]:
        return load_splits(config)["train"]["text"][:]

    expected = read_all()
    (file,) = (tmp_path / "hub").rglob("*.arrow")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"row 50", b"row 05"))
    capsys.readouterr()
    assert read_all() == expected
    assert capsys.readouterr().err.count("is built again") == 1
    assert read_all() == expected
    assert "is built again" not in capsys.readouterr().err
    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", lambda *_, **__: None)
    file.write_bytes(content.replace(b"row 50", b"row 05"))
    with pytest.raises(UserError, match="are damaged and cannot be prepared again without"):
        read_all()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tokens_are_made_again(damage, tiny_bert, tmp_path, capsys):
    from transformers import AutoTokenizer

    path = tmp_path / "rows.jsonl"
    write_jsonl(path, make_rows(60))
    config = DataConfig(train=str(path), cache_dir=str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)

    def tokens() -> list[list[int]]:
        data = LoraDataModule(build_task({"name": "sentiment"}), tokenizer, config)
        data.prepare_data()
        return [data.encoded[split]["input_ids"][:] for split in ("train", "val")]

    expected = tokens()
    files = sorted((tmp_path / "cache").glob("*.arrow"))
    contents = [file.read_bytes() for file in files]
    for file in files:
        DAMAGES[damage](file)
    capsys.readouterr()
    assert tokens() == expected
    assert capsys.readouterr().err.count("is built again") == len(files)
    assert tokens() == expected
    assert [file.read_bytes() for file in files] == contents
    assert capsys.readouterr().err.count("is built again") == 0


def test_made_rows_are_made_again_where_a_letter_has_turned(tmp_path, capsys, monkeypatch):
    rows = {
        split: [{"document": f"{split} {i}"} for i in range(3)]
        for split in ("train", "val", "test")
    }
    monkeypatch.setattr(docstrings, "build_docstrings", lambda _: rows)
    paths = docstrings.docstring_files(tmp_path)
    contents = {split: path.read_bytes() for split, path in paths.items()}
    flip_bit(paths["test"])
    docstrings.docstring_files(tmp_path)
    assert {split: path.read_bytes() for split, path in paths.items()} == contents
    assert "is built again" in capsys.readouterr().err
