"""Warm start from the adapter or the checkpoint of another run."""

from __future__ import annotations

from typing import Any

from lora_lightning.adapters.folder import AdapterFolder
from lora_lightning.config.schema import ModelConfig
from lora_lightning.config.untrusted import arguments_from_file
from lora_lightning.lora import Adapter, LoraConfig, UserError
from lora_lightning.lora.serialization.base_copies import without_copies
from lora_lightning.lora.serialization.load import read_adapter
from lora_lightning.utils.logs import read_json

from .checkpointing import read_checkpoint


def load_values(adapter: Adapter, folder: str) -> None:
    """Load the values of a stored adapter of the same shape into an adapter.

    Raises:
        UserError: If the stored adapter is damaged, has another shape, or trained rows of other
            tokens.
    """
    raw, tensors = read_adapter(folder)
    AdapterFolder(folder).check_files()
    stored = raw.get("trainable_token_indices") or {}
    earlier = list(stored.values()) if isinstance(stored, dict) else [stored]
    current = [rows.indices for rows in adapter.rows]
    if earlier and current and not all(indices in current for indices in earlier):
        raise UserError(
            f"adapter={folder} has trained the embedding rows {earlier[0]}, and this run trains "
            f"{current[0]}. Give the same tokens."
        )
    source = f"adapter {folder}"
    adapter.load_tensors(without_copies(adapter, tensors, source), source=source)


def task_state_of(source: str) -> dict[str, Any]:
    """Return the task state of another run, such as its classes, or an empty dict if unknown.

    Args:
        source: An adapter's folder, or a checkpoint.
    """
    if source.endswith(".ckpt"):
        state = read_checkpoint(source).get("hyper_parameters", {}).get("task_state")
    else:
        sidecar = AdapterFolder(source).sidecar
        state = read_json(sidecar).get("task_state") if sidecar.is_file() else None
    return state if isinstance(state, dict) else {}


def values_of(checkpoint: str, model: ModelConfig, lora: LoraConfig | None) -> dict[str, Any]:
    """Return the trained tensors of a checkpoint whose values mean the same in this run.

    Args:
        checkpoint: Path of the checkpoint.
        model: Model settings of this run.
        lora: Adapter settings of this run.

    Raises:
        UserError: If the values mean something else in this run.
    """
    content = read_checkpoint(checkpoint)
    settings = arguments_from_file(content.get("hyper_parameters", {}), checkpoint)
    check_same_tokens(checkpoint, settings.get("model", {}), model)
    check_same_loftq(checkpoint, settings, model, lora)
    return dict(content["state_dict"])


def check_same_tokens(source: str, earlier: dict[str, Any], model: ModelConfig) -> None:
    """Raise UserError unless a run's model settings have the same new tokens in the same order."""
    tokens = earlier.get("new_tokens") or []
    if tokens != model.new_tokens:
        raise UserError(
            f"adapter={source} was trained with model.new_tokens={tokens}, and this run has "
            f"{model.new_tokens}. Give the same tokens in the same order."
        )


def check_same_loftq(
    source: str, earlier: dict[str, Any], model: ModelConfig, lora: LoraConfig | None
) -> None:
    """Raise UserError if one run compensates for quantization (LoftQ) and the other does not.

    Args:
        source: The adapter or checkpoint for the warm start.
        earlier: Known settings that the adapter or checkpoint was trained with.
        model: Model settings of this run.
        lora: Adapter settings of this run.
    """

    def corrected(init: Any, quantization: Any) -> Any:
        return quantization if init == "loftq" else None

    known = (
        (earlier.get("lora") or {}).get("init"),
        (earlier.get("model") or {}).get("quantization"),
    )
    before, now = corrected(*known), corrected(lora and lora.init, model.quantization)
    if before != now:
        runs = [
            f"with lora.init=loftq on a base in {kind}" if kind else "without LoftQ"
            for kind in (before, now)
        ]
        raise UserError(
            f"adapter={source} is from a run {runs[0]}, and this run is {runs[1]}: the correction "
            "of the quantization would be missing, or applied twice. Give the same lora.init and "
            "model.quantization."
        )
