"""Runs on a quantized base: trained, predicted with, merged."""

from __future__ import annotations

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.models import load_llama, logits
from helpers.runs import result_of
from lora_lightning.data.collators import PaddingCollator
from lora_lightning.inference.loading import load_trained
from lora_lightning.inference.merge import PROBES


def test_quantized_run_predicts_and_merges(fast, tiny_bert, rows_jsonl, tmp_path, run_cli):
    """Train, load on the quantized base, and merge into the base as it was."""
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", *fast]
    where += ["model.quantization=nf4", "trainer.max_epochs=2", "optim.lr=1e-2"]
    run = tmp_path / "run"
    status, _, err = run_cli("train", *where, f"output_dir={run}")
    assert status == 0, err
    module = load_trained(run / "adapter")
    assert type(module.model.bert.encoder.layer[0].attention.self.query.base_layer) is not nn.Linear
    assert result_of(run)["total_parameters"] > 20_000

    status, out, err = run_cli(
        "merge", f"adapter={run / 'adapter'}", f"output={tmp_path / 'merged'}"
    )
    assert status == 0, err
    assert "trained on a base in nf4; merged into the base before quantization" in out
    plain = load_trained(run / "adapter", model={"quantization": None})
    told = float(re.search(r"gap to the adapter on the base in nf4: (\S+)", out).group(1))
    batch = PaddingCollator(0)(
        [{"input_ids": ids} for ids in module.tokenizer(list(PROBES))["input_ids"]]
    )
    with torch.no_grad():
        off = [one.eval().task.logits(one.model, batch) for one in (module, plain)]
    assert told == pytest.approx((off[0] - off[1]).abs().max().item(), rel=0.02)
    assert told > 1e-4
    name = "bert.encoder.layer.0.attention.self.query"
    layer = plain.adapter.layers[name]
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    expected = layer.base_layer.weight + layer.delta_weight()
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.quantization=nf5"], "Did you mean 'nf4'"),
        (["model.quantization=nf4", "lora=full"], "not supported with lora=full"),
        (["model.quantization=int8", "model.compile=layer"], "supported with model.quantization"),
    ],
)
def test_unsupported_quantization_raises(
    settings, message, fast, tiny_bert, rows_jsonl, tmp_path, run_cli
):
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", *fast]
    status, _, err = run_cli("train", *where, *settings, f"output_dir={tmp_path / 'run'}")
    assert status == 2
    assert message in " ".join(err.split())


@pytest.mark.slow
def test_loftq_run_equals_peft_and_merges(tiny_llama, rows_jsonl, run_cli, fast, tmp_path):
    """It trains, PEFT has its logits on the same base, and merged it is the model trained."""
    run = tmp_path / "run"
    status, _, err = run_cli(
        *(
            "train",
            *fast,
            "task=lm",
            "task.generation.max_new_tokens=8",
            "lora=loftq",
            "model.dtype=float32",
        ),
        *("model.quantization=nf4", f"model.name_or_path={tiny_llama}", "optim.lr=0.01"),
        *(f"data.train={rows_jsonl}", f"output_dir={run}"),
    )
    assert status == 0, err
    trained = load_trained(run / "adapter").model
    theirs = peft.PeftModel.from_pretrained(load_llama(tiny_llama, "nf4"), run / "adapter").eval()
    torch.testing.assert_close(logits(trained), logits(theirs), rtol=1e-4, atol=1e-4)

    adapter = f"adapter={run / 'adapter'}"
    status, out, err = run_cli("merge", adapter, f"output={tmp_path / 'merged'}")
    assert status == 0, err
    assert "merged into what LoftQ left of it" in out
    merged = load_llama(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-3, atol=1e-3)
    wrong = peft.PeftModel.from_pretrained(load_llama(tiny_llama), run / "adapter").eval()
    assert (logits(wrong) - logits(trained)).abs().max() > 1e-2

    for arguments in (
        ("predict", adapter, "text=a", "model.quantization=null"),
        ("export", adapter, f"output={tmp_path / 'files'}"),
        ("combine", adapter, "weights=0.5", f"output={tmp_path / 'half'}"),
    ):
        status, _, err = run_cli(*arguments)
        assert status == 2, arguments
        assert "lora.init=loftq" in err
        assert "lora-lightning merge" in err

    again = [
        *("train", *fast, "task=lm", "task.generation.max_new_tokens=8", "model.dtype=float32")
    ]
    again += [f"model.name_or_path={tiny_llama}", f"data.train={rows_jsonl}"]
    again += [f"output_dir={tmp_path / 'other'}"]
    last = f"adapter={run / 'checkpoints' / 'last.ckpt'}"
    for start in (adapter, last):
        for own in (["model.quantization=nf4"], []):
            status, _, err = run_cli(*again, start, *own)
            assert status == 2, (start, own)
            assert "would be missing, or applied twice" in err
    status, _, err = run_cli(*again, last, "lora=loftq", "model.quantization=nf4")
    assert status == 0, err
    status, _, err = run_cli(
        "import", last.replace("adapter", "source"), f"output={tmp_path / 'i'}"
    )
    assert status == 0, err
    sidecar = json.loads((tmp_path / "i" / "lora_lightning.json").read_text())
    assert sidecar["settings"]["lora"]["init"] == "loftq"
