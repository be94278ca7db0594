"""Files that are written beside their place: whole, on the disk, under a name of their own."""

from __future__ import annotations

import csv
import errno
import json
import os
import stat
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from lora_lightning.cli.hydra_run import _atomic_configs
from lora_lightning.config.compose import compose_config
from lora_lightning.lora import UserError
from lora_lightning.sweeps.folder import record_sweep
from lora_lightning.sweeps.job import Job
from lora_lightning.sweeps.planning import save_job
from lora_lightning.sweeps.report.tables import write_report_file
from lora_lightning.training.callbacks import best_checkpoint, last_checkpoint
from lora_lightning.training.callbacks.loggers import CurvesLogger
from lora_lightning.training.callbacks.progress import SamplePredictions
from lora_lightning.training.checkpointing import read_checkpoint
from lora_lightning.utils import atomic_write as module
from lora_lightning.utils.atomic_write import (
    atomic_write,
    fault_of_disk,
    remove_debris,
    write_json,
)
from lora_lightning.utils.locks import locked
from lora_lightning.utils.output_folders import create_folder, replaced_folder
from lora_lightning.utils.run_folder import RunFolder


@pytest.fixture
def done(monkeypatch) -> list[tuple[str, str]]:
    """What is synced and renamed, in order."""
    found: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.replace

    def fsync(number: int) -> None:
        found.append(("sync", os.readlink(f"/proc/self/fd/{number}")))
        sync(number)

    def replace(source, target) -> None:
        found.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return found


def test_a_file_is_on_the_disk_before_its_name(tmp_path, done):
    path = tmp_path / "a.json"
    path.write_text("old")
    atomic_write(path, "new\r\n\u2028")
    assert path.read_bytes() == "new\r\n\u2028".encode()
    (_, beside), renamed, synced = done
    assert beside.startswith(str(tmp_path / ".a.json."))
    assert (renamed, synced) == (("rename", str(path)), ("sync", str(tmp_path)))
    assert os.listdir(tmp_path) == ["a.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_changes_nothing(step, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*_):
        raise OSError(5, "the disk fails")

    monkeypatch.setattr(module.os, step, fail)
    with pytest.raises(UserError, match=r"cannot write .*a\.json: .*the disk fails"):
        write_json(path, {"a": 1})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_no_write_goes_through_a_link_at_a_name_that_can_be_known(tmp_path):
    """Nor is a file at such a name lost, as that of another process might be."""
    (tmp_path / "0" / ".hydra").mkdir(parents=True)
    victims = []
    for name in ("sweep.json", "samples.jsonl", "0/.hydra/config.yaml", "0/.hydra/hydra.yaml"):
        path = tmp_path / name
        for beside in (f".{path.name}", f".{path.name}.{os.getpid()}"):
            victims.append(tmp_path / f"victim-{len(victims)}")
            victims[-1].write_text("PRECIOUS")
            path.with_name(beside).symlink_to(victims[-1])
    (tmp_path / f".results.csv.{os.getpid()}").symlink_to(victims[0])
    record_sweep(tmp_path, ["lora.rank=1,2"], "running")
    SamplePredictions._write(tmp_path / "samples.jsonl", 1, [{"input": "a"}])
    config = compose_config(["lora.rank=1"])
    OmegaConf.set_struct(config, False)
    config.hydra = {"overrides": {"task": ["lora.rank=1"]}}
    save_job(Job(0, [], tmp_path / "0", config))
    write_report_file(tmp_path / "results.csv", "a,b\n")
    assert [victim.read_text() for victim in victims] == ["PRECIOUS"] * len(victims)
    assert json.loads((tmp_path / "sweep.json").read_text())["status"] == "running"
    assert OmegaConf.load(tmp_path / "0/.hydra/overrides.yaml") == ["lora.rank=1"]


def test_only_what_a_kill_has_left_is_removed(tmp_path):
    left = [".a.json.0123abcd.tmp", ".a.json.ffffffff.tmp"]
    others = ["a.json", ".a.json", ".a.json.tmp", ".a.json.0123abcd", ".b.json.0123abcd.tmp"]
    others += [".xa.json.0123abcd.tmp", ".aXjson.0123abcd.tmp", ".a.json.0123ABCD.tmp"]
    for name in (*left, *others):
        (tmp_path / name).touch()
    remove_debris(tmp_path / "a.json", tmp_path / "none" / "a.json")
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_run_syncs_its_files_and_removes_debris(
    tmp_path, run_cli, fast, tiny_bert, rows_jsonl, done
):
    run = tmp_path / "run"
    for name in ("csv", ".hydra"):
        (run / name).mkdir(parents=True)
    debris = [".result.json", ".samples.jsonl", "csv/.metrics.csv", ".hydra/.config.yaml"]
    for name in debris:
        (run / f"{name}.0123abcd.tmp").write_text("left by a kill")
    (run / ".mine.0123abcd.tmp").touch()
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"]
    status, _, err = run_cli("train", *fast, *where, f"output_dir={run}")
    assert status == 0, err
    assert [path.name for path in run.rglob("*.tmp")] == [".mine.0123abcd.tmp"]
    assert OmegaConf.load(run / ".hydra" / "config.yaml").data.train == str(rows_jsonl)
    names = ["result.json", "samples.jsonl", "csv/metrics.csv", "adapter/README.md"]
    names += [".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"]
    for name in names:
        path = run / name
        at = done.index(("rename", str(path)))
        assert done[at - 1][1].startswith(str(path.with_name(f".{path.name}."))), name
        assert done[at + 1] == ("sync", str(path.parent)), name


def test_a_fault_of_a_disk_is_found_behind_what_libraries_make_of_it():
    def chain(inner: BaseException) -> BaseException:
        try:
            try:
                raise inner
            except Exception:
                raise ValueError("you tried to log 0.5") from None
        except ValueError as error:
            return error

    assert fault_of_disk(chain(OSError(errno.EIO, "no"))) == "the disk fails: [Errno 5] no"
    told = fault_of_disk(Exception("No space left on device (os error 28)"))
    assert told == "the disk is full: No space left on device (os error 28)"
    assert fault_of_disk(chain(FileNotFoundError(errno.ENOENT, "no"))) is None
    assert fault_of_disk(None) is None
    one, other = ValueError("one"), ValueError("other")
    one.__context__, other.__cause__ = other, one
    assert fault_of_disk(one) is None, "a chain may be a ring"


def _config_of_a_run(folder: Path) -> None:
    from hydra.core import utils

    with _atomic_configs(Path.cwd()):
        utils._save_config(OmegaConf.create({"a": 1}), "config.yaml", folder)


def _config_of_a_job(folder: Path) -> None:
    config = compose_config([])
    OmegaConf.set_struct(config, False)
    config.hydra = {"overrides": {"task": []}}
    save_job(Job(0, [], folder, config))


def _exported(folder: Path) -> None:
    with replaced_folder(folder, by="test"):
        pass


def _locked(folder: Path) -> None:
    with locked(folder, setting="output_dir"):
        pass


MAKERS = {
    "any": create_folder,
    "run": lambda folder: RunFolder(folder).create(),
    "lock": _locked,
    ".hydra of a run": _config_of_a_run,
    ".hydra of a job": _config_of_a_job,
    "adapter": _exported,
    "csv": lambda folder: log(CurvesLogger(folder, name="csv", version="")),
    "last": lambda at: last_checkpoint._write(at / "last.ckpt", {"state_dict": {}}, keep=True),
    "best": lambda at: best_checkpoint.SyncedCheckpointIO().save_checkpoint({}, at / "best.ckpt"),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_new_folder_is_on_the_disk_before_what_is_in_it(maker, tmp_path, monkeypatch, done):
    mkdir = os.mkdir

    def make(path, mode=0o777) -> None:
        mkdir(path, mode)
        done.append(("make", str(path)))

    monkeypatch.setattr(os, "mkdir", make)
    MAKERS[maker](tmp_path / "a" / "b" / "c")
    made = [at for at, (what, _) in enumerate(done) if what == "make"]
    assert {done[at][1] for at in made} >= {str(tmp_path / "a"), str(tmp_path / "a" / "b")}
    for at in made:
        name = Path(done[at][1])
        if not name.name.startswith(".c."):  # not under its name yet
            assert done[at + 1] == ("sync", str(name.parent))


def test_a_folder_is_not_made_where_a_file_is(tmp_path):
    create_folder(tmp_path)
    (tmp_path / "a").touch()
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(OSError, match="a"):
            create_folder(path)


ROUNDS = [{"a": 1.0}, {"a": 2.0}, {"a": 3.0, "b": 1.0}, {"c": 0.5}, {"a": 4.0}]


def log(logger: CSVLogger) -> Path:
    for step, metrics in enumerate(ROUNDS):
        logger.log_metrics(metrics, step)
        logger.save()
    return Path(logger.log_dir) / "metrics.csv"


def test_curves_are_those_of_lightning(tmp_path):
    ours = log(CurvesLogger(tmp_path, name="ours", version=""))
    assert ours.read_bytes() == log(CSVLogger(tmp_path, name="theirs", version="")).read_bytes()


def test_rows_of_known_columns_are_synced(tmp_path, done):
    logger = CurvesLogger(tmp_path, name="csv", version="")
    path = log(logger)
    done.clear()
    logger.log_metrics({"a": 5.0}, 9)
    logger.save()
    assert path.read_text().splitlines()[-1].startswith("5.0,")
    assert done == [("sync", str(path))]


class Killed(BaseException):
    """What a kill is to the code that it ends."""


def killed(*_) -> None:
    raise Killed


def test_curves_stay_when_a_rewrite_is_cut_short(tmp_path, monkeypatch):
    """Neither a run that continues nor a new column takes the rows before away."""
    path = log(CurvesLogger(tmp_path, name="csv", version=""))
    before = path.read_bytes()

    def killed_at_save() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            logger.save()

    logger = CurvesLogger(tmp_path, name="csv", version="")
    logger.log_metrics({"a": 7.0}, 9)
    assert path.read_bytes() == before
    with pytest.raises(Killed):
        killed_at_save()
    assert path.read_bytes() == before
    logger.save()
    with path.open(newline="") as handle:
        assert list(csv.DictReader(handle)) == [{"a": "7.0", "step": "9"}]
    logger.log_metrics({"new": 1.0}, 10)
    before = path.read_bytes()
    with pytest.raises(Killed):
        killed_at_save()
    assert path.read_bytes() == before


# Checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def settings(fast, tiny_bert, rows_jsonl, tmp_path) -> list[str]:
    return [
        *(*fast, "trainer.max_epochs=3", "logger=none", "data.limit_train=16", "data.limit_val=8"),
        *(f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"),
        *(f"output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"),
    ]


def test_checkpoints_are_synced_before_they_are_named(settings, tmp_path, monkeypatch):
    """So a power cut leaves the old one or the new one; and none goes through /tmp."""
    from lora_lightning.config.compose import compose_config
    from lora_lightning.training.run import train

    synced, named, unsynced = set(), [], []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def noted(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def name(call, source, target, **kwargs):
        if str(target).endswith(".ckpt"):
            named.append(Path(target).name)
            assert Path(source).parent == Path(target).parent
            if os.stat(source).st_ino not in synced:
                unsynced.append(target)
            size = os.stat(source).st_size
            call(source, target, **kwargs)
            assert os.stat(target).st_size == size
        else:
            call(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *a, **k: name(replace, *a, **k))
    monkeypatch.setattr(os, "rename", lambda *a, **k: name(rename, *a, **k))
    train(compose_config(settings))
    assert unsynced == []
    assert named.count("last.ckpt") == 3
    assert named.count("last-previous.ckpt") == 2
    assert any(each.startswith("best-step-") for each in named)
    inode = (tmp_path / "run" / "checkpoints").stat().st_ino
    assert inode in synced


def test_a_last_checkpoint_that_cannot_be_synced_leaves_both_before(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"

    def content(value: float) -> dict:
        return {"state_dict": {"a": torch.tensor([value])}}

    for value in (1.0, 2.0):
        last_checkpoint._write(path, content(value), keep=True)

    def fail(*_):
        raise OSError(5, "the disk fails")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match="The checkpoint before it is intact"):
            last_checkpoint._write(path, content(3.0), keep=True)
    found = {name: read_checkpoint(tmp_path / name) for name in os.listdir(tmp_path)}
    assert found == {"last.ckpt": content(2.0), "last-previous.ckpt": content(1.0)}


def test_the_best_is_synced_in_a_trainer_of_ones_own(tmp_path, done):
    trainer = L.Trainer(
        **{"accelerator": "cpu", "logger": False, "limit_train_batches": 2, "limit_val_batches": 0},
        **{"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False},
        callbacks=[best_checkpoint.BestCheckpoint(tmp_path, filename="best")],
    )
    trainer.fit(BoringModel())
    at = done.index(("rename", str(tmp_path / "best.ckpt")))
    assert done[at - 1][1].startswith(str(tmp_path / ".best.ckpt."))
    assert done[at + 1] == ("sync", str(tmp_path))
