"""Is it the same? CPU and GPU, the fused step, packing, resuming, quantised bases, other tools."""

from __future__ import annotations

import json
import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from .judge import Check, Failure, Figures, at_most, equals
from .lab import (
    ADAPTER,
    BRIEF,
    SHORT,
    Lab,
    Run,
    at_once,
    gap,
    largest,
    missing_peers,
    needs,
    weights_gap,
)
from .probes import KILL

PROBE = "callbacks.probe._target_=checks.probes.Kill"


def devices(lab: Lab) -> Figures:
    """Losses of a CPU and of a GPU from the same seed.

    A rehearsal has the CPU in the place of the GPU, computing fewer tokens at a time.
    """
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # before the first product of this process
    steps = lab.pick(20, 4)
    common = [
        *("task=summarization", "model=tiny_lm", "task.generate_rows=0", "data.batch_size=8"),
        *(f"data.train={lab.rows(lab.pick(240, 48))}", f"trainer.max_steps={steps}", *BRIEF),
    ]
    other = [lab.trainer, *lab.pick([], ["data.max_tokens=256"])]
    cpu = lab.train(*common, "trainer=cpu", "trainer.precision=32-true")
    gpu = lab.train(*common, *other, "trainer.precision=32-true")
    half = lab.train(*common, *other, "trainer.precision=bf16-true")
    return {
        "fp32_gap": gap(cpu.losses, gpu.losses),
        "bf16_gap": gap(cpu.losses, half.losses),
        "losses": len(cpu.losses) == steps,
    }


def fused_step(lab: Lab) -> Figures:
    """The fused linear step in all types, against float64, plain autograd and PEFT."""
    import torch

    from . import fused

    found = {
        str(case): fused.excess(case, fused.compare(case, lab.device)) for case in fused.cases()
    }
    worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    gaps = [fused.mask_gap(lab.device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    figures: Figures = {
        "cases": len(found),
        "worst": worst,
        "excess": found[worst],
        "mask_gap": max(gaps),
        "left_out": {},
    }
    if missing_peers("peft"):
        figures["left_out"]["to_peft"] = "needs peft"
    else:
        figures["to_peft"] = max(fused.against_peft(lab.device, torch.bfloat16).values())
    return figures


def packing(lab: Lab) -> Figures:
    """Losses of rows joined to several lanes, against the same rows by themselves."""
    figures: Figures = {"left_out": {}}
    rows = lab.rows(lab.pick(160, 48), (60, 200))
    common = [
        *("task=summarization", "model=tiny_lm", "task.generate_rows=0", "data.max_tokens=null"),
        *(f"data.train={rows}", "data.batch_size=8", f"trainer.max_steps={lab.pick(10, 3)}"),
        *BRIEF,
    ]
    ways = {"fp32": ("32-true", "sdpa"), "bf16": ("bf16-true", "sdpa")}
    if missing_peers("flash_attn"):
        figures["left_out"]["flash_gap"] = "needs flash_attn"
    else:
        ways["flash"] = ("bf16-true", "flash_attention_2")
    for name, (precision, attention) in ways.items():
        settings = [
            *(*common, f"trainer.precision={precision}"),
            f"model.attn_implementation={attention}",
        ]
        alone = lab.train(*settings)
        joined = lab.train(*settings, "data.packing=true")
        figures[f"{name}_gap"] = gap(alone.losses, joined.losses)
    return figures


def resuming(lab: Lab) -> Figures:
    """Runs that end amid an epoch by SIGKILL or SIGTERM and go on, against one left alone."""
    rows = lab.rows(lab.pick(400, 64))
    steps, kill = lab.pick((40, 23), (6, 4))
    common = [
        *("task=summarization", "model=tiny_lm", "task.generate_rows=0", "data.batch_size=8"),
        *(f"data.train={rows}", f"trainer.max_steps={steps}", "lora.dropout=0.1"),
        *("trainer.precision=32-true", f"callbacks.last.every_n_steps={lab.pick(10, 3)}", *BRIEF),
        f"+{PROBE}",
    ]
    statuses = lab.pick({"SIGKILL": -9, "SIGTERM": 143}, {"SIGKILL": -9})

    def stopped(name: str, deterministic: str) -> Run:
        arguments = lab.settings(*common, deterministic)
        said = lab.process(*arguments, **{KILL: f"{kill}:{name}"})
        if said.status != statuses[name]:
            raise Failure(f"{name} at step {kill}: exit status {said.status}: {said.tail}")
        # A class that is not of the package has to be typed again.
        goes_on = lab.apart("train", f"resume={arguments[-1].partition('=')[2]}", PROBE)
        return lab.ended(arguments, goes_on)

    figures: Figures = {"left_out": {}, "gaps": {}}
    for way in lab.pick(("true", "false"), ("true",)):
        setting = f"trainer.deterministic={way}"
        whole = lab.train_apart(*common, setting).folder / ADAPTER
        runs = at_once(*(partial(stopped, name, setting) for name in statuses))
        others = [run.folder / ADAPTER for run in runs]
        figures["gaps"][way] = [weights_gap(whole, other) for other in others]
        if way == "true":
            same = [other.read_bytes() == whole.read_bytes() for other in others]
            figures["deterministic_is_exact"] = all(same)
        else:
            figures["usual_gap"] = largest(figures["gaps"][way])
    if lab.rehearsal:
        figures["left_out"]["usual_gap"] = "needs CUDA"
    return figures


def quantised(lab: Lab) -> Figures:
    """A base in 4 and in 8 bits before a run and after it: the same losses, to the bit.

    The rate is so small that the adapter stays as it is; what could change is the base.
    """
    needs("bitsandbytes")
    rows = lab.rows(40)
    figures: Figures = {}
    for kind in ("nf4", "int8"):
        run = lab.train(
            *("task=lm", f"model.name_or_path={lab.model('135m')}", f"model.quantization={kind}"),
            *(f"data.train={rows}", f"data.test={rows}", "data.limit_val=4", "optim.lr=1e-30"),
            *("trainer.max_steps=3", "data.batch_size=4", *SHORT, "trainer.precision=bf16-true"),
        )
        before, after = run.result["before"]["test/loss"], run.result["test/loss"]
        figures[f"{kind}_before"], figures[f"{kind}_after"] = before, after
        figures[f"{kind}_same"] = before == after
    return figures


def verbs(lab: Lab) -> Figures:
    """What is done with an adapter on the device, and what PEFT makes of it."""
    figures: Figures = {"left_out": {}, "failed": []}
    rows = lab.rows(lab.pick(120, 40))
    common = ["model=tiny_lm", f"data.train={rows}", f"data.test={rows}", "test_before=false"]
    common += [f"trainer.max_steps={lab.pick(30, 4)}", "data.batch_size=8", "optim.lr=3e-3"]
    common += [
        "trainer.precision=32-true",
        "task.generation.max_new_tokens=8",
        "task.generate_rows=0",
    ]
    trained = lab.train("task=summarization", *common)
    talks = lab.train("task=instruct", *common)
    adapter = f"adapter={trained.folder / 'adapter'}"
    inputs, answers = lab.folder / "inputs.jsonl", lab.folder / "answers.jsonl"
    inputs.write_text("".join(f"{line}\n" for line in rows.read_text().splitlines()[:4]))
    commands: dict[str, tuple[list[str], str]] = {
        "evaluate": (["evaluate", adapter, f"data.test={rows}"], ""),
        "predict": (["predict", adapter, "text=the model takes a row"], ""),
        "predict file": (["predict", adapter, f"input={inputs}", f"output={answers}"], ""),
        "chat": (["chat", f"adapter={talks.folder / 'adapter'}"], "what follows it ?\n"),
        "merge": (["merge", adapter, f"output={lab.folder / 'merged'}"], ""),
        "export": (["export", adapter, f"output={lab.folder / 'plain'}", "format=canonical"], ""),
    }
    said = {}
    for name, (arguments, stdin) in commands.items():
        said[name] = lab.command(*arguments, stdin=stdin)
        if said[name].status:
            figures["failed"].append(f"{name}: {said[name].tail[-300:]}")
    if not figures["failed"]:
        found = json.loads(said["evaluate"].out[said["evaluate"].out.index("{") :])
        figures["evaluate_gap"] = abs(found["test/loss"] / trained.result["test/loss"] - 1)
        figures["answers"] = len(answers.read_text().splitlines())
        told = re.search(r"largest logit gap .*: (\S+)", said["merge"].out)
        figures["merge_gap"] = float(told[1]) if told else math.nan
    if missing_peers("peft"):
        figures["left_out"] = dict.fromkeys(("peft_gap_fp32", "peft_gap_bf16"), "needs peft")
    else:
        for name, dtype in {"fp32": "float32", "bf16": "bfloat16"}.items():
            figures[f"peft_gap_{name}"] = peft_gap(trained.folder / "adapter", dtype, lab.device)
    return figures


def peft_gap(adapter: Path, dtype: str, device: str) -> float:
    """The largest difference of a logit of ours and of PEFT's, over the largest logit."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_lightning.inference.loading import load_trained
    from lora_lightning.models.resolve import resolve

    module = load_trained(adapter, model={"dtype": dtype}, device=device)
    kind = getattr(torch, dtype)
    base = resolve("pkg://lora_lightning/embedded/tiny_lm")
    theirs: Any = AutoModelForCausalLM.from_pretrained(base, dtype=kind)
    theirs = PeftModel.from_pretrained(theirs, str(adapter)).to(device).eval()
    ids = torch.arange(3, 67, device=device).view(2, 32)
    with torch.no_grad():
        own = module.model(input_ids=ids).logits.float()
        other = theirs(input_ids=ids).logits.float()
    return float((own - other).abs().max() / own.abs().max())


CHECKS = [
    Check(
        5,
        "the fused step against autograd",
        fused_step,
        {"excess": at_most(1.0), "mask_gap": equals(0.0), "to_peft": at_most(1.25)},
        minutes=0.5,
    ),
    Check(
        4,
        "a CPU against a GPU",
        devices,
        {"fp32_gap": at_most(1e-4), "bf16_gap": at_most(2e-2), "losses": equals(True)},
        minutes=1,
    ),
    Check(
        15,
        "packed rows against rows alone",
        packing,
        {"fp32_gap": at_most(1e-3), "bf16_gap": at_most(2e-2), "flash_gap": at_most(2e-2)},
        minutes=1,
    ),
    Check(
        19,
        "killed and resumed",
        resuming,
        {"deterministic_is_exact": equals(True), "usual_gap": at_most(1e-3)},
        minutes=1.5,
        limit=300,
    ),
    Check(
        21,
        "the other verbs, and PEFT",
        verbs,
        {
            "failed": equals([]),
            "evaluate_gap": at_most(1e-4),
            "answers": equals(4),
            "merge_gap": at_most(1e-3),
            "peft_gap_fp32": at_most(1e-4),
            "peft_gap_bf16": at_most(2e-2),
        },
        minutes=1,
    ),
    Check(
        23,
        "a quantised base before and after a run",
        quantised,
        {"nf4_same": equals(True), "int8_same": equals(True)},
        minutes=0.5,
    ),
]
