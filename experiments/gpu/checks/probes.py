"""Callbacks that watch a run from inside: `lora-lightning train +callbacks.probe._target_=...`."""

from __future__ import annotations

import os
import re
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20
LIBRARIES = re.compile(r"/(lora_lightning|transformers|lightning|torchmetrics)/.*")
ON_CPU = re.compile(r"/(torch/utils/data|lora_lightning/data)/")
INNER = re.compile(r"/(lora_lightning|transformers|lightning|torchmetrics|torch/optim)/")
KILL = "GPU_CHECKS_KILL"
"""In the environment, STEP:SIGNAL:RANK: which process of a run sends itself which signal, after
which step. The rank may be left out."""


class Probe(L.Callback):
    """The base of the others. The last one made is at hand as `latest`."""

    latest: Probe | None = None

    def __init__(self) -> None:
        Probe.latest = self


class Steps(Probe):
    """When each optimizer step ended, and the memory then."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []
        self.allocated: list[float] = []
        self.reserved: list[float] = []
        self.resident: list[float] = []
        self.at_start = self.loading_peak = 0.0
        """MiB allocated when training starts, and the most of it until then."""

    def on_fit_start(self, *_: Any) -> None:
        if torch.cuda.is_available():
            self.loading_peak = torch.cuda.max_memory_allocated() / MIB

    def on_train_start(self, *_: Any) -> None:
        if torch.cuda.is_available():
            self.at_start = torch.cuda.memory_allocated() / MIB

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == len(self.ends):
            return  # amid an accumulation
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.allocated.append(torch.cuda.memory_allocated() / MIB)
            self.reserved.append(torch.cuda.memory_reserved() / MIB)
        self.resident.append(resident_mib())
        self.ends.append(time.monotonic())

    def seconds(self, first: int = 3) -> float:
        """Of a step, the median over those from `first` on."""
        pairs = zip(self.ends[first - 1 :], self.ends[first:], strict=False)
        taken = sorted(end - start for start, end in pairs)
        return taken[len(taken) // 2]


class Waits(Probe):
    """Where the host waits for the device, from one batch to another, all between them included.

    On CUDA torch tells, by torch.cuda.set_sync_debug_mode. On a CPU, where nothing waits, reading a
    value stands for it. What is read of a batch before it goes to the device is left out there, and
    what the optimizer reads of its own counts of steps, which stay in the CPU's memory.

    Args:
        first: the batch with which it begins.
        last: the batch with which it ends; there has to be another after it.
    """

    def __init__(self, first: int = 5, last: int = 9) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.places: Counter[str] = Counter()
        self._caught: Any = None

    @property
    def batches(self) -> int:
        return self.last - self.first + 1

    def ours(self) -> int:
        """Waits that our code or Lightning's has asked for."""
        return sum(n for place, n in self.places.items() if not place.startswith("transformers"))

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        on_cuda = torch.cuda.is_available()
        if index == self.first and on_cuda:
            self._caught = warnings.catch_warnings()
            self._caught.__enter__()
            warnings.simplefilter("always")
            warnings.showwarning = self._warned
            torch.cuda.set_sync_debug_mode("warn")
        elif index == self.first:
            self._caught = _Reads(self.places)
            self._caught.__enter__()
        elif index == self.last + 1:
            if on_cuda:
                torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)

    def _warned(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            self.places[place_of(traceback.extract_stack())] += 1


class _Reads(TorchDispatchMode):
    """Counts, by place, what would wait for a device."""

    READ = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function.__name__.partition(".")[0] in self.READ:
            stack = traceback.extract_stack()
            if not stays_on_cpu(stack):
                self.places[place_of(stack)] += 1
        return function(*args, **(kwargs or {}))


def stays_on_cpu(stack: traceback.StackSummary) -> bool:
    """Whether what is read is in the CPU's memory on every device.

    A batch is before it is handed over, and so are an optimizer's counts of steps: but not what a
    closure of the optimizer reads, which is the whole training step.
    """
    if any(f.name == "on_before_batch_transfer" or ON_CPU.search(f.filename) for f in stack):
        return True
    inner = next((f for f in reversed(stack) if INNER.search(f.filename)), None)
    return inner is not None and "/torch/optim/" in inner.filename


def place_of(stack: traceback.StackSummary) -> str:
    """The innermost line of a stack that is of a library which calls torch."""
    for frame in reversed(stack):
        found = LIBRARIES.search(frame.filename)
        if found and "/experiments/" not in frame.filename:
            return f"{found[0][1:]}:{frame.lineno}"
    return "elsewhere"


class Scale(Probe):
    """How many steps a loss scale has skipped (16-mixed), and the most memory until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped = 0
        self.peak_mib = 0.0
        """Of tensors on the GPU, when training ends; 0 without one."""
        self._last: float | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return
        scale = scaler.get_scale()
        self.skipped += self._last is not None and scale < self._last
        self._last = scale

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._last = None if scaler is None else scaler.get_scale()

    def on_train_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            self.peak_mib = torch.cuda.max_memory_allocated() / MIB


class Validations(Probe):
    """Seconds of each validation of a run, and how often text was generated in it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.calls: list[int] = []
        self.generated = 0
        """Calls of `generate` so far; whoever asks has it counted."""
        self._since = (0.0, 0)

    def on_validation_start(self, *_: Any) -> None:
        self._since = time.monotonic(), self.generated

    def on_validation_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.monotonic() - self._since[0])
        self.calls.append(self.generated - self._since[1])


class Kernels(Probe):
    """Profiles the steps between two batches.

    Args:
        first: the batch with which it begins.
        last: the batch with which it ends.
    """

    def __init__(self, first: int = 5, last: int = 14) -> None:
        super().__init__()
        self.first, self.last = first, last
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=kinds)
        self.events: list[tuple[str, bool, float, float]] = []
        """Name, whether on the GPU, start and end in µs."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == self.first:
            self._profile.start()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        if index != self.last:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        self.events = list(_read(self._profile.events()))


def _read(events: Any) -> Iterator[tuple[str, bool, float, float]]:
    """Name, whether on the GPU, start and end of a profile's events; annotations left out."""
    for event in events:
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer."):
            continue
        yield event.name, on_gpu, event.time_range.start, event.time_range.end


class Devices(Probe):
    """Notes in the run's folder, in `devices-RANK`, where this process holds its share."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        held = sorted({str(parameter.device) for parameter in module.parameters()})
        path = Path(trainer.default_root_dir) / f"devices-{trainer.global_rank}"
        path.write_text(" ".join(held))


class Kill(Probe):
    """Has one process of a run send itself the signal that the environment names.

    The time is noted in the run's folder, in `killed`.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step, name, rank = [*os.environ.get(KILL, "").split(":"), "", "0"][:3]
        if step and trainer.global_step == int(step) and trainer.global_rank == int(rank or 0):
            (Path(trainer.default_root_dir) / "killed").write_text(repr(time.time()))
            os.kill(os.getpid(), getattr(signal, name))


def resident_mib() -> float:
    """Memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024
