"""Adapters for other engines: an engine that reads r and alpha alone computes what we compute."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models import logits, random_adapter_on
from lora_lightning.adapters.export import engine_problems, write_canonical
from lora_lightning.lora import (
    UserError,
    load_adapter,
    save_adapter,
)
from lora_lightning.utils.folder_swap import MARK

PATTERNS = {
    "rank": 4,
    "alpha": 6,
    "rank_pattern": {"q_proj": 7, "down_proj": 1},
    "alpha_pattern": {"v_proj": 20},
}


def stored(base, folder, **settings):
    return save_adapter(random_adapter_on(base(), std=0.2, **settings), folder)


def read_by_rule(base, folder) -> torch.Tensor:
    """The outputs of an engine that reads r, lora_alpha and use_rslora, as vLLM and LoRAX do."""
    raw = json.loads((folder / "adapter_config.json").read_text())
    root = math.sqrt(raw["r"]) if raw["use_rslora"] else raw["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    model = base()
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            with torch.no_grad():
                model.get_submodule(module).weight += raw["lora_alpha"] / root * (b @ a)
    return logits(model)


@pytest.mark.parametrize("rslora", [False, True])
def test_write_canonical_keeps_outputs_for_engines_and_peft(rslora, base, tmp_path):
    source = stored(base, tmp_path / "source", use_rslora=rslora, **PATTERNS)
    expected = logits(load_adapter(base(), source).model)
    assert not torch.allclose(read_by_rule(base, source), expected, atol=1e-2)

    rank, rounding = write_canonical(source, tmp_path / "new")
    assert rank == 7
    assert rounding < 1e-7
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(read_by_rule(base, tmp_path / "new"), expected, **close)
    ours = logits(load_adapter(base(), tmp_path / "new").model)
    theirs = logits(peft.PeftModel.from_pretrained(base(), tmp_path / "new"))
    torch.testing.assert_close(ours, expected, **close)
    torch.testing.assert_close(theirs, expected, **close)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_write_canonical_of_a_16_bit_file_rounds_in_fp32(kind, base, tmp_path):
    source = stored(base, tmp_path / "source", **PATTERNS)
    path = source / "adapter_model.safetensors"
    save_file({name: tensor.to(kind) for name, tensor in load_file(path).items()}, path)
    expected = logits(load_adapter(base(), source).model)
    assert 0 < write_canonical(source, tmp_path / "new")[1] < 1e-7
    for model in (
        load_adapter(base(), tmp_path / "new").model,
        peft.PeftModel.from_pretrained(base(), tmp_path / "new"),
    ):
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


def test_write_canonical_of_a_canonical_adapter_keeps_its_bytes(base, tmp_path):
    source = stored(base, tmp_path / "source", rank=3, alpha=5)
    assert write_canonical(source, tmp_path / "new") == (3, 0.0)
    name = "adapter_model.safetensors"
    assert (source / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "vllm", "lorax"),
    [
        ({"rank": 8}, "", ""),
        ({"rank": 8, "use_rslora": True, "init": "pissa"}, "", ""),
        (PATTERNS, "ranks and alphas of single modules", "ranks and alphas of single modules"),
        ({"use_dora": True}, "DoRA", "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules (lm_head)", "modules (lm_head)"),
        ({"rank": 600, "targets": ["q_proj"]}, "rank 600 is above the maximum", ""),
        ({"layers": [1]}, "", "mlp.down_proj, mlp.gate_proj"),
        ({"targets": ["embed_tokens", "q_proj"]}, "", "adapters on embeddings"),
    ],
)
def test_engine_problems_name_each_broken_rule(settings, vllm, lorax, base, tmp_path):
    folder = stored(base, tmp_path / "a", **settings)
    for engine, expected in (("vllm", vllm), ("lorax", lorax)):
        found = engine_problems(folder, engine)
        assert len(found) == bool(expected), found
        assert expected in "; ".join(found)


def test_export_command_checks_writes_or_names_the_mistake(base, tmp_path, run_cli):
    source = stored(base, tmp_path / "source", **PATTERNS)
    where = f"adapter={source}"
    status, out, err = run_cli("export", where, "check=vllm,lorax")
    assert status == 2
    assert "vllm: ranks and alphas of single modules are ignored" in out
    assert "is not supported by vllm, lorax" in " ".join(err.split())
    output = tmp_path / "new"
    arguments = ("export", where, f"output={output}", "format=canonical", "check=vllm,lorax")
    status, out, err = run_cli(*arguments)
    assert status == 0, err
    assert f"{output}: rank 7 and one alpha" in out
    assert "vllm: takes it" in out
    no = f"output={tmp_path / 'no'}"
    status, out, err = run_cli("export", where, no, "check=vllm")
    assert (status, (tmp_path / "no").exists()) == (2, False)
    assert "vllm: ranks and alphas of single modules" in out
    assert "is not supported by vllm, see above. Nothing was written." in " ".join(err.split())
    status, out, _ = run_cli("export", where, f"output={tmp_path / 'plain'}")
    assert status == 0
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", MARK}
    for arguments, message in (
        ([where], "export requires output=DIR, or check="),
        ([where, "check=vlm"], "Did you mean 'vllm'"),
        ([where, "format=canon", f"output={output}"], "Did you mean 'canonical'"),
        ([where, "fromat=peft"], "Did you mean 'format'"),
    ):
        status, _, err = run_cli("export", *arguments)
        assert status == 2
        assert message in " ".join(err.split())


def test_engine_problems_of_an_encoder_decoder_name_it(base, tmp_path):
    folder = stored(base, tmp_path / "a", rank=8)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "SEQ_2_SEQ_LM"}))
    for engine in ("vllm", "lorax"):
        assert "encoder-decoder" in "; ".join(engine_problems(folder, engine))


def test_write_canonical_of_dora_is_refused(base, tmp_path):
    folder = stored(base, tmp_path / "a", use_dora=True)
    with pytest.raises(UserError, match="DoRA is not supported here"):
        write_canonical(folder, tmp_path / "new")
