"""LoRA's relatives: each by its definition in float64, and against PEFT with the same weights."""

from __future__ import annotations

from copy import deepcopy

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from safetensors.torch import load_file
from torch import nn

from helpers.architectures import ARCHITECTURES, case
from helpers.models import randomise, trainable
from lora_lightning.config.schema import OptimConfig
from lora_lightning.lora import (
    Adapter,
    LoraConfig,
    UserError,
    load_adapter,
    save_adapter,
)
from lora_lightning.lora.layers.dora import DoraConv1D, DoraEmbedding, DoraLinear
from lora_lightning.lora.layers.linear import LoraLinear
from lora_lightning.training.optim import build_optimizer

VARIANTS = {
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "pissa": {"init": "pissa"},
    "pissa rslora": {"init": "pissa", "use_rslora": True},
    "olora": {"init": "olora"},
    "dora pissa": {"use_dora": True, "init": "pissa"},
    "lora-fa": {"freeze_A": True},
}
SOME = ["bert", "gpt2", "llama", "t5", "mixtral", "gpt-oss", "gemma3", "bloom", "modernbert"]
PAIRS = [
    *((name, "dora") for name in ARCHITECTURES),
    *((name, variant) for name in SOME for variant in VARIANTS if variant != "dora"),
]


@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_variant_round_trips_through_peft(name, variant, tmp_path):
    """The file of each is read by PEFT with the same logits; what PEFT writes of it, by us."""
    this = case(name)
    adapter = this.adapter(**VARIANTS[variant])
    torch.testing.assert_close(
        this.logits(adapter.model), this.logits(this.base), rtol=0, atol=2e-5
    )
    randomise(trainable(adapter))
    ours = this.logits(adapter.model)
    assert (ours - this.logits(this.base)).abs().max() > 1e-2
    save_adapter(adapter, tmp_path / "ours")
    scale = max(1.0, ours.abs().max().item())
    theirs = peft.PeftModel.from_pretrained(this.copy(), tmp_path / "ours")
    torch.testing.assert_close(this.logits(theirs), ours, rtol=0, atol=2e-5 * scale)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = load_adapter(this.copy(), tmp_path / folder)
        torch.testing.assert_close(this.logits(again.model), ours, rtol=0, atol=2e-5 * scale)


GRADIENTS = [(name, {"use_dora": True}) for name in ("bert", "gpt2", "llama", "bloom")]
GRADIENTS += [(name, {}) for name in ARCHITECTURES]
GRADIENTS += [(name, {"use_rslora": True}) for name in ("bert", "gpt2", "llama", "t5", "mixtral")]


@pytest.mark.parametrize(("name", "settings"), GRADIENTS)
def test_variant_gradients_equal_peft(name, settings, tmp_path):
    this = case(name)
    adapter = this.adapter(**settings)
    randomise(trainable(adapter))
    save_adapter(adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(this.copy(), tmp_path, is_trainable=True)
    for model in (adapter.model, theirs):
        model.eval()(**this.inputs).logits.square().sum().backward()
    expected = {
        key.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace("magnitude_vector.weight", "magnitude_vector"): parameter.grad
        for key, parameter in theirs.named_parameters()
        if "lora_" in key
    }
    own = {name: t.grad for name, t in trainable(adapter).items() if "lora_" in name}
    assert own.keys() == expected.keys()
    assert any("magnitude" in name for name in own) == bool(settings.get("use_dora"))
    largest = max(grad.abs().max().item() for grad in own.values())
    for name, grad in own.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5 * largest + 1e-6)


@pytest.mark.parametrize(("init", "rslora"), [("pissa", False), ("pissa", True), ("olora", False)])
def test_weight_init_training_equals_peft(init, rslora):
    """Steps of gradient descent: PEFT's on a changed base, ours on the base as it was."""
    this = case("llama")
    adapter = this.adapter(init=init, use_rslora=rslora)
    before = {key: layer.base_layer.weight.clone() for key, layer in adapter.layers.items()}
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=list(adapter.layers),
        init_lora_weights=init,
        use_rslora=rslora,
    )
    theirs = peft.get_peft_model(this.copy(), config)
    parameters = dict(theirs.named_parameters())
    for name, layer in adapter.layers.items():  # the signs of a singular vector are free
        for ours, first in (("lora_A", "first_A"), ("lora_B", "first_B")):
            start = parameters[f"base_model.model.{name}.{ours}.default.weight"].detach()
            torch.testing.assert_close(
                getattr(layer, ours).abs(), start.abs(), rtol=1e-3, atol=1e-5
            )
            with torch.no_grad():
                getattr(layer, ours).copy_(start)
                getattr(layer, first).copy_(start)
    for model in (adapter.model, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            model(**this.inputs).logits.square().mean().backward()
            optimizer.step()
    ours = this.logits(adapter.model)
    assert (ours - this.logits(this.base)).abs().max() > 1e-2
    torch.testing.assert_close(ours, this.logits(theirs), rtol=1e-4, atol=1e-4)
    for key, layer in adapter.layers.items():
        assert torch.equal(layer.base_layer.weight, before[key])


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
def test_weight_init_equals_a_part_of_the_weight(init):
    """By definition: PiSSA the best approximation of rank r; OLoRA an orthonormal basis."""
    torch.manual_seed(0)
    base = nn.Linear(24, 16)
    base.weight.data *= torch.linspace(0.1, 4, 16)[:, None]
    layer = LoraLinear(base, 4, scaling=0.5, init=init)
    part = layer.lora_B.double() @ layer.lora_A.double()
    weight = base.weight.double()
    if init == "olora":
        torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(4), rtol=0, atol=1e-5)
        q = torch.linalg.qr(weight)[0][:, :4]
        torch.testing.assert_close(part, q @ q.T @ weight, rtol=0, atol=1e-5)
    else:
        u, s, vt = torch.linalg.svd(weight)
        best = u[:, :4] * s[:4] @ vt[:4]
        torch.testing.assert_close(0.5 * part, best, rtol=0, atol=1e-4)
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [DoraLinear, DoraConv1D, DoraEmbedding])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_dora_equals_its_equation(kind, init):
    """In float64, from the dense matrices; and merged, unmerged, and after another step."""
    from transformers.pytorch_utils import Conv1D

    if kind is DoraEmbedding and init == "pissa":
        with pytest.raises(UserError, match="not supported with an embedding among lora.targets"):
            kind(nn.Embedding(11, 6), 2, scaling=0.7, init=init)
        return
    torch.manual_seed(0)
    bases = {
        DoraLinear: lambda: nn.Linear(7, 6),
        DoraConv1D: lambda: Conv1D(6, 7),
        DoraEmbedding: lambda: nn.Embedding(11, 6),
    }
    base = bases[kind]()
    first = deepcopy(base)
    layer = kind(base, 2, scaling=0.7, init=init).requires_grad_(True).eval()
    x = torch.randint(11, (5,)) if kind is DoraEmbedding else torch.randn(5, 7)
    torch.testing.assert_close(layer(x), first(x), rtol=0, atol=1e-6)
    for seed in (1, 2):  # the second time a norm is kept, and must be found to be old
        randomise(
            {"A": layer.lora_A, "B": layer.lora_B, "m": layer.lora_magnitude_vector}, seed=seed
        )
        weight = first.weight.detach().double()
        weight = weight if kind is DoraLinear else weight.T
        a, b = (matrix.detach().double() for matrix in layer.matrices())
        changed = weight + 0.7 * b @ a
        magnitude = layer.lora_magnitude_vector.detach().double()
        directed = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
        onehot = nn.functional.one_hot(x, 11).double() if kind is DoraEmbedding else x.double()
        expected = onehot @ directed.T
        if kind is not DoraEmbedding:
            expected = expected + first.bias.detach().double()
        for _ in range(2):
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        norm = (directed - weight).norm()
        torch.testing.assert_close(layer.update_norm().double(), norm, rtol=1e-5, atol=1e-5)
        layer.merge()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.update_norm().double(), norm, rtol=1e-5, atol=1e-5)
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, first.weight)


def test_dora_cached_norm_follows_device_dtype_and_mode():
    layer = DoraLinear(nn.Linear(7, 6).eval(), 2, scaling=0.7)
    with torch.no_grad():  # the magnitude started as the norm, and has memory of its own
        layer.lora_magnitude_vector.mul_(2)
    torch.testing.assert_close(layer.weight_norm(), layer.base_layer.weight.norm(dim=1))
    randomise({"A": layer.lora_A, "B": layer.lora_B})
    for name in ("lora_A", "lora_B"):  # of version 0, as what a move makes is
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach().clone()))
    x = torch.randn(5, 7, requires_grad=True)
    with torch.inference_mode():
        kept = layer.weight_norm()
        assert layer.weight_norm() is kept
    layer(x).sum().backward()  # what inference mode made cannot be saved
    assert x.grad is not None
    fine = layer.weight_norm()
    dense = layer.base_layer.weight + 0.7 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(fine, dense.norm(dim=1), rtol=1e-5, atol=0)
    rounded = layer.to(torch.bfloat16).weight_norm()
    assert not torch.equal(rounded, fine)
    torch.testing.assert_close(rounded, fine, rtol=1e-2, atol=0)
    assert layer.to("meta").weight_norm().device.type == "meta"


def test_dora_dropout_applies_to_the_update_only():
    torch.manual_seed(0)
    base = nn.Linear(400, 3)
    layer = DoraLinear(base, 2, scaling=1.0, dropout=0.5)
    layer.train()
    x = torch.randn(6, 400)
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=1e-5)  # B is zero
    randomise({"B": layer.lora_B})
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_dora_norm_is_constant_in_backward():
    """Section 4.3: dL/dm = sum(dL/dh (W + BA) x) / |W + BA|, dL/dB = m / |.| dL/dh (A x)^T."""
    torch.manual_seed(0)
    layer = DoraLinear(nn.Linear(7, 6), 2, scaling=0.7)
    randomise({"A": layer.lora_A, "B": layer.lora_B, "m": layer.lora_magnitude_vector})
    x, grad = torch.randn(5, 7), torch.randn(5, 6)
    layer(x).backward(grad)
    a, b, m = (
        p.detach().double() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    )
    changed = layer.base_layer.weight.detach().double() + 0.7 * b @ a
    norm = changed.norm(dim=1)
    x, grad = x.double(), grad.double()
    expected = {
        "lora_magnitude_vector": (grad * (x @ changed.T)).sum(0) / norm,
        "lora_B": 0.7 * (grad * m / norm).T @ (x @ a.T),
        "lora_A": 0.7 * (grad * m / norm @ b).T @ x,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(layer, name).grad.double(), value, rtol=1e-4, atol=1e-5)


def test_freeze_A_saves_no_input():
    """LoRA-FA trains what PEFT's optimizer for it trains, and keeps x A^T in the place of x."""
    this = case("llama")
    adapter = this.adapter(freeze_A=True)
    own = {name for name, t in adapter.named_tensors().items() if t.requires_grad}
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(adapter.layers))
    theirs = peft.get_peft_model(this.copy(), config)
    create_lorafa_optimizer(theirs, r=3, lora_alpha=6, lr=1e-3)
    expected = {
        name.removeprefix("base_model.model.").replace(".default", "")
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert own == expected
    kept: dict[bool, int] = {}
    for freeze in (False, True):
        base = nn.Linear(512, 256).requires_grad_(False)
        layer = LoraLinear(base, 4, scaling=1.0, freeze_A=freeze)
        sizes: list[int] = []

        def keep(tensor, sizes=sizes):
            sizes.append(0 if isinstance(tensor, nn.Parameter) else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(torch.randn(64, 512, requires_grad=True)).sum().backward()
        kept[freeze] = sum(sizes)
        assert (layer.lora_A.grad is None) == freeze
        assert layer.lora_B.grad is not None
    assert kept[False] - kept[True] == 64 * 512


def test_loraplus_groups_equal_peft():
    """The same rate for each matrix; embeddings apart, of which PEFT says nothing but a rate."""
    ours = Adapter(case("llama").copy(), LoraConfig(rank=3))
    config = OptimConfig(lr=1e-4, loraplus_lr_ratio=16)
    named = ours.model.named_parameters
    optimizer = build_optimizer(named(), config, from_zero=ours.zero_initialized())
    names = {id(p): name.replace(".weight", "") for name, p in ours.named_tensors().items()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}

    settings = peft.LoraConfig(r=3, target_modules=list(ours.layers))
    theirs = peft.get_peft_model(case("llama").copy(), settings)
    truth = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    names = {id(p): name for name, p in theirs.named_parameters()}
    expected = {names[id(p)]: g["lr"] for g in truth.param_groups for p in g["params"]}
    plain = {
        key.removeprefix("base_model.model.").removesuffix(".default.weight"): rate
        for key, rate in expected.items()
    }
    assert rates == pytest.approx(plain)
    assert sorted(set(rates.values())) == pytest.approx([1e-4, 1.6e-3])


def test_exported_files_match_their_config(tmp_path):
    """`LoraConfig.exported` builds an adapter into which the file of the first fits."""
    this = case("llama")
    for rslora in (False, True):
        settings = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3.0}}
        adapter = this.adapter(init="pissa", use_rslora=rslora, **settings)
        randomise(trainable(adapter))
        folder = save_adapter(adapter, tmp_path / str(rslora))
        plain = Adapter(this.copy(), adapter.config.exported())
        tensors = load_file(folder / "adapter_model.safetensors")
        plain.load_tensors({k.removeprefix("base_model.model."): t for k, t in tensors.items()})
        torch.testing.assert_close(
            this.logits(plain.model), this.logits(adapter.model), rtol=1e-4, atol=1e-4
        )
        assert plain.summary().rows[0].rank == 10


def test_pissa_rank_above_the_weight_raises():
    message = r"lora.rank=40: not supported with lora.init=pissa on a weight of \d+ x \d+"
    with pytest.raises(UserError, match=message):
        case("llama").adapter(init="pissa", rank=40)
