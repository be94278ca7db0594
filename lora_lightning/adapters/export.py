"""Export for other engines: one rank and one alpha, and the reasons why an engine fails.

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
from lora_lightning.lora.serialization.peft_config import from_peft_config

from .folder import AdapterFolder
from .stored_adapter import StoredAdapter, write_like

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that --max-lora-rank accepts."""


def write_canonical(folder: str | Path, output: str | Path) -> tuple[int, float]:
    """Write the same adapter with one rank and one alpha for all modules.

    Lower ranks are padded with zeros, which is exact. Other scalings are folded into B. This is
    exact if their ratio is a power of two. Otherwise B is rounded once in fp32, and stored in fp32.

    Args:
        folder: Adapter folder.
        output: New folder.

    Returns:
        The rank, and the largest relative rounding error of an entry of B.

    Raises:
        UserError: The folder holds no adapter, or its update is not a product of A and B (DoRA).
    """
    adapter = StoredAdapter.read(folder)
    rank = max(update.lora_A.shape[0] for update, _ in adapter.updates.values())
    scalings = [update.scaling for update, _ in adapter.updates.values()]
    common = max(set(scalings), key=scalings.count)
    tensors, rounding = dict(adapter.rest), 0.0
    for module, (update, (name_a, name_b)) in adapter.updates.items():
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
    command = ["export", f"adapter={folder}", "format=canonical"]
    config = {
        **adapter.raw,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    write_like([adapter.folder], output, tensors, config, command=command)
    return rank, rounding


def engine_problems(folder: str | Path, engine: str) -> list[str]:
    """Return why an engine would refuse or misread an adapter; empty if it takes the adapter.

    Raises:
        UserError: The engine is unknown, or the folder holds no adapter.
    """
    if engine not in ENGINES:
        raise UserError(
            f"check={engine}: must be one of {', '.join(ENGINES)}.{did_you_mean(engine, ENGINES)}"
        )
    raw, tensors = read_adapter(folder)
    from_peft_config(raw)
    stored = AdapterFolder(folder)
    stored.check_files()
    kind = stored.compensated_quantization()
    loftq = [f"corrects a base in {kind} (lora.init=loftq): merge it"] if kind else []
    return [*loftq, *_common_problems(raw), *ENGINES[engine](raw, list(tensors))]


def _common_problems(raw: dict[str, Any]) -> list[str]:
    """Return the problems with both engines."""
    problems = []
    if raw.get("task_type") == "SEQ_2_SEQ_LM":
        problems.append("encoder-decoders with adapters are not supported: merge it")
    if raw.get("use_dora"):
        problems.append("DoRA magnitudes are refused or ignored: merge it")
    if any(not name.endswith(".weight") for name in raw.get("target_parameters") or []):
        problems.append("expert parameters are ignored or read differently: merge it")
    if raw.get("rank_pattern") or raw.get("alpha_pattern"):
        problems.append("ranks and alphas of single modules are ignored: format=canonical")
    if raw.get("modules_to_save"):
        names = ", ".join(raw["modules_to_save"])
        problems.append(f"fully trained modules ({names}) are not loaded: merge it")
    if raw.get("trainable_token_indices"):
        problems.append("rows of new tokens are refused or ignored: merge it")
    if raw.get("bias", "none") != "none":
        problems.append("trained biases are not loaded: lora.bias=none, or merge it")
    return problems


def _vllm(raw: dict[str, Any], names: list[str]) -> list[str]:
    if int(raw["r"]) > VLLM_RANKS[-1]:
        return [f"rank {raw['r']} is above the maximum of --max-lora-rank, {VLLM_RANKS[-1]}"]
    return []


def _lorax(raw: dict[str, Any], names: list[str]) -> list[str]:
    """Return the problems with LoRAX.

    LoRAX stacks the layers of a type. It leaves out a type if some layer has no adapter for it.
    """
    problems = []
    if any("lora_embedding" in name for name in names):
        problems.append("adapters on embeddings are not loaded")
    layers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if match := re.search(r"\.(\d+)\.(.+)\.lora_A\.weight$", name):
            layers[match[2]].add(int(match[1]))
    count = max((max(numbers) + 1 for numbers in layers.values()), default=0)
    if some := sorted(kind for kind, numbers in layers.items() if len(numbers) < count):
        problems.append(f"{', '.join(some)}: adapters on only some layers are all left out")
    return problems


ENGINES: dict[str, Callable[[dict[str, Any], list[str]], list[str]]] = {
    "vllm": _vllm,
    "lorax": _lorax,
}
"""Checks of an adapter's settings and tensor names, by engine."""
