"""Adapter folders as data, without their base model: parsed, and written again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lightning.config.untrusted import refuse_links
from lora_lightning.lora import LoraConfig, UserError, read_adapter
from lora_lightning.lora.arithmetic import Update
from lora_lightning.lora.serialization.checksums import SIDECAR, check_files, write_checksums
from lora_lightning.lora.serialization.peft_config import CONFIG_NAME, from_peft_config
from lora_lightning.lora.serialization.save import WEIGHTS_NAME, write_files
from lora_lightning.lora.serialization.validation import check_values
from lora_lightning.utils.output_folders import MARK, replaced_folder

from .folder import refuse_quantised, refuse_run

PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass
class Stored:
    """A parsed adapter folder."""

    folder: Path
    raw: dict[str, Any]
    config: LoraConfig
    updates: dict[str, tuple[Update, tuple[str, str]]]
    """Update and the leaf names of its tensors, by module."""
    rest: dict[str, Tensor]
    """Tensors of fully trained modules and biases."""

    @classmethod
    def read(cls, folder: Path) -> Stored:
        """Read a folder.

        Raises:
            UserError: the folder holds no LoRA adapter, or its updates are not products of A and B
                (DoRA, experts).
        """
        raw, tensors = read_adapter(folder)
        refuse_quantised(folder)
        config = from_peft_config(raw)
        if config.use_dora:
            raise UserError(
                f"{folder} is a DoRA adapter, whose update is no sum: merge it into its base "
                "(lora-lightning merge), or train with lora.use_dora=false."
            )
        updates, rest = {}, dict(tensors)
        for name in tensors:
            for a, b in PAIRS:
                if name.endswith(f".{a}"):
                    module = name.removesuffix(f".{a}")
                    if f"{module}.{b}" not in rest:
                        raise UserError(f"{folder}: {WEIGHTS_NAME} holds no {module}.{b}.")
                    pair = rest.pop(name), rest.pop(f"{module}.{b}")
                    _check_pair(folder, module, pair)
                    key = key_of(config, module)
                    if config.target_parameters and len(pair[0]) != config.rank_of(key):
                        raise UserError(
                            f"{folder} adapts experts (target_parameters), and only its base tells "
                            f"which of the A and B in {module} belong to which: merge it into its "
                            "base (lora-lightning merge)."
                        )
                    updates[module] = Update(*pair, config.scaling_of(key)), (a, b)
        check_files(folder)  # last, because the checks above give better messages
        return cls(folder, raw, config, updates, rest)


def key_of(config: LoraConfig, module: str) -> str:
    """Return the name that patterns use for a module: its own name, or the name of its weight."""
    weight = f"{module}.weight"
    named = any(f".{weight}".endswith(f".{name}") for name in config.target_parameters)
    return weight if named else module


def _check_pair(folder: Path, module: str, pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{folder}: A and B of {module} are {tuple(a.shape)} and {tuple(b.shape)}, which do "
            "not fit together."
        )
    check_values({f"{module}.A": a, f"{module}.B": b}, source=str(folder))


def write_like(
    sources: Sequence[Path],
    output: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    *,
    by: str,
) -> None:
    """Write an adapter folder, with the other files of the first source: tokenizer, settings.

    Args:
        sources: folders that the adapter was made from.
        output: folder to write.
        tensors: tensors of the new adapter.
        config: content of its adapter_config.json.
        by: command that writes it.
    """
    first = sources[0]
    refuse_links(first)
    refuse_run(output)
    with replaced_folder(output, by=by, sources=sources) as staging:
        for path in first.iterdir():
            if path.is_file() and path.name not in (CONFIG_NAME, WEIGHTS_NAME, "README.md", MARK):
                shutil.copyfile(path, staging / path.name)
        write_files(staging, config, tensors)
        if (staging / SIDECAR).is_file():
            sidecar = json.loads((staging / SIDECAR).read_text(encoding="utf-8"))
            write_checksums(staging, sidecar)


def copy_adapter(folder: Path, output: Path) -> None:
    """Read and check the two PEFT files of a folder, and write only these.

    Raises:
        UserError: the folder holds no LoRA adapter, or a damaged one.
    """
    refuse_links(folder)
    raw, tensors = read_adapter(folder)
    refuse_quantised(folder)  # the files alone do not record the quantization
    from_peft_config(raw)
    check_files(folder)
    refuse_run(output)
    with replaced_folder(output, by="export", sources=[folder]) as staging:
        write_files(staging, raw, tensors)
