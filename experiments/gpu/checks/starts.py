"""Does it start? The tests, a plain installation, tasks and precisions, variants, no memory."""

from __future__ import annotations

import contextlib
import math
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .judge import Check, Failure, Figures, Skip, at_least, at_most, equals
from .lab import BRIEF, MIB, ROOT, SHORT, Lab, missing_peers, needs

TASKS = ("sentiment", "summarization", "instruct", "lm")
VARIANTS = {
    "eva": ["lora=eva"],
    "pissa": ["lora=pissa", "lora.init=pissa", "lora.layers=[0,1]"],
    "pissa_niter_4": ["lora=pissa"],
    "olora": ["lora=olora"],
    "dora": ["lora=dora"],
    "loftq": ["lora=loftq", "model.quantization=nf4"],
}
"""Each with its settings; whole decompositions are of two layers, as one takes seconds."""


def tests(lab: Lab) -> Figures:
    """The fast suite where a GPU is in sight; which tests use it without being meant to."""
    needs("pytest", "xdist")
    if not (ROOT / "tests").is_dir():
        raise Skip("needs the repository's tests")
    report = lab.folder / "tests.xml"
    few = ["-n", "0", "tests/gpu", "tests/unit/lora/test_functional.py"]
    # To build the wheel pip fetches setuptools, and there may be no network.
    all_but = ["-n", "8", "--ignore=tests/integration/test_wheel.py"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "checks.watch"),
            *(f"--junitxml={report}", *lab.pick(all_but, few)),
        ],
        cwd=ROOT,
        env=lab.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if not report.is_file():
        raise Failure(f"pytest did not finish: {(done.stdout + done.stderr)[-800:]}")
    return read_report(report)


def read_report(path: Path) -> Figures:
    """Counts of a JUnit report. What fails for want of a package is counted apart."""
    counts = dict.fromkeys(("passed", "failed", "skipped", "without_a_package"), 0)
    failed, on_cuda = [], []
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is not None:
            said = f"{problem.get('message')}{problem.text}"
            wants = re.search(r"No module named|is not installed|requires bitsandbytes", said)
            counts["without_a_package" if wants else "failed"] += 1
            failed += [] if wants else [name]
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
        if any(note.get("name") == "on_cuda" for note in case.iter("property")):
            on_cuda.append(name)
    return {**counts, "names_failed": failed[:20], "on_cuda": len(on_cuda), "names": on_cuda[:20]}


def plain_install(lab: Lab) -> Figures:
    """Two runs of `train`: with accelerate, and where it cannot be imported.

    Lightning builds the model under the GPU's device context, which transformers takes for a
    device_map, and for that it wants accelerate. A rehearsal has a context of the CPU in force,
    which transformers is made to take for one too. The second run may end in a message that names
    accelerate, as long as the package declares it.
    """
    imitated = (
        "import torch, transformers.modeling_utils as m; "
        "own = m.get_torch_context_manager_or_global_device; "
        "m.get_torch_context_manager_or_global_device = lambda: own() or torch.device('cpu'); "
    )
    code = lab.pick("", imitated) + "from lora_lightning.cli.main import main; main()"
    brief = ("task=lm", "trainer.max_steps=2", *BRIEF, f"data.train={lab.rows(24)}")
    plain = lab.process(*lab.settings(*brief), code=code)
    blocked = "import sys; sys.modules['accelerate'] = None; "
    without = lab.process(*lab.settings(*brief), code=blocked + code)
    project = (ROOT / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", project, flags=re.M | re.S)
    declared = dependencies is not None and '"accelerate' in dependencies[1]
    told = without.status == 2 and "accelerate" in without.err
    return {
        "plain_install_trains": plain.status == 0,
        "asks_for_accelerate": declared,
        "without_accelerate_trains": without.status == 0,
        "without_accelerate_trains_or_tells": without.status == 0 or (told and declared),
        **({"said_with": plain.tail[-400:]} if plain.status else {}),
        **({"said_without": without.tail[-400:]} if without.status else {}),
    }


def tasks(lab: Lab) -> Figures:
    """Four tasks in four precisions on the model that ships: device, memory, skipped steps."""
    steps = lab.pick(30, 3)
    precisions = lab.pick(
        ("32-true", "bf16-true", "bf16-mixed", "16-mixed"), ("32-true", "bf16-mixed")
    )
    rows = lab.rows(lab.pick(300, 40))
    failed, devices, gaps, skipped = [], set(), [], 0
    for task in TASKS:
        for precision in precisions:
            name = f"{task} {precision}"
            try:
                run = lab.train(
                    *(f"task={task}", "model=tiny_lm", f"data.train={rows}", "data.batch_size=8"),
                    *(f"trainer.precision={precision}", f"trainer.max_steps={steps}", *BRIEF),
                    *([] if task == "sentiment" else ["task.generation.max_new_tokens=8"]),
                    probe="Scale",
                )
            except Failure as failure:
                failed.append(f"{name}: {str(failure)[-300:]}")
                continue
            # Of the steps alone, or of the tests after them too.
            peaks = [lab.peak_mib(), run.probe.peak_mib or lab.peak_mib()]
            gaps.append(min(abs(run.result["peak_memory_mib"] / peak - 1) for peak in peaks))
            devices.add(run.result["device"])
            skipped = max(skipped, run.probe.skipped)
            if len(run.losses) != steps or not all(map(math.isfinite, run.losses)):
                failed.append(f"{name}: losses {run.losses}")
    return {
        "completed": len(TASKS) * len(precisions) - len(failed),
        "failed": failed,
        "devices": sorted(devices),
        "peak_gap": max(gaps, default=math.nan),
        "skipped_by_16_mixed": skipped,
        "left_out": lab.needs_cuda(["skipped_by_16_mixed"]),
    }


def variants(lab: Lab) -> Figures:
    """Variants whose start needs the weights or the data, on 1 B: do they start, and how fast?"""
    common = [
        *(f"model.name_or_path={lab.model('1b')}", "task=lm", f"data.train={lab.rows(48)}"),
        *("trainer.max_steps=2", "data.batch_size=4", *SHORT, *BRIEF),
        *("trainer.precision=bf16-true", "callbacks.last=null"),
    ]
    figures: Figures = {"failed": [], "seconds": {}, "left_out": {}}
    started: dict[str, Any] = {}
    quantised = not missing_peers("bitsandbytes")
    for name, settings in {"lora": [], "nf4": ["model.quantization=nf4"], **VARIANTS}.items():
        if not quantised and "model.quantization=nf4" in settings:
            continue
        lab.free()
        since = time.monotonic()
        try:
            started[name] = lab.train(*common, *settings, probe="Steps").probe
        except Failure as failure:
            figures["failed"].append(f"{name}: {str(failure)[-300:]}")
        figures["seconds"][name] = round(time.monotonic() - since, 2)
    times = figures["seconds"]
    figures["pissa_niter_4_seconds"] = times["pissa_niter_4"] - times["lora"]
    if lab.rehearsal or not {"nf4", "loftq", "lora"} <= started.keys():
        reason = "needs CUDA" if lab.rehearsal else "needs bitsandbytes"
        figures["left_out"]["loftq_peak"] = reason
    else:
        both = started["lora"].at_start + started["nf4"].at_start
        figures["loftq_peak"] = started["loftq"].loading_peak / both
    return figures


def no_memory(lab: Lab) -> Figures:
    """A batch that no memory holds: what is said, and whether the next run has all of it again."""
    common = ["task=lm", "task.blocks=false", f"model.name_or_path={lab.model('135m')}", *BRIEF]
    common += ["trainer.max_steps=1", "trainer.precision=32-true", "data.max_tokens=null"]
    common += ["data.eval_batch_size=2", f"data.val={lab.rows(4)}"]
    small = [*common, f"data.train={lab.rows(40)}", "data.batch_size=4"]
    lab.train(*small)  # what a process needs once is there before it is limited
    rows = lab.pick(4096, 2000)
    large = lab.rows(rows, lab.pick((100, 400), (200, 300)))
    before = lab.allocated_mib()
    with limited(lab):
        said = lab.command(*lab.settings(*common, f"data.train={large}", f"data.batch_size={rows}"))
        lab.free()
        left = lab.allocated_mib() - before
        again = lab.command(*lab.settings(*small))
    return {
        "status": said.status,
        "says_out_of_memory": "out of memory" in said.err,
        "gives_advice": "data.max_tokens=" in said.err,
        "left_mib": left,
        "next_status": again.status,
        "said": said.err.strip()[-300:],
    }


@contextlib.contextmanager
def limited(lab: Lab) -> Iterator[None]:
    """Has little memory for the time of a block: of the GPU, or of this process."""
    if lab.device == "cuda":
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(4096 * MIB / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) for line in lines if line.startswith("VmSize:")) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + 700 * MIB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


CHECKS = [
    Check(
        2,
        "train after a plain installation",
        plain_install,
        {"plain_install_trains": equals(True), "without_accelerate_trains_or_tells": equals(True)},
        minutes=1,
    ),
    Check(
        3,
        "four tasks in four precisions",
        tasks,
        {
            "failed": equals([]),
            "devices": equals(["cuda:0"], rehearsal=["cpu"]),
            "peak_gap": at_most(0.01),
            "skipped_by_16_mixed": at_most(3),
        },
        minutes=2,
        limit=420,
    ),
    Check(
        1,
        "the fast tests",
        tests,
        {"failed": equals(0), "passed": at_least(2000, rehearsal=20), "on_cuda": equals(0)},
        minutes=2,
        limit=420,
    ),
    Check(
        16,
        "variants start",
        variants,
        {
            "failed": equals([]),
            "pissa_niter_4_seconds": at_most(20),
            "loftq_peak": at_most(1.0),
        },
        minutes=2,
        limit=360,
    ),
    Check(
        22,
        "out of memory",
        no_memory,
        {
            "status": equals(2),
            "says_out_of_memory": equals(True),
            "gives_advice": equals(True),
            "left_mib": at_most(16),
            "next_status": equals(0),
        },
        minutes=0.5,
    ),
]
