"""Files of any content, and runs whose files were changed: our own error comes out, or a result.

Seeds change from run to run; the failing example and how to run it again are printed.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_lightning.config import compose_config, read_config
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.lora import UserError
from lora_lightning.modeling import load_tokenizer
from lora_lightning.settings import DataConfig, ModelConfig
from lora_lightning.tasks import build_task
from lora_lightning.train import train

FUZZ = settings(
    max_examples=100,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
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
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


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


@pytest.fixture(scope="module")
def stopped(fast, tiny_bert, rows_jsonl, tmp_path_factory) -> Path:
    """A run that has another step to go."""
    folder = tmp_path_factory.mktemp("fuzzed") / "run"
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", "test_before=false"]
    more = [*where, "callbacks.samples=null", "logger=none", f"output_dir={folder}"]
    train(compose_config([*fast, *more, "trainer.max_epochs=1"]))
    config = folder / ".hydra" / "config.yaml"
    config.parent.mkdir(exist_ok=True)
    written = compose_config([*fast, *more, "trainer.max_epochs=2"])
    config.write_text(yaml.safe_dump(_plain(written)))
    return folder


def _plain(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=False)


def changed(data: Any, content: Any) -> None:
    """Puts another value in some place of nested dicts and lists."""
    part = content
    while True:
        keys = sorted(part, key=str) if isinstance(part, dict) else range(len(part))
        key = data.draw(st.sampled_from(list(keys)))
        deeper = isinstance(part[key], (dict, list)) and part[key]
        if not deeper or data.draw(st.integers(0, 3)) == 0:
            part[key] = data.draw(VALUES)
            return
        part = part[key]


def goes_on_or_tells(folder: Path, outside: Path) -> None:
    before = {path: path.read_bytes() for path in outside.parent.iterdir() if path.is_file()}
    config = read_config(folder / ".hydra" / "config.yaml")
    config.output_dir = str(folder)
    with suppress(UserError):
        train(config, resume=True)
    found = {path: path.read_bytes() for path in outside.parent.iterdir() if path.is_file()}
    assert found == before


@pytest.mark.slow
@settings(FUZZ, max_examples=12)
@given(data=st.data(), part=st.sampled_from(["callbacks", "loops", "optimizer_states", ""]))
def test_forged_checkpoints_of_a_run(data, part, stopped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forged") / "run"
    shutil.copytree(stopped, folder)
    path = folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    changed(data, content[part] if part else content)
    with suppress(OverflowError, RuntimeError):  # what torch cannot write is no file
        torch.save(content, path)
    (folder.parent / "thesis").write_text("mine")
    goes_on_or_tells(folder, folder.parent / "thesis")
    shutil.rmtree(folder.parent)


@pytest.mark.slow
@settings(FUZZ, max_examples=12)
@given(data=st.data())
def test_forged_configs_of_a_run(data, stopped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forged") / "run"
    shutil.copytree(stopped, folder)
    path = folder / ".hydra" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    changed(data, content)
    path.write_text(yaml.safe_dump(content))
    (folder.parent / "thesis").write_text("mine")
    with suppress(UserError):
        goes_on_or_tells(folder, folder.parent / "thesis")
    shutil.rmtree(folder.parent)
