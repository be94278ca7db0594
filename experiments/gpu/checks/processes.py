"""Several jobs and processes: a packed sweep, DDP, torchrun, sharded strategies, a lost one."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .judge import Check, Failure, Figures, Skip, at_least, at_most, equals
from .lab import ADAPTER, BRIEF, Lab, at_once, gap, largest, losses_of, replaced, weights_gap
from .probes import KILL

GONE_WITHIN = 30.0
"""Seconds in which the others are to be gone after one process of a run was killed."""
PLAIN_STEPS = ("optim.name=SGD", "optim.lr=0.3", "trainer.gradient_clip_val=null")
"""Steps in which a gradient of another size shows, which Adam and clipping would make up for."""


def packed(lab: Lab) -> Figures:
    """Jobs of several ranks, half of which stop early, packed and each alone."""
    steps = lab.pick(120, 8)
    ranks, rates = lab.pick(([1, 4, 8, 32], [1e-3, 1e-6]), ([2, 8], [3e-3, 1e-6]))
    rows = lab.rows(lab.pick(400, 40))
    common = [
        *("task=summarization", f"model.name_or_path={lab.model('135m')}", "task.generate_rows=0"),
        *(f"data.train={rows}", f"data.val={rows}", f"data.limit_val={lab.pick(32, 8)}"),
        *("data.batch_size=8", f"trainer.max_steps={steps}", "trainer.max_epochs=100"),
        *(f"trainer.val_check_interval={steps // 4}", "trainer.check_val_every_n_epoch=null"),
        *("callbacks.early_stopping.patience=1", "+callbacks.early_stopping.min_delta=0.02"),
        *("callbacks.samples=null", "callbacks.progress_bar=null", "callbacks.rich_summary=null"),
        *("trainer.enable_progress_bar=false", "test_before=false", "data.test_fraction=0"),
        *("trainer.precision=32-true", "optim.scheduler=constant", lab.trainer),
    ]
    sweep = lab.folder / "sweep"
    said = lab.process(
        *("train", "-m", *common, "hydra/launcher=packed", f"hydra.sweep.dir={sweep}"),
        f"lora.rank={','.join(map(str, ranks))}",
        f"optim.lr={','.join(map(str, rates))}",
    )
    if said.status:
        raise Failure(f"the packed sweep: exit status {said.status}: {said.tail}")
    gaps, seconds, stopped, waited = [], 0.0, 0, 0.0
    for number, (rank, rate) in enumerate((rank, rate) for rank in ranks for rate in rates):
        job = sweep / str(number)
        arguments = ["train", *common, f"lora.rank={rank}", f"optim.lr={rate}"]
        arguments.append(f"output_dir={lab.folder / f'alone-{number}'}")
        alone = lab.ended(arguments, lab.command(*arguments))
        result = json.loads((job / "result.json").read_text())
        gaps.append(weights_gap(alone.folder / ADAPTER, job / ADAPTER))
        seconds += alone.result["seconds"]
        waited = max(waited, result["seconds"])
        stopped += result["steps"] < steps
        if result["steps"] != alone.result["steps"]:
            gaps.append(float("nan"))
    return {
        "jobs": len(ranks) * len(rates),
        "stopped_early": stopped,
        "weights_gap": largest(gaps),
        "speed_up": seconds / waited,
    }


def one_process(lab: Lab) -> Figures:
    """DDP and torchrun of one process against one device: losses, moves, contexts."""
    import torch

    common = [
        *("task=summarization", "model=tiny_lm", "task.generate_rows=0", "data.batch_size=8"),
        *(f"data.train={lab.rows(lab.pick(240, 40))}", f"trainer.max_steps={lab.pick(20, 3)}"),
        *("trainer.precision=32-true", "data.max_tokens=null", *PLAIN_STEPS, *BRIEF),
    ]
    device = lab.pick([], ["trainer.accelerator=cpu"])
    moves = {"cpu": 0}
    own = torch.nn.Module.cpu

    def cpu(module: Any) -> Any:
        moves["cpu"] += any(tensor.is_cuda for tensor in module.parameters())
        return own(module)

    others = contexts()
    with replaced(torch.nn.Module, "cpu", cpu):
        alone = lab.train(*common)
        ddp = lab.train(*common, "trainer=ddp", "trainer.devices=1", *device)
    mine = contexts()
    arguments = lab.settings(*common, "trainer=torchrun", "trainer.devices=1", *device)
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*starter, "--nproc-per-node=1", "-m", "lora_lightning", *arguments],
        env=lab.environment(),
        cwd=lab.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failure(f"torchrun: exit status {done.returncode}: {(done.stderr)[-500:]}")
    torchrun = losses_of(Path(arguments[-1].partition("=")[2]))
    figures: Figures = {
        "ddp_gap": gap(alone.losses, ddp.losses),
        "torchrun_gap": gap(alone.losses, torchrun),
        "moved_to_the_cpu": moves["cpu"],
        "left_out": {},
    }
    if others is None or not mine:
        figures["left_out"]["contexts"] = "nvidia-smi tells of no process"
    else:
        figures["contexts"] = len(mine) - len(others)
    return figures


def contexts() -> list[str] | None:
    """A line for each context on the machine's GPUs; None where nobody tells."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return None if done.returncode else [line for line in done.stdout.splitlines() if line]


def several_processes(lab: Lab) -> Figures:
    """FSDP2, tensor parallelism, DDP and SLURM's environment in two processes; one is killed."""
    if not lab.rehearsal:
        import torch

        if torch.cuda.device_count() < 2:
            raise Skip("needs two GPUs")
    common = [
        *("task=summarization", f"model.name_or_path={lab.model('1b')}", "task.generate_rows=0"),
        *(f"data.train={lab.rows(lab.pick(400, 64))}", f"trainer.max_steps={lab.pick(10, 3)}"),
        *("trainer.precision=32-true", "data.max_tokens=null", "callbacks.last=null"),
        *(*PLAIN_STEPS, *BRIEF),
    ]
    several = ["trainer.devices=2", *lab.pick([], ["trainer.accelerator=cpu"])]
    half, all_rows = "data.batch_size=4", "data.batch_size=8"
    figures: Figures = {"left_out": lab.needs_cuda(["fsdp2_memory"])}
    alone = lab.train_apart(*common, all_rows)
    gaps = []
    for way, batch in {"ddp": half, "fsdp2": half, "tp": all_rows}.items():
        arguments = lab.settings(f"trainer={way}", *several, *common, batch)
        run = lab.ended(arguments, lab.process(*arguments))
        gaps.append(gap(alone.losses, run.losses))
        if way == "fsdp2" and not lab.rehearsal:
            ratio = run.result["peak_memory_mib"] / alone.result["peak_memory_mib"]
            figures["fsdp2_memory"] = ratio
    figures["gap"] = largest(gaps)
    losses, figures["slurm_devices"] = in_slurm(lab, [*several, *common, half])
    figures["slurm_gap"] = gap(alone.losses, losses)
    lost = [f"trainer.max_steps={lab.pick(400, 40)}", "trainer.max_epochs=1000"]
    figures |= one_lost(lab, ["trainer=ddp", *several, *common, half, *lost])
    return figures


def in_slurm(lab: Lab, settings: list[str]) -> tuple[list[float], list[str]]:
    """FSDP2 of two tasks in SLURM's environment, which sets no LOCAL_RANK: losses, devices.

    Without LOCAL_RANK transformers, which spreads the base, has every task take the first GPU.
    """
    probe = "+callbacks.probe._target_=checks.probes.Devices"
    arguments = lab.settings("trainer=fsdp2", *settings, probe)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {
        **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "check", "SLURM_NTASKS": "2"},
        **{"SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "localhost", "SLURM_STEP_ID": "0"},
        **{"SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_RESTART_COUNT": "0"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    for said in at_once(
        lambda: lab.process(*arguments, **job, SLURM_PROCID="0", SLURM_LOCALID="0"),
        lambda: lab.process(*arguments, **job, SLURM_PROCID="1", SLURM_LOCALID="1"),
    ):
        if said.status:
            raise Failure(f"in SLURM's environment: exit status {said.status}: {said.tail}")
    folder = Path(arguments[-1].partition("=")[2])
    return losses_of(folder), [(folder / f"devices-{rank}").read_text() for rank in range(2)]


def one_lost(lab: Lab, settings: list[str]) -> Figures:
    """Kills the second process of a run; how long the first is there after that."""
    from soak import of_session

    arguments = lab.settings(*settings, "+callbacks.probe._target_=checks.probes.Kill")
    process = subprocess.Popen(
        lab.argv(*arguments),
        env=lab.environment(**{KILL: "2:SIGKILL:1"}),
        cwd=lab.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(timeout=150)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Failure("a run is still there 150 s after one of its processes was killed") from None
    ended = time.time()
    killed = Path(arguments[-1].partition("=")[2]) / "killed"
    if not killed.is_file():
        raise Failure("the second process was not killed")
    return {
        "gone_seconds": round(ended - float(killed.read_text()), 1),
        "status_of_the_first": process.returncode,
        "left": len(of_session(process.pid)),
    }


CHECKS = [
    Check(
        18,
        "a packed sweep",
        packed,
        {
            "stopped_early": at_least(1),
            "weights_gap": at_most(1e-3),
            "speed_up": at_least(2.0, rehearsal=None),
        },
        minutes=2,
        limit=420,
    ),
    Check(
        20,
        "DDP and torchrun of one process",
        one_process,
        {
            "ddp_gap": at_most(1e-4),
            "torchrun_gap": at_most(1e-4),
            "moved_to_the_cpu": equals(0),
            "contexts": at_most(1),
        },
        minutes=1.5,
    ),
    Check(
        25,
        "two processes and more",
        several_processes,
        {
            "gap": at_most(1e-3),
            "slurm_gap": at_most(1e-3),
            "slurm_devices": equals(["cuda:0", "cuda:1"], rehearsal=["cpu", "cpu"]),
            "fsdp2_memory": at_most(0.8),
            "gone_seconds": at_most(GONE_WITHIN),
            "left": equals(0),
        },
        minutes=2,
        limit=480,
    ),
]
