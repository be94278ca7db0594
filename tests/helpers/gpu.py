"""Stand-ins for a GPU on a CPU, and counts of what would wait for it or launch a kernel on it."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lightning.lora import products


class Waits(TorchDispatchMode):
    """Notes the operations for whose result a program would have to wait for a GPU.

    The device "meta" may stand for the GPU. On a CPU transformers looks, once a forward pass,
    whether there are padded or joined rows; that alone is left out there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        reads = name == "_local_scalar_dense"
        if masks or reads or name in ("nonzero", "masked_select"):
            callers = {Path(frame.filename).name for frame in traceback.extract_stack()}
            if args[0].device.type != "cpu" or "masking_utils.py" not in callers:
                self.found.append(name)
        if reads and args[0].is_meta:
            return True
        result = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):  # from the second argument, or to a new tensor
            source = args[1] if name == "copy_" else args[0]
            if source.device != result.device:
                self.found.append(f"{source.device} -> {result.device}")
        return result


class OnImitatedGpu(torch.Tensor):
    """A tensor that `ImitatedGpu` takes for one on a GPU."""


class ImitatedGpu(TorchFunctionMode):
    """Under it tensors may say they are on a GPU, and have values.

    What is drawn in one of them comes from a generator other than the CPU's, as on a GPU. What
    has to wait for one's values is noted.
    """

    DRAWS = ("uniform_", "normal_", "kaiming_uniform_", "trunc_normal_", "xavier_uniform_")
    WAITS = ("cpu", "tolist", "item", "__bool__", "__int__", "__index__", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(77)
        self.waits: list[str] = []

    @staticmethod
    def take(model: nn.Module) -> nn.Module:
        """Make the parameters of a model say that they are on the GPU."""
        for part in model.modules():
            for name, parameter in part.named_parameters(recurse=False):
                there = parameter.detach().as_subclass(OnImitatedGpu)
                part._parameters[name] = nn.Parameter(there, parameter.requires_grad)
        return model

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args else kwargs.get("tensor")
        there = isinstance(first, OnImitatedGpu)
        if function == torch.Tensor.device.__get__ and there:
            return torch.device("cuda", 0)
        if function == torch.Tensor.is_cuda.__get__:
            return there
        if function.__name__ in self.DRAWS and there:
            kwargs["generator"] = self.generator
        asked = kwargs.get("device")
        moved = asked is not None and torch.device(asked).type == "cuda"
        if moved:
            kwargs["device"] = "cpu"
        if function.__name__ in self.WAITS and there:
            self.waits.append(function.__name__)
        result = function(*args, **kwargs)
        here = function.__name__ == "cpu" or (asked is not None and not moved)
        if not isinstance(result, torch.Tensor) or not (here or moved):
            return result
        return result.as_subclass(torch.Tensor if here else OnImitatedGpu)


# Operations that change what a tensor says of its memory and launch no kernel.
FREE = (
    *("view", "_unsafe_view", "alias", "detach", "as_strided", "expand", "select", "slice"),
    *("split", "squeeze", "unbind", "unsqueeze", "permute", "transpose", "t.default"),
)


class Kernels(TorchDispatchMode):
    """Counts what launches a kernel in `count`; allocations are counted too, to be strict.

    Stands in for what a GPU has and a CPU has not: a product of 16-bit matrices written as fp32.
    """

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.__name__.startswith(FREE):
            self.count[func.__name__] += 1
        if func is torch.ops.aten.mm.dtype:
            left, right, dtype = args
            return torch.mm(left.to(dtype), right.to(dtype))
        return func(*args, **(kwargs or {}))


def like_a_gpu(monkeypatch):
    """Join products and write them in fp32 on a CPU, as on a GPU; needs `Kernels`.

    Models that are loaded afterwards have transformers' own attention.
    """
    monkeypatch.setattr("lora_lightning.models.cpu_kernels._set_attention", lambda model: None)
    monkeypatch.setattr(products, "GROUPED_ON", ("cpu",))
    monkeypatch.setattr(products, "_try_float32", lambda device, dtype: dtype.itemsize == 2)
