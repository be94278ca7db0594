"""What is done to a model as a whole: compiled layers, offloaded activations, checkpointing."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    RobertaConfig,
    RobertaModel,
)

from helpers.gpu import ImitatedGpu
from lora_lightning.config.schema import ModelConfig
from lora_lightning.distributed.sharded_loading import loading_options
from lora_lightning.lora import Adapter, LoraConfig, UserError
from lora_lightning.models import loading as modeling
from lora_lightning.models import offload
from lora_lightning.models.forward import compile_layers, uncompiled
from lora_lightning.models.loading import load_classifier
from lora_lightning.models.tokenizer import load_tokenizer
from lora_lightning.tasks import build_task
from lora_lightning.training.module import LoraModule


def module_of(folder, **settings) -> LoraModule:
    """A module whose B is away from zero, so that A gets a gradient."""
    task = build_task({"name": "summarization"})
    module = LoraModule(
        task, ModelConfig(name_or_path=str(folder), **settings), LoraConfig(rank=4, alpha=8)
    )
    module.configure_model()
    generator = torch.Generator().manual_seed(5)
    for layer in module.adapter.layers.values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return module


def gradients(module: LoraModule, length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(4, 40, (2, length), generator=torch.Generator().manual_seed(length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    module.zero_grad()
    loss = module.training_loss(batch)
    loss.backward()
    return loss.detach(), {name: t.grad for name, t in module.trainable_tensors().items()}


def assert_gradients_equal(module: LoraModule, reference: LoraModule, length: int) -> None:
    expected_loss, expected = gradients(reference, length)
    loss, found = gradients(module, length)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_checkpointing_gives_the_same_gradients(tiny_llama):
    assert_gradients_equal(
        module_of(tiny_llama, gradient_checkpointing=True), module_of(tiny_llama), length=9
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_give_the_same_gradients(tiny_llama, checkpointing):
    module = module_of(tiny_llama, offload_activations=True, gradient_checkpointing=checkpointing)
    assert_gradients_equal(module, module_of(tiny_llama), length=50)


class Copies(TorchDispatchMode):
    """Notes the shapes of tensors that are copied into others."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.shapes.append(tuple(args[1].shape))
        return function(*args, **(kwargs or {}))


def test_offloading_moves_activations_that_are_large_and_no_parameters():
    layers = nn.Sequential(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 2), nn.ReLU())
    x = torch.randn(40, 50, requires_grad=True)
    with Copies() as copies, offload.offloaded_activations(layers):
        layers(x)
    # x, what relu gave, for it and for the layer after; not the (40, 2) at the end.
    assert sorted(copies.shapes) == [(40, 30), (40, 30), (40, 50)]


@pytest.fixture
def kept(monkeypatch):
    """What offloading keeps of the tensors that it is given, and those."""
    found = []
    real = offload._Moving.pack

    def pack(self, tensor):
        packed = real(self, tensor)
        found.append((tensor, packed))
        return packed

    monkeypatch.setattr(offload._Moving, "pack", pack)
    return found


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloading_under_autocast_moves_no_copy_of_a_weight(tiny_llama, targets, dtype, kept):
    """Autocast makes one of each weight of a float32 base, and of each A and B."""
    task = build_task({"name": "summarization"})
    modules = []
    for offloads in (False, True):
        config = ModelConfig(str(tiny_llama), dtype=dtype, offload_activations=offloads)
        module = LoraModule(task, config, LoraConfig(rank=33, targets=targets))
        module.configure_model()
        modules.append(module)
    plain, module = modules
    for _ in range(3):  # A and B one by one, and all at once
        kept.clear()
        with torch.autocast("cpu", torch.bfloat16):
            expected_loss, expected = gradients(plain, 50)
            loss, found = gradients(module, 50)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    weights = {p.shape for p in module.model.parameters()}
    weights |= {shape[::-1] for shape in weights}
    moved = [packed.copy for _, packed in kept if isinstance(packed, offload._Moved)]
    assert len(moved) > 20
    assert not [tensor.shape for tensor in moved if tensor.shape in weights]
    assert min(tensor.numel() for tensor in moved) >= 1024
    made_again = [packed for _, packed in kept if isinstance(packed, offload._Cast)]
    adapted = [layer.base_layer.weight for layer in module.adapter.layers.values()]
    assert len(made_again) == (len(adapted) if dtype == "float32" else 0)
    assert all(any(one.source is weight for weight in adapted) for one in made_again)


class Streams:
    """Stands in for torch.cuda: two streams that note what is asked of them, and copies."""

    def __init__(self):
        self.log = []
        self.computing, self.copying = (self.named(name) for name in ("computing", "copying"))
        self.running = self.computing
        self.Stream = lambda device: self.copying

    def named(self, name):
        events = itertools.count()

        def record_event():
            event = f"{name} {next(events)}"
            self.log.append(f"{event} is set")
            return SimpleNamespace(
                name=event, synchronize=lambda: self.log.append(f"CPU waits for {event}")
            )

        def wait(other):
            self.log.append(f"{name} waits for {other.name}")

        return SimpleNamespace(
            name=name, record_event=record_event, wait_stream=wait, wait_event=wait
        )

    def current_stream(self, device):
        return self.running

    @contextlib.contextmanager
    def stream(self, stream):
        self.running = stream
        self.log.append("copy")
        yield
        self.running = self.computing


@pytest.fixture
def streams(monkeypatch):
    streams = Streams()
    monkeypatch.setattr(offload, "_STREAMS", {"cpu": streams})
    monkeypatch.setattr(offload, "_stream", lambda device: streams.copying)

    def record_stream(tensor, stream):
        streams.log.append(f"memory is used by {stream.name}")

    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    return streams


def test_offloading_with_streams_copies_beside_the_computation(streams):
    """Seven tensors, of which five may be on their way."""
    layers = nn.Sequential(*(nn.Sigmoid() for _ in range(7)))
    x = torch.randn(40, 50, requires_grad=True)
    expected = torch.autograd.grad(layers(x).sum(), x)
    with offload.offloaded_activations(layers):
        output = layers(x).sum()
    log = []
    for number in range(7):
        log += ["copying waits for computing", "copy", f"copying {number} is set"]
        if number >= 5:  # the memory of that is used again
            log.append(f"computing waits for copying {number - 5}")
    log += [f"computing waits for copying {number}" for number in range(2, 7)]
    assert streams.log == log
    streams.log.clear()
    assert torch.equal(*torch.autograd.grad(output, x), *expected)
    log = []
    for number in range(7):
        if number >= 5:
            log.append(f"CPU waits for computing {number - 5}")
        log += [f"computing {number} is set", "copy", "computing waits for copying"]
        log.append("memory is used by computing")
    assert streams.log == log


def test_offloading_in_a_failed_pass_keeps_nothing(streams, kept):
    layers = nn.Sequential(nn.Sigmoid(), nn.Sigmoid(), nn.Unflatten(1, (7, 9)))
    with pytest.raises(RuntimeError), offload.offloaded_activations(layers):
        layers(torch.randn(40, 50, requires_grad=True))
    assert streams.log[-2:] == [f"computing waits for copying {number}" for number in (0, 1)]
    storages = [weakref.ref(tensor.untyped_storage()) for tensor, _ in kept]
    kept.clear()
    assert [storage() for storage in storages] == [None, None]


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradients_at_all_lengths(tiny_llama):
    module = module_of(tiny_llama, compile="layer")
    reference = module_of(tiny_llama)
    layers = [m for m in module.model.modules() if m._compiled_call_impl is not None]
    assert len(layers) == len(reference.model.model.layers)
    for length in (9, 14, 23):
        assert_gradients_equal(module, reference, length)
    prompts = [[5, 6, 7], [8, 9]]
    texts = [
        this.task.generate(this.model, prompts, max_new_tokens=5) for this in (module, reference)
    ]
    assert texts[0] == texts[1]


def test_uncompiled_of_a_plain_model_does_nothing(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    Adapter(model, LoraConfig(rank=2))
    assert type(uncompiled(model)).__name__ == "nullcontext"


def test_compile_layers_without_repeated_layers_is_refused():
    with pytest.raises(UserError, match=r"model.compile=layer: not supported with a Sequential"):
        compile_layers(nn.Sequential(nn.Linear(2, 2)))


def test_compile_with_another_value_raises():
    with pytest.raises(UserError, match="model.compile=all: must be layer or null"):
        ModelConfig(compile="all")


def _shards(data: int, tensor: int) -> SimpleNamespace:
    return SimpleNamespace(data=data, tensor=tensor, mesh=SimpleNamespace(device_type="cpu"))


@pytest.mark.parametrize(("heads", "pairs"), [(3, 3), (4, 1)])
def test_sharded_loading_of_uncuttable_heads_raises(heads, pairs):
    """transformers would cut the matrices all the same, and fail in the first step."""
    config = LlamaConfig(
        hidden_size=heads * 8, num_attention_heads=heads, num_key_value_heads=pairs, vocab_size=64
    )
    with pytest.raises(UserError, match=r"must divide the model's num_\w+_heads, \d"):
        loading_options(AutoModelForCausalLM, config, _shards(1, 2))
    assert loading_options(AutoModelForCausalLM, config, _shards(1, 1)) == {}


def test_encoder_layers_are_gathered_separately():
    """transformers has no plan of its own for BERT: it would gather the whole model at once."""
    config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=3)
    shards = _shards(2, 1)
    options = loading_options(AutoModelForSequenceClassification, config, shards)
    assert list(options["distributed_config"].fsdp_plan) == ["bert.encoder.layer.*"]


def sizes_of(folder) -> dict[str, int]:
    known = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in known.items() if isinstance(value, int)}


@pytest.mark.parametrize(
    ("build", "new"),
    [
        (BertModel.from_pretrained, ["classifier"]),
        (
            lambda folder: BertModel.from_pretrained(folder, add_pooling_layer=False),
            ["classifier", "bert.pooler"],
        ),
        (
            lambda folder: RobertaModel(
                RobertaConfig(**{**sizes_of(folder), "pad_token_id": 0}), add_pooling_layer=False
            ),
            ["classifier"],
        ),
    ],
    ids=["head", "head and pooler", "head of two layers"],
)
def test_new_modules_on_a_gpu_start_as_on_a_cpu(build, new, tiny_bert, tmp_path, monkeypatch):
    def load():
        torch.manual_seed(6)
        model, trained = load_classifier(config, load_tokenizer(config), ["no", "yes"])
        assert trained == new
        tensors = [t for name in new for t in model.get_submodule(name).parameters()]
        return [*tensors, torch.get_rng_state()]

    def on_gpu(*arguments, **settings):
        model, missing = real(*arguments, **settings)
        for name in new:
            for tensor in gpu.take(model).get_submodule(name).parameters():
                tensor.data.normal_()
        return model, missing

    shutil.copytree(tiny_bert, tmp_path / "base")
    build(tiny_bert).save_pretrained(tmp_path / "base")
    config = ModelConfig(str(tmp_path / "base"))
    expected = load()
    real = modeling._from_pretrained
    monkeypatch.setattr(modeling, "_from_pretrained", on_gpu)
    with ImitatedGpu() as gpu:
        found = load()
    assert expected[0].std() > 0.01
    assert all(map(torch.equal, found, expected))
