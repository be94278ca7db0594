"""What layers share in a pass: the numbers are those of each layer by itself, whatever happens."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from helpers.gpu import Kernels, like_a_gpu
from lora_lightning.lora import Adapter, LoraConfig, fused_group, products
from lora_lightning.lora.casts import Casts
from lora_lightning.lora.layers.lora_layer import LoraLayer


class Block(nn.Module):
    """Attention's shape: three layers of one input, though not where it is large, and another."""

    def __init__(self, bias=False):
        super().__init__()
        self.query, self.key = nn.Linear(6, 8, bias=bias), nn.Linear(6, 4, bias=bias)
        self.value, self.out = nn.Linear(6, 8, bias=bias), nn.Linear(8, 6, bias=bias)

    def forward(self, x):
        query = self.query(x).sin()
        key = self.key(x.clone() if x.detach().abs().max() > 50 else x).cos().repeat(1, 2)
        return x + self.out(query * key + self.value(x))


class Model(nn.Module):
    def __init__(self, checkpointing=None):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(bias=True)])
        self.checkpointing = checkpointing

    def forward(self, x):
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        return x


LAYERS = ["query", "key", "value", "out"]


def adapted(dtype=torch.float64, make=Model, *, adapter=None, **settings):
    """A model with an adapter all values of which are random."""
    torch.manual_seed(0)
    model = make().to(dtype)
    handle = Adapter(model, LoraConfig(**{"rank": 2, "targets": LAYERS, **settings}))
    for parameter in trained(model):
        parameter.data = torch.randn_like(parameter, dtype=adapter or dtype) * 0.3
    return model.train(), handle


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def rows(dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return torch.randn(5, 6, dtype=dtype)


def step(model, x):
    """Output and gradients, of x first."""
    x = x.detach().clone().requires_grad_()
    output = model(x)
    wanted = [x, *trained(model)]
    found = torch.autograd.grad(output.double().sin().sum(), wanted, allow_unused=True)
    return [output, *found]


def alone(model, x, run=step):
    """A step, or something else, with each layer by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraLayer, "forward", by_itself(LoraLayer.forward))
        return run(model, x)


def by_itself(forward):
    def call(self, x, *args, **kwargs):
        shared, self.forward_pass = self.forward_pass, None
        try:
            return forward(self, x, *args, **kwargs)
        finally:
            self.forward_pass = shared

    return call


@torch.no_grad()
def output(model, x):
    return [model(x)]


def assert_close(found, expected, tolerance=1e-12):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def gpu(monkeypatch):
    like_a_gpu(monkeypatch)


@pytest.fixture
def groups(monkeypatch):
    """Counts the groups that are computed together, by their sizes."""
    sizes = []
    real = fused_group._FusedGroup.apply

    def apply(rows, frozen, *matrices):
        sizes.append(len(frozen[0]))
        return real(rows, frozen, *matrices)

    monkeypatch.setattr(fused_group._FusedGroup, "apply", apply)
    return sizes


# Copies -------------------------------------------------------------------------------------


def sgd(model):
    return torch.optim.SGD(trained(model), 0.5, foreach=False)


def optimizer_step(make):
    def change(model, adapter):
        optimizer = make(model)
        step_backward(model)
        optimizer.step()

    return change


def step_backward(model):
    model(inputs_of(model)).float().sum().backward()


def inputs_of(model):
    return rows(model.blocks[0].query.weight.dtype)


def in_place(model, adapter):
    with torch.no_grad():
        for parameter in trained(model):
            parameter.mul_(-2)


def in_place_of_data(model, adapter):
    for parameter in trained(model):
        parameter.data.mul_(-2)  # its version stays


def other_data(model, adapter):
    for parameter in trained(model):
        parameter.data = -2 * parameter.data


def other_storage(model, adapter):
    for parameter in trained(model):
        with torch.no_grad():
            parameter.set_(-2 * parameter.detach())


def other_parameters(model, adapter):
    for layer in adapter.layers.values():
        layer.lora_A = nn.Parameter(-2 * layer.lora_A.detach())


def load(model, adapter):
    adapter.load_tensors({n: -2 * t.detach() for n, t in adapter.named_tensors().items()})


def load_state(model, adapter):
    model.load_state_dict({name: -2 * tensor for name, tensor in model.state_dict().items()})


def merged_and_back(model, adapter):
    adapter.merge()
    model(inputs_of(model))
    adapter.unmerge()
    in_place_of_data(model, adapter)


def to_another_type(model, adapter):
    for layer in adapter.layers.values():
        layer.lora_A.data = layer.lora_A.data.double() * 2


CHANGES = {
    "for-loop": optimizer_step(sgd),
    "foreach": optimizer_step(lambda model: torch.optim.AdamW(trained(model), 0.5, foreach=True)),
    "fused": optimizer_step(lambda model: torch.optim.AdamW(trained(model), 0.5, fused=True)),
    **{
        change.__name__: change
        for change in (
            *(in_place, in_place_of_data, other_data, other_storage, other_parameters),
            *(load, load_state, merged_and_back, to_another_type),
        )
    },
}


@pytest.mark.parametrize("grouped", [False, True], ids=["each", "grouped"])
@pytest.mark.parametrize("change", CHANGES)
def test_casts_after_a_change_have_the_new_values(change, grouped, request):
    """Between passes, with and without torch's notice of it."""
    if grouped:  # sums are in another order then
        request.getfixturevalue("gpu")
        (model, adapter), tolerance = adapted(torch.float64, adapter=torch.float32), 1e-5
    else:
        (model, adapter), tolerance = adapted(torch.bfloat16, adapter=torch.float32), 0.0
    x = inputs_of(model)
    for _ in range(4):  # by then all is copied at once, and groups are found
        before = step(model, x)
    CHANGES[change](model, adapter)
    for _ in range(3):
        found = step(model, x)
        assert_close(found, alone(model, x), tolerance)
    assert not torch.allclose(found[0], before[0], rtol=0.1)


def test_casts_use_one_kernel_per_pass_and_none_outside():
    model, adapter = adapted(torch.bfloat16, adapter=torch.float32)
    x, names = rows(torch.bfloat16), set(model.state_dict())
    casts = adapter.layers["blocks.0.query"].forward_pass.casts
    step(model, x)
    for call, single, copies in ((model, 0, 1), (model.blocks[0], 8, 0)):
        with Kernels() as kernels:
            call(x)
        assert kernels.count["_to_copy.default"] == single
        assert kernels.count["_foreach_copy_.default"] == copies
    assert set(model.state_dict()) == names
    assert casts._copies  # for the recomputation of a backward pass
    with torch.no_grad():
        model(x)
    assert casts._copies is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_casts_serve_gradient_checkpointing(reentrant):
    def checkpointed():
        return Model(checkpointing=reentrant)

    model, _ = adapted(torch.bfloat16, checkpointed, adapter=torch.float32)
    x = rows(torch.bfloat16).requires_grad_()
    expected = step(adapted(torch.bfloat16, adapter=torch.float32)[0], x)
    for _ in range(2):
        model.zero_grad()
        loss = model(x).double().sin().sum()
        with Kernels() as kernels:
            loss.backward()
    assert_close([p.grad for p in trained(model)], expected[2:], 0.0)
    # The gradients of A and B become fp32, that of the output bf16: no matrix is cast.
    assert kernels.count["_to_copy.default"] == 2 * 8 + 1


def test_casts_within_a_pass_see_a_change():
    model, _ = adapted(torch.bfloat16, adapter=torch.float32)
    x = rows(torch.bfloat16)
    for _ in range(2):
        before = model(x)

    def change(*_):
        with torch.no_grad():
            model.blocks[1].query.lora_A.mul_(-2)

    hook = model.blocks[0].register_forward_hook(change)
    found = model(x)
    hook.remove()
    assert not torch.equal(found, before)
    assert torch.equal(found, model(x))  # of the same values, all copied at once


def inference_first(self, x):
    with torch.inference_mode():
        self.blocks[1](x.clone())
    return self.blocks[1](self.blocks[0](x))


@pytest.mark.parametrize("joins", [False, True])
def test_casts_after_inference_mode_can_train(joins, request, monkeypatch):
    """Before the pass and within it, one by one and all at once."""
    if joins:
        request.getfixturevalue("gpu")
    x = rows(torch.bfloat16)
    for forward in (Model.forward, inference_first):
        monkeypatch.setattr(Model, "forward", forward)
        model, _ = adapted(torch.bfloat16, adapter=torch.float32)
        with Kernels():
            with torch.inference_mode():
                before = Model.forward(model, x.clone())
            for _ in range(3):
                found = step(model, x)
                torch.testing.assert_close(found[0], before, rtol=0.02, atol=0.02)
                with torch.inference_mode():
                    model(x.clone())


def test_casts_of_temporary_matrices_are_not_kept():
    model, adapter = adapted(torch.bfloat16, adapter=torch.float32, init="pissa")
    x = rows(torch.bfloat16)
    for layer in adapter.layers.values():
        layer.first_A, layer.first_B = layer.first_A + 1, layer.first_B.clone()
    for _ in range(4):
        in_place(model, adapter)
        assert_close(step(model, x), alone(model, x), 0.0)
    model(x)
    assert adapter.layers["blocks.0.query"].forward_pass.casts._requests == {}


def test_casts_follow_their_matrix_to_another_device():
    casts = Casts()
    matrix = nn.Parameter(torch.randn(2, 3))
    for _ in range(2):
        casts.begin()
        casts.cast(matrix, torch.bfloat16)
    (batch,) = casts._batches
    batch._device = torch.device("meta")  # as if it had been there
    casts.begin()
    assert torch.equal(casts.cast(matrix, torch.bfloat16), matrix.bfloat16())


def test_casts_serve_two_graphs_and_a_retained_graph():
    """A pass never writes into the copies of another."""
    model, adapter = adapted(torch.bfloat16, adapter=torch.float32)
    first, second = (rows(torch.bfloat16, seed) for seed in (1, 2))
    truth = [step(model, x)[2:] for x in (first, second)]
    outputs = [model(x).float().sin().sum() for x in (first, second)]
    for change in (in_place, in_place_of_data):
        for output, expected in zip(outputs, truth, strict=True):
            found = torch.autograd.grad(output, trained(model), retain_graph=True)
            assert_close(found, expected, 0.0)
        change(model, adapter)
        model(first)


@pytest.mark.parametrize("how", [copy.deepcopy, "pickle"], ids=["deepcopy", "pickle"])
def test_forward_pass_of_a_copied_model_is_separate(how, gpu, groups):
    model, adapter = adapted(adapter=torch.float32)
    x = rows()
    for _ in range(3):
        step(model, x)
    if how == "pickle":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = how(model)
    in_place_of_data(other, None)
    groups.clear()
    expected, changed = alone(model, x), alone(other, x)
    for _ in range(3):
        assert_close(step(model, x), expected, 1e-5)
        assert_close(step(other, x), changed, 1e-5)
    assert groups == [3] * 10  # of the copy from its second pass on
    adapter.remove()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


# Groups -------------------------------------------------------------------------------------


def llama(checkpointing=None):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if checkpointing is not None:
        kwargs = {"use_reentrant": checkpointing}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
    return model


def bert():
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


class OfIds(nn.Module):
    """A language model as a function of one tensor, its embedded tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(inputs_embeds=x[None])[0]


def wide_rows():
    torch.manual_seed(1)
    return torch.randn(7, 16, dtype=torch.float64)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama": (llama, {"targets": ALL}, [3, 2]),
    "bert": (bert, {"targets": ["query", "key", "value", "dense"]}, [3]),
    "frozen A": (llama, {"targets": ALL, "freeze_A": True}, [3, 2]),
    "ranks": (llama, {"targets": ALL, "rank_pattern": {"k_proj": 5}, "alpha": 4}, [2]),
    "one scaling": (
        llama,
        {
            "targets": ALL,
            "rank_pattern": {"k_proj": 8},
            "alpha_pattern": {"k_proj": 16},
            "alpha": 4,
        },
        [3, 2],
    ),
    "dropout": (llama, {"targets": ALL, "dropout": 0.5}, []),
    "dora": (llama, {"targets": ALL, "use_dora": True}, []),
    "pissa": (llama, {"targets": ALL, "init": "pissa"}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_group_equals_each_layer_alone(case, gpu, groups):
    make, settings, sizes = CASES[case]
    dtype = torch.float32 if case == "dora" else torch.float64
    model, _ = adapted(dtype, lambda: OfIds(make()), **settings)
    x = wide_rows().to(dtype)

    def seeded(run):
        torch.manual_seed(3)
        return run(model, x)

    expected = seeded(alone)
    for _ in range(3):
        assert_close(seeded(step), expected, 1e-10 if sizes else 0.0)
    assert groups == sizes * 4  # of two layers, from the second pass on


def test_group_training_gives_the_same_weights(gpu, groups):
    """Gradients that share memory are accumulated, zeroed and stepped by like any others."""

    def train(model):
        optimizer = torch.optim.AdamW(trained(model), 0.01, foreach=True)
        for seed in range(6):
            model(rows(seed=seed)).sin().sum().backward()
            if seed % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=seed > 3)
        return trained(model)

    found = train(adapted()[0])
    assert groups == [3] * 10
    expected = alone(adapted()[0], None, lambda model, _: train(model))
    assert_close(found, expected, 1e-10)


def test_group_gradients_in_bf16_are_as_accurate_as_alone(gpu, groups):
    """The truth: float64 of the same rounded values."""
    model, _ = adapted(torch.bfloat16, adapter=torch.float32)
    block = model.blocks[1]
    outer = torch.randn(64, 20).bfloat16()

    def gradients(module, x, outer):
        x = x.detach().requires_grad_()
        outputs = [layer(x) for layer in (module.query, module.key, module.value)]
        wanted = [x, *(p for n, p in module.named_parameters() if "lora" in n and "out" not in n)]
        return torch.autograd.grad(torch.cat(outputs, 1), wanted, outer)

    torch.manual_seed(1)
    x = torch.randn(64, 6).bfloat16()
    with Kernels():
        for _ in range(3):
            model(x)
        groups.clear()
        found = gradients(block, x, outer)
        assert groups == [3]
        usual = alone(block, x, lambda block, x: gradients(block, x, outer))
    truth = gradients(copy.deepcopy(block).double(), x.double(), outer.double())
    for one, other, true in zip(found, usual, truth, strict=True):
        assert one.dtype == other.dtype
        assert (one - true).norm() <= 1.1 * (other - true).norm() + 1e-9
        assert (one - true).norm() <= 0.01 * true.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_group_is_stable_under_gradient_checkpointing(reentrant, gpu, groups):
    """Two passes before the first backward pass, and a group that is given up between them."""
    model, _ = adapted(make=lambda: Model(checkpointing=reentrant))
    small, other, large = (rows(seed=seed).requires_grad_() for seed in (1, 2, 3))
    large.data *= 100

    def train(*inputs):
        outputs = [model(x) for x in inputs]
        for x, output in zip(inputs, outputs, strict=True):
            model.zero_grad()
            output.sin().sum().backward()
            expected = step(adapted()[0], x)[2:]
            assert_close([parameter.grad for parameter in trained(model)], expected, 1e-8)

    train(small, other)
    if not reentrant:  # which does not notice a change
        assert groups == []  # at the second pass the graph of the first was in flight
    train(small, other)
    assert set(groups) == {3}
    train(small, large, other)  # a group is given up, and is still used for the other
    groups.clear()
    train(small, other)
    assert groups == []


class Failure(Exception):
    pass


def fail(*_):
    raise Failure


@pytest.mark.parametrize("ends", ["well", "in an error", "early"])
def test_group_releases_its_outputs_after_the_pass(ends, gpu, groups):
    model, adapter = adapted()
    x, truth = rows(), step(adapted()[0], rows())
    for _ in range(3):
        step(model, x)
    outputs = []
    real = fused_group.fused_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lora_lightning.lora.forward_pass.fused_group",
            lambda *args, **kwargs: (
                outputs.append([*map(weakref.ref, made := real(*args, **kwargs))]) or made
            ),
        )
        value = adapter.layers["blocks.1.value"]
        if ends == "in an error":
            hook = value.register_forward_pre_hook(fail)
            with pytest.raises(Failure):
                model(x)
            hook.remove()
        elif ends == "early":  # its value is never asked for
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(Block, "forward", lambda self, x: x + self.out(self.query(x)))
                model(x)
        else:
            model(x)
    assert len(outputs) == 2
    assert [one() for group in outputs for one in group] == [None] * 6
    # The next pass computes what it is asked for, and keeps groups that an error has cut short.
    groups.clear()
    assert_close(step(model, x), truth, 1e-10)
    assert groups == ([] if ends == "early" else [3, 3])


def test_group_keeps_no_layer_alive(gpu):
    model, adapter = adapted()
    step(model, rows())
    step(model, rows())
    forward_pass = adapter.layers["blocks.0.query"].forward_pass
    layers = [weakref.ref(layer) for layer in adapter.layers.values()]
    assert len(forward_pass._groups) == 2
    gc.disable()  # reference counts are to suffice
    try:
        del model, adapter
        assert [layer() for layer in layers] == [None] * 8
    finally:
        gc.enable()


def ask_in_place(self, x):
    query = self.query(x)
    x.add_(1)
    return self.out(query.sin() * self.key(x).cos().repeat(1, 2) + self.value(x))


def ask_in_another_order(self, x):
    return self.out(self.value(x) * self.query(x) + self.key(x).repeat(1, 2))


def ask_without_gradients(self, x):
    query = self.query(x)
    with torch.no_grad():
        key = self.key(x)
    return self.out(query * key.repeat(1, 2) + self.value(x))


def ask_twice(self, x):
    return self.out(self.query(x) * self.query(x) + self.key(x).repeat(1, 2) + self.value(x))


def ask_under_autocast(self, x):
    query = self.query(x)
    with torch.autocast("cpu", torch.bfloat16):
        key = self.key(x)
    return self.out(query * key.repeat(1, 2).to(x.dtype) + self.value(x))


@pytest.mark.parametrize(
    "ask",
    [ask_in_place, ask_in_another_order, ask_without_gradients, ask_twice, ask_under_autocast],
    ids=lambda ask: ask.__name__,
)
def test_group_layer_with_another_input_computes_it(ask, gpu, groups, monkeypatch):
    model, _ = adapted()
    for _ in range(3):
        step(model, rows())
    assert groups[-1] == 3

    monkeypatch.setattr(Block, "forward", ask)
    run = output if ask is ask_in_place else step  # what is changed in place has no gradients
    for _ in range(3):
        assert_close(run(model, rows()), alone(model, rows(), run), 1e-10)


@pytest.mark.parametrize("state", ["switched off", "merged", "another scaling", "evaluation"])
def test_group_follows_the_state_of_its_layers(state, gpu, groups):
    model, adapter = adapted(dropout=0.5 if state == "evaluation" else 0.0)
    key = adapter.layers["blocks.0.key"]
    if state == "evaluation":
        model.eval()
    for _ in range(3):
        step(model, rows())
    assert groups[-1] == 3
    if state == "switched off":
        key.enabled = False
    elif state == "merged":
        key.merge()
    elif state == "another scaling":
        key.scaling = 0.25
    else:
        model.train()
        torch.manual_seed(5)
        expected = alone(model, rows())
        torch.manual_seed(5)
        assert_close(step(model, rows()), expected, 0.0)
        return
    groups.clear()
    assert_close(step(model, rows()), alone(model, rows()), 1e-10)
    assert groups == [3]  # of the other block


def test_forward_pass_in_two_threads_is_correct(gpu, groups):
    """They meet between the first layer of a group and the others."""
    model, adapter = adapted()
    for _ in range(3):
        step(model, rows())
    inputs = [rows(seed=seed) for seed in (1, 2)]
    expected = [alone(model, x) for x in inputs]
    barrier = threading.Barrier(2, timeout=30)

    def meet(*_):
        barrier.wait()

    adapter.layers["blocks.0.query"].register_forward_hook(meet)
    found = [None, None]

    def run(place):
        x = inputs[place].clone().requires_grad_()
        output = model(x)
        found[place] = (
            output,
            *torch.autograd.grad(output.sin().sum(), [x, *trained(model)]),
        )

    threads = [threading.Thread(target=run, args=[place]) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-10)


# Kernels ------------------------------------------------------------------------------------


def launches(model):
    """Kernels of a forward and a backward pass, as a GPU would launch them."""
    ids = torch.randint(0, 256, (2, 32))
    with Kernels() as kernels:
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    model.zero_grad()
    return kernels.count


def test_training_step_launches_fewer_kernels_than_peft(gpu):
    import peft

    def base():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return LlamaForCausalLM(config).to(torch.bfloat16)

    ours = base()
    Adapter(ours, LoraConfig(rank=8))
    ours.train()
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
    theirs = peft.get_peft_model(base(), config).train()
    found = [launches(ours) for _ in range(5)]
    counts = [count.total() for count in found]
    assert counts[-1] == counts[-2] <= 300, found
    assert counts[-1] <= 0.7 * launches(theirs).total()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("settings", [{}, {"dropout": 0.1}, {"use_dora": True}], ids=str)
def test_compiled_model_is_one_graph(settings, training, monkeypatch):
    monkeypatch.setattr(products, "GROUPED_ON", ("cpu",))
    model, _ = adapted(torch.float32, llama, targets=ALL, **settings)
    model.train(training)
    layer = model.model.layers[0]
    x = torch.randn(2, 8, 16, requires_grad=True)
    positions = model.model.rotary_emb(x, torch.arange(8)[None])
    for part, inputs in (
        (layer, {"hidden_states": x, "position_embeddings": positions}),
        (model, {"inputs_embeds": x, "use_cache": False}),
    ):
        torch._dynamo.reset()
        found = []
        for call in (part, torch.compile(part, backend="eager", fullgraph=True)):
            torch.manual_seed(3)
            output = call(**inputs)
            output = output if part is layer else output.logits
            found.append([output, *torch.autograd.grad(output.sin().sum(), x)])
        assert_close(*found, 1e-5)
