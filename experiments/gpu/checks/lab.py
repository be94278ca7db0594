"""Where a check measures: its device, its sizes, its models and rows, and our commands."""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .judge import Failure, Skip

EXPERIMENTS = Path(__file__).parent.parent.parent
ROOT = EXPERIMENTS.parent
for study in ("gpu", "throughput", "plan", "soak"):
    if str(EXPERIMENTS / study) not in sys.path:
        sys.path.append(str(EXPERIMENTS / study))

from work import SMOLLM2_135M, make_llama  # noqa: E402

T = TypeVar("T")
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 524288,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
"""The shape of Llama-3.2-1B, for longer rows."""
LLAMA_8B = {
    **LLAMA_1B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
"""The shape of Llama-3.1-8B, for longer rows."""
TINY = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""What stands for each of them in a rehearsal."""
SIZES = {"135m": SMOLLM2_135M, "1b": LLAMA_1B, "8b": LLAMA_8B}
TEXT = (
    "the model takes a row of words and says what follows it then reads another file in order to "
    "find where the name of each value was set returns a list of them or raises an error if not"
)
QUIET = (
    *("callbacks.progress_bar=null", "callbacks.rich_summary=null", "callbacks.samples=null"),
    *("callbacks.early_stopping=null", "trainer.enable_progress_bar=false"),
    *("logger.tensorboard=null", "trainer.log_every_n_steps=1"),
)
BRIEF = ("test_before=false", "data.test_fraction=0", "trainer.limit_val_batches=1")
SHORT = ("data.max_length=64", "task.generation.max_new_tokens=8")
MIB = 2**20
ADAPTER = "adapter/adapter_model.safetensors"


@dataclass
class Said:
    """What a command ended with."""

    status: int
    out: str
    err: str

    @property
    def tail(self) -> str:
        return "\n".join((self.out + self.err).strip().splitlines()[-8:])


@dataclass
class Run:
    """A run of `train` that has ended well.

    Args:
        folder: its folder.
        result: its result.json.
        said: what it printed.
        probe: the callback that watched it, see `probes`.
    """

    folder: Path
    result: dict[str, Any]
    said: Said
    probe: Any = None
    losses: list[float] = field(default_factory=list)
    """The mean loss of each step."""


class Lab:
    """The place of one check.

    Args:
        work: where models are kept, for all checks.
        rehearsal: the small form on a CPU.
        seconds: that the check has; None: as many as it takes.
    """

    def __init__(self, work: Path, *, rehearsal: bool, seconds: float | None = None) -> None:
        self.work, self.rehearsal = work, rehearsal
        self.until = math.inf if seconds is None else time.monotonic() + seconds
        self.device = "cpu" if rehearsal else "cuda"
        self.trainer = "trainer=cpu" if rehearsal else "trainer=gpu"
        work.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(dir=work, prefix="check-"))

    def pick(self, on_gpu: T, in_rehearsal: T) -> T:
        """The one of two sizes that holds."""
        return in_rehearsal if self.rehearsal else on_gpu

    def seconds_left(self) -> float:
        """Before the check is ended: a part of it that takes longer is better left out."""
        return self.until - time.monotonic()

    def needs_cuda(self, figures: list[str]) -> dict[str, str]:
        """Reasons for figures that a rehearsal leaves out."""
        return dict.fromkeys(figures, "needs CUDA") if self.rehearsal else {}

    # Models and rows -------------------------------------------------------------------------

    def model(self, name: str) -> Path:
        """Folder of a Llama with random weights: 135m, 1b or 8b."""
        folder = self.work / ("tiny" if self.rehearsal else name)
        if not folder.exists():
            make_llama(folder, TINY if self.rehearsal else SIZES[name], device=self.device)
            self.free()
        return folder

    def rows(self, count: int, words: tuple[int, int] = (8, 40), *, seed: int = 0) -> Path:
        """A file of rows for every task, of as many words (a token each, about)."""
        generator, known = random.Random(seed), TEXT.split()

        def text() -> str:
            return " ".join(generator.choices(known, k=generator.randint(*words)))

        rows = [
            {
                **{"text": text(), "label": "ab"[number % 2]},
                **{"source": text(), "target": " ".join(text().split()[: max(4, words[0] // 2)])},
                **{"prompt": text(), "completion": " ".join(text().split()[: max(4, words[0])])},
            }
            for number in range(count)
        ]
        path = self.folder / f"rows-{count}-{words[0]}-{words[1]}-{seed}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    # Commands --------------------------------------------------------------------------------

    def command(self, *arguments: str, stdin: str = "") -> Said:
        """Runs `lora-lightning ARGUMENTS` in this process."""
        from lora_lightning.cli.main import main

        out, err, status = io.StringIO(), io.StringIO(), 0
        before = sys.argv, sys.stdin
        sys.argv, sys.stdin = ["lora-lightning", *arguments], io.StringIO(stdin)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                status = int(stop.code or 0)
            except Exception:
                traceback.print_exc()
                status = 1
            finally:
                sys.argv, sys.stdin = before
        return Said(status, out.getvalue(), err.getvalue())

    def process(self, *arguments: str, code: str | None = None, **environment: str) -> Said:
        """Runs `lora-lightning ARGUMENTS` in a process of its own.

        Args:
            arguments: of the command.
            code: Python to run in the place of the command's own.
            environment: variables to set.
        """
        done = subprocess.run(
            self.argv(*arguments, code=code),
            env=self.environment(**environment),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def argv(self, *arguments: str, code: str | None = None) -> list[str]:
        how = ["-m", "lora_lightning"] if code is None else ["-c", code]
        return [sys.executable, *how, *arguments]

    def environment(self, **more: str) -> dict[str, str]:
        """Of a process: the callbacks of `probes` can be imported there."""
        path = [str(EXPERIMENTS / "gpu"), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **more}

    def settings(self, *overrides: str, name: str | None = None) -> list[str]:
        """Arguments of a quiet run, whose folder is the last of them; of equals the later hold."""
        folder = Path(tempfile.mkdtemp(dir=self.folder)) / (name or "run")
        merged = {part.lstrip("+").partition("=")[0]: part for part in QUIET}
        first = [] if any(part.startswith("trainer=") for part in overrides) else [self.trainer]
        merged |= {part.lstrip("+").partition("=")[0]: part for part in (*first, *overrides)}
        return ["train", *merged.values(), f"output_dir={folder}"]

    def train(self, *overrides: str, probe: str | None = None) -> Run:
        """Trains in this process.

        Args:
            overrides: settings over those of a quiet run.
            probe: the class of `probes` that watches it.

        Raises:
            Failure: the run did not end well.
        """
        from . import probes

        watching = []
        if probe is not None:
            watching = [f"+callbacks.probe._target_=checks.probes.{probe}"]
        arguments = self.settings(*overrides, *watching)
        probes.Probe.latest = None
        said = self.command(*arguments)
        return self.ended(arguments, said, probe=probes.Probe.latest)

    def apart(self, *arguments: str) -> Said:
        """Runs `lora-lightning ARGUMENTS` in its own process; a rehearsal saves itself that."""
        return self.command(*arguments) if self.rehearsal else self.process(*arguments)

    def train_apart(self, *overrides: str) -> Run:
        """Trains as `apart`."""
        arguments = self.settings(*overrides)
        return self.ended(arguments, self.apart(*arguments))

    def ended(self, arguments: list[str], said: Said, *, probe: Any = None) -> Run:
        """The run that a command has left.

        Raises:
            Failure: it did not end well.
        """
        folder = Path(arguments[-1].partition("=")[2])
        if said.status:
            print("lora-lightning", *arguments, flush=True)
            raise Failure(f"{arguments[0]}: exit status {said.status}: {said.tail}")
        result = json.loads((folder / "result.json").read_text())
        if result["status"] != "completed":
            raise Failure(f"{arguments[0]}: {result['status']}")
        return Run(folder, result, said, probe, losses_of(folder))

    # The device ------------------------------------------------------------------------------

    def peak_mib(self) -> float:
        """What result.json's peak_memory_mib ought to be, measured here."""
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated() / MIB
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def allocated_mib(self) -> float:
        """Tensors on the GPU now; 0 without one."""
        if self.device == "cpu":
            return 0.0
        import torch

        return torch.cuda.memory_allocated() / MIB

    def free(self) -> None:
        """Gives back what is left of an earlier run in this process."""
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()


def needs(*packages: str) -> None:
    """Raises Skip where a package is not installed."""
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"needs {', '.join(missing)}")


def missing_peers(*packages: str) -> list[str]:
    import importlib.util

    return [name for name in packages if importlib.util.find_spec(name) is None]


def losses_of(run: Path) -> list[float]:
    """The losses that a run has logged, by step."""
    path = run / "csv/metrics.csv"
    if not path.is_file():
        return []
    rows = csv.DictReader(path.open(newline=""))
    return [float(row["train/loss"]) for row in rows if row.get("train/loss")]


def largest(values: list[float]) -> float:
    """The largest of some numbers; NaN where there is none, or one is none."""
    return math.nan if not values or any(map(math.isnan, values)) else max(values)


def gap(first: list[float], second: list[float]) -> float:
    """The largest relative difference of two series; NaN where they cannot be compared."""
    if len(first) != len(second):
        return math.nan
    pairs = zip(first, second, strict=True)
    return largest([abs(one - other) / max(abs(one), 1e-12) for one, other in pairs])


def weights_gap(first: Path, second: Path) -> float:
    """The largest difference of a weight of two adapters over the largest weight of its tensor."""
    from safetensors.torch import load_file

    one, other = load_file(first), load_file(second)
    if one.keys() != other.keys():
        return math.nan
    return largest(
        [
            float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp(min=1e-12))
            for name in one
        ]
    )


def at_once(*tasks: Callable[[], T]) -> list[T]:
    """Results of tasks that run beside each other, in their order."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Has an attribute be another for the time of a block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
