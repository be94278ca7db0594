"""Lightning strategy that shards gradients and optimizer states with DeepSpeed."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout

from lora_lightning.lora import UserError

from .strategies import DataParallelStrategy
from .strategy_internals import after_closure, process_group_backend

SUPPORTED = ("Adam", "AdamW", "SGD")
"""Optimizers that are tested on shards of the trainable parameters."""
BUCKET = 50_000_000
"""Gradient elements that are averaged over the ranks at a time."""


class ZeroStrategy(DataParallelStrategy):
    """Strategy whose ranks hold the whole model and a shard of its optimizer (ZeRO-2).

    Each rank keeps the averaged gradients and the optimizer state of its shard of the trainable
    parameters (Rajbhandari et al. 2020, arXiv:1910.02054). DeepSpeed receives only the trainable
    parameters and the loss. The frozen base, precision and checkpoints work as in `trainer=ddp`.

    Args:
        process_group_backend: Backend of torch.distributed. Defaults to None, the backend that
            suits the device.
        timeout: Timeout of a collective. Defaults to torch's default.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self._engine: Any = None
        self._trained: list[list[nn.Parameter]] = []
        """Trainable parameters of each optimizer group."""

    @staticmethod
    def check(optimizer: str, precision: str) -> None:
        """Check that DeepSpeed gives the same result as any other strategy.

        Args:
            optimizer: Class name of the optimizer.
            precision: Lightning's name of the precision.

        Raises:
            UserError: If DeepSpeed is not installed, or gives another result with these settings.
        """
        if optimizer not in SUPPORTED:
            raise UserError(
                f"optim.name={optimizer}: is not supported with trainer=deepspeed, which shards "
                f"the parameters. Use {' or '.join(SUPPORTED)}, or trainer=ddp."
            )
        if precision == "16-mixed":
            raise UserError(
                "trainer.precision=16-mixed: is not supported with trainer=deepspeed, which scales "
                "gradients too. Use bf16-mixed or bf16-true, or trainer=ddp."
            )
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                "trainer=deepspeed: requires DeepSpeed. Install it: "
                "pip install 'lora_lightning[deepspeed]', or use trainer=ddp."
            )

    def configure_ddp(self) -> None:
        """Do nothing, because DeepSpeed averages the gradients."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        (optimizer,) = self.optimizers
        self.check(type(optimizer).__name__, str(self.precision_plugin.precision))
        if trainer.gradient_clip_algorithm == "value":
            raise UserError(
                "trainer.gradient_clip_algorithm=value: is not supported with trainer=deepspeed. "
                "Use norm, or trainer=ddp."
            )
        self._trained = [list(group["params"]) for group in optimizer.param_groups]
        self._engine = self._build_engine(optimizer, trainer.gradient_clip_val or 0.0)
        self.optimizers = [self._engine.optimizer]

    def _build_engine(self, optimizer: torch.optim.Optimizer, clip: float) -> Any:
        os.environ.setdefault("DS_ACCELERATOR", self.root_device.type)
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        # Disable a CPU inference kernel, which DeepSpeed otherwise compiles first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            process_group_backend(self), auto_mpi_discovery=False, verbose=False
        )
        trained = [parameter for group in self._trained for parameter in group]
        size = sum(parameter.numel() for parameter in trained)
        engine, *_ = deepspeed.initialize(
            model=_Trained(trained),
            model_parameters=trained,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # required, but used only for logging
                "managed_gradient_accumulation": False,  # each call of step() makes a step
                "zero_optimization": {"stage": 2, "reduce_bucket_size": min(size, BUCKET)},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": clip,
            },
            dist_init_required=False,
        )
        return engine

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._engine.backward(self._engine(closure_loss))
        return closure_loss

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply the gradients of the next step by a factor, before they are clipped."""
        # DeepSpeed divides the gradients by its loss scale.
        self._engine.optimizer.loss_scale = 1 / factor

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        result = closure()
        after_closure(self, optimizer)
        self._engine.step()
        self._engine.optimizer.loss_scale = 1.0
        return result

    def teardown(self) -> None:
        super().teardown()
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None

    # Checkpoints hold torch's own optimizer state, whole, so any strategy can resume from them.

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the optimizer state without DeepSpeed; every rank must call this."""
        shared = self._engine.optimizer.optimizer
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for trained, group in zip(self._trained, shared.param_groups, strict=True):
            (shard,) = group["params"]
            indices = range(len(state), len(state) + len(trained))
            values = {
                name: _gather(value, shard, trained)
                for name, value in shared.state.get(shard, {}).items()
            }
            for place, index in enumerate(indices):
                state[index] = {name: each[place] for name, each in values.items()}
            groups.append({**group, "params": list(indices)})
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        shared = self._engine.optimizer.optimizer
        (saved,) = checkpoint["optimizer_states"]
        state: dict[int, dict[str, Any]] = {}
        for number, (saved_group, own_group) in enumerate(
            zip(saved["param_groups"], shared.param_groups, strict=True)
        ):
            (shard,) = own_group["params"]
            states = [saved["state"].get(index, {}) for index in saved_group["params"]]
            names = dict.fromkeys(name for values in states for name in values)
            state[number] = {
                name: _take([values[name] for values in states], shard) for name in names
            }
        groups = [
            {**group, "params": [number]} for number, group in enumerate(saved["param_groups"])
        ]
        shared.load_state_dict({"state": state, "param_groups": groups})


class _Trained(nn.Module):
    """DeepSpeed's view of a model, with only its trainable parameters and its loss."""

    def __init__(self, trained: list[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


# DeepSpeed flattens a group's parameters into one vector, pads its end and shards it evenly.


def _gather(value: Any, shard: Tensor, trained: list[nn.Parameter]) -> list[Any]:
    """Gather an optimizer value from the shards of all ranks, one value per parameter of a group.

    Args:
        value: This rank's shard of the value, or a value for the whole group (the step count).
        shard: This rank's shard of the parameters.
        trained: Parameters of the group.
    """
    if not isinstance(value, Tensor) or value.shape != shard.shape:
        # Copy, because each parameter's step would increment a shared count.
        return [copy.deepcopy(value) for _ in trained]
    shards = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, value)
    sizes = [parameter.numel() for parameter in trained]
    values = torch.cat(shards)[: sum(sizes)].split(sizes)
    return [value.view_as(like) for value, like in zip(values, trained, strict=True)]


def _take(values: list[Any], shard: Tensor) -> Any:
    """Return this rank's shard of a value, the inverse of `_gather`."""
    if not isinstance(values[0], Tensor) or values[0].dim() == 0:
        return values[0]
    size = shard.numel()
    part = torch.cat([value.flatten() for value in values])[dist.get_rank() * size :][:size]
    return nn.functional.pad(part, (0, size - part.numel()))
