"""Adapters from elsewhere: what their own tool computes is what is computed here.

The truth is each layout written down by hand, from dense updates that are known.
"""

from __future__ import annotations

import json
import re

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from helpers.models import logits
from lora_lightning.adapters.formats import read_layout
from lora_lightning.inference.convert import import_adapter
from lora_lightning.inference.loading import load_trained
from lora_lightning.inference.predictor import Predictor
from lora_lightning.lora import UserError, load_adapter

RANK, ALPHA = 3, 6.0
HIDDEN, HEADS, GROUPS, SIZE = 32, 4, 2, 8
ROWS = {"q": HEADS * SIZE, "k": GROUPS * SIZE, "v": GROUPS * SIZE}
FAST = ["trainer=cpu", "trainer.precision=32-true"]


def drawn(seed: int, out: int, fan_in: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(RANK, fan_in, generator=generator)
    return a, 0.3 * torch.randn(out, RANK, generator=generator)


def with_updates(model, updates: dict[str, Tensor]) -> Tensor:
    """Logits of a model whose weights have dense updates added."""
    for name, update in updates.items():
        with torch.no_grad():
            model.get_submodule(name).weight += update
    return logits(model)


def imported(source, output, tiny_llama, *more, **settings):
    import_adapter(
        source,
        output,
        ["task=lm", f"model.name_or_path='{tiny_llama}'", *FAST, *more],
        **settings,
    )
    return output


def same_everywhere(base, folder, expected) -> None:
    assert not torch.allclose(logits(base()), expected, atol=1e-2)
    for found in (
        logits(load_adapter(base(), folder).model),
        logits(peft.PeftModel.from_pretrained(base(), folder)),
        logits(load_trained(folder).model),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_import_of_kohya_files_keeps_outputs(base, tiny_llama, tmp_path):
    tensors, updates = {}, {}
    layers = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    for seed, (name, alpha) in enumerate(zip(layers, (2.0, None), strict=True)):
        a, b = drawn(seed, *base().get_submodule(name).weight.shape)
        key = "lora_te_" + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        updates[name] = (ALPHA if alpha is None else alpha) / RANK * b @ a
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(UserError, match="holds no alpha"):
        read_layout(tmp_path / "k.safetensors", base())
    folder = imported(tmp_path / "k.safetensors", tmp_path / "new", tiny_llama, alpha=ALPHA)
    same_everywhere(base, folder, with_updates(base(), updates))


@pytest.mark.parametrize(
    ("a", "b", "name"),
    [
        (".lora_down.weight", ".lora_up.weight", "lora_te_model_layers_{}_self_attn_q_proj"),
        (".lora_A", ".lora_B", "transformer.h.{}.attn.proj"),
        (".lora_a.weight", ".lora_b.weight", "layers.{}.attn.output_proj"),
    ],
)
def test_read_layout_of_half_a_pair_is_refused(a, b, name, base, tmp_path):
    """Of a layer that the model has, and of one that it does not have."""
    down, up = drawn(0, HIDDEN, HIDDEN)
    for lost, layer in ((a, 1), (b, 1), (a, 9)):
        tensors = {name.format(0) + a: down, name.format(0) + b: up}
        tensors |= {name.format(layer) + a: down.clone(), name.format(layer) + b: up.clone()}
        del tensors[name.format(layer) + lost]
        save_file(tensors, tmp_path / "half.safetensors")
        with pytest.raises(UserError, match=f"but no {re.escape(name.format(layer) + lost)}"):
            read_layout(tmp_path / "half.safetensors", base(), alpha=ALPHA)


@pytest.mark.parametrize("parts", ["qkv", "qv", "k"])
def test_import_of_litgpt_files_keeps_outputs(parts, base, tiny_llama, tmp_path):
    pairs = {part: drawn(ord(part), ROWS[part], HIDDEN) for part in parts}
    down = drawn(1, HIDDEN, 64)
    head = drawn(2, base().config.vocab_size, HIDDEN)
    padded = torch.cat([head[1], torch.ones(5, RANK)])  # to a rounder vocabulary
    tensors = {
        "transformer.h.1.attn.qkv.lora_A": torch.cat([pairs[part][0] for part in parts]),
        "transformer.h.1.attn.qkv.lora_B": torch.cat([pairs[part][1] for part in parts]),
        "transformer.h.0.mlp.proj.lora_A": down[0],
        "transformer.h.0.mlp.proj.lora_B": down[1],
        "lm_head.lora_A": head[0],
        "lm_head.lora_B": padded,
    }
    save_file(tensors, tmp_path / "l.safetensors")
    names = {f"model.layers.1.self_attn.{part}_proj": pair for part, pair in pairs.items()}
    names |= {"model.layers.0.mlp.down_proj": down, "lm_head": head}
    expected = with_updates(base(), {name: ALPHA / RANK * b @ a for name, (a, b) in names.items()})
    if parts != "qkv":
        with pytest.raises(UserError, match=f"adapters for {len(parts)} of q, k and v"):
            read_layout(tmp_path / "l.safetensors", base(), alpha=ALPHA)
    folder = imported(
        tmp_path / "l.safetensors", tmp_path / "new", tiny_llama, alpha=ALPHA, parts=list(parts)
    )
    same_everywhere(base, folder, expected)


def rotated_in_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary positions as torchtune has them: each two neighbours of a head are one plane."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = [even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()]
    return torch.stack(turned, dim=-1).flatten(-2)


def rotated_in_halves(x: Tensor, angle: Tensor) -> Tensor:
    """As transformers' Llama has them: a plane has one coordinate in each half of a head."""
    first, second = x.chunk(2, dim=-1)
    turned = [
        first * angle.cos() - second * angle.sin(),
        second * angle.cos() + first * angle.sin(),
    ]
    return torch.cat(turned, dim=-1)


def test_import_of_torchtune_files_keeps_attention_scores(base, tiny_llama, tmp_path):
    q, k, up = drawn(0, ROWS["q"], HIDDEN), drawn(1, ROWS["k"], HIDDEN), drawn(2, 64, HIDDEN)
    tensors = {}
    for name, (a, b) in {"attn.q_proj": q, "attn.k_proj": k, "mlp.w3": up}.items():
        key = f"layers.0.{name}"
        tensors |= {f"{key}.lora_a.weight": a, f"{key}.lora_b.weight": b}
    save_file(tensors, tmp_path / "t.safetensors")
    found = read_layout(tmp_path / "t.safetensors", base(), alpha=ALPHA)
    updates = {name: update.dense() for name, update in found.items()}
    assert set(updates) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.up_proj",
    }
    torch.testing.assert_close(updates["model.layers.0.mlp.up_proj"], 2.0 * up[1] @ up[0])
    # The scores of attention are what the order of rows must not change.
    x, angle = torch.randn(7, HIDDEN), torch.rand(SIZE // 2)
    theirs = [
        rotated_in_pairs((x @ (2.0 * b @ a).T).unflatten(-1, (-1, SIZE)), angle * place)
        for place, (a, b) in ((3, q), (5, k))
    ]
    ours = [
        rotated_in_halves((x @ updates[name].T).unflatten(-1, (-1, SIZE)), angle * place)
        for place, name in (
            (3, "model.layers.0.self_attn.q_proj"),
            (5, "model.layers.0.self_attn.k_proj"),
        )
    ]
    theirs_scores, our_scores = (torch.einsum("nhd,mgd->nhmg", *pair) for pair in (theirs, ours))
    torch.testing.assert_close(our_scores, theirs_scores, rtol=1e-4, atol=1e-4)
    folder = imported(tmp_path / "t.safetensors", tmp_path / "new", tiny_llama, alpha=ALPHA)
    same_everywhere(base, folder, with_updates(base(), updates))


def test_import_of_a_peft_classifier_keeps_scores(tiny_bert, tmp_path):
    """Base, task and head come with PEFT's folder; the names of the classes do not."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    theirs.save_pretrained(tmp_path / "peft")
    with pytest.raises(UserError, match=r"task\.labels="):
        import_adapter(tmp_path / "peft", tmp_path / "new", FAST)
    import_adapter(tmp_path / "peft", tmp_path / "new", [*FAST, "task.labels=[a,b,c]"])
    module = load_trained(tmp_path / "new")
    row = Predictor(module)([{"text": "one two three"}])[0]
    batch = module.tokenizer("one two three", return_tensors="pt")
    with torch.no_grad():
        expected = theirs.eval()(**batch).logits.softmax(-1)[0]
    assert list(row["scores"]) == ["a", "b", "c"]
    torch.testing.assert_close(
        torch.tensor(list(row["scores"].values())), expected, rtol=0, atol=2e-6
    )
    with pytest.raises(
        UserError, match="task=lm: is for CAUSAL_LM, but the adapter is for SEQ_CLS"
    ):
        import_adapter(tmp_path / "peft", tmp_path / "other", [*FAST, "task=lm"])


def test_import_without_the_head_of_its_task_is_refused(tiny_bert, tmp_path):
    name = "bert.encoder.layer.0.attention.self.query"
    a, b = drawn(0, HIDDEN, HIDDEN)
    key = "lora_te_" + name.replace(".", "_")
    save_file(
        {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}, tmp_path / "k.safetensors"
    )
    own = ["task=classification", f"model.name_or_path='{tiny_bert}'", "task.labels=[a,b]", *FAST]
    with pytest.raises(UserError, match="holds no classifier"):
        import_adapter(tmp_path / "k.safetensors", tmp_path / "new", own, alpha=ALPHA)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def run(trained_run):
    return trained_run()


def test_import_of_the_best_checkpoint_equals_the_adapter_of_the_run(run, run_cli, tmp_path):
    """The best checkpoint of a run gives the adapter that the run has left, to the byte."""
    [best] = (run / "checkpoints").glob("best-*.ckpt")
    status, _, err = run_cli("import", f"source={best}", f"output={tmp_path / 'new'}")
    assert status == 0, err
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    ours, theirs = (
        json.loads((folder / "lora_lightning.json").read_text())
        for folder in (tmp_path / "new", run / "adapter")
    )
    for part in ("task_state", "base_fingerprint"):
        assert ours[part] == theirs[part]
    assert ours["settings"]["data"] == theirs["settings"]["data"]


def test_export_merged_equals_merge(run, run_cli, tmp_path):
    adapter = f"adapter={run / 'adapter'}"
    status, out, err = run_cli("export", adapter, f"output={tmp_path / 'a'}", "format=merged")
    assert status == 0, err
    assert "largest logit gap" in out
    assert run_cli("merge", adapter, f"output={tmp_path / 'b'}")[0] == 0
    weights = "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()
