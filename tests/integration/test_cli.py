"""The command line: help, composition, prediction, evaluation, merging, preflight, completion."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.data import make_rows, to_jsonl, write_jsonl
from helpers.runs import result_of
from lora_lightning.training.callbacks.progress import ProgressBar


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(trained_run, tiny_llama) -> dict[str, Path]:
    """A run on the tiny encoder, one on the tiny decoder, and a full fine-tuning."""
    more = ["data.test_fraction=0.3", "optim.lr=3e-2", "trainer.max_epochs=3"]
    more.append("callbacks.early_stopping=null")
    kinds = {"bert": [], "llama": [f"model.name_or_path={tiny_llama}"], "full": ["lora=full"]}
    return {name: trained_run(*more, *changes) for name, changes in kinds.items()}


@pytest.fixture
def adapter(runs) -> Path:
    return runs["bert"] / "adapter"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Help ---------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['lora-lightning', '--help']\n"
        "from lora_lightning.cli.main import main; main()\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in ("train", "check", "evaluate", "predict", "merge"):
        assert f"\n  {verb} " in done.stdout
    heavy = {"torch", "lightning", "transformers", "hydra", "datasets", "numpy"}
    assert not heavy & set(re.findall(r"'(\w+)'", done.stderr))


def test_module_is_the_same_command():
    import lora_lightning

    command = [sys.executable, "-m", "lora_lightning"]
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == lora_lightning.__version__
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert helped.stdout.startswith("lora-lightning: ")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["help"], ["predict", "--help"]])
def test_help_of_every_kind(run_cli, arguments):
    assert run_cli(*arguments)[:2] == run_cli("--help")[:2]


def test_train_help_names_groups_and_choices(run_cli):
    status, out, _ = run_cli("train", "--help")
    assert status == 0
    for group, choice in {
        "lora": "full",
        "model": "minilm",
        "data": "files",
        "experiment": "sst2",
        "debug": "fdr",
        "sweep": "rank_alpha",
        "trainer": "ddp",
    }.items():
        assert re.search(rf"^{group}: .*\b{choice}\b", out, re.MULTILINE), out
    assert "train resume=RUN_DIR" in out
    assert not list(Path().iterdir())


def test_cfg_shows_the_config_and_runs_nothing(run_cli):
    from omegaconf import OmegaConf

    status, out, _ = run_cli("train", "--cfg", "job", "lora.rank=3", "trainer=cpu")
    config = OmegaConf.create(out)
    assert status == 0
    assert config.lora.rank == 3
    assert config.trainer.accelerator == "cpu"
    assert not list(Path().iterdir())


def test_config_dir_adds_presets_from_outside_the_package(run_cli, tmp_path):
    preset = tmp_path / "my" / "experiment" / "mine.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("# @package _global_\nlora:\n  rank: 5\n")
    status, out, err = run_cli("train", "--config-dir", "my", "experiment=mine", "--cfg", "job")
    assert status == 0, err
    assert "rank: 5" in out


# Completion ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lora-lightning ", {"train", "check", "evaluate", "predict", "merge"}),
        ("lora-lightning pre", {"predict"}),
        ("lora-lightning predict ", {"adapter=", "text=", "input=", "output="}),
        ("lora-lightning merge ad", {"adapter="}),
        ("lora-lightning train ", {"lora=", "model=", "experiment=", "seed="}),
        ("lora-lightning train lora", {"lora=", "lora."}),
        ("lora-lightning train lora=", {"lora=full", "lora=rslora"}),
        ("lora-lightning check optim.sch", {"optim.scheduler="}),
        ("lora-lightning train experiment=ss", {"experiment=sst2"}),
    ],
)
def test_completion(run_cli, monkeypatch, line, expected):
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    _, out, _ = run_cli("-sc", "query=bash")
    assert expected <= set(out.split())
    word = line.split(" ")[-1]
    assert all(choice.startswith(word) for choice in out.split())


# predict ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a good film",
        'it\'s "lovely", really: 3=3, [not] {bad} (at all)',
        "schön wär's, ${oc.env:HOME} \\ $HOME ~ # ?",
        "text=a output=b",
        "- never again",
    ],
)
def test_predict_takes_the_text_verbatim(run_cli, adapter, text):
    status, out, err = run_cli("predict", f"adapter={adapter}", f"text={text}")
    assert status == 0, err
    row = json.loads(out)
    assert row.keys() == {"text", "prediction"}  # as a line of predict input=FILE
    assert row["text"] == text
    answer = row["prediction"]
    assert answer["label"] in ("negative", "positive")
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert answer["score"] == max(answer["scores"].values())


@pytest.mark.parametrize(
    ("verb", "override", "advice"),
    [
        ("predict text=good", "task.text_column=review", "or read a column of a file: input=FILE"),
        ("predict text=good", "data.batch_size=2", "Leave it out."),
        ("predict text=good", "task.monitor=val/loss", "Leave it out."),
        ("predict text=good", "trainer=cpu", "Leave it out."),
        ("predict text=good", "seed=3", "Leave it out."),
        ("predict text=good", "model.compile=layer", "Leave it out."),
        ("predict input=in.jsonl", "data.limit_test=2", "Leave it out."),
        ("predict input=in.jsonl", "task.label_column=text", "Leave it out."),
        ("evaluate", "trainer.max_epochs=2", "Leave it out."),
        ("evaluate", "lora.rank=2", "Leave it out."),
        ("evaluate", "task.labels=[a,b]", "Leave it out."),
        ("merge output=merged", "data.batch_size=2", "Leave it out."),
    ],
)
def test_override_without_an_effect_is_refused(run_cli, adapter, verb, override, advice):
    Path("in.jsonl").write_text('{"text": "good"}\n')
    status, out, err = run_cli(*verb.split(), f"adapter={adapter}", override)
    assert (status, out) == (2, "")
    assert f"error: {override}: no effect on {verb.split()[0]}" in err
    assert advice in " ".join(err.split())


def test_override_of_the_text_column_decides_what_predict_reads_of_a_file(run_cli, adapter):
    Path("in.jsonl").write_text('{"text": "good", "review": "never again"}\n')
    command = ["predict", f"adapter={adapter}", "input=in.jsonl"]
    default, other = (
        json.loads(run_cli(*command, *more)[1])["prediction"]["scores"]
        for more in ([], ["task.text_column=review"])
    )
    status, out, err = run_cli("predict", f"adapter={adapter}", "text=never again")
    assert status == 0, err
    assert json.loads(out)["prediction"]["scores"] == pytest.approx(other, abs=2e-6)
    assert other != pytest.approx(default, abs=2e-6)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_predict_a_file(run_cli, adapter, runs, suffix):
    rows = [
        {"number": f"{7 * i:05}", "day": "2024-05-01", "text": row["text"]}
        for i, row in enumerate(make_rows(25, seed=5))
    ]
    if suffix == "jsonl":
        content = to_jsonl(rows)
    else:
        lines = [f'{row["number"]},{row["day"]},"{row["text"]}"\n' for row in rows]
        content = "number,day,text\n" + "".join(lines)
    Path(f"in.{suffix}").write_text(content, encoding="utf-8")
    command = ["predict", f"adapter={adapter}", f"input=in.{suffix}"]
    status, out, err = run_cli(*command, "output=out.jsonl", "data.batch_size=4")
    assert (status, out) == (0, "25 rows -> out.jsonl\n"), err
    found = read_lines(Path("out.jsonl"))
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    assert sorted(os.listdir()) == sorted([f"in.{suffix}", "out.jsonl"])

    again = [json.loads(line) for line in run_cli(*command)[1].splitlines()]
    for one, other in zip(again, found, strict=True):  # in batches of another size
        assert (one["number"], one["text"]) == (other["number"], other["text"])
        assert one["prediction"]["label"] == other["prediction"]["label"]
        expected = other["prediction"]["scores"]
        assert one["prediction"]["scores"] == pytest.approx(expected, abs=2e-6)

    from lora_lightning.inference.loading import load_trained
    from lora_lightning.inference.predictor import Predictor, predict_text

    alone = Predictor(load_trained(adapter, device="cpu"))
    for row in found[:8]:
        single = predict_text(alone, row["text"])["prediction"]
        assert single["label"] == row["prediction"]["label"]
        assert single["scores"] == pytest.approx(row["prediction"]["scores"], abs=2e-6)


# evaluate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "full"])
def test_evaluate_gives_the_metrics_of_the_run(run_cli, runs, name):
    result = result_of(runs[name])
    status, out, err = run_cli("evaluate", f"adapter={runs[name] / 'adapter'}", "output=m.json")
    assert status == 0, err
    metrics = json.loads(out)
    expected = {key: value for key, value in result.items() if key.startswith("test/")}
    assert {"test/loss", "test/accuracy", "test/f1", "test/auroc"} == set(expected)
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert metrics["rows"] == 24
    assert json.loads(Path("m.json").read_text()) == metrics


def test_evaluate_uses_one_device_and_loads_onto_it(run_cli, adapter, monkeypatch):
    """Of several GPUs each process would load a copy of the base onto the first."""
    from lora_lightning.inference import evaluate
    from lora_lightning.training import trainer

    asked, places = [], []

    def build(config, **changes):
        asked.append(changes.get("devices", config.trainer.devices))
        return trainer.build_trainer(config, **{**changes, "devices": 1})

    def load(folder, **kwargs):
        places.append(kwargs["device"])
        return own(folder, **kwargs)

    own = evaluate.load_trained
    monkeypatch.setattr(evaluate, "build_trainer", build)
    monkeypatch.setattr(evaluate, "load_trained", load)
    for typed in ([], ["trainer=ddp", "trainer.devices=2"], ["trainer.devices=2"]):
        status, _, err = run_cli(
            "evaluate", f"adapter={adapter}", *typed, "trainer.accelerator=cpu", "data.limit_test=8"
        )
        assert status == 0, err
    assert asked == [1, 2, 2]
    assert places == [torch.device("cpu")] * 3


def test_evaluate_on_other_data(run_cli, adapter):
    from lora_lightning.inference.loading import load_trained
    from lora_lightning.inference.predictor import Predictor

    rows = make_rows(30, seed=9)
    write_jsonl(Path("other.jsonl"), rows)
    status, out, err = run_cli("evaluate", f"adapter={adapter}", "data.test=other.jsonl")
    assert status == 0, err
    predicted = Predictor(load_trained(adapter, device="cpu"))(rows)
    hits = [p["label"] == row["label"] for p, row in zip(predicted, rows, strict=True)]
    assert json.loads(out)["rows"] == 30
    assert json.loads(out)["test/accuracy"] == pytest.approx(sum(hits) / 30)


def test_evaluate_needs_no_training_data(run_cli, fast, tiny_bert, tmp_path, monkeypatch):
    rows, run = make_rows(40), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    own = [{"Body Text": row["text"], "answer": row["label"]} for row in rows]
    write_jsonl(Path("own.jsonl"), own)
    write_jsonl(Path("other.jsonl"), rows)
    train = ["data.train=own.jsonl", "task.text_column=Body Text", "task.label_column=answer"]
    model = f"model.name_or_path={tiny_bert}"
    status, _, err = run_cli("train", *fast, *train, model, f"output_dir={run}")
    assert status == 0, err
    evaluate = ["evaluate", f"adapter={run / 'adapter'}"]
    status, same, err = run_cli(*evaluate, "data.test=own.jsonl")
    assert status == 0, err
    Path("own.jsonl").unlink()
    named = ["task.text_column=text", "task.label_column=label"]
    status, out, err = run_cli(*evaluate, "data.test=other.jsonl", *named)
    assert status == 0, err
    assert json.loads(out) == json.loads(same)
    status, _, err = run_cli(*evaluate, "data.test=other.jsonl")
    assert status == 2
    assert "task.text_column=Body Text: column not found" in err


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_turned_bit_in_a_fully_tuned_model_is_told(run_cli, runs, rows_jsonl, name):
    shutil.copytree(runs["full"] / "adapter", "full")
    content = bytearray(Path("full", name).read_bytes())
    content[content.index(b"version") if name == "config.json" else -5] ^= 1
    Path("full", name).write_bytes(content)
    for command in (["predict", "text=good"], ["evaluate", f"data.test={rows_jsonl}"]):
        status, out, err = run_cli(*command, "adapter=full")
        assert (status, out) == (2, "")
        assert f"full/{name} is damaged, or was changed" in " ".join(err.split())


def test_every_monitor_is_measured(runs):
    from lora_lightning.config.schema import MONITORS

    result = result_of(runs["bert"])
    assert {key for key in result if key.startswith("val/")} == set(MONITORS)


# merge --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_merge_gives_a_plain_model(run_cli, runs, name):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    from lora_lightning.inference.loading import load_trained
    from lora_lightning.inference.merge import PROBES
    from lora_lightning.inference.predictor import Predictor
    from lora_lightning.models.forward import classification_logits

    adapter = runs[name] / "adapter"
    status, out, err = run_cli("merge", f"adapter={adapter}", "output=merged")
    assert status == 0, err
    assert os.listdir() == ["merged"]
    assert "its weights are" not in out
    printed = float(re.search(r"gap .*: (\S+)$", out.strip()).group(1))

    merged = AutoModelForSequenceClassification.from_pretrained("merged").eval()
    tokenizer = AutoTokenizer.from_pretrained("merged")
    assert merged.config.id2label == {0: "negative", 1: "positive"}
    assert not [key for key in merged.state_dict() if "lora" in key or "base_layer" in key]

    module = load_trained(adapter, device="cpu")
    batch = tokenizer(list(PROBES), padding=True, padding_side="right", return_tensors="pt")
    with torch.inference_mode():
        ours = classification_logits(module.model, batch)
        theirs = classification_logits(merged, batch)
    assert (ours - theirs).abs().max().item() == pytest.approx(printed, abs=2e-7)
    assert printed < 1e-5
    # That the adapter does something, or the comparison would be empty:
    with torch.inference_mode(), module.adapter.disabled():
        assert (classification_logits(module.model, batch) - ours).abs().max() > 1e-2

    rows = make_rows(12, seed=3)
    classify = pipeline("text-classification", model=merged, tokenizer=tokenizer, device="cpu")
    predictions = Predictor(module)(rows)
    for row, mine in zip(rows, predictions, strict=True):
        (found,) = classify([row["text"]])
        assert found["label"] == mine["label"]
        assert found["score"] == pytest.approx(mine["score"], abs=2e-6)


def test_merge_replaces_an_earlier_merged_model(run_cli, adapter):
    command = ["merge", f"adapter={adapter}", "output=merged"]
    assert run_cli(*command)[0] == 0
    first = {path.name: path.read_bytes() for path in Path("merged").iterdir()}
    assert run_cli(*command)[0] == 0
    assert {path.name: path.read_bytes() for path in Path("merged").iterdir()} == first
    status, out, err = run_cli(*command, "model.dtype=bfloat16")
    assert status == 0, err
    assert "its weights are bfloat16, as those of the base; for others: model.dtype=" in out
    assert load_file("merged/model.safetensors").popitem()[1].dtype == torch.bfloat16
    assert os.listdir() == ["merged"]


def test_merge_of_a_fully_tuned_model_is_refused(run_cli, runs):
    status, _, err = run_cli("merge", f"adapter={runs['full'] / 'adapter'}", "output=merged")
    assert status == 2
    assert "nothing to merge" in err
    assert not os.listdir()


# check --------------------------------------------------------------------------------------


def check_report(run_cli, model, rows, fast, *more: str) -> str:
    where = [f"model.name_or_path={model}", f"data.train={rows}", "output_dir=a/b"]
    status, out, err = run_cli("check", *fast, *where, *more)
    assert status == 0, err
    assert not list(Path().iterdir())
    return out


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_llama"])
def test_check_shows_what_a_run_would_do(run_cli, request, rows_jsonl, fast, name):
    model = request.getfixturevalue(name)
    out = check_report(run_cli, model, rows_jsonl, fast, "data.max_length=8", "lora.rank=2")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(tokenizer(json.loads(x)["text"]).input_ids) for x in rows_jsonl.open()]
    train = re.search(r"^train +(\d+) rows.* ([\d.]+) % truncated", out, re.MULTILINE)
    val = re.search(r"^val +(\d+) rows.* ([\d.]+) % truncated", out, re.MULTILINE)
    test = re.search(r"^test +(\d+) rows.* ([\d.]+) % truncated", out, re.MULTILINE)
    cut = sum(int(m.group(1)) * float(m.group(2)) / 100 for m in (train, val, test))
    assert sum(int(m.group(1)) for m in (train, val, test)) == 80
    assert cut == pytest.approx(sum(length > 8 for length in lengths), abs=0.2)
    assert "negative 32, positive 32" in out
    layers = {"tiny_bert": 12, "tiny_llama": 14}[name]
    assert re.search(r"Gradients: all \d+ trainable tensors receive one", out)
    counts = [int(n) for n in re.findall(r"^\S+ +(\d+)  +\d+ -> \d+ +2 ", out, re.MULTILINE)]
    assert sum(counts) - ("pooler" in out) == layers
    assert out.rstrip().endswith("All checks passed.")


def test_check_decodes_rows_as_the_model_sees_them(run_cli, tiny_bert, rows_jsonl, fast):
    out = check_report(run_cli, tiny_bert, rows_jsonl, fast)
    known = {(json.loads(x)["label"], json.loads(x)["text"]) for x in rows_jsonl.open()}
    shown = re.findall(r"^  \[(\w+)\] \[CLS\] (.*) \[SEP\] \(\+\d+ padding\)$", out, re.MULTILINE)
    assert len(shown) == 3
    assert set(shown) <= known


def test_check_counts_the_trained_parameters_that_training_trains(run_cli, tiny_bert, runs, fast):
    rows = json.loads((runs["bert"] / "adapter/lora_lightning.json").read_text())
    out = check_report(run_cli, tiny_bert, rows["settings"]["data"]["train"], fast)
    result = result_of(runs["bert"])
    assert f"trainable {result['trainable_parameters']:,} of {result['total_parameters']:,}" in out


def test_check_estimates_memory(run_cli, tiny_bert, rows_jsonl, fast):
    def parts(batch_size: int, max_tokens: str = "null") -> dict[str, float]:
        sizes = [f"data.batch_size={batch_size}", f"data.max_tokens={max_tokens}"]
        out = check_report(run_cli, tiny_bert, rows_jsonl, fast, *sizes)
        trained, total = re.search(r"trainable ([\d,]+) of ([\d,]+) parameters", out).groups()
        counts = [int(number.replace(",", "")) for number in (trained, total)]
        line = re.search(r"Memory: about ([\d.]+) MiB .*\((.*)\)", out)
        found = {name: float(size) for name, size in re.findall(r"(\w+) ([\d.]+)", line.group(2))}
        assert found["weights"] == pytest.approx(4 * counts[1] / 2**20, abs=0.06)
        assert found["gradients"] == pytest.approx(4 * counts[0] / 2**20, abs=0.06)
        assert found["optimizer"] == pytest.approx(8 * counts[0] / 2**20, abs=0.06)
        assert float(line.group(1)) == pytest.approx(sum(found.values()), abs=0.3)
        return found

    small, large = parts(16), parts(64)
    assert small["activations"] > 0.5
    assert large["activations"] == pytest.approx(4 * small["activations"], rel=0.1)
    longest = int(
        re.search(r"longest (\d+)", check_report(run_cli, tiny_bert, rows_jsonl, fast))[1]
    )
    bounded = parts(64, str(16 * longest))  # as many rows at a time as of a batch of 16
    assert bounded["activations"] == pytest.approx(small["activations"], rel=0.1)


# train --------------------------------------------------------------------------------------


def test_warm_start_begins_with_exactly_these_weights(run_cli, runs, adapter, fast, tiny_bert):
    settings = json.loads((adapter / "lora_lightning.json").read_text())["settings"]
    where = [f"model.name_or_path={tiny_bert}", f"data.train={settings['data']['train']}"]
    same = ["data.test_fraction=0.3", "test_before=true", "optim.lr=1e-2"]
    command = ["train", *fast, *where, *same]
    assert run_cli(*command, f"adapter={adapter}", "output_dir=warm")[0] == 0
    assert run_cli(*command, "output_dir=cold")[0] == 0
    first = result_of(runs["bert"])
    warm = result_of(Path("warm"))
    cold = result_of(Path("cold"))
    for name in ("test/loss", "test/accuracy", "test/f1", "test/auroc"):
        assert warm["before"][name] == pytest.approx(first[name], abs=1e-6)
    # It went on from there, and a start without the adapter is elsewhere.
    assert abs(warm["test/loss"] - first["test/loss"]) > 1e-4
    assert abs(cold["before"]["test/loss"] - first["test/loss"]) > 1e-3


def test_resume_of_a_finished_run_does_nothing(run_cli, tiny_bert, rows_jsonl, fast):
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", "output_dir=run"]
    assert run_cli("train", *fast, *where)[0] == 0
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")}
    status, out, _ = run_cli("train", "resume=run")
    assert status == 0
    assert "nothing to resume" in out
    assert {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")} == before


def test_output_dir_with_blanks_and_quotes(run_cli, tiny_bert, rows_jsonl, fast):
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"]
    folder = Path("my runs, it's")
    status, out, err = run_cli("train", *fast, *where, f'output_dir="{folder}"')
    assert status == 0, err
    steps = result_of(folder)["steps"]
    assert (f"Only {steps} optimizer steps were taken" in out) == (steps < 20)
    assert " MB with the tokenizer)" in out
    assert (folder / "result.json").is_file()
    assert os.listdir() == [str(folder)]


def test_a_log_that_is_no_terminal_tells_how_far_a_run_is(
    run_cli, tiny_bert, rows_jsonl, fast, monkeypatch
):
    monkeypatch.setattr(ProgressBar, "LINE_EVERY", 0.0)
    hidden = ("trainer.enable_progress_bar=false", "callbacks.progress_bar=null")
    shown = [item for item in fast if item not in hidden]
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", "output_dir=run"]
    status, out, err = run_cli("train", *shown, *where)
    assert status == 0, err
    steps = result_of(Path("run"))["steps"]
    told = re.findall(r"^epoch 1, step (\d+) of (\d+), train/loss \d\.\d{4}$", out, flags=re.M)
    assert told == [(str(step), str(steps)) for step in range(1, steps + 1)]


def test_what_could_not_go_on_is_told(run_cli, tmp_path):
    """resume=auto without a folder would begin in a new one each time; a file is no run."""
    status, _, err = run_cli("train", "debug=limit", "resume=auto")
    assert status == 2
    assert "resume=auto goes on with the run in output_dir, and without" in " ".join(err.split())
    (tmp_path / "last.ckpt").write_bytes(b"")
    status, _, err = run_cli("train", f"resume={tmp_path / 'last.ckpt'}")
    assert status == 2
    assert "is a file: give the folder of the run" in " ".join(err.split())
    status, _, err = run_cli("train", "debug=limit", "launcher.jobs=2")
    assert status == 2
    assert "launcher.jobs=2 is for the jobs of a sweep: add -m" in " ".join(err.split())


def test_commands_let_gpu_memory_grow_before_torch_is_imported():
    code = (
        "import sys, os, lora_lightning.cli.main as cli;"
        "sys.argv = ['lora-lightning', '--version'];"
        "cli.main(); print('torch' in sys.modules, os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))"
    )

    def said(**own: str) -> str:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTORCH_")}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=kept | own, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1]

    assert said() == "False expandable_segments:True"
    assert said(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64") == "False max_split_size_mb:64"
    assert said(PYTORCH_ALLOC_CONF="max_split_size_mb:64") == "False None"
