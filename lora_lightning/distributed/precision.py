"""Precision of a run, resolved from trainer.precision and model.dtype together."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from lora_lightning.lora import UserError

PRECISIONS = ("auto", "32-true", "tf32", "bf16-true", "bf16-mixed", "16-mixed")
OF_DTYPE = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-mixed"}
TO_LOAD = {"32-true": "float32", "tf32": "float32", "bf16-true": "bfloat16"}


@dataclass(frozen=True)
class Precision:
    """Precision that a run computes in.

    Trainable parameters are always fp32. The precisions are:

    * 32-true: everything in fp32.
    * tf32: like 32-true, but fp32 matmuls use TF32 on a GPU.
    * bf16-true: frozen weights and activations in bf16.
    * bf16-mixed, 16-mixed: frozen weights in `dtype`, matmuls in 16 bits by autocast.

    In the 16-bit precisions, the remaining fp32 matmuls use TF32 too.
    """

    name: str
    """One of `PRECISIONS`, except auto."""
    dtype: str
    """Dtype of the frozen weights, `model.dtype`."""


def for_lightning(name: str) -> str:
    """Return the precision for Lightning's Trainer, whose own bf16-true also casts the adapter."""
    return "32-true" if name in ("bf16-true", "tf32") else name


@contextmanager
def fast_products(precision: str, accelerator: str) -> Iterator[None]:
    """Let fp32 matmuls on a GPU use TF32 within the block, unless the precision is 32-true.

    The setting is global to the process. Threads of a packed sweep enter and leave the block at
    different times, so TF32 stays on until the last one leaves.

    Args:
        precision: A resolved precision, one of `PRECISIONS`.
        accelerator: `trainer.accelerator`.
    """
    if precision == "32-true" or not _on_gpu(accelerator):
        yield
        return
    _TF32.enter()
    try:
        yield
    finally:
        _TF32.leave()


class _Tf32:
    """Reference count of the blocks that need TF32, which is on while the count is positive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before = "highest"

    def enter(self) -> None:
        with self._lock:
            if self._blocks == 0:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("high")
            self._blocks += 1

    def leave(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                torch.set_float32_matmul_precision(self._before)


_TF32 = _Tf32()


def settle_precision(
    asked: str | int | None,
    dtype: str,
    *,
    full: bool,
    accelerator: str = "auto",
    sharded: bool = False,
) -> Precision:
    """Resolve the precision of a run; "auto" uses 16 bits if the hardware is fast at them.

    Args:
        asked: `trainer.precision`.
        dtype: `model.dtype`. "auto" uses the dtype that suits the precision.
        full: Whether the whole model is trained, which requires fp32 weights.
        accelerator: `trainer.accelerator`. Defaults to "auto".
        sharded: Whether the base or the optimizer state is sharded. Defaults to False.

    Raises:
        UserError: If the precision does not exist, or training in it silently goes wrong.
    """
    name = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "None": "32-true"}.get(
        str(asked), str(asked)
    )
    if name in ("16-true", "64-true", "64"):
        raise UserError(
            f"trainer.precision={asked} would cast the adapter too, which must stay fp32. Use "
            "bf16-true, or for autocast bf16-mixed."
        )
    if name not in PRECISIONS:
        raise UserError(
            f"trainer.precision={asked}: there is no such precision. "
            f"Known: {', '.join(PRECISIONS)}."
        )
    if full and dtype in ("bfloat16", "float16"):
        raise UserError(
            f"lora=full with model.dtype={dtype} would round away most updates: use "
            "model.dtype=float32 with trainer.precision=bf16-mixed."
        )
    half = "16-mixed" in (name, OF_DTYPE.get(dtype))
    if (half or name == "tf32") and not _on_gpu(accelerator):
        given = (
            f"model.dtype={dtype}" if half and name != "16-mixed" else f"trainer.precision={asked}"
        )
        raise UserError(
            f"{given} needs a GPU, and none is used here: take trainer.precision=bf16-mixed or "
            "32-true."
        )
    if half and sharded:
        refuse_scaled_loss("16-mixed")
    if name == "auto":
        name = OF_DTYPE.get(dtype, _fastest(accelerator, full=full, sharded=sharded))
        if name == "16-mixed" and dtype == "auto" and not full:
            dtype = "float16"
    if full and name == "bf16-true":
        raise UserError(
            "lora=full with trainer.precision=bf16-true would round away most updates: use "
            "trainer.precision=bf16-mixed."
        )
    if name == "bf16-true" and dtype not in ("auto", "bfloat16"):
        raise UserError(
            f"trainer.precision=bf16-true contradicts model.dtype={dtype}: leave out one of them."
        )
    if dtype == "float16" and name != "16-mixed":
        raise UserError(
            "model.dtype=float16 needs trainer.precision=16-mixed, whose loss scaling keeps small "
            "gradients alive; model.dtype=bfloat16 works with any."
        )
    if dtype == "auto":
        dtype = "float32" if full else TO_LOAD.get(name, "auto")
    return Precision(name, dtype)


def refuse_scaled_loss(precision: str) -> None:
    """Raise UserError for a precision that skips steps, which sharded training does not support.

    Args:
        precision: Lightning's name of the precision.
    """
    if precision == "16-mixed":
        raise UserError(
            "trainer.precision=16-mixed skips steps whose gradients overflow, which processes that "
            "hold shares cannot agree on: use bf16-true or 32-true, or trainer=ddp."
        )


def _fastest(accelerator: str, *, full: bool, sharded: bool) -> str:
    """Return the precision that is fastest on this hardware."""
    if bf16_is_fast(accelerator):
        return "bf16-mixed" if full else "bf16-true"
    return "16-mixed" if not sharded and fp16_is_fast(accelerator) else "32-true"


def with_precision(
    config: DictConfig, recorded: str | None = None, *, trains: bool = True
) -> DictConfig:
    """Return a copy of the config with `trainer.precision` and `model.dtype` resolved.

    Args:
        config: A composed config.
        recorded: Original precision of the run to resume. Defaults to None, a new run.
        trains: Whether the run trains, not only evaluates. Defaults to True.

    Raises:
        UserError: If `settle_precision` raises it.
    """
    asked = config.trainer.get("precision", "auto")
    accelerator = str(config.trainer.get("accelerator", "auto"))
    strategy = str(config.trainer.get("strategy", ""))
    dtype = config.model.dtype
    if not trains and dtype == "float16" and not _on_gpu(accelerator):
        dtype = "float32"  # the adapter was trained on a GPU without bf16
    precision = settle_precision(
        recorded if recorded is not None and asked == "auto" else asked,
        dtype,
        full=trains and config.lora.method == "full",
        accelerator=accelerator,
        sharded="ShardedStrategy" in strategy or "ZeroStrategy" in strategy,
    )
    settled = config.copy()
    OmegaConf.update(settled, "trainer.precision", precision.name, force_add=True)
    settled.model.dtype = precision.dtype
    return settled


def chosen_for_the_user(config: DictConfig, settled: DictConfig) -> str | None:
    """Return a message on an automatically chosen precision, or None if no message is needed."""
    asked = config.trainer.get("precision", "auto") != "auto" or config.model.dtype != "auto"
    if asked:
        return None
    accelerator = str(config.trainer.get("accelerator", "auto"))
    times = cpu_times() if is_on_cpu(accelerator) else None
    took = ""
    if times is not None:
        took = (
            f" A product took {times.bfloat16 * 1e3:.2g} ms in bf16 and {times.float32 * 1e3:.2g} "
            "ms in fp32 on this CPU."
        )
    if settled.trainer.precision == "32-true":
        return f"Precision: 32-true.{took} For bf16: trainer.precision=bf16-true." if took else None
    return (
        f"Precision: {settled.trainer.precision}, which this hardware is fast at; what is trained "
        f"stays fp32.{took} For single precision: trainer.precision=32-true."
    )


def bf16_is_fast(accelerator: str = "auto") -> bool:
    """Return whether bf16 matmuls run in hardware and, on a CPU, faster than in fp32."""
    if _on_gpu(accelerator):
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
    kept = _kept_times()
    if (found := _read_times(kept)) is not None:
        return found
    times = Times(_seconds(torch.float32), _seconds(torch.bfloat16))
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # replace a damaged file
            kept.unlink()
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".times-") as folder:
            written = Path(folder) / kept.name
            written.write_text(json.dumps(asdict(times)), encoding="utf-8")
            with suppress(FileExistsError):  # the first of several processes wins
                os.link(written, kept)
    return _read_times(kept) or times


def _kept_times() -> Path:
    """Return this machine's cache file, named by what decides speed: CPU, threads and torch."""
    import datasets

    processor = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line for line in lines if line.startswith("model name")), processor)
    machine = [platform.node(), processor, torch.__version__, torch.get_num_threads()]
    key = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]
    cache = Path(os.fspath(datasets.config.HF_DATASETS_CACHE)) / "lora_lightning"
    return cache / f"products-{key}.json"


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
    return _on_gpu(accelerator) and torch.cuda.get_device_capability() >= (7, 0)


def _on_gpu(accelerator: str) -> bool:
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
