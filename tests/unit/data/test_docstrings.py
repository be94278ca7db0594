"""The summarization set that is made from the standard library's docstrings."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import pytest

from lora_lightning.config.schema import DataConfig
from lora_lightning.data.docstrings import build_docstrings, docstring_files
from lora_lightning.data.loading import load_splits
from lora_lightning.lora import UserError

BODY = "Words that tell more than the first line does, at length:"  # with one more long enough
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


@pytest.fixture(scope="module")
def splits():
    return build_docstrings(Path(sysconfig.get_path("stdlib")))


def rows_of(library: Path, **modules: str):
    """Rows made of modules, each given as its docstrings of functions, one a line of `|`."""
    for name, texts in modules.items():
        code = "".join(
            f"def f{i}():\n    {text!r}\n" for i, text in enumerate(texts.split("|")) if text
        )
        path = library / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    found = build_docstrings(library)
    return [row for rows in found.values() for row in rows]


# Modules of each split, so that no split is empty.
OTHERS = {
    "email": f"Parse a mail message.\n\n{BODY} Mail.",
    "shutil": f"Copy a whole tree.\n\n{BODY} Tree.",
    "queue": f"Wait for an item.\n\n{BODY} Item.",
}


def test_a_summary_and_a_body_make_a_row(tmp_path):
    rows = rows_of(tmp_path, **OTHERS)
    assert {
        "module": "email",
        "document": f"{BODY} Mail.",
        "summary": "Parse a mail message.",
    } in rows
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("no body", "Return the number of things."),
        ("no blank line", f"Return the number of things\n{BODY} Things."),
        ("a short body", "Return the number of things.\n\nNot many words."),
        ("a long body", "Return the number of things.\n\n" + "word " * 301),
        ("a short summary", f"Two words.\n\n{BODY} Things."),
        ("a long summary", "word " * 26 + f"\n\n{BODY} Things."),
        ("a signature", f"count(things, of=None) -> the number\n\n{BODY} Things."),
        ("a signature of a method", f"Class.count (things) counts them\n\n{BODY} Things."),
        ("no letter at the start", f"% number of the things\n\n{BODY} Things."),
        ("a leak", f"Return the number.\n\n{BODY} They RETURN the Number."),
        ("a summary that is there already", f"Parse a mail message\n\n{BODY} Another."),
        ("a body that is there already", f"Return the number of things.\n\n{BODY} mail"),
    ],
)
def test_what_is_left_out(tmp_path, why, text):
    rows = rows_of(tmp_path, **{**OTHERS, "fractions": text})
    assert sorted(row["module"] for row in rows) == ["email", "queue", "shutil"], why


@pytest.mark.parametrize("name", ["email__test__x", "idlelib__x", "mypackage", "site-packages__x"])
def test_files_that_are_not_of_the_library_are_not_read(tmp_path, name):
    rows = rows_of(tmp_path, **OTHERS, **{name: f"Return the number of things.\n\n{BODY} Things."})
    assert len(rows) == 3


def test_test_rows_that_overlap_with_training_rows_are_left_out(tmp_path):
    others = {**OTHERS, "email": f"{OTHERS['email']}|Count to fourteen at once.\n\nFirst {LONG}."}
    text = f"Wait for an item.\n\n{BODY} Item.|Say some numbers quickly.\n\nThen {LONG}."
    rows = rows_of(tmp_path, **{**others, "queue": text})
    assert "Count to fourteen at once." in {row["summary"] for row in rows}
    assert "Say some numbers quickly." not in {row["summary"] for row in rows}


def test_broken_files_are_passed_over(tmp_path):
    (tmp_path / "ast.py").write_text("def f(:\n")
    (tmp_path / "abc.py").write_bytes(b"# \xff\n'''x\x00'''")
    assert len(rows_of(tmp_path, **OTHERS)) == 3


def test_without_sources_there_is_one_message(tmp_path):
    with pytest.raises(UserError, match=r"docstrings .* holds none: give data of your own"):
        build_docstrings(tmp_path)


def test_this_pythons_library(splits):
    assert splits == build_docstrings(Path(sysconfig.get_path("stdlib")))
    assert len(splits["train"]) > 800
    assert min(len(splits["val"]), len(splits["test"])) > 60
    modules = {split: {row["module"].strip("_") for row in rows} for split, rows in splits.items()}
    assert not modules["train"] & modules["val"]
    assert not (modules["train"] | modules["val"]) & modules["test"]
    rows = [row for part in splits.values() for row in part]

    def plain(text):
        return re.sub(r"\W+", " ", text.lower()).strip()

    assert len({plain(row["summary"]) for row in rows}) == len(rows)
    assert len({plain(row["document"]) for row in rows}) == len(rows)
    assert not [row for row in rows if plain(row["summary"]) in plain(row["document"])]
    assert not [row for row in rows if "(" in row["summary"].split()[0]]


def test_files_are_made_once_and_loaded_by_name(tmp_path, splits):
    paths = docstring_files(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in paths.values()}
    loaded = load_splits(DataConfig(embedded="docstrings", cache_dir=str(tmp_path)))
    assert {split: list(rows) for split, rows in loaded.items()} == splits
    assert {path: path.stat().st_mtime_ns for path in paths.values()} == before
    assert not list(tmp_path.rglob("*.part"))
    paths["val"].unlink()  # as after an interruption
    assert docstring_files(tmp_path)["val"].is_file()
