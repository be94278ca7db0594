"""A LightningModule whose state is its trainable tensors, without the frozen base."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
from torch import Tensor, nn

from lora_lightning.distributed.adapter_sharding import Placement
from lora_lightning.distributed.parallel_dims import ParallelDims
from lora_lightning.lora import Adapter, LoraConfig
from lora_lightning.lora.serialization.validation import check_tensors

from .build import AdaptedModel


class AdapterModule(L.LightningModule):
    """A model with an adapter, whose state dict and checkpoints hold only the trainable tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # the base is missing on purpose; load_state_dict checks
        self.adapter: Adapter | None = None
        """The adapter, or None before the model is built and in full fine-tuning."""
        self.shards: ParallelDims | None = None
        """Processes that the base is sharded over, or None."""
        self.placement: Placement | None = None
        """The part of the adapter that this rank holds when the base is sharded."""
        self.lora_from_data: LoraConfig | None = None
        """Adapter settings that result from data-dependent initialization."""
        self.total_parameters = self.trainable_parameters = 0
        """Sizes of the model, before a sharded strategy counts tied weights twice."""

    @property
    def is_built(self) -> bool:
        """Whether the model is built."""
        return self._modules.get("model") is not None

    @property
    def model(self) -> nn.Module:
        """The base model with its adapter, which `configure_model` builds.

        Raises:
            RuntimeError: If the model is not built yet.
        """
        if not self.is_built:
            raise RuntimeError(f"{type(self).__name__} has no model yet: call configure_model().")
        return self._modules["model"]  # type: ignore[return-value]

    def take_over(self, built: AdaptedModel) -> None:
        """Set a model that `build_adapted_model` has built."""
        self.placement, self.lora_from_data = built.placement, built.lora_from_data
        self.total_parameters = built.total_parameters
        self.trainable_parameters = built.trainable_parameters
        self.adopt(built.model, built.adapter)

    def adopt(self, model: nn.Module, adapter: Adapter | None) -> None:
        """Set the model and its adapter."""
        self.model = model  # type: ignore[misc]  # nn.Module registers it, past the property
        self.adapter = adapter

    def whole_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which a sharded adapter is whole on all ranks."""
        return nullcontext() if self.placement is None else self.placement.whole()

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Return the stored trainable tensors of the adapter or the whole model, by name."""
        if self.adapter is not None:
            return self.adapter.named_tensors()
        return self.model.state_dict(keep_vars=True)

    def state_dict(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the trainable tensors, unsharded, without the frozen base.

        All ranks must call this.
        """
        if not self.is_built:
            return super().state_dict(*args, **kwargs)
        keep_vars = kwargs.pop("keep_vars", False)
        with self.whole_adapter():
            trainable = {id(tensor) for tensor in self.trainable_tensors().values()}
            state = super().state_dict(*args, keep_vars=True, **kwargs)
        return {
            name: tensor if keep_vars else tensor.detach()
            for name, tensor in state.items()
            if id(tensor) in trainable
        }

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint's weights, which must be exactly the trainable tensors.

        Raises:
            UserError: If a tensor is missing, unexpected, of the wrong shape or not finite.
        """
        if not self.is_built:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        with self.whole_adapter():
            check_tensors(self.state_dict(), dict(state_dict), source="the checkpoint")
            return super().load_state_dict(state_dict, strict=False, assign=assign)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip gradients, by the norm over all ranks if the adapter's matrices are sharded."""
        placement = self.placement
        by_norm = gradient_clip_val and gradient_clip_algorithm != "value"
        if placement is None or not placement.cuts or not by_norm:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        trained = self.trainer.precision_plugin.main_params(optimizer)
        placement.clip_by_norm(trained, float(gradient_clip_val))
