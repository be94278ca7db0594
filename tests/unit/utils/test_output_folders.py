"""Folders of output: never over what others wrote, and no moment without the old or the new."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from lora_lightning.lora import UserError
from lora_lightning.utils import folder_swap, output_folders
from lora_lightning.utils.folder_swap import MARK
from lora_lightning.utils.output_folders import replaced_folder


def write(folder: Path, *, by: str = "merge", text: str = "new", **options) -> None:
    with replaced_folder(folder, by=by, **options) as staging:
        (staging / "a.txt").write_text(text)
        (staging / "deep").mkdir()
        (staging / "deep" / "b.txt").write_text(text)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["swap", "two renames"])
def system(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(folder_swap, "_swap", lambda *_: False)
    return request.param


def test_the_same_command_replaces_what_it_wrote(system, tmp_path):
    out = tmp_path / "out"
    write(out, text="old", later=["README.md"])
    (out / "README.md").write_text("written afterwards")
    write(out)
    assert (out / "deep" / "b.txt").read_text() == "new"
    assert entries(out) == [MARK, "a.txt", "deep"]
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("lost", ["notes.md", "deep/mine.txt", "empty", "link"])
def test_what_was_added_is_not_lost(lost, tmp_path):
    out = tmp_path / "out"
    write(out, text="old")
    if lost == "empty":
        (out / lost).mkdir()
    elif lost == "link":
        (out / lost).symlink_to(tmp_path / "anywhere")
    else:
        (out / lost).write_text("mine")
    with pytest.raises(UserError, match=f"merge did not write all of it.*lost: {lost}"):
        write(out)
    assert (out / "a.txt").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_what_was_added_meanwhile_is_not_lost(tmp_path):
    out = tmp_path / "out"
    write(out, text="old")
    with pytest.raises(UserError, match=r"lost: notes\.md"), replaced_folder(out, by="merge"):
        (out / "notes.md").write_text("mine")
    assert entries(out) == [MARK, "a.txt", "deep", "notes.md"]


def test_what_was_changed_is_not_lost(tmp_path):
    out = tmp_path / "out"
    write(out)
    (out / "deep" / "b.txt").write_text("edited")
    with pytest.raises(UserError, match=r"lost: deep/b\.txt\."):
        write(out)


def test_large_weights_that_were_trained_in_place_are_not_lost(tmp_path):
    """Their size stays."""
    out = tmp_path / "out"
    size = 2**24 + 1
    with replaced_folder(out, by="merge") as staging:
        (staging / "model.safetensors").write_bytes(bytes(size))
    with (out / "model.safetensors").open("r+b") as handle:
        handle.seek(size // 2)
        handle.write(b"1")
    with pytest.raises(UserError, match=r"lost: model\.safetensors\."):
        write(out)


@pytest.mark.parametrize("name", [".out.20261129", ".out.20261129.old"])
def test_folders_with_names_like_ours_are_left_alone(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious.txt").write_text("mine")
    write(tmp_path / "out")
    write(tmp_path / "out")
    assert (tmp_path / name / "precious.txt").read_text() == "mine"


def test_places_for_no_folder_are_told(tmp_path, monkeypatch):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place, told in (
        ("a", "cannot hold a folder"),
        ("x" * 300, "cannot hold a folder"),
        ("here", "working folder"),
    ):
        with pytest.raises(UserError, match=told):
            write(tmp_path / place)
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / MARK)  # a reader would wait for a writer
    (out / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"lost: notes\.md"):
        write(out)


def _write_often(folder: Path) -> None:
    for number in range(40):
        write(folder, text=str(number))


def test_several_writers_at_once_are_in_nobodys_way(tmp_path):
    context = multiprocessing.get_context("fork")
    out = tmp_path / "out"
    write(out)
    writers = [context.Process(target=_write_often, args=(out,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "mark",
    [
        "",
        "[]",
        '{"by": "merge", "files": "a.txt"}',
        '{"by": 3}',
        '{"by": "merge", "files": [[]]}',
        "\0",
    ],
)
def test_folder_of_others_is_left_alone(mark, tmp_path):
    out = tmp_path / "out"
    write(out, by="train", text="old")
    with pytest.raises(UserError, match=r"train wrote it.*lost: a\.txt, deep/b\.txt"):
        write(out)
    (out / MARK).write_text(mark)
    with pytest.raises(UserError, match=r"wrote it.*lost: a\.txt, deep/b\.txt"):
        write(out)
    assert (out / "a.txt").read_text() == "old"


@pytest.mark.parametrize("at", [".", "deep", "../link"])
def test_what_is_read_is_not_replaced(at, tmp_path):
    out = tmp_path / "out"
    write(out, text="old")
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(UserError, match="must not be or hold what merge reads"):
        write(out, sources=["some/model-of-the-hub", out / at])
    assert (out / "a.txt").read_text() == "old"


def _write_and_die(folder: Path, at: int) -> None:
    """Dies at a system call that changes a name; without the swap of Linux."""
    folder_swap._swap = lambda *_: False
    count = 0

    def counted(call):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count > at:
                os._exit(9)
            return call(*args, **kwargs)

        return wrapped

    os.rename = counted(os.rename)
    folder_swap.shutil.rmtree = counted(folder_swap.shutil.rmtree)
    write(folder)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_kill_between_two_names_is_repaired(at, tmp_path):
    out = tmp_path / "out"
    write(out, text="old")
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(out, at))
    process.start()
    process.join()
    assert process.exitcode == 9
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError):  # a command that writes nothing repairs too
        write(out, by="combine")
    assert (out / "a.txt").read_text() == ("old" if at < 2 else "new")
    write(out)
    assert entries(tmp_path) == ["other", "out"]


def test_folder_that_is_being_written_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with replaced_folder(out, by="merge") as staging:
        (staging / "a.txt").write_text("first")
        with replaced_folder(out, by="merge") as other:
            (other / "a.txt").write_text("second")
        assert staging.is_dir()
    assert (out / "a.txt").read_text() == "first"


def test_a_swap_leaves_no_moment_without_a_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, text="old")
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("renamed"))
    if not folder_swap._swap(out, out):
        pytest.skip("this system swaps no folders")
    write(out)
    assert (out / "a.txt").read_text() == "new"


def test_all_is_synced_before_it_is_named(tmp_path, monkeypatch):
    """Files first, then the folders that name them, then the rename, then the folder above."""
    out, done = tmp_path / "out", []
    real = os.fsync

    def fsync(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(output_folders, "put_folder", lambda *_: done.append("put"))
    write(out)
    synced, above = done[: done.index("put")], done[done.index("put") + 1 :]
    assert sorted(synced[:-1]) == [MARK, "a.txt", "b.txt", "deep"]
    assert synced[-1].startswith(".out.")
    assert above == [tmp_path.name]
