"""Which dtypes this machine computes fast in."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lora_lightning.utils.cache_folder import cache_folder


def bf16_is_fast(accelerator: str = "auto") -> bool:
    """Return whether bf16 matmuls run in hardware and, on a CPU, faster than in fp32."""
    if is_on_gpu(accelerator):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    times = cpu_times() if is_on_cpu(accelerator) else None
    return times is not None and times.bfloat16 < times.float32


@dataclass(frozen=True)
class Times:
    """Seconds of a matmul on this CPU, by dtype."""

    float32: float
    bfloat16: float


def cpu_times() -> Times | None:
    """Return this CPU's times in fp32 and bf16, or None if it has no bf16 in hardware.

    The instruction set is not enough. On Xeons with avx512_bf16 but without AMX, fp32 is faster.
    The times are measured once per machine and cached, so that all processes use the same values.
    """
    # torch has no public functions for these checks.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if not any(getattr(torch.cpu, probe, lambda: False)() for probe in probes):
        return None
    path = _cache_file()
    if (times := _read_times(path)) is not None:
        return times
    times = Times(_seconds(torch.float32), _seconds(torch.bfloat16))
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # replace a damaged file
            path.unlink()
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".times-") as folder:
            written = Path(folder) / path.name
            written.write_text(json.dumps(asdict(times)), encoding="utf-8")
            with suppress(FileExistsError):  # the first of several processes wins
                os.link(written, path)
    return _read_times(path) or times


def _cache_file() -> Path:
    """Return this machine's cache file, named by what decides speed: CPU, threads and torch."""
    processor = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line for line in lines if line.startswith("model name")), processor)
    machine = [platform.node(), processor, torch.__version__, torch.get_num_threads()]
    key = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]
    return cache_folder() / f"products-{key}.json"


def _read_times(path: Path) -> Times | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Times(float(content["float32"]), float(content["bfloat16"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


@torch.inference_mode()
def _seconds(dtype: torch.dtype) -> float:
    """Return the shortest time of a few matmuls of a small layer's size, after one warm-up."""
    rows, weight = (torch.ones(size, 768, dtype=dtype, device="cpu") for size in (64, 768))
    least = float("inf")
    for turn in range(3):
        start = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        if turn:
            least = min(least, time.perf_counter() - start)
    return least


def is_on_cpu(accelerator: str) -> bool:
    """Return whether a run computes on the CPU."""
    if accelerator == "auto":
        return not torch.cuda.is_available() and not torch.backends.mps.is_available()
    return accelerator == "cpu"


def fp16_is_fast(accelerator: str = "auto") -> bool:
    """Return whether this machine's GPU has fp16 tensor cores (Volta, Turing)."""
    return is_on_gpu(accelerator) and torch.cuda.get_device_capability() >= (7, 0)


def is_on_gpu(accelerator: str) -> bool:
    """Return whether a run computes on an NVIDIA or AMD GPU."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
