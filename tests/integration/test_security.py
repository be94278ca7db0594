"""What comes with an adapter or a checkpoint cannot run code, write files or read secrets.

Files are damaged and forged in many ways; nothing but our own error ever comes out.
"""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import re
import shlex
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from helpers.data import write_jsonl
from helpers.fuzz import FUZZ
from lora_lightning.adapters.combine import combine_adapters
from lora_lightning.adapters.export import write_canonical
from lora_lightning.adapters.folder import AdapterFolder
from lora_lightning.adapters.stored_adapter import StoredAdapter, copy_adapter
from lora_lightning.config.compose import compose_config, settings_of
from lora_lightning.config.saved import check_typed_again, read_config, settings_to_retype
from lora_lightning.config.schema import ModelConfig
from lora_lightning.config.untrusted import EXPERTS, arguments_from_file, settings_from_file
from lora_lightning.inference.convert import import_adapter
from lora_lightning.inference.evaluate import evaluate
from lora_lightning.inference.loading import load_trained
from lora_lightning.inference.merge import merge
from lora_lightning.inference.predictor import predictor_for
from lora_lightning.lora import (
    Adapter,
    LoraConfig,
    UserError,
    load_adapter,
    save_adapter,
)
from lora_lightning.lora.serialization.checksums import SIDECAR
from lora_lightning.models.cpu_kernels import ATTENTION
from lora_lightning.models.loading import load_classifier, load_generator
from lora_lightning.models.model_config import load_model_config
from lora_lightning.models.tokenizer import load_tokenizer
from lora_lightning.sweeps.job import Job
from lora_lightning.sweeps.live_table import JobTable
from lora_lightning.tasks import build_task
from lora_lightning.training.callbacks.best_checkpoint import BestCheckpoint
from lora_lightning.training.checkpoint_validation import check_resumable
from lora_lightning.training.checkpointing import read_checkpoint
from lora_lightning.training.module import LoraModule
from lora_lightning.training.outcome import Interrupted
from lora_lightning.training.run import train
from lora_lightning.training.warm_start import values_of
from lora_lightning.utils.locks import is_abandoned
from lora_lightning.utils.run_folder import RunFolder
from lora_lightning.utils.terminal import printable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["query", "(a+", "*", "../../etc/passwd", "all-linear", "${oc.env:HOME}"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def model(tiny_bert):
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("security") / "adapter"
    made = Adapter(model, LoraConfig(rank=4, modules_to_save=["classifier"]))
    save_adapter(made, folder)
    made.remove()
    return folder


@pytest.fixture(scope="module")
def run(trained_run) -> Path:
    return trained_run()


def write_sidecar(folder: Path, content: dict[str, Any]) -> None:
    """Writes it as who forges it would: without the checksum of what it said."""
    content.pop("content_sha256", None)
    (folder / SIDECAR).write_text(json.dumps(content))


def with_config(adapter: Path, folder: Path, **changes: object) -> Path:
    """A copy whose adapter_config.json has other values."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    return folder


def with_weights(adapter: Path, folder: Path, change) -> Path:
    """A copy whose tensors have been changed, each by the function."""
    shutil.copytree(adapter, folder)
    tensors = {name: change(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    return folder


def loads_or_tells(model: torch.nn.Module, folder: Path) -> None:
    """Loads what is there, or raises UserError; the model is as before then."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with suppress(UserError):
        load_adapter(model, folder).remove()
    assert model.state_dict().keys() == before.keys()


@FUZZ
@given(
    changes=st.dictionaries(st.nothing() | st.text(max_size=12), JSON, max_size=2), data=st.data()
)
def test_a_forged_adapter_config(changes, data, model, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "forged", dirs_exist_ok=True))
    config = json.loads((adapter / CONFIG).read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=3)):
        changes[key] = data.draw(JSON)
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    loads_or_tells(model, folder)


@FUZZ
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_adapter_config(content, model, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "forged", dirs_exist_ok=True))
    (folder / CONFIG).write_bytes(content)
    loads_or_tells(model, folder)


@FUZZ
@given(data=st.data())
def test_damaged_weights(data, model, adapter, tmp_path):
    """Bytes turned, cut off or put in, most of them in the header of the safetensors file."""
    folder = Path(shutil.copytree(adapter, tmp_path / "forged", dirs_exist_ok=True))
    content = bytearray((adapter / WEIGHTS).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        end = header if data.draw(st.integers(0, 3)) else len(content)
        content[data.draw(st.integers(0, min(end, len(content)) - 1))] = data.draw(
            st.integers(0, 255)
        )
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(1, len(content) - 1)) :]
    (folder / WEIGHTS).write_bytes(content)
    loads_or_tells(model, folder)


@FUZZ
@given(header=JSON, length=st.integers(0, 2**64 - 1) | st.none(), body=st.binary(max_size=64))
def test_a_forged_safetensors_header(header, length, body, model, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "forged", dirs_exist_ok=True))
    text = json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (folder / WEIGHTS).write_bytes(size + text + body)
    loads_or_tells(model, folder)


DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64")
DTYPES += ("I64", "I8", "U64", "U16", "BOOL", "F8_E4M3FNUZ", "X9")


@FUZZ
@given(data=st.data())
def test_tensors_of_any_type_and_shape(data, model, adapter, tmp_path):
    """Headers that are whole: names of the adapter, other types, shapes, and bytes to match."""
    folder = Path(shutil.copytree(adapter, tmp_path / "forged", dirs_exist_ok=True))
    content = (adapter / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, start = json.loads(content[8 : 8 + size]), 0
    changed = data.draw(st.lists(st.sampled_from(sorted(header)), max_size=3))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if name in changed:
            entry["dtype"] = data.draw(st.sampled_from(DTYPES))
            if data.draw(st.booleans()):
                entry["shape"] = data.draw(st.lists(st.integers(0, 9), max_size=3))
        bits = int("0" + re.sub(r"^\D*(\d*).*", r"\1", entry["dtype"])) or 8
        bits = 16 if entry["dtype"] == "BF16" else bits
        stop = start + math.prod(entry["shape"]) * bits // 8
        entry["data_offsets"], start = [start, stop], stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = data.draw(st.sampled_from([b"\0", b"\xff", b"\x3c"])) * start
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + body)
    loads_or_tells(model, folder)
    with suppress(UserError):
        StoredAdapter.read(folder)


@FUZZ
@given(data=st.data())
def test_forged_settings_beside_an_adapter(data, run, tmp_path):
    """lora_lightning.json: read whole and harmless, or refused."""
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "forged", dirs_exist_ok=True))
    content = json.loads((folder / SIDECAR).read_text())
    part = content
    while isinstance(part, dict) and part and data.draw(st.integers(0, 3)):
        key = data.draw(st.sampled_from(sorted(part)))
        if not isinstance(part[key], dict) or data.draw(st.booleans()):
            part[key] = data.draw(JSON)
            break
        part = part[key]
    write_sidecar(folder, content)
    try:
        found = load_trained(folder)
    except UserError:
        return
    assert not found.model_config.trust_remote_code


@FUZZ
@given(data=st.data())
def test_a_damaged_checkpoint(data, run, tmp_path):
    content = bytearray((run / "checkpoints" / "last.ckpt").read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with suppress(UserError):
        assert isinstance(read_checkpoint(path)["state_dict"], dict)


@FUZZ
@given(data=st.data())
def test_forged_settings_in_a_checkpoint(data, run):
    """A module is built from what passes, or our own error comes out."""
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]
    part = saved
    while isinstance(part, dict) and part:
        key = data.draw(st.sampled_from(sorted(part)))
        if not isinstance(part[key], dict) or data.draw(st.booleans()):
            part[key] = data.draw(JSON)
            break
        part = part[key]
    saved.setdefault("model", {})
    if isinstance(saved["model"], dict):
        saved["model"]["trust_remote_code"] = True
    with suppress(UserError):
        module = LoraModule(**{"task": {}, **arguments_from_file(saved, "x.ckpt")})
        assert not module.model_config.trust_remote_code


class Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "owned")}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="holds more than values and tensors"):
        read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "owned").exists()


def test_a_pickled_adapter_is_not_read(model, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "pickled"))
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(UserError, match="a pickle, which can run code and is never read"):
        load_adapter(model, folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("group", ["callbacks", "logger", "trainer", "hydra", "model", "data"])
def test_classes_that_come_with_an_adapter_are_not_built(group, run, rows_jsonl, tmp_path):
    """A _target_ in any group of the settings beside an adapter."""
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "forged"))
    content = json.loads((folder / SIDECAR).read_text())
    node = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": []}}
    node["self"]["_args_"] = [str(tmp_path / "owned")]
    content["settings"].setdefault(group, {})["evil"] = node
    write_sidecar(folder, content)
    try:
        settings = AdapterFolder(folder).read_sidecar()["settings"]
        assert set(settings) <= {"model", "task", "data", "lora", "optim"}
        from lora_lightning.config.compose import over_saved

        config = over_saved(settings, [f"data.test={rows_jsonl}", "trainer=cpu"])
        evaluate(folder, config)
    except UserError:
        assert group in ("model", "data")
    assert not (tmp_path / "owned").exists()


def test_an_adapter_cannot_allow_remote_code_or_say_where_to_write(run, tmp_path):
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "forged"))
    content = json.loads((folder / SIDECAR).read_text())
    content["settings"]["model"]["trust_remote_code"] = True
    content["settings"]["data"]["cache_dir"] = str(tmp_path / "elsewhere")
    write_sidecar(folder, content)
    settings = AdapterFolder(folder).read_sidecar()["settings"]
    assert "trust_remote_code" not in settings["model"]
    assert "cache_dir" not in settings["data"]
    assert load_trained(folder).model_config.trust_remote_code is False


def test_an_adapter_cannot_read_the_environment(run, tmp_path):
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "forged"))
    content = json.loads((folder / SIDECAR).read_text())
    content["settings"]["model"]["name_or_path"] = "${oc.env:HOME}"
    write_sidecar(folder, content)
    with pytest.raises(UserError, match="settings must be plain values"):
        AdapterFolder(folder).read_sidecar()


def evil_base(tiny_bert, folder: Path) -> Path:
    """A base whose config is built by a Python file, which leaves a mark."""
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    mark = folder.parent / "owned"
    (folder / "configuration_evil.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from transformers import BertConfig\n"
        "class EvilConfig(BertConfig):\n    model_type = 'evil'\n"
    )
    return folder


def forged_checkpoint(run: Path, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a run's last.ckpt whose content a function has changed."""
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    change(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("way", ["import", "load_from_checkpoint", "adapter"])
def test_checkpoint_that_allows_remote_code_runs_none(way, run, tiny_bert, tmp_path):
    """Only what the user types allows it."""
    base = str(evil_base(tiny_bert, tmp_path / "evil"))
    model = {"name_or_path": base, "trust_remote_code": True, "tokenizer": str(tiny_bert)}
    path = forged_checkpoint(
        run, tmp_path / "evil.ckpt", lambda c: c["hyper_parameters"]["model"].update(model)
    )
    if way == "adapter":
        values_of(str(path), ModelConfig(name_or_path=base), LoraConfig())
        assert not (tmp_path / "owned").exists()
        return

    def use(trust: bool) -> None:
        if way == "import":
            typed = ["model.trust_remote_code=true"] * trust
            import_adapter(path, tmp_path / "out", typed)
        else:
            changes = {"model": {"trust_remote_code": True}} if trust else {}
            LoraModule.load_from_checkpoint(path, **changes)

    with pytest.raises(UserError, match="trust_remote_code"):
        use(trust=False)
    assert not (tmp_path / "owned").exists()
    with suppress(UserError):  # there is a config alone, and no model of it
        use(trust=True)
    assert (tmp_path / "owned").exists()


def test_checkpoint_with_interpolation_is_refused(run, tmp_path, monkeypatch):
    """An environment variable would end in a folder that is shared."""
    monkeypatch.setenv("SECRET_TOK", "SECRET")
    text = "x ${oc.env:SECRET_TOK}"
    path = forged_checkpoint(
        run, tmp_path / "x.ckpt", lambda c: c["hyper_parameters"]["task"].update(text_column=text)
    )
    for use in (
        lambda: import_adapter(path, tmp_path / "out", []),
        lambda: LoraModule.load_from_checkpoint(path),
        lambda: values_of(str(path), ModelConfig(), LoraConfig()),
    ):
        with pytest.raises(UserError, match=r"x.ckpt: task: settings must be plain .*\$\{"):
            use()
    assert not (tmp_path / "out").exists()
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    config = folder / ".hydra" / "config.yaml"
    config.parent.mkdir(exist_ok=True)
    plain = OmegaConf.to_container(compose_config([]), resolve=False)
    plain["data"]["path"] = text
    config.write_text(OmegaConf.to_yaml(plain))
    with pytest.raises(UserError, match="config.yaml: data: settings must be plain"):
        import_adapter(folder / "checkpoints" / "last.ckpt", tmp_path / "out", [])
    peft = Path(shutil.copytree(run / "adapter", tmp_path / "peft"))
    raw = json.loads((peft / CONFIG).read_text())
    (peft / CONFIG).write_text(json.dumps({**raw, "base_model_name_or_path": text}))
    with pytest.raises(UserError, match="settings must be plain"):
        import_adapter(peft, tmp_path / "out", ["task=classification"])


@pytest.mark.parametrize("kind", ["sidecar", "checkpoint"])
def test_task_name_that_is_a_path_composes_no_file(kind, run, tmp_path, monkeypatch):
    evil = tmp_path / "evil.yaml"
    evil.write_text("# @package _global_\nmodel:\n  trust_remote_code: true\n")
    name = "../" * 30 + "." + str(evil.with_suffix(""))
    path = forged_checkpoint(
        run, tmp_path / "x.ckpt", lambda c: c["hyper_parameters"]["task"].update(name=name)
    )
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "forged"))
    content = json.loads((folder / SIDECAR).read_text())
    content["settings"]["task"]["name"] = name
    write_sidecar(folder, content)
    asked: list[str] = []
    monkeypatch.setattr("lora_lightning.config.compose.compose_config", asked.extend)
    uses = {
        "checkpoint": lambda: import_adapter(path, tmp_path / "out", []),
        "sidecar": lambda: predictor_for(folder, []),
    }
    with pytest.raises(UserError, match="unknown task"):
        uses[kind]()
    assert not asked


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda own: own["model"].update(gradient_checkpointing="often"), "gradient_checkpointing"),
        (lambda own: own["optim"].update(new_key=1), "new_key"),
        (lambda own: own["optim"].update(options={"_target_": "os.system"}), "_target_"),
        (lambda own: own.update(lora=[8]), "'lora' must be a mapping"),
        (lambda own: own.update(seed="7"), "seed must be a whole number"),
        (lambda own: own["task_state"].update(labels={"a": 1}), "task_state.labels must be plain"),
    ],
    ids=["type", "key", "target", "group", "seed", "state"],
)
def test_checkpoint_settings_off_the_list_are_refused(change, told, run, tmp_path):
    path = forged_checkpoint(run, tmp_path / "x.ckpt", lambda c: change(c["hyper_parameters"]))
    for use in (
        lambda: import_adapter(path, tmp_path / "out", []),
        lambda: LoraModule.load_from_checkpoint(path),
    ):
        with pytest.raises(UserError, match=told):
            use()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("..", "names"),
        ("/elsewhere/..", "names"),
        ("last.ckpt", "names"),
        ("last-previous.ckpt", "names"),
        ("config.yaml", "names"),
        ("/elsewhere/.ckpt", "names"),
        (7, "names"),
    ],
)
@pytest.mark.parametrize("key", ["best_k_models", "kth_best_model_path", "best_model_path"])
@pytest.mark.parametrize("filename", ["best-step-{step}", "{epoch}-{step}"])
def test_best_checkpoint_of_another_name_is_refused(name, told, key, filename, tmp_path):
    """Lightning deletes what stands there, a whole folder too, at the next better validation."""
    callback = BestCheckpoint(dirpath=str(tmp_path), filename=filename)
    good = {
        **{"best_model_score": 1.0, "kth_value": 1.0, "current_score": 1.0, "dirpath": "/old"},
        "best_model_path": "/old/best-step-4.ckpt",
        "kth_best_model_path": "/old/best-step-4.ckpt",
        "best_k_models": {"/old/best-step-4.ckpt": 1.0},
        "last_model_path": "",
    }
    callback.load_state_dict(good)
    assert callback.best_k_models == {str(tmp_path / "best-step-4.ckpt"): 1.0}
    forged = {**good, key: {name: 1e9} if key == "best_k_models" else name}
    with pytest.raises(UserError, match=told):
        callback.load_state_dict(forged)
    assert callback.best_model_path == str(tmp_path / "best-step-4.ckpt")
    with pytest.raises(UserError, match="score"):
        callback.load_state_dict({**good, "kth_value": "1"})


def test_resume_of_a_forged_checkpoint_deletes_nothing(fast, tiny_bert, rows_jsonl, tmp_path):
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"]
    asked = [*fast, *where, "trainer.max_epochs=1", f"output_dir={tmp_path / 'run'}"]
    train(compose_config(asked))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    (state,) = (v for k, v in content["callbacks"].items() if k.startswith("BestCheckpoint"))
    state |= {"best_k_models": {"..": 1e9}, "kth_best_model_path": ".."}
    state |= {"kth_value": 1e9, "best_model_score": 1e9}
    torch.save(content, last)
    before = set((tmp_path / "run").rglob("*.ckpt"))
    result = tmp_path / "run" / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "status": "running"}))
    with pytest.raises(UserError, match="names '..' as one of the best checkpoints"):
        train(compose_config([*asked, "trainer.max_epochs=2"]), resume=True)
    assert before <= set((tmp_path / "run").rglob("*.ckpt"))


LIGHTNINGS = "ModelCheckpoint{'monitor': None}"
OWN = "{run}/checkpoints/"


@pytest.mark.parametrize(
    ("callback", "state", "told"),
    [
        (LIGHTNINGS, {"best_k_models": {"{home}/thesis": 1e9}}, "names '{home}/thesis'"),
        (LIGHTNINGS, {"best_k_models": {"{home}/thesis.ckpt": 1e9}}, "outside the run"),
        (LIGHTNINGS, {"best_k_models": {OWN + "../../thesis.ckpt": 1e9}}, "outside the run"),
        (LIGHTNINGS, {"best_k_models": {OWN + "link/thesis.ckpt": 1e9}}, "outside the run"),
        (LIGHTNINGS, {"best_k_models": {"s3://bucket/thesis.ckpt": 1e9}}, "outside the run"),
        (LIGHTNINGS, {"best_k_models": {OWN + "last.ckpt": 1e9}}, "names"),
        (LIGHTNINGS, {"best_k_models": {7: 1e9}}, "names 7"),
        (LIGHTNINGS, {"best_k_models": torch.zeros(2)}, "no list"),
        (LIGHTNINGS, {"kth_best_model_path": "{home}"}, "names '{home}'"),
        (LIGHTNINGS, {"best_model_path": torch.zeros(2)}, "names tensor"),
        (LIGHTNINGS, {"last_model_path": OWN + "last-previous.ckpt"}, "names"),
        (LIGHTNINGS, {"last_model_path": "{home}/thesis.ckpt"}, "outside the run"),
        ("BestCheckpoint{}", {"last_model_path": OWN + "last-previous.ckpt"}, "names"),
        (LIGHTNINGS, {"last_model_path": OWN + "last.ckpt"}, None),
        (LIGHTNINGS, {"best_k_models": {OWN + "val/loss=0.1.ckpt": 1e9}}, None),
        (LIGHTNINGS, {"best_model_path": "/moved/checkpoints/epoch=1.ckpt"}, None),
        (LIGHTNINGS, {"best_model_path": ""}, None),
        ("BestCheckpoint{}", {"best_model_path": "{home}/thesis.ckpt"}, None),
        ("EarlyStopping{}", {"wait_count": 0}, None),
    ],
)
def test_a_state_that_has_lightning_delete_others_files_is_refused(callback, state, told, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "link").symlink_to(tmp_path)
    (tmp_path / "thesis.ckpt").write_text("PRECIOUS")

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {placed(key): placed(one) for key, one in value.items()}
        return value.format(run=run, home=tmp_path) if isinstance(value, str) else value

    steps = {"total": {"completed": 0}}
    optimizer = {"optimizer": {"step": steps}}
    loop = {"epoch_loop.automatic_optimization.optim_progress": optimizer}
    content = {
        **{"epoch": 0, "global_step": 0, "data_ranks": 1, "pytorch-lightning_version": "2.6.4"},
        **{"optimizer_states": [], "lr_schedulers": [], "loops": {"fit_loop": loop}},
        "callbacks": {callback: placed(state)},
    }
    if told is None:
        check_resumable(content, run / "checkpoints" / "last.ckpt")
        return
    with pytest.raises(UserError, match=re.escape(placed(told))):
        check_resumable(content, run / "checkpoints" / "last.ckpt")


EVIL = ("os.system", "pathlib.Path.touch", "lightning.pytorch.callbacks.Callback.os.system")
EVIL += ("lightning.pytorch.callbacks.callback.torch.load", "lightning.pytorch.cli.LightningCLI")
EVIL += ("transformers.AutoConfig.from_pretrained", "torch.optim.adam.torch.load")


@pytest.mark.parametrize("target", EVIL)
def test_resume_builds_no_class_of_others_that_is_not_typed(target, run_cli, tmp_path):
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    config = OmegaConf.to_container(compose_config([f"output_dir={folder}"]), resolve=False)
    saved = folder / ".hydra" / "config.yaml"
    saved.write_text(OmegaConf.to_yaml(config))
    assert settings_to_retype(read_config(saved)) == {}
    config["callbacks"]["early_stopping"]["deep"] = [{"_target_": target}]
    saved.write_text(OmegaConf.to_yaml(config))
    item = f"callbacks.early_stopping.deep.0._target_={target}"
    status, _, err = run_cli("train", f"resume={folder}")
    assert status == 2
    assert " ".join(err.split()).endswith(f"type it again: resume={folder} {item}")
    assert check_typed_again(read_config(saved), [item], "resume=X") == []
    idle = "callbacks.mine._target_=os.system"
    said = " ".join(run_cli("train", f"resume={folder}", item, idle)[2].split())
    assert f"not supported with {idle}. A resumed run keeps its config" in said
    config["callbacks"]["early_stopping"]["deep"] = f"${{oc.create:'{{_target_: {target}}}'}}"
    saved.write_text(OmegaConf.to_yaml(config))
    assert run_cli("train", f"resume={folder}")[0] == 2


CHOSEN = {
    "model.trust_remote_code": (True, "model.trust_remote_code=true"),
    "model.attn_implementation": ("evil/kernel", "model.attn_implementation=evil/kernel"),
    "data.train": ("${oc.env:HOME}/x.csv", "'data.train=${oc.env:HOME}/x.csv'"),
    "tags": (["${oc.${task.name}:a}"], "'tags.0=${oc.${task.name}:a}'"),
    "trainer.max_steps": ("${oc.decode:'{1}'}", "'trainer.max_steps=${oc.decode:'\"'\"'{1}'"),
}


@pytest.mark.parametrize("key", CHOSEN)
def test_resume_has_what_runs_or_reads_more_than_the_config_typed_again(key, run_cli, tmp_path):
    folder = tmp_path / "run"
    value, item = CHOSEN[key]
    config = compose_config([f"output_dir={folder}"])
    OmegaConf.update(config, key, value, force_add=True)
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    saved = read_config(folder / ".hydra" / "config.yaml")
    status, _, err = run_cli("train", f"resume={folder}")
    assert status == 2
    assert f"type it again: resume={folder} {item}" in " ".join(err.split())
    typed = shlex.split(" ".join(err.split()).partition("type it again: ")[2])[1:]
    if key in ("model.trust_remote_code", "model.attn_implementation", "data.train"):
        assert check_typed_again(saved, typed, "resume=X") == []


OUTSIDE = {
    "data.cache_dir": "{home}/cache",
    "logger.csv.save_dir": "{home}/curves",
    "logger.csv.name": "../../curves",
    "logger.tensorboard.version": "{home}/events",
    "logger.tensorboard.save_dir": "${{output_dir}}/../other",
    "logger.csv.root_dir": "curves",
    "callbacks.best.dirpath": "{home}/checkpoints",
    "callbacks.best.filename": "../../best",
    "callbacks.samples.folder": "~/samples",
    "callbacks.last.folder": "",
    "callbacks.mine.places.0.folder": "{run}2",
    "trainer.default_root_dir": "{home}",
    "trainer.profiler.dirpath": "{run}/link",
    "logger.mlflow.tracking_uri": "file:{home}",
    "logger.wandb.settings.base_url": "https://example.org",
}


@pytest.mark.parametrize("key", OUTSIDE)
def test_resume_config_that_writes_outside_of_its_run_is_refused(key, run_cli, tmp_path):
    folder, cache = tmp_path / "run", tmp_path / "cache"
    config = compose_config([f"output_dir={folder}"])
    (folder / ".hydra").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path)
    value = OUTSIDE[key].format(home=tmp_path, run=folder)
    if ".0." in key:
        OmegaConf.update(config, "callbacks.mine", {"places": [{"folder": value}]}, force_add=True)
    else:
        OmegaConf.update(config, key, value, force_add=True)
    saved = folder / ".hydra" / "config.yaml"
    OmegaConf.save(config, saved)
    (item,) = settings_to_retype(read_config(saved))
    assert item.partition("=")[0] == key
    status, out, err = run_cli("train", f"resume={folder}")
    assert (status, out) == (2, "")
    told = " ".join(err.split())
    assert f"({key}), outside of the run's folder" in told
    assert told.endswith(f"type it again: resume={folder} {shlex.quote(item)}")
    assert check_typed_again(read_config(saved), [item], "resume=X") == []
    assert sorted(path.name for path in folder.iterdir()) == [".hydra", "link"]
    assert not cache.exists()
    assert str(Interrupted(folder, 2, config)).endswith(f"resume={folder} {shlex.quote(item)}")
    (folder / "result.json").write_text('{"status": "completed"}')
    assert run_cli("train", f"resume={folder}", item)[0] == 0


@pytest.mark.parametrize(
    "item",
    [
        "data.cache_dir={run}/cache",
        "callbacks.retention.texts=/texts.txt",  # only read
        "logger.csv.save_dir={run}/deep/../curves",
        "logger.csv.name=a/b",
        "+callbacks.best.note='of 3..4 kinds'",
    ],
)
def test_resume_config_that_writes_inside_of_its_run_is_accepted(item, tmp_path):
    run = tmp_path / "run"
    assert settings_to_retype(compose_config([f"output_dir={run}", item.format(run=run)])) == {}


def test_a_plain_interpolation_need_not_be_typed_again():
    config = compose_config(["tags=['a: ${task.monitor}']", "data.train='${output_dir}/x'"])
    assert settings_to_retype(config) == {}


def test_report_of_others_reads_no_environment(tmp_path, monkeypatch, run_cli):
    """Nor where the interpolation is escaped; one to another setting is resolved as ever."""
    monkeypatch.setenv("SECRET_TOK", "SECRET")
    for job, monitor in enumerate(["val/${oc.env:SECRET_TOK}", "val/\\${oc.env:SECRET_TOK}"]):
        folder = tmp_path / "sweep" / str(job)
        (folder / ".hydra").mkdir(parents=True)
        config = OmegaConf.to_container(compose_config([]), resolve=False)
        config["task"]["monitor"] = monitor
        config["lora"]["alpha"] = "${lora.rank}"
        config["model"]["revision"] = "${oc.env:SECRET_TOK}"
        (folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(config))
        (folder / ".hydra" / "overrides.yaml").write_text("['tags=[${oc.env:SECRET_TOK}]']")
        (folder / "result.json").write_text('{"status": "completed", "objective": 0.5}')
    status, out, err = run_cli("report", str(tmp_path / "sweep"))
    assert (status, err) == (0, "")
    assert "SECRET_TOK" in out
    with (tmp_path / "sweep" / "results.csv").open(newline="") as handle:
        assert {row["scale"] for row in csv.DictReader(handle)} == {"1.0"}, "alpha is the rank"
    written = [path.read_text() for path in (tmp_path / "sweep").glob("re*.*")]
    assert len(written) == 3
    assert not re.search("SECRET(?!_TOK)", "".join([out, *written]))


def test_a_rank_that_the_file_does_not_have_takes_no_memory(model, adapter, tmp_path):
    folder = with_config(adapter, tmp_path / "forged", r=10**9)
    with pytest.raises(UserError, match="rank"):
        load_adapter(model, folder)


def test_values_that_are_not_numbers_are_refused(model, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "forged"))
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match="not finite"):
        load_adapter(model, folder)


@pytest.mark.parametrize(
    "kind",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool, torch.complex64],
    ids=str,
)
def test_weights_of_a_type_that_no_adapter_has_are_refused(kind, model, adapter, tmp_path):
    folder = with_weights(adapter, tmp_path / "forged", lambda tensor: tensor.to(kind))
    for read in (lambda: load_adapter(model, folder), lambda: StoredAdapter.read(folder)):
        with pytest.raises(UserError, match="must be float32, float16"):
            read()


def test_what_is_finite_in_64_bits_alone_is_refused(model, adapter, tmp_path):
    folder = with_weights(adapter, tmp_path / "forged", lambda t: t.double().fill_(1e300))
    for read in (lambda: load_adapter(model, folder), lambda: StoredAdapter.read(folder)):
        with pytest.raises(UserError, match="not finite"):
            read()


@pytest.mark.parametrize("name", [CONFIG, SIDECAR])
def test_json_too_deep_to_read_is_told(name, run, tmp_path):
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "forged"))
    (folder / name).write_text("[" * 200_000)
    with pytest.raises(UserError, match=name):
        load_trained(folder)


def test_a_number_too_large_to_be_one_is_told(model, adapter, tmp_path):
    folder = with_config(adapter, tmp_path / "forged", lora_alpha=10**400)
    with pytest.raises(UserError, match="lora_alpha|lora.alpha|wrong type"):
        load_adapter(model, folder)


def test_attention_kernels_of_the_hub_are_not_an_adapters_to_choose(run, tmp_path):
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "forged"))
    content = json.loads((folder / SIDECAR).read_text())
    for asked, kept in (("k/k@main", None), ("flash_attention_2", None), ("sdpa", "sdpa")):
        content["settings"]["model"]["attn_implementation"] = asked
        write_sidecar(folder, content)
        assert (
            AdapterFolder(folder).read_sidecar()["settings"]["model"].get("attn_implementation")
            == kept
        )


@pytest.mark.parametrize("verb", ["merge", "combine", "export", "canonical", "import", "base"])
def test_a_link_out_of_a_folder_is_not_followed(verb, run, tiny_bert, rows_jsonl, tmp_path):
    """What is beside the weights is written on: a link would carry a file of the user's away."""
    secret = tmp_path / "secret"
    secret.write_text("PRIVATE")
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "forged"))
    base = Path(shutil.copytree(tiny_bert, tmp_path / "base"))
    out = tmp_path / "out"

    def link(name: str) -> None:
        path = (base if verb == "base" else folder) / name
        path.unlink(missing_ok=True)
        path.symlink_to(secret)

    link("chat_template.jinja")
    fresh = compose_config([f"model.name_or_path={base}", f"data.train={rows_jsonl}"])
    uses = {
        "merge": lambda: merge(folder, out),
        "combine": lambda: combine_adapters([folder, folder], out, weights=[1.0, 1.0]),
        "export": lambda: copy_adapter(folder, out),
        "canonical": lambda: write_canonical(folder, out),
        "import": lambda: import_adapter(folder, out, [f"model.name_or_path={tiny_bert}"]),
        "base": lambda: load_tokenizer(settings_of(fresh).model),
    }
    with pytest.raises(UserError, match="chat_template.jinja is a link to .*secret"):
        uses[verb]()
    assert not out.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "deep/a.safetensors"])
def test_shards_lie_beside_their_index(name, tiny_bert, tmp_path):
    base = Path(shutil.copytree(tiny_bert, tmp_path / "base"))
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = base / "model.safetensors.index.json"
    with safe_open(tmp_path / "outside.safetensors", "pt") as file:
        names = list(file.keys())
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
    config = ModelConfig(name_or_path=str(base))
    with pytest.raises(UserError, match="shards must be in the folder of their index"):
        load_model_config(config)
    index.write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load_model_config(config)


def test_the_links_of_the_hubs_cache_are_followed(run, tmp_path):
    cache = tmp_path / "models--me--adapter"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    for path in (run / "adapter").iterdir():
        shutil.copyfile(path, cache / "blobs" / f"blob-{path.name}")
        (cache / "snapshots/abc" / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    combine_adapters([cache / "snapshots/abc"], tmp_path / "out", weights=[1.0])
    assert (tmp_path / "out" / SIDECAR).is_file()


@pytest.mark.parametrize("link", ["file", "blobs"])
def test_a_file_of_another_cache_is_not_followed(link, run, tmp_path):
    """A token that was saved as a private model's file, and a cache of links to such a one."""
    private = tmp_path / "models--my--private" / "blobs"
    private.mkdir(parents=True)
    (private / "1f").write_text("PRIVATE")
    folder = tmp_path / "models--their--adapter" / "snapshots" / "abc"
    shutil.copytree(run / "adapter", folder)
    if link == "blobs":
        (folder.parents[1] / "blobs").symlink_to(private)
    (folder / "chat_template.jinja").symlink_to(
        "../../blobs/1f" if link == "blobs" else private / "1f"
    )
    with pytest.raises(UserError, match="chat_template.jinja is a link to .*1f"):
        copy_adapter(folder, tmp_path / "out")


def test_lock_and_probe_change_no_file_that_a_link_names(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    victims = [tmp_path / "one", tmp_path / "two"]
    for victim, name in zip(victims, (".lock", ".writable"), strict=True):
        victim.write_text("PRECIOUS")
        (folder / name).symlink_to(victim)
    run = RunFolder(folder)
    with pytest.raises(UserError, match=r"cannot be written.*\.lock"), run.rollback_on_mistake():
        pass
    assert not is_abandoned(folder)
    (folder / ".lock").unlink()
    os.mkfifo(folder / ".lock")  # which would never open
    with pytest.raises(UserError, match="it is no file"), run.rollback_on_mistake():
        pass
    assert not is_abandoned(folder)
    (folder / ".lock").unlink()
    (folder / ".lock").write_text("kept")
    with run.rollback_on_mistake():
        assert (folder / ".lock").read_text() == "kept"
    assert is_abandoned(folder)
    assert [victim.read_text() for victim in victims] == ["PRECIOUS"] * 2


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_the_hub_are_not_a_bases_to_choose(key, tiny_bert, tmp_path, monkeypatch):
    """Nor "eager" in its place, which is the base's to choose; a typed name is asked for."""
    asked: list[str] = []

    def check(self, name, *others, **kwargs):
        asked.append(str(name))
        return usual(self, name if name in ("eager", "sdpa") else "sdpa", *others, **kwargs)

    usual = PreTrainedModel._check_and_adjust_attn_implementation
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", check)
    base = Path(shutil.copytree(tiny_bert, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(base)))

    def attention_of(stored: str, typed: str | None = None) -> str:
        (base / "config.json").write_text(json.dumps({**config, key: stored}))
        settings = ModelConfig(name_or_path=str(base), attn_implementation=typed)
        model = load_classifier(settings, tokenizer, ["no", "yes"])[0]
        assert model.config.id2label == {0: "no", 1: "yes"}
        return model.config._attn_implementation

    for stored in ("evil/kernel", "flash_attention_2", "flash_attention_3", "flash_attention_4"):
        assert attention_of(stored) == "sdpa"
    assert set(asked) <= {"None", "sdpa", ATTENTION}
    assert attention_of("eager") == "eager"
    attention_of("evil/kernel", typed="mine/kernel")
    assert "mine/kernel" in asked
    assert "evil/kernel" not in asked


def test_flash_attention_that_is_installed_is_an_adapters_to_choose(monkeypatch):
    for found in (None, "a module's spec"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        model = settings_from_file({"model": {"attn_implementation": "flash_attention_2"}}, "x")
        assert ("attn_implementation" in model["model"]) is (found is not None)


def test_experts_kernels_of_the_hub_are_not_a_bases_to_choose(tiny_mixtral, tmp_path):
    base = Path(shutil.copytree(tiny_mixtral, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    for stored in ("deepgemm", "sonicmoe", "eager"):
        (base / "config.json").write_text(json.dumps({**config, "experts_implementation": stored}))
        settings = ModelConfig(name_or_path=str(base))
        model = load_generator(settings, load_tokenizer(settings))
        assert model.config._experts_implementation in EXPERTS


def test_a_token_of_the_environment_is_written_nowhere(
    fast, tiny_bert, rows_jsonl, tmp_path, monkeypatch, run_cli
):
    """By the command, which leaves Hydra's files and logs too, where it ends well and where not."""
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefSECRET")
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"]
    run = tmp_path / "run"
    said = run_cli("train", *fast, *where, "trainer.max_epochs=1", f"output_dir={run}")
    assert said[0] == 0
    failed = run_cli("train", *fast, *where, "optim.lr=x", f"output_dir={tmp_path / 'failed'}")
    assert failed[0] == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "hydra.yaml", "result.json", "last.ckpt"} <= {
        path.name for path in files
    }
    assert not [path for path in files if b"SECRET" in path.read_bytes()]
    assert "SECRET" not in "".join(map(str, (*said, *failed)))


# Control characters and markup -------------------------------------------------------------------

ATTACK = "\x1b]52;c;cHduZWQ=\x07\x9b2J\u202e"
SHOWN = r"\x1b]52;c;cHduZWQ=\x07\x9b2J\u202e"


def test_printable_escapes_what_a_terminal_obeys_and_nothing_else():
    assert printable(ATTACK) == SHOWN
    assert printable("a\rb\x00\u2028\ud800\x7f") == r"a\x0db\x00\u2028\ud800\x7f"
    plain = "Ünïcode 漢字 🙂\tand\nlines [query] \\x1b"
    assert printable(plain) == plain
    written = json.dumps({"text": ATTACK + plain}, ensure_ascii=False)
    assert json.loads(printable(written, json=True)) == {"text": ATTACK + plain}
    assert not set(printable(written, json=True)) & set(ATTACK[:1] + "\x9b\u202e")


def test_message_about_a_column_holds_no_control_character(fast, tiny_bert, run_cli, tmp_path):
    (tmp_path / "rows.csv").write_text(f"a{ATTACK},b\n1,2\n")
    where = [f"model.name_or_path={tiny_bert}", f"data.train={tmp_path / 'rows.csv'}"]
    status, _, err = run_cli("train", *fast, *where, f"output_dir={tmp_path / 'run'}")
    assert status == 2
    assert SHOWN in err
    assert not set(err) & set("\x1b\x07\x9b\u202e")


def test_generated_text_is_shown_escaped_while_it_comes(capsys):
    class Tokenizer:
        def decode(self, ids: list[int], **options: object) -> str:
            return ATTACK + "\n"

    task = build_task({"name": "summarization"})
    task.tokenizer = Tokenizer()
    task.decode = lambda ids: ATTACK

    def generate(model, prompts, streamer=None):
        streamer.put(torch.tensor([[0]]))  # the prompt, which is not shown
        streamer.put(torch.tensor([1]))
        streamer.end()
        return [[1]]

    task.generate = generate
    assert task.stream(None, [0]) == ATTACK
    assert capsys.readouterr().out.strip() == SHOWN


def test_labels_of_the_data_are_plain_text_in_check_and_card(
    fast, tiny_bert, run_cli, tmp_path, monkeypatch
):
    """An environment variable that was typed as ${...} is not written into the card either."""
    monkeypatch.setenv("SECRET_TOK", "SECRET")
    label = f"neg\n\n<img src=x onerror=alert(1)>{ATTACK}"
    rows = [{"text": f"text {i}", "label": [label, "pos"][i % 2]} for i in range(24)]
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, rows)
    asked = [*fast, f"model.name_or_path={tiny_bert}", f"data.train={data}"]
    asked += ["trainer.max_epochs=1", "tags=['${oc.env:SECRET_TOK}']"]
    status, out, err = run_cli("check", *asked, f"output_dir={tmp_path / 'checked'}")
    assert status == 0, err
    assert not set(out + err) & set("\x1b\x07\x9b\u202e")
    assert SHOWN in out
    status, out, err = run_cli("train", *asked, f"output_dir={tmp_path / 'run'}")
    assert status == 0, err
    assert not set(out + err) & set("\x1b\x07\x9b\u202e")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert not set(card) & set("\x1b\x07\x9b\u202e")
    assert rf"neg\n\n&lt;img src=x onerror=alert(1)&gt;{SHOWN}, pos." in card
    assert not re.search("SECRET(?!_TOK)", card)


VALUES = ("lora.targets=[query]", "lora.targets=[query,value]", "data.train=[/d/a.csv]")
VALUES += ("data.train=[/d/a.csv,/d/b.csv]", f"task.prompt='{ATTACK}'", "lora.targets='$a$:bug:'")


def test_values_of_a_sweep_are_no_markup(run_cli, tmp_path, monkeypatch, capsys):
    """A path in brackets ended the report, and the sweep that showed it; a name was lost."""
    monkeypatch.setenv("COLUMNS", "250")
    jobs = []
    for number, value in enumerate(VALUES):
        folder = tmp_path / "[red]sweep" / str(number)
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(compose_config([])))
        (folder / ".hydra" / "overrides.yaml").write_text(json.dumps([value, "seed=1"]))
        result = {"status": "completed", "objective": number, "steps": 1, "monitor": "m"}
        (folder / "result.json").write_text(json.dumps(result))
        jobs.append(Job(number, [value], folder, name=value))
    status, out, err = run_cli("report", str(tmp_path / "[red]sweep"))
    assert (status, err) == (0, "")
    for shown in ("[query]", "[query,value]", "[/d/a.csv]", "[/d/a.csv,/d/b.csv]", SHOWN, ":bug:"):
        assert shown in out
    files = [path.read_text() for path in (tmp_path / "[red]sweep").glob("re*.*")]
    assert len(files) == 3
    assert not set("".join([out, *files])) & set("\x1b\x07\x9b\u202e")
    for terminal in (False, True):
        monkeypatch.setattr(Console, "is_terminal", property(lambda self, is_one=terminal: is_one))
        with JobTable(tmp_path / "[red]sweep", jobs, "m") as table:
            for job in jobs:
                job.state = "running"
            table.show()
            console = Console(width=250, markup=False, emoji=False, record=True, file=StringIO())
            console.print(table._table(jobs))
        shown = console.export_text() if terminal else capsys.readouterr().out
        assert "[red]sweep" in shown or terminal
        assert all(printable(value) in shown for value in VALUES), shown
        assert not set(shown) & set("\x1b\x07\x9b\u202e")
        for job in jobs:
            job.state = "waiting"
