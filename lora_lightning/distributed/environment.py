"""Processes that torchrun or srun have started: which folder is theirs, and whether they go on.

Lightning starts the processes of one machine itself and tells them their folder. Those that come
from outside begin alone, each with the same command line.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from lora_lightning.errors import UserError

WARNING = getattr(signal, "SIGUSR1", None)
"""With which SLURM, asked by --signal=SIGUSR1@90, warns of its time limit."""
PATIENCE = 10.0
"""Seconds by which processes of one machine may be apart."""


def torchrun() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def slurm() -> bool:
    """Whether this process is a task of a SLURM job; Lightning sees it the same way."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and "SLURM_PROCID" in os.environ and not interactive


def from_outside() -> bool:
    """Whether this run's processes are started by others than Lightning."""
    return torchrun() or slurm()


def one_of_many() -> bool:
    """Whether the same command runs in other processes beside this one."""
    if "SLURM_STEP_ID" in os.environ:  # srun has started it
        return int(os.environ.get("SLURM_NTASKS", "1")) > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_nodes(count: int) -> None:
    """Makes sure that other machines can join, for which this one would wait half an hour.

    Args:
        count: trainer.num_nodes.

    Raises:
        UserError: there are to be several, and nothing says where they meet.
    """
    told = ("MASTER_ADDR", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE")
    if count > 1 and not from_outside() and not any(name in os.environ for name in told):
        raise UserError(
            f"trainer.num_nodes={count}: nothing has told this process where the other machines "
            "are. Start it by torchrun (trainer=torchrun) or srun (trainer=slurm), or set "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK on each machine. On this machine alone: "
            "trainer.num_nodes=1."
        )


def rank() -> int:
    """This process's number among those of its run; 0 where there is no other."""
    return int(os.environ.get("SLURM_PROCID" if slurm() else "RANK", "0"))


def started_again() -> bool:
    """Whether these processes take the place of others that were stopped."""
    again = os.environ.get("SLURM_RESTART_COUNT" if slurm() else "TORCHELASTIC_RESTART_COUNT", "0")
    return int(again) > 0


def started_by_rank_zero() -> bool:
    """Whether Lightning's rank 0 has started this process beside itself."""
    return int(os.environ.get("LOCAL_RANK", "0")) > 0 and not from_outside()


def let_rank_zero_tell() -> None:
    """Gives rank 0 the time to meet the same mistake, tell it and end, and this process with it.

    Comes back where the mistake is this process's alone.
    """
    if not tells():
        time.sleep(PATIENCE)


def tells() -> bool:
    """Whether this process is the one of its run whose messages a user sees first."""
    return not started_by_rank_zero() and not (from_outside() and rank() > 0)


LOST = re.compile(
    r"gloo/transport|Connection (closed|reset) by (remote )?peer|remote process exited|Broken pipe"
)


def has_lost_another(error: BaseException) -> bool:
    """Whether an error says that another process of the run has ended: what gloo and NCCL say."""
    return isinstance(error, RuntimeError) and bool(LOST.search(str(error)))


def leave() -> None:
    """Leaves the other processes of a run that has ended, if there are any.

    Lightning does so for NCCL alone; a process that ends amid those of gloo may be aborted by it.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end_with_starter() -> None:
    """Within a process that Lightning's rank 0 has started: ends it when that one is gone."""
    starter = os.getppid()

    def watch() -> None:
        while os.getppid() == starter:
            time.sleep(1.0)
        os._exit(1)  # it may hang in a collective, which no exception would reach

    threading.Thread(target=watch, daemon=True).start()


def requeue_if_warned(signum: int) -> None:
    """Where SLURM has warned of its time limit, asks it to start this job again."""
    if not slurm() or rank() > 0 or signum != WARNING:
        return
    job = _slurm_job()
    try:
        done = subprocess.run(["scontrol", "requeue", job], check=False)
        failed = f"status {done.returncode}" if done.returncode else ""
    except OSError as error:
        failed = str(error)
    if failed:
        print(f"scontrol requeue {job} failed: {failed}. Submit the job again.", file=sys.stderr)
    else:
        print(f"requeued: the job {job} goes on when it is started again.", file=sys.stderr)


def _slurm_job() -> str:
    """The job's number, of an array with the task's."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def common_folder(make: Callable[[], str]) -> str:
    """One folder for all processes of this job, where the user named none.

    It goes by the job's number, or torchrun's --rdzv-id, which stay when the job is started again.
    Where torchrun has no id, rank 0 makes up a folder.

    Args:
        make: makes up a folder.

    Raises:
        UserError: the processes have no way to agree.
    """
    if slurm():
        return f"outputs/slurm-{_slurm_job()}"
    run_id = re.sub(r"[^\w.-]", "_", os.environ["TORCHELASTIC_RUN_ID"])
    if run_id != "none":
        return f"outputs/torchrun-{run_id}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise UserError(
            "these processes have no folder in common: give torchrun --rdzv-id=NAME, or this "
            "command output_dir=DIR."
        )
    import torch.distributed as dist

    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(minutes=5),
    )
    key = "lora_lightning/output_dir"
    if rank() == 0 and not store.check([key]):
        store.set(key, os.path.abspath(make()))
    return str(store.get(key).decode())
