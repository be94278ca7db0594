"""Private attributes of Lightning that distributed/strategy_internals.py relies on.

Checked with Lightning 2.6.6. If a test fails under a later version, adapt that file alone.
"""

from __future__ import annotations

import inspect

import lightning as L
import pytest
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lora_lightning.distributed.strategy_internals import (
    process_group_backend,
    set_mesh_size,
    uses_distributed_sampler,
)


@pytest.mark.parametrize("given", [True, False])
def test_uses_distributed_sampler_is_the_argument_of_the_trainer(given):
    trainer = L.Trainer(accelerator="cpu", logger=False, use_distributed_sampler=given)
    assert uses_distributed_sampler(trainer) is given


def test_process_group_backend_is_the_argument_of_the_strategy():
    assert process_group_backend(DDPStrategy(process_group_backend="gloo")) == "gloo"


def test_set_mesh_size_sets_what_the_strategy_builds_its_mesh_from():
    strategy = ModelParallelStrategy()
    known = set(vars(strategy))
    set_mesh_size(strategy, 3, 2)
    assert set(vars(strategy)) == known
    source = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert "self._data_parallel_size" in source
    assert "self._tensor_parallel_size" in source


def test_after_closure_has_the_arguments_of_lightning():
    assert list(inspect.signature(Precision._after_closure).parameters)[1:3] == [
        "model",
        "optimizer",
    ]
