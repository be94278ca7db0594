"""Logits and loss of chosen positions alone are those of the whole, on all with a head."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.architectures import (
    ARCHITECTURES,
    CAUSAL,
    GROUPED,
    SEQUENCE_TO_SEQUENCE,
    VOCABULARY,
    case,
)
from helpers.models import randomise
from lora_lightning.data.collators import PaddingCollator
from lora_lightning.lora import Adapter, LoraConfig
from lora_lightning.models import lm_head as head_module
from lora_lightning.models.lm_head import logits_at, loss_at
from lora_lightning.tasks import build_task

KINDS = [n for n, (kind, _) in ARCHITECTURES.items() if kind in (CAUSAL, SEQUENCE_TO_SEQUENCE)]
# Models that change their logits after the head, by more than their usual settings do.
CHANGED = {
    "cohere scales": (tf.CohereForCausalLM, tf.CohereConfig, {"logit_scale": 0.3}),
    "granite divides": (tf.GraniteForCausalLM, tf.GraniteConfig, {"logits_scaling": 3.0}),
    "gemma caps": (
        tf.Gemma2ForCausalLM,
        tf.Gemma2Config,
        {"head_dim": 8, "final_logit_softcapping": 1.5},
    ),
}


def places_in(inputs) -> torch.Tensor:
    shape = inputs.get("decoder_input_ids", inputs["input_ids"]).shape
    places = torch.zeros(shape, dtype=torch.bool)
    places[0, 2] = places[1, 0] = places[1, 4] = True
    return places.flatten().nonzero().flatten()


def check(model: nn.Module, inputs) -> None:
    check_logits(model, inputs)
    check_loss(model, inputs)


def check_loss(model: nn.Module, inputs, *, chunks: tuple[int, ...] = (1, 1, 2, 2, 2, 2)) -> None:
    """Nine targets, one of which counts for nothing, by two rows of logits at a time.

    `chunks`: the rows that the head is to see, in order. First the model's own one and, the first
    time, the one that is compared with it.
    """
    shape = inputs.get("decoder_input_ids", inputs["input_ids"]).shape
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, :5] = True
    mask[0, 4] = False
    places = mask.flatten().nonzero().flatten()
    count = len(places)
    head = model.get_output_embeddings()
    vocabulary = model.config.get_text_config().vocab_size
    targets = torch.arange(count) * 3 % vocabulary
    targets[4] = -100
    logits = model(**inputs).logits.flatten(0, 1)[places]
    whole = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    wide: list[int] = []
    hook = head.register_forward_hook(
        lambda module, args, output: wide.append(output.numel() // output.shape[-1])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "CHUNK", 2 * vocabulary)
        parted, correct = loss_at(model, inputs, places, targets)
        with torch.no_grad():
            unlearned, _ = loss_at(model, inputs, places, targets)
    hook.remove()
    assert count == 9
    assert tuple(wide[: len(chunks)]) == chunks
    torch.testing.assert_close(parted, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unlearned, whole.detach(), rtol=1e-5, atol=1e-5)
    assert int(correct) == int((logits.argmax(-1) == targets).sum())
    parameters = [p for p in model.parameters() if p.requires_grad]
    ways = [
        torch.autograd.grad(2.5 * loss, parameters, allow_unused=True) for loss in (parted, whole)
    ]
    for one, other in zip(*ways, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [2**25, 2 * VOCABULARY])
def test_training_looks_for_no_highest_logit(chunk, monkeypatch):
    """Over all logits at once and by chunks; the loss is that of an evaluation to the bit."""
    monkeypatch.setattr(head_module, "CHUNK", chunk)
    this = case("llama")
    model = this.copy()
    places = torch.arange(9)
    targets = places * 3 % VOCABULARY
    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    found = []
    for training in (False, True):
        seen.clear()
        with Names():
            loss, correct = loss_at(model.train(training), this.inputs, places, targets)
        found.append(loss)
        assert (correct is None) == training
        assert ("argmax" in seen) != training
    assert found[0] == found[1]


def test_a_large_gpu_takes_larger_chunks(monkeypatch):
    sizes = {"cuda:0": 85 * 10**9, "cuda:1": 24 * 10**9}
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(total_memory=sizes[str(device)]),
    )
    chunks = [head_module._chunk(torch.device(name)) for name in (*sizes, "cpu")]
    assert chunks == [2**27, 2**25, 2**25]


def check_logits(model: nn.Module, inputs) -> None:
    places = places_in(inputs)
    wide: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: wide.append(output.numel() // output.shape[-1])
    )
    logits = model(**inputs).logits.flatten(0, 1)
    whole = logits[places]
    chosen = logits_at(model, inputs, places)
    hook.remove()
    torch.testing.assert_close(chosen, whole, rtol=1e-5, atol=1e-5)
    assert wide == [len(logits), 3]  # the head sees three positions
    parameters = [p for p in model.parameters() if p.requires_grad]
    ways = [
        torch.autograd.grad(logits.double().sin().sum(), parameters, allow_unused=True)
        for logits in (chosen, whole)
    ]
    for one, other in zip(*ways, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_with_an_adapter(name):
    this = case(name)
    model = this.copy()
    adapter = Adapter(model, LoraConfig(rank=2))
    randomise(adapter.named_tensors())
    check(model, this.inputs)


@pytest.mark.parametrize("name", CHANGED)
def test_what_a_model_does_to_its_logits(name):
    torch.manual_seed(0)
    model_class, config_class, settings = CHANGED[name]
    model = model_class(config_class(**{**GROUPED, **settings})).eval()
    inputs = case("llama").inputs
    check(model, inputs)
    head = model.get_output_embeddings()
    hidden = model.get_decoder()(**inputs).last_hidden_state
    changed = (head(hidden) - model(**inputs).logits).abs().max()
    assert changed > 1e-3  # there is something to get wrong


def test_an_adapter_on_the_head():
    this = case("llama")
    model = this.copy()
    adapter = Adapter(model, LoraConfig(rank=2, targets=["lm_head", "q_proj"]))
    randomise(adapter.named_tensors())
    check(model, this.inputs)


def test_a_model_that_does_something_unknown_to_its_logits_is_left_to_itself():
    class Odd(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + output.logits**2
            return output

    torch.manual_seed(0)
    this = case("llama")
    model = Odd(this.copy().config).eval()
    check_loss(model, this.inputs, chunks=(1, 1, 9, 9))


def test_a_tied_head_that_is_trained_whole():
    """Full fine-tuning: the embedding gets its gradient from both its ends."""
    this = case("gpt2")
    model = this.copy()
    for parameter in model.parameters():
        parameter.requires_grad = True
    assert model.lm_head.weight is model.transformer.wte.weight
    check_loss(model, this.inputs)


@pytest.mark.parametrize("name", [n for n, (kind, _) in ARCHITECTURES.items() if kind == CAUSAL])
def test_padding_on_the_right_needs_no_mask(name):
    """The loss of a padded batch, which is given no mask, is that of its rows alone."""
    model = case(name).copy().eval()
    task = build_task({"name": "summarization"})
    task.prepare(model.config)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (9, 5, 3):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    with torch.no_grad():
        together = task.loss(model, PaddingCollator(0)(rows))
        alone = [task.loss(model, PaddingCollator(0)([row])) for row in rows]
        own = [
            model(input_ids=ids, labels=torch.tensor([row["labels"]])).loss * (ids.shape[1] - 1)
            for row in rows
            for ids in [torch.tensor([row["input_ids"]])]
        ]
    assert int(together.count) == 14
    total = sum(float(one.total) for one in alone)
    assert float(together.total) == pytest.approx(total, rel=1e-5)
    assert total == pytest.approx(float(sum(own)), rel=1e-5)
