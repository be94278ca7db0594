"""Files of any content: as data, and in the folder of a run. Our own error comes out, or a result.

FUZZ=300 tries 300 of each kind; the failing example and how to run it again are printed.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import shutil
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from omegaconf import OmegaConf

from helpers.data import to_jsonl
from helpers.fuzz import FUZZ
from lora_lightning.config.schema import DataConfig, ModelConfig
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.lora import UserError
from lora_lightning.models.tokenizer import load_tokenizer
from lora_lightning.sweeps.packed.__main__ import main as packed
from lora_lightning.tasks import build_task
from lora_lightning.training.module import LoraModule

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["good", "bad", "", "../x", "${oc.env:HOME}", "2024-05-01", "1e999"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
ROWS = st.lists(
    st.fixed_dictionaries({}, optional={"text": VALUES, "label": VALUES})
    | st.fixed_dictionaries({"text": st.text(), "label": st.sampled_from(["good", "bad"])}),
    min_size=1,
    max_size=12,
)


def as_json_lines(rows: list[dict]) -> bytes:
    return to_jsonl(rows).encode()


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["text", "label"])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", errors="surrogatepass")


FILES = st.one_of(
    st.tuples(st.sampled_from(["csv", "tsv", "json", "jsonl", "txt", "parquet"]), st.binary()),
    st.tuples(st.just("jsonl"), ROWS.map(as_json_lines)),
    st.tuples(st.just("json"), ROWS.map(lambda rows: json.dumps(rows).encode())),
    st.tuples(st.just("csv"), ROWS.map(as_csv)),
)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return load_tokenizer(ModelConfig(name_or_path=str(tiny_bert)))


@FUZZ
@given(file=FILES, task=st.sampled_from(["sentiment", "summarization"]))
def test_files_of_any_content(file, task, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / f"rows.{file[0]}"
    path.write_bytes(file[1])
    config = DataConfig(train=str(path), cache_dir=str(folder / "cache"))
    settings = {"name": task}
    if task == "summarization":
        settings |= {"source_column": "text", "target_column": "label"}
    data = LoraDataModule(build_task(settings), tokenizer, config)
    with suppress(UserError):
        data.prepare_data()
        data.setup("fit")
        next(iter(data.train_dataloader()))
    assert {each.name for each in folder.iterdir()} <= {path.name, "cache"}
    shutil.rmtree(folder)


# The folder of a run, on resume ------------------------------------------------------------------

OTHERS = st.one_of(
    st.sampled_from(["absent", "more"]),
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 2**40, 10**30, 1.5, math.nan, "x", "", "~nouser/x", "${seed}", "???"]),
    st.builds(list),
    st.builds(dict),
    st.just([1]),
    st.just({"a": 1}),
)
IN_TENSORS = st.sampled_from([torch.zeros(2), torch.tensor(math.nan), torch.zeros(1).long()])


def places(node, path=()):
    """Keys that lead to each part of nested mappings and lists."""
    parts = node.items() if isinstance(node, dict) else enumerate(node)
    for key, part in parts:
        yield (*path, key)
        if isinstance(part, (dict, list)):
            yield from places(part, (*path, key))


def forged(content, place, value):
    """A copy of nested mappings and lists, with another value at a place."""
    content = copy.deepcopy(content)
    *path, last = place
    node = content
    for key in path:
        node = node[key]
    if isinstance(value, str) and value == "absent":
        del node[last]
    elif isinstance(value, str) and value == "more" and isinstance(node[last], dict):
        node[last]["step"] = "x"
    else:
        node[last] = value
    return content


FOLDERS = ("cache_dir", "save_dir", "dirpath", "folder", "default_root_dir")
"""Settings of a run that say where it writes."""


class Reached(UserError):
    """What is restored was taken for a run's."""


@pytest.fixture(scope="module")
def begun(trained_run, tmp_path_factory) -> Path:
    """A run that was stopped after its first epoch, as its files say."""
    run = tmp_path_factory.mktemp("begun") / "run"
    shutil.copytree(trained_run(), run)
    config = OmegaConf.load(run / ".hydra" / "config.yaml")
    config.trainer.max_epochs = 2
    config.output_dir = str(run)
    OmegaConf.save(config, run / ".hydra" / "config.yaml")
    (run / "result.json").write_text("{}")
    return run


@pytest.fixture
def stops_when_restored(monkeypatch):
    """Ends a run where its first batch would be trained on; the error of the batch is its own."""

    def advance(self, data_fetcher):
        next(data_fetcher)
        raise Reached("reached")

    monkeypatch.setattr(_TrainingEpochLoop, "advance", advance)


def forge_state(data, begun: Path, run: Path) -> None:
    """A copy of a run with another value somewhere in its last checkpoint."""
    whole = torch.load(begun / "checkpoints" / "last.ckpt", weights_only=True)
    kind = data.draw(st.sampled_from(sorted(whole.keys() - {"hyper_parameters", "hparams_name"})))
    part = {kind: whole[kind]["fit_loop"] if kind == "loops" else whole[kind]}
    place = data.draw(st.sampled_from(list(places(part))))
    value = data.draw(OTHERS | IN_TENSORS)
    shutil.copytree(begun, run)
    target = (kind, "fit_loop", *place[1:]) if kind == "loops" else place
    torch.save(forged(whole, target, value), run / "checkpoints" / "last.ckpt")


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_forged_states_of_a_run(data, begun, stops_when_restored, run_cli, tmp_path_factory):
    run = tmp_path_factory.mktemp("forged") / "run"
    forge_state(data, begun, run)
    status, _, err = run_cli("train", f"resume={run}")
    assert status == 2, err
    assert "Traceback" not in err
    assert "reached" in err or "last.ckpt" in err
    shutil.rmtree(run.parent)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_forged_states_of_packed_runs(data, begun, stops_when_restored, tmp_path_factory):
    """A run whose state is forged ends, with one message in its log; the other one goes on."""
    folder = tmp_path_factory.mktemp("forged")
    runs = [folder / "0", folder / "1"]
    number = data.draw(st.integers(0, 1))
    forge_state(data, begun, runs[number])
    shutil.copytree(begun, runs[1 - number])
    before = (runs[number] / "checkpoints" / "last.ckpt").read_bytes()
    assert packed(runs) == 2
    for run in runs:
        told = (run / "log.txt").read_text()
        assert told.count("error: ") == 1
        assert "Traceback" not in told
        assert "reached" in told or (run == runs[number] and "last.ckpt" in told)
    assert (runs[number] / "checkpoints" / "last.ckpt").read_bytes() == before
    assert {each.name for each in folder.iterdir()} == {"0", "1"}
    shutil.rmtree(folder)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_forged_config_of_a_run(
    data, begun, stops_when_restored, run_cli, tmp_path_factory, monkeypatch
):
    whole = OmegaConf.to_container(OmegaConf.load(begun / ".hydra" / "config.yaml"), resolve=False)
    place = data.draw(st.sampled_from([each for each in places(whole) if each != ("output_dir",)]))
    run = tmp_path_factory.mktemp("forged") / "run"
    shutil.copytree(begun, run)
    content = forged(whole, place, data.draw(OTHERS))
    (run / ".hydra" / "config.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(run.parent)
    status, _, err = run_cli("train", f"resume={run}")
    assert status == 2, err
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    assert str(run) in err  # its config.yaml, or the folder where something is to be typed again
    if place[-1] not in FOLDERS:
        assert {each.name for each in run.parent.iterdir()} == {"run"}
    shutil.rmtree(run.parent)


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("callbacks/RunClock/seconds", "x", "RunClock.seconds is str 'x', not a number"),
        ("callbacks/RunClock/tokens", -1, "tells of"),
        ("callbacks/EarlyStopping*/wait_count", [1], "wait_count is list [1]"),
        ("callbacks/EarlyStopping*/wait_count", "absent", "KeyError: 'wait_count'"),
        ("callbacks/EarlyStopping*/best_score", math.nan, "best_score is float nan"),
        ("callbacks/EarlyStopping*", [], "is not a mapping"),
        ("callbacks/BestCheckpoint*/current_score", "x", "a score that is not a number"),
        ("loops/fit_loop/epoch_progress/current/ready", -1, "epoch_progress.current counts"),
        ("loops/fit_loop/epoch_progress/total", {"step": 1}, "total has no 'completed'"),
        ("loops/fit_loop/epoch_progress/total/completed", "absent", "total has no 'completed'"),
        ("loops/fit_loop/epoch_progress/total/reset", 1, "holds 'reset', which"),
        ("loops/fit_loop/state_dict/combined_loader", [{"batches": "x"}], "batches is str 'x'"),
        ("lr_schedulers/0/last_epoch", 1.5, "last_epoch is float 1.5, not a whole number"),
        ("lr_schedulers/0/base_lrs", [0.1], "base_lrs is not a list of 2"),
        ("lr_schedulers/0/step", "x", "holds 'step', which no run writes"),
        ("optimizer_states/0/param_groups/0/betas", "x", "betas is not a list of 2"),
        ("optimizer_states/0/state/0/exp_avg", "absent", "exp_avg of tensor 0 is absent"),
        ("optimizer_states/0/state/0/step", torch.zeros(2), "step of tensor 0 is Tensor"),
    ],
)
def test_a_forged_state_is_told(place, value, told, begun, stops_when_restored, run_cli, tmp_path):
    run = shutil.copytree(begun, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    path, node = [], content
    for name in place.split("/"):
        keys = range(len(node)) if isinstance(node, list) else node
        path += [key for key in keys if fnmatch(str(key), name)] or [name]
        node = node.get(path[-1]) if isinstance(node, dict) else node[path[-1]]
    if "reached" not in (err := run_cli("train", f"resume={run}")[2]):
        pytest.fail(err)
    torch.save(forged(content, tuple(path), value), last)
    before = last.read_bytes(), (run / "csv" / "metrics.csv").read_bytes()
    status, _, err = run_cli("train", f"resume={run}")
    assert status == 2, err
    said = " ".join(err.split())
    assert told in said
    assert str(last) in said
    assert (last.read_bytes(), (run / "csv" / "metrics.csv").read_bytes()) == before


@pytest.mark.parametrize(
    ("fails", "status"),
    [("on_fit_start", 2), ("on_train_start", 2), ("on_train_batch_end", 1), ("mine", 1)],
)
def test_an_error_is_the_files_before_the_first_step_alone(
    fails, status, begun, run_cli, tmp_path, monkeypatch
):
    """Later it may be anybody's; and code of the user's, typed again, tells of itself."""
    run = shutil.copytree(begun, tmp_path / "run")
    config, typed = run / ".hydra" / "config.yaml", []
    if fails == "mine":
        code = (
            "from lightning.pytorch.callbacks import Callback\n\n"
            "class Mine(Callback):\n    def on_fit_start(self, *_):\n        return {}['on']\n"
        )
        (tmp_path / "of_the_user.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        typed = ["callbacks.mine._target_=of_the_user.Mine"]
        content = OmegaConf.load(config)
        OmegaConf.update(content, *typed[0].split("="), force_add=True)
        OmegaConf.save(content, config)
    else:
        monkeypatch.setattr(LoraModule, fails, lambda *_: {}["on"], raising=True)
    found, _, err = run_cli("train", f"resume={run}", *typed)
    assert found == status, err
    if status == 2:
        assert f"error: the run cannot be built from {config}: KeyError: 'on'. Correct" in err
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        with pytest.raises(UserError) as told:
            run_cli("train", f"resume={run}")
        assert isinstance(told.value.__cause__, KeyError)
    else:
        assert "Traceback" in err
        assert "cannot be built" not in err


def test_a_checkpoint_of_another_version(begun, stops_when_restored, run_cli, tmp_path):
    """What it holds in addition is not used; where it does not fit, both versions are told."""
    run = shutil.copytree(begun, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    loops = content["loops"]["fit_loop"]
    for part in (loops, loops["state_dict"], loops["epoch_progress"]["total"]):
        part["of_tomorrow"] = {"a": 1}
    content["lr_schedulers"][0]["of_tomorrow"] = 1
    content["pytorch-lightning_version"] = "9.9.0"
    torch.save(content, last)
    assert "reached" in run_cli("train", f"resume={run}")[2]
    del loops["epoch_progress"]["total"]["ready"]
    torch.save(content, last)
    said = " ".join(run_cli("train", f"resume={run}")[2].split())
    assert f"written by Lightning 9.9.0, and {lightning.__version__} is installed" in said


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("lora/rank", "x", "lora.rank"),
        ("lora", [1], "lora"),
        ("callbacks", [1], "callbacks"),
        ("trainer", "x", "trainer"),
        ("data/batch_size", [1], "data.batch_size"),
        ("data/splits", "x", "data.splits"),
        ("data/splits", "${seed}", "not iterable"),
        ("task/name", {}, "task.name"),
        ("task", "absent", "is not the config of a run"),
        ("model/dtype", [1], "model.dtype"),
        ("optim/lr", {"a": 1}, "optim.lr"),
        ("seed", 1.5, "seed"),
        ("tags", "x", "tags"),
    ],
)
def test_a_forged_config_is_told(place, value, told, begun, run_cli, tmp_path):
    run = shutil.copytree(begun, tmp_path / "run")
    path = run / ".hydra" / "config.yaml"
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    path.write_text(yaml.safe_dump(forged(content, tuple(place.split("/")), value)))
    before = {each: each.read_bytes() for each in run.rglob("*") if each.is_file()}
    status, _, err = run_cli("train", f"resume={run}")
    assert status == 2, err
    said = " ".join(err.split())
    assert str(path) in said
    assert told in said
    assert {each: each.read_bytes() for each in run.rglob("*") if each.is_file()} == before
