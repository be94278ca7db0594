"""Adapter layouts of other tools, and the model layer that each of their matrices belongs to.

The layouts come from the sources of kohya's sd-scripts, LitGPT 0.5.13 and torchtune 0.6.1. A name
or an order of rows that could mean two things raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora import UserError
from lora_lightning.lora.arithmetic import Update
from lora_lightning.lora.module_index import ModuleIndex
from lora_lightning.lora.serialization.load import read_tensors

PICKLES = (".pt", ".pth", ".bin", ".lora")
PARTS = ("q", "k", "v")
LITGPT = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
TORCHTUNE = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
INTERLEAVED, HALVES = ("llama", "mistral"), ("qwen2",)
"""Model types by torchtune's order of a head's rows in q and k.
INTERLEAVED: rows of a pair are adjacent, where transformers keeps them half a head apart.
HALVES: the order of transformers."""


@dataclass(frozen=True)
class Source:
    """Tensors of an adapter as another tool stored them, and the model that they belong to."""

    path: Path
    tensors: dict[str, Tensor]
    model: nn.Module
    alpha: float | None = None
    """Alpha, used if the file does not hold it."""
    parts: Sequence[str] = PARTS
    """Parts among q, k and v that a fused matrix of LitGPT covers."""

    def layer(self, name: str) -> str:
        """Return the only layer of the model with this name or name ending."""
        layers = [
            layer for layer in ModuleIndex(self.model).adaptable if f".{layer}".endswith(f".{name}")
        ]
        if len(layers) != 1:
            raise UserError(
                f"{self.path}: has an adapter for {name}, but {type(self.model).__name__} has "
                f"{len(layers) or 'no'} such layers. Name the base model that it was trained on: "
                "model.name_or_path=NAME."
            )
        return layers[0]

    def scaling(self, rank: int, stored: Tensor | None = None) -> float:
        """Return alpha over rank; alpha comes from the file, else from the caller."""
        alpha = self.alpha if stored is None else float(stored)
        if alpha is None:
            raise UserError(
                f"{self.path}: holds no alpha, the scale of the adapter. Type that of its "
                "training: alpha=A (kohya's default is the rank)."
            )
        return alpha / rank

    def heads(self) -> tuple[int, int, int]:
        """Return the numbers of query heads and of key and value heads, and the head size."""
        config: Any = self.model.config
        heads = int(config.num_attention_heads)
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return heads, int(getattr(config, "num_key_value_heads", None) or heads), int(size)


def read_layout(
    path: Path, model: nn.Module, *, alpha: float | None = None, parts: Sequence[str] = PARTS
) -> dict[str, Update]:
    """Return the updates in a file of another tool, by the model's own layer names.

    Args:
        path: Safetensors file in the layout of kohya, LitGPT or torchtune.
        model: Base model.
        alpha: Alpha, used if the layout does not store it. Defaults to None.
        parts: See `Source`. Defaults to q, k and v.

    Raises:
        UserError: The file is a pickle, is damaged, has an unknown layout, or does not fit this
            model.
    """
    source = Source(path, _read(path), model, alpha, parts)
    for pattern, read in LAYOUTS.items():
        if any(re.search(pattern, name) for name in source.tensors):
            return read(source)
    some = ", ".join(sorted(source.tensors)[:3])
    raise UserError(
        f"{path}: unknown layout, with {some} ... Known layouts: kohya, LitGPT, torchtune, and "
        "PEFT as a folder with adapter_config.json."
    )


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix in PICKLES:
        raise UserError(
            f"{path}: is a pickle, which can run code and is never read. Convert it if you trust "
            'it: python -c "import torch; from safetensors.torch import save_file; '
            f"d = torch.load('{path}', weights_only=True); "
            "save_file(d.get('model', d), 'adapter.safetensors')\""
        )
    return read_tensors(path)


def _kohya(source: Source) -> dict[str, Update]:
    """Return the updates in kohya's layout.

    A layer's name is a prefix (lora_te_...) and then its path, with underscores for dots.
    """
    names: dict[str, list[str]] = {}
    for name in ModuleIndex(source.model).adaptable:
        names.setdefault(name.replace(".", "_"), []).append(name)
    updates, prefixes = {}, set()
    for key, (a, b) in _pairs(source, ".lora_down.weight", ".lora_up.weight", ".alpha").items():
        ends = [end for end in names if f"_{key}".endswith(f"_{end}")]
        longest = max(ends, key=len, default="")
        if len(names.get(longest, [])) != 1:
            raise UserError(
                f"{source.path}: {key} names {len(names.get(longest, [])) or 'no'} layers of "
                f"{type(source.model).__name__}. A name must be a prefix and the path of a layer, "
                f"such as {next(iter(names))}."
            )
        prefixes.add(key.removesuffix(longest))
        scaling = source.scaling(a.shape[0], source.tensors.get(f"{key}.alpha"))
        updates[names[longest][0]] = Update(a, b, scaling)
    if len(prefixes) > 1:
        raise UserError(
            f"{source.path}: holds adapters of several models ({', '.join(sorted(prefixes))}). "
            "Keep the tensors of one."
        )
    return updates


def _litgpt(source: Source) -> dict[str, Update]:
    """Return the updates in LitGPT's layout.

    The names are LitGPT's own. q, k and v share one matrix B, and their matrices A are stacked.
    """
    heads, groups, size = source.heads()
    rows = {"q": heads * size, "k": groups * size, "v": groups * size}
    updates = {}
    for key, (a, b) in _pairs(source, ".lora_A", ".lora_B").items():
        match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", key)
        rank = b.shape[1]
        scaling = source.scaling(rank)
        if match and match[2] == "attn.qkv":
            parts = _parts_of(source, a.shape[0] // rank, b.shape[0], rows)
            split = zip(parts, a.split(rank), b.split([rows[part] for part in parts]), strict=True)
            for part, part_a, part_b in split:
                name = source.layer(f"layers.{match[1]}.self_attn.{part}_proj")
                updates[name] = Update(part_a, part_b, scaling)
        elif match and match[2] in LITGPT:
            updates[source.layer(f"layers.{match[1]}.{LITGPT[match[2]]}")] = Update(a, b, scaling)
        elif key == "lm_head":
            vocabulary = int(source.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
            updates[source.layer(key)] = Update(a, b[:vocabulary], scaling)  # LitGPT pads the rows
        else:
            raise _unclear(source, key)
    return updates


def _parts_of(source: Source, count: int, height: int, rows: dict[str, int]) -> list[str]:
    """Return which of q, k and v are adapted, in that order."""
    parts = [part for part in PARTS if part in source.parts]
    if len(parts) != count or sum(rows[part] for part in parts) != height:
        raise UserError(
            f"{source.path}: attn.qkv has adapters for {count} of q, k and v, with {height} rows. "
            f"Name them, as in parts=q,v (q has {rows['q']} rows, k and v have {rows['k']} each)."
        )
    return parts


def _torchtune(source: Source) -> dict[str, Update]:
    """Return the updates in torchtune's layout.

    It has the names of Meta's Llama, and its order of rows in q and k.
    """
    kind = str(source.model.config.model_type)  # type: ignore[union-attr]
    if kind not in (*INTERLEAVED, *HALVES):
        raise UserError(
            f"{source.path}: torchtune files of {kind} are not supported, only of "
            f"{', '.join((*INTERLEAVED, *HALVES))}. torchtune also writes PEFT's files: "
            "source=FOLDER."
        )
    updates = {}
    for key, (a, b) in _pairs(source, ".lora_a.weight", ".lora_b.weight").items():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
        if match and match[2] in TORCHTUNE:
            name = f"layers.{match[1]}.{TORCHTUNE[match[2]]}"
            if kind in INTERLEAVED and name.endswith(("q_proj", "k_proj")):
                b = _pairs_apart(b, source.heads()[2])
        elif key == "output":
            name = "lm_head"
        else:
            raise _unclear(source, key)
        updates[source.layer(name)] = Update(a, b, source.scaling(a.shape[0]))
    return updates


def _pairs_apart(matrix: Tensor, head_size: int) -> Tensor:
    """Reorder rows x0 y0 x1 y1 ... of each head to x0 x1 ... y0 y1 ...

    transformers rotates them in the latter order.
    """
    by_head = matrix.view(-1, head_size // 2, 2, matrix.shape[1])
    return by_head.transpose(1, 2).reshape(matrix.shape)


def _pairs(source: Source, a: str, b: str, *others: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B by the name before their endings.

    The file may hold no other tensors.
    """
    pairs = {}
    for name, tensor in source.tensors.items():
        if not name.endswith((a, b, *others)):
            raise _unclear(source, name)
        if name.endswith(a):
            key = name.removesuffix(a)
            other = source.tensors.get(key + b)
            if other is None:
                raise UserError(f"{source.path}: holds {name}, but no {key + b}.")
            if tensor.dim() != 2 or other.dim() != 2:
                raise UserError(f"{source.path}: A and B of {key} must be matrices.")
            pairs[key] = tensor, other
    for name in source.tensors:
        ending = next(end for end in (a, b, *others) if name.endswith(end))
        if (key := name.removesuffix(ending)) not in pairs:
            raise UserError(f"{source.path}: holds {name}, but no {key + a}.")
    return pairs


def _unclear(source: Source, name: str) -> UserError:
    return UserError(
        f"{source.path}: {name} has no certain place in a {type(source.model).__name__}."
    )


LAYOUTS: dict[str, Callable[[Source], dict[str, Update]]] = {
    r"\.lora_down\.weight$": _kohya,
    r"^(transformer\.h\.\d+\..+|lm_head)\.lora_A$": _litgpt,
    r"\.lora_a\.weight$": _torchtune,
}
"""Readers of layouts, by a pattern of their tensor names."""
