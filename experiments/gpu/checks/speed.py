"""How fast is it? Waits, peers, kernels, compilation, recomputation, 4 bits, validation."""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from .judge import Check, Failure, Figures, at_least, at_most, equals
from .lab import BRIEF, LLAMA_8B, MIB, SHORT, Lab, gap, largest, missing_peers, replaced
from .probes import Probe

PEERS = {"trainer": ("peft",), "trl": ("peft", "trl")}
"""Who ours is compared with, and the packages that it takes."""
A_RUN = 75.0
"""Seconds that a peer may need for its start and a few steps."""
MATH = "_scaled_dot_product_attention_math"
FLASH = re.compile(r"flash|fmha|cudnn.*attention", re.IGNORECASE)
WIDE = re.compile(r"sgemm|gemm_f32f32_f32f32", re.IGNORECASE)
BY_LENGTH = re.compile(r"size|stride")
LAUNCH = re.compile(r"(cuda|cu)Launch(Cooperative)?Kernel")


def varied(lab: Lab, model: str, steps: int, *, precision: str = "bf16-true") -> list[str]:
    """Settings of a steady run on rows of many lengths, of 8,000 tokens or so a step on a GPU."""
    batch, words = lab.pick((32, (60, 440)), (4, (6, 40)))
    rows = lab.rows(batch * steps + 8, words)
    return [
        *("task=lm", "task.blocks=false", f"model.name_or_path={lab.model(model)}"),
        *(f"data.train={rows}", f"data.limit_train={batch * steps}", f"data.val={rows}"),
        *("data.limit_val=2", f"data.batch_size={batch}", "data.max_length=512"),
        *(f"trainer.max_steps={steps}", f"trainer.precision={precision}", *BRIEF),
    ]


def waits(lab: Lab) -> Figures:
    """Where the host waits for the device in steps 5 to 9, on one device and under DDP."""
    common = varied(lab, "135m", 12)
    one = lab.train(*common, "trainer.log_every_n_steps=50", probe="Waits").probe
    several = ["trainer=ddp", "trainer.devices=1"]
    several += lab.pick([], ["trainer.accelerator=cpu"])
    ddp = lab.train(*common, *several, "trainer.log_every_n_steps=50", probe="Waits").probe
    return {
        "waits": one.ours() / one.batches,
        "ddp_waits": ddp.ours() / ddp.batches,
        "all_waits": sum(one.places.values()) / one.batches,
        "places": dict(one.places.most_common(12)),
        "ddp_places": dict(ddp.places.most_common(12)),
    }


def peers(lab: Lab) -> Figures:
    """Ours, Trainer with PEFT, and TRL on the same rows, by model."""
    from contest import ours, peer
    from work import decoder_work

    figures: Figures = {"left_out": {}, "runs": {}}
    works: dict[str, tuple[str, str, int, int]] = lab.pick(
        {
            "135m": ("135m", "bf16-true", 12, 32),
            "135m_fp32": ("135m", "32-true", 3, 8),
            "1b": ("1b", "bf16-true", 8, 32),
            "8b": ("8b", "bf16-true", 5, 32),
        },
        {"135m_fp32": ("135m", "32-true", 2, 2)},
    )
    for name, (model, precision, steps, batch) in works.items():
        work = decoder_work(
            lab.folder,
            steps * batch,
            model=lab.model(model),
            length=lab.pick(None, 48),
            steps=steps,
            batch_size=batch,
        )
        if lab.seconds_left() < A_RUN:
            names = ("tokens_per_second", *(f"to_{one}" for one in PEERS), "memory_to_trl")
            figures["left_out"] |= {f"{name}_{figure}": "no time left" for figure in names}
            continue
        runs = {"ours": contest(lab, ours(precision), work)}
        others = {library: peer(library, precision) for library in PEERS}
        found, reasons = contests(lab, others, work)
        runs |= found
        for library, reason in reasons.items():
            for figure in (f"{name}_to_{library}", f"{name}_memory_to_{library}"):
                figures["left_out"][figure] = reason
        figures |= compared(name, runs)
        figures["runs"][name] = runs
    for kind in ("fp32", "bf16"):
        own = [name for name in works if ("fp32" in name) == (kind == "fp32")]
        keys = [f"{name}_loss_gap" for name in own if f"{name}_loss_gap" in figures]
        if keys:
            figures[f"{kind}_loss_gap"] = largest([figures[key] for key in keys])
        elif own:
            figures["left_out"][f"{kind}_loss_gap"] = "no peer has finished"
    return figures


def compared(name: str, runs: dict[str, dict[str, Any]]) -> Figures:
    """Figures of ours, and its ratios to the others."""
    own = runs["ours"]
    figures: Figures = {f"{name}_tokens_per_second": own["tokens_per_second"]}
    gaps = []
    for library, other in runs.items():
        if library == "ours":
            continue
        speed = own["tokens_per_second"] / other["tokens_per_second"]
        figures[f"{name}_to_{library}"] = speed
        figures[f"{name}_memory_to_{library}"] = own["peak_mib"] / other["peak_mib"]
        pairs = zip(own["loss"], other["loss"], strict=True)
        gaps.append(largest([abs(one - two) for one, two in pairs]))
    if gaps:
        figures[f"{name}_loss_gap"] = largest(gaps)
    return figures


def contest(lab: Lab, contestant: Any, work: Any) -> dict[str, Any]:
    """What a contestant measured of itself, in a process of its own.

    Raises:
        Failure: it did not finish.
    """
    from contest import run

    try:
        timeout = min(240.0, lab.seconds_left() - 10.0)
        found: dict[str, Any] = run(contestant, work, lab.folder, timeout)
    except SystemExit as stop:
        raise Failure(str(stop)) from None
    return found


def contests(
    lab: Lab, contestants: dict[str, Any], work: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What peers have measured, and why others have not."""
    found, reasons = {}, {}
    for library, contestant in contestants.items():
        if missing := missing_peers(*PEERS[library]):
            reasons[library] = f"needs {missing[0]}"
        elif lab.seconds_left() < A_RUN:
            reasons[library] = "no time left"
        else:
            try:
                found[library] = contest(lab, contestant, work)
            except Failure as failure:
                reasons[library] = f"{library}: {str(failure)[-200:]}"
    return found, reasons


def kernels(lab: Lab) -> Figures:
    """Ten steps under torch's profiler: how busy the GPU is, launches, what attention takes."""
    probe = lab.train(*varied(lab, "1b", 16), probe="Kernels").probe
    return profiled(probe.events, probe.last - probe.first + 1)


def profiled(events: list[tuple[str, bool, float, float]], steps: int) -> Figures:
    """Figures of a profile.

    Args:
        events: name, whether on the GPU, start and end in µs.
        steps: how many were profiled.
    """
    on_gpu = sorted((start, end, name) for name, gpu, start, end in events if gpu)
    figures: Figures = {
        "math_attention": sum(MATH in name for name, *_ in events),
        "left_out": {},
    }
    if not on_gpu:
        figures["ops_a_step"] = sum(name.startswith("aten::") for name, *_ in events) / steps
        names = ("busy", "launches_a_step", "fp32_products", "flash_attention")
        figures["left_out"] = dict.fromkeys(names, "needs CUDA")
        return figures
    busy, until = 0.0, on_gpu[0][0]
    for start, end, _ in on_gpu:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    times: Counter[str] = Counter()
    for start, end, name in on_gpu:
        times[name[:90]] += round(end - start)
    return figures | {
        "busy": busy / (until - on_gpu[0][0]),
        "launches_a_step": sum(bool(LAUNCH.match(name)) for name, *_ in events) / steps,
        "fp32_products": sum(bool(WIDE.search(name)) for _, _, name in on_gpu),
        "flash_attention": any(FLASH.search(name) for _, _, name in on_gpu),
        "top_kernels_us": dict(times.most_common(12)),
    }


def compiled(lab: Lab) -> Figures:
    """model.compile=layer on rows of many lengths: losses, speed, recompilations.

    A rehearsal traces the layers and leaves out making code of them, which takes a minute.
    """
    import torch

    figures: Figures = {"left_out": lab.needs_cuda(["135m_speed_up", "1b_speed_up"])}
    own = torch.nn.Module.compile

    def traced(module: Any, *args: Any, **settings: Any) -> None:
        own(module, *args, backend="aot_eager", **settings)

    gaps: list[float] = []
    again: list[list[str]] = []
    graphs = []
    for model in lab.pick(("135m", "1b"), ("135m",)):
        common = varied(lab, model, lab.pick(12, 4), precision=lab.pick("bf16-true", "32-true"))
        usual = lab.train(*common, probe="Steps")
        lab.free()
        how: Any = contextlib.nullcontext()
        if lab.rehearsal:
            how = replaced(torch.nn.Module, "compile", traced)
        with how, recompilations() as found:
            fast = lab.train(*common, "model.compile=layer", probe="Steps")
        gaps.append(gap(usual.losses, fast.losses))
        again.append(found)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        if not lab.rehearsal:
            figures[f"{model}_speed_up"] = usual.probe.seconds(6) / fast.probe.seconds(6)
        torch._dynamo.reset()
        lab.free()
    return figures | {
        "loss_gap": largest(gaps),
        "graphs": min(graphs),
        "recompilations": max(map(len, again)),
        "by_length": sum(bool(BY_LENGTH.search(text)) for texts in again for text in texts),
    }


@contextlib.contextmanager
def recompilations() -> Iterator[list[str]]:
    """Why torch compiles again in a block: a text for each time."""
    import torch

    found: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("torch._dynamo.guards")
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    torch._logging.set_logs(recompiles=True)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        torch._logging.set_logs()
        found[:] = [text for text in found if "Recompiling function" in text]


def recomputed(lab: Lab) -> Figures:
    """Gradient checkpointing, with dropout: the same losses, more time, less memory."""
    return kept_otherwise(lab, {"checkpointing": ["model.gradient_checkpointing=true"]})


def offloaded(lab: Lab) -> Figures:
    """Activations in the CPU's memory, with gradient checkpointing and without."""
    checkpointing = ["model.gradient_checkpointing=true"]
    figures = kept_otherwise(
        lab,
        {
            "checkpointing": checkpointing,
            "offload": ["model.offload_activations=true"],
            "both": [*checkpointing, "model.offload_activations=true"],
        },
    )
    figures["both_time"] /= figures["checkpointing_time"]
    return figures


def kept_otherwise(lab: Lab, ways: dict[str, list[str]]) -> Figures:
    """Runs that keep their activations in several ways, against one that just keeps them.

    Returns:
        For each way the gap of its losses, and the ratios of its time and memory; how much pinned
        memory is in use after the last run, over that after the first.
    """
    steps, first = lab.pick((10, 4), (3, 1))
    common = varied(lab, "1b", steps, precision=lab.pick("bf16-true", "32-true"))
    common.append("lora.dropout=0.1")
    plain = lab.train(*common, probe="Steps")
    pinned = pinned_mib()
    figures: Figures = {"left_out": {}}
    for name, settings in ways.items():
        lab.free()
        run = lab.train(*common, *settings, probe="Steps")
        figures[f"{name}_gap"] = gap(plain.losses, run.losses)
        figures[f"{name}_time"] = run.probe.seconds(first) / plain.probe.seconds(first)
        memory = run.result["peak_memory_mib"] / plain.result["peak_memory_mib"]
        figures[f"{name}_memory"] = memory
    lab.free()
    if pinned is None:
        figures["left_out"]["pinned_growth_mib"] = "needs CUDA, and a torch that tells of it"
    else:
        figures["pinned_growth_mib"] = (pinned_mib() or 0.0) - pinned
    return figures


def pinned_mib() -> float | None:
    """Pinned memory in use; None where this torch does not tell."""
    import torch

    tell = getattr(torch.cuda, "host_memory_stats", None)
    if tell is None or not torch.cuda.is_available():
        return None
    found = tell().get("active_bytes.current", tell().get("allocated_bytes.current"))
    return None if found is None else float(found) / MIB


def four_bits(lab: Lab) -> Figures:
    """A base of 8 B in 4 bits, rank 32, 2 x 4 rows a step, against PEFT and TRL."""
    from contest import ours, peer
    from work import decoder_work

    missing = missing_peers("bitsandbytes")
    names = ("weights_mib", "loss_gap", "to_trl", "to_trainer")
    if missing:
        return {"left_out": dict.fromkeys(names, "needs bitsandbytes")}
    figures: Figures = {"left_out": {}, "runs": {}}
    steps = lab.pick(5, 2)
    precision = lab.pick("bf16-true", "32-true")
    work = decoder_work(
        lab.folder,
        8 * steps,
        model=lab.model("8b"),
        length=lab.pick(1024, 32),
        steps=steps,
        batch_size=2,
        accumulate=4,
        rank=32,
    )
    runs = {"ours": contest(lab, ours(precision, "model.quantization=nf4"), work)}
    others = {library: peer(library, precision, quantization="nf4") for library in PEERS}
    found, reasons = contests(lab, others, work)
    runs |= found
    figures["left_out"] |= {f"to_{library}": reason for library, reason in reasons.items()}
    figures["runs"] = runs
    figures |= {key.removeprefix("_"): value for key, value in compared("", runs).items()}
    if len(runs) == 1:
        figures["left_out"]["loss_gap"] = "no peer has finished"
    figures["left_out"] |= lab.needs_cuda(["weights_mib"])
    if not lab.rehearsal:
        one = lab.train(
            *("task=lm", f"model.name_or_path={lab.model('8b')}", "model.quantization=nf4"),
            *("trainer.precision=bf16-true", f"data.train={lab.rows(16)}", "trainer.max_steps=1"),
            *("data.batch_size=1", "lora.rank=32", *SHORT, *BRIEF),
            probe="Steps",
        )
        head = 2 * LLAMA_8B["vocab_size"] * LLAMA_8B["hidden_size"] / MIB  # stays in bf16
        figures["weights_mib"] = one.probe.at_start - head
    return figures


def validation(lab: Lab) -> Figures:
    """A validation with 64 tokens of text for 64 of its 256 rows: calls of generate, seconds."""
    import transformers

    rows, tokens, batch = lab.pick((64, 64, 16), (12, 4, 4))
    own = transformers.GenerationMixin.generate

    def counted(model: Any, *args: Any, **settings: Any) -> Any:
        if Probe.latest is not None:
            Probe.latest.generated += 1  # type: ignore[attr-defined]
        return own(model, *args, **settings)

    file = lab.rows(4 * rows, lab.pick((40, 200), (6, 20)))
    with replaced(transformers.GenerationMixin, "generate", counted):
        probe = lab.train(
            *("task=summarization", f"model.name_or_path={lab.model('1b')}"),
            *(f"data.train={file}", f"data.val={file}", f"task.generate_rows={rows}"),
            *(f"task.generation.max_new_tokens={tokens}", f"data.eval_batch_size={batch}"),
            *("trainer.max_steps=1", "data.batch_size=4", "trainer.precision=bf16-true"),
            *("test_before=false", "data.test_fraction=0"),
            probe="Validations",
        ).probe
    return {
        "calls_over_least": max(probe.calls) / (rows / batch),
        "calls": probe.calls,
        "seconds": max(probe.seconds),
    }


CHECKS = [
    Check(
        6,
        "no waiting in a step",
        waits,
        {"waits": equals(0), "ddp_waits": equals(0)},
        minutes=1,
    ),
    Check(
        7,
        "ours, PEFT and TRL",
        peers,
        {
            "fp32_loss_gap": at_most(0.002),
            "bf16_loss_gap": at_most(0.02, rehearsal=None),
            "1b_tokens_per_second": at_least(60_000, rehearsal=None),
            "8b_tokens_per_second": at_least(11_000, rehearsal=None),
            "135m_to_trainer": at_least(1.0, rehearsal=None),
            "8b_to_trl": at_least(1.0, rehearsal=None),
            "1b_memory_to_trl": at_most(0.6, rehearsal=None),
        },
        minutes=5,
        limit=570,
    ),
    Check(
        8,
        "what the GPU does in ten steps",
        kernels,
        {
            "math_attention": equals(0),
            "busy": at_least(0.9),
            "launches_a_step": at_most(3000),
            "fp32_products": equals(0),
            "flash_attention": equals(True),
        },
        minutes=1,
    ),
    Check(
        9,
        "compiled layers",
        compiled,
        {
            "loss_gap": at_most(1e-3),
            "recompilations": at_most(4),
            "by_length": equals(0),
            "graphs": at_least(1),
            "1b_speed_up": at_least(1.15),
            "135m_speed_up": at_least(2.0),
        },
        minutes=2.5,
        limit=420,
    ),
    Check(
        10,
        "activations recomputed",
        recomputed,
        {
            "checkpointing_gap": at_most(1e-3),
            "checkpointing_time": at_most(1.4, rehearsal=None),
            "checkpointing_memory": at_most(0.8, rehearsal=None),
        },
        minutes=1,
    ),
    Check(
        11,
        "activations offloaded",
        offloaded,
        {
            "offload_gap": at_most(1e-3),
            "both_gap": at_most(1e-3),
            "both_time": at_most(1.4, rehearsal=None),
            "pinned_growth_mib": at_most(64),
        },
        minutes=1,
    ),
    Check(
        12,
        "8 B in 4 bits against TRL",
        four_bits,
        {
            "weights_mib": at_most(5436),
            "loss_gap": at_most(1e-2),
            "to_trl": at_least(1.2, rehearsal=None),
        },
        minutes=2.5,
        limit=480,
    ),
    Check(
        17,
        "a validation with text",
        validation,
        {"calls_over_least": at_most(1.0), "seconds": at_most(6.0, rehearsal=None)},
        minutes=1,
    ),
]
