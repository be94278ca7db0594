"""Adapter arithmetic: against definitions in float64, and against PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models import logits, random_adapter_on
from lora_lightning.adapters.combine import combine_adapters
from lora_lightning.lora import (
    UserError,
    load_adapter,
    save_adapter,
)
from lora_lightning.lora.arithmetic import (
    Update,
    combine,
    dare,
    reduced,
    ties,
    trimmed,
)

SIZE = 24


def drawn(rank: int, seed: int, *, out: int = SIZE, fan_in: int = 20) -> Update:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, fan_in, generator=generator)
    b = torch.randn(out, rank, generator=generator)
    return Update(a, b, 0.5 + 0.25 * seed)


def truth(updates: list[Update], weights: list[float]) -> torch.Tensor:
    dense = [u.scaling * u.lora_B.double() @ u.lora_A.double() for u in updates]
    return torch.stack([w * d for w, d in zip(weights, dense, strict=True)]).sum(0)


def test_combine_cat_is_the_weighted_sum():
    updates, weights = [drawn(3, 0), drawn(5, 1), drawn(1, 2)], [0.7, -1.0, 2.0]
    new = combine(updates, weights, method="cat", rank=0)
    assert new.lora_A.shape[0] == 9
    torch.testing.assert_close(new.dense().double(), truth(updates, weights), rtol=1e-5, atol=1e-5)
    gone = combine([new, new], [1.0, -1.0], method="cat", rank=0)  # subtracted from itself
    assert gone.dense().abs().max() < 1e-4


@pytest.mark.parametrize("rank", [1, 4, 7, 30])
def test_combine_svd_is_the_nearest_update_of_its_rank(rank):
    """The error is what Eckart and Young say: the singular values that are left out."""
    updates, weights = [drawn(3, 0), drawn(5, 1)], [0.7, -1.3]
    expected = truth(updates, weights)
    new = combine(updates, weights, method="svd", rank=rank)
    assert new.lora_A.shape[0] == min(rank, 8)
    left = torch.linalg.svdvals(expected)[rank:].square().sum().sqrt()
    error = (new.dense().double() - expected).norm()
    assert error == pytest.approx(left.item(), rel=1e-4, abs=1e-4)
    again = reduced(new, 30)
    torch.testing.assert_close(again.dense(), new.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "tie"}, "method=tie: must be one of .*Did you mean 'ties'"),
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"density": 0.0}, r"density=0.0: must be in \(0, 1\]"),
    ],
)
def test_combine_with_a_wrong_value_is_refused(settings, message):
    update = Update(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    with pytest.raises(UserError, match=message):
        combine([update], [1.0], **{"method": "ties", "rank": 1, **settings})


def test_ties_follows_the_three_steps_of_the_paper():
    """The paper's: trim, elect, merge disjointly; by hand on four entries."""
    one = torch.tensor([[4.0, -3.0, 0.5, 2.0]])
    two = torch.tensor([[-1.0, -2.0, 5.0, 0.1]])
    assert trimmed(one, 0.75).tolist() == [[4.0, -3.0, 0.0, 2.0]]
    assert trimmed(two, 0.75).tolist() == [[-1.0, -2.0, 5.0, 0.0]]
    merged = ties([trimmed(one, 0.75), trimmed(two, 0.75)], [1.0, 1.0])
    assert merged.tolist() == [[4.0, -2.5, 5.0, 2.0]]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_combine_dare_drops_before_its_sum_or_election(method):
    """Each update loses entries by the generator's draws, in order; then the sum, or TIES."""
    updates = [Update(torch.randn(3, 8), torch.randn(6, 3), 0.5) for _ in range(3)]
    weights, made = [1.0, -0.5, 2.0], torch.Generator().manual_seed(7)
    dropped = []
    for update in updates:
        dense = 0.5 * update.lora_B @ update.lora_A
        kept = torch.bernoulli(torch.full_like(dense, 0.6), generator=made)
        dropped.append(torch.where(kept > 0, dense / 0.6, 0.0))
    expected = torch.zeros(6, 8)
    for row in range(6):
        for column in range(8):
            entries = [float(d[row, column]) for d in dropped]
            if method == "dare_linear":
                expected[row, column] = sum(w * e for w, e in zip(weights, entries, strict=True))
                continue
            sign = 1.0 if sum(entries) >= 0 else -1.0
            pairs = zip(weights, entries, strict=True)
            agree = [w * e for w, e in pairs if e * sign > 0]
            expected[row, column] = sum(agree) / max(len(agree), 1)
    generator = torch.Generator().manual_seed(7)
    new = combine(updates, weights, method=method, rank=6, density=0.6, generator=generator)
    torch.testing.assert_close(new.dense(), expected, rtol=1e-4, atol=1e-4)


def test_combine_of_wide_matrices_is_near_the_optimum_and_repeatable():
    """Beyond 1024 a few steps of iteration take the place of the whole decomposition."""
    torch.manual_seed(0)
    updates = [Update(torch.randn(4, 1100), torch.randn(1080, 4), 1.0) for _ in range(2)]
    exact = updates[0].dense() + updates[1].dense()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # of no account
        found.append(combine(updates, [1.0, 1.0], method="dare_linear", rank=5, density=1.0))
    assert torch.equal(found[0].lora_A, found[1].lora_A)
    best = torch.linalg.svdvals(exact)[5:].square().sum().sqrt()
    assert (found[0].dense() - exact).norm() <= 1.001 * best


def test_dare_drops_and_rescales():
    delta = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) + 3
    dropped = dare(delta, 0.25, generator=torch.Generator().manual_seed(1))
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(dropped[kept], 4 * delta[kept])
    assert dropped.mean().item() == pytest.approx(delta.mean().item(), rel=0.02)


# Whole adapters ----------------------------------------------------------------------------------


@pytest.fixture
def folders(base, tmp_path) -> list[Path]:
    """Two adapters of one rank and other scalings, and one of another rank with other targets."""
    made = []
    for seed, settings in enumerate(
        [
            {"rank": 4, "alpha": 8},
            {"rank": 4, "alpha": 4},
            {"rank": 2, "alpha": 6, "targets": ["q_proj", "down_proj"], "use_rslora": True},
        ]
    ):
        adapter = random_adapter_on(base(), seed=seed, std=0.2, **settings)
        made.append(save_adapter(adapter, tmp_path / str(seed), base_model="tiny"))
    return made


def dense_sum(base, folders, weights):
    """The base with every update added to its weights: what a sum of adapters means."""
    model = base()
    with torch.no_grad():
        for folder, weight in zip(folders, weights, strict=True):
            adapter = load_adapter(base(), folder)
            for name, layer in adapter.layers.items():
                model.get_submodule(name).weight += weight * layer.delta_weight()
    return logits(model)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -1.0, 2.0]])
def test_combine_adapters_sum_equals_dense_updates_and_peft(weights, base, folders, tmp_path):
    """Equal to the base with the dense updates added, in ours and in PEFT; svd at full rank too."""
    expected = dense_sum(base, folders, weights)
    for method, rank in (("cat", None), ("svd", 10)):
        output = tmp_path / method
        gap = combine_adapters(folders, output, weights=weights, method=method, rank=rank)
        assert gap < 1e-5
        torch.testing.assert_close(
            logits(load_adapter(base(), output).model), expected, rtol=1e-3, atol=1e-3
        )
        theirs = peft.PeftModel.from_pretrained(base(), output)
        torch.testing.assert_close(logits(theirs), expected, rtol=1e-3, atol=1e-3)


def test_combine_adapters_with_one_adapter_scales_it(base, folders, tmp_path):
    combine_adapters(folders[:1], tmp_path / "half", weights=[0.5])
    expected = dense_sum(base, folders[:1], [0.5])
    found = logits(load_adapter(base(), tmp_path / "half").model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("cat", "cat"), ("linear", "linear"), ("svd", "svd"), ("ties", "ties_svd")],
)
def test_combine_adapters_equals_peft_add_weighted_adapter(ours, theirs, base, folders, tmp_path):
    weights = [0.7, 0.4]
    combine_adapters(folders[:2], tmp_path / "new", weights=weights, method=ours, rank=3)
    model = peft.PeftModel.from_pretrained(base(), folders[0], adapter_name="a")
    model.load_adapter(folders[1], "b")
    options = {"svd_rank": 3, "density": 0.5} if "svd" in theirs else {}
    model.add_weighted_adapter(["a", "b"], weights, "new", combination_type=theirs, **options)
    model.set_adapter("new")
    found = logits(load_adapter(base(), tmp_path / "new").model)
    torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("method", ["svd", "ties", "dare_linear", "dare_ties"])
def test_combine_adapters_returns_the_relative_error(method, base, folders, tmp_path):
    gap = combine_adapters(folders[:2], tmp_path / "new", method=method, rank=3)
    new = load_adapter(base(), tmp_path / "new")
    first, second = (load_adapter(base(), folder) for folder in folders[:2])
    weight = 1.0 if "ties" in method else 0.5
    missed = total = 0.0
    for name, layer in new.layers.items():
        assert layer.rank == 3
        expected = weight * (first.layers[name].update() + second.layers[name].update())
        missed += (layer.update() - expected).square().sum().item()
        total += expected.square().sum().item()
    assert gap == pytest.approx((missed / total) ** 0.5, rel=1e-3)


def test_combine_adapters_dare_follows_the_seed(folders, tmp_path):
    options = {"method": "dare_linear", "rank": 3}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        combine_adapters(folders[:2], tmp_path / name, seed=seed, **options)
    read = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert read[0] == read[1] != read[2]


# Heads and mistakes ------------------------------------------------------------------------------


def changed(folder: Path, to: Path, *, config: dict | None = None, **tensors) -> Path:
    """A copy of an adapter folder with other settings or further tensors."""
    to.mkdir()
    raw = json.loads((folder / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**raw, **(config or {})}))
    own = load_file(folder / "adapter_model.safetensors")
    save_file({**own, **tensors}, to / "adapter_model.safetensors")
    return to


def test_combine_adapters_treats_heads_by_the_whole_option(folders, tmp_path):
    head = "base_model.model.score.weight"
    heads = [torch.ones(2, 3), torch.full((2, 3), 4.0)]
    pair = [
        changed(folders[0], tmp_path / f"h{i}", config={"modules_to_save": ["score"]}, **{head: h})
        for i, h in enumerate(heads)
    ]
    with pytest.raises(UserError, match=r"modules differ \(score.weight\)\. Use whole=first"):
        combine_adapters(pair, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    for whole, value in (("first", 1.0), ("mean", 2.5)):
        combine_adapters(pair, tmp_path / whole, whole=whole, weights=[2.0, 2.0])
        stored = load_file(tmp_path / whole / "adapter_model.safetensors")[head]
        assert torch.equal(stored, torch.full((2, 3), value))
    with pytest.raises(UserError, match=r"take those of the first\.$"):  # no mean by 1 and -1
        combine_adapters(pair, tmp_path / "new", weights=[1.0, -1.0])
    three = changed(
        folders[0],
        tmp_path / "three",
        config={"modules_to_save": ["score"]},
        **{head: torch.ones(3, 3)},
    )
    with pytest.raises(UserError, match=r"\(2, 3\) and \(3, 3\) \(2 and 3 outputs"):
        combine_adapters([pair[0], three], tmp_path / "new")
    with pytest.raises(UserError, match="weights must not add up to zero"):
        combine_adapters(pair, tmp_path / "new", whole="mean", weights=[1.0, -1.0])


def test_combine_adapters_whole_first_leaves_out_a_head_of_the_second(base, folders, tmp_path):
    """whole=first takes what the first trains whole, here nothing, and says nothing else."""
    head = {"base_model.model.lm_head.weight": torch.ones(64, 32)}
    other = changed(folders[1], tmp_path / "head", config={"modules_to_save": ["lm_head"]}, **head)
    combine_adapters([folders[0], other], tmp_path / "new", whole="first", weights=[1.0, 1.0])
    expected = dense_sum(base, folders[:2], [1.0, 1.0])
    for model in (
        load_adapter(base(), tmp_path / "new").model,
        peft.PeftModel.from_pretrained(base(), tmp_path / "new"),
    ):
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{"layers_to_transform": [0]}, {"exclude_modules": ["layers.1.self_attn.q_proj"]}]
)
def test_combine_adapters_of_some_layers_equals_dense_updates(settings, base, folders, tmp_path):
    """As PEFT writes them: short names, and apart from them which layers are meant."""
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], **settings)
    some = peft.get_peft_model(base(), config)
    torch.manual_seed(3)
    for name, parameter in some.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    some.save_pretrained(tmp_path / "some")
    pair = [
        changed(tmp_path / "some", tmp_path / "same", config={"base_model_name_or_path": "tiny"}),
        folders[2],
    ]
    combine_adapters(pair, tmp_path / "new", weights=[1.0, 0.5])
    expected = dense_sum(base, pair, [1.0, 0.5])
    for model in (
        load_adapter(base(), tmp_path / "new").model,
        peft.PeftModel.from_pretrained(base(), tmp_path / "new"),
    ):
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_combine_adapters_with_a_mistake_writes_nothing(folders, tmp_path):
    dora = changed(folders[0], tmp_path / "dora", config={"use_dora": True})
    other = changed(folders[0], tmp_path / "other", config={"base_model_name_or_path": "large"})
    for chosen, options, message in (
        (folders, {"method": "tis"}, "Did you mean 'ties'"),
        (folders, {"method": "linear"}, "requires one rank, got 2, 4"),
        (folders, {"weights": [1.0]}, "a number for each of the 3 adapters"),
        (folders, {"weights": [1.0, 1.0, float("nan")]}, "a number for each"),
        (folders, {"density": 0.0}, "density=0.0: must be in .0, 1."),
        (folders, {"rank": 0}, "rank=0: must be at least 1"),
        (folders, {"whole": "last"}, "whole=last: must be one of same, first, mean"),
        ([folders[0], dora], {}, "DoRA is not supported here"),
        ([folders[0], other], {}, "must belong to one base model, got name tiny and large"),
        ([folders[0], tmp_path / "none"], {}, "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            combine_adapters(chosen, tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()


def test_combine_command_writes_the_adapter_or_names_the_mistake(folders, tmp_path, run_cli):
    both = f"adapter={folders[0]},{folders[1]}"
    output = tmp_path / "new"
    status, out, err = run_cli(
        *("combine", both, "weights=0.5,0.5", "method=svd", "rank=2", f"output={output}")
    )
    assert status == 0, err
    assert f"new adapter: {output}" in out
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2
    for arguments, message in (
        ([both], "combine requires output=DIR"),
        ([f"output={output}"], "combine requires adapter=DIR"),
        ([both, f"output={output}", "weights=a,b"], "weights=a: must be a number"),
        ([both, f"output={output}", "wieghts=1,1"], "Did you mean 'weights'"),
    ):
        status, _, err = run_cli("combine", *arguments)
        assert status == 2
        assert message in " ".join(err.split())
