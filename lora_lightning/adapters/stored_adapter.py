"""The content of an adapter folder, read and written without its base model."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lightning.config.untrusted import check_links
from lora_lightning.lora import LoraConfig, UserError, read_adapter
from lora_lightning.lora.arithmetic import Update
from lora_lightning.lora.serialization.checksums import write_checksums
from lora_lightning.lora.serialization.peft_config import from_peft_config
from lora_lightning.lora.serialization.save import write_files
from lora_lightning.lora.serialization.validation import check_values
from lora_lightning.utils.output_folders import replaced_folder
from lora_lightning.utils.run_folder import check_not_in_run
from lora_lightning.utils.terminal import command as command_line

from .folder import AdapterFolder
from .model_card import write_derived_card

PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass
class StoredAdapter:
    """The content of an adapter folder."""

    folder: AdapterFolder
    raw: dict[str, Any]
    """Content of adapter_config.json."""
    config: LoraConfig
    updates: dict[str, tuple[Update, tuple[str, str]]]
    """Update and the leaf names of its tensors, by module."""
    rest: dict[str, Tensor]
    """Tensors of fully trained modules and biases."""

    @classmethod
    def read(cls, path: str | Path) -> StoredAdapter:
        """Read a folder.

        Raises:
            UserError: The folder holds no LoRA adapter, or its updates are not products of A and B
                (DoRA, experts).
        """
        folder = AdapterFolder(path)
        raw, tensors = read_adapter(path)
        folder.check_quantization()
        config = from_peft_config(raw)
        if config.use_dora:
            raise UserError(
                f"adapter={path}: DoRA is not supported here, because its update is not a product "
                f"of A and B. Merge it: {command_line('merge', adapter=path, output='DIR')}."
            )
        updates, rest = {}, dict(tensors)
        for name in tensors:
            for a, b in PAIRS:
                if name.endswith(f".{a}"):
                    module = name.removesuffix(f".{a}")
                    if f"{module}.{b}" not in rest:
                        raise UserError(f"{folder.weights}: holds no {module}.{b}.")
                    pair = rest.pop(name), rest.pop(f"{module}.{b}")
                    _check_pair(folder.path, module, pair)
                    key = key_of(config, module)
                    if config.target_parameters and len(pair[0]) != config.rank_of(key):
                        raise UserError(
                            f"adapter={path}: adapted experts ({module}) are not supported here, "
                            "because only the base defines the order of their A and B. Merge it: "
                            f"{command_line('merge', adapter=path, output='DIR')}."
                        )
                    updates[module] = Update(*pair, config.scaling_of(key)), (a, b)
        folder.check_files()  # last, because the checks above give better messages
        return cls(folder, raw, config, updates, rest)

    def sidecar(self) -> dict[str, Any]:
        """Return the content of the folder's sidecar, empty if it has none."""
        return self.folder.read_sidecar() if self.folder.sidecar.is_file() else {}


def key_of(config: LoraConfig, module: str) -> str:
    """Return the name that patterns use for a module: its own name, or the name of its weight."""
    weight = f"{module}.weight"
    named = any(f".{weight}".endswith(f".{name}") for name in config.target_parameters)
    return weight if named else module


def _check_pair(folder: Path, module: str, pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{folder}: A {tuple(a.shape)} and B {tuple(b.shape)} of {module} do not fit together."
        )
    check_values({f"{module}.A": a, f"{module}.B": b}, source=str(folder))


def write_like(
    sources: Sequence[AdapterFolder],
    output: str | Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    *,
    command: Sequence[str],
) -> None:
    """Write an adapter folder, with the other files of the first source: tokenizer, settings.

    Args:
        sources: Folders that the adapter was made from.
        output: Folder to write.
        tensors: Tensors of the new adapter.
        config: Content of its adapter_config.json.
        command: Words of the command that writes it, from the verb on.
    """
    first = sources[0]
    check_links(first.path)
    check_not_in_run(Path(output))
    paths = [source.path for source in sources]
    with replaced_folder(Path(output), by=command[0], sources=paths) as staging:
        for path in first.other_files():
            shutil.copyfile(path, staging / path.name)
        write_files(staging, config, tensors)
        sidecar = AdapterFolder(staging).sidecar
        if sidecar.is_file():
            write_checksums(staging, json.loads(sidecar.read_text(encoding="utf-8")))
        write_derived_card(staging, shlex.join(["lora-lightning", *command]))


def copy_adapter(source: str | Path, output: str | Path) -> None:
    """Read and check the two PEFT files of a folder, and write only these.

    Raises:
        UserError: The folder holds no LoRA adapter, or a damaged one.
    """
    folder = AdapterFolder(source)
    check_links(folder.path)
    raw, tensors = read_adapter(source)
    folder.check_quantization()  # the files alone do not record the quantization
    from_peft_config(raw)
    folder.check_files()
    check_not_in_run(Path(output))
    with replaced_folder(Path(output), by="export", sources=[folder.path]) as staging:
        write_files(staging, raw, tensors)
