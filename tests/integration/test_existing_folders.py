"""What commands do with folders that they did not write, and with files that were changed."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers.asserts import contents, flip_bit
from lora_lightning import (
    LoraConfig,
    LoraModule,
    UserError,
    load_adapter,
)
from lora_lightning.config.compose import compose_config
from lora_lightning.lora import AdapterSet
from lora_lightning.training.data_init import earlier_settings
from lora_lightning.training.folder_checks import check_sweep_folder, check_unused_folder


@pytest.fixture
def place(trained_run, tiny_bert, tmp_path, monkeypatch) -> Path:
    """A folder with the run, and with another whose adapter a user has added to; and the base."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other"):
        shutil.copytree(trained_run(), tmp_path / name)
    (tmp_path / "other" / "adapter" / "notes.md").write_text("mine")
    shutil.copytree(tiny_bert, tmp_path / "base")
    return tmp_path


WRITERS = {
    "merge": ["merge", "adapter=run/adapter"],
    "export": ["export", "adapter=run/adapter"],
    "canonical": ["export", "adapter=run/adapter", "format=canonical"],
    "merged": ["export", "adapter=run/adapter", "format=merged"],
    "combine": ["combine", "adapter=run/adapter", "weights=0.5"],
    "import": ["import", "source=run/checkpoints/last.ckpt"],
    "import PEFT": ["import", "source=run/adapter", "task.labels=[negative,positive]"],
}


@pytest.mark.parametrize("output", ["base", "other/adapter", "run/adapter", "run/tensorboard"])
@pytest.mark.parametrize("command", WRITERS)
def test_no_command_replaces_what_it_did_not_write(command, output, place, run_cli):
    before = contents(place)
    status, _, err = run_cli(*WRITERS[command], f"output={output}")
    assert status == 2, err
    assert "Traceback" not in err
    told = " ".join(err.split())
    assert any(words in told for words in ("This would be lost:", "is in the run", " reads, "))
    assert contents(place) == before


@pytest.mark.parametrize("command", [name for name in WRITERS if name != "import PEFT"])
def test_each_command_replaces_what_it_wrote(command, place, run_cli):
    for _ in range(2):
        status, _, err = run_cli(*WRITERS[command], "output=out")
        assert status == 0, err
    before = contents(place)
    for other, writer in WRITERS.items():
        if writer[0] != WRITERS[command][0] and {command, other} != {"merge", "merged"}:
            status, _, err = run_cli(*writer, "output=out")
            assert status == 2
            assert "wrote it. This would be lost" in " ".join(err.split())
    assert contents(place) == before


ENTRIES = ("samples.jsonl", "csv/metrics.csv", "bad_step.json", "pause.json", "result.json")
ENTRIES += ("adapter/notes.md", "checkpoints/mine.ckpt", "tensorboard/x", ".hydra/config.yaml")


@pytest.mark.parametrize(
    ("entry", "how"),
    [
        *((entry, []) for entry in ENTRIES),
        *((entry, ["resume=auto"]) for entry in ("samples.jsonl", ".hydra/config.yaml")),
        *((entry, ["--config-dir=conf"]) for entry in ("result.json", ".hydra/config.yaml")),
    ],
)
def test_a_run_replaces_no_file_of_the_users(entry, how, tiny_bert, rows_jsonl, tmp_path, run_cli):
    mine = tmp_path / "data" / entry
    mine.parent.mkdir(parents=True)
    mine.write_text('{"mine": 1}')
    (tmp_path / "conf").mkdir()
    how = [item.replace("=conf", f"={tmp_path / 'conf'}") for item in how]
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", "trainer=cpu"]
    status, _, err = run_cli("train", *how, *where, f"output_dir={tmp_path / 'data'}")
    assert status == 2
    assert entry.partition("/")[0] in err
    assert "give another output_dir" in " ".join(err.split()).lower()
    assert mine.read_text() == '{"mine": 1}'


@pytest.mark.parametrize("left", [".hydra/config.yaml", ".lock", "csv/", "notes.md"])
def test_a_start_that_was_killed_is_in_no_ones_way(left, tmp_path):
    """Before its first step it leaves a config; and what a run does not write may lie there."""
    path = tmp_path / left
    (path if left.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
    if not left.endswith("/"):
        path.write_text(OmegaConf.to_yaml(compose_config([])))
    check_unused_folder(tmp_path)


def _double_alpha(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "lora_alpha": 2 * content["lora_alpha"]}))


def _rename_entry(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert '"good"' in text
    path.write_text(text.replace('"good"', '"goof"'), encoding="utf-8")


DAMAGES = {
    "adapter_model.safetensors": flip_bit,
    "adapter_config.json": _double_alpha,
    "tokenizer.json": _rename_entry,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_changed_files_are_told_by_whatever_reads_them(name, place, run_cli):
    adapter = place / "run" / "adapter"
    DAMAGES[name](adapter / name)
    before = contents(place)
    for arguments in (
        ["predict", "adapter=run/adapter", "text=good"],
        ["evaluate", "adapter=run/adapter", "data.test=none.jsonl"],
        *(
            [*writer, "output=out"]
            for command, writer in WRITERS.items()
            if command != "import"  # reads a checkpoint, which has checksums of its own
        ),
        ["export", "adapter=run/adapter", "check=vllm"],
        ["train", "adapter=run/adapter", "model.name_or_path=base", "output_dir=new"],
    ):
        status, _, err = run_cli(*arguments)
        assert status == 2, arguments
        assert f"adapter/{name} is damaged, or was changed" in " ".join(err.split()), arguments
    assert contents(place) == before


@pytest.mark.parametrize("name", DAMAGES)
def test_changed_files_are_told_in_python(name, place):
    from transformers import AutoModelForSequenceClassification

    adapter = place / "run" / "adapter"
    DAMAGES[name](adapter / name)
    model = AutoModelForSequenceClassification.from_pretrained(place / "base")
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="is damaged, or was changed"):
        load_adapter(model, adapter)
    assert model.state_dict().keys() == weights.keys()
    adapters = AdapterSet(model)
    with pytest.raises(UserError, match="is damaged, or was changed"):
        adapters.add("it", adapter)
    assert adapters.adapters == {}


@pytest.mark.parametrize("name", DAMAGES)
def test_changed_files_are_told_where_a_module_starts_from_them(name, place):
    """Before a value is taken, or the ranks that EVA has come to."""
    adapter = place / "run" / "adapter"
    state = json.loads((adapter / "lora_lightning.json").read_text())["task_state"]
    base = {"name_or_path": str(place / "base")}
    start = {"start_from": str(adapter), "task_state": state}
    LoraModule({"name": "sentiment"}, base, {"rank": 8}, **start).configure_model()
    DAMAGES[name](adapter / name)
    with pytest.raises(UserError, match="is damaged, or was changed"):
        LoraModule({"name": "sentiment"}, base, {"rank": 8}, **start).configure_model()
    with pytest.raises(UserError, match="is damaged, or was changed"):
        earlier_settings(str(adapter), LoraConfig())


LETTERS = {
    "a label": ('"positive"', '"pasitive"'),
    "the base": ('"base_fingerprint": "', '"base_fingerprint": "0'),
    "a setting": ('"batch_size": ', '"batch_size": 1'),
}


@pytest.mark.parametrize("kind", LETTERS)
def test_a_letter_in_our_own_file_is_told(kind, place, run_cli):
    path = place / "run" / "adapter" / "lora_lightning.json"
    text = path.read_text()
    assert LETTERS[kind][0] in text
    path.write_text(text.replace(*LETTERS[kind]))
    for arguments in (
        ["predict", "adapter=run/adapter", "text=good"],
        ["evaluate", "adapter=run/adapter", "data.test=none.jsonl"],
        ["merge", "adapter=run/adapter", "output=out"],
        ["combine", "adapter=run/adapter", "weights=0.5", "output=out"],
        ["train", "adapter=run/adapter", "model.name_or_path=base", "output_dir=new"],
    ):
        status, _, err = run_cli(*arguments)
        assert status == 2, arguments
        assert "lora_lightning.json is damaged, or was changed" in " ".join(err.split()), arguments


def test_our_own_file_may_be_laid_out_anew_or_have_no_checksum(place, run_cli):
    path = place / "run" / "adapter" / "lora_lightning.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content))
    assert run_cli("predict", "adapter=run/adapter", "text=good")[0] == 0
    status, _, err = run_cli("combine", "adapter=run/adapter", "weights=0.5", "output=out")
    assert status == 0, err
    assert run_cli("predict", "adapter=out", "text=good")[0] == 0
    del content["content_sha256"]
    content["task_state"]["labels"] = ["negative", "pasitive"]
    path.write_text(json.dumps(content))
    status, _, err = run_cli("predict", "adapter=run/adapter", "text=good")
    assert status == 0, err


def test_weights_of_an_older_folder_are_checked(place):
    """There the checksum of the weights stood alone."""
    adapter = place / "run" / "adapter"
    path = adapter / "lora_lightning.json"
    content = json.loads(path.read_text())
    sums = content.pop("sha256")
    del content["content_sha256"]
    path.write_text(json.dumps({**content, "weights_sha256": sums["adapter_model.safetensors"]}))
    from lora_lightning.inference.loading import load_trained

    load_trained(adapter, device="cpu")
    flip_bit(adapter / "adapter_model.safetensors", -5)
    with pytest.raises(UserError, match="is damaged, or was changed"):
        load_trained(adapter, device="cpu")


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=basic"]])
@pytest.mark.parametrize(
    "entry", ["0/csv/metrics.csv", "1/samples.jsonl", "0/log.txt", "sweep.json", "multirun.yaml"]
)
@pytest.mark.parametrize("link", [False, True])
def test_a_sweep_replaces_no_file_of_the_users(
    entry, launcher, link, tiny_bert, rows_jsonl, tmp_path, run_cli
):
    mine, folder = tmp_path / "mine.txt", tmp_path / "sweep"
    mine.write_text('{"mine": 1}')
    path = folder / entry
    path.parent.mkdir(parents=True)
    path.symlink_to(mine) if link else shutil.copy(mine, path)
    before = sorted(folder.rglob("*"))
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", "trainer=cpu"]
    status, _, err = run_cli(
        "train", "-m", *where, "lora.rank=1,2", *launcher, f"hydra.sweep.dir={folder}"
    )
    assert status == 2, err
    lost = entry if entry.endswith((".txt", ".jsonl", "n", "multirun.yaml")) else "0/csv"
    assert f"would overwrite: {lost}." in " ".join(err.split())
    assert sorted(folder.rglob("*")) == before
    assert mine.read_text() == path.read_text() == '{"mine": 1}'


@pytest.mark.parametrize("left", [b"", b"\0" * 9, b"hy", b"hydra:\n  ru", b"mine: 1", b"h: 1"])
def test_a_sweep_goes_on_where_hydras_file_was_cut(left, tmp_path):
    (tmp_path / "multirun.yaml").write_bytes(left)
    with pytest.raises(UserError) if b"1" in left else nullcontext():
        check_sweep_folder(tmp_path)


@pytest.mark.parametrize("entry", ["0", "notes.md", "0/notes.md"])
def test_a_sweep_minds_a_link_for_a_job_and_no_other_files(entry, tmp_path):
    path = tmp_path / "sweep" / entry
    path.parent.mkdir(parents=True)
    if entry == "0":
        path.symlink_to(tmp_path)
        with pytest.raises(UserError, match="would overwrite: 0. Give"):
            check_sweep_folder(tmp_path / "sweep")
    else:
        path.write_text("mine")
        check_sweep_folder(tmp_path / "sweep")
