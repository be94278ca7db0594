"""What processes do together while they load and step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_distributed_resume import TRAIN, common, finish, free_port, pair, start  # noqa: F401

FEW = ["trainer.max_epochs=1", "data.limit_train=16", "callbacks.last=null", "output_dir=run"]


def watched(name: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Settings and environment of a run with a callback of step_watch."""
    added = [
        f"+callbacks.watch._target_=helpers.step_watch.{name}",
        f"+callbacks.watch.folder={folder}",
    ]
    return added, {"PYTHONPATH": str(Path(__file__).parents[1])}


def slurm_job() -> dict[str, str]:
    """Environment of a job of two tasks on one node."""
    return {
        **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "night", "SLURM_NTASKS": "2"},
        **{"SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "localhost", "SLURM_STEP_ID": "0"},
        **{"SLURM_NODEID": "0", "SLURM_NNODES": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    }


def test_ddp_step_sets_no_barrier(common, tmp_path):  # noqa: F811
    """NCCL's barrier stops the host until the device is done."""
    added, environment = watched("NoBarrier", tmp_path)
    command = [*TRAIN, *common, *pair("ddp"), "trainer.accumulate_grad_batches=2", *FEW, *added]
    finish(start(command, tmp_path, **environment))
    for rank in range(2):
        counts = (tmp_path / f"collectives-{rank}").read_text().split()
        # Two batches to a step: of the loss and its targets, and of what a signal has said.
        assert counts == ["0", "2"] * (len(counts) // 2)


@pytest.mark.parametrize("way", ["fsdp2"])
def test_sharded_base_under_slurm_takes_the_devices_of_its_tasks(way, common, tmp_path):  # noqa: F811
    """srun sets SLURM_LOCALID, and transformers reads LOCAL_RANK."""
    added, environment = watched("BoundDevices", tmp_path)
    environment |= slurm_job()
    command = [*TRAIN, *common, *pair(way), *FEW, *added]
    tasks = [
        start(command, tmp_path, **environment, SLURM_PROCID=str(task), SLURM_LOCALID=str(task))
        for task in range(2)
    ]
    for task in tasks:
        finish(task)
    assert [(tmp_path / f"bound-{task}").read_text() for task in range(2)] == ["0", "1"]


@pytest.mark.slow
def test_processes_with_different_bases_are_refused(common, tiny_llama, tmp_path):  # noqa: F811
    """Two machines with a copy of the base each, of which one is another version."""
    for node in range(2):
        folder = tmp_path / f"node{node}" / "base"
        shutil.copytree(tiny_llama, folder)
        if node:
            weights = load_file(folder / "model.safetensors")
            weights["model.norm.weight"][0] += 1
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    environment = slurm_job()
    command = [*TRAIN, *common, *pair("ddp"), *FEW[:-1], "model.name_or_path=base"]
    command += [f"output_dir={tmp_path / 'run'}"]
    tasks = [
        start(
            command,
            tmp_path / f"node{task}",
            **environment,
            SLURM_PROCID=str(task),
            SLURM_LOCALID=str(task),
        )
        for task in range(2)
    ]
    said = "".join(finish(task, 2) for task in tasks)
    assert "base: the processes of this run have loaded different" in said
