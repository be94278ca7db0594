"""Successive halving: who goes on, and that a paused run is the run that was never paused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file

from lora_lightning.config.compose import compose_hydra
from lora_lightning.lora import UserError
from lora_lightning.sweeps.halving import Halving
from lora_lightning.sweeps.job import Job
from lora_lightning.sweeps.queue import JobQueue
from lora_lightning.sweeps.report import read_sweep


def simulated(root: Path, values: list[list[float]], places: int, halving: Halving) -> list[Job]:
    """Runs a sweep whose metrics are known: values[job][rung]; `places` jobs at a time."""
    jobs = [Job(number, [], root / str(number)) for number in range(len(values))]
    for job in jobs:
        job.folder.mkdir()
    running: list[Job] = []
    queue: list[Job] = []
    while True:
        while len(running) < places:
            queue = queue or halving.choose(jobs, idle=not running)
            if not queue:
                break
            running.append(queue.pop(0))
            running[-1].state = "running"
        if not running:
            break
        job = running.pop(0)
        rungs = job.rungs()
        at = halving.pause_at(job)
        if at is None:
            job.state, content = "completed", {"rungs": rungs, "steps": 80}
        else:
            value = values[job.number][len(rungs)]
            step = round(80 * at)
            rung = {"step": step, "planned": 80, "monitor": "val/accuracy", "value": value}
            job.state, content = "paused", {"rungs": [*rungs, rung], "steps": step}
        (job.folder / "result.json").write_text(json.dumps({**content, "status": job.state}))
    halving.stop(jobs)
    return jobs


@pytest.mark.parametrize("sign", [1, -1])
def test_one_at_a_time_it_is_successive_halving(tmp_path, sign):
    """16 -> 8 -> 4 -> 2, by the values at each rung."""
    first = [(7 * number) % 16 for number in range(16)]
    values = [[sign * v, sign * -v, sign * v] for v in first]
    jobs = simulated(tmp_path, values, 1, Halving(2, 3, sign))
    reached = [len(job.rungs()) for job in jobs]
    by_first = [reached[first.index(value)] for value in range(16)]
    # rung 0: 8..15 go on; rung 1 turns the order round: 8..11; rung 2: 10 and 11 to the end
    assert by_first == [1] * 8 + [3] * 4 + [2] * 4
    ended = {first[job.number] for job in jobs if job.state == "completed"}
    assert ended == {10, 11}
    steps = [job.result()["steps"] for job in jobs]
    assert sum(steps) == 8 * 10 + 4 * 20 + 2 * 40 + 2 * 80  # 31 % of 16 x 80
    stopped = jobs[first.index(0)]
    assert stopped.state == "stopped"
    assert "at step 10 of 80" in stopped.result()["stopped"]
    assert "place 16 of 16; 8 continued" in stopped.result()["stopped"]


def test_stop_after_a_resume_counts_the_jobs_kept(tmp_path):
    rung = {"step": 1, "planned": 8, "monitor": "m", "value": 0.5}
    jobs = [Job(number, [], tmp_path / str(number)) for number in range(2)]
    for job, state, value in zip(jobs, ("kept", "paused"), (0.5, 0.4), strict=True):
        job.folder.mkdir()
        job.state = state
        (job.folder / "result.json").write_text(json.dumps({"rungs": [{**rung, "value": value}]}))
    Halving(2, 1, 1).stop(jobs)
    assert jobs[1].result()["stopped"].endswith("place 2 of 2; 1 continued")


def test_several_at_a_time_no_place_waits(tmp_path):
    """Asynchronous: all begin, few more than its share pass a rung, the best job ends."""
    values = [[float(number)] * 3 for number in range(16)]
    jobs = simulated(tmp_path, values, 4, Halving(2, 3, 1))
    reached = [sum(len(job.rungs()) > rung for job in jobs) for rung in range(3)]
    assert reached[0] == 16
    assert 8 <= reached[1] <= 10
    assert jobs[15].state == "completed"
    assert {job.state for job in jobs} == {"completed", "stopped"}


def test_fewer_jobs_than_eta_still_have_a_winner(tmp_path):
    values = [[1.0, 1.0], [3.0, 1.0], [float("nan"), 1.0]]
    jobs = simulated(tmp_path, values, 1, Halving(4, 2, 1))
    assert [job.state for job in jobs] == ["stopped", "completed", "stopped"]


def test_min_resource_is_where_the_first_rung_is(tmp_path):
    """Two rungs from an eighth on, not from a quarter: a quarter of the jobs go from 1/4 to 1."""
    halving = Halving.from_settings({"eta": 2, "rungs": 2, "min_resource": 0.125}, "max")
    assert halving is not None
    values = [[float(number), -float(number)] for number in range(16)]
    jobs = simulated(tmp_path, values, 1, halving)
    ended = [job.number for job in jobs if job.state == "completed"]
    assert ended == [8, 9, 10, 11]
    steps = [job.result()["steps"] for job in jobs]
    assert sum(steps) == 8 * 10 + 4 * 20 + 4 * 80  # 37.5 % of 16 x 80


@pytest.mark.parametrize(
    "settings",
    [
        *({"eta": 1}, {"rungs": 0}, {"eta": 2.5}, {"factor": 2}, 3, {"eta": "two"}, {"rung": 2}),
        *({"min_resource": 0}, {"rungs": 2, "min_resource": 0.5}, {"min_resource": "1/8"}),
    ],
)
def test_wrong_settings_are_told(settings):
    with pytest.raises(UserError, match=r"launcher\.halving"):
        Halving.from_settings(settings, "max")


def test_a_rung_below_one_step_is_told(run_cli, tmp_path, monkeypatch, tiny_bert, rows_jsonl, fast):
    monkeypatch.chdir(tmp_path)
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", *fast]
    status, _, err = run_cli(
        *("train", "-m", *where, "lora.rank=1,2", "hydra/launcher=packed"),
        "launcher.halving={eta: 2, rungs: 9}",
    )
    assert status == 2
    assert "is less than one step. Give fewer rungs" in " ".join(err.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("halving", "interval", "epochs"),
    [("{eta: 2, rungs: 2}", 1.0, 2), ("{eta: 2, rungs: 1}", 1.0, 1), ("{eta: 2}", 0.5, 2)],
    ids=["two rungs, one validation before the end", "none", "two for three"],
)
def test_rungs_without_a_validation_of_their_own_are_told(
    halving, interval, epochs, run_cli, tmp_path, monkeypatch, tiny_bert, rows_jsonl, fast
):
    """Else a job would pause at its end, when nothing is left to be saved."""
    monkeypatch.chdir(tmp_path)
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", *fast]
    where += [f"trainer.val_check_interval={interval}", f"trainer.max_epochs={epochs}"]
    status, _, err = run_cli(
        *("train", "-m", *where, "lora.rank=1,2", "hydra/launcher=packed"),
        *(f"launcher.halving={halving}", "callbacks.early_stopping=null"),
    )
    assert status == 2
    assert "optimizer steps need a validation each, before the last step" in " ".join(err.split())


def test_equals_go_by_their_loss(tmp_path):
    jobs = [Job(number, [], tmp_path / str(number), state="paused") for number in range(3)]
    for job, (value, loss) in zip(jobs, [(0.5, 0.9), (0.5, 0.7), (0.4, 0.1)], strict=True):
        job.folder.mkdir()
        rung = {"step": 1, "planned": 8, "monitor": "m", "value": value, "loss": loss}
        (job.folder / "result.json").write_text(json.dumps({"rungs": [rung]}))
    order = Halving(2, 1, 1).order(jobs, 0)
    assert [job.number for job in order] == [1, 0, 2]


@pytest.mark.parametrize(
    ("typed", "rule"),
    [
        (["launcher.halving={eta: 3}"], (3, 3, None)),
        (["hydra.launcher.halving={eta: 3}"], (3, 3, None)),
        (["sweep=halving"], (2, 2, 0.125)),
        (["sweep=halving", "launcher.halving.rungs=1"], (2, 1, 0.125)),
        (["sweep=halving", "launcher.halving={rungs: 1}"], (2, 1, 0.125)),
        (["sweep=halving", "hydra.launcher.halving={eta: 3}"], (3, 3, None)),
        (["sweep=halving", "launcher.halving=null"], None),
        ([], None),
    ],
)
@pytest.mark.parametrize("launcher", ["process", "packed"])
def test_launcher_gets_the_typed_rule_over_that_of_a_preset(launcher, typed, rule):
    config = compose_hydra([f"hydra/launcher={launcher}", *typed])
    halving = Halving.from_settings(instantiate(config.hydra.launcher).halving, "max")
    assert halving == (rule and Halving(rule[0], rule[1], 1, rule[2]))


def test_a_paused_job_of_others_goes_on_with_the_config_of_this_sweep(
    run_cli, tmp_path, monkeypatch, tiny_bert, rows_jsonl, fast
):
    """Its hash leaves out the loggers, which a config builds."""
    monkeypatch.chdir(tmp_path)
    rung = {"step": 5, "planned": 10, "monitor": "val/accuracy", "value": 0.5, "share": 0.5}
    paused = json.dumps({"status": "paused", "rungs": [rung], "steps": 5})

    def pause(queue: JobQueue) -> None:
        for job in queue.jobs:
            (job.folder / "result.json").write_text(paused)
            job.state = "paused"

    monkeypatch.setattr(JobQueue, "run", pause)
    sweep = ["train", "-m", f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", *fast]
    sweep += ["lora.rank=1,2", "launcher.halving={eta: 2, rungs: 1}", "hydra.sweep.dir=sweep"]
    assert run_cli(*sweep)[0] == 0
    for saved in Path("sweep").glob("*/.hydra/config.yaml"):
        config = OmegaConf.load(saved)
        config.logger.evil = {"_target_": "os.system", "command": "touch owned"}
        OmegaConf.save(config, saved)
        (saved.parent.parent / "result.json").write_text(paused)
    assert run_cli(*sweep)[0] == 0
    configs = [path.read_text() for path in Path("sweep").glob("*/.hydra/config.yaml")]
    assert [("lora_lightning" in text, "os.system" in text) for text in configs] == [(1, 0)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["process", "packed"])
def test_a_sweep(launcher, run_cli, tmp_path, monkeypatch, tiny_bert, rows_jsonl, fast):
    """The winner's weights are those of its run without any pause; what stopped is told."""
    monkeypatch.chdir(tmp_path)
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", *fast]
    where += ["trainer.max_epochs=4", "trainer.val_check_interval=0.5", "task.monitor=val/loss"]
    where += ["task.mode=min", "optim.lr=1e-2", "callbacks.early_stopping=null"]
    status, out, err = run_cli(
        *("train", "-m", *where, "lora.rank=1,4", f"hydra/launcher={launcher}"),
        *("launcher.halving={eta: 2, rungs: 1}", "hydra.sweep.dir=sweep"),
    )
    assert status == 0, err
    sweep = read_sweep(Path("sweep"))
    assert sorted(run.status for run in sweep.runs) == ["completed", "stopped"]
    winner, loser = sweep.best.runs[0], sweep.stopped[0]
    assert winner.result["rungs"][0]["value"] < loser.result["rungs"][0]["value"]
    assert [run.result["rungs"][0]["step"] for run in (winner, loser)] == [16, 16]
    assert (winner.result["steps"], loser.result["steps"]) == (32, 16)
    assert sweep.fraction_of_steps == 0.75
    assert "Successive halving took 75%" in " ".join(out.split())
    assert f"job {loser.job} stopped at step 16 of 32" in " ".join(out.split())
    rank = winner.adapter["rank"]
    assert run_cli("train", *where, f"lora.rank={rank}", "output_dir=alone")[0] == 0
    again = ["train", "-m", *where, "lora.rank=1,4", f"hydra/launcher={launcher}"]
    again += ["hydra.sweep.dir=sweep"]
    status, _, err = run_cli(*again, "launcher.halving={eta: 4, rungs: 1}")
    assert status == 2
    assert "paused at 0.5 of its steps, with another launcher.halving" in " ".join(err.split())
    status, _, err = run_cli(*again)  # without halving what was stopped goes on to its end
    assert status == 0, err
    assert [run.result["steps"] for run in read_sweep(Path("sweep")).runs] == [32, 32]
    name = "adapter/adapter_model.safetensors"
    ours, truth = load_file(winner.folder / name), load_file(Path("alone") / name)
    for key, tensor in truth.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-8)
