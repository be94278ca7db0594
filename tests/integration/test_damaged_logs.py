"""A log never stops a run: what a kill or a power cut has damaged is left out, and said."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from helpers.runs import result_of
from lora_lightning.config.compose import compose_config, config_hash
from lora_lightning.sweeps.job import Job
from lora_lightning.sweeps.job_process import Work, environment_of_job
from lora_lightning.sweeps.live_table import JobTable
from lora_lightning.sweeps.packed.__main__ import main as train_pack
from lora_lightning.sweeps.planning import without_hydra
from lora_lightning.sweeps.queue import JobQueue
from lora_lightning.sweeps.report import read_sweep
from lora_lightning.training.callbacks.loggers import CurvesLogger
from lora_lightning.training.callbacks.progress import SamplePredictions
from lora_lightning.training.folder_checks import continue_csv
from lora_lightning.training.run import train
from lora_lightning.utils.logs import (
    curve,
    read_json,
    read_metrics,
    read_result,
    read_samples,
)

HEADER = b"step,train/loss,val/loss\r\n"
ROWS = b"1,0.5,\r\n2,,0.25\r\n"
WHOLE = [
    {"step": "1", "train/loss": "0.5", "val/loss": ""},
    {"step": "2", "train/loss": "", "val/loss": "0.25"},
]
DAMAGED = {
    "whole": (HEADER + ROWS, WHOLE, 0),
    "cut in a number": (HEADER + ROWS + b"3,4.8e-", WHOLE, 1),
    "cut after a number that may go on": (HEADER + ROWS + b"3,0.1,0.2", WHOLE, 1),
    "cut before its step": (HEADER.replace(b"step,", b"") + b"0.5", [], 1),
    "zero bytes at the end": (HEADER + ROWS + bytes(64), WHOLE, 1),
    "more zero bytes than a cell may have": (HEADER + ROWS + bytes(2**18) + b"\r\n", WHOLE, 1),
    "zero bytes within": (HEADER + b"1,0.5" + bytes(8) + b"\r\n" + ROWS, WHOLE, 1),
    "no UTF-8": (HEADER + b"\xff\xfe,1,\r\n" + ROWS, WHOLE, 1),
    "more cells": (HEADER + b"1,2,3,4\r\n" + ROWS, WHOLE, 1),
    "fewer cells": (HEADER + b"7,8\r\n" + ROWS, WHOLE, 1),
    "a step too long to read": (HEADER + b"9" * 5000 + b",,\r\n" + ROWS, WHOLE, 1),
    "a step too large for a float": (HEADER + b"9" * 400 + b",,\r\n" + ROWS, WHOLE, 1),
    "half a header": (b"step,trai", [], 1),
    "no header": (bytes(8) + b"\n" + ROWS, [], 2),
    "empty": (b"", [], 0),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_read_metrics_keeps_whole_rows(kind, tmp_path):
    content, rows, damaged = DAMAGED[kind]
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    assert read_metrics(path) == (rows, damaged)


def test_read_metrics_of_no_file_is_empty(tmp_path):
    assert read_metrics(tmp_path / "metrics.csv") == ([], 0)
    assert read_samples(tmp_path / "samples.jsonl") == ([], 0)


@pytest.mark.parametrize("first_step", [0, 1])
def test_a_run_goes_on_over_a_step_that_is_no_number(first_step, tmp_path, capsys):
    """Of two steps taken, a run that counts from 1 has two rows; one of an earlier version one."""
    path = tmp_path / "csv" / "metrics.csv"
    path.parent.mkdir()
    path.write_bytes(HEADER + ROWS + b"9" * 5000 + b",0.1,\r\n")
    trainer = SimpleNamespace(
        loggers=[CurvesLogger(tmp_path, name="csv", version="")], is_global_zero=True
    )
    continue_csv(trainer, step=2, first_step=first_step)
    rows = [{name: value for name, value in row.items() if value} for row in read_metrics(path)[0]]
    kept = [{"step": "1", "train/loss": "0.5"}, {"step": "2", "val/loss": "0.25"}]
    assert rows == kept[: 1 + first_step]
    assert "1 damaged line left out" in capsys.readouterr().err


LINE = b"2.0,1\r\n"
CHANGES = {
    "too many cells": (LINE, b"2.0,1,5\r\n", ["1.0", "", "4.0"], 1),
    "no UTF-8": (LINE, b"\xff,1\r\n", ["1.0", "\ufffd", "", "4.0"], 0),
    "zero bytes": (LINE, bytes(7), ["1.0", "", "4.0"], 1),
    "the header": (b"a,step", b"\xff,step", ["", "", "", "4.0"], 0),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_new_column_over_damaged_curves_ends_no_run(kind, tmp_path, capsys):
    before, after, expected, damaged = CHANGES[kind]
    logger = CurvesLogger(tmp_path, name="csv", version="")
    path = tmp_path / "csv" / "metrics.csv"
    for step in range(2):
        logger.log_metrics({"a": step + 1.0}, step)
    logger.save()
    path.write_bytes(path.read_bytes().replace(before, after))
    for step, metrics in enumerate([{"b": 3.0}, {"a": 4.0}], 2):
        logger.log_metrics(metrics, step)
        logger.save()
    assert [row["a"] for row in csv.DictReader(path.open(newline=""))] == expected
    assert ("1 damaged line left out" in capsys.readouterr().err) == bool(damaged)


def test_curve_leaves_out_what_is_no_number():
    rows = [*WHOLE, {"step": "3", "train/loss": "0.3", "val/loss": "4.8e-"}]
    assert curve(rows, "val/loss") == [(2, 0.25)]
    assert curve(rows, "val/f1") == []


ZEROS = pytest.param(bytes(64), id="zero bytes")
DEEP = pytest.param(b"[" * 10**5, id="deep")


@pytest.mark.parametrize("content", [b"", b'{"status": "ru', ZEROS, b"[1]", DEEP])
def test_read_json_of_a_damaged_file_is_empty(content, tmp_path):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    assert read_json(path) == {}
    assert read_json(tmp_path / "none") == {}


RUNG = {"step": 4, "planned": 8, "monitor": "m", "value": 0.25}
KINDS = [
    ({"objective": 0.5, "status": "completed"}, ("", "m 0.5000")),
    ({"objective": 0.5, "steps": 7, "monitor": "n"}, ("7", "n 0.5000")),
    ({"rungs": [RUNG]}, ("4", "m 0.2500")),
    ({"objective": "x", "steps": 7, "monitor": "m"}, None),
    ({"objective": [1]}, None),
    ({"objective": 10**400}, None),
    ({"steps": "x", "objective": 0.5}, None),
    ({"val/loss": "x"}, None),
    ({"status": 5}, None),
    ({"versions": [1]}, None),
    ({"rungs": 5}, None),
    ({"rungs": [5]}, None),
    *[({"rungs": [{key: RUNG[key] for key in RUNG if key != name}]}, None) for name in RUNG],
    ({"rungs": [{**RUNG, "value": "x"}]}, None),
    ({"rungs": [{**RUNG, "planned": 0}]}, None),
    ({"rungs": [{**RUNG, "share": "x"}]}, None),
]


@pytest.mark.parametrize(("result", "shown"), KINDS)
def test_a_result_of_other_kinds_counts_as_damaged(result, shown, tmp_path):
    job = Job(0, [], tmp_path, state="paused")
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert read_result(tmp_path / "result.json") == ({} if shown is None else result)
    assert JobTable(tmp_path, [job], "m")._progress(job) == (shown or ("", "-"))
    assert job.rungs() == read_result(tmp_path / "result.json").get("rungs", [])


def test_a_table_that_cannot_be_shown_ends_no_sweep(tmp_path, capsys):
    job, ended = Job(0, [], tmp_path), []

    def show() -> None:
        ended.append(job.state)
        raise ValueError("no table")

    work = Says([job])
    work.code = "pass"
    left = [[work], []]
    JobQueue([job], lambda _: left.pop(0) if left else [], [None], show=show).run()
    assert (job.status, ended[-1]) == (0, "failed")  # it has written no result
    assert capsys.readouterr().err == "warning: the jobs cannot be shown: ValueError('no table')\n"


# Samples -------------------------------------------------------------------------------------

SEPARATORS = "a\u2028b\u2029c\x85d\x0ce\x1cf\ud800"


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().split("\n") if line]


def test_samples_hold_texts_with_line_separators(tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    for step in (1, 2, 3):
        SamplePredictions._write(path, step, [{"input": SEPARATORS, "prediction": "x"}])
    assert [json.loads(line)["input"] for line in path.open()] == [SEPARATORS] * 3
    assert steps_of(path) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_samples_with_separators_of_an_older_run_are_kept(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"step": 1, "input": "a\u2028b"}, ensure_ascii=False) + "\n")
    SamplePredictions._write(path, 2, [{"input": "c"}])
    assert [json.loads(line)["input"] for line in path.open()] == ["a\u2028b", "c"]


LINES = (b"[1]", b'{"step": "x"}', b'{"step": 1e999}', b'{"step": 1e300}', b'{"step": NaN}')
LINES += (b'{"step": ' + b"9" * 5000 + b"}", b'{"step": "' + b"9" * 5000 + b'"}')


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 2, "inp',
        ZEROS,
        *(pytest.param(line + b"\n", id=str(line[:20])) for line in LINES),
    ],
)
def test_damaged_samples_are_left_out_and_said_once(damage, tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    SamplePredictions._write(path, 1, [{"input": "a"}])
    path.write_bytes(path.read_bytes() + damage)
    for step in (2, 3):
        SamplePredictions._write(path, step, [{"input": "a"}])
    assert steps_of(path) == [1, 2, 3]
    assert capsys.readouterr().err == f"warning: {path}: 1 damaged line left out.\n"


# A run ---------------------------------------------------------------------------------------


class Ends(Callback):
    """Ends a run at an optimizer step, by an error or an exit."""

    def __init__(self, step: int, error: str = "exit") -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise SystemExit("last words") if self.error == "exit" else RuntimeError("broken")


@pytest.fixture(scope="module")
def settings(fast, tiny_bert, rows_jsonl) -> list[str]:
    return [
        *(*fast, f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"),
        "callbacks.early_stopping=null",
        *("trainer.max_epochs=3", "trainer.log_every_n_steps=1", "lora.rank=2"),
    ]


OWN = f"callbacks.ends._target_={__name__}.Ends"


@pytest.fixture(scope="module")
def stopped(settings, tmp_path_factory) -> Path:
    """A run that ended in its third epoch, with the config that it goes on by."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    ends = [f"+{OWN}", "+callbacks.ends.step=20", "+callbacks.ends.error=error"]
    config = compose_config([*settings, f"output_dir={run}", *ends])
    with pytest.raises(RuntimeError, match="broken"):
        train(config)
    config.callbacks.ends.step = 10**6
    (run / ".hydra").mkdir()
    OmegaConf.save(config, run / ".hydra" / "config.yaml")
    return run


LOGS = ("csv/metrics.csv", "samples.jsonl")


@pytest.mark.parametrize("damage", ["cut", "zero bytes", "emptied"])
def test_a_run_resumes_over_damaged_logs(damage, stopped, tmp_path, run_cli):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    for name in LOGS:
        content = (run / name).read_bytes()
        content = {"cut": content[:-4], "zero bytes": content + bytes(64), "emptied": b""}[damage]
        (run / name).write_bytes(content)
    (run / ".hydra" / "overrides.yaml").write_bytes(bytes(64))
    status, _, err = run_cli("train", f"resume={run}", OWN)
    assert status == 0, err
    for name in LOGS:
        assert err.count(f"warning: {run / name}: 1 damaged line left out.") == (
            damage != "emptied"
        ), err
    rows, damaged = read_metrics(run / "csv" / "metrics.csv")
    assert damaged == 0
    before = dict(curve(read_metrics(stopped / "csv" / "metrics.csv")[0], "val/loss"))
    after = dict(curve(rows, "val/loss"))
    assert len(before) == 2
    assert len(after) > 0
    assert (before.keys() <= after.keys()) == (damage != "emptied")
    assert max(steps_of(run / "samples.jsonl")) == 24
    assert "lora-lightning train" not in (run / "adapter" / "README.md").read_text()


def test_an_exit_in_a_run_keeps_its_last_words(settings, tmp_path, run_cli, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    ends = [f"+{OWN}", "+callbacks.ends.step=2"]
    status, _, err = run_cli("train", *settings, *ends, f"output_dir={tmp_path / 'run'}")
    assert status == 130
    assert "last words\n" in err
    assert "interrupted. To resume" in err


@pytest.mark.parametrize("content", [b"", b'{"at": 0.', ZEROS, b'{"at": "x", "rungs": []}'])
def test_a_damaged_pause_is_told(content, stopped, tmp_path, run_cli):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    (run / "pause.json").write_bytes(content)
    status, _, err = run_cli("train", f"resume={run}", OWN)
    assert status == 2
    assert f"error: {run / 'pause.json'} is damaged. Run the sweep's command again" in err


@pytest.mark.parametrize("left", [0, 0.5])
def test_a_damaged_config_is_told(left, stopped, tmp_path, run_cli):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    config = run / ".hydra" / "config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(lines[: int(left * len(lines))]))
    status, _, err = run_cli("train", f"resume={run}", OWN)
    assert status == 2
    assert err.startswith(f"error: {config} is not the config of a run, or is damaged: ")


# A sweep -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [b"3,,4.8e-", b"3,,0.1", ZEROS])
def test_a_table_and_a_report_read_a_log_that_is_being_written(tail, tmp_path):
    folder = tmp_path / "sweep" / "0"
    for name in ("csv", ".hydra"):
        (folder / name).mkdir(parents=True)
    (folder / "csv" / "metrics.csv").write_bytes(HEADER + ROWS + tail)
    job = Job(0, [], folder, state="running")
    assert JobTable(folder.parent, [job], "val/loss")._progress(job) == ("2", "val/loss 0.2500")
    config = compose_config(["task.monitor=val/loss", f"output_dir={folder}"])
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    assert read_sweep(folder.parent).runs[0].curve == [(3, 0.25)]


@pytest.mark.parametrize("content", [b"", ZEROS, b"- lora.rank=2\n- lora.al", b"a: b: c"])
@pytest.mark.parametrize("file", ["result.json", ".hydra/config.yaml", ".hydra/overrides.yaml"])
def test_a_report_of_a_damaged_run_is_one_message(file, content, tmp_path, run_cli):
    folder = tmp_path / "0"
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(compose_config([f"output_dir={folder}"]), folder / ".hydra" / "config.yaml")
    (folder / file).write_bytes(content)
    status, _, err = run_cli("report", str(tmp_path))
    assert status == 2
    assert err.startswith("error: ")
    assert str(folder / file) in err


@pytest.fixture
def sweep(tiny_bert, rows_jsonl, fast, tmp_path, monkeypatch, run_cli):
    """Runs a sweep of two jobs; each ends at once, and has the content that it is given."""
    monkeypatch.chdir(tmp_path)
    ran: list[int] = []
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"]

    def run(self):
        for job in [job for job in self.jobs if job.state == "waiting"]:
            ran.append(job.number)
            config = OmegaConf.load(job.folder / ".hydra" / "config.yaml")
            content = {"status": "completed", "config_hash": config_hash(config)}
            (job.folder / "result.json").write_text(json.dumps(content))
            job.state = "completed"

    monkeypatch.setattr(JobQueue, "run", run)

    def again(*more: str):
        ran.clear()
        found = run_cli(
            *("train", *fast, *where, "-m", "lora.rank=2,4", "hydra.sweep.dir=sweep", *more)
        )
        return (*found, list(ran))

    return again


@pytest.mark.parametrize(
    "contents", [(None, b"", bytes(99)), (b"model:\n  name_or_path: x\n", None, b"")]
)
def test_a_sweep_writes_a_damaged_config_again(contents, sweep):
    """Of a job that is complete, of one that was stopped, and of one that has not begun."""
    assert sweep()[0] == 0
    folders = [Path("sweep/0"), Path("sweep/1")]
    files = [
        folder / ".hydra" / name
        for folder in folders
        for name in ("config.yaml", "overrides.yaml", "hydra.yaml")
    ]
    whole = [file.read_text() for file in files]
    for state, content in zip(("completed", "interrupted", "waiting"), contents, strict=True):
        result = result_of(folders[1])
        (folders[1] / "result.json").write_text(json.dumps({**result, "status": state}))
        if state == "waiting":
            (folders[1] / "result.json").unlink()
        for file in files:
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)
        status, _, err, ran = sweep()
        assert status == 0, err
        assert [file.read_text() for file in files] == whole
        assert ran == ([] if state == "completed" else [1])


def test_a_sweep_ends_well_beside_a_report_of_others(sweep):
    Path("sweep").mkdir()
    Path("sweep/report.md").write_text("mine")
    status, _, err, ran = sweep()
    assert (status, ran) == (0, [0, 1]), err
    assert "warning: the report cannot be written: " in err
    assert Path("sweep/report.md").read_text() == "mine"


def test_a_damaged_config_of_other_settings_is_told(sweep):
    assert sweep()[0] == 0
    config = Path("sweep/1/.hydra/config.yaml")
    config.write_bytes(b"")
    status, _, err, ran = sweep("optim.lr=0.125")
    assert (status, ran) == (2, [])
    assert "holds a job with other settings" in err
    result = Path("sweep/1/result.json")
    result.write_bytes(b"")
    (result.parent / "checkpoints").mkdir()
    (result.parent / "checkpoints" / "last.ckpt").write_bytes(b"x")
    status, _, err, ran = sweep()
    assert (status, ran) == (2, [])
    assert "Delete sweep/1 to train this job from the start." in err.replace(f"{Path.cwd()}/", "")
    assert config.read_bytes() == b""


class Says(Work):
    """A process of Python code of its own."""

    code = ""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", self.code]


def ended(job: Job, code: str) -> Job:
    work = Says([job])
    work.code = code
    work.start(None, threads=None, inherit=())
    work.process.wait(60)
    assert work.poll()
    return job


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("raise ValueError('the reason')", "ValueError: the reason"),
        ("sys.exit('the reason')", "the reason"),
        ("print('the reason'); os._exit(1)", "the reason"),
        (
            "print('the reason'); os.kill(os.getpid(), 9)",
            "killed (out of memory?) by SIGKILL. the reason",
        ),
    ],
)
def test_a_log_ends_with_the_last_words(end, said, tmp_path):
    """And what was printed before stands before them."""
    job = ended(Job(0, [], tmp_path), f"import os, sys; print('before'); {end}")
    assert job.state == "failed"
    assert job.error() == said
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith("before\n")
    (tmp_path / "log.txt").write_bytes(log.encode() + bytes(64) + b"\n")
    assert job.error() == said


def test_a_print_of_a_job_never_fails():
    """Whatever the locale, and the text."""
    code = "print('\\u4e2d \\ud800')"
    outside = {**os.environ, "LC_ALL": "en_US.ISO-8859-1", "PYTHONIOENCODING": "latin-1"}
    environment = environment_of_job(outside, None, threads=None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True
    )
    assert done.stdout.decode() == "\u4e2d \\ud800\n"


@pytest.mark.parametrize("status", ["paused", "interrupted", "completed", "failed"])
def test_what_an_earlier_process_came_to_is_not_the_end_of_this_one(status, tmp_path):
    earlier = {"status": status, "error": "an earlier reason"}
    (tmp_path / "result.json").write_text(json.dumps(earlier))
    job = ended(Job(0, [], tmp_path), "import sys; sys.exit('the reason')")
    assert (job.state, job.error()) == ("failed", "the reason")


def test_a_pack_tells_an_error_in_its_log_escaped(tmp_path, monkeypatch):
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(without_hydra(compose_config([])), tmp_path / ".hydra" / "config.yaml")

    def broken(*_, **__):
        raise ZeroDivisionError("a \x1b[31mbug\x07")

    monkeypatch.setattr("lora_lightning.sweeps.packed.pack.train", broken)
    assert train_pack([tmp_path]) == 1
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert last == "ZeroDivisionError: a \\x1b[31mbug\\x07"


@pytest.mark.parametrize("content", [b"", ZEROS])
def test_a_pack_that_cannot_begin_tells_it_in_each_log(content, tmp_path, capsys):
    folders = [tmp_path / str(number) for number in range(2)]
    for folder in folders:
        (folder / ".hydra").mkdir(parents=True)
        OmegaConf.save(without_hydra(compose_config([])), folder / ".hydra" / "config.yaml")
    (folders[1] / ".hydra" / "config.yaml").write_bytes(content)
    assert train_pack(folders) == 2
    for folder in folders:
        last = (folder / "log.txt").read_text().splitlines()[-1]
        assert last.startswith(f"error: {folders[1] / '.hydra' / 'config.yaml'} is not ")
