"""The checks for a GPU: their verdicts, their runner, and their small form on a CPU."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import suite as runner
import torch
from checks import CHECKS, fused, lab, processes, speed, starts
from checks.judge import Check, Failure, Skip, at_least, at_most, equals, run, verdict

NAN = math.nan
WRONG = {
    1: {"failed": 1, "passed": 1999, "on_cuda": 2},
    2: {"plain_install_trains": False, "without_accelerate_trains_or_tells": False},
    3: {"failed": ["lm"], "devices": ["cpu"], "peak_gap": 0.5, "skipped_by_16_mixed": 12},
    4: {"fp32_gap": 1e-3, "bf16_gap": NAN, "losses": False},
    5: {"excess": 1.2, "mask_gap": 1.0, "to_peft": 2.0},
    6: {"waits": 1.0, "ddp_waits": 0.2},
    7: {
        **{"fp32_loss_gap": 0.1, "bf16_loss_gap": NAN, "1b_tokens_per_second": 50_000.0},
        **{"8b_tokens_per_second": 9_000.0, "135m_to_trainer": 0.9, "8b_to_trl": 0.8},
        "1b_memory_to_trl": 0.7,
    },
    8: {
        **{"math_attention": 4, "busy": 0.6, "launches_a_step": 3500.0},
        **{"fp32_products": 1, "flash_attention": False},
    },
    9: {
        **{"loss_gap": 0.1, "recompilations": 9, "by_length": 1, "graphs": 0},
        **{"1b_speed_up": 1.0, "135m_speed_up": 1.5},
    },
    10: {"checkpointing_gap": NAN, "checkpointing_time": 2.0, "checkpointing_memory": 1.0},
    11: {"offload_gap": 0.1, "both_gap": NAN, "both_time": 1.8, "pinned_growth_mib": 900.0},
    12: {"weights_mib": 7000.0, "loss_gap": 0.5, "to_trl": 1.0},
    13: {"trained": False, "ran": 8192, "longest": 40_000},
    14: {"plan_off": 0.3, "check_off": math.inf},
    15: {"fp32_gap": 0.02, "bf16_gap": 0.1, "flash_gap": 0.1},
    16: {"failed": ["eva"], "pissa_niter_4_seconds": 60.0, "loftq_peak": 1.7},
    17: {"calls_over_least": 12.5, "seconds": 30.0},
    18: {"stopped_early": 0, "weights_gap": NAN, "speed_up": 1.1},
    19: {"deterministic_is_exact": False, "usual_gap": 0.1},
    20: {"ddp_gap": 0.01, "torchrun_gap": NAN, "moved_to_the_cpu": 4, "contexts": 2},
    21: {
        **{"failed": ["merge"], "evaluate_gap": 0.1, "answers": 3, "merge_gap": NAN},
        **{"peft_gap_fp32": 0.01, "peft_gap_bf16": 0.3},
    },
    22: {
        **{"status": 1, "says_out_of_memory": False, "gives_advice": False},
        **{"left_mib": 3000.0, "next_status": 2},
    },
    23: {"nf4_same": False, "int8_same": False},
    24: {"steps": 3, "resident_growth": 1.8, "unused_growth": 1.5},
    25: {
        **{"gap": 0.1, "slurm_gap": NAN, "slurm_devices": ["cuda:0", "cuda:0"]},
        **{"fsdp2_memory": 1.0, "gone_seconds": 90.0, "left": 1},
    },
}
"""A wrong value of each figure that a check is judged by."""


# Verdicts ------------------------------------------------------------------------------------


def test_checks_are_25_with_the_riskiest_first():
    assert sorted(CHECKS) == list(range(1, 26))
    assert list(CHECKS)[:5] == [2, 3, 6, 5, 7]
    assert all(60 * check.minutes <= check.limit <= 600 for check in CHECKS.values())
    assert sum(60 * check.minutes for check in CHECKS.values()) <= runner.IN_ALL


@pytest.mark.parametrize("number", CHECKS)
def test_verdict_of_a_check_with_one_wrong_figure_is_fail(number):
    check = CHECKS[number]
    good = {name: bound.limit for name, bound in check.expects.items()}
    assert verdict(check, good, rehearsal=False) == ("pass", "")
    assert WRONG[number].keys() == good.keys()
    for name, value in WRONG[number].items():
        status, message = verdict(check, {**good, name: value}, rehearsal=False)
        assert status == "fail", name
        assert message.startswith(f"{name} is ")
        del (missing := dict(good))[name]
        assert verdict(check, missing, rehearsal=False)[0] == "fail"


def test_verdict_of_figures_left_out_is_pass_or_skip_and_says_why():
    check = Check(1, "one", lambda _: {}, {"a": at_most(1), "b": at_least(2, rehearsal=None)})
    told = {"left_out": {"b": "needs trl"}}
    assert verdict(check, {"a": 1, **told}, rehearsal=False) == ("pass", "left out: needs trl")
    assert verdict(check, {"a": 2, **told}, rehearsal=False)[0] == "fail"
    all_out = {"left_out": {"a": "needs peft", "b": "needs peft"}}
    assert verdict(check, all_out, rehearsal=False) == ("skip", "needs peft")
    assert verdict(check, {"a": 1, "b": 0}, rehearsal=True) == ("pass", "")  # b is of GPUs alone


@pytest.mark.parametrize("value", [NAN, None, "3", True, math.inf])
def test_bound_of_nan_does_not_hold(value):
    assert not at_most(4).holds(value, 4)
    assert not at_least(4).holds(None if value == math.inf else value, 4)


def test_run_of_a_check_turns_skip_and_failure_into_verdicts(tmp_path):
    place = lab.Lab(tmp_path, rehearsal=True)

    def raising(error):
        def measure(_):
            raise error

        return Check(1, "one", measure, {"a": equals(1)})

    assert run(raising(Skip("needs two GPUs")), place) == ("skip", {}, "needs two GPUs")
    assert run(raising(Failure("exit status 2")), place) == ("fail", {}, "exit status 2")


# What figures are made of --------------------------------------------------------------------


def test_gap_of_series_that_cannot_be_compared_is_nan():
    assert lab.gap([2.0, 4.0], [2.0, 5.0]) == 0.25
    for first, second in (([], []), ([1.0], [1.0, 2.0]), ([1.0], [NAN])):
        assert math.isnan(lab.gap(first, second))


def test_weights_gap_of_two_adapters_is_relative_to_the_largest_weight(tmp_path):
    from safetensors.torch import save_file

    for name, value in (("one", 4.0), ("other", 3.0), ("broken", NAN)):
        save_file({"a": torch.tensor([value, 1.0])}, tmp_path / name)
    save_file({"b": torch.ones(2)}, tmp_path / "another")
    assert lab.weights_gap(tmp_path / "one", tmp_path / "other") == 0.25
    for other in ("broken", "another"):
        assert math.isnan(lab.weights_gap(tmp_path / "one", tmp_path / other))


def test_compared_runs_give_the_ratios_of_ours_to_each_peer():
    own = {"tokens_per_second": 300.0, "peak_mib": 50.0, "loss": [1.0, 2.0]}
    other = {"tokens_per_second": 200.0, "peak_mib": 100.0, "loss": [1.0, 2.5]}
    found = speed.compared("1b", {"ours": own, "trl": other})
    assert found == {
        "1b_tokens_per_second": 300.0,
        "1b_to_trl": 1.5,
        "1b_memory_to_trl": 0.5,
        "1b_loss_gap": 0.5,
    }


def test_peers_without_time_or_package_are_left_out_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "PEERS", {"trainer": ("torch",), "trl": ("no_such_package",)})
    place = lab.Lab(tmp_path, rehearsal=True, seconds=20)
    found, reasons = speed.contests(place, {"trainer": None, "trl": None}, None)
    assert found == {}
    assert reasons == {"trainer": "no time left", "trl": "needs no_such_package"}


def test_profile_reports_gaps_math_attention_and_fp32_products():
    events = [
        *[("aten::mm", False, 0.0, 1.0), ("cudaLaunchKernel", False, 0.0, 1.0)] * 6,
        ("aten::_scaled_dot_product_attention_math", False, 0.0, 9.0),
        ("ampere_bf16_s16816gemm", True, 0.0, 40.0),
        ("ampere_sgemm_128x64", True, 30.0, 50.0),  # beside the one before
        ("elementwise", True, 75.0, 100.0),
    ]
    found = speed.profiled(events, steps=2)
    assert found["busy"] == pytest.approx(0.75)
    assert found["launches_a_step"] == 3
    assert (found["math_attention"], found["fp32_products"]) == (1, 1)
    assert not found["flash_attention"]
    flash = [*events, ("flash_fwd_kernel", True, 100.0, 120.0)]
    assert speed.profiled(flash, steps=2)["flash_attention"]


def test_recompilations_of_a_function_with_other_shapes_are_counted():
    torch._dynamo.reset()
    twice = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    with speed.recompilations() as found:
        for length in (3, 4, 5):
            twice(torch.ones(length))
    assert len(found) == 2
    assert all(speed.BY_LENGTH.search(text) for text in found)
    torch._dynamo.reset()
    switched = torch.compile(lambda x: x * 2, backend="eager", dynamic=True)
    with speed.recompilations() as found:
        switched(torch.ones(3))
        with torch.no_grad():
            switched(torch.ones(4))
    assert len(found) == 1
    assert not speed.BY_LENGTH.search(found[0])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("plain", "without", "passes"),
    [
        ((0, ""), (0, ""), True),
        ((0, ""), (2, "cannot load the model: it needs accelerate"), True),
        ((1, "any mistake"), (2, "it needs accelerate"), False),
        ((0, ""), (2, "another mistake"), False),
        ((0, ""), (1, "Traceback: it needs accelerate"), False),
    ],
)
def test_installation_check_with_two_good_runs_passes(
    plain, without, passes, tmp_path, monkeypatch
):
    def process(place, *arguments, code):
        status, err = without if "sys.modules['accelerate'] = None" in code else plain
        return lab.Said(status, "", err)

    monkeypatch.setattr(lab.Lab, "process", process)
    status, figures, _ = run(CHECKS[2], lab.Lab(tmp_path, rehearsal=False))
    assert (status == "pass") == passes, figures


def test_report_of_tests_counts_failures_and_those_that_used_a_gpu(tmp_path):
    report = tmp_path / "tests.xml"
    used = '<properties><property name="on_cuda" value="true"/></properties>'
    report.write_text(
        "<testsuites><testsuite>"
        f'<testcase classname="t" name="good">{used}</testcase>'
        '<testcase classname="t" name="bad"><failure message="1 == 2">x</failure></testcase>'
        '<testcase classname="t" name="bare"><error message="">No module named y</error></testcase>'
        '<testcase classname="t" name="skipped"><skipped message="why"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = starts.read_report(report)
    assert (found["passed"], found["failed"], found["without_a_package"]) == (1, 1, 1)
    assert (found["skipped"], found["on_cuda"]) == (1, 1)
    assert (found["names_failed"], found["names"]) == (["t::bad"], ["t::good"])


def test_suite_for_a_gpu_leaves_out_what_needs_a_network(tmp_path, monkeypatch):
    def started(arguments, **_):
        given.extend(arguments)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    given: list[str] = []
    monkeypatch.setattr(subprocess, "run", started)
    with pytest.raises(Failure, match="pytest did not finish"):
        starts.tests(lab.Lab(tmp_path, rehearsal=False))
    assert "--ignore=tests/integration/test_wheel.py" in given
    assert (lab.ROOT / "tests/integration/test_wheel.py").is_file()


def test_excess_of_a_layer_that_is_two_per_cent_off_is_above_one(monkeypatch):
    types = torch.float32, torch.bfloat16
    cases = [fused.Case(dtype, None, "linear", False, 0.0, (5, 33), False) for dtype in types]
    assert all(fused.excess(case, fused.compare(case, "cpu")) <= 1 for case in cases)
    own = fused._Made.call

    def off(made, layer, x):
        return own(made, layer, x) * (1.02 if layer is made.layer else 1.0)

    monkeypatch.setattr(fused._Made, "call", off)
    assert all(fused.excess(case, fused.compare(case, "cpu")) > 1 for case in cases)


def test_contexts_without_nvidia_smi_are_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert processes.contexts() is None


# The runner ----------------------------------------------------------------------------------


def good(_):
    return {"a": 1, "b": {3: NAN}}


def crashes(_):
    os._exit(7)


def raises(_):
    raise ValueError("a mistake of the check")


def sleeps(place):
    # What a check has started is ended with it.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (place.work / "child").write_text(str(child.pid))
    time.sleep(60)


FAKES = {
    number: Check(number, measure.__name__, measure, {"a": at_most(1)}, 0.01, limit)
    for number, measure, limit in ((1, good, 60), (2, crashes, 60), (3, raises, 60), (4, sleeps, 2))
}


@pytest.fixture
def run_suite(tmp_path, monkeypatch, capsys):
    """Runs the suite on the fakes, which a fork takes with it: status, results, output."""
    monkeypatch.setitem(runner.PROCESSES, "rehearsal", multiprocessing.get_context("fork"))
    monkeypatch.setattr(runner, "machine", lambda: "a machine")
    monkeypatch.setattr("checks.CHECKS", FAKES)
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def runs(*arguments):
        place = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--rehearse"]
        status = runner.main([*arguments, *place])
        lines = (tmp_path / "out/results.jsonl").read_text().splitlines()
        results = [json.loads(line) for line in lines if runner.complete(line)]
        return status, results, capsys.readouterr().out

    return runs


def test_suite_with_failing_checks_records_each_and_continues(run_suite, tmp_path):
    status, results, out = run_suite()
    assert status == 1
    assert [(r["check"], r["status"]) for r in results] == [
        *((1, "pass"), (2, "fail"), (3, "fail"), (4, "fail")),
    ]
    assert "ended with status 7" in results[1]["message"]
    assert "ValueError: a mistake of the check" in results[2]["message"]
    assert "ended after 2 s, its time limit" in results[3]["message"]
    assert results[0]["figures"] == {"a": 1, "b": {"3": "nan"}}  # JSON knows no NaN
    assert results[0]["expected"] == {"a": "<= 1"}
    assert "| 1 | good | pass |" in out
    assert out.split("\n\n", 1)[1] in (tmp_path / "out/summary.md").read_text() + "\n"
    state = Path(f"/proc/{(tmp_path / 'work/child').read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_suite_after_an_interruption_runs_checks_without_a_result(run_suite, tmp_path):
    assert run_suite("1")[0] == 0
    with (tmp_path / "out/results.jsonl").open("a") as handle:
        handle.write('{"check": 3, "mode": "rehearsal", "stat')  # a line that was cut
    status, results, _ = run_suite("--only", "1", "2", "--skip-done")
    assert status == 1
    assert [result["check"] for result in results] == [1, 2]


def test_suite_after_its_time_limit_starts_no_check(run_suite):
    run_suite("1")
    status, results, out = run_suite("1", "2", "--skip-done", "--seconds", "0")
    assert status == 1
    assert len(results) == 1
    assert "crashes: not begun" in out
    assert "| 2 | crashes | not run |" in out


def test_suite_without_a_gpu_prints_how_to_rehearse(monkeypatch, capsys):
    monkeypatch.setattr(runner, "cuda", lambda: False)
    assert runner.main(["2"]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert runner.main(["77"]) == 2
    assert "there is no check 77" in capsys.readouterr().err


# The small form ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [4, 5, 23])
def test_check_in_rehearsal_passes(number, tmp_path, monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")  # which a check sets for its process
    status, figures, message = run(CHECKS[number], lab.Lab(tmp_path, rehearsal=True))
    assert status == "pass", (message, figures)


@pytest.mark.slow
def test_rehearsal_of_all_checks_passes(tmp_path):
    script = Path(runner.__file__).with_name("run.sh")
    done = subprocess.run(
        [script, "--rehearse", "--jobs", "2", "--out", tmp_path / "out", "--work", tmp_path],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (tmp_path / "out/results.jsonl").read_text().splitlines()
    results = {line["check"]: line for line in map(json.loads, lines)}
    assert results.keys() == CHECKS.keys()
    failed = {n: line["message"] for n, line in results.items() if line["status"] == "fail"}
    assert not failed, done.stdout
    # What a rehearsal cannot show it says; a check may be skipped for want of a package alone.
    assert {line["message"] for line in results.values() if line["status"] == "skip"} <= {""}
    assert done.returncode == 0
