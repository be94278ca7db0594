"""Fused layers and their parts: one linear layer with the outputs of several, side by side.

Examples are attention's c_attn and qkv_proj. The parts are contiguous rows of the weight (out, in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_lightning.errors import UserError

# Fused layers that store outputs head by head (or group by group). Query, key and value of one
# head precede those of the next. Keys are last names of layers. Values are model types, () for all.
INTERLEAVED: dict[str, tuple[str, ...]] = {
    "query_key_value": ("bloom", "falcon", "gpt_neox", "gpt_neox_japanese", "persimmon"),
    "qkv_proj": ("codegen", "minimax"),
    "c_attn": ("gpt_bigcode",),
    "in_proj_qkvz": ("qwen3_next",),
    "in_proj_ba": ("qwen3_next",),
    "q_proj": ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    # Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434).
    "q_b_proj": (),
    "kv_b_proj": (),
}


@dataclass(frozen=True)
class Part:
    """Rows of a fused weight that form one projection."""

    name: str
    size: int | None
    """Number of rows, or None for an equal share."""
    adapted: bool


def parse_parts(where: str, value: Any) -> tuple[Part, ...]:
    """Return the parts that a list of names, or a mapping of names to sizes, describes.

    A minus before a name leaves that part unadapted.

    Raises:
        UserError: the parts are invalid. The message names `where`.
    """
    sizes = dict(value) if isinstance(value, dict) else None
    names = list(value) if isinstance(value, (dict, list, tuple)) else []
    if len(names) < 2 or not all(isinstance(name, str) and name.strip("- ") for name in names):
        raise UserError(
            f"{where}={value!r}: must name two parts or more, [q, -k, v] of equal size or "
            f"{{q: 64, -k: 32, v: 32}}. A minus leaves a part unadapted."
        )
    for name in names if sizes is not None else ():
        size = sizes[name] if sizes is not None else None
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{where}: the size {size!r} of {name!r} must be a whole number.")
    parts = tuple(
        Part(name.removeprefix("-"), None if sizes is None else sizes[name], name[0] != "-")
        for name in names
    )
    if len({part.name for part in parts}) < len(parts):
        raise UserError(f"{where}: must name each part once, not {', '.join(names)}.")
    if not any(part.adapted for part in parts):
        raise UserError(f"{where}: must adapt a part. Remove a minus, or set lora.exclude.")
    return parts


def with_sizes(where: str, parts: Sequence[Part], rows: int) -> tuple[Part, ...]:
    """Return the parts with their sizes, for a layer with `rows` outputs.

    Raises:
        UserError: the parts do not make up the layer.
    """
    each, rest = divmod(rows, len(parts))
    if parts[0].size is None and rest:
        raise UserError(
            f"{where}: {rows} outputs are not {len(parts)} equal parts. Set their sizes: "
            f"{{{', '.join(f'{part.name}: SIZE' for part in parts)}}}."
        )
    full = tuple(Part(p.name, each if p.size is None else p.size, p.adapted) for p in parts)
    total = sum(part.size or 0 for part in full)
    if total != rows:
        sizes = " + ".join(f"{part.size} ({part.name})" for part in full)
        raise UserError(f"{where}: {sizes} is {total}, but the layer has {rows} outputs.")
    return full


def cut_parts(parts: Sequence[Part], start: int, stop: int) -> tuple[Part, ...]:
    """Return the sized parts cut to rows `start` to `stop`.

    Parts outside have no rows.
    """
    cut, row = [], 0
    for part in parts:
        end = row + (part.size or 0)
        size = max(0, min(end, stop) - max(row, start))
        cut.append(Part(part.name, size, part.adapted))
        row = end
    return tuple(cut)


def check_contiguous(where: str, name: str, model_config: Any) -> None:
    """Raise UserError for a fused layer whose parts are known not to be contiguous rows."""
    kind = getattr(model_config, "model_type", None)
    kinds = INTERLEAVED.get(name.rpartition(".")[2])
    if kinds is None or (kinds and kind not in kinds):
        return
    one_key = getattr(model_config, "multi_query", False)
    if one_key and not getattr(model_config, "new_decoder_architecture", False):
        return  # falcon and gpt_bigcode then store all queries first
    raise UserError(
        f"{where}: must be contiguous rows, but {name} of {kind} stores its rows head by head. "
        "Remove it from lora.parts to adapt the layer as a whole."
    )
