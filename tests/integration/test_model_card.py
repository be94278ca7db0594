"""Model cards: their metadata, numbers, command and code are true."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
import yaml

from helpers.data import make_rows, write_jsonl
from helpers.runs import result_of
from lora_lightning.adapters.combine import combine_adapters
from lora_lightning.adapters.export import write_canonical
from lora_lightning.config.compose import compose_config, config_hash
from lora_lightning.inference.convert import import_adapter
from lora_lightning.inference.loading import load_trained
from lora_lightning.lora import Adapter, LoraConfig, save_adapter


@pytest.mark.parametrize("kind", ["bert", "llama", "full", "loftq"])
def test_card_of_a_run_holds_true_numbers_command_and_code(
    kind, fast, tiny_bert, chat_llama, tmp_path, run_cli
):
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
    (index,) = front["model-index"]
    values = {
        (entry["dataset"]["split"], metric["type"]): metric["value"]
        for entry in index["results"]
        for metric in entry["metrics"]
    }
    splits = {"validation": "val", "test": "test"}
    assert values == {
        (split, name.partition("/")[2]): pytest.approx(result[name], abs=1e-6)
        for split, short in splits.items()
        for name in result
        if name.startswith(f"{short}/")
    }
    assert {entry["dataset"]["name"] for entry in index["results"]} == {"mine.jsonl"}
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
    assert ("Trained on its base in nf4, and fits no other base" in text) == (kind == "loftq")


def test_cards_of_combined_and_canonical_adapters_name_base_rank_and_command(tmp_path, tiny_llama):
    from transformers import AutoModelForCausalLM

    adapter = Adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(rank=2, alpha=6))
    save_adapter(adapter, tmp_path / "a", base_model="org/base", task_type="CAUSAL_LM")
    combine_adapters([tmp_path / "a"] * 2, tmp_path / "two", weights=[0.5, 1.0])
    write_canonical(tmp_path / "a", tmp_path / "canonical")
    for name, command, rank in (
        ("two", f"combine adapter={tmp_path}/a,{tmp_path}/a weights=0.5,1.0 method=cat", 4),
        ("canonical", f"export adapter={tmp_path}/a format=canonical", 2),
    ):
        _, front, text = (tmp_path / name / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(front)["base_model"] == "org/base"
        assert f"lora-lightning {command}" in text
        assert f"| rank | {rank} |" in text
        assert "lora-lightning predict" not in text  # which needs the settings of a run


def test_card_of_an_import_holds_code_and_command_but_no_results(tmp_path, tiny_llama):
    from transformers import AutoModelForCausalLM

    adapter = Adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(rank=2, alpha=6))
    save_adapter(adapter, tmp_path / "a", base_model=str(tiny_llama), task_type="CAUSAL_LM")
    import_adapter(tmp_path / "a", tmp_path / "new", ["task=lm", "trainer=cpu"])
    _, front, text = (tmp_path / "new" / "README.md").read_text().split("---\n", 2)
    assert "model-index" not in yaml.safe_load(front)
    assert f"lora-lightning import source={tmp_path / 'a'} task=lm trainer=cpu" in text
    assert "## Results" not in text
    assert "| stored as | rank 2, alpha 6 |" in text
    names: dict = {}
    code = re.search(r"```python\n(.*?)```", text, flags=re.S).group(1)
    exec(code.replace("THIS_FOLDER", str(tmp_path / "new")), names)
    assert names["model"].peft_config["default"].r == 2
