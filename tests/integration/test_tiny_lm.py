"""The language model that ships with the package, and the tasks that run on it by themselves."""

from __future__ import annotations

import json
import math
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.data import write_jsonl
from helpers.runs import result_of
from lora_lightning.config.compose import compose_config
from lora_lightning.data.docstrings import build_docstrings
from lora_lightning.models.resolve import resolve

NAME = "pkg://lora_lightning/embedded/tiny_lm"
QUIET = [
    "callbacks.progress_bar=null",
    "callbacks.rich_summary=null",
    "trainer=cpu",
    "trainer.precision=32-true",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(resolve(NAME))


def test_size_and_type(folder):
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    tensors = load_file(weights)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert 2e6 <= sum(tensor.numel() for tensor in tensors.values()) <= 4e6
    assert (folder / "README.md").is_file()


def test_tokenizer_keeps_texts_and_sets_one_bos(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 4096
    text = "Return  a `dict`.\n\n    >>> f(x=1, y='é')\n\t{}  # 12345\n"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 == ids[:1].count(tokenizer.bos_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_it_predicts_docstrings_that_it_has_never_seen(folder):
    """Of the standard library; against token counts of those very texts, an unfair advantage."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = build_docstrings(Path(sysconfig.get_path("stdlib")))["test"][:60]
    total, tokens = 0.0, []
    for row in rows:
        ids = tokenizer(f"{row['summary']}\n\n{row['document']}")["input_ids"][:512]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        total += F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        tokens += ids[1:]
    counts = torch.bincount(torch.tensor(tokens)).double()
    share = counts[counts > 0] / counts.sum()
    unigram = math.exp(-(share * share.log()).sum())
    assert math.exp(total / len(tokens)) < unigram / 3


@pytest.mark.parametrize("task", ["summarization", "lm"])
def test_tasks_that_write_text_bring_it_and_the_docstrings(task):
    config = compose_config([f"task={task}"])
    assert (config.model.name_or_path, config.data.embedded) == (NAME, "docstrings")
    other = compose_config([f"task={task}", "model=gpt2", "data=dialogsum"])
    assert other.model.name_or_path == "openai-community/gpt2"
    assert (other.data.embedded, other.data.path) == (None, "knkarthick/dialogsum")
    mixed = compose_config(
        ["experiment=llm_classification", f"task={task}", "model.name_or_path=x"]
    )
    assert (mixed.model.name_or_path, mixed.model.dtype) == ("x", "bfloat16")


@pytest.mark.slow
def test_summarization_with_nothing_else_typed(run_cli, tmp_path):
    run = tmp_path / "run"
    limits = [
        "debug=limit",
        "data.limit_train=64",
        "task.generation.max_new_tokens=16",
        f"output_dir={run}",
    ]
    status, out, err = run_cli("train", "task=summarization", *limits, *QUIET)
    assert status == 0, err
    result = result_of(run)
    assert result["baseline"]["name"] == "lead sentence"
    assert f"(lead sentence: {result['baseline']['test/rougeL']:.4f})" in out
    assert result["test/loss"] < result["before"]["test/loss"]
    assert result["test/perplexity"] < result["before"]["test/perplexity"]
    adapter = f"adapter={run / 'adapter'}"
    status, out, err = run_cli("predict", adapter, "text=Words about a function. It returns one.")
    assert status == 0, err
    assert out.strip()


def test_lm_with_nothing_else_typed(run_cli, tmp_path):
    run = tmp_path / "run"
    status, _, err = run_cli("train", "task=lm", "debug=limit", f"output_dir={run}", *QUIET)
    assert status == 0, err
    result = result_of(run)
    assert result["test/loss"] < result["before"]["test/loss"]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert any(sample["prediction"] for sample in samples)


def test_conversations_and_chat(run_cli, tmp_path, monkeypatch):
    """Its tokenizer has a chat template of plain words, so instruct runs on it too."""
    import io

    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(40)]
    data = tmp_path / "talks.jsonl"
    write_jsonl(data, rows)
    run = tmp_path / "run"
    settings = ["task.generation.max_new_tokens=8", "optim.lr=1e-2", f"output_dir={run}"]
    status, _, err = run_cli(
        "train", "task=instruct", "model=tiny_lm", f"data.train={data}", *settings, *QUIET
    )
    assert status == 0, err
    result = result_of(run)
    assert result["test/loss"] < result["before"]["test/loss"] / 2
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 7?\n"))
    status, out, err = run_cli("chat", f"adapter={run / 'adapter'}")
    assert status == 0, err
    assert "It is" in out


@pytest.mark.slow
def test_the_default_summarization_run_gains(run_cli, tmp_path):
    """Over the untouched base by a clear margin, in ROUGE-L and in loss."""
    status, _, err = run_cli(
        "train", "task=summarization", f"output_dir={tmp_path / 'run'}", *QUIET
    )
    assert status == 0, err
    result = result_of(tmp_path / "run")
    assert result["test/rougeL"] > result["before"]["test/rougeL"] + 0.08
    assert result["test/loss"] < result["before"]["test/loss"] - 0.3
