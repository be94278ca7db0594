"""Every trained tensor acts: what no gradient reaches is left out, or refused, the same by all."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from helpers.data import make_rows, write_jsonl
from lora_lightning.lora import Adapter, LoraConfig, UserError
from lora_lightning.lora.target_modules import match_targets


class Windows(nn.Module):
    """Attention that hands its weights to a function, as torchvision's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.mlp = nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.mlp(F.linear(mixed, self.proj.weight, self.proj.bias))


def test_check_gradients_of_uncalled_layers_raises():
    model = nn.Sequential(Windows(), Windows())
    adapter = Adapter(model, LoraConfig(rank=2))
    model(torch.randn(2, 5, 6)).sum().backward()
    with pytest.raises(
        UserError, match=r"8 of 12 .* such as 0\.qkv.*, get no gradient.*exclude=\[qkv,proj\]"
    ):
        adapter.check_gradients()
    adapter.remove()
    adapter = Adapter(model, LoraConfig(rank=2, exclude=["qkv", "proj"]))
    model(torch.randn(2, 5, 6)).sum().backward()
    assert adapter.check_gradients() == []


class Experts(nn.Module):
    """Two experts, of which each row is sent to one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, to):
        return x + self.experts[to](x)


def test_check_gradients_returns_an_expert_without_rows():
    model = Experts()
    adapter = Adapter(model, LoraConfig(rank=2))
    model(torch.randn(3, 4), 1).sum().backward()
    assert adapter.check_gradients() == [f"experts.0.lora_{m}.weight" for m in "AB"]


@pytest.fixture(scope="module")
def folders(tiny_llama, tmp_path_factory):
    """Random models with tiny_llama's tokens: one that takes images too, one of state spaces."""
    from transformers import (
        AutoTokenizer,
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        MambaConfig,
        MambaForCausalLM,
    )

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 2,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 28,
        "patch_size": 14,
    }
    special = {"boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5}
    torch.manual_seed(0)
    images = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **special)
    models = {
        "gemma3": Gemma3ForConditionalGeneration(images),
        "mamba": MambaForCausalLM(
            MambaConfig(
                vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4
            )
        ),
    }
    found = {}
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture
def arguments(folders, fast, tmp_path, monkeypatch):
    """Of a run on one of these models."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": row["text"]} for row in make_rows(60)]
    write_jsonl(tmp_path / "rows.jsonl", rows)

    def of(verb: str, name: str, *more: str) -> list[str]:
        return [
            verb,
            *fast,
            f"model.name_or_path={folders[name]}",
            "task=lm",
            "data.train=rows.jsonl",
            "data.max_length=32",
            "task.generation.max_new_tokens=4",
            "task.blocks=false",
            "data.packing=false",
            f"output_dir={verb}",
            *more,
        ]

    return of


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma3", r"8 linear layers are not adapted \(.*fc1.*\): text does not reach them"),
        ("mamba", r"6 linear layers are not adapted \(mixer.x_proj, .*\): kernels of state space"),
    ],
)
def test_all_linear_skips_unreachable_layers(name, said, arguments, run_cli):
    """And says so; all that a run has stored has moved from where it began."""
    status, out, err = run_cli(*arguments("check", name))
    assert status == 0, err
    assert re.search(said, out), out
    status, out, err = run_cli(*arguments("train", name))
    assert status == 0, err
    stored = load_file("train/adapter/adapter_model.safetensors")
    moved = [tensor.any() for key, tensor in stored.items() if "lora_B" in key]
    assert all(moved)
    assert len(moved) == {"gemma3": 14, "mamba": 2}[name]


def test_mamba_adapter_in_peft_gives_the_same_logits(arguments, folders, run_cli):
    import peft
    from transformers import AutoModelForCausalLM

    from lora_lightning.lora import load_adapter

    assert run_cli(*arguments("train", "mamba"))[0] == 0
    ids = torch.arange(3, 15).view(2, 6)
    base = AutoModelForCausalLM.from_pretrained(folders["mamba"]).eval()
    with torch.no_grad():
        ours = load_adapter(copy.deepcopy(base), "train/adapter").model(input_ids=ids).logits
        theirs = peft.PeftModel.from_pretrained(base, "train/adapter")(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        (
            "gemma3",
            "[q_proj,v_proj]",
            r"4 of 12 trainable tensors, .* get no gradient.* 'lora.exclude=\"model.v",
        ),
        ("mamba", "[in_proj,dt_proj]", r"4 of 8 .*dt_proj.* lora.exclude=\[dt_proj\]"),
        ("mamba", "[in_proj,out_proj]", r"out_proj of a mamba cannot be adapted"),
    ],
)
def test_check_and_train_report_the_same_error(name, targets, message, arguments, run_cli):
    """What is named is taken by its name: the first backward pass tells whether it acts."""
    told = []
    for verb in ("check", "train"):
        status, _, err = run_cli(*arguments(verb, name, f"lora.targets={targets}"))
        assert status == 2
        assert re.search(message, " ".join(err.split()))
        told.append(" ".join(err.split()))
    assert told[0].split("error:")[-1] == told[1].split("error:")[-1]


def test_all_linear_adapts_both_towers_of_clip():
    """CLIP is no language model that takes images too: it has no head on its text."""
    import transformers as tf

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 30, "intermediate_size": 16}
    vision = {**sizes, "intermediate_size": 16, "image_size": 28, "patch_size": 14}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision))
    names = [match.name for match in match_targets(model, LoraConfig())]
    assert {name.partition(".")[0] for name in names} >= {"text_model", "vision_model"}
