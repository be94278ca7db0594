"""What is left of the base: measured here as plain transformers measure it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from helpers.runs import logged, result_of
from lora_lightning.inference.loading import load_trained

TEXTS = ["good film", "bad", "a thing of two words", "film film film", "awful number"]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def loss_of(model, tokenizer) -> float:
    """Mean over tokens, one text at a time."""
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def test_forgetting_of_a_language_model_is_the_loss_on_other_texts(
    tiny_llama, rows_jsonl, texts, run_cli, fast, tmp_path
):
    run = tmp_path / "run"
    status, out, err = run_cli(
        *(
            "train",
            "task=lm",
            "task.generation.max_new_tokens=8",
            *fast,
            f"model.name_or_path={tiny_llama}",
        ),
        *(f"data.train={rows_jsonl}", f"output_dir={run}", "optim.lr=0.02"),
        f"callbacks.retention.texts={texts}",
    )
    assert status == 0, err
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    first, *_, last = logged(run, "val/retained_loss")
    base = loss_of(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), tokenizer)
    assert math.isclose(first, base, rel_tol=1e-5)
    trained = loss_of(load_trained(run / "adapter").model, tokenizer)
    assert abs(trained - base) > 0.01
    assert math.isclose(last, trained, rel_tol=1e-4)
    result = result_of(run)
    assert math.isclose(result["val/retained_loss"], trained, rel_tol=1e-4)
    assert math.isclose(result["before"]["val/retained_loss"], base, rel_tol=1e-5)
    told = f"{base:.4f} -> {result['val/retained_loss']:.4f}"
    assert f"retained_loss: {told}" in out
    assert (
        f"| val/retained_loss | {told.replace(' -> ', ' | ')} |"
        in (run / "adapter" / "README.md").read_text()
    )


def similarities(model, tokenizer) -> torch.Tensor:
    means = []
    for text in TEXTS:
        with torch.no_grad():
            means.append(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0))
    pairs = [(a, b) for i, a in enumerate(means) for b in means[i + 1 :]]
    return torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in pairs])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_forgetting_of_an_encoder_is_the_similarity_of_its_vectors(
    method, tiny_bert, rows_jsonl, texts, run_cli, fast, tmp_path
):
    run = tmp_path / "run"
    status, _, err = run_cli(
        *("train", *fast, f"lora={'full' if method == 'full' else 'default'}"),
        *(f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", f"output_dir={run}"),
        *(f"callbacks.retention.texts={texts}", "optim.lr=0.02", "trainer.max_epochs=2"),
    )
    assert status == 0, err
    found = logged(run, "val/retained_similarity")
    assert math.isclose(found[0], 1.0, abs_tol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    base = similarities(AutoModel.from_pretrained(tiny_bert).eval(), tokenizer)
    trained = similarities(load_trained(run / "adapter").model.bert, tokenizer)
    expected = float(torch.corrcoef(torch.stack([base, trained]))[0, 1])
    assert expected < 0.999
    result = result_of(run)
    assert math.isclose(result["val/retained_similarity"], expected, abs_tol=1e-3)


def test_forgetting_texts_without_a_known_column_are_refused(
    tiny_bert, rows_jsonl, run_cli, fast, tmp_path
):
    path = tmp_path / "other.jsonl"
    path.write_text('{"words": "a"}\n' * 3)
    status, _, err = run_cli(
        *("train", *fast, f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"),
        *(f"output_dir={tmp_path / 'run'}", f"callbacks.retention.texts={path}"),
    )
    assert status == 2
    assert "has no column text" in err
    assert not (tmp_path / "run").exists()
