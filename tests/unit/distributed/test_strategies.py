"""Lightning's strategies as runs use them."""

from __future__ import annotations

import inspect
import os
from itertools import pairwise
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lightning.config.compose import compose_config
from lora_lightning.distributed.deepspeed import ZeroStrategy
from lora_lightning.distributed.sharded_loading import check_accelerator, local_rank_in_environment
from lora_lightning.distributed.strategies import (
    DataParallelStrategy,
    OneDeviceStrategy,
    ShardedStrategy,
    resident,
    scale_gradients,
)
from lora_lightning.lora import UserError
from lora_lightning.training.module import LoraModule
from lora_lightning.training.results import measurements
from lora_lightning.training.run import train
from lora_lightning.training.trainer import FIRST_SCALE, build_trainer, half_precision


def strategy_of(*overrides: str):
    config = compose_config([*overrides, "logger=none", "callbacks=none"])
    config.trainer.precision = "32-true"
    return build_trainer(config).strategy


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_run_leaves_the_module_on_its_device(
    strategy, fast, tiny_bert, rows_jsonl, tmp_path, monkeypatch
):
    """Lightning's strategies call cpu() after each fit, validation and test: a copy of the base."""
    monkeypatch.setattr(LoraModule, "cpu", lambda self: pytest.fail("moved to the CPU"))
    result = train(
        compose_config(
            [
                *(*fast, "debug=limit", "test_before=true", f"trainer.strategy={strategy}"),
                *(f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"),
                *(f"output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"),
            ]
        )
    )
    assert result["status"] == "completed"
    assert result["device"] == "cpu"


def test_memory_is_that_of_the_device_that_trained(monkeypatch):
    """Also where a strategy, such as DeepSpeed's, has moved the module away at the end."""
    gpu, used = torch.device("cuda", 3), {torch.device("cuda", 3): 7 * 2**20}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", used.__getitem__)
    module = SimpleNamespace(device="cpu", trained_parameters=1, total_parameters=2)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=gpu), current_epoch=1, global_step=2, world_size=4
    )
    clock = SimpleNamespace(seconds=1.0, tokens=1)
    found = measurements(compose_config([]), module, trainer, clock, {})
    assert (found["device"], found["peak_memory_mib"]) == ("cuda:3", 7.0)


def test_auto_and_ddp_become_strategies_that_stay_on_the_device():
    cpu = "trainer.accelerator=cpu"
    assert type(strategy_of(cpu, "trainer.devices=1")) is OneDeviceStrategy
    assert type(strategy_of(cpu, "trainer.devices=2")) is DataParallelStrategy
    ddp = strategy_of("trainer=ddp", cpu, "trainer.devices=2")
    assert type(ddp) is DataParallelStrategy
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    assert ddp._ddp_kwargs == {sync: False, "gradient_as_bucket_view": True}
    asked = resident("ddp_find_unused_parameters_true")
    assert asked._ddp_kwargs == ddp._ddp_kwargs | {"find_unused_parameters": True}
    assert issubclass(ZeroStrategy, DataParallelStrategy)
    own = DDPStrategy(broadcast_buffers=True)
    assert resident(own) is own
    assert resident("ddp_spawn") == "ddp_spawn"
    assert resident(SingleDeviceStrategy("meta")).root_device.type == "meta"


def test_ddp_broadcasts_nothing_that_is_frozen(tiny_bert):
    """But what training moves, of which the first process stores its own."""
    module = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2))
    module.register_buffer("constant", torch.ones(2))
    strategy = DataParallelStrategy()
    strategy.model = module
    strategy.parallel_devices = [torch.device("cpu")]
    strategy.cluster_environment = type("One", (), {"local_rank": lambda self: 0})()
    strategy.model_to_device()
    ignored = {"0.weight", "0.bias", "constant"}
    assert set(module._ddp_params_and_buffers_to_ignore) == ignored


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_gradients_are_scaled_by_one_kernel():
    parameters = [nn.Parameter(torch.ones(size)) for size in (2, 3, 5)]
    for parameter in parameters[:2]:
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    factor = torch.tensor(0.5)
    with _Calls() as calls:
        scale_gradients(SingleDeviceStrategy(), optimizer, factor)
    assert calls.names == ["_foreach_mul_.Tensor"]
    assert [p.grad.tolist() for p in parameters[:2]] == [[1.5] * 2, [1.5] * 3]


def test_local_rank_is_set_while_a_base_is_sharded(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with local_rank_in_environment(3):
        assert os.environ["LOCAL_RANK"] == "3"
    assert "LOCAL_RANK" not in os.environ
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ZeroDivisionError), local_rank_in_environment(2):
        raise ZeroDivisionError
    assert os.environ["LOCAL_RANK"] == "1"


def test_sharded_base_on_a_cpu_beside_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(UserError, match='CUDA_VISIBLE_DEVICES=""'):
        check_accelerator("cpu")
    check_accelerator("cuda")


def test_scaled_loss_is_refused_for_a_sharded_base_in_any_trainer():
    trainer = L.Trainer(
        strategy=ShardedStrategy(),
        plugins=[half_precision("cpu")],
        **{"accelerator": "cpu", "devices": 2, "logger": False},
    )
    with pytest.raises(UserError, match=r"trainer\.precision=16-mixed: skips steps"):
        trainer.strategy.setup_optimizers(trainer)


def test_summed_loss_in_fp16_skips_few_steps():
    """Like the first steps of a language model in 16-mixed: a sum over 2,048 targets."""
    config = compose_config(["logger=none", "callbacks=none", "trainer=cpu"])
    config.trainer.precision = "16-mixed"  # refused on a CPU where a run begins
    plugin = build_trainer(config).precision_plugin
    assert plugin.scaler.get_scale() == FIRST_SCALE

    def skipped(scaler) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 64))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ids = torch.randint(0, 64, (2048,))
        scales = []
        for _ in range(20):
            with torch.autocast("cpu", dtype=torch.float16):
                logits = model(ids)
            loss = nn.functional.cross_entropy(logits.float(), ids.roll(-1), reduction="sum")
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scales.append(scaler.get_scale())
            scaler.update()
            optimizer.zero_grad()
        scales.append(scaler.get_scale())
        return sum(after < before for before, after in pairwise(scales))

    assert skipped(torch.amp.GradScaler("cpu")) > 3
    assert skipped(half_precision("cpu").scaler) <= 3
