"""Precision of a run, resolved from trainer.precision and model.dtype together."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from lora_lightning.lora import UserError

from .hardware_speed import bf16_is_fast, cpu_times, fp16_is_fast, is_on_cpu, is_on_gpu


@dataclass(frozen=True)
class Mode:
    """What a precision allows."""

    auto: str
    """Dtype of the frozen weights if model.dtype is auto. "auto" is the dtype of the files."""
    dtypes: tuple[str, ...]
    """Dtypes of the frozen weights that it takes."""
    full: bool = True
    """Whether it takes full fine-tuning."""
    needs_gpu: bool = False
    """Whether it needs a GPU."""


MODES = {
    "32-true": Mode("float32", ("float32", "bfloat16")),
    "tf32": Mode("float32", ("float32", "bfloat16"), needs_gpu=True),
    "bf16-true": Mode("bfloat16", ("bfloat16",), full=False),
    "bf16-mixed": Mode("auto", ("float32", "bfloat16")),
    "16-mixed": Mode("auto", ("float32", "bfloat16", "float16"), needs_gpu=True),
}
"""Precisions of `trainer.precision`, in addition to auto."""
OF_DTYPE = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-mixed"}
"""Precision that auto chooses for a typed model.dtype."""
ALIASES = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "None": "32-true"}
"""Lightning's short names of precisions."""


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
    """One of `MODES`."""
    dtype: str
    """Dtype of the frozen weights, `model.dtype`."""


def lightning_precision(name: str) -> str:
    """Return the precision for Lightning's Trainer, whose own bf16-true also casts the adapter."""
    return "32-true" if name in ("bf16-true", "tf32") else name


def resolve_precision(
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
    name = ALIASES.get(str(asked), str(asked))
    if name in ("16-true", "64-true", "64"):
        raise UserError(
            f"trainer.precision={asked}: would cast the adapter, which must stay fp32. Use "
            "trainer.precision=bf16-true, or bf16-mixed for autocast."
        )
    if name == "auto":
        name = OF_DTYPE.get(dtype, "") or _fastest(accelerator, full=full, sharded=sharded)
    elif name not in MODES:
        raise UserError(
            f"trainer.precision={asked}: precision not found. Known: auto, {', '.join(MODES)}."
        )
    mode = MODES[name]
    typed = f"model.dtype={dtype}" if str(asked) == "auto" else f"trainer.precision={asked}"
    if full and dtype in ("bfloat16", "float16"):
        raise UserError(
            f"model.dtype={dtype}: would round away most updates with lora=full. Use "
            "model.dtype=float32 with trainer.precision=bf16-mixed."
        )
    if full and not mode.full:
        raise UserError(
            f"trainer.precision={asked}: would round away most updates with lora=full. Use "
            "trainer.precision=bf16-mixed."
        )
    if dtype not in ("auto", *mode.dtypes):
        raise UserError(
            f"model.dtype={dtype}: is not supported with trainer.precision={asked}. Use "
            f"trainer.precision={OF_DTYPE[dtype]}."
        )
    if mode.needs_gpu and not is_on_gpu(accelerator):
        raise UserError(
            f"{typed}: requires a GPU, and this run uses none. Use trainer.precision=bf16-mixed or "
            "32-true."
        )
    if sharded:
        check_unscaled_loss(name)
    if dtype == "auto":
        chosen = str(asked) == "auto" and name == "16-mixed"
        dtype = "float32" if full else "float16" if chosen else mode.auto
    return Precision(name, dtype)


def check_unscaled_loss(precision: str) -> None:
    """Raise UserError for a precision that skips steps, which sharded training does not support.

    Args:
        precision: Lightning's name of the precision.
    """
    if precision == "16-mixed":
        raise UserError(
            "trainer.precision=16-mixed: skips steps whose gradients overflow, which is not "
            "supported with sharded training. Use bf16-true or 32-true, or trainer=ddp."
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
        UserError: If `resolve_precision` raises it.
    """
    asked = config.trainer.get("precision", "auto")
    accelerator = str(config.trainer.get("accelerator", "auto"))
    strategy = str(config.trainer.get("strategy", ""))
    dtype = config.model.dtype
    if not trains and dtype == "float16" and not is_on_gpu(accelerator):
        dtype = "float32"  # the adapter was trained on a GPU without bf16
    precision = resolve_precision(
        recorded if recorded is not None and asked == "auto" else asked,
        dtype,
        full=trains and config.lora.method == "full",
        accelerator=accelerator,
        sharded="ShardedStrategy" in strategy or "ZeroStrategy" in strategy,
    )
    resolved = config.copy()
    OmegaConf.update(resolved, "trainer.precision", precision.name, force_add=True)
    resolved.model.dtype = precision.dtype
    return resolved


def automatic_precision_message(config: DictConfig, resolved: DictConfig) -> str | None:
    """Return a message on an automatically chosen precision, or None if no message is needed."""
    asked = config.trainer.get("precision", "auto") != "auto" or config.model.dtype != "auto"
    if asked:
        return None
    accelerator = str(config.trainer.get("accelerator", "auto"))
    times = cpu_times() if is_on_cpu(accelerator) else None
    measured = ""
    if times is not None:
        measured = (
            f" A matmul took {times.bfloat16 * 1e3:.2g} ms in bf16 and {times.float32 * 1e3:.2g} "
            "ms in fp32 on this CPU."
        )
    if resolved.trainer.precision == "32-true":
        return (
            f"Precision: 32-true.{measured} For bf16: trainer.precision=bf16-true."
            if measured
            else None
        )
    return (
        f"Precision: {resolved.trainer.precision}, which is fast on this hardware. Trainable "
        f"parameters stay fp32.{measured} For single precision: trainer.precision=32-true."
    )
