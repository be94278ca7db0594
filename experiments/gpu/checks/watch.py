"""A pytest plugin that notes which tests put tensors on a GPU without being marked for it."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

NOTE = "on_cuda"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    before = allocations()
    try:
        return (yield)
    finally:
        if allocations() != before and item.get_closest_marker("gpu") is None:
            item.user_properties.append((NOTE, "true"))


def allocations() -> int:
    """Tensors that were put on the GPU so far."""
    if not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])
