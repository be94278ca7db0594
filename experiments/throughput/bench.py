r"""Ours against its peers: the same rows, order, weights and optimizer, each in fresh processes.

    pip install -c constraints.txt -e ".[bench]"
    python experiments/throughput/bench.py

A study runs its contestants in turn, A B C A B C, and quotes medians over the rounds; a ratio is
the median of the rounds' own ratios, so that a machine whose speed drifts does less harm. The same
command measures a GPU where there is one. Results go to a folder cpu/ or cuda/ beside this file:
runs.csv, STUDY.md and scaling.png. Studies can be named, see --help; decoder and encoder are
repeated in bf16 where the hardware is fast at it.

Contestants: ours is the command that a user types; `trainer` is transformers' Trainer with PEFT,
`trl` is TRL's SFTTrainer (peer.py). The decoder is a Llama of 135 M parameters with a vocabulary of
49,152 and random weights: speed does not depend on their values. Its rows have the lengths of
DialogSum's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from contest import HERE, Contestant, Rows, Work, compete, ours, peer, run
from report import check_losses, machine, write
from work import decoder_work, encoder_work


def decoder(arguments: argparse.Namespace) -> Rows:
    """Prompt-masked training of the decoder, all contestants."""
    work = decoder_work(arguments.work, 64, steps=arguments.steps, batch_size=8)
    contestants = [ours("32-true"), peer("trainer", "32-true"), peer("trl", "32-true")]
    if bf16():
        contestants += [
            ours("bf16-true"),
            ours("bf16-mixed"),
            peer("trainer", "bf16-mixed"),
            peer("trainer", "bf16-true"),
            peer("trl", "bf16-mixed"),
            peer("trl", "bf16-true"),
        ]
    return compete("decoder", contestants, work, arguments)


def encoder(arguments: argparse.Namespace) -> Rows:
    """Classification with MiniLM."""
    work = encoder_work(arguments.work, arguments.data, steps=40, batch_size=32)
    contestants = [ours("32-true"), peer("trainer", "32-true")]
    if bf16():
        contestants += [
            ours("bf16-true"),
            peer("trainer", "bf16-mixed"),
            peer("trainer", "bf16-true"),
        ]
    return compete("encoder", contestants, work, arguments)


def full(arguments: argparse.Namespace) -> Rows:
    """LoRA against our own full fine-tuning."""
    work = decoder_work(arguments.work, 64, steps=arguments.steps, batch_size=8)
    contestants = [ours("32-true"), ours("32-true", "lora=full", name="full")]
    return compete("full", contestants, work, arguments)


def longest(arguments: argparse.Namespace) -> Rows:
    """The longest row that trains within `--memory`, each with gradient checkpointing.

    Memory is a straight line over the length: two lengths give it, and a run shows that the length
    it leads to stays within.
    """
    contestants = [
        ours("32-true", "model.gradient_checkpointing=true", name="ours checkpointing"),
        peer("trainer", "32-true", checkpointing=True),
        peer("trl", "32-true", checkpointing=True),
    ]
    rows = []
    for contestant in contestants:

        def peak(length: int, contestant: Contestant = contestant) -> float:
            work = decoder_work(
                arguments.work, 4, length=length, max_length=2 * length, steps=1, batch_size=1
            )
            found = run(contestant, work, arguments.work, arguments.timeout)
            return float(found["peak_mib"])

        short, long = 512, 1536
        low, high = peak(short), peak(long)
        length = int(long + (0.97 * arguments.memory - high) * (long - short) / (high - low))
        length = min(length, arguments.longest)
        measured = peak(length)
        rows.append(
            {
                "study": "longest",
                "round": 0,
                "contestant": contestant.name,
                "length": length,
                "peak_mib": measured,
            }
        )
        print(f"longest {contestant.name:32} {length} tokens, {measured:.0f} MiB", flush=True)
    return rows


def scaling(arguments: argparse.Namespace) -> Rows:
    """Seconds a step over length, batch and rank, one of them varied at a time."""
    usual = {"length": 256, "batch_size": 8, "rank": 8}
    points = {
        "length": (64, 256, 1024),
        "batch_size": (1, 4, 16),
        "rank": (8, 64, 256),
    }
    rows = []
    for axis, values in points.items():
        for value in values:
            at = {**usual, axis: value}
            if axis == "length":  # as many tokens at every length
                at["batch_size"] = usual["batch_size"] * usual["length"] // value
            work = decoder_work(arguments.work, 2 * at["batch_size"], steps=2, **at)
            found = compete(
                "scaling",
                [ours("32-true"), peer("trainer", "32-true")],
                work,
                argparse.Namespace(**{**vars(arguments), "rounds": 1}),
            )
            rows += [{**row, "axis": axis, "value": value} for row in found]
    return rows


STUDIES = {
    "decoder": decoder,
    "encoder": encoder,
    "full": full,
    "longest": longest,
    "scaling": scaling,
}


def bf16() -> bool:
    from lora_lightning.distributed.hardware_speed import bf16_is_fast

    return bf16_is_fast()


def product_limit() -> float:
    """GFLOP/s of this machine's products in fp32: the best of the decoder's own shapes."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    best = 0.0
    for inner, outer in ((576, 576), (576, 1536), (1536, 576)):
        x = torch.randn(1024, inner, device=device)
        weight = torch.randn(outer, inner, device=device)
        times = []
        for _ in range(30):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        best = max(best, 2 * 1024 * inner * outer / statistics.median(times) / 1e9)
    return best


def flops(work: Work) -> float:
    """Of the products that a LoRA step cannot do without, in all steps but the first.

    Two a weight and token forward and two for the gradient of the input: 4 x weights x tokens for
    the layers, 4 x vocabulary x width x targets for the head. Attention and the low-rank products
    come on top.
    """
    layer = 576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536
    tokens, targets = sum(work.tokens[work.timed]), sum(work.targets[work.timed])
    return 4.0 * (30 * layer * tokens + 49152 * 576 * targets)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="of which the first warms up")
    parser.add_argument("--memory", type=float, default=4096.0, help="MiB, of the study longest")
    parser.add_argument("--longest", type=int, default=4096, help="tokens, where longest ends")
    parser.add_argument("--data", help="JSON lines of text and label, for the encoder")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "throughput")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds of a run")
    arguments = parser.parse_args()
    studies = arguments.studies or [*STUDIES]
    unknown = [study for study in studies if study not in STUDIES]
    if unknown:
        parser.error(f"there is no study {unknown[0]!r}. Known: {', '.join(STUDIES)}.")
    arguments.work.mkdir(parents=True, exist_ok=True)
    folder = HERE / ("cuda" if torch.cuda.is_available() else "cpu")
    for study in studies:
        before = product_limit()
        rows = STUDIES[study](arguments)
        limit = (before + product_limit()) / 2
        notes = [machine()]
        if study in ("decoder", "encoder"):
            check_losses(study, rows)
        if study == "decoder":
            work = decoder_work(arguments.work, 64, steps=arguments.steps, batch_size=8)
            seconds = statistics.median(
                r["seconds"] for r in rows if r["contestant"] == "ours 32-true"
            )
            share = flops(work) / seconds / limit / 1e9
            notes.append(
                f"Products alone: {limit:.0f} GFLOP/s in fp32, before and after; ours reaches "
                f"{100 * share:.0f} % of that."
            )
        write(study, rows, folder, notes)


if __name__ == "__main__":
    main()
