"""What goes wrong on long nights: full disks, damaged files, losses that are no numbers, no memory.

What was whole before stays whole, and the message says how to go on.
"""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from helpers.runs import result_of, wait_for
from lora_lightning.config.compose import compose_config
from lora_lightning.errors import lack_of_memory
from lora_lightning.lora import UserError
from lora_lightning.lora.serialization import save as lora_state
from lora_lightning.training.callbacks import best_checkpoint, last_checkpoint
from lora_lightning.training.callbacks import loggers as curves
from lora_lightning.training.callbacks.best_checkpoint import BestCheckpoint
from lora_lightning.training.checkpointing import read_checkpoint
from lora_lightning.training.module import LoraModule
from lora_lightning.training.run import train
from lora_lightning.utils.locks import locked

TRAIN = [sys.executable, "-m", "lora_lightning", "train"]
LAST = "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def settings(fast, tiny_bert, rows_jsonl) -> list[str]:
    return [
        *fast,
        *(f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"),
        *("callbacks.early_stopping=null", "lora.rank=2"),
        *("trainer.max_epochs=24", "callbacks.last.every_n_steps=2"),
    ]


@pytest.fixture(scope="module")
def stopped(settings, tmp_path_factory) -> Path:
    """A run that SIGUSR1 has stopped in mid-training; its exit status says so."""
    folder = tmp_path_factory.mktemp("stopped")
    process = subprocess.Popen(
        [*TRAIN, *settings, "output_dir=run"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for((folder / "run" / LAST).exists, process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1, err
    assert "interrupted. To resume: lora-lightning train resume=" in err
    assert result_of(folder / "run")["status"] == "interrupted"
    assert not list((folder / "run" / "checkpoints").glob(".*")), "nothing half written is left"
    return folder / "run"


def resumed(run: Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TRAIN, f"resume={run}"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,
    )


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(stopped, tmp_path):
    """A process that may write no file as large as a checkpoint, as on a disk that is full."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    before = (run / LAST).read_bytes()
    limit = len(before) // 2

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = resumed(run, preexec_fn=limited)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search("checkpoint before it is intact|before is lost: check the disk", done.stderr)
    assert "Traceback" not in done.stderr
    assert (run / LAST).read_bytes() == before
    assert not list((run / "checkpoints").glob(".last*"))
    whole = resumed(run)
    assert whole.returncode == 0, whole.stderr
    assert result_of(run)["status"] == "completed"


def test_a_disk_that_is_full_for_a_log_is_told(settings, tmp_path, run_cli, monkeypatch):
    """No traceback, and a way on."""
    run = tmp_path / "run"

    def full(path, text):
        with Path("/dev/full").open("w") as device:  # every write finds it full
            device.write(text)

    monkeypatch.setattr(curves, "atomic_write", full)
    saves = "callbacks.last.every_n_steps=1000"
    status, _, err = run_cli("train", *settings, saves, f"output_dir={run}")
    assert status == 2
    assert "error: the disk is full: " in err
    assert "Traceback" not in err


RUINS = {"inf": "no longer finite", "nan": "no longer finite", "zero": "all zero"}


@pytest.mark.parametrize("ruin", RUINS)
def test_ruined_weights_do_not_take_a_good_checkpoints_place(ruin, settings, tmp_path, monkeypatch):
    """Weights that turn bad after the loss of the last step was still a number."""
    run, step = tmp_path / "run", LoraModule.optimizer_step

    def ruined(self, *args, **kwargs):
        step(self, *args, **kwargs)
        if self.trainer.global_step < 5:
            return
        with torch.no_grad():
            for tensor in self.trainable_tensors().values():
                if ruin == "zero":
                    tensor.zero_()
                else:
                    tensor.view(-1)[0] = float(ruin)

    monkeypatch.setattr(LoraModule, "optimizer_step", ruined)
    with pytest.raises(UserError, match=RUINS[ruin]):
        train(compose_config([*settings, "callbacks.best=null", f"output_dir={run}"]))
    kept = read_checkpoint(run / LAST)
    assert kept["global_step"] == 4
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())
    assert any(tensor.any() for tensor in kept["state_dict"].values())
    assert not list((run / "checkpoints").glob(".*"))
    assert not (run / "adapter").exists()


@pytest.mark.parametrize("file", ["last", "best", "adapter"])
def test_what_reads_otherwise_than_it_was_written_is_noticed(file, settings, tmp_path, monkeypatch):
    """A disk that turns a value between the writing of a file and its reading."""
    run, tampered = tmp_path / "run", []

    def turned(write):
        def wrapped(*args, **kwargs):
            found = write(*args, **kwargs)
            (path,) = (Path(str(a)) for a in args if isinstance(a, (str, Path)))
            if file in path.name and len(tampered) < 1:
                tampered.append(path)
                if ".ckpt" in path.name:
                    content = torch.load(path, weights_only=True)
                    next(iter(content["state_dict"].values())).view(-1)[0] += 1
                    torch.save(content, path)
                else:
                    raw = bytearray(path.read_bytes())
                    raw[-1] ^= 1
                    path.write_bytes(raw)
            return found

        return wrapped

    if file == "adapter":
        monkeypatch.setattr(lora_state, "save_file", turned(lora_state.save_file))
    else:
        for writer in (best_checkpoint, last_checkpoint):
            monkeypatch.setattr(writer, "save_to", turned(writer.save_to))
    with pytest.raises(UserError, match="disk or (the )?file system is"):
        train(compose_config([*settings, "trainer.max_epochs=2", f"output_dir={run}"]))
    assert tampered
    assert not tampered[0].exists()
    assert not (run / "adapter").exists()


def change(content: dict, key: str, value: object) -> None:
    *path, last = key.split("/")
    place = content
    for part in path:
        place = place[int(part) if part.isdigit() else part]
    if value is None:
        del place[last]
    elif isinstance(value, torch.Tensor) and value.dim() == 0:
        place[last].fill_(value)
    else:
        place[last] = value


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        *[(key, None, f"'{key}' is absent") for key in ("loops", "callbacks", "optimizer_states")],
        *[(key, None, f"'{key}' is absent") for key in ("lr_schedulers", "global_step", "epoch")],
        *[(key, None, f"'{key}' is absent") for key in ("data_ranks", "pytorch-lightning_version")],
        ("global_step", "x", "'global_step' is absent or of the wrong kind"),
        ("global_step", 10**12, "steps, and its 'global_step' is 10000"),
        ("loops", {"fit_loop": {}}, "loops have made None steps"),
        ("pytorch-lightning_version", "garbage", "version"),
        ("hyper_parameters", [1], "not a checkpoint of lora_lightning"),
        ("optimizer_states/0/state/0/exp_avg", torch.zeros(3), "exp_avg of tensor 0 is (3,)"),
        ("optimizer_states/0/state/0/exp_avg", torch.tensor(math.nan), "not finite"),
        ("optimizer_states/0/param_groups/0/lr", "x", "a learning rate is not a number"),
        ("optimizer_states/0/param_groups/0/params", [0], "it has groups of"),
    ],
)
def test_a_checkpoint_that_no_run_wrote_is_told(key, value, said, stopped, tmp_path, run_cli):
    """Whole by its checksums, and changed: saved again by another hand."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    content = torch.load(run / LAST, weights_only=True)
    change(content, key, value)
    torch.save(content, run / LAST)
    status, _, err = run_cli("train", f"resume={run}")
    assert status == 2, err
    assert said in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize("damage", ["cut", "turned", "turned inside", "empty", "other"])
def test_a_damaged_checkpoint_is_told(damage, stopped, tmp_path, run_cli):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    content = bytearray((run / LAST).read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "turned":
        content[0] ^= 255
    elif damage == "turned inside":  # a weight or a moment of Adam: only the checksum tells
        with zipfile.ZipFile(run / LAST) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        content[largest.header_offset + 256 + largest.file_size // 2] ^= 1
    elif damage == "empty":
        content.clear()
    (run / LAST).write_bytes(content)
    (run / LAST).with_name("last-previous.ckpt").unlink(missing_ok=True)
    if damage == "other":
        torch.save({"weights": torch.ones(3)}, run / LAST)
    status, _, err = run_cli("train", f"resume={run}")
    assert status == 2
    assert str(run / LAST) in err
    assert "Traceback" not in err


def test_other_batches_are_told(stopped, tmp_path, run_cli):
    """A checkpoint of as many processes as there are not: also where it was an epoch's last."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    state = torch.load(run / LAST, weights_only=True)
    assert state["data_ranks"] == 1
    torch.save({**state, "data_ranks": 2}, run / LAST)
    status, _, err = run_cli("train", f"resume={run}")
    assert status == 2
    assert "the checkpoint was written by 2 processes with different rows" in " ".join(err.split())


class KillsWorkers(Callback):
    """Kills the processes that prepare batches, as a system without memory does."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)


def test_killed_workers_are_told(settings, tmp_path):
    more = [
        *("callbacks.last.every_n_steps=1000", "data.num_workers=2", "data.batch_size=2"),
        f"output_dir={tmp_path / 'run'}",
        f"+callbacks.kills._target_={__name__}.KillsWorkers",
    ]
    with pytest.raises(UserError, match=r"prepares batches was killed.* data.num_workers=0"):
        train(compose_config([*settings, *more]))


def test_a_terminal_that_is_closed_ends_a_run_as_its_signal_does(settings, tmp_path):
    """A print may fail before the signal is heard."""
    run = tmp_path / "run"
    number, master = pty.fork()
    if number == 0:
        more = ["trainer.max_epochs=10000", "callbacks.samples=null", f"output_dir={run}"]
        os.execv(sys.executable, [*TRAIN, *settings, *more])
    until = time.monotonic() + 120
    said = b""
    while not (run / LAST).exists() and time.monotonic() < until:
        if select.select([master], [], [], 0.1)[0]:
            said += os.read(master, 4096)
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 128 + signal.SIGHUP, said
    assert result_of(run)["status"] == "interrupted"


class TakesAway(Callback):
    """Deletes the folder of the run."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            shutil.rmtree(self.folder)


def test_a_folder_that_is_taken_away_is_told(settings, tmp_path):
    run = tmp_path / "run"
    more = [
        *(f"output_dir={run}", "callbacks.last.every_n_steps=1000", "data.batch_size=4"),
        f"+callbacks.takes._target_={__name__}.TakesAway",
        f"+callbacks.takes.folder={run}",
    ]
    config = compose_config([*settings, *more])
    with pytest.raises(UserError, match=r"is missing: was .*run moved or deleted"):
        train(config)


WAITING = """
import signal, torch.distributed as dist
from lora_lightning.training.callbacks import graceful_stop as signals
signal.signal(signal.SIGINT, signal.default_int_handler)
signals.UNHEARD = 2.0
with signals.StopSignals():
    print("waits", flush=True)
    dist.TCPStore("127.0.0.1", 0, 2, True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_one_that_waits_for_others_can_be_ended(number):
    """In a library that is waiting, where Python has no chance to handle a signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "waits\n"
    time.sleep(1.0)
    process.send_signal(number)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "ended while waiting for other processes" in said


def test_a_checkpoint_with_a_turned_weight_is_not_taken_for_whole(stopped, tmp_path, run_cli):
    """Its container tells, or the strict look at names, shapes and values."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    state = torch.load(run / LAST, weights_only=True)
    name = next(iter(state["state_dict"]))
    state["state_dict"][name][0] = float("nan")
    torch.save(state, run / LAST)
    status, _, err = run_cli("train", f"resume={run}")
    assert status == 2
    assert "not finite" in err


@pytest.mark.slow
def test_two_runs_in_one_folder(stopped, tmp_path):
    """The second waits a moment for the first, and says so when it gives up; nothing is lost."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with locked(run, setting="output_dir"):
        done = resumed(run)
    assert done.returncode == 2
    assert "is in use by another process" in done.stderr
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_two_that_start_at_once_into_one_folder(settings, tmp_path):
    """One trains, the other is refused and takes nothing of the first one's away."""
    command = [*TRAIN, *settings, "trainer.max_epochs=2", "output_dir=run"]
    both = [
        subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=240)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    assert any("in use by another process" in err or "already holds a run" in err for err in said)
    result = result_of(tmp_path / "run")
    assert result["status"] == "completed"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_runs_that_begin_in_one_second_have_folders_of_their_own():
    folders = [str(compose_config([]).output_dir) for _ in range(20)]
    assert len(set(folders)) == 20


def test_a_clock_that_is_set_back_changes_nothing(settings, tmp_path, monkeypatch):
    """Times are taken from a clock that only goes forward."""
    start = time.time()
    monkeypatch.setattr(time, "time", lambda: start - 3600 * (1 + time.monotonic() % 7))
    run = tmp_path / "run"
    often = ["callbacks.last.every_n_minutes=0.00001", "callbacks.last.every_n_steps=null"]
    more = ["trainer.max_epochs=1", f"output_dir={run}"]
    result = train(compose_config([*settings, *often, *more]))
    assert result["status"] == "completed"
    assert (run / "checkpoints" / "last-previous.ckpt").is_file(), "saved twice, by the minutes"
    assert 0 < result["seconds"] < 120
    assert result["tokens_per_second"] > 0


@pytest.mark.parametrize("more", [[], ["trainer.max_steps=4", "callbacks.best=null"]])
def test_the_rows_of_a_step_whose_loss_is_no_number(more, settings, tmp_path, monkeypatch):
    """The file names the rows that were in the batch, not those of a later look at the loss.

    And so it does where that step was the last, and nothing is saved after it.
    """
    seen = []
    whole = LoraModule.training_step

    def watched(self, batch, index):
        loss = whole(self, batch, index)
        parts = batch if isinstance(batch, list) else [batch]
        seen.append(sorted(len(row) for part in parts for row in part["input_ids"]))
        ids = [row[row != 0].tolist() for part in parts for row in part["input_ids"]]
        texts.append(sorted(self.tokenizer.decode(row[1:-1]) for row in ids))
        if len(seen) == 4:
            self._step_loss._totals = self._step_loss._totals * float("nan")
        return loss

    texts: list[list[str]] = []
    monkeypatch.setattr(LoraModule, "training_step", watched)
    run = tmp_path / "run"
    with pytest.raises(Exception, match="the training loss is nan at step 3") as caught:
        train(
            compose_config(
                [
                    *(*settings, "trainer.log_every_n_steps=7", "callbacks.last.every_n_steps=100"),
                    *(f"output_dir={run}", "seed=5", *more),
                ]
            )
        )
    assert str(run / "bad_step.json") in str(caught.value)
    told = json.loads((run / "bad_step.json").read_text())
    assert (told["step"], told["epoch"], told["batches"], told["loss"]) == (3, 0, [3], "nan")
    assert sorted(row["text"].lower() for row in told["rows"]) == texts[3]
    assert texts[3] not in texts[:3]
    assert not (run / LAST).exists(), "the weights of that step are not kept"


def test_the_best_is_found_where_the_run_has_been_moved(settings, tmp_path):
    """And with its score: a worse one, later, must not take its place."""
    train(compose_config([*settings, "trainer.max_epochs=2", f"output_dir={tmp_path / 'run'}"]))
    run = shutil.move(tmp_path / "run", tmp_path / "moved")
    found = read_checkpoint(run / LAST)["callbacks"]
    state = next(state for key, state in found.items() if key.startswith("BestCheckpoint"))
    assert state["dirpath"] == str(tmp_path / "run" / "checkpoints")
    best = BestCheckpoint(dirpath=run / "checkpoints", monitor="val/loss")
    best.load_state_dict(state)
    assert Path(best.best_model_path).is_file()
    assert list(best.best_k_models) == [best.best_model_path] == [best.kth_best_model_path]
    assert best.best_model_score == best.kth_value == state["best_model_score"]


def test_the_rows_are_kept_where_the_loss_fails_before_a_checkpoint(settings, tmp_path, run_cli):
    run = tmp_path / "run"
    more = ["optim.lr=1e30", "trainer.gradient_clip_val=null", "trainer.log_every_n_steps=1"]
    status, _, err = run_cli("train", *settings, *more, f"output_dir={run}")
    assert status == 2
    assert f"The rows of that step are in {run / 'bad_step.json'}" in " ".join(err.split())
    assert json.loads((run / "bad_step.json").read_text())["rows"]
    assert "float16" not in err


class Panic(BaseException):
    """As a library in Rust raises."""


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "fails",
    [
        pytest.param(lambda *_: torch.empty(2**50), id="torch"),
        pytest.param(lambda *_: bytearray(2**62), id="python"),
        pytest.param(lambda *_: _raise(OSError(errno.ENOMEM, "Cannot allocate memory")), id="fork"),
        pytest.param(lambda *_: _raise(RuntimeError("can't start new thread")), id="thread"),
        pytest.param(lambda *_: _raise(Panic("ThreadPoolBuildError { kind: 11 }")), id="rust"),
    ],
)
def test_a_lack_of_memory_says_what_helps(fails, settings, tmp_path, run_cli, monkeypatch):
    monkeypatch.setattr(LoraModule, "on_train_batch_start", fails, raising=True)
    status, _, err = run_cli("train", *settings, f"output_dir={tmp_path / 'run'}")
    assert status == 2
    said = " ".join(err.split())
    assert "out of memory:" in said
    for knob in (
        "data.max_tokens=512",
        "model.gradient_checkpointing=true",
        "lora-lightning check",
    ):
        assert knob in said
    assert "trainer=fsdp2" not in said, "which is of no use on a CPU"


def test_a_lack_of_memory_of_a_command_is_told(run_cli, monkeypatch):
    monkeypatch.setattr("lora_lightning.sweeps.report.report", lambda _: torch.empty(2**50))
    status, _, err = run_cli("report", "multirun")
    assert status == 2
    assert re.match("error: out of memory: .*ulimit", " ".join(err.split()))


def test_another_error_is_no_lack_of_memory():
    assert lack_of_memory(UserError("no file 'Out of memory.csv'")) is None
    assert lack_of_memory(OSError(errno.ENOENT, "x")) is None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param("callbacks.last=null", id="unsaved"),
        pytest.param("trainer.limit_train_batches=1", id="epochs", marks=pytest.mark.slow),
    ],
)
def test_a_run_ends_that_has_no_step_to_save_at(change, settings, tmp_path):
    """Without the callback that saves, or with epochs of one step, each with a validation."""
    long = ["trainer.max_epochs=100000", "callbacks.best=null", "callbacks.samples=null"]
    command = [*TRAIN, *settings, *long, change, "trainer.log_every_n_steps=1", "output_dir=run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "run" / "csv" / "metrics.csv").exists, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert result_of(tmp_path / "run")["status"] == "interrupted"


@pytest.mark.slow
def test_the_same_command_goes_on_or_begins(settings, stopped, tmp_path):
    """resume=auto: what a cluster runs again after it has stopped a job."""
    command = [*TRAIN, *settings, "output_dir=run", "resume=auto"]
    shutil.copytree(stopped, tmp_path / "run")

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )

    other = run([*command, "lora.rank=3"])
    assert other.returncode == 2
    assert "holds a run with other settings" in other.stderr
    done = run(command)
    assert done.returncode == 0, done.stderr
    shutil.copytree(stopped, tmp_path / "plain")
    assert resumed(tmp_path / "plain").returncode == 0
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("run", "plain")
    ]
    assert adapters[0] == adapters[1]
    again = run(command)
    assert again.returncode == 0
    assert "is complete: nothing to resume" in again.stdout
    fresh = run([*TRAIN, *settings, "trainer.max_epochs=1", "output_dir=fresh", "resume=auto"])
    assert fresh.returncode == 0, fresh.stderr


def test_lightning_still_has_what_is_replaced():
    """Its handler of SIGTERM broadcasts within the handler, and at every step: see signals.py."""
    from lightning.pytorch.loops.fit_loop import _FitLoop
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert callable(_CheckpointConnector._restore_modules_and_callbacks)  # see restoring.py
    assert callable(_CheckpointConnector.restore_training_state)
    assert callable(_FitLoop._load_combined_loader_states)


def test_a_lock_is_free_when_its_process_is_gone(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from lora_lightning.utils.locks import locked\n"
        "with locked(Path(sys.argv[1]), setting='x'):\n    print('held', flush=True); time.sleep(9)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    threading.Timer(0.5, lambda: os.kill(holder.pid, signal.SIGKILL)).start()
    with locked(tmp_path, setting="output_dir"):
        assert holder.wait(timeout=10) == -signal.SIGKILL
