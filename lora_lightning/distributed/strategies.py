"""Lightning strategies for one device, for data parallelism and for a sharded base."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lora_lightning.lora import UserError
from lora_lightning.lora.running_statistics import is_statistic

from .parallel_dims import ParallelDims
from .precision import check_unscaled_loss
from .strategy_internals import set_mesh_size

BY_ELEMENT = (
    *("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
)
"""Elementwise optimizers, which can update shards of a matrix."""


class _Resident(Strategy):
    """Strategy that leaves the module on its device when a Trainer loop ends.

    Lightning moves the module to host memory after every fit, validation and test. Each rank then
    copies the frozen base four times per run.
    """

    def teardown(self) -> None:
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


class OneDeviceStrategy(SingleDeviceStrategy, _Resident):
    """Strategy for one device."""


class DataParallelStrategy(DDPStrategy, _Resident):
    """Strategy whose ranks hold the whole model and see different rows (DDP).

    Frozen tensors are not broadcast, because every rank reads them from the same files. Buffers
    are constant here, and gradients are stored once.

    Args:
        kwargs: Arguments of Lightning's DDPStrategy.
    """

    def __init__(self, **kwargs: Any) -> None:
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        super().__init__(**{sync: False, "gradient_as_bucket_view": True, **kwargs})

    def model_to_device(self) -> None:
        super().model_to_device()
        assert self.model is not None
        ignore_frozen(self.model)


def ignore_frozen(model: nn.Module) -> None:
    """Keep DDP and Lightning's validation and test loops from broadcasting frozen tensors."""
    frozen = [name for name, tensor in model.named_parameters() if not tensor.requires_grad]
    frozen += [name for name, _ in model.named_buffers() if not is_statistic(name)]
    model._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]


def resident(chosen: Strategy | str) -> Strategy | str:
    """Replace a Lightning strategy with this package's counterpart, if there is one.

    Args:
        chosen: Strategy that Lightning accepts or has chosen.
    """
    if type(chosen) is SingleDeviceStrategy:
        return OneDeviceStrategy(chosen.root_device)
    if isinstance(chosen, str) and chosen in StrategyRegistry:
        entry = StrategyRegistry[chosen]
        if entry["strategy"] is DDPStrategy and entry["init_params"].get("start_method") == "popen":
            return DataParallelStrategy(**entry["init_params"])
    return chosen


class ShardedStrategy(ModelParallelStrategy):
    """Strategy whose ranks each hold a shard of the frozen base.

    See `sharded_loading` and `adapter_sharding`.

    Args:
        tensor_parallel_size: Number of ranks that shard the matrices of a layer. None means all
            ranks of a machine. Defaults to 1. The base's layers are sharded over the other ranks
            (FSDP2), which see different rows.
        process_group_backend: Backend of torch.distributed. Defaults to None, the backend that
            suits the device.
        timeout: Timeout of a collective. Defaults to torch's default.
    """

    def __init__(
        self,
        tensor_parallel_size: int | None = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.asked = tensor_parallel_size

    @property
    def tensor_size(self) -> int:
        """Number of ranks that shard the matrices of a layer."""
        return self.num_processes if self.asked is None else self.asked

    def setup_environment(self) -> None:
        total, tensor = self.num_nodes * self.num_processes, self.tensor_size
        if tensor < 1 or total % tensor:
            raise UserError(
                f"trainer.strategy.tensor_parallel_size={tensor}: must divide the {total} "
                "processes of this run."
            )
        set_mesh_size(self, total // tensor, tensor)
        super().setup_environment()

    @staticmethod
    def check(optimizer: str) -> None:
        """Raise UserError for an optimizer whose updates differ on shards of a matrix."""
        if optimizer not in BY_ELEMENT:
            raise UserError(
                f"optim.name={optimizer}: is not supported with tensor parallelism, because it "
                "needs whole matrices. Use AdamW or SGD, or trainer=fsdp2 or trainer=ddp."
            )

    def setup_optimizers(self, trainer: Trainer) -> None:
        check_unscaled_loss(str(self.precision_plugin.precision))
        super().setup_optimizers(trainer)
        if ParallelDims(self.device_mesh).tensor > 1:
            for optimizer in self.optimizers:
                self.check(type(optimizer).__name__)

    # A checkpoint holds unsharded trainable parameters, as with any other strategy.
    lightning_restore_optimizer: Any = True
    lightning_module_state_dict: Any = Strategy.lightning_module_state_dict
    load_model_state_dict: Any = Strategy.load_model_state_dict
    save_checkpoint: Any = Strategy.save_checkpoint
    load_checkpoint: Any = Strategy.load_checkpoint

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer state with whole matrices; every rank must call this."""
        state = Strategy.optimizer_state(self, optimizer)
        return self._placement.whole_state(optimizer, state)  # type: ignore[no-any-return]

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        pairs = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        states = [self._placement.shard_of_state(optimizer, state) for optimizer, state in pairs]
        Strategy.load_optimizer_state_dict(self, {**checkpoint, "optimizer_states": states})

    @property
    def _placement(self) -> Any:
        return self.lightning_module.placement  # type: ignore[union-attr]


def check_strategy(name: str) -> None:
    """Raise UserError for strategies under which a run trains something else than configured.

    Args:
        name: Name of the strategy or of its class.

    Raises:
        UserError: If the strategy is Lightning's DeepSpeed strategy or the first version of FSDP.
            The former takes control of precision and checkpoints. The latter gathers frozen weights
            into checkpoints and cannot clip by norm.
    """
    kind = name.lower()
    if kind.startswith("deepspeed"):
        raise UserError(
            f"trainer.strategy={name}: is not supported. trainer=deepspeed shards the optimizer "
            "(ZeRO-2), and trainer=fsdp2 shards the base."
        )
    if kind.startswith("fsdp"):
        raise UserError(
            f"trainer.strategy={name}: is not supported. Use trainer=fsdp2, which shards the base "
            "the same way."
        )


def check_full_fine_tuning(strategy: object, *, full: bool) -> None:
    """Raise UserError for full fine-tuning of a sharded base."""
    if full and isinstance(strategy, ShardedStrategy):
        raise UserError("lora=full: is not supported with a sharded base. Use trainer=ddp.")


def scale_gradients(strategy: Strategy, optimizer: Optimizer, factor: Tensor) -> None:
    """Multiply the gradients of the optimizer's next step by a scalar factor."""
    if hasattr(strategy, "scale_gradients"):
        strategy.scale_gradients(factor)
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def sum_over_ranks(strategy: Strategy, tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place.

    Unlike `Strategy.reduce`, this function sets no barrier first. A barrier of NCCL blocks the
    host.
    """
    if getattr(strategy, "world_size", 1) > 1:
        dist.all_reduce(tensor)
    return tensor


def data_ranks(trainer: Trainer) -> int:
    """Return the number of ranks that see different rows, fewer than all in tensor parallelism."""
    strategy = trainer.strategy
    if isinstance(strategy, ShardedStrategy):
        return ParallelDims(strategy.device_mesh).data
    return trainer.world_size


def in_step(strategy: Strategy) -> bool:
    """Return whether ranks that see different rows must run equally many forward passes."""
    return isinstance(strategy, ShardedStrategy) and ParallelDims(strategy.device_mesh).data > 1
