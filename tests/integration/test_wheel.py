"""The sdist and the wheel hold the whole package and work with the declared dependencies alone.

The wheel is built once and installed into an environment of its own. That environment holds what
the wheel's metadata requires with the extra `demo`. It cannot import the checkout or any other
package of the environment that runs the tests.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections import defaultdict
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors import safe_open

from helpers.runs import result_of
from lora_lightning.utils.locks import locked

ROOT = Path(__file__).parents[2]
UNDECLARED = ("peft", "pytest", "bitsandbytes", "optuna", "mypy")
"""Packages of other extras: nothing in the wheel may need them."""


def clean_environment(**more: object) -> dict[str, str]:
    """Return the environment variables without those that change what Python imports."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return kept | {key: str(value) for key, value in more.items()}


def run(*command: object, cwd: Path, **more: object) -> str:
    """Return what a command prints; fail the test with all of its output if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(**more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(folder: Path) -> None:
    """Build the sdist in `folder`, and the wheel from the unpacked sdist.

    The build system comes from the package index, as it does for `pip install .`.
    """
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".git", *ignored))
    pyproject = (source / "pyproject.toml").read_text()
    required = re.search(r'^requires = \["(.+)"\]$', pyproject, flags=re.M)[1]
    backend = folder / "backend"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--target", backend)
    try:
        run(*pip, required, cwd=folder)
    except AssertionError as error:
        pytest.fail(f"To build the wheel pip must be able to fetch {required}: {error}")

    def call(hook: str, where: Path) -> None:
        code = f"from setuptools import build_meta; build_meta.{hook}({str(folder)!r})"
        run(sys.executable, "-c", code, cwd=where, PYTHONPATH=backend)

    call("build_sdist", source)
    sdist = next(folder.glob("*.tar.gz"))
    shutil.unpack_archive(sdist, folder)
    call("build_wheel", folder / sdist.name.removesuffix(".tar.gz"))


def dependencies(root: Distribution, *extras: str) -> dict[str, Distribution]:
    """Return the installed distributions that `root` requires, directly or not, by name."""
    found: dict[str, Distribution] = {}
    waiting = [(root, extras)]
    seen = set()
    while waiting:
        owner, wanted = waiting.pop()
        for line in owner.requires or ():
            need = Requirement(line)
            active = [{"extra": extra} for extra in wanted or ("",)]
            if need.marker is not None and not any(map(need.marker.evaluate, active)):
                continue
            key = (canonicalize_name(need.name), tuple(sorted(need.extras)))
            if key not in seen:
                seen.add(key)
                found[key[0]] = distribution(key[0])
                waiting.append((found[key[0]], key[1]))
    return found


def link(chosen: dict[str, Distribution], site: Path) -> None:
    """Link the files of distributions into `site`.

    A top-level folder that belongs to one distribution becomes one link. A folder that several
    share, such as `hydra_plugins`, gets a link for each file of the chosen distributions.
    """
    owners = defaultdict(set)
    for each in distributions():
        name = canonicalize_name(each.metadata["Name"])
        for file in each.files or ():
            owners[file.parts[0]].add(name)
    for name, each in chosen.items():
        assert each.files, f"{name} has no list of its files: install it with pip"
        for file in each.files:
            shared = len(owners[file.parts[0]]) > 1
            path = Path(file) if shared else Path(file.parts[0])
            if file.parts[0] == ".." or (site / path).is_symlink():
                continue
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).symlink_to(each.locate_file(path))


def install(folder: Path) -> None:
    """Install the wheel of `folder` into `folder/venv` and link the distributions it requires."""
    home = folder / "venv"
    venv.create(home, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python")
    wheel = next(folder.glob("*.whl"))
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder)
    site = next((home / "lib").glob("python*/site-packages"))
    ours = next(iter(distributions(name="lora_lightning", path=[str(site)])))
    link(dependencies(ours, "demo"), site)


@pytest.fixture(scope="module")
def built(tmp_path_factory, worker_id) -> Path:
    """Return a folder with source, sdist, wheel and environment, which one process makes."""
    base = tmp_path_factory.getbasetemp()
    common = (base if worker_id == "master" else base.parent) / "wheel"
    common.mkdir(exist_ok=True)
    folder = common / "made"
    with locked(common, setting="--basetemp", patience=600):
        if not (common / "ready").exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a failure
            folder.mkdir()
            build(folder)
            install(folder)
            (common / "ready").touch()
    return folder


@pytest.fixture
def installed(built, tmp_path) -> SimpleNamespace:
    """Return the environment's command and Python, both run in an empty folder."""
    bin_folder = built / "venv" / "bin"

    def command(*arguments: str) -> str:
        return run(bin_folder / "lora-lightning", *arguments, cwd=tmp_path)

    def python(code: str, *arguments: str) -> str:
        return run(bin_folder / "python", "-c", code, *arguments, cwd=tmp_path)

    return SimpleNamespace(command=command, python=python, folder=tmp_path)


IN_TURN = """
import shlex, sys
from lora_lightning.cli.main import main
for line in sys.argv[1:]:
    sys.argv = ["lora-lightning", *shlex.split(line)]
    main()
    print("<end>")
"""
"""Runs several commands in one process, which imports the libraries once."""


def test_wheel_holds_every_file_of_the_package(built):
    source = built / "source"
    plugin = "lora_lightning/sweeps/plugin/"
    expected = set()
    for top, target in (("lora_lightning", ""), ("conf", "lora_lightning/")):
        for path in (source / top).rglob("*"):
            name = target + path.relative_to(source).as_posix()
            if path.is_file():
                expected.add(name.replace(plugin, "hydra_plugins/lora_lightning/"))
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = {Path(name).name for name in wheel.namelist() if ".dist-info/" in name}
    assert len(expected) > 150
    lacking, unexpected = sorted(expected - names), sorted(names - expected)
    assert (lacking, unexpected) == ([], [])
    assert {"LICENSE", "METADATA", "entry_points.txt"} <= metadata
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "conf/train.yaml"} <= held


def test_wheel_runs_its_commands_from_any_folder(installed, tiny_bert):
    out = installed.command("train", "debug=limit", "output_dir=run")
    assert "On the 16 test rows" in out
    result = result_of(installed.folder / "run")
    assert (result["status"], result["trainable_parameters"]) == ("completed", 338_690)

    model = f"model.name_or_path={tiny_bert}"
    out = installed.python(
        IN_TURN,
        "predict adapter=run/adapter text='Not bad at all.'",
        "merge adapter=run/adapter output=merged",
        "check",
        f"train experiment=full_reviews debug=limit {model} output_dir=full",
    )
    predicted, merged, checked, _, _ = out.split("<end>\n")
    assert sum(json.loads(predicted)["prediction"]["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert float(re.search(r"merged model: ([\d.e-]+)$", merged, flags=re.M)[1]) < 0.01
    with safe_open(installed.folder / "merged" / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if "lora" in name]  # noqa: SIM118
    assert "All checks passed." in checked
    result = result_of(installed.folder / "full")
    assert result["status"] == "completed"
    assert result["trainable_parameters"] == result["total_parameters"]


def test_wheel_packed_sweep_trains_every_job(installed):
    packed = ("hydra/launcher=packed", "hydra.sweep.dir=sweep")
    installed.command("train", "-m", "lora.rank=2,4", "debug=limit", *packed)
    with (installed.folder / "sweep" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["lora.rank"]: row["status"] for row in rows} == {"2": "completed", "4": "completed"}
    # A and B grow with the rank, 42,240 a rank; the head of 770 does not.
    counts = [result_of(installed.folder / "sweep" / job)["trainable_parameters"] for job in "01"]
    assert counts == [770 + 2 * 42_240, 770 + 4 * 42_240]


def test_wheel_loads_a_model_under_a_device_context(built, installed):
    """The declared packages are enough for it, and no others are there.

    On a GPU Lightning builds the model with that GPU as torch's default device. transformers
    ignores a default device that is the CPU, so the test reports it as one to use.
    """
    found = installed.python(
        "import importlib.util, json\n"
        "from unittest.mock import patch\n"
        "import torch\n"
        "import lora_lightning\n"
        "from lora_lightning.models.loading import load_classifier\n"
        "from lora_lightning.models.tokenizer import load_tokenizer\n"
        "from lora_lightning.config.schema import ModelConfig\n"
        "config = ModelConfig()\n"
        "device = 'transformers.modeling_utils.get_torch_context_manager_or_global_device'\n"
        "with patch(device, return_value=torch.device('cpu')) as asked:\n"
        "    load_classifier(config, load_tokenizer(config), ['no', 'yes'])\n"
        "assert asked.called\n"
        f"names = {UNDECLARED!r}\n"
        "there = [name for name in names if importlib.util.find_spec(name)]\n"
        "print(json.dumps([there, lora_lightning.__file__]))"
    )
    there, where = json.loads(found.splitlines()[-1])
    assert there == []
    assert Path(where).is_relative_to(built / "venv")
