"""Presets of one's own: every verb finds them, wherever the flag stands; so does a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_lightning.cli.train import _saved_search
from lora_lightning.config.compose import compose_config, over_saved, saved_settings
from lora_lightning.config.presets import with_presets
from lora_lightning.lora import UserError


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a preset of each kind, beside the current one."""
    files = {
        "experiment/own.yaml": "# @package _global_\nlora: {rank: 5}\noptim: {lr: 0.25}\n",
        "trainer/own.yaml": "defaults: [cpu]\nmax_epochs: 7\n",
        "task/own.yaml": "defaults: [sentiment]\ntext_column: words\n",
        "sweep/own.yaml": "# @package _global_\nhydra: {sweeper: {params: {lora.rank: '1,2'}}}\n",
        "whole.yaml": "defaults: [train, _self_]\nseed: 11\n",
        "train.yaml": "defaults: [base_schema, model: minilm, data: reviews, task: sentiment, "
        "lora: default, optim: adamw, trainer: cpu, logger: none, callbacks: none, "
        "hydra: default, _self_]\nseed: 12\noutput_dir: here\n",
    }
    for name, text in files.items():
        path = tmp_path / "my presets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "my presets"
    with_presets([])


@pytest.mark.parametrize(
    "flags",
    [
        ["--config-dir", "my presets"],
        ["--config-dir=my presets"],
        ["-cd", "my presets"],
        ["hydra.searchpath=['my presets']"],
        ["hydra.searchpath=['file://my presets']"],
    ],
)
def test_presets_are_found_wherever_the_flag_stands(mine, flags):
    settings = ["experiment=own", "trainer=own", "task=own"]
    for place in range(len(settings) + 1):
        arguments = with_presets([*settings[:place], *flags, *settings[place:]])
        config = compose_config(arguments)
        assert (config.lora.rank, config.optim.lr, config.trainer.max_epochs) == (5, 0.25, 7)
        assert config.task.text_column == "words"
        assert [item for item in arguments if item.startswith("hydra.searchpath=")] == [
            f"hydra.searchpath=['file://{mine}']"
        ]


def test_a_config_of_ones_own_is_the_primary_one(mine):
    arguments = with_presets(["--config-name", "whole", "--config-dir", str(mine), "lora=rslora"])
    config = compose_config(arguments)
    assert (config.seed, config.lora.use_rslora) == (11, True)
    arguments = with_presets(["--config-path", str(mine), "lora=rslora", "experiment=own"])
    with pytest.raises(UserError, match="experiment"):  # this config has no such group
        compose_config(arguments)
    config = compose_config(with_presets(["--config-path", str(mine), "lora=rslora"]))
    assert (config.seed, config.lora.use_rslora) == (12, True)
    assert compose_config(with_presets([])).seed == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config-dir", "nowhere"], "--config-dir: nowhere is no folder"),
        (["--config-dir"], "--config-dir needs a value"),
        (["--config-dir", "--cfg"], "--config-dir needs a value"),
        (["hydra.searchpath=my"], "give a list of folders"),
        (["hydra.searchpath=[nowhere]"], "nowhere is no folder"),
    ],
)
def test_a_folder_that_is_not_there_is_told(mine, arguments, said):
    with pytest.raises(UserError, match=said):
        with_presets(arguments)


def test_known_presets_are_those_of_the_folder_too(mine):
    arguments = with_presets(["--config-dir", str(mine), "experiment=owm"])
    with pytest.raises(UserError, match=r"Did you mean 'own'\? Known: .*own, sst2"):
        compose_config(arguments)


def test_settings_saved_with_an_adapter_take_presets_too(mine):
    saved = saved_settings(compose_config(["lora.rank=3", "data.batch_size=5"]))
    arguments = with_presets(["--config-dir", str(mine), "experiment=own", "trainer=own"])
    config = over_saved(saved, arguments)
    assert (config.lora.rank, config.optim.lr, config.data.batch_size) == (5, 0.25, 5)
    assert config.trainer.max_epochs == 7
    config = over_saved(saved, with_presets(["--config-dir", str(mine)]))
    assert (config.lora.rank, config.data.batch_size) == (3, 5)


@pytest.mark.parametrize("verb", ["check", "plan", "train"])
def test_each_verb_reads_the_flag(mine, run_cli, verb):
    status, _, err = run_cli(verb, "experiment=nope", "--config-dir", str(mine))
    assert status == 2
    assert "Known: full_reviews, llm_classification, own, sst2." in err


def test_a_run_that_is_there_is_left_as_it_was(mine, run_cli):
    run = Path("run")
    (run / ".hydra").mkdir(parents=True)
    config = run / ".hydra" / "config.yaml"
    config.write_text("seed: 3\n")
    (run / "result.json").write_text(json.dumps({"status": "interrupted", "config_hash": "x"}))
    status, _, err = run_cli(
        "train", "--config-dir", str(mine), "experiment=own", "output_dir=run", "trainer=cpu"
    )
    assert (status, "already holds a run" in err) == (2, True)
    assert config.read_text() == "seed: 3\n"


def test_a_run_that_goes_on_looks_where_it_was_begun(mine):
    hydra = mine.parent / "run" / ".hydra" / "hydra.yaml"
    hydra.parent.mkdir(parents=True)
    assert _saved_search(mine.parent / "run") == []
    hydra.write_text(
        f"hydra: {{searchpath: ['file://{mine}', 'pkg://of.others', 'file:///gone']}}\n"
    )
    found = _saved_search(mine.parent / "run")
    assert found == [f"hydra.searchpath=['file://{mine}']"]
    assert compose_config(["trainer=own", *found]).trainer.max_epochs == 7
