"""Runs with layers that no gradient reaches: left out, or reported by check and train alike."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.data import make_rows, write_jsonl
from helpers.models import logits
from lora_lightning.lora import load_adapter


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
def test_all_linear_reports_and_skips_unreached_layers(name, said, arguments, folders, run_cli):
    """All that a run stores has moved from where it began, and PEFT loads a Mamba's adapter."""
    status, out, err = run_cli(*arguments("check", name))
    assert status == 0, err
    assert re.search(said, out), out
    status, out, err = run_cli(*arguments("train", name))
    assert status == 0, err
    stored = load_file("train/adapter/adapter_model.safetensors")
    moved = [tensor.any() for key, tensor in stored.items() if "lora_B" in key]
    assert all(moved)
    assert len(moved) == {"gemma3": 14, "mamba": 2}[name]
    if name == "mamba":
        base = AutoModelForCausalLM.from_pretrained(folders["mamba"]).eval()
        ours = load_adapter(copy.deepcopy(base), "train/adapter").model
        theirs = peft.PeftModel.from_pretrained(base, "train/adapter")
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


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
def test_unreached_targets_raise_the_same_in_check_and_train(
    name, targets, message, arguments, run_cli
):
    """Named targets are taken; the first backward pass shows whether they act."""
    told = []
    for verb in ("check", "train"):
        status, _, err = run_cli(*arguments(verb, name, f"lora.targets={targets}"))
        assert status == 2
        assert re.search(message, " ".join(err.split()))
        told.append(" ".join(err.split()))
    assert told[0].split("error:")[-1] == told[1].split("error:")[-1]
