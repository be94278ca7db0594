"""LoRA's fused linear step against plain autograd and PEFT, by the gradients in closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.lora import Adapter, LoraConfig

IN, OUT, SCALING, DROPPED = 16, 24, 2.0, 0.25
NO_TENSORS = 1e-30


@dataclass(frozen=True)
class Case:
    """One way to call an adapted layer.

    Args:
        dtype: of the frozen weight and, without autocast, of the input.
        autocast: the type of autocast; None: there is none.
        kind: linear, unbiased or conv1d.
        freeze_A: whether B alone is trained.
        dropout: probability on A's input.
        rows: leading sizes of the input.
        expanded: whether the gradient that comes in is one number, expanded.
    """

    dtype: torch.dtype
    autocast: torch.dtype | None
    kind: str
    freeze_A: bool
    dropout: float
    rows: tuple[int, ...]
    expanded: bool

    @property
    def narrow(self) -> bool:
        """Whether products are of 16 bits."""
        return (self.autocast or self.dtype) != torch.float32

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), self.kind]
        words += [f"autocast-{str(self.autocast).removeprefix('torch.')}"] if self.autocast else []
        words += ["frozen-A"] if self.freeze_A else []
        words += ["dropout"] if self.dropout else []
        words += ["expanded"] if self.expanded else []
        return "-".join([*words, "x".join(map(str, self.rows))])


def cases() -> Iterator[Case]:
    """All that a training run can meet."""
    wide, *narrow = torch.float32, torch.bfloat16, torch.float16
    types = [(dtype, None) for dtype in (wide, *narrow)]
    types += [(wide, narrow[0]), (wide, narrow[1]), (narrow[0], narrow[0])]
    for (dtype, autocast), kind, freeze, dropout, rows, expanded in itertools.product(
        types,
        ("linear", "unbiased", "conv1d"),
        (False, True),
        (0.0, DROPPED),
        ((5, 33), (0, 33)),
        (False, True),
    ):
        yield Case(dtype, autocast, kind, freeze, dropout, rows, expanded)


def compare(case: Case, device: str) -> dict[str, float]:
    """Relative errors of what the layer gives, and of what plain autograd does, by tensor.

    The truth is float64 of the same rounded values. Both see the mask that the layer has drawn.
    """
    made = _Made(case, device)
    mask = made.mask()
    truth = made.truth(mask)
    found = made.found(made.layer)
    plain = made.found(lambda x: made.plain(x, mask))
    errors = {}
    for name, true in truth.items():
        errors[name] = _error(found[name], true)
        errors[f"plain {name}"] = _error(plain[name], true)
    return errors


def excess(case: Case, errors: dict[str, float]) -> float:
    """The largest error over what is allowed: below 1 all is well.

    In fp32 1e-5; in 16 bits half as much again as that of plain autograd, which rounds elsewhere.
    """
    found = [0.0]
    for name, error in errors.items():
        if name.startswith("plain "):
            continue
        allowed = 1e-5
        if case.narrow:
            allowed = max(1.5 * errors[f"plain {name}"], 1e-5)
        found.append(error / allowed)
    return math.nan if any(map(math.isnan, found)) else max(found)


def mask_gap(device: str, dtype: torch.dtype) -> float:
    """How far the mask of the backward pass is from that of the forward pass.

    With identities for A and B, nothing for W, and ones for input and gradient, both are the mask.
    """
    made = _Made(Case(dtype, None, "unbiased", False, DROPPED, (8, 64), False), device)
    made.silence()
    x = torch.ones(8, 64, IN, device=device, dtype=dtype, requires_grad=True)
    output = made.layer(x)
    (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output))
    return float((output.detach()[..., :IN] - gradient).abs().max())


class _Made:
    """The layer of a case, its input and its incoming gradient."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        base: Any = nn.Linear(IN, OUT, bias=case.kind != "unbiased")
        if case.kind == "conv1d":
            from transformers.pytorch_utils import Conv1D

            base = Conv1D(OUT, IN)
        holder = nn.Sequential(base).to(device, case.dtype)
        self.rank = IN if case.dropout else 4
        config = LoraConfig(
            rank=self.rank,
            scale=SCALING,
            dropout=case.dropout,
            freeze_A=case.freeze_A,
            targets=["0"],
        )
        self.adapter = Adapter(holder, config)
        holder.train()
        self.layer = holder[0]
        tensors = self.adapter.named_tensors()
        self.a = next(t for name, t in tensors.items() if "lora_A" in name)
        self.b = next(t for name, t in tensors.items() if "lora_B" in name)
        self.base = base
        with torch.no_grad():
            for parameter in (*base.parameters(), self.a, self.b):
                parameter.copy_(draw(*parameter.shape) / 4)
        self.x = draw(*case.rows, IN).to(case.dtype).requires_grad_()
        self.gradient = draw(*case.rows, OUT)

    @property
    def weight(self) -> Tensor:
        """(out, in)."""
        weight: Tensor = self.base.weight.detach()
        return weight.t() if self.case.kind == "conv1d" else weight

    def silence(self) -> None:
        """Has the layer show its mask: W is nothing, A and B are identities."""
        with torch.no_grad():
            self.base.weight.zero_()
            if self.base.bias is not None:
                self.base.bias.zero_()
            self.a.copy_(torch.eye(self.rank, IN))
            self.b.copy_(torch.eye(OUT, self.rank))

    def mask(self) -> Tensor:
        """What dropout multiplies the input with: the layer's own draw of the same seed."""
        if not self.case.dropout:
            return torch.ones(*self.case.rows, IN, device=self.device, dtype=torch.float64)
        other = _Made(self.case, self.device)
        other.silence()
        with torch.no_grad():
            shown = other.call(other.layer, torch.ones_like(other.x))
        kept = (shown[..., :IN] != 0).double()
        return kept / (1 - self.case.dropout)

    def call(self, layer: Any, x: Tensor) -> Tensor:
        torch.manual_seed(7)
        enabled = self.case.autocast is not None
        with torch.autocast(self.device, self.case.autocast or torch.bfloat16, enabled=enabled):
            output: Tensor = layer(x)
        return output

    def found(self, layer: Any) -> dict[str, Tensor]:
        """Output and gradients."""
        output = self.call(layer, self.x)
        gradient = self._incoming(output)
        wanted = [self.x, self.b] if self.case.freeze_A else [self.x, self.b, self.a]
        names = ["output", "x", "b", "a"]
        return dict(
            zip(names, [output, *torch.autograd.grad(output, wanted, gradient)], strict=False)
        )

    def _incoming(self, output: Tensor) -> Tensor:
        if self.case.expanded:
            return torch.ones((), device=self.device, dtype=output.dtype).expand(output.shape)
        return self.gradient.to(output.dtype)

    def plain(self, x: Tensor, mask: Tensor) -> Tensor:
        """The same by PyTorch's own layers and autograd."""
        bias = self.base.bias
        base = F.linear(x, self.weight, bias)
        dropped = x * mask.to(x.dtype)
        dtype = x.dtype if self.case.autocast is None else torch.float32
        down = F.linear(dropped, self.a.to(dtype)) * SCALING
        return base + F.linear(down, self.b.to(dtype)).to(base.dtype)

    def truth(self, mask: Tensor) -> dict[str, Tensor]:
        """Output and gradients in float64, without autograd."""
        x, weight = self.x.detach().double(), self.weight.double()
        a, b = self.a.detach().double(), self.b.detach().double()
        dropped = x * mask
        output = x @ weight.t() + SCALING * (dropped @ a.t() @ b.t())
        if self.base.bias is not None:
            output = output + self.base.bias.detach().double()
        of = self.case.autocast or self.case.dtype
        g = self._incoming(torch.empty(output.shape, device=self.device, dtype=of)).double()
        flat, rows = g.reshape(-1, OUT), dropped.reshape(-1, IN)
        found = {
            "output": output,
            "x": g @ weight + SCALING * mask * (g @ b @ a),
            "b": SCALING * flat.t() @ (rows @ a.t()),
        }
        if not self.case.freeze_A:
            found["a"] = SCALING * (flat @ b).t() @ rows
        return found


def _error(found: Tensor, true: Tensor) -> float:
    if found.shape != true.shape:
        return math.nan
    return float((found.detach().double() - true).norm() / true.norm().clamp(min=NO_TENSORS))


def against_peft(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Our error over that of PEFT's layer, by tensor, in that type; of 16 bits under autocast."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    autocast = None if dtype == torch.float32 else dtype
    made = _Made(Case(dtype, autocast, "linear", False, 0.0, (5, 33), False), device)
    mask = made.mask()
    holder = nn.Sequential(nn.Linear(IN, OUT)).to(device, dtype)
    with torch.no_grad():
        holder[0].weight.copy_(made.weight)
        holder[0].bias.copy_(made.base.bias)
    config = PeftConfig(r=made.rank, lora_alpha=int(SCALING * made.rank), target_modules=["0"])
    layer = get_peft_model(holder, config).base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(made.a)
        layer.lora_B["default"].weight.copy_(made.b)
    theirs, ours = made.call(layer, made.x), made.found(made.layer)
    gradient = made.gradient.to(theirs.dtype)
    wanted = [made.x, layer.lora_B["default"].weight, layer.lora_A["default"].weight]
    found = dict(
        zip(
            ("output", "x", "b", "a"),
            [theirs, *torch.autograd.grad(theirs, wanted, gradient)],
            strict=True,
        )
    )
    return {
        name: _error(ours[name], true) / max(_error(found[name], true), 1e-12)
        for name, true in made.truth(mask).items()
    }
