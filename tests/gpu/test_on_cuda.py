"""What only a GPU can show: its kernels' numbers, that no step waits for it, and its memory."""

from __future__ import annotations

import pytest
import torch
from checks import fused, probes

from helpers.runs import result_of

pytestmark = pytest.mark.gpu

CASES = list(fused.cases())
TYPES = list(dict.fromkeys((case.dtype, case.autocast) for case in CASES))


@pytest.fixture
def command(tiny_bert, rows_jsonl, tmp_path) -> list[str]:
    """A run of 12 steps on a GPU."""
    return [
        *("train", f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", "trainer=gpu"),
        *("data.batch_size=4", "trainer.max_steps=12", "trainer.log_every_n_steps=50"),
        *("trainer.enable_progress_bar=false", "callbacks.progress_bar=null", "test_before=false"),
        *("callbacks.rich_summary=null", f"output_dir={tmp_path / 'run'}"),
    ]


@pytest.mark.parametrize(("dtype", "autocast"), TYPES, ids=str)
def test_fused_step_on_cuda_is_as_close_to_float64_as_autograd(dtype, autocast):
    for case in CASES:
        if (case.dtype, case.autocast) == (dtype, autocast):
            assert fused.excess(case, fused.compare(case, "cuda")) <= 1.0, str(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dropout_on_cuda_has_one_mask_in_both_passes(dtype):
    assert fused.mask_gap("cuda", dtype) == 0.0


@pytest.fixture
def _waits_allowed_again():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_waits_allowed_again")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_step_on_cuda_waits_for_transformers_masks_alone(precision, command, run_cli):
    watching = "+callbacks.probe._target_=checks.probes.Waits"
    status, _, err = run_cli(*command, f"trainer.precision={precision}", watching)
    assert status == 0, err
    assert probes.Probe.latest.ours() == 0, probes.Probe.latest.places


def test_result_on_cuda_has_the_peak_of_the_steps_and_the_device(command, run_cli, tmp_path):
    status, _, err = run_cli(*command, "+callbacks.probe._target_=checks.probes.Steps")
    assert status == 0, err
    result = result_of(tmp_path / "run")
    assert result["device"] == "cuda:0"
    peak = torch.cuda.max_memory_allocated() / 2**20
    assert result["peak_memory_mib"] == pytest.approx(peak, rel=0.01)
    assert result["peak_memory_mib"] >= max(probes.Probe.latest.allocated)
