"""A whole run: result, folder, logs, and the adapter that it leaves."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from transformers import AutoTokenizer, BertForSequenceClassification

from helpers.data import make_rows, write_jsonl
from helpers.models import word_tokenizer
from lora_lightning.config.compose import compose_config
from lora_lightning.config.schema import OptimConfig
from lora_lightning.lora import UserError
from lora_lightning.training.module import LoraModule
from lora_lightning.training.run import train

QUIET = [
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    "callbacks.progress_bar=null",
    "callbacks.rich_summary=null",
    "data.batch_size=8",
]


def run_in(folder: Path, model: Path, *overrides: str) -> SimpleNamespace:
    """A run of five epochs that learns its task, with the files it was given."""
    rows = make_rows(400)
    parts = {"train": rows[:320], "val": rows[320:360], "test": rows[360:]}
    for split, part in parts.items():
        write_jsonl(folder / f"{split}.jsonl", part)
    config = compose_config(
        [
            *QUIET,
            f"model.name_or_path={model}",
            *(f"data.{split}={folder / split}.jsonl" for split in parts),
            f"output_dir={folder / 'run'}",
            "optim.lr=3e-3",
            "trainer.max_epochs=5",
            "callbacks.early_stopping=null",
            *overrides,
        ]
    )
    result = train(config)
    return SimpleNamespace(dir=folder / "run", data=folder, parts=parts, result=result)


@pytest.fixture(scope="module")
def run(tiny_bert, tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("train"), tiny_bert, "callbacks.update_norms.layers=true")


def predictions(run, split: str, run_cli) -> list[dict]:
    output = run.data / f"{split}-predicted.jsonl"
    status, _, errors = run_cli(
        "predict",
        f"adapter={run.dir / 'adapter'}",
        f"input={run.data / split}.jsonl",
        f"output={output}",
    )
    assert status == 0, errors
    return [json.loads(line) for line in output.read_text().splitlines()]


def csv_rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "csv" / "metrics.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


# result.json and the folder ----------------------------------------------------------------------


def test_result_is_what_was_returned(run):
    assert json.loads((run.dir / "result.json").read_text()) == run.result


def test_result_counts(run, tiny_bert):
    result, adapter = run.result, run.dir / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    trained = sum(tensor.numel() for tensor in tensors.values())
    low_rank = sum(tensor.numel() for name, tensor in tensors.items() if "lora_" in name)
    base = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    assert result["trainable_parameters"] == trained
    base_count = sum(parameter.numel() for parameter in base.parameters())
    assert result["total_parameters"] == base_count + low_rank
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokens = sum(len(tokenizer(row["text"])["input_ids"]) for row in run.parts["train"])
    assert result["tokens"] == 5 * tokens
    assert result["steps"] == 5 * math.ceil(320 / 8)
    assert result["epochs"] == 5
    assert result["adapter_bytes"] == sum(path.stat().st_size for path in adapter.iterdir())
    assert result["tokens_per_second"] == pytest.approx(
        result["tokens"] / result["seconds"], rel=1e-2
    )


def test_result_fields(run):
    result = run.result
    assert result["status"] == "completed"
    assert result["monitor"] == "val/accuracy"
    assert result["objective"] == result["val/accuracy"]
    assert {name for name in result if "/" in name} == {
        f"{split}/{name}"
        for split in ("val", "test")
        for name in ("loss", "accuracy", "f1", "auroc")
    }
    assert (result["device"], result["world_size"], result["seed"]) == ("cpu", 1, 0)
    assert result["versions"]["torch"] == torch.__version__
    assert len(result["config_hash"]) == 16
    assert result["peak_memory_mib"] > 50


def test_it_learned(run):
    assert run.result["before"]["test/accuracy"] < 0.75
    assert run.result["val/accuracy"] > 0.9
    assert run.result["test/accuracy"] > 0.9


@pytest.mark.parametrize("split", ["val", "test"])
def test_metrics_are_those_of_the_predictions(run, split, run_cli):
    rows = predictions(run, split, run_cli)
    truth = [int(row["label"] == "positive") for row in rows]
    scores = [row["prediction"]["scores"]["positive"] for row in rows]
    guesses = [int(row["prediction"]["label"] == "positive") for row in rows]
    expected = {
        "accuracy": accuracy_score(truth, guesses),
        "f1": f1_score(truth, guesses, average="macro"),
        "auroc": roc_auc_score(truth, scores),
        "loss": log_loss(truth, scores),
    }
    found = {name: run.result[f"{split}/{name}"] for name in expected}
    assert found == pytest.approx(expected, abs=2e-5)


def test_layout_of_the_folder(run):
    names = {path.name for path in run.dir.iterdir()}
    assert names == {
        "adapter",
        "checkpoints",
        "csv",
        "tensorboard",
        "result.json",
        ".lock",
        "samples.jsonl",
    }
    assert {path.name for path in (run.dir / "adapter").iterdir()} == {
        ".written_by.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora_lightning.json",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    checkpoints = {path.name.partition("-")[0] for path in (run.dir / "checkpoints").iterdir()}
    assert checkpoints == {"best", "last.ckpt", "last"}
    assert len(list((run.dir / "checkpoints").iterdir())) == 3


def test_the_adapter_is_the_best_not_the_last(tiny_bert, tmp_path):
    # What is most like the base is taken for the best: a run that learns has it before its end.
    metric = "val/retained_similarity"
    (tmp_path / "texts.txt").write_text("good film\nbad hotel\nnever again\nfine room\n")
    run = run_in(
        *(tmp_path, tiny_bert, f"callbacks.best.monitor={metric}", "callbacks.best.mode=max"),
        f"callbacks.retention.texts={tmp_path / 'texts.txt'}",
    )
    found = {int(row["step"]): float(row[metric]) for row in csv_rows(run.dir) if row[metric]}
    assert found.pop(0) == pytest.approx(1.0)
    assert len(found) == 5
    best_step = max(found, key=found.__getitem__)
    assert best_step < 200
    exported = load_file(run.dir / "adapter" / "adapter_model.safetensors")
    for name, same in ((f"best-step-{best_step}.ckpt", True), ("last.ckpt", False)):
        module = LoraModule.load_from_checkpoint(run.dir / "checkpoints" / name)
        stored = module.adapter.named_tensors()
        assert {f"base_model.model.{key}" for key in stored} == set(exported)
        equal = [torch.equal(exported[f"base_model.model.{k}"], t) for k, t in stored.items()]
        assert all(equal) if same else not any(equal)
    typed = compose_config([f"adapter={run.dir / 'checkpoints' / f'best-step-{best_step}.ckpt'}"])
    assert typed.adapter.endswith(".ckpt")  # without quotes


# Logs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def events(run) -> EventAccumulator:
    accumulator = EventAccumulator(str(run.dir / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_scalars_of_training(events):
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(10, 201, 10))
    assert sum(event.value for event in losses[-4:]) < 0.5 * sum(e.value for e in losses[:4])
    rates = {event.step: event.value for event in events.Scalars("lr-AdamW/pg1")}
    warmup = round(OptimConfig().warmup * 200)
    for step, rate in rates.items():
        up, down = (step - 1) / warmup, (201 - step) / (200 - warmup)
        assert rate == pytest.approx(3e-3 * min(up, down), rel=1e-5)


def test_scalars_of_validation(events, run):
    for name in ("loss", "accuracy", "f1", "auroc"):
        values = events.Scalars(f"val/{name}")
        assert [event.step for event in values] == [40, 80, 120, 160, 200]
        best = run.result[f"val/{name}"]  # of one of them, which is not drawn again
        assert min(abs(event.value - best) for event in values) < 1e-6
        tested = events.Scalars(f"test/{name}")
        assert [event.step for event in tested] == [0, 200]
        assert tested[0].value == pytest.approx(run.result["before"][f"test/{name}"])
        assert tested[-1].value == pytest.approx(run.result[f"test/{name}"])


def test_update_norms_are_those_of_the_exported_adapter(events, run):
    adapter = run.dir / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    norms = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            dense = (b.double() @ a.double()) * settings["lora_alpha"] / settings["r"]
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            norms[f"update_norm/{layer}"] = dense.norm().item()
    assert len(norms) >= 12
    norms["update_norm/total"] = math.sqrt(sum(value**2 for value in norms.values()))
    found = {
        tag: events.Scalars(tag)[-1].value
        for tag in events.Tags()["scalars"]
        if tag.startswith("update_norm/")
    }
    assert found == pytest.approx(norms, rel=1e-4)


def test_hparams_are_filled_once(events, run):
    tags = Counter(
        value.tag
        for path in sorted((run.dir / "tensorboard").glob("events*"))
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag.startswith("_hparams_/")
    )
    assert tags["_hparams_/session_start_info"] == 1
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    started = HParamsPluginData.FromString(content).session_start_info.hparams
    found = {name: value.number_value or value.string_value for name, value in started.items()}
    chosen = {"method": "lora", "rank": 8, "alpha": 16, "scaling": 2, "lr": 3e-3}
    came_out = {name: value for name, value in run.result.items() if "/" in name}
    assert came_out.keys() >= {"val/accuracy", "val/loss", "test/accuracy", "test/f1"}
    by_column = {name.split(" ")[-1]: value for name, value in found.items()}
    assert {name: by_column[name] for name in {**chosen, **came_out}} == {**chosen, **came_out}
    content = events.PluginTagToContent("hparams")["_hparams_/experiment"]
    columns = HParamsPluginData.FromString(content).experiment.hparam_infos
    # What TensorBoard 2.21 does with them, and how many it shows.
    columns = sorted(columns, key=lambda column: (not column.differs, column.name))[:5]
    shown = [column.display_name for column in columns]
    assert shown == ["val/accuracy", "rank", "alpha", "scaling", "lr"]


def test_each_card_of_scalars_is_a_curve(events):
    groups = {tag.partition("/")[0] for tag in events.Tags()["scalars"]}
    assert groups == {"epoch", "lr-AdamW", "test", "throughput", "train", "update_norm", "val"}
    for tag in events.Tags()["scalars"]:
        assert len(events.Scalars(tag)) > 1


def test_sample_predictions_are_those_of_predict(events, run, run_cli):
    shown = events.Tensors("samples/val/text_summary")[-1].tensor_proto.string_val[0].decode()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert lines[0] == ["input", "target", "prediction"]
    assert len(lines) == 2 + 8
    known = {row["text"]: row for row in predictions(run, "val", run_cli)}
    for text, target, prediction in lines[2:]:
        row = known[text]
        label, score = prediction.removesuffix(")").split(" (")
        assert (target, label) == (row["label"], row["prediction"]["label"])
        assert float(score) == pytest.approx(row["prediction"]["score"], abs=2e-3)


def test_csv_holds_the_same(events, run):
    by_step = {int(row["step"]): row for row in csv_rows(run.dir) if row["train/loss"]}
    for event in events.Scalars("train/loss"):
        assert float(by_step[event.step]["train/loss"]) == pytest.approx(event.value)


# Other runs --------------------------------------------------------------------------------------


@pytest.fixture
def small(tiny_bert, rows_jsonl, tmp_path):
    """Trains a small run on 64 rows; returns its result."""

    def start(*overrides: str, model: Path = tiny_bert) -> dict:
        return train(
            compose_config(
                [
                    *QUIET,
                    "test_before=false",
                    f"model.name_or_path={model}",
                    f"data.train={rows_jsonl}",
                    f"output_dir={tmp_path / 'run'}",
                    *overrides,
                ]
            )
        )

    return start


def test_decoder_learns(small, tiny_llama):
    settings = ["optim.lr=1e-2", "lora.rank=16", "trainer.max_epochs=40"]
    result = small(*settings, "callbacks.early_stopping=null", model=tiny_llama)
    assert result["val/accuracy"] > 0.9
    assert result["test/accuracy"] > 0.9


def test_full_fine_tuning_leaves_a_hugging_face_folder(small, tmp_path):
    result = small("lora=full", "trainer.max_epochs=1", "optim.lr=1e-3")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "adapter")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert result["trainable_parameters"] == result["total_parameters"]


def test_full_fine_tuning_names_what_the_task_does_not_use(small, monkeypatch, capsys):
    adopt = LoraModule.adopt

    def with_a_spare_part(self, model, adapter):
        model.spare = torch.nn.Linear(2, 2)
        adopt(self, model, adapter)

    monkeypatch.setattr(LoraModule, "adopt", with_a_spare_part)
    small("lora=full", "trainer.max_steps=2", "optim.lr=1e-4")
    said = capsys.readouterr().err
    assert "the first step does not reach 2 trained tensors, such as spare.weight: " in said
    assert "2 trained tensors never got a gradient, such as spare.bias" in said


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_train(kind, small, tmp_path):
    from transformers import BartConfig, BartModel, T5Config, T5ForConditionalGeneration

    tokenizer = word_tokenizer(
        ["<pad>", "<unk>", "<s>", "</s>"],
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        eos_token="</s>",
        bos_token="<s>",
    )
    shared = {
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    if kind == "t5":
        model = T5ForConditionalGeneration(
            T5Config(**shared, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
        )
    else:
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        layers = {"encoder_layers": 2, "decoder_layers": 2}
        widths = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
        model = BartModel(BartConfig(**shared, **heads, **layers, **widths))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = small(
        "trainer.max_epochs=1", "trainer.limit_train_batches=2", model=tmp_path / "model"
    )
    assert result["steps"] == 2
    assert math.isfinite(result["test/loss"])
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    moved = [name for name, t in tensors.items() if "lora_B" in name and t.any()]
    assert any("decoder" in name for name in moved)
    assert any("encoder" in name for name in moved)


def test_early_stopping_stops(small):
    result = small(
        "optim.lr=1e-12",  # nothing moves, so nothing improves
        "trainer.max_epochs=9",
        "callbacks.early_stopping.patience=2",
    )
    assert result["epochs"] == 3


def test_without_a_logger_the_rest_is_as_it_was(small, tmp_path):
    result = small("trainer.max_steps=2", "logger=none", "trainer.enable_progress_bar=false")
    assert result["status"] == "completed"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert not list((tmp_path / "run").rglob("events.out*"))


def test_max_steps_may_end_before_the_first_validation(small):
    result = small("trainer.max_steps=3")
    assert result["steps"] == 3
    assert result["status"] == "completed"


def test_a_used_folder_is_refused(small, tmp_path):
    small("trainer.max_epochs=1", "trainer.limit_train_batches=1")
    before = (tmp_path / "run" / "result.json").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        small("trainer.max_epochs=1")
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_a_run_that_fails_says_so(small, tmp_path):
    with pytest.raises(UserError, match="training loss is"):
        small("optim.lr=1e30", "optim.warmup=0", "trainer.max_epochs=2")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert "lower optim.lr" in result["error"]
    assert not (tmp_path / "run" / "adapter").exists()


def test_nothing_is_said_that_no_user_can_act_on(small, capfd, caplog, recwarn):
    caplog.set_level("INFO")
    small("trainer.max_epochs=1")
    out, err = capfd.readouterr()
    said = "\n".join([out, err, caplog.text, *(str(warning.message) for warning in recwarn)])
    for noise in ("weights_only", "flops_per_batch", "many workers", "litlogger", "LOAD REPORT"):
        assert noise not in said
    assert "On the 8 test rows:" in out


def test_validation_amid_a_window_is_refused(small):
    with pytest.raises(UserError, match="multiple of trainer.accumulate_grad_batches"):
        small("trainer.accumulate_grad_batches=4", "trainer.val_check_interval=6")


def test_a_sigterm_at_the_end_of_the_first_test_stops_the_run(small, tmp_path, monkeypatch):
    """Lightning forgets a signal that came in a call's last batch when the next call begins."""
    import os
    import signal

    from lora_lightning.training.module import LoraModule

    monkeypatch.setattr(
        LoraModule, "on_test_end", lambda self: os.kill(os.getpid(), signal.SIGTERM), raising=False
    )
    told = r"To go on \(from the start: no checkpoint was due yet\): lora-lightning train resume="
    with pytest.raises(KeyboardInterrupt, match=told):
        small("test_before=true")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert not list((tmp_path / "run").rglob("*.ckpt"))  # not a step of training was done


def test_a_run_tells_of_rows_that_it_leaves_out(tmp_path, run_cli, tiny_bert, fast):
    rows = [*make_rows(60), *({"text": " ", "label": label} for label in ("negative", "positive"))]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    where = [f"model.name_or_path={tiny_bert}", f"data.train={path}", "trainer.max_steps=1"]
    files = [f"data.{split}={path}" for split in ("val", "test")]
    status, _, err = run_cli("train", *fast, *where, *files, f"output_dir={tmp_path / 'run'}")
    assert status == 0, err
    assert err.count("2 of 62 rows are dropped: empty text.") == 3


def test_early_stopping_says_why_it_ends_a_run(small, capsys):
    more = ["optim.lr=1e-20", "callbacks.early_stopping.patience=2", "trainer.max_epochs=9"]
    result = small(*more)
    best = f"{result['objective']:.4f}"
    assert (
        f"stopped early, after step {result['steps']}: val/accuracy has not been better than "
        f"{best} in 2 validations. To wait longer: callbacks.early_stopping.patience=N.\n"
    ) in capsys.readouterr().out
    assert result["epochs"] == 3


# Which state is kept ------------------------------------------------------------------------------


def test_the_state_of_the_lowest_loss_is_kept_where_no_mode_is_typed(tiny_bert, tmp_path):
    run = run_in(
        tmp_path,
        tiny_bert,
        *("task.monitor=val/loss", "trainer.max_epochs=3", "data.limit_train=64"),
    )
    losses = [float(row["val/loss"]) for row in csv_rows(run.dir) if row["val/loss"]][:3]
    assert len(set(losses)) == 3
    assert losses[0] > min(losses)
    assert run.result["objective"] == pytest.approx(min(losses), rel=1e-5)
    content = torch.load(next((run.dir / "checkpoints").glob("best-*.ckpt")), weights_only=True)
    assert content["global_step"] == 8 * (1 + losses.index(min(losses)))
    for name, state in content["callbacks"].items():
        if "EarlyStopping" in name or "ModelCheckpoint" in name:
            assert float(state.get("best_model_score", min(losses))) == pytest.approx(min(losses))


def test_few_and_uneven_rows_are_told_as_check_tells_them(tiny_bert, tmp_path, run_cli, fast):
    """What always answers the majority class, by scikit-learn, stands beside what was learned."""
    rows = [row for i, row in enumerate(make_rows(160)) if i % 2 == 0 or i % 8 == 1]
    parts = {"train": rows[:70], "val": rows[70:90], "test": rows[90:]}
    for split, part in parts.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    files = [f"data.{split}={tmp_path / split}.jsonl" for split in parts]
    command = [*fast, f"model.name_or_path={tiny_bert}", *files]
    counts = Counter(row["label"] for row in parts["train"])
    told = [
        "only 20 val rows: each makes 5 % of the metrics",
        "only 10 test rows: each makes 10 % of the metrics",
        "imbalanced classes: to answer 'negative' always has an accuracy of "
        f"{counts['negative'] / 70:.2f}. val/f1, the macro F1, weighs all classes equally: "
        "task.monitor=val/f1",
    ]
    status, out, err = run_cli("check", *command, f"output_dir={tmp_path / 'no'}")
    assert status == 0, err
    assert f"classes negative {counts['negative']}, positive {counts['positive']}\n" in out
    assert [line[8:] for line in out.splitlines() if line.startswith("WARNING")] == told
    status, out, err = run_cli("train", *command, f"output_dir={tmp_path / 'run'}")
    assert status == 0, err
    for text in (err, out):  # at its start and at its end
        assert [line[8:] for line in text.splitlines() if line.startswith("WARNING")] == told
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["warnings"] == told
    assert result["rows"] == {split: len(part) for split, part in parts.items()}
    assert result["baseline"].pop("name") == "majority class"
    expected = {}
    for split in ("val", "test"):
        labels = [row["label"] for row in parts[split]]
        answers = ["negative"] * len(labels)
        expected[f"{split}/accuracy"] = accuracy_score(labels, answers)
        expected[f"{split}/f1"] = f1_score(labels, answers, average="macro")
    assert result["baseline"] == pytest.approx(expected)
