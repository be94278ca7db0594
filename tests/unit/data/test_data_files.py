"""Every kind of file gives the same rows."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.data import to_jsonl, write_jsonl
from lora_lightning.config.schema import DataConfig
from lora_lightning.data import hub
from lora_lightning.data.loading import load_splits
from lora_lightning.errors import UserError

ROWS = [
    {"text": "A film, with a comma.", "label": "good"},
    {"text": 'He said "never again".', "label": "bad"},
    {"text": "Tabs\tand naïve – Unicode 你好.", "label": "good"},
    {"text": "  spaces kept  ", "label": "bad"},
    {"text": "a pipe | and 'quotes'", "label": "bad"},
    {"text": "null", "label": "None"},
]


def _table(path: Path, delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def _write(kind: str, folder: Path) -> Path | list[str]:
    path = folder / f"rows.{kind.split('-', maxsplit=1)[0]}"
    columns = {name: [row[name] for row in ROWS] for name in ("text", "label")}
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    if kind in ("csv", "tsv"):
        _table(path, "," if kind == "csv" else "\t")
    elif kind == "json-list":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "json-columns":
        path.write_text(json.dumps(columns), encoding="utf-8")
    elif kind == "json-wrapped":
        path.write_text(json.dumps({"data": ROWS}), encoding="utf-8")
    elif kind in ("json-lines", "jsonl", "ndjson"):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "jsonl-bom":
        path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    elif kind == "parquet":
        pq.write_table(pa.table(columns), path)
    elif kind == "several":
        files = [folder / "one.jsonl", folder / "two.jsonl"]
        files[0].write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
        files[1].write_text("\n".join(lines[2:]) + "\n", encoding="utf-8")
        return [str(file) for file in files]
    elif kind == "folder":
        for index, line in enumerate(lines):
            (folder / f"part{index}.jsonl").write_text(line + "\n", encoding="utf-8")
        return folder
    return path


KINDS = [
    "csv",
    "tsv",
    "json-list",
    "json-columns",
    "json-wrapped",
    "json-lines",
    "jsonl",
    "ndjson",
    "jsonl-bom",
    "parquet",
    "several",
    "folder",
]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_from_every_kind_of_file(kind, tmp_path):
    source = _write(kind, tmp_path)
    train = source if isinstance(source, list) else str(source)
    found = load_splits(DataConfig(train=train))
    assert list(found) == ["train"]
    assert [dict(row) for row in found["train"]] == ROWS


def test_text_folder_takes_labels_from_sub_folders(tmp_path):
    for label in ("bad", "good"):
        (tmp_path / label).mkdir()
    (tmp_path / "good" / "b.txt").write_text("lovely\nfilm", encoding="utf-8")
    (tmp_path / "good" / "a.txt").write_text("warm", encoding="utf-8")
    (tmp_path / "bad" / "c.txt").write_text("cold", encoding="utf-8")
    rows = load_splits(DataConfig(train=str(tmp_path)))["train"]
    assert [(row["text"], row["label"]) for row in rows] == [
        ("cold", "bad"),
        ("warm", "good"),
        ("lovely\nfilm", "good"),
    ]


def test_text_file_gives_a_row_a_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo\n", encoding="utf-8")
    assert load_splits(DataConfig(test=str(path)))["test"]["text"][:] == ["one", "two"]


SEPARATED = "a\u2028b\u2029c\x85d\x0ce\x1cf\x0bg\rh"
"""Where str.splitlines splits, and no line of a file ends."""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_lines_end_at_line_feeds_alone(end, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(f"{SEPARATED}{end}{end}two{end}".encode())
    assert load_splits(DataConfig(test=str(path)))["test"]["text"][:] == [SEPARATED, "", "two"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json-lines"])
def test_rows_hold_line_separators(kind, tmp_path):
    path = tmp_path / f"rows.{kind.removesuffix('-lines')}"
    rows = [{"text": SEPARATED, "label": "a"}, {"text": "b", "label": "c"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if kind == "csv":
        lines = ["text,label", *(f'"{row["text"]}",{row["label"]}' for row in rows)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    assert [dict(row) for row in load_splits(DataConfig(test=str(path)))["test"]] == rows


def test_a_header_with_a_line_separator_is_no_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("te\u2028xt,label\n", encoding="utf-8")
    with pytest.raises(UserError, match="must hold rows below its header"):
        load_splits(DataConfig(test=str(path)))


def test_splits_come_from_their_own_files(tmp_path):
    for split, row in zip(("train", "val", "test"), ROWS, strict=False):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    paths = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "val", "test")}
    found = load_splits(DataConfig(**paths))
    assert {split: dict(rows[0]) for split, rows in found.items()} == {
        "train": ROWS[0],
        "val": ROWS[1],
        "test": ROWS[2],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2"),
        (b'{"text": "a"}\n"text"\n', "line 2"),
        ('{"text": "na\u00efve"}\n'.encode("latin1"), "must be UTF-8, and line 1 is not"),
        (b'{"text": "a\\u0000b"}\n{"text": "\x00"}\n', "line 2"),
        (b"", "is empty"),
    ],
)
def test_broken_lines_are_named(content, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_splits(DataConfig(train=str(path)))


def test_files_with_different_columns_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b", "stars": 1}\n')
    with pytest.raises(UserError, match="the same columns"):
        load_splits(DataConfig(train=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]))


DECLARED = {
    "picture": datasets.Image,
    "sound": datasets.Audio,
    "picture in a list": lambda: datasets.List(datasets.Image()),
    "picture in a struct": lambda: {"inside": datasets.Image()},
}


@pytest.mark.parametrize("declared", DECLARED)
@pytest.mark.parametrize("way", ["file", "hub"])
def test_columns_that_name_files_are_read_as_text(declared, way, tmp_path, monkeypatch):
    """Reading the rows opens neither files nor addresses that the data name."""
    import socket

    address = {"bytes": None, "path": "http://192.0.2.1/x.png"}
    value = (
        [address] if "list" in declared else {"inside": address} if "str" in declared else address
    )
    kinds = {"text": datasets.Value("string"), "it": DECLARED[declared]()}
    kinds["label"] = datasets.ClassLabel(names=["bad", "good"])
    stored = datasets.Features(kinds)
    table = pa.table(
        {"text": ["a", "b"], "it": [value] * 2, "label": [1, 0]},
        schema=stored.arrow_schema,
    )
    pq.write_table(table, tmp_path / "train.parquet")
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    if way == "hub":
        found = datasets.load_dataset_builder(
            "parquet", data_files=str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "hub")
        )
        monkeypatch.setattr(hub, "REMOTE", ("/",))
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: found)
    config = {"path": "me/rows"} if way == "hub" else {"train": str(tmp_path / "train.parquet")}
    rows = load_splits(DataConfig(**config))["train"]
    assert rows[:] == {"text": ["a", "b"], "it": [value] * 2, "label": [1, 0]}
    assert rows.features["label"].names == ["bad", "good"]
    assert asked == []


def test_a_folder_of_splits_names_no_file_of_the_user(tmp_path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"text": "secret"}\n')
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    named = ("../secret.jsonl", str(secret), "data/linked.jsonl", "http://192.0.2.1/x.jsonl")
    (folder / "data" / "linked.jsonl").symlink_to(secret)
    for name in named:
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n"
        )
        with pytest.raises(UserError, match="data.path=.*(not part of it|cannot be loaded)"):
            load_splits(DataConfig(path=str(folder)))


def test_a_set_of_the_hub_names_no_file_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"text": "secret"}\n')
    found = datasets.load_dataset_builder("json", data_files=str(tmp_path / "x.jsonl"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: found)
    with pytest.raises(UserError, match=r"names .*x\.jsonl, which is not part of it"):
        load_splits(DataConfig(path="me/rows"))


CELLS = ({"train.csv": ","}, {"train.tsv": "\t"}, {"train-0.csv": ",", "train-1.csv": ","})


@pytest.mark.parametrize("files", CELLS, ids=["csv", "tsv", "two files"])
def test_load_hub_table_keeps_cells_as_written(files, tmp_path, monkeypatch, capsys):
    """A hub table gives the same rows as its folder does, later without a network too."""
    for name, separator in files.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(exist_ok=True)
        lines = (("text", "label", "half"), ("good", "01", "0.10"), ("NA", "1e5", "true"))
        path.write_text("".join(separator.join(line) + "\n" for line in lines))
    builder = datasets.load_dataset_builder(
        "csv",
        data_files=sorted(str(tmp_path / "set" / name) for name in files),
        cache_dir=str(tmp_path / "hub"),
        **({"sep": "\t"} if "train.tsv" in files else {}),
    )
    monkeypatch.setattr(hub, "REMOTE", ("/",))
    config = DataConfig(path="me/rows", cache_dir=str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
        rows = load_splits(config)["train"]
    assert rows[:] == {
        "text": ["good", "NA"] * len(files),
        "label": ["01", "1e5"] * len(files),
        "half": ["0.10", "true"] * len(files),
    }
    local = load_splits(DataConfig(path=str(tmp_path / "set")))["train"]
    assert local[:] == rows[:]

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    assert load_splits(config)["train"][:] == rows[:]
    with pytest.raises(UserError, match="Couldn't reach the hub"):
        load_splits(DataConfig(path="me/rows", revision="v2", cache_dir=config.cache_dir))


def test_load_hub_table_from_a_website_keeps_cells_as_written(tmp_path, monkeypatch):
    """`datasets` keeps a download of a website under a name without its ending."""
    (tmp_path / "3fa0").write_text("text,label\ngood,01\n")
    builder = datasets.load_dataset_builder("csv", data_files=str(tmp_path / "3fa0"))
    builder.config.data_files = {"train": ["https://example.org/rows/train.csv"]}
    monkeypatch.setattr(
        datasets.DownloadManager, "download", lambda *_: {"train": [str(tmp_path / "3fa0")]}
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    config = DataConfig(path="me/rows", cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        assert load_splits(config)["train"][:] == {"text": ["good"], "label": ["01"]}


@pytest.mark.parametrize("name", ["pos/2.txt", "deep/er/2.txt", "part2.jsonl"])
def test_a_link_out_of_a_folder_of_data_is_refused(name, tmp_path):
    folder = tmp_path / "data"
    (tmp_path / "secret").write_text('{"text": "PRIVATE"}\n')
    first = folder / name.replace("2", "1")
    first.parent.mkdir(parents=True)
    first.write_text('{"text": "theirs"}\n')
    (folder / name).symlink_to(first)
    assert len(load_splits(DataConfig(train=str(folder)))["train"]) == 2
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"data.train: .*{name} is a link to .*secret, outside"):
        load_splits(DataConfig(train=str(folder)))


@pytest.mark.parametrize("option", ["train", "path"])
def test_the_hubs_cache_is_a_folder_of_data(option, tmp_path):
    cache = tmp_path / "datasets--me--rows"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "1f").write_text('{"text": "theirs"}\n')
    (snapshot / "train.jsonl").symlink_to("../../blobs/1f")
    rows = load_splits(DataConfig(**{option: str(snapshot)}))["train"]
    assert rows["text"][:] == ["theirs"]


def test_a_class_of_no_utf8_is_told(tmp_path):
    for name in (b"caf\xe9", b"bad"):
        folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        folder.mkdir()
        (folder / "1.txt").write_text("good")
    with pytest.raises(UserError, match=r"caf.udce9' names a class, and its name must be UTF-8"):
        load_splits(DataConfig(train=str(tmp_path)))


def test_each_of_many_columns_is_described_once(tmp_path, monkeypatch):
    """What is done for each column is done a few times in all, and not for each step."""
    from datasets import features

    rows = [{**{f"c{n}": n for n in range(500)}, "text": str(row)} for row in range(8)]
    write_jsonl(tmp_path / "wide.jsonl", rows)
    made = 0
    begin = features.Value.__post_init__

    def count(self):
        nonlocal made
        made += 1
        begin(self)

    monkeypatch.setattr(features.Value, "__post_init__", count)
    config = DataConfig(train=str(tmp_path / "wide.jsonl"), cache_dir=str(tmp_path / "cache"))
    load_splits(config)
    made = 0
    assert load_splits(config)["train"].num_columns == 501
    assert made <= 4 * 501


def test_the_runs_among_data_are_no_data(tmp_path):
    """The folder that a sweep makes by default may lie where its data do."""
    for name in ("pos/1.txt", "neg/1.txt", "multirun/day/0/log.txt", "multirun/day/0/.hydra/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("good")
    (tmp_path / "multirun/day/sweep.json").write_text("{}")
    for name in ("pos/result.json", "sweep.json"):  # of the user's
        (tmp_path / name).write_text("{}")
    rows = load_splits(DataConfig(train=str(tmp_path)))["train"]
    assert sorted(rows["label"][:]) == ["neg", "pos"]


# Texts stay as they are written -------------------------------------------------------------------

WRITTEN = {
    "text": ["0015", "0.10", "true", "2024-05-01", ""],
    "zeros": ["0015", "0016", "01", "00", "+1"],
    "decimals": ["0.10", "1.0", "1e3", "-0", "5."],
    "truth": ["true", "True", "false", "TRUE", "False"],
    "dates": ["2024-05-01", "2024-05-02", "2024-05-03 10:00:00", "2024-05-04", "2024-05-05"],
    "words": ["null", "NA", "NaN", "None", "-"],
}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "json-lines"])
def test_texts_are_as_they_are_written(kind, tmp_path):
    rows = [dict(zip(WRITTEN, cells, strict=True)) for cells in zip(*WRITTEN.values(), strict=True)]
    path = tmp_path / f"rows.{kind.removesuffix('-lines')}"
    if kind in ("csv", "tsv"):
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(WRITTEN), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
        rows[4]["text"] = None  # an empty cell is missing
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    assert [dict(row) for row in load_splits(DataConfig(train=str(path)))["train"]] == rows


NUMBERS = {
    "label": (["0.10", "0.5", "null"], ["0.10", "0.5", None]),
    "mixed": (["1e5", "7", "-0"], ["1e5", "7", "-0"]),
    "whole": (["1", "2", "-3"], [1, 2, -3]),
    "exact": (["1.0", "0.5", "2.25"], [1.0, 0.5, 2.25]),
    "long": (["0.1000000000000000055", "0.1", "1"], ["0.1000000000000000055", "0.1", "1"]),
    "text": (['"at 0.10 or 1e5"'] * 3, ["at 0.10 or 1e5"] * 3),
}


@pytest.mark.parametrize("kind", ["jsonl", "json", "json-lines", "columns", "in an object"])
def test_numbers_of_json_stay_as_they_are_written(kind, tmp_path):
    """A column with a number that Python writes in another way is one of texts."""
    cells = [
        [f'"{name}": {written[row]}' for name, (written, _) in NUMBERS.items()] for row in range(3)
    ]
    lines = [f"{{{', '.join(row)}}}" for row in cells]
    path = tmp_path / ("rows.jsonl" if kind == "jsonl" else "rows.json")
    text = {"json": f"[{', '.join(lines)}]", "in an object": f'{{"rows": [{", ".join(lines)}]}}'}
    columns = [f'"{name}": [{", ".join(written)}]' for name, (written, _) in NUMBERS.items()]
    text["columns"] = f"{{{', '.join(columns)}}}"
    path.write_text(text.get(kind, "\n".join(lines) + "\n"))
    rows = load_splits(DataConfig(train=str(path)))["train"]
    assert {name: rows[name][:] for name in NUMBERS} == {
        n: found for n, (_, found) in NUMBERS.items()
    }


@pytest.mark.parametrize(
    "dates",
    [
        ["2024-05-01", "2024-05-02"],
        ["2024-05-01 10:30:00", None],
        ["2024-05-01T10:30:00Z", "no time"],
    ],
)
def test_what_looks_like_a_time_stays_text_at_any_depth(dates, tmp_path):
    rows = [
        {
            "2024-01-01": date,
            "label": date,
            "turns": [{"role": "user", "content": date}],
            "more": {"when": date, "said": f'"{date}", "again"', "n": number},
        }
        for number, date in enumerate(dates)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + to_jsonl(rows), encoding="utf-8")
    assert [dict(row) for row in load_splits(DataConfig(train=str(path)))["train"]] == rows


def test_a_number_that_would_lose_digits_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a", "id": {2**63 - 1}}}\n{{"text": "b", "id": 1}}\n')
    assert load_splits(DataConfig(train=str(path)))["train"]["id"][:] == [2**63 - 1, 1]
    path.write_text(f'{{"text": "a", "id": 1}}\n{{"text": "b", "id": {2**63}}}\n')
    with pytest.raises(UserError, match=f"would lose digits in line 2, column 'id': {2**63}"):
        load_splits(DataConfig(train=str(path)))


def test_a_row_with_more_cells_than_the_header_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\ngood,really,1\nbad,really,0\n")
    with pytest.raises(UserError, match=r"rows.csv: its rows have more cells than the header"):
        load_splits(DataConfig(train=str(path)))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_texts_of_a_folder_of_splits_are_as_they_are_written(kind, tmp_path):
    for split, label in (("train", "01"), ("test", "00")):
        row = {"text": "2024-05-01", "label": label}
        sep = "\t" if kind == "tsv" else ","
        lines = [json.dumps(row)] if kind == "jsonl" else [sep.join(row), sep.join(row.values())]
        (tmp_path / f"{split}.{kind}").write_text("\n".join(lines) + "\n")
    found = load_splits(DataConfig(path=str(tmp_path)))
    assert {split: dict(rows[0]) for split, rows in found.items()} == {
        "train": {"text": "2024-05-01", "label": "01"},
        "test": {"text": "2024-05-01", "label": "00"},
    }


# Folders, patterns, compressed files --------------------------------------------------------------


def _line(text: str) -> bytes:
    return json.dumps({"text": text, "label": "x"}).encode() + b"\n"


def test_a_folder_of_tables_has_files_about_it_and_of_the_system(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\ngood,01\n")
    (tmp_path / "README.txt").write_text("About these data.")
    (tmp_path / "._train.csv").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._a.txt").write_text("no")
    rows = load_splits(DataConfig(train=str(tmp_path)))["train"]
    assert rows[:] == {"text": ["good"], "label": ["01"]}
    (tmp_path / "more.txt").write_text("a text")
    with pytest.raises(UserError, match=r"holds tables \(train.csv\) and texts \(more.txt\)"):
        load_splits(DataConfig(train=str(tmp_path)))


def test_the_splits_of_a_folder_are_not_all_trained_on(tmp_path):
    for name in ("train", "my-test"):
        (tmp_path / f"{name}.jsonl").write_bytes(_line(name))
    with pytest.raises(UserError, match=r"holds several splits .* Use data.path="):
        load_splits(DataConfig(train=str(tmp_path)))
    found = load_splits(DataConfig(path=str(tmp_path)))
    assert {split: rows["text"][:] for split, rows in found.items()} == {
        "train": ["train"],
        "test": ["my-test"],
    }


def test_what_save_to_disk_writes_is_read(tmp_path):
    rows = {name: datasets.Dataset.from_list([{"text": name, "label": 1}]) for name in ("a", "b")}
    rows["a"].save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"train": rows["a"], "validation": rows["b"]})
    splits.save_to_disk(tmp_path / "two")
    for option in ("train", "path"):
        found = load_splits(DataConfig(**{option: str(tmp_path / "one")}))
        assert found["train"][:] == {"text": ["a"], "label": [1]}
    found = load_splits(DataConfig(path=str(tmp_path / "two")))
    assert {split: part["text"][:] for split, part in found.items()} == {
        "train": ["a"],
        "val": ["b"],
    }
    with pytest.raises(UserError, match=r"several splits. Use data.path="):
        load_splits(DataConfig(train=str(tmp_path / "two")))
    state = json.loads((tmp_path / "one/state.json").read_text())
    state["_data_files"][0]["filename"] = "../two/train/data-00000-of-00001.arrow"
    (tmp_path / "one/state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="names files outside itself"):
        load_splits(DataConfig(train=str(tmp_path / "one")))


@pytest.mark.parametrize("packed", ["gz", "zst", "bz2"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_compressed_files_are_read(packed, kind, tmp_path):
    content = {"csv": b"text,label\ngood,01\n", "jsonl": _line("good"), "txt": b"good\n"}[kind]
    path = tmp_path / f"rows.{kind}.{packed}"
    codec = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}[packed]
    with pa.output_stream(str(path), compression=codec) as stream:
        stream.write(content)
    assert load_splits(DataConfig(train=str(path)))["train"]["text"][:] == ["good"]
    path.write_bytes(b"no such format")
    with pytest.raises(
        UserError, match=rf"rows.{kind}.{packed} cannot be decompressed as {packed}"
    ):
        load_splits(DataConfig(train=str(path)))


@pytest.mark.parametrize("packed", ["gz", "zst", "bz2"])
def test_a_file_that_unpacks_to_more_than_the_disk_is_refused(packed, tmp_path, monkeypatch):
    path, free = tmp_path / f"rows.txt.{packed}", 50 * 2**20
    with pa.output_stream(
        str(path), compression={"gz": "gzip", "zst": "zstd", "bz2": "bz2"}[packed]
    ) as stream:
        for _ in range(200):
            stream.write(b"\n" * 2**20)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def usage(folder):  # of a disk that holds what is in the folder alone
        seen.append(sum(each.stat().st_size for each in Path(folder).iterdir()))
        return SimpleNamespace(total=100 * 2**20, free=free - seen[-1])

    monkeypatch.setattr("lora_lightning.data.readers.shutil.disk_usage", usage)
    with pytest.raises(UserError, match=r"rows\.txt\..* has unpacked to 48 MiB so far, .*TMPDIR"):
        load_splits(DataConfig(train=str(path), cache_dir=str(tmp_path / "cache")))
    assert max(seen) < free
    assert {each.name for each in tmp_path.iterdir()} == {path.name}


@pytest.mark.parametrize("name", ["d[0].jsonl", "d::x.jsonl", "d*.jsonl", "d?.jsonl", "a b.jsonl"])
def test_a_file_of_any_name_is_read(name, tmp_path):
    for other in ("d0.jsonl", "dx.jsonl"):
        (tmp_path / other).write_bytes(_line("another"))
    (tmp_path / name).write_bytes(_line("this"))
    assert load_splits(DataConfig(train=str(tmp_path / name)))["train"]["text"][:] == ["this"]


def test_a_pattern_is_read_in_order(tmp_path):
    for name in ("b1", "b0", "c", "._b2"):
        (tmp_path / f"{name}.jsonl").write_bytes(_line(name))
    pattern = str(tmp_path / "b*.jsonl")
    assert load_splits(DataConfig(train=pattern))["train"]["text"][:] == ["b0", "b1"]
    with pytest.raises(UserError, match="x.*: no file matches"):
        load_splits(DataConfig(train=str(tmp_path / "x*.jsonl")))
