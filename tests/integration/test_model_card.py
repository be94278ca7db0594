"""The model card of an adapter: its numbers, its command and its code hold."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
import yaml

from helpers.data import make_rows, write_jsonl
from helpers.runs import result_of
from lora_lightning.config.compose import compose_config, config_hash
from lora_lightning.inference.predictor import load_trained


@pytest.mark.parametrize("kind", ["bert", "llama", "full", "loftq"])
def test_card(kind, fast, tiny_bert, chat_llama, tmp_path, run_cli):
    data = tmp_path / "mine.jsonl"
    rows = (
        make_rows(24)
        if kind in ("bert", "full")
        else [{"document": f"a {i}", "summary": "c"} for i in range(24)]
    )
    write_jsonl(data, rows)
    base = chat_llama if kind in ("llama", "loftq") else tiny_bert
    settings = [*fast, f"data.train={data}", f"model.name_or_path={base}"]
    if kind in ("llama", "loftq"):
        settings += ["task=summarization", "task.generation.max_new_tokens=4"]
    if kind == "loftq":
        pytest.importorskip("bitsandbytes")
        settings += ["lora=loftq", "model.quantization=nf4", "lora.rank=3"]
    else:
        settings += ["lora=full"] if kind == "full" else ["lora.use_dora=true", "lora.rank=3"]
    run = tmp_path / "run"
    status, _, err = run_cli("train", *settings, f"output_dir={run}")
    assert status == 0, err
    card = (run / "adapter" / "README.md").read_text()
    result = result_of(run)

    _, front, text = card.split("---\n", 2)
    front = yaml.safe_load(front)
    task = "text-generation" if kind in ("llama", "loftq") else "text-classification"
    assert front["pipeline_tag"] == task
    assert front.get("library_name") == (None if kind == "full" else "peft")
    assert "base_model" not in front  # a folder of this machine
    assert str(data) not in text.replace(f"data.train={data}", "")
    for name in (name for name in result if name.startswith(("val/", "test/"))):
        assert f"| {result[name]:.4f} |" in next(
            line for line in text.splitlines() if line.startswith(f"| {name} |")
        )
    command = re.search(r"```bash\n(lora-lightning train .*)\n```", text).group(1)
    again = compose_config(shlex.split(command)[2:])
    assert config_hash(again) == result["config_hash"]

    code = re.search(r"```python\n(.*?)```", text, flags=re.S)
    assert (code is None) == (kind == "full")
    if code is None:
        return
    names: dict = {}
    exec(code.group(1).replace("THIS_FOLDER", str(run / "adapter")), names)
    ours = load_trained(run / "adapter")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = ours.model(input_ids=ids).logits
        for module in names["model"].modules():
            # bitsandbytes' kernel for some CPUs wants inputs of 64 and more, and these have 32.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        torch.testing.assert_close(names["model"](input_ids=ids).logits, expected)
    assert ("Trained on its base in nf4, and goes on no other" in text) == (kind == "loftq")
