"""A whole run: result, folder, logs, and the adapter that it leaves."""

from __future__ import annotations

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
from helpers.runs import QUIET, csv_rows, result_of
from lora_lightning.config.compose import compose_config
from lora_lightning.config.schema import OptimConfig
from lora_lightning.lora import UserError
from lora_lightning.training.module import LoraModule
from lora_lightning.training.run import train


def run_in(folder: Path, model: Path, *overrides: str) -> SimpleNamespace:
    """A run of five epochs that learns its task, with the files it was given."""
    rows = make_rows(400)
    parts = {"train": rows[:320], "val": rows[320:360], "test": rows[360:]}
    for split, part in parts.items():
        write_jsonl(folder / f"{split}.jsonl", part)
    config = compose_config(
        [
            *QUIET,
            "data.batch_size=8",
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


# result.json and the folder ----------------------------------------------------------------------


def test_train_returns_what_result_json_holds(run):
    assert result_of(run.dir) == run.result


def test_result_counts_rows_tokens_steps_and_parameters(run, tiny_bert):
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


def test_result_holds_status_objective_and_versions(run):
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


def test_train_on_learnable_rows_reaches_a_high_accuracy(run):
    assert run.result["before"]["test/accuracy"] < 0.75
    assert run.result["val/accuracy"] > 0.9
    assert run.result["test/accuracy"] > 0.9


@pytest.mark.parametrize("split", ["val", "test"])
def test_result_metrics_equal_those_of_predictions(run, split, run_cli):
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


def test_run_folder_holds_the_documented_files(run):
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


def test_adapter_after_a_worse_last_epoch_is_the_best(tiny_bert, tmp_path):
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


def test_tensorboard_holds_training_scalars_by_step(events):
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(10, 201, 10))
    assert sum(event.value for event in losses[-4:]) < 0.5 * sum(e.value for e in losses[:4])
    rates = {event.step: event.value for event in events.Scalars("lr-AdamW/pg1")}
    warmup = round(OptimConfig().warmup * 200)
    for step, rate in rates.items():
        up, down = (step - 1) / warmup, (201 - step) / (200 - warmup)
        assert rate == pytest.approx(3e-3 * min(up, down), rel=1e-5)


def test_tensorboard_holds_validation_scalars_by_epoch(events, run):
    for name in ("loss", "accuracy", "f1", "auroc"):
        values = events.Scalars(f"val/{name}")
        assert [event.step for event in values] == [40, 80, 120, 160, 200]
        best = run.result[f"val/{name}"]  # of one of them, which is not drawn again
        assert min(abs(event.value - best) for event in values) < 1e-6
        tested = events.Scalars(f"test/{name}")
        assert [event.step for event in tested] == [0, 200]
        assert tested[0].value == pytest.approx(run.result["before"][f"test/{name}"])
        assert tested[-1].value == pytest.approx(run.result[f"test/{name}"])


def test_update_norms_equal_those_of_the_exported_adapter(events, run):
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


def test_tensorboard_hparams_are_written_once(events, run):
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


def test_tensorboard_scalars_are_all_curves(events):
    groups = {tag.partition("/")[0] for tag in events.Tags()["scalars"]}
    assert groups == {"epoch", "lr-AdamW", "test", "throughput", "train", "update_norm", "val"}
    for tag in events.Tags()["scalars"]:
        assert len(events.Scalars(tag)) > 1


def test_sample_predictions_equal_those_of_predict(events, run, run_cli):
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


def test_csv_log_equals_tensorboard(events, run):
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
                    "data.batch_size=8",
                    "test_before=false",
                    f"model.name_or_path={model}",
                    f"data.train={rows_jsonl}",
                    f"output_dir={tmp_path / 'run'}",
                    *overrides,
                ]
            )
        )

    return start


def test_train_on_a_decoder_learns(small, tiny_llama):
    settings = ["optim.lr=1e-2", "lora.rank=16", "trainer.max_epochs=40"]
    result = small(*settings, "callbacks.early_stopping=null", model=tiny_llama)
    assert result["val/accuracy"] > 0.9
    assert result["test/accuracy"] > 0.9


def test_full_fine_tuning_writes_a_hugging_face_folder(small, tmp_path):
    result = small("lora=full", "trainer.max_epochs=1", "optim.lr=1e-3")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "adapter")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert result["trainable_parameters"] == result["total_parameters"]


def test_full_fine_tuning_names_unused_tensors(small, monkeypatch, capsys):
    adopt = LoraModule.adopt

    def with_a_spare_part(self, model, adapter):
        model.spare = torch.nn.Linear(2, 2)
        adopt(self, model, adapter)

    monkeypatch.setattr(LoraModule, "adopt", with_a_spare_part)
    small("lora=full", "trainer.max_steps=2", "optim.lr=1e-4")
    said = capsys.readouterr().err
    assert "the first step gives 2 trainable tensors no gradient, such as spare.weight: " in said
    assert "2 trainable tensors never got a gradient, such as spare.bias" in said


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_train_on_an_encoder_decoder_completes(kind, small, tmp_path):
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


def test_early_stopping_without_improvement_ends_the_run(small):
    result = small(
        "optim.lr=1e-12",  # nothing moves, so nothing improves
        "trainer.max_epochs=9",
        "callbacks.early_stopping.patience=2",
    )
    assert result["epochs"] == 3


def test_train_without_a_logger_completes(small, tmp_path):
    result = small("trainer.max_steps=2", "logger=none", "trainer.enable_progress_bar=false")
    assert result["status"] == "completed"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert not list((tmp_path / "run").rglob("events.out*"))


def test_max_steps_before_the_first_validation_completes(small):
    result = small("trainer.max_steps=3")
    assert result["steps"] == 3
    assert result["status"] == "completed"


def test_train_into_a_used_folder_raises(small, tmp_path):
    small("trainer.max_epochs=1", "trainer.limit_train_batches=1")
    before = (tmp_path / "run" / "result.json").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        small("trainer.max_epochs=1")
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_result_of_a_failed_run_holds_the_error(small, tmp_path):
    with pytest.raises(UserError, match="training loss is"):
        small("optim.lr=1e30", "optim.warmup=0", "trainer.max_epochs=2")
    result = result_of(tmp_path / "run")
    assert result["status"] == "failed"
    assert "lower optim.lr" in result["error"]
    assert not (tmp_path / "run" / "adapter").exists()


def test_train_prints_no_warning_that_a_user_cannot_act_on(small, capfd, caplog, recwarn):
    caplog.set_level("INFO")
    small("trainer.max_epochs=1")
    out, err = capfd.readouterr()
    said = "\n".join([out, err, caplog.text, *(str(warning.message) for warning in recwarn)])
    for noise in ("weights_only", "flops_per_batch", "many workers", "litlogger", "LOAD REPORT"):
        assert noise not in said
    assert "On the 8 test rows:" in out


def test_validation_within_an_accumulation_window_raises(small):
    with pytest.raises(UserError, match="multiple of trainer.accumulate_grad_batches"):
        small("trainer.accumulate_grad_batches=4", "trainer.val_check_interval=6")


def test_sigterm_at_the_end_of_the_first_test_stops_the_run(small, tmp_path, monkeypatch):
    """Lightning forgets a signal that came in a call's last batch when the next call begins."""
    import os
    import signal

    from lora_lightning.training.module import LoraModule

    monkeypatch.setattr(
        LoraModule, "on_test_end", lambda self: os.kill(os.getpid(), signal.SIGTERM), raising=False
    )
    told = r"To resume \(from the start: no checkpoint was due yet\): lora-lightning train resume="
    with pytest.raises(KeyboardInterrupt, match=told):
        small("test_before=true")
    result = result_of(tmp_path / "run")
    assert result["status"] == "interrupted"
    assert not list((tmp_path / "run").rglob("*.ckpt"))  # not a step of training was done


def test_train_with_dropped_rows_reports_their_number(tmp_path, run_cli, tiny_bert, fast):
    rows = [*make_rows(60), *({"text": " ", "label": label} for label in ("negative", "positive"))]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    where = [f"model.name_or_path={tiny_bert}", f"data.train={path}", "trainer.max_steps=1"]
    files = [f"data.{split}={path}" for split in ("val", "test")]
    status, _, err = run_cli("train", *fast, *where, *files, f"output_dir={tmp_path / 'run'}")
    assert status == 0, err
    assert err.count("2 of 62 rows are dropped: empty text.") == 3


def test_early_stopping_prints_its_reason(small, capsys):
    more = ["optim.lr=1e-20", "callbacks.early_stopping.patience=2", "trainer.max_epochs=9"]
    result = small(*more)
    best = f"{result['objective']:.4f}"
    assert (
        f"stopped early, after step {result['steps']}: val/accuracy has not improved on "
        f"{best} for 2 validations. To wait longer: callbacks.early_stopping.patience=N.\n"
    ) in capsys.readouterr().out
    assert result["epochs"] == 3


# Which state is kept ------------------------------------------------------------------------------


def test_best_checkpoint_of_a_loss_without_a_mode_is_the_lowest(tiny_bert, tmp_path):
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


def test_few_and_uneven_rows_are_reported_by_train_as_by_check(tiny_bert, tmp_path, run_cli, fast):
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
    result = result_of(tmp_path / "run")
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
