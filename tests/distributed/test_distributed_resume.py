"""Runs of several processes that are told to end, killed, or started again by others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.asserts import assert_tensors_close
from helpers.data import make_rows, write_jsonl
from helpers.runs import result_of, wait_for

pytestmark = pytest.mark.slow

ADAPTER = "adapter/adapter_model.safetensors"
LAST = "checkpoints/last.ckpt"
TRAIN = [sys.executable, "-m", "lora_lightning", "train"]
WAYS = {
    "ddp": ["trainer=ddp", "data.batch_size=4", "lora.dropout=0.1"],
    "fsdp2": ["trainer=fsdp2", "data.batch_size=4"],
    "tp": ["trainer=tp", "data.batch_size=8"],
    "deepspeed": ["trainer=deepspeed", "data.batch_size=4", "trainer.max_epochs=4"],
}


@pytest.fixture(scope="module")
def common(tiny_llama, tmp_path_factory) -> list[str]:
    """108 steps of a decoder, saved every other step."""
    folder = tmp_path_factory.mktemp("rows")
    data = folder / "train.jsonl"
    write_jsonl(data, make_rows(41))
    return [
        *("trainer.precision=32-true", "trainer.enable_progress_bar=false"),
        *("callbacks.progress_bar=null", "callbacks.rich_summary=null", "test_before=false"),
        *("trainer.max_epochs=18", "callbacks.last.every_n_steps=2"),
        *("callbacks.early_stopping=null", "lora.rank=4", "optim.lr=1e-3"),
        *(f"model.name_or_path={tiny_llama}", f"data.cache_dir={folder / 'cache'}"),
        *(f"data.{split}={data}" for split in ("train", "val", "test")),
    ]


def cache_of(common: list[str]) -> list[str]:
    """Return the folder of the cache, which a resumed run needs typed again."""
    return [item for item in common if item.startswith("data.cache_dir=")]


def pair(way: str) -> list[str]:
    trainer, *others = WAYS[way]
    return [trainer, "trainer.accelerator=cpu", "trainer.devices=2", *others]


def start(arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    try:
        said = process.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == status, said
    return said


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def assert_runs_equal(run: Path, truth: Path, *, error: float = 0.0) -> None:
    expected = load_file(truth / ADAPTER)
    assert_tensors_close(load_file(run / ADAPTER), expected, atol=error)
    assert max(t.abs().max() for name, t in expected.items() if "lora_B" in name) > 1e-3
    for name in ("steps", "epochs", "tokens"):
        results = [result_of(one)[name] for one in (run, truth)]
        assert results[0] == results[1]


@pytest.fixture(scope="module", params=list(WAYS))
def stopped(request, common, tmp_path_factory):
    """A run of two processes of which the second was told to end, and what was printed."""
    if request.param == "deepspeed":
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(request.param)
    process = start([*TRAIN, *common, *pair(request.param), "output_dir=run"], folder)
    wait_for((folder / "run" / LAST).is_file, process)
    (second,) = children(process.pid)
    os.kill(second, signal.SIGTERM)
    said = finish(process, 128 + signal.SIGTERM)
    assert result_of(folder / "run")["status"] == "interrupted"
    assert "To resume: lora-lightning train resume=" in said
    assert "Traceback" not in said
    return request.param, folder


@pytest.fixture(scope="module")
def whole(stopped, common) -> Path:
    """The same run without a stop."""
    way, folder = stopped
    finish(start([*TRAIN, *common, *pair(way), "output_dir=whole"], folder))
    return folder / "whole"


def test_a_run_that_was_told_to_end_goes_on_exactly(stopped, common, whole):
    _, folder = stopped
    shutil.copytree(folder / "run", folder / "same")
    finish(start([*TRAIN, "resume=same", *cache_of(common)], folder))
    assert_runs_equal(folder / "same", whole)


@pytest.mark.parametrize(
    ("way", "moment", "told"),
    [
        ("ddp", "test", 0),
        ("ddp", "test", 1),
        ("ddp", "validation", 1),
        ("fsdp2", "test", 1),
        ("tp", "test", 1),
    ],
)
def test_it_ends_amid_the_texts_that_it_generates(way, moment, told, common, tiny_llama, tmp_path):
    """Whichever process is told; to their end the texts would take many minutes."""
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2**20}))
    (base / "generation_config.json").write_text(json.dumps({"min_new_tokens": 200_000}))
    line = json.dumps({"document": "good bad", "summary": "fine"})
    rows.write_text(f"{line}\n" * 40)
    arguments = [
        *common,
        *("task=summarization", "task.generate_rows=40", "data.eval_batch_size=10"),
        *(
            "task.generation.max_new_tokens=200000",
            "data.max_length=200064",
            "trainer.max_epochs=1",
        ),
        *(f"model.name_or_path={base}", f"data.cache_dir={tmp_path / 'cache'}"),
        *(f"data.{split}={rows}" for split in ("train", "val", "test")),
        *(f"test_before={str(moment == 'test').lower()}", "callbacks.samples=null"),
        "+callbacks.watch._target_=helpers.step_watch.Generates",
        f"+callbacks.watch.folder={tmp_path}",
    ]
    command = [*TRAIN, *arguments, *pair(way), "output_dir=run"]
    process = start(command, tmp_path, PYTHONPATH=str(Path(__file__).parents[1]))
    files = [tmp_path / f"generates-{rank}" for rank in range(2)]
    wait_for(lambda: all(file.exists() for file in files), process)
    os.kill([process.pid, *children(process.pid)][told], signal.SIGTERM)
    said = finish(process, 128 + signal.SIGTERM)
    assert "interrupted. To resume" in said
    assert "Traceback" not in said
    assert "ended while waiting" not in said


def test_it_goes_on_by_another_strategy(stopped, common, whole):
    """As many rows at a time give the same run, whoever holds the base; dropout is drawn again."""
    way, folder = stopped
    if way == "ddp":
        pytest.skip("it has dropout")
    other = {
        "fsdp2": ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"],
        "tp": ["trainer=cpu"],
        "deepspeed": ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"],
    }[way]
    shutil.copytree(folder / "run", folder / "other")
    finish(start([*TRAIN, "resume=other", *other, *cache_of(common)], folder))
    assert_runs_equal(folder / "other", whole, error=1e-5)


def test_with_other_batches_it_is_refused_and_begun_from_what_it_has_learned(stopped, common):
    way, folder = stopped
    if way == "tp":
        pytest.skip("its two processes see the same rows, as one does")
    shutil.copytree(folder / "run", folder / "alone")
    said = finish(start([*TRAIN, "resume=alone", "trainer=cpu", *cache_of(common)], folder), 2)
    assert "written by 2 processes with different rows, and this run has 1" in said
    new = [*common, "trainer=cpu", "trainer.max_epochs=1", f"adapter=alone/{LAST}"]
    finish(start([*TRAIN, *new, "output_dir=begun"], folder))
    learned = torch.load(folder / "alone" / LAST, weights_only=True)["state_dict"]
    begun = load_file(folder / "begun" / ADAPTER)
    for name, tensor in begun.items():
        if "lora_A" in name:  # six steps at this rate cannot move it far
            key = name.replace("base_model.model.", "model.").removesuffix(".weight")
            assert (tensor - learned[key]).abs().max() <= 6.1e-3


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_takes_the_others_along(victim, common, tmp_path):
    process = start([*TRAIN, *common, *pair("ddp"), "output_dir=run"], tmp_path)
    wait_for((tmp_path / "run" / LAST).is_file, process)
    (second,) = children(process.pid)
    os.kill((process.pid, second)[victim], signal.SIGKILL)
    killed = time.monotonic()
    said = process.communicate(timeout=30)[0] if victim == 1 else ""
    process.wait(timeout=30)
    assert process.returncode == (1 if victim == 1 else -signal.SIGKILL)  # nobody's mistake
    if victim == 1:
        assert "error: another process of this run has died, or was killed. To resume:" in said
        assert "Traceback" not in said
    while Path(f"/proc/{second}").exists() and time.monotonic() < killed + 30:
        time.sleep(0.1)
    assert not Path(f"/proc/{second}").exists() or victim == 1
    assert torch.load(tmp_path / "run" / LAST, weights_only=True)["global_step"] >= 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(*arguments: str) -> list[str]:
    module = ["-m", "lora_lightning", "train", "trainer=torchrun", "trainer.accelerator=cpu"]
    return [sys.executable, "-m", "torch.distributed.run", *arguments, *module]


FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it torch 2.13 finds the addresses of processes that are gone."""


@pytest.mark.parametrize("named", [True, False])
def test_two_agents_of_torchrun_have_one_folder(named, common, tmp_path):
    """Two machines on loopback, a process each. With an id, one of them is killed on the way."""
    there = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    name = ["--rdzv-id=night", "--max-restarts=3"] if named else []
    epochs = "trainer.max_epochs=18" if named else "trainer.max_epochs=2"
    command = [
        *torchrun("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", there, *name),
        *("trainer.num_nodes=2", "trainer.devices=1", *WAYS["ddp"][1:], *common, epochs),
    ]
    environment = FRESH_STORE if named else {}
    agents = [start(command, tmp_path, **environment) for _ in range(2)]
    if named:
        run = tmp_path / "outputs" / "torchrun-night"
        wait_for((run / LAST).is_file, agents[0])
        os.kill(children(agents[1].pid)[0], signal.SIGKILL)
    for agent in agents:
        finish(agent)
    if not named:
        (run,) = (tmp_path / "outputs").glob("*/*")
    finish(start([*TRAIN, *common, *pair("ddp"), epochs, "output_dir=whole"], tmp_path))
    assert_runs_equal(run, tmp_path / "whole")


def test_what_torchrun_starts_again_goes_on(common, tmp_path):
    """One of two processes is killed; torchrun starts both again, in the folder that was named."""
    command = [
        *torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1"),
        *("trainer.devices=2", *WAYS["ddp"][1:], *common, "output_dir=run"),
    ]
    agent = start(command, tmp_path, **FRESH_STORE)
    wait_for((tmp_path / "run" / LAST).is_file, agent)
    os.kill(children(agent.pid)[1], signal.SIGKILL)
    finish(agent)
    finish(start([*TRAIN, *common, *pair("ddp"), "output_dir=whole"], tmp_path))
    assert_runs_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("way", ["fsdp2", "tp"])
def test_a_base_in_shares_under_torchrun(way, common, tmp_path):
    """The trainer of that name takes the processes that are there, and starts none."""
    epochs, settings = "trainer.max_epochs=2", pair(way)
    agent = [
        *(*torchrun("--standalone", "--nproc-per-node=2"), *settings, *common, epochs),
        "output_dir=run",
    ]
    agent.remove("trainer=torchrun")
    finish(start(agent, tmp_path))
    finish(start([*TRAIN, *settings, *common, epochs, "output_dir=whole"], tmp_path))
    assert_runs_equal(tmp_path / "run", tmp_path / "whole")


def test_a_slurm_job_at_its_time_limit_is_requeued_and_goes_on(common, tmp_path):
    """Two tasks with SLURM's environment, and a scontrol that notes what it is asked."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tools / "scontrol").chmod(0o755)

    def tasks(restarts: int) -> list[subprocess.Popen[str]]:
        job = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "night", "SLURM_NTASKS": "2"},
            **{"SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "localhost", "SLURM_STEP_ID": "0"},
            **{"SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_RESTART_COUNT": str(restarts)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        }
        settings = ["trainer=slurm", "trainer.accelerator=cpu", "trainer.devices=2"]
        command = [*TRAIN, *settings, "data.batch_size=4", "lora.dropout=0.1", *common]
        return [
            start(command, tmp_path, **job, SLURM_PROCID=str(task), SLURM_LOCALID=str(task))
            for task in range(2)
        ]

    first = tasks(0)
    run = tmp_path / "outputs" / "slurm-4711"
    wait_for((run / LAST).is_file, first[0])
    for task in first:
        task.send_signal(signal.SIGUSR1)
    for task in first:
        finish(task, 128 + signal.SIGUSR1)
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    for task in tasks(1):
        finish(task)
    finish(start([*TRAIN, *common, *pair("ddp"), "output_dir=whole"], tmp_path))
    assert_runs_equal(run, tmp_path / "whole")
