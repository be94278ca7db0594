"""A run that was killed goes on exactly: the same adapter, bit for bit, and the same metrics."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

from helpers.runs import QUIET, csv_rows, result_of
from lora_lightning.cli.main import main
from lora_lightning.config.compose import compose_config
from lora_lightning.training.callbacks import last_checkpoint
from lora_lightning.training.callbacks.last_checkpoint import LastCheckpoint
from lora_lightning.training.checkpointing import read_checkpoint
from lora_lightning.training.run import train

# 64 training rows in batches of 6: 11 batches, so windows of 2 leave a last one of a single batch.
SETTINGS = [
    *QUIET,
    "trainer.max_epochs=5",
    "trainer.accumulate_grad_batches=2",
    "trainer.log_every_n_steps=1",
    "callbacks.last.every_n_steps=1",
    "callbacks.early_stopping.patience=2",
    "test_before=false",
    "data.batch_size=6",
    "lora.dropout=0.1",
    "optim.scheduler=cosine",
    "optim.lr=1e-2",
    # What is least like the base is taken for the best: that training moves it away is sure, and it
    # puts the best at the end. Whether so few rows teach anything hangs on the last digits.
    "task.monitor=val/loss",
    *(f"callbacks.{name}.monitor=val/retained_similarity" for name in ("best", "early_stopping")),
    *(f"callbacks.{name}.mode=min" for name in ("best", "early_stopping")),
    "seed=3",
]


PATHS = os.pathsep.join(map(str, Path(__file__).parents[:2]))
"""Where a process of its own finds this file and the helpers."""

# All but what depends on the clock.
LOGGED = re.compile(r"lr-|update_norm/|(train|val|test)/(loss|accuracy|f1|auroc|retained.*)$")


class KeepCopies(Callback):
    """Keeps a copy of the run's folder after every save, as a kill right then would leave it."""

    def __init__(self, run_dir: str, copies: str) -> None:
        self.run_dir, self.copies = Path(run_dir), Path(copies)
        self.seen = 0

    def _look(self, trainer, pl_module, *_):
        (saves,) = (one for one in trainer.callbacks if isinstance(one, LastCheckpoint))
        saves._wait()  # it writes beside the training, and a folder is not copied in one moment
        last = self.run_dir / "checkpoints" / "last.ckpt"
        if last.is_file() and last.stat().st_mtime_ns != self.seen:
            self.seen = last.stat().st_mtime_ns
            count = len(list(self.copies.iterdir())) if self.copies.exists() else 0
            shutil.copytree(self.run_dir, self.copies / f"{count:02d}-{trainer.global_step}")

    on_train_batch_start = on_train_epoch_start = on_train_end = on_validation_start = _look


class Die(Callback):
    """Kills its process at the hook and batch that DIE_AT names, such as train:7; or DIE_OF."""

    def _die(self, at: str) -> None:
        if os.environ.get("DIE_AT") == at:
            if os.environ.get("DIE_OF") == "error":
                raise RuntimeError(f"died at {at}")
            os.kill(os.getpid(), getattr(signal, os.environ.get("DIE_OF", "SIGKILL")))

    def setup(self, trainer, pl_module, stage):
        self._die(f"setup:{trainer.state.fn.value}")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._die(f"train:{trainer.fit_loop.total_batch_idx}")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._die(f"end:{trainer.fit_loop.total_batch_idx}")

    def on_after_backward(self, trainer, pl_module):
        self._die(f"backward:{trainer.fit_loop.total_batch_idx}")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        # Between LastCheckpoint's and the step.
        optimizer.register_step_post_hook(lambda *_: self._die(f"step:{trainer.global_step}"))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._die(f"validation:{trainer.current_epoch}")

    def on_train_epoch_start(self, trainer, pl_module):
        self._die(f"epoch:{trainer.current_epoch}")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self._die(f"save:{trainer.global_step}")

    def on_test_start(self, trainer, pl_module):
        self._die("test")


def settings(tiny_bert, rows_jsonl, output: Path, *more: str) -> list[str]:
    return [
        *SETTINGS,
        f"model.name_or_path={tiny_bert}",
        f"data.train={rows_jsonl}",
        f"output_dir={output}",
        f"callbacks.retention.texts={rows_jsonl}",
        "callbacks.retention.count=8",
        *more,
    ]


def outcome(run_dir: Path) -> tuple[bytes, dict]:
    result = result_of(run_dir)
    assert result["status"] == "completed"
    kept = {
        name: value
        for name, value in result.items()
        if name.startswith(("val/", "test/")) or name in ("steps", "epochs", "tokens")
    }
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes(), kept


def logged_by_step(run_dir: Path) -> dict[int, dict[str, str]]:
    """What the CSV log holds for each step."""
    steps: dict[int, dict[str, str]] = {}
    for row in csv_rows(run_dir):
        values = {name: value for name, value in row.items() if value and LOGGED.match(name)}
        steps.setdefault(int(row["step"]), {}).update(values)
    return steps


def best_step(run_dir: Path) -> int:
    (best,) = (run_dir / "checkpoints").glob("best-*.ckpt")
    return int(best.stem.partition("step-")[2])


def resume(copy: Path, at: Path, overrides: list[str]) -> tuple[bytes, dict]:
    """Puts a copy of a killed run in its place and goes on with it."""
    shutil.rmtree(at)
    shutil.copytree(copy, at)
    train(compose_config(overrides), resume=True)
    return outcome(at)


VARIANTS = {
    "epochs": [],
    "stopped early": [
        "callbacks.early_stopping.patience=1",
        "callbacks.early_stopping.mode=max",
    ],
    "validation in mid-epoch": [
        "trainer.val_check_interval=4",
        "callbacks.early_stopping.patience=5",
    ],
    "max_steps": ["trainer.max_steps=26"],
    "batches from workers": ["data.num_workers=2"],
    "validation every second epoch": ["trainer.check_val_every_n_epoch=2"],
    "ranks from the data": ["lora.init=eva", "lora.rank=4"],
    "dora from the weights": ["lora.use_dora=true", "lora.init=pissa"],
    "parts of layers": ["+lora.parts={query: [a, -b], intermediate.dense: {a: 40, b: 24}}"],
    "rates by what validation measures": [
        "optim.scheduler=reduce_lr_on_plateau",
        "+optim.scheduler_options={mode: min, patience: 0, factor: 0.5}",
    ],
    "experts": [
        "lora.target_parameters=[experts.gate_up_proj,experts.down_proj]",
        "lora.dropout=0",
    ],
    "lora+ with a frozen A": [
        *("lora.freeze_A=true", "optim.loraplus_lr_ratio=16", "optim.lr=1e-3"),
        "callbacks.early_stopping.patience=5",
    ],
}
QUICK = "validation in mid-epoch"
"""The variant of which every run of the tests takes each fifth save point."""
EVERY_STEP = ("epochs", "validation in mid-epoch", "validation every second epoch")


@pytest.mark.parametrize(
    ("variant", "every"),
    [
        (QUICK, 5),
        *(pytest.param(v, 1 if v in EVERY_STEP else 5, marks=pytest.mark.slow) for v in VARIANTS),
    ],
)
def test_resume_from_every_save_point_equals_the_uninterrupted_run(
    variant, every, request, rows_jsonl, tmp_path, capsys, monkeypatch
):
    run_dir, copies = tmp_path / "run", tmp_path / "copies"
    base = request.getfixturevalue("tiny_mixtral" if variant == "experts" else "tiny_bert")
    overrides = settings(base, rows_jsonl, run_dir, *VARIANTS[variant])
    keep = [
        f"+callbacks.keep._target_={__name__}.KeepCopies",
        f"+callbacks.keep.run_dir={run_dir}",
        f"+callbacks.keep.copies={copies}",
    ]
    train(compose_config([*overrides, *keep]))
    expected, expected_log = outcome(run_dir), logged_by_step(run_dir)
    found = sorted(copies.iterdir())
    assert len(found) >= 8
    assert best_step(run_dir) > 6, "the best is to come of more than the first epoch"
    for copy in dict.fromkeys([*found[::every], found[-1]]):
        assert resume(copy, run_dir, overrides) == expected, copy.name
        assert logged_by_step(run_dir) == expected_log, copy.name
    torn = found[len(found) // 2] / "checkpoints" / "last.ckpt"
    torn.write_bytes(torn.read_bytes()[:-100])
    write = last_checkpoint._write

    def watched(path, content, *, keep):
        write(path, content, keep=keep)
        read_checkpoint(path.with_name("last-previous.ckpt"))  # the torn one never takes its place

    monkeypatch.setattr(last_checkpoint, "_write", watched)
    assert resume(torn.parent.parent, run_dir, overrides) == expected, "by the one before it"
    assert logged_by_step(run_dir) == expected_log
    assert f"{run_dir / 'checkpoints' / 'last.ckpt'} is truncated" in capsys.readouterr().err


# Killed for good ---------------------------------------------------------------------------------


OWN = f"callbacks.die._target_={__name__}.Die"
"""A class of nobody that resume knows: it wants to be typed again."""


DOUBTS = "".join(
    f"WARNING only 8 {split} rows: each makes 12 % of the metrics\n" for split in ("val", "test")
)


@pytest.fixture(scope="module")
def killable(tiny_bert, rows_jsonl):
    """Arguments of a run that saves now and then and dies where DIE_AT says."""

    def arguments(output: Path) -> list[str]:
        die = [f"+{OWN}", "callbacks.last.every_n_steps=4"]
        return ["train", *settings(tiny_bert, rows_jsonl, output, *die)]

    return arguments


@pytest.fixture(scope="module")
def whole_run(killable, tmp_path_factory) -> Path:
    """The folder of a run that nothing stopped, in a process of its own."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert _in_fork(killable(run_dir), {}) == 0
    assert best_step(run_dir) == 30
    return run_dir


@pytest.fixture(scope="module")
def uninterrupted(whole_run) -> tuple[bytes, dict]:
    return outcome(whole_run)


def _in_fork(
    arguments: list[str], environment: dict[str, str], errors: Path = Path(os.devnull)
) -> int | None:
    """Runs the command line in a child of this process, which spares it the imports."""

    def child() -> None:
        os.environ.update(environment)
        # Python leaves SIGINT ignored where a shell started the tests in its background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        hup = signal.SIG_IGN if "NOHUP" in environment else signal.SIG_DFL
        signal.signal(signal.SIGHUP, hup)
        sys.argv = ["lora-lightning", *arguments]
        with errors.open("w") as sys.stderr:
            main()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize(
    "moment",
    ["train:3", "train:17", "save:6", "validation:1", "epoch:2", "test"],
    ids=["before a checkpoint", "mid-epoch", "saving", "validation", "between epochs", "test"],
)
def test_resume_after_a_kill_equals_the_uninterrupted_run(
    moment, killable, uninterrupted, run_cli, tmp_path
):
    run_dir = tmp_path / "run"
    assert _in_fork(killable(run_dir), {"DIE_AT": moment}) == -signal.SIGKILL
    assert (run_dir / "adapter").exists() == (moment == "test")
    assert (run_dir / "checkpoints" / "last.ckpt").exists() == (moment != "train:3")
    status, _, errors = run_cli("train", f"resume={run_dir}", OWN)
    assert (status, errors) == (0, DOUBTS), errors
    assert outcome(run_dir) == uninterrupted


def test_resume_after_two_kills_equals_the_uninterrupted_run(
    killable, uninterrupted, run_cli, tmp_path
):
    run_dir = tmp_path / "run"
    assert _in_fork(killable(run_dir), {"DIE_AT": "train:14"}) == -signal.SIGKILL
    again = _in_fork(["train", f"resume={run_dir}", OWN], {"DIE_AT": "train:25"})
    assert again == -signal.SIGKILL
    assert run_cli("train", f"resume={run_dir}", OWN)[0] == 0
    assert outcome(run_dir) == uninterrupted
    status, out, _ = run_cli("train", f"resume={run_dir}", OWN)
    assert status == 0
    assert "nothing to resume" in out
    assert outcome(run_dir) == uninterrupted


@pytest.mark.parametrize("moment", ["train:17", "validation:1", "test"])
def test_resume_after_an_interrupt_equals_the_uninterrupted_run(
    moment, killable, uninterrupted, run_cli, tmp_path
):
    """Ctrl-C: exit status 130 and one line that says how to go on."""
    run_dir, errors = tmp_path / "run", tmp_path / "errors"
    arguments = killable(run_dir)
    if moment != "test":
        arguments.append("test_before=true")
    assert _in_fork(arguments, {"DIE_AT": moment, "DIE_OF": "SIGINT"}, errors) == 130
    told = f"interrupted. To resume: lora-lightning train resume={run_dir} {OWN}\n"
    assert errors.read_text() == DOUBTS + told
    stopped = result_of(run_dir)
    assert stopped["status"] == "interrupted"
    assert run_cli("train", f"resume={run_dir}", OWN)[0] == 0
    assert outcome(run_dir) == uninterrupted
    resumed = result_of(run_dir)
    retained = resumed["before"].pop("val/retained_similarity")  # is in the checkpoint
    assert retained == pytest.approx(1.0, abs=1e-6)
    assert resumed["before"] == stopped["before"]
    assert ("test/accuracy" in resumed["before"]) == (moment != "test")


@pytest.mark.parametrize(
    ("moment", "saved"),
    [
        ("train:18", 9),
        ("backward:17", 9),
        ("end:16", 9),
        ("end:17", 9),
        ("step:8", 6),
        ("backward:21", 11),  # the last batch of an epoch
        ("validation:1", 6),
        pytest.param("train:17", 9, marks=pytest.mark.slow),
        pytest.param("backward:18", 9, marks=pytest.mark.slow),
        pytest.param("train:2", 1, marks=pytest.mark.slow),
        pytest.param("train:11", 6, marks=pytest.mark.slow),
    ],
)
def test_resume_after_an_error_equals_the_uninterrupted_run(
    moment, saved, killable, whole_run, run_cli, tmp_path
):
    """An exception loses no whole step, but where it comes amid one, or in a validation."""
    run_dir, errors = tmp_path / "run", tmp_path / "errors"
    arguments = [*killable(run_dir), "callbacks.last.every_n_steps=null"]
    died = _in_fork(arguments, {"DIE_AT": moment, "DIE_OF": "error"}, errors)
    last = run_dir / "checkpoints" / "last.ckpt"
    assert (died, read_checkpoint(last)["global_step"]) == (1, saved)
    told = f"saved the state after step {saved}: {last}\n"
    assert (told in errors.read_text()) == (saved != 6)
    failed = result_of(run_dir)
    assert (failed["status"], failed["error"]) == ("failed", f"RuntimeError: died at {moment}")
    assert run_cli("train", f"resume={run_dir}", OWN, "data.num_workers=0")[0] == 0
    assert outcome(run_dir) == outcome(whole_run)
    found, expected = logged_by_step(run_dir), logged_by_step(whole_run)
    if moment == "end:16":  # Lightning logs what a step has measured after its hooks
        del found[9], expected[9]
    assert found == expected


@pytest.mark.parametrize(
    ("how", "moment", "status"),
    [
        ("SIGTERM", "setup:fit", 143),
        ("SIGTERM", "validation:1", 143),
        ("SIGHUP", "setup:fit", 129),
        ("SIGHUP", "train:17", 129),
    ],
)
def test_resume_after_sigterm_equals_the_uninterrupted_run(
    how, moment, status, killable, uninterrupted, run_cli, tmp_path
):
    """At once where no step is near, else after one; the same run comes of it."""
    run_dir, errors = tmp_path / "run", tmp_path / "errors"
    told = _in_fork(killable(run_dir), {"DIE_AT": moment, "DIE_OF": how}, errors)
    assert told == status, errors.read_text()
    said = errors.read_text().splitlines()
    assert [line[:8] for line in said[:-1]] == ["WARNING "] * (len(said) - 1)  # of few rows
    assert said[-1].startswith("interrupted. To resume")
    last = run_dir / "checkpoints" / "last.ckpt"
    assert last.exists() == (moment != "setup:fit")
    assert result_of(run_dir)["status"] == "interrupted"
    assert run_cli("train", f"resume={run_dir}", OWN)[0] == 0
    assert outcome(run_dir) == uninterrupted


def test_sighup_under_nohup_ends_no_run(killable, tmp_path):
    died = {"DIE_AT": "train:17", "DIE_OF": "SIGHUP", "NOHUP": "1"}
    assert _in_fork([*killable(tmp_path / "run"), "trainer.max_epochs=2"], died) == 0


def test_resume_of_a_killed_command_equals_the_uninterrupted_run(
    killable, uninterrupted, run_cli, tmp_path
):
    """A fresh interpreter, killed by another process at whatever step it has come to."""
    run_dir = tmp_path / "run"
    last = run_dir / "checkpoints" / "last.ckpt"
    command = [sys.executable, "-m", "lora_lightning", *killable(run_dir)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": PATHS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not last.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert run_cli("train", f"resume={run_dir}", OWN)[0] == 0
    assert outcome(run_dir) == uninterrupted
