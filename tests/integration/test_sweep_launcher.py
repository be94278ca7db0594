"""Sweeps as processes: isolated, each with its devices, and finished by the same command again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from helpers.runs import result_of
from lora_lightning.lora import UserError
from lora_lightning.sweeps.folder import note, sweep_folder
from lora_lightning.sweeps.launcher import (
    ProcessLauncher,
    _failure,
    curves_name,
    name_curves,
)
from lora_lightning.sweeps.queue import (
    Job,
    JobQueue,
    Work,
    environment_of_job,
)


def jobs_without_config(root: Path, count: int) -> list[Job]:
    """Jobs that end with exit status 2 as soon as they begin."""
    folders = [root / str(number) for number in range(count)]
    for folder in folders:
        folder.mkdir()
    return [Job(number, [], folder) for number, folder in enumerate(folders)]


def test_a_job_knows_nothing_of_ranks_outside():
    ranks = "LOCAL_RANK RANK WORLD_SIZE LOCAL_WORLD_SIZE NODE_RANK GROUP_RANK"
    others = "MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID SLURM_NTASKS SLURM_PROCID PL_GLOBAL_SEED"
    outside = dict.fromkeys(f"{ranks} {others}".split(), "1")
    kept = {"PATH": "p", "HF_HOME": "h", "SLURM_JOB_ID": "7"}
    found = environment_of_job({**outside, **kept}, ("2", "5"), threads=3)
    assert {name: found[name] for name in kept} == kept
    assert not set(outside) & set(found)
    assert (found["CUDA_VISIBLE_DEVICES"], found["OMP_NUM_THREADS"]) == ("2,5", "3")
    asked = environment_of_job({"OMP_NUM_THREADS": "8"}, None, threads=3)
    assert asked["OMP_NUM_THREADS"] == "8"
    assert "CUDA_VISIBLE_DEVICES" not in asked


@pytest.mark.parametrize(
    ("settings", "devices", "places"),
    [
        ({}, "auto", [("0",), ("1",), ("4",), ("7",), ("8",)]),
        ({}, 2, [("0", "1"), ("4", "7")]),
        ({"gpus_per_job": 4}, 2, [("0", "1", "4", "7")]),
        ({"jobs": 2}, 1, [("0",), ("1",)]),
    ],
)
def test_gpus_are_shared_out(settings, devices, places, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,7,8")
    config = OmegaConf.create({"trainer": {"accelerator": "auto", "devices": devices}})
    assert ProcessLauncher(**settings)._places(config) == places


@pytest.mark.parametrize(
    ("varied", "name"),
    [
        ({"seed": "1", "lora.alpha": "32", "lora.rank": "16"}, "r16 a32 s1"),
        ({"optim.lr": "1e-3", "lora.rank": "4"}, "r4 lr=1e-3"),
        ({"lora": "dora", "data.train": "../my/file.csv"}, "lora=dora train=.._my_file.csv"),
        ({"lora.targets": "[query,value]"}, "targets=_query_value_"),
        ({"optim.name": "x" * 300}, f"name={'x' * 115}"),
        ({}, ""),
    ],
)
def test_curves_are_named_by_what_varies(varied, name):
    assert curves_name(varied) == name


@pytest.mark.parametrize("begun", [False, True])
def test_a_job_that_has_begun_keeps_the_folder_of_its_curves(begun, tmp_path):
    target = "lora_lightning.callbacks.EventsLogger"
    config = OmegaConf.create({"logger": {"tensorboard": {"_target_": target}}})
    config.logger.tensorboard.name = "tensorboard"
    if begun:
        (tmp_path / "tensorboard").mkdir()
    name_curves(config, tmp_path, {"lora.rank": "4", "optim.lr": "1"})
    named = {"name": "r4 lr=1", "varied": ["lora.rank", "optim.lr"]}
    assert config.logger.tensorboard == {"_target_": target, "name": "tensorboard"} | (
        {} if begun else named
    )


def test_what_is_wrong_with_each_job_is_said_once(tmp_path):
    jobs = jobs_without_config(tmp_path, 32)
    for job in jobs:
        job.state, job.status = "failed", 2
        error = "UserError: launcher.halving: one" if job.number else "UserError: another"
        (job.folder / "result.json").write_text(json.dumps({"status": "failed", "error": error}))
    said = str(_failure(jobs))
    assert said.startswith("32 of 32 jobs failed.\n  job 0 (): another Log: ")
    assert said.count("launcher.halving: one") == 1
    assert "job 1 () and 30 more: launcher.halving: one Log: " in said


def test_too_few_gpus_are_told(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    config = OmegaConf.create({"trainer": {"accelerator": "gpu", "devices": 2}})
    with pytest.raises(UserError, match="needs 2 GPUs and 1"):
        ProcessLauncher()._places(config)


def test_on_a_cpu_as_many_as_asked_for():
    config = OmegaConf.create({"trainer": {"accelerator": "cpu", "devices": 2}})
    assert ProcessLauncher()._places(config) == [None]
    assert ProcessLauncher(jobs=3)._places(config) == [None] * 3


@pytest.mark.parametrize(
    "settings", [{"jobs": 0}, {"jobs": "two"}, {"gpus_per_job": -1}, {"retries": -1}]
)
def test_wrong_settings_are_told(settings):
    with pytest.raises(UserError, match=r"launcher\.(jobs|gpus_per_job|retries) must be"):
        ProcessLauncher(**settings)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["launcher.jobs=0"], "launcher.jobs must be a whole number, 1 or more, or auto, got 0."),
        (["launcher.halving=3"], "launcher.halving takes eta, rungs and min_resource"),
        (["launcher.halving.eta=2"], "'launcher.halving={eta: 2, rungs: 3}'"),
        (["launcher.max_slots=4"], "belongs to hydra/launcher=packed"),
        (["launcher.job=4"], "Did you mean 'launcher.jobs'?"),
        (["--cfg", "job"], "-m does not go together with --cfg"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_mistakes_in_a_sweep_are_told_and_leave_nothing(
    sweep, run_cli, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    status, _, err = run_cli(*sweep, *arguments)
    assert (status, list(tmp_path.glob("sweep/*"))) == (2, [])
    assert err.startswith("error: ")
    assert said in err
    assert "Error in call" not in err


def once(jobs: list[Job]):
    """Each job as work of its own, as long as it waits."""
    return lambda idle: [Work([job]) for job in jobs if job.state == "waiting"]


def test_a_failed_job_leaves_the_others_alone(tmp_path):
    jobs = jobs_without_config(tmp_path, 2)
    JobQueue(jobs, once(jobs), [None, None]).run()
    assert [(job.state, job.status) for job in jobs] == [("failed", 2)] * 2
    assert "no .hydra/config.yaml" in jobs[0].error()


class Waits(Work):
    """A process that writes no result before it is told to end."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", "import sys; sys.stdin.read()"]


def test_what_a_pack_had_come_to_before_is_not_taken_for_its_end(tmp_path):
    jobs = jobs_without_config(tmp_path, 2)
    for job in jobs:
        (job.folder / "result.json").write_text('{"status": "paused"}')
    work = Waits(jobs)
    work.start(None, threads=None, inherit=())
    try:
        assert not work.look()
        assert [job.state for job in jobs] == ["running", "running"]
        (tmp_path / "new").write_text('{"status": "paused"}')
        os.replace(tmp_path / "new", jobs[1].folder / "result.json")
        assert not work.look()
        assert [job.state for job in jobs] == ["running", "paused"]
    finally:
        work.process.kill()
        work.process.wait()
    assert work.look()


def test_another_halving_is_another_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("multirun") / "01" / "12-00"
    folder.mkdir(parents=True)
    mine = ["lora.rank=2,4", "hydra.launcher.halving={eta: 2, rungs: 3}"]
    note(folder, mine, "running")
    assert sweep_folder(mine) == [f"hydra.sweep.dir={folder}"]
    assert sweep_folder([mine[0], "hydra.launcher.halving={eta: 4, rungs: 1}"]) == []
    assert sweep_folder(mine[:1]) == []


def test_fail_fast_starts_no_more(tmp_path):
    jobs = jobs_without_config(tmp_path, 3)
    JobQueue(jobs, once(jobs), [None], fail_fast=True).run()
    assert [job.state for job in jobs] == ["failed", "waiting", "waiting"]


class FailsTwice(Work):
    """A process that is killed by itself, unless two were before it."""

    @property
    def command(self) -> list[str]:
        die = (
            "import os, pathlib, signal, sys\n"
            "tries = pathlib.Path(sys.argv[1]) / 'tries'\n"
            "count = len(tries.read_text()) if tries.exists() else 0\n"
            "tries.write_text('x' * (count + 1))\n"
            "if count < 2: os.kill(os.getpid(), signal.SIGKILL)\n"
            "(tries.parent / 'result.json').write_text('{\"status\": \"completed\"}')"
        )
        return [sys.executable, "-c", die, str(self.jobs[0].folder)]


@pytest.mark.parametrize(("retries", "state"), [(0, "failed"), (1, "failed"), (2, "completed")])
def test_a_killed_job_is_tried_again(retries, state, tmp_path):
    jobs = jobs_without_config(tmp_path, 1)

    def more(idle: bool) -> list[Work]:
        return [FailsTwice([job]) for job in jobs if job.state == "waiting"]

    JobQueue(jobs, more, [None], retries=retries, fail_fast=True).run()
    assert (jobs[0].state, jobs[0].retried) == (state, min(retries, 2))
    assert (jobs[0].folder / "tries").read_text() == "x" * (retries + 1)
    told = f"failed {retries + 1} times, at last: " if retries else ""
    if state == "failed":
        assert jobs[0].error().startswith(f"{told}killed (out of memory?) by SIGKILL.")


@pytest.mark.parametrize("error", ["RuntimeError: DataLoader worker", "UserError: no such file"])
def test_what_ends_with_the_status_of_a_mistake_may_be_chance(error, tmp_path):
    """A full disk and a killed worker are told by one message too."""

    class Fails(Work):
        @property
        def command(self) -> list[str]:
            write = "import sys, json, pathlib; pathlib.Path(sys.argv[1]).write_text("
            write += "json.dumps({'status': 'failed', 'error': sys.argv[2]})); sys.exit(2)"
            return [sys.executable, "-c", write, str(self.jobs[0].folder / "result.json"), error]

    jobs = jobs_without_config(tmp_path, 1)
    more = lambda idle: [Fails([job]) for job in jobs if job.state == "waiting"]  # noqa: E731
    JobQueue(jobs, more, [None], retries=1).run()
    assert jobs[0].retried == (0 if error.startswith("UserError") else 1)


def test_a_mistake_is_not_tried_again(tmp_path):
    jobs = jobs_without_config(tmp_path, 1)
    JobQueue(jobs, once(jobs), [None], retries=3).run()
    assert (jobs[0].state, jobs[0].status, jobs[0].retried) == ("failed", 2, 0)


def test_the_same_sweep_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = ["lora.rank=2,4", "seed=1"]
    for day, overrides, status in (
        ("01", mine, "running"),
        ("02", mine, "failed"),
        ("03", ["lora.rank=2"], "running"),
    ):
        folder = Path("multirun") / day / "12-00"
        folder.mkdir(parents=True)
        note(folder, [*overrides, "hydra.mode=MULTIRUN"], status)
    assert sweep_folder([*mine, "hydra.launcher.jobs=2"]) == ["hydra.sweep.dir=multirun/02/12-00"]
    assert sweep_folder([*mine, "hydra.sweep.dir=x"]) == []
    assert sweep_folder(["lora.rank=2,8"]) == []
    note(Path("multirun/02/12-00"), mine, "completed")
    assert sweep_folder(mine) == []


@pytest.fixture
def sweep(tiny_bert, rows_jsonl, fast):
    """Arguments of a sweep of two jobs."""
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"]
    return ["train", *fast, *where, "-m", "lora.rank=2,4", "hydra.sweep.dir=sweep"]


@pytest.mark.slow
def test_a_sweep_again_keeps_what_is_complete(sweep, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")  # of an outer launcher
    status, out, err = run_cli(*sweep)
    assert status == 0, err
    assert "job 1 completed" in out
    assert {"report.html", "report.md", "results.csv"} <= set(os.listdir("sweep"))
    for job, rank in enumerate((2, 4)):
        folder = Path("sweep") / str(job)
        assert result_of(folder)["status"] == "completed"
        assert json.loads((folder / "adapter/adapter_config.json").read_text())["r"] == rank
        for part in ("checkpoints/last.ckpt", f"r{rank}", ".hydra/config.yaml", "log.txt"):
            assert (folder / part).exists()
    files = [Path(f"sweep/{job}/result.json") for job in (0, 1)]
    before = [file.stat().st_mtime_ns for file in files]
    (files[1].parent / "log.txt").unlink()
    content = json.loads(files[1].read_text())
    files[1].write_text(json.dumps({**content, "status": "running"}))
    status, out, err = run_cli(*sweep, "launcher.fail_fast=true")
    assert status == 0, err
    assert "2 jobs, 1 complete already" in out
    assert files[0].stat().st_mtime_ns == before[0]
    assert result_of(files[1].parent)["status"] == "completed"
    assert not (files[1].parent / "tensorboard").exists()
    other = [item.replace("lora.rank=2,4", "lora.rank=2,8") for item in sweep]
    status, _, err = run_cli(*other)
    assert status == 2
    assert "holds a job with other settings" in err


def test_under_torchrun_a_sweep_is_refused(sweep, run_cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run_cli(*sweep)
    assert status == 2
    assert "without torchrun" in err


def alive(pattern: str) -> list[int]:
    """Processes whose command line holds a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if pattern in path.read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_sweep_is_finished_by_the_same_command(sweep, tmp_path, kill):
    """Nothing is lost or done twice, no process stays, and the weights are those of no kill."""
    more = ["trainer.max_epochs=12", "callbacks.last.every_n_steps=4", "launcher.jobs=2"]
    command = [sys.executable, "-m", "lora_lightning", *sweep[:-1], *more]
    whole = tmp_path / "whole"
    subprocess.run([*command, f"hydra.sweep.dir={whole}"], check=True, capture_output=True)
    killed = tmp_path / "killed"
    command.append(f"hydra.sweep.dir={killed}")
    first = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 120
    while not (killed / "0/checkpoints/last.ckpt").exists():
        assert time.monotonic() < until
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(kill)
    assert first.wait(60) == (-9 if kill == signal.SIGKILL else 143)
    if kill == signal.SIGTERM:
        assert result_of(killed / "0")["status"] == "interrupted"
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert not alive(f"resume={killed}")
    for job in ("0", "1"):
        assert result_of(killed / job)["status"] == "completed"
        ours, truth = (
            load_file(root / job / "adapter/adapter_model.safetensors") for root in (killed, whole)
        )
        assert ours.keys() == truth.keys()
        assert all(torch.equal(ours[name], truth[name]) for name in truth)
    assert sorted(path.name for path in killed.iterdir() if path.is_dir()) == ["0", "1"]


@pytest.mark.slow
def test_ddp_in_a_sweep(sweep, tmp_path):
    """Both ranks of a job train its config: the result is that of the same run without a sweep."""
    pair = ["trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=4"]
    command = [sys.executable, "-m", "lora_lightning", *sweep[:-1], *pair]
    subprocess.run(
        [*command, "hydra.sweep.dir=sweep"], cwd=tmp_path, check=True, capture_output=True
    )
    single = [item for item in sweep[:-1] if item not in ("-m", "lora.rank=2,4")]
    alone = [*command[:3], *single, *pair]
    subprocess.run(
        [*alone, "lora.rank=4", "output_dir=alone"], cwd=tmp_path, check=True, capture_output=True
    )
    folders = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("result.json"))
    assert folders == ["alone/result.json", "sweep/0/result.json", "sweep/1/result.json"]
    results = [result_of(tmp_path / name) for name in ("sweep/0", "sweep/1", "alone")]
    assert [result["world_size"] for result in results] == [2, 2, 2]
    assert results[1]["val/loss"] == pytest.approx(results[2]["val/loss"], rel=1e-6)
    assert results[0]["trainable_parameters"] < results[1]["trainable_parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["process", "packed"])
def test_a_sweep_whose_jobs_are_sampled(sweep, tmp_path, launcher):
    """All ranks train what was proposed to the first; the same command proposes the same again."""
    pair = ["trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=4"]
    more = pair if launcher == "process" else []
    fixed = [item for item in sweep if item != "-m" and not item.startswith(("lora.", "hydra."))]
    command = [sys.executable, "-m", "lora_lightning", *fixed, *more]
    sampled = [
        *("-m", "sweep=optuna", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep"),
        *("hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"),
    ]

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout

    run(*sampled)
    folders = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("result.json"))
    assert folders == [f"sweep/{job}/result.json" for job in range(4)]
    results = [result_of(tmp_path / "sweep" / str(job)) for job in range(4)]
    overrides = [
        [str(item) for item in OmegaConf.load(tmp_path / f"sweep/{job}/.hydra/overrides.yaml")]
        for job in range(4)
    ]
    rates = [next(i for i in items if i.startswith("optim.lr=")) for items in overrides]
    assert len(set(rates)) == 4
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    objectives = [result["objective"] for result in results]
    assert best.best_value == max(objectives)
    assert f"optim.lr={best.best_params['optim.lr']}" in rates

    chosen = [item for item in overrides[3] if item.startswith(("lora.rank=", "optim.lr="))]
    run(*chosen, "output_dir=alone")
    alone = result_of(tmp_path / "alone")
    assert alone["world_size"] == results[3]["world_size"] == (2 if more else 1)
    assert results[3]["val/loss"] == pytest.approx(alone["val/loss"], rel=1e-6)

    before = [(tmp_path / name).stat().st_mtime_ns for name in folders]
    assert run(*sampled).count("complete already") == 2
    assert [(tmp_path / name).stat().st_mtime_ns for name in folders] == before


def test_a_sweep_by_another_launcher_goes_on(run_cli, tmp_path, monkeypatch, sweep):
    """The same command again: what is complete stays, what was stopped goes on."""
    monkeypatch.chdir(tmp_path)
    command = [*sweep, "hydra/launcher=basic", "callbacks.last.every_n_steps=2"]
    status, _, err = run_cli(*command)
    assert status == 0, err
    first, second = Path("sweep/0/result.json"), Path("sweep/1/result.json")
    result, before = json.loads(second.read_text()), first.stat().st_mtime_ns
    second.write_text(json.dumps({**result, "status": "running"}))
    weights = Path("sweep/1/adapter/adapter_model.safetensors")
    trained = weights.read_bytes()
    weights.unlink()
    status, out, err = run_cli(*command)
    assert status == 0, err
    assert "resumes from step" in out
    assert first.stat().st_mtime_ns == before
    assert json.loads(second.read_text())["status"] == "completed"
    assert weights.read_bytes() == trained
    status, _, err = run_cli(*command, "optim.lr=1e-4")
    assert status == 2
    assert "holds a run of other settings" in err


@pytest.mark.slow
def test_a_sweep_by_submitit(run_cli, tmp_path, monkeypatch, tiny_bert, rows_jsonl, fast):
    """Hydra's launcher for SLURM, with its executor of this machine: a folder for each job."""
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", *fast]
    status, _, err = run_cli(
        *("train", "-m", *where, "lora.rank=1,4", "hydra/launcher=submitit_local"),
        "hydra.sweep.dir=sweep",
    )
    assert status == 0, err
    ranks = [
        json.loads((Path("sweep") / job / "adapter/adapter_config.json").read_text())["r"]
        for job in "01"
    ]
    assert ranks == [1, 4]
    status, out, err = run_cli("report", "sweep")
    assert status == 0, err
    assert "rank" in out
