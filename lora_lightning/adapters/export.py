"""Export for other engines: one rank and one alpha, and a check of what an engine takes.

The rules come from the engines' sources: vLLM's `PEFTHelper` and `LoRAConfig`, LoRAX's `LoraConfig`
and `LoraWeights`. Both engines read r, lora_alpha and use_rslora. Both silently ignore the patterns
of single modules, which changes the outputs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_lightning.errors import did_you_mean
from lora_lightning.lora import UserError, read_adapter
from lora_lightning.lora.serialization.checksums import check_files
from lora_lightning.lora.serialization.peft_config import from_peft_config

from .files import Stored, write_like
from .folder import belongs_to_quantised

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that --max-lora-rank accepts."""


def write_canonical(folder: str | Path, output: str | Path) -> tuple[int, float]:
    """Write the same adapter with one rank and one alpha for all modules.

    Lower ranks are padded with zeros, which is exact. Other scalings are folded into B. This is
    exact if their ratio is a power of two. Otherwise B is rounded once in fp32, and stored in fp32.

    Args:
        folder: adapter folder.
        output: new folder.

    Returns:
        The rank, and the largest relative rounding error of an entry of B.

    Raises:
        UserError: the folder holds no adapter, or its update is not a product of A and B (DoRA).
    """
    stored = Stored.read(Path(folder))
    rank = max(update.lora_A.shape[0] for update, _ in stored.updates.values())
    scalings = [update.scaling for update, _ in stored.updates.values()]
    common = max(set(scalings), key=scalings.count)
    tensors, rounding = dict(stored.rest), 0.0
    for module, (update, (name_a, name_b)) in stored.updates.items():
        missing = rank - update.lora_A.shape[0]
        exact = update.lora_B.double() * (update.scaling / common)
        scaled = exact.to(update.lora_B.dtype)
        if not torch.equal(scaled.double(), exact):
            scaled = exact.float()
        off = (scaled.double() - exact).abs() / exact.abs().clamp_min(1e-300)
        rounding = max(rounding, float(off.max()))
        tensors[f"{module}.{name_a}"] = torch.nn.functional.pad(update.lora_A, (0, 0, 0, missing))
        tensors[f"{module}.{name_b}"] = torch.nn.functional.pad(scaled, (0, missing))
    alpha = common * rank
    config = {
        **stored.raw,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    write_like([stored.folder], Path(output), tensors, config, by="export")
    return rank, rounding


def engine_problems(folder: str | Path, engine: str) -> list[str]:
    """Return why an engine would refuse or misread an adapter; empty if it takes the adapter.

    Raises:
        UserError: the engine is unknown, or the folder holds no adapter.
    """
    if engine not in ENGINES:
        raise UserError(
            f"check knows {', '.join(ENGINES)}, not {engine!r}.{did_you_mean(engine, ENGINES)}"
        )
    raw, tensors = read_adapter(folder)
    from_peft_config(raw)
    check_files(folder)
    kind = belongs_to_quantised(Path(folder))
    own = [f"made for a base in {kind}, by lora.init=loftq: merge it"] if kind else []
    return [*own, *_of_both(raw), *ENGINES[engine](raw, list(tensors))]


def _of_both(raw: dict[str, Any]) -> list[str]:
    found = []
    if raw.get("task_type") == "SEQ_2_SEQ_LM":
        found.append("an encoder-decoder's, of which it serves no adapters: merge it into its base")
    if raw.get("use_dora"):
        found.append("DoRA: its magnitudes are refused or passed over; merge it into its base")
    if any(not name.endswith(".weight") for name in raw.get("target_parameters") or []):
        found.append("parameters of experts, which it does not load or reads otherwise; merge it")
    if raw.get("rank_pattern") or raw.get("alpha_pattern"):
        found.append("ranks or alphas of single modules, which it does not read: format=canonical")
    if raw.get("modules_to_save"):
        names = ", ".join(raw["modules_to_save"])
        found.append(f"modules trained whole ({names}), which it does not load: merge it")
    if raw.get("trainable_token_indices"):
        found.append("rows of new tokens, which it refuses or passes over: merge it")
    if raw.get("bias", "none") != "none":
        found.append("trained biases, which it does not load: lora.bias=none, or merge it")
    return found


def _vllm(raw: dict[str, Any], names: list[str]) -> list[str]:
    found = []
    if int(raw["r"]) > VLLM_RANKS[-1]:
        found.append(f"rank {raw['r']}, above --max-lora-rank's most, {VLLM_RANKS[-1]}")
    return found


def _lorax(raw: dict[str, Any], names: list[str]) -> list[str]:
    """Return the problems with LoRAX.

    LoRAX stacks the layers of a type. It leaves out a type if some layer has no adapter for it.
    """
    found = []
    if any("lora_embedding" in name for name in names):
        found.append("an adapter on an embedding, which it does not load")
    layers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        at = re.search(r"\.(\d+)\.(.+)\.lora_A\.weight$", name)
        if at:
            layers[at[2]].add(int(at[1]))
    count = max((max(numbers) + 1 for numbers in layers.values()), default=0)
    some = sorted(kind for kind, numbers in layers.items() if len(numbers) < count)
    if some:
        found.append(f"only some layers of {', '.join(some)}, all of which it then leaves out")
    return found


ENGINES: dict[str, Callable[[dict[str, Any], list[str]], list[str]]] = {
    "vllm": _vllm,
    "lorax": _lorax,
}
