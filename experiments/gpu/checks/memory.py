"""How much memory is it? The longest row, what plan and check say, what piles up."""

from __future__ import annotations

import math
import re

from .judge import Check, Figures, at_least, at_most, equals
from .lab import BRIEF, MIB, Lab, missing_peers

CAP_MIB = 80 * 1024
"""Of the GPU's memory that the longest row may take, to compare with what others publish."""


def longest(lab: Lab) -> Figures:
    """The longest row that a base of 8 B in 4 bits trains on in 80 GiB.

    Memory is a straight line over the length. Two lengths give it, and a third shows it, as long as
    a step of it takes seconds and not minutes.
    """
    if missing_peers("bitsandbytes"):
        names = ("ran", "trained", "longest")
        return {"left_out": dict.fromkeys(names, "needs bitsandbytes")}
    import torch

    if not lab.rehearsal:
        total = torch.cuda.get_device_properties(0).total_memory / MIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_MIB / total))
    short, long, most = lab.pick((8192, 24576, 131072), (64, 128, 256))
    val = lab.rows(4)

    def peak(length: int) -> float:
        rows = lab.rows(3, (length + 64, length + 64))
        lab.free()
        run = lab.train(
            *("task=lm", f"model.name_or_path={lab.model('8b')}", "model.quantization=nf4"),
            *("model.gradient_checkpointing=true", "lora.rank=32", "data.batch_size=1"),
            "task.generation.max_new_tokens=8",
            *(f"data.train={rows}", f"data.val={val}", f"data.max_length={length}"),
            *("trainer.max_steps=1", "trainer.precision=bf16-true", *BRIEF),
        )
        if not math.isfinite(run.losses[0]):
            return math.nan
        return float(run.result["peak_memory_mib"])

    low, high = peak(short), peak(long)
    figures: Figures = {"peaks_mib": {short: low, long: high}, "left_out": {}}
    length = most
    if lab.rehearsal:
        figures["left_out"]["longest"] = "needs CUDA"
    else:
        cap = min(CAP_MIB, total)
        reach = int(long + (0.97 * cap - high) * (long - short) / max(high - low, 1.0))
        figures["longest"], length = reach, min(most, reach)
        lab.free()
    figures["peaks_mib"][length] = peak(length)
    return figures | {"ran": length, "trained": math.isfinite(figures["peaks_mib"][length])}


def predicted(lab: Lab) -> Figures:
    """What plan and check say of a step's memory, over the peak that it then has."""
    import measure
    import torch

    cases = {"1b LoRA": ("1b", []), "1b QLoRA": ("1b", ["model.quantization=nf4"])}
    cases |= lab.pick({"8b LoRA": ("8b", []), "8b QLoRA": ("8b", ["model.quantization=nf4"])}, {})
    if lab.rehearsal:
        del cases["1b QLoRA"]
    quantised = not missing_peers("bitsandbytes")
    figures: Figures = {"left_out": {}, "ratios": {}}
    for name, (model, settings) in cases.items():
        if settings and not quantised:
            figures["left_out"][name] = "needs bitsandbytes"
            continue
        batch, length = lab.pick((8, 512), (4, 512))
        overrides = [
            *("task=lm", f"model.name_or_path={lab.model(model)}", *settings, lab.trainer),
            *(f"data.train={lab.rows(batch * 4, (2 * length, 2 * length))}", "lora.rank=16"),
            *(f"data.batch_size={batch}", f"data.max_length={length}", "data.max_tokens=null"),
            f"trainer.precision={lab.pick('bf16-true', '32-true')}",
        ]
        planned = measure.predicted(overrides, torch.device(lab.device))["predicted"]
        said = lab.command("check", *overrides)
        told = re.search(r"Memory: about ([\d.,]+) (MiB|GiB)", said.out)
        checked = math.nan
        if told:
            checked = float(told[1].replace(",", "")) * (1024 if told[2] == "GiB" else 1)
        lab.free()
        if lab.rehearsal:
            peak = measure.run(overrides)
        else:
            run = lab.train(*overrides, "trainer.max_steps=3", "data.limit_val=2", *BRIEF)
            peak = run.result["peak_memory_mib"]
        figures["ratios"][name] = {
            "plan": planned / peak,
            "check": checked / peak,
            "peak_mib": peak,
        }
    for verb in ("plan", "check"):
        figures[f"{verb}_off"] = max(
            abs(ratios[verb] - 1) if math.isfinite(ratios[verb]) else math.inf
            for ratios in figures["ratios"].values()
        )
    return figures


def soak(lab: Lab) -> Figures:
    """A minute of steps on rows of changing lengths: what is held beyond need, and resident."""
    from soak import by_quarter

    rows = lab.rows(lab.pick(4000, 200), lab.pick((20, 500), (4, 60)))
    batch = lab.pick(8, 4)
    probe = lab.train(
        *("task=lm", "task.blocks=false", f"model.name_or_path={lab.model('1b')}"),
        *(f"data.train={rows}", "data.limit_val=2", f"data.batch_size={batch}"),
        *("trainer.max_epochs=1000", f"trainer.max_time=00:00:{lab.pick('01:00', '00:04')}"),
        *("trainer.precision=bf16-true", "data.max_length=512", "callbacks.last=null", *BRIEF),
        probe="Steps",
    ).probe
    unused = [held - used for held, used in zip(probe.reserved, probe.allocated, strict=True)]
    figures: Figures = {"steps": len(probe.ends), "left_out": {}}
    # The second quarter begins after 15 s, the last is that from 45 s on.
    resident, reserved = by_quarter(
        list(zip(probe.resident, unused or [0.0] * len(probe.ends), strict=True))
    )
    figures["resident_mib"], figures["unused_mib"] = resident, reserved
    figures["resident_growth"] = resident[-1] / resident[0]
    if unused:
        figures["unused_growth"] = reserved[-1] / max(reserved[0], 1.0)
    else:
        figures["left_out"]["unused_growth"] = "needs CUDA"
    return figures


CHECKS = [
    Check(
        13,
        "the longest row",
        longest,
        {
            "trained": equals(True),
            "ran": at_least(28_455, rehearsal=256),
            "longest": at_least(100_000),
        },
        minutes=2,
        limit=420,
    ),
    Check(
        14,
        "plan and check against the peak",
        predicted,
        {"plan_off": at_most(0.07, rehearsal=0.2), "check_off": at_most(0.25, rehearsal=None)},
        minutes=2.5,
        limit=480,
    ),
    Check(
        24,
        "a minute of changing lengths",
        soak,
        {
            "steps": at_least(100, rehearsal=10),
            "resident_growth": at_most(1.05, rehearsal=1.5),
            "unused_growth": at_most(1.05),
        },
        minutes=1.5,
    ),
]
