"""EVA: first matrices and ranks, against principal components in float64 and against PEFT."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.tuners.lora import EvaConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights

from lora_lightning.lora import (
    Adapter,
    LoraConfig,
    UserError,
    load_adapter,
    save_adapter,
)
from lora_lightning.lora.initialization.eva import (
    StreamedComponents,
    counted_rows,
    distribute_ranks,
    run_eva,
)


def test_streamed_components_equal_those_of_all_rows():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([9.0, 5.0, 3.0, *([0.2] * 13)])
    turn, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    rows = (torch.randn(700, 16, generator=generator) * scales) @ turn + 2.0
    with torch.device("meta"):  # a default device that the rows are not on
        stream = StreamedComponents(16)
    for chunk in rows.split([2, 98, 300, 300]):  # the first has fewer rows than components
        stream.update(chunk)
    centred = (rows - rows.mean(0)).double()
    _, singular, vectors = torch.linalg.svd(centred, full_matrices=False)
    shares = singular.square() / singular.square().sum()
    torch.testing.assert_close(stream.shares().double(), shares, rtol=1e-4, atol=1e-6)
    alike = (stream.components[:3].double() * vectors[:3]).sum(1).abs()
    torch.testing.assert_close(alike, torch.ones(3, dtype=torch.double), rtol=0, atol=1e-5)
    assert stream.settled[:3].all()


def test_distribute_ranks_prefers_the_largest_shares():
    shares = {
        "a": torch.tensor([0.5, 0.3, 0.1]),
        "b": torch.tensor([0.2, 0.05, 0.01]),
        "c": torch.tensor([0.04, 0.02, 0.01]),
    }
    assert distribute_ranks(shares, 4) == {"a": 3, "b": 1, "c": 0}
    assert distribute_ranks({"a": torch.ones(2), "b": torch.ones(2)}, 3) == {"a": 2, "b": 1}


def test_counted_rows_skips_masked_tokens():
    inputs = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    labels = torch.tensor([[-100, 5, -100], [-100, -100, 7]])
    assert counted_rows(inputs, {"attention_mask": mask}).tolist() == inputs[mask.bool()].tolist()
    both = counted_rows(inputs, {"attention_mask": mask, "labels": labels})
    assert both.tolist() == [[2.0, 3.0], [10.0, 11.0]]
    flattened = counted_rows(inputs.flatten(0, 1), {"attention_mask": mask, "labels": labels})
    assert torch.equal(flattened, both)
    assert len(counted_rows(inputs[:, 0], {"attention_mask": mask})) == 2  # what a pooler sees
    of_rows = {"attention_mask": mask, "labels": torch.tensor([1, 0])}  # a classifier's
    assert len(counted_rows(inputs, of_rows)) == 5


@pytest.fixture(scope="module")
def base(base):
    return base()


@pytest.fixture(scope="module")
def batches(base):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(60):
        ids = torch.randint(0, base.config.vocab_size, (16, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[:8, 9:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def forward(model):
    return lambda batch: model(**batch)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_run_eva_equals_peft(rho, base, batches):
    settings = {"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"], "r": 4}
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(
            **settings, lora_alpha=8, init_lora_weights="eva", eva_config=EvaConfig(rho=rho)
        ),
        low_cpu_mem_usage=True,
    )
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    their_A = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): tensor
        for name, tensor in theirs.named_parameters()
        if name.endswith("lora_A.default.weight")
    }
    config = LoraConfig(rank=4, init="eva", eva_rho=rho, targets=settings["target_modules"])
    found = run_eva(base, config, batches, forward(base))
    our_ranks = {name: len(a) for name, a in found.matrices.items()}
    their_ranks = {name: len(a) for name, a in their_A.items()}
    assert sum(our_ranks.values()) == sum(their_ranks.values()) == 4 * 8
    # Both are approximate: a component at the edge may fall to one layer or to another.
    moved = sum(
        abs(our_ranks.get(n, 0) - their_ranks.get(n, 0)) for n in {*our_ranks, *their_ranks}
    )
    assert moved <= (0 if rho == 1.0 else 2)
    if rho > 1.0:
        assert len(set(our_ranks.values())) > 1
    for name in our_ranks.keys() & their_ranks.keys():
        count = min(our_ranks[name], their_ranks[name], 2)
        ours, their = found.matrices[name][:count], their_A[name][:count]
        cosines = torch.linalg.svdvals(ours @ their.T)  # of the angles between the subspaces
        assert cosines.min() > 0.9, name


@pytest.mark.parametrize("rslora", [False, True])
def test_run_eva_config_gives_plain_lora(rslora, base, batches, tmp_path):
    config = LoraConfig(rank=4, alpha=6, init="eva", use_rslora=rslora)
    found = run_eva(base, config, batches[:5], forward(base))
    assert found.config.init == "kaiming"
    model = copy.deepcopy(base)
    adapter = Adapter(model, found.config)
    adapter.set_initial_A(found.matrices)
    ids = batches[0]["input_ids"]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        for name, layer in adapter.layers.items():
            assert layer.scaling == pytest.approx(config.scaling_of(name))
            gram = layer.lora_A @ layer.lora_A.T
            torch.testing.assert_close(gram, torch.eye(layer.rank), rtol=0, atol=1e-4)
            layer.lora_B.normal_(std=0.3)
        expected = model(input_ids=ids).logits
        save_adapter(adapter, tmp_path / "adapter")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        ours = load_adapter(copy.deepcopy(base), tmp_path / "adapter").model
        torch.testing.assert_close(ours(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_run_eva_is_deterministic(base, batches):
    config = LoraConfig(rank=4, init="eva")
    first, second = (run_eva(base, config, batches[:4], forward(base)) for _ in range(2))
    assert first.config == second.config
    for name, a in first.matrices.items():
        assert torch.equal(a, second.matrices[name])
    shared = [first.matrices[f"model.layers.0.self_attn.{part}_proj"] for part in "qk"]
    rank = min(map(len, shared))
    assert torch.equal(shared[0][:rank], shared[1][:rank])  # one decomposition for both


def test_run_eva_keeps_embeddings_unchanged(base, batches):
    config = LoraConfig(rank=4, init="eva", targets=["embed_tokens", "q_proj"])
    found = run_eva(base, config, batches[:3], forward(base))
    assert "model.embed_tokens" in found.config.targets
    assert "model.embed_tokens" not in found.matrices
    with pytest.raises(UserError, match="requires linear layers"):
        run_eva(base, LoraConfig(init="eva", targets=["embed_tokens"]), [], forward(base))


def test_run_eva_without_data_raises(base):
    with pytest.raises(UserError, match="requires training data or the unquantized weights"):
        Adapter(copy.deepcopy(base), LoraConfig(init="eva"))
    with pytest.raises(UserError, match="requires training rows"):
        run_eva(base, LoraConfig(init="eva"), [], forward(base))
