"""Names of tasks and of their settings, the current ones and those of earlier versions."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from omegaconf import OmegaConf

from compatibility.make import FILES
from lora_lightning import ClassificationConfig, ClassificationTask, SentimentConfig, SentimentTask
from lora_lightning.config.compose import (
    compose_config,
    config_hash,
    over_saved,
    saved_settings,
    settings_of,
)
from lora_lightning.config.presets import with_presets
from lora_lightning.config.saved import read_config, read_run_config
from lora_lightning.config.tasks import (
    GENERATION,
    TASK_CONFIGS,
    GenerationSettings,
    SummarizationConfig,
)
from lora_lightning.config.untrusted import arguments_from_file, settings_from_file
from lora_lightning.lora import UserError
from lora_lightning.tasks import build_task

BEFORE = {"max_new_tokens": 9, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_beams": 2}


def generation_of(*overrides: str) -> GenerationSettings:
    return build_task(settings_of(compose_config([*overrides])).task).config.generation


def test_classification_task_has_sentiment_as_alias():
    assert SentimentTask is ClassificationTask
    assert SentimentConfig is ClassificationConfig
    assert compose_config(["task=sentiment"]).task == compose_config(["task=classification"]).task
    assert compose_config([]).task.name == "classification"
    assert build_task({"name": "sentiment"}).config == build_task({}).config
    saved = settings_from_file({"task": {"name": "sentiment", "labels": ["a", "b"]}}, "here")
    assert saved["task"] == {"name": "classification", "labels": ["a", "b"]}
    assert read_run_config(FILES / "run/.hydra/config.yaml").task.name == "classification"


def test_config_hash_of_an_earlier_run_stays():
    config = read_config(FILES / "run/.hydra/config.yaml")
    recorded = json.loads((FILES / "run/result.json").read_text())["config_hash"]
    assert config_hash(config) == recorded
    config.task.name = "classification"
    assert config_hash(config) == recorded


def test_config_hash_is_equal_for_a_setting_and_its_alias():
    generation = [f"task.generation.{name}={value}" for name, value in BEFORE.items()]
    aliases = [f"task.{name}={value}" for name, value in BEFORE.items()]
    config = compose_config(["task=summarization", *generation])
    assert config_hash(config) == config_hash(compose_config(["task=summarization", *aliases]))
    assert config_hash(config) != config_hash(compose_config(["task=summarization"]))
    earlier = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    for name in ("generation", *GENERATION):
        del earlier.task[name]
    earlier.task = {**earlier.task, **BEFORE}
    assert config_hash(config) == config_hash(earlier)


@pytest.mark.parametrize("task", ["summarization", "instruct", "lm"])
def test_generation_defaults_are_those_of_the_dataclass(task):
    assert generation_of(f"task={task}") == TASK_CONFIGS[task]().generation
    assert generation_of(f"task={task}", "task.generation.num_beams=3").num_beams == 3
    partial = build_task({"name": task, "generation": {"num_beams": 3}}).config.generation
    assert asdict(partial) == {**asdict(TASK_CONFIGS[task]().generation), "num_beams": 3}


@pytest.mark.parametrize("name", GENERATION)
def test_generation_alias_sets_the_same_value(name, tmp_path):
    value = BEFORE[name]
    expected = asdict(GenerationSettings()) | {name: value}
    assert asdict(generation_of("task=summarization", f"task.{name}={value}")) == expected
    assert asdict(SummarizationConfig(**{name: value}).generation) == expected
    preset = tmp_path / "experiment" / "mine.yaml"
    preset.parent.mkdir()
    preset.write_text(
        "# @package _global_\ndefaults: [override /task: summarization]\n"
        f"task: {{{name}: {str(value).lower()}}}\n"
    )
    typed = with_presets(["experiment=mine", f"--config-dir={tmp_path}"])
    assert asdict(generation_of(*typed)) == expected


def test_generation_alias_in_files_is_read():
    earlier = {"name": "summarization", **BEFORE}
    saved = settings_from_file({"task": earlier}, "here")
    assert saved["task"] == {"name": "summarization", "generation": BEFORE}
    hyper = arguments_from_file({"task": earlier}, "here", typed={"task": {"num_beams": 5}})
    assert hyper["task"]["generation"] == {**BEFORE, "num_beams": 5}
    module = {"task": asdict(SummarizationConfig(**BEFORE))}
    assert arguments_from_file(module, "here")["task"]["generation"] == BEFORE
    start = saved_settings(compose_config(["task=summarization"]))
    start["task"] = saved["task"]
    for typed in ("task.num_beams=5", "task.generation.num_beams=5"):
        config = over_saved(start, [typed])
        assert build_task(settings_of(config).task).config.generation == GenerationSettings(
            **{**BEFORE, "num_beams": 5}
        )


def test_generation_alias_beside_another_value_raises():
    with pytest.raises(
        UserError, match="task.num_beams=4: is an alias of task.generation.num_beams=2"
    ):
        generation_of("task=summarization", "task.num_beams=4", "task.generation.num_beams=2")
    both = generation_of("task=summarization", "task.num_beams=4", "task.generation.num_beams=4")
    assert both.num_beams == 4
