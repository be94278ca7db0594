"""Whole runs of tasks whose target is text, from the command line."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from helpers.data import write_jsonl
from helpers.runs import result_of

WORDS = "good bad fine poor lovely awful slow quick warm cold cheap dear clean dirty".split()
NAMES = ("film", "food", "hotel", "staff", "room", "story", "price")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Sources whose last word decides the target: it can be learned by heart."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "document": " ".join(["the"] * (1 + i % 4) + [NAMES[i % 7]]),
            "summary": "lovely and good" if i % 7 < 4 else "bland",
        }
        for i in range(84)
    ]
    write_jsonl(path, rows)
    return path


@pytest.fixture(scope="module")
def loud_llama(tiny_llama, tmp_path_factory) -> Path:
    """tiny_llama with a head whose logits are large enough for a frozen head to be of use."""
    folder = tmp_path_factory.mktemp("loud_llama")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.lm_head.weight.data *= 25
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(trained_run, loud_llama, tiny_t5, pairs):
    """A function that returns the run of a model by its name."""
    folders = {"llama": loud_llama, "t5": tiny_t5}

    def run(name: str, *more: str) -> Path:
        return trained_run(
            *("task=summarization", 'task.prompt="{source}"', "task.generation.max_new_tokens=6"),
            *(f"model.name_or_path={folders[name]}", f"data.train={pairs}", "test_before=true"),
            *("trainer.max_epochs=12", "optim.lr=1e-2", "lora.rank=4", *more),
        )

    return run


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_run_learns_and_measures_generated_text(trained, name):
    result = result_of(trained(name))
    assert result["test/rougeL"] > result["before"]["test/rougeL"] + 0.3
    assert result["test/perplexity"] < result["before"]["test/perplexity"] / 3
    assert result["objective"] == result["val/loss"]
    assert result["val/perplexity"] == pytest.approx(math.exp(result["val/loss"]), rel=1e-4)
    assert 0.5 < result["val/token_accuracy"] <= 1
    peft = json.loads((trained(name) / "adapter" / "adapter_config.json").read_text())
    assert peft["task_type"] == {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[name]


def test_samples_are_kept_by_step(trained):
    run = trained("llama")
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    steps = sorted({sample["step"] for sample in samples})
    assert len(steps) == 12
    assert len(samples) == 8 * len(steps)
    last = [sample for sample in samples if sample["step"] == steps[-1]]
    assert sum(sample["prediction"] == sample["target"] for sample in last) >= 6
    assert all(sample["input"].startswith("the ") for sample in samples)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_predict_evaluate_and_merge(trained, name, run_cli, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trained(name)
    adapter = f"adapter={run / 'adapter'}"
    status, alone, err = run_cli("predict", adapter, "text=the the film")
    assert status == 0, err
    assert run_cli("predict", adapter, f"input={pairs}", "output=out.jsonl")[0] == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(rows) == 84
    right = [row["prediction"]["generated"] == row["summary"] for row in rows]
    assert sum(right) > 60
    by_source = {row["document"]: row["prediction"]["generated"] for row in rows}
    # Before it there is what the run has printed, where it was made for this test.
    assert alone.strip().splitlines()[-1] == by_source["the the film"]
    status, out, err = run_cli("evaluate", adapter, f"data.test={pairs}", "task.generate_rows=-1")
    assert status == 0, err
    exact = json.loads(out)
    assert exact["rows"] == 84
    assert exact["test/rougeL"] >= sum(right) / 84 - 1e-6
    status, out, err = run_cli("merge", adapter, "output=merged")
    assert status == 0, err
    assert float(out.split(":")[-1]) < 1e-4
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    merged = auto.from_pretrained("merged").eval()
    tokenizer = AutoTokenizer.from_pretrained("merged")
    ids = tokenizer(rows[5]["document"], return_tensors="pt")
    ids.pop("token_type_ids", None)
    text = tokenizer.decode(
        merged.generate(**ids, max_new_tokens=6, do_sample=False)[0][
            0 if name == "t5" else ids["input_ids"].shape[1] :
        ],
        skip_special_tokens=True,
    )
    assert text.strip() == rows[5]["prediction"]["generated"]


@pytest.mark.parametrize(
    ("name", "more"),
    [("llama", []), ("t5", []), ("llama", ["model.quantization=nf4"])],
    ids=["decoder", "encoder-decoder", "nf4"],
)
def test_a_dora_adapter_merges(trained, name, more, run_cli, tmp_path, monkeypatch):
    """What is written gives the logits of the adapter, by merge and by export."""
    monkeypatch.chdir(tmp_path)
    run = trained(name, "lora.use_dora=true", "trainer.max_epochs=1", *more)
    for command in (["merge"], ["export", "format=merged"]):
        status, out, err = run_cli(*command, f"adapter={run / 'adapter'}", f"output={command[0]}")
        assert status == 0, err
        gap = re.search(r"gap between adapter and merged model.*: (\S+)$", out, re.MULTILINE)
        assert float(gap[1]) < 1e-4
    first, second = (load_file(f"{folder}/model.safetensors") for folder in ("merge", "export"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    base = load_file(Path(config["base_model_name_or_path"]) / "model.safetensors")
    assert max((first[key] - base[key]).abs().max() for key in base) > 1e-3


def test_predict_goes_on_after_an_interruption(trained, run_cli, pairs, tmp_path, monkeypatch):
    """Stopped by Ctrl-C after some rows, the same call ends with the output of one that was not."""
    from lora_lightning.inference.predictor import Predictor

    monkeypatch.chdir(tmp_path)
    command = ["predict", f"adapter={trained('llama') / 'adapter'}", f"input={pairs}"]
    assert run_cli(*command, "output=whole.jsonl", "data.batch_size=2")[0] == 0
    asked = []
    answer = Predictor.__call__

    def interrupted(self, rows, *, first=1):
        asked.append(first)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(self, rows, first=first)

    monkeypatch.setattr(Predictor, "__call__", interrupted)
    status, _, err = run_cli(*command, "output=part.jsonl", "data.batch_size=2")
    assert status == 130
    assert "The same command resumes" in err
    assert not Path("part.jsonl").exists()
    (partial,) = Path().glob("part.jsonl.*.partial")
    written = partial.read_text()
    assert len(written.splitlines()) == 32
    partial.write_text(written[:-25])  # as a kill in mid-line would leave it
    assert run_cli(*command, "output=part.jsonl", "data.batch_size=2")[0] == 0
    assert asked[3] == 17, "whole groups are kept, the torn one is done again"
    assert Path("part.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not partial.exists()


def test_chat_answers_each_line(trained, run_cli, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the film\nthe price\n\nnever read\n"))
    status, out, err = run_cli("chat", f"adapter={trained('llama') / 'adapter'}")
    assert status == 0, err
    assert [line.strip() for line in out.splitlines()] == ["lovely and good", "bland"]


def test_chat_without_a_standard_input_ends(trained, run_cli, monkeypatch, capsys):
    """As cron, and `<&-` in a shell, start it."""
    adapter = trained("llama") / "adapter"
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", None)
    assert run_cli("chat", f"adapter={adapter}") == (0, "", "")


def test_chat_of_a_conversation(tmp_path, run_cli, loud_llama, chat_llama, fast, monkeypatch):
    """The model sees the whole conversation, in the template that it was trained with."""
    from lora_lightning.tasks.chat import InstructTask

    folder = tmp_path / "model"
    shutil.copytree(loud_llama, folder)
    AutoTokenizer.from_pretrained(chat_llama).save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    talks = [
        {"prompt": f"{word} food ?", "completion": ("very good .", "bland")[i % 2]}
        for i, word in enumerate(WORDS)
    ] * 6
    rows.write_text("".join(json.dumps({**t, "n": i}) + "\n" for i, t in enumerate(talks)))
    status, _, err = run_cli(
        "train",
        *fast,
        "task=instruct",
        "task.generation.max_new_tokens=8",
        f"model.name_or_path={folder}",
        f"data.train={rows}",
        f"data.val={rows}",
        "data.test_fraction=0",
        f"output_dir={tmp_path / 'run'}",
        "optim.lr=1e-2",
        "trainer.max_epochs=15",
        "callbacks.early_stopping=null",
    )
    assert status == 0, err
    result = result_of(tmp_path / "run")
    assert result["val/rougeL"] > 0.4
    assert result["val/perplexity"] < 2
    seen = []
    render = InstructTask.render

    def watched(self, messages, *, targets=True):
        if not targets:
            seen.append([m["content"] for m in messages])
        return render(self, messages, targets=targets)

    monkeypatch.setattr(InstructTask, "render", watched)
    monkeypatch.setattr("sys.stdin", io.StringIO("good food ?\ncold food ?\n/reset\nbad food ?\n"))
    status, out, err = run_cli("chat", f"adapter={tmp_path / 'run' / 'adapter'}")
    assert status == 0, err
    answers = [line.strip() for line in out.splitlines()]
    assert answers[0] in ("very good .", "bland")
    assert seen == [
        ["good food ?"],
        ["good food ?", answers[0], "cold food ?"],
        ["bad food ?"],
    ]


def test_chat_with_a_classifier_is_refused(run_cli, tiny_bert, rows_jsonl, fast, tmp_path):
    run = tmp_path / "run"
    settings = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"]
    assert run_cli("train", *fast, *settings, f"output_dir={run}")[0] == 0
    status, _, err = run_cli("chat", f"adapter={run / 'adapter'}")
    assert status == 2
    assert "chat: requires a task that writes text" in err


def test_packed_training_gives_the_same_adapter(trained):
    folders = [
        trained("llama", "trainer.max_epochs=2", f"data.packing={on}") for on in ("true", "false")
    ]
    packed, padded = (load_file(f / "adapter" / "adapter_model.safetensors") for f in folders)
    for name, tensor in packed.items():
        torch.testing.assert_close(tensor, padded[name], atol=2e-4, rtol=1e-3)
    results = [result_of(folder) for folder in folders]
    assert results[0]["tokens"] == results[1]["tokens"]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_check_shows_what_is_learned(name, run_cli, tiny_llama, tiny_t5, pairs, tmp_path):
    folder = {"llama": tiny_llama, "t5": tiny_t5}[name]
    status, out, err = run_cli(
        "check",
        "task=summarization",
        "task.generation.max_new_tokens=6",
        f"model.name_or_path={folder}",
        f"data.train={pairs}",
        f"output_dir={tmp_path / 'o'}",
    )
    assert status == 0, err
    assert re.search(r"\[(lovely and good|bland) ?</s>\]", out)
    assert "All checks passed." in out


def test_lm_run(tmp_path, run_cli, loud_llama, fast):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the film was {w} and {v} .\n" for w in WORDS for v in WORDS[:4]))
    status, _, err = run_cli(
        "train",
        *fast,
        "task=lm",
        f"model.name_or_path={loud_llama}",
        f"data.train={text}",
        "data.max_length=12",
        "task.generation.max_new_tokens=4",
        "data.packing=true",
        f"output_dir={tmp_path / 'run'}",
        "optim.lr=1e-2",
        "trainer.max_epochs=15",
        "test_before=true",
    )
    assert status == 0, err
    result = result_of(tmp_path / "run")
    assert result["test/perplexity"] < result["before"]["test/perplexity"] / 4
    assert "test/rougeL" not in result
    status, out, err = run_cli(
        "predict",
        f"adapter={tmp_path / 'run' / 'adapter'}",
        "text=the film",
        "task.generation.do_sample=false",
        "data.max_length=100",
    )
    assert status == 0, err
    assert out.strip()


def test_packing_a_classifier_is_refused(run_cli, tiny_bert, rows_jsonl, tmp_path):
    status, _, err = run_cli(
        "train",
        f"model.name_or_path={tiny_bert}",
        f"data.train={rows_jsonl}",
        "data.packing=true",
        f"output_dir={tmp_path / 'o'}",
    )
    assert status == 2
    assert "data.packing=true: is not supported" in err
    assert not (tmp_path / "o").exists()
