"""Files that an earlier version wrote load, resume and merge as they did then."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compatibility.make import FILES, IDS, KINDS, RUN, base_of
from helpers.runs import result_of
from lora_lightning.lora import load_adapter


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_of_an_earlier_version_has_the_same_logits(kind):
    base = AutoModelForCausalLM.from_pretrained(FILES / "bases" / base_of(kind)).eval()
    adapter = load_adapter(base, FILES / "adapters" / kind)
    expected = load_file(FILES / "logits.safetensors")[kind]
    with torch.no_grad():
        torch.testing.assert_close(adapter.model(IDS).logits, expected, rtol=0, atol=1e-5)
        adapter.merge()
        torch.testing.assert_close(adapter.model(IDS).logits, expected, rtol=0, atol=1e-5)


def assert_ended_as_then(run) -> None:
    """The adapter and what was measured are those of a run that was not stopped."""
    expected = load_file(FILES / "adapter" / "adapter_model.safetensors")
    found = load_file(run / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    result = result_of(run)
    measured = json.loads((FILES / "measured.json").read_text())
    assert {key: result[key] for key in measured} == pytest.approx(measured, abs=1e-4)


def test_run_of_an_earlier_version_resumes(tmp_path, run_cli):
    run = shutil.copytree(FILES / "run", tmp_path / "run")
    status, _, err = run_cli("train", f"resume={run}")
    assert status == 0, err
    assert_ended_as_then(run)


@pytest.mark.slow
def test_sweep_of_an_earlier_version_resumes(tmp_path, run_cli):
    sweep = shutil.copytree(FILES / "sweep", tmp_path / "sweep")
    status, _, err = run_cli("train", "-m", *RUN, "seed=0,1", f"hydra.sweep.dir={sweep}")
    assert status == 0, err
    assert_ended_as_then(sweep / "0")
    assert result_of(sweep / "1")["status"] == "completed"


def test_adapter_and_checkpoint_of_an_earlier_version_predict(tmp_path, run_cli):
    imported = tmp_path / "imported"
    source = f"source={FILES / 'run' / 'checkpoints' / 'last.ckpt'}"
    status, _, err = run_cli("import", source, f"output={imported}")
    assert status == 0, err
    for adapter in (FILES / "adapter", imported):
        status, out, err = run_cli("predict", f"adapter={adapter}", "text=A lovely day.")
        assert status == 0, err
        assert sum(json.loads(out)["prediction"]["scores"].values()) == pytest.approx(1, abs=1e-5)
