"""Output folder and restarts of processes that torchrun or srun starts.

Lightning starts the processes of one machine itself and passes them their folder. Processes that
an external launcher starts begin alone, each with the same command line.
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
"""Signal with which SLURM warns of its time limit, given --signal=SIGUSR1@90."""
PATIENCE = 10.0
"""Seconds that processes of one machine may be apart."""


def torchrun() -> bool:
    """Return whether this process is one of several that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def slurm() -> bool:
    """Return whether this process is a task of a SLURM job, by Lightning's own criterion."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and "SLURM_PROCID" in os.environ and not interactive


def from_outside() -> bool:
    """Return whether an external launcher, not Lightning, starts this run's processes."""
    return torchrun() or slurm()


def one_of_many() -> bool:
    """Return whether the same command also runs in other processes."""
    if "SLURM_STEP_ID" in os.environ:  # srun started this process
        return int(os.environ.get("SLURM_NTASKS", "1")) > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_nodes(count: int) -> None:
    """Check that other machines can join; without the check, this one waits half an hour for them.

    Args:
        count: `trainer.num_nodes`.

    Raises:
        UserError: If there are several nodes, and no setting says where they meet.
    """
    addresses = ("MASTER_ADDR", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE")
    if count > 1 and not from_outside() and not any(name in os.environ for name in addresses):
        raise UserError(
            f"trainer.num_nodes={count}: requires the address of the other machines. Start with "
            "torchrun (trainer=torchrun) or srun (trainer=slurm), or set MASTER_ADDR, MASTER_PORT "
            "and NODE_RANK on each machine."
        )


def rank() -> int:
    """Return this process's rank in its run, 0 if it is the only process."""
    return int(os.environ.get("SLURM_PROCID" if slurm() else "RANK", "0"))


def started_again() -> bool:
    """Return whether the launcher restarted these processes after a stop."""
    again = os.environ.get("SLURM_RESTART_COUNT" if slurm() else "TORCHELASTIC_RESTART_COUNT", "0")
    return int(again) > 0


def started_by_rank_zero() -> bool:
    """Return whether Lightning's rank 0 started this process."""
    return int(os.environ.get("LOCAL_RANK", "0")) > 0 and not from_outside()


def let_rank_zero_tell() -> None:
    """Give rank 0 time to hit the same error, report it and end, which ends this process too.

    The function returns if only this process has the error.
    """
    if not tells():
        time.sleep(PATIENCE)


def tells() -> bool:
    """Return whether this is the process whose messages a user sees first."""
    return not started_by_rank_zero() and not (from_outside() and rank() > 0)


LOST = re.compile(
    r"gloo/transport|Connection (closed|reset) by (remote )?peer|remote process exited|Broken pipe"
)


def has_lost_another(error: BaseException) -> bool:
    """Return whether a gloo or NCCL error reports that another process of the run ended."""
    return isinstance(error, RuntimeError) and bool(LOST.search(str(error)))


def leave() -> None:
    """Destroy the process group of a run that has ended, if there is one.

    Lightning does so only for NCCL. gloo may abort a process that exits without leaving its group.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end_with_starter() -> None:
    """End this process, which Lightning's rank 0 started, when rank 0 is gone."""
    starter = os.getppid()

    def watch() -> None:
        while os.getppid() == starter:
            time.sleep(1.0)
        os._exit(1)  # no exception reaches a process that hangs in a collective

    threading.Thread(target=watch, daemon=True).start()


def requeue_if_warned(signum: int) -> None:
    """Ask SLURM to requeue this job if `signum` is its time limit warning."""
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
        print(f"requeued: job {job} resumes when it is started again.", file=sys.stderr)


def _slurm_job() -> str:
    """Return the job ID, with the task ID for a job array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def common_folder(make: Callable[[], str]) -> str:
    """Return one output folder for all processes of this job, for users who set none.

    Its name contains the job ID or torchrun's --rdzv-id, which stay the same after a restart.
    If torchrun has no ID, rank 0 chooses a folder.

    Args:
        make: Function that returns a new folder.

    Raises:
        UserError: If the processes have no way to agree on a folder.
    """
    if slurm():
        return f"outputs/slurm-{_slurm_job()}"
    run_id = re.sub(r"[^\w.-]", "_", os.environ["TORCHELASTIC_RUN_ID"])
    if run_id != "none":
        return f"outputs/torchrun-{run_id}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise UserError(
            "output_dir: must be given, because these processes cannot agree on a folder. Type "
            "output_dir=DIR, or torchrun --rdzv-id=NAME."
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
