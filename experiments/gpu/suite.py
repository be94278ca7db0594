r"""What has to hold on a GPU, in 25 checks; rehearsed on a CPU in a small form.

    experiments/gpu/run.sh [2 3 6] [--rehearse] [--skip-done] [--out DIR]

Each check is a process of its own with a time limit. What it found is a line of OUT/results.jsonl
as soon as it ends, so a suite that was cut goes on with --skip-done. At the end there is a table,
which is OUT/summary.md too. Exit status: 0 where nothing failed and all that was asked has run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from checks.judge import Check, run, shown  # noqa: E402

PROCESSES = {
    "gpu": multiprocessing.get_context("spawn"),
    "rehearsal": multiprocessing.get_context("forkserver"),
}
"""How a check is started. A process that comes of another's fork could not use its GPU; without one
the imports are made once."""
PROCESSES["rehearsal"].set_forkserver_preload(["checks", "lora_lightning.training.run", "datasets"])
IN_ALL = 2400.0
"""Seconds that all checks may take together."""
LONGEST_VALUE = 300
"""Characters of a value in the table."""


@dataclass
class Suite:
    """Where results go and how the checks are run.

    Args:
        out: folder of results.jsonl, summary.md and log.txt.
        work: folder of models and runs, which stay there between calls.
        rehearsal: the small form on a CPU.
    """

    out: Path
    work: Path
    rehearsal: bool

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    @property
    def mode(self) -> str:
        return "rehearsal" if self.rehearsal else "gpu"

    def done(self) -> dict[int, dict[str, Any]]:
        """The last result of each check so far, in this mode."""
        if not self.results.is_file():
            return {}
        lines = self.results.read_text().splitlines()
        found = list(map(json.loads, filter(complete, lines)))
        return {line["check"]: line for line in found if line["mode"] == self.mode}

    def record(self, result: dict[str, Any]) -> None:
        """Appends a result, on the disk before the next check begins."""
        before = self.results.read_text() if self.results.is_file() else ""
        with self.results.open("a") as handle:
            end = "" if not before or before.endswith("\n") else "\n"  # of a line that was cut
            handle.write(f"{end}{json.dumps(result)}\n")
            handle.flush()
            os.fsync(handle.fileno())

    def check(self, check: Check, seconds: float) -> dict[str, Any]:
        """Runs a check as a process, with a limit in seconds."""
        file, log = (self.work / f"{check.number}-{os.getpid()}.{kind}" for kind in ("json", "log"))
        started = time.monotonic()
        process = PROCESSES[self.mode].Process(
            target=one, args=(check.number, self.work, self.rehearsal, seconds, file, log)
        )
        process.start()
        process.join(seconds)
        message = f"ended with status {process.exitcode}"
        if process.exitcode is None:
            message = f"ended after {seconds:.0f} s, its time limit"
        end_group(process)
        printed = log.read_text(errors="replace") if log.is_file() else ""
        result: dict[str, Any] = {"status": "fail", "figures": {}, "message": message}
        if file.is_file():
            result = json.loads(file.read_text())
        elif tail := printed.strip().splitlines()[-5:]:
            result["message"] += ": " + " | ".join(tail)[-600:]
        with (self.out / "log.txt").open("a") as handle:
            handle.write(f"=== {check.number} {check.name}\n{printed[-20_000:]}\n")
        file.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        return {
            "check": check.number,
            "name": check.name,
            "mode": self.mode,
            "status": result["status"],
            "seconds": round(time.monotonic() - started, 1),
            "figures": result["figures"],
            "expected": check.expected(rehearsal=self.rehearsal),
            "message": result["message"],
        }


def end_group(process: Any) -> None:
    """Ends a check and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # which had no group of its own yet where it was ended at once
    process.join()


def complete(line: str) -> bool:
    """Whether a line of results was written to its end."""
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def set_environment(work: Path, *, rehearsal: bool) -> None:
    """For this process and all it starts: no network, caches of their own, a CPU's one thread."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_CACHE": str(work / "cache"),
    }
    if rehearsal:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def one(number: int, work: Path, rehearsal: bool, seconds: float, file: Path, log: Path) -> None:
    """What the process of a check does: measures, judges, and writes what it found."""
    os.setsid()  # by its group all that it starts is found
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    from checks import CHECKS
    from checks.lab import Lab

    lab = Lab(work, rehearsal=rehearsal, seconds=seconds)
    try:
        status, figures, message = run(CHECKS[number], lab)
    except Exception as error:
        traceback.print_exc()
        status, figures, message = "fail", {}, f"{type(error).__name__}: {error}"[:1500]
    found = {"status": status, "figures": figures, "message": message}
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(plain(found)))
    beside.replace(file)
    shutil.rmtree(lab.folder, ignore_errors=True)


def plain(value: Any) -> Any:
    """A value that every reader of JSON takes: infinite numbers and paths are text."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    finite = isinstance(value, float) and math.isfinite(value)
    return value if finite or isinstance(value, (int, str)) or value is None else str(value)


def table(checks: dict[int, Check], results: dict[int, dict[str, Any]]) -> str:
    """A row for each check: its verdict, time, and the figures that it was judged by."""
    lines = ["| # | check | verdict | s | figures | expected |", "|---|---|---|---|---|---|"]
    for number, check in checks.items():
        result = results.get(number)
        if result is None:
            lines.append(f"| {number} | {check.name} | not run | | | |")
            continue
        judged = {k: result["figures"].get(k) for k in result["expected"] if k in result["figures"]}
        cells = [
            *(str(number), check.name, result["status"], f"{result['seconds']:.0f}"),
            ", ".join(f"{name} {shown(value)}"[:LONGEST_VALUE] for name, value in judged.items()),
            ", ".join(f"{name} {limit}" for name, limit in result["expected"].items()),
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    told = [
        f"* {number} {result['status']}: {result['message']}"
        for number, result in results.items()
        if result["message"]
    ]
    return "\n".join([*lines, "", *told, ""])


def machine() -> str:
    """What the suite ran on, and with."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    found = [f"{device or 'CPU'}, {os.cpu_count()} cores, Python {platform.python_version()}"]
    for name in ("torch", "transformers", "lightning", "peft", "trl", "bitsandbytes"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", type=int, metavar="CHECK", help="all by default")
    parser.add_argument("--only", nargs="+", type=int, default=[], help="the same as CHECK")
    parser.add_argument("--rehearse", action="store_true", help="the small form on a CPU")
    parser.add_argument("--skip-done", action="store_true", help="go on with what has no result")
    parser.add_argument("--list", action="store_true", help="show the checks and run none")
    parser.add_argument("--jobs", type=int, default=1, help="checks at once; on a GPU: 1")
    parser.add_argument("--seconds", type=float, default=IN_ALL, help="of all calls together")
    parser.add_argument("--call-seconds", type=float, default=None, help="of this call")
    parser.add_argument("--out", type=Path, default=None, help="default: $OUT, or outputs/gpu")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "lora_lightning_gpu",
        help="folder of models, which stay for the next call",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = arguments_of(argv)
    from checks import CHECKS

    out = arguments.out or Path(os.environ.get("OUT", "outputs/gpu"))
    suite = Suite(out, arguments.work.resolve(), arguments.rehearse)
    numbers = [*arguments.numbers, *arguments.only] or [*CHECKS]
    if unknown := [number for number in numbers if number not in CHECKS]:
        print(f"there is no check {unknown[0]}: they are 1 to {max(CHECKS)}", file=sys.stderr)
        return 2
    chosen = {number: check for number, check in CHECKS.items() if number in numbers}
    if arguments.list:
        for check in chosen.values():
            print(f"{check.number:3} {check.name} ({check.minutes:g} min)")
        return 0
    if not suite.rehearsal and not cuda():
        print("torch finds no GPU here. The small form on a CPU: --rehearse", file=sys.stderr)
        return 2
    suite.out.mkdir(parents=True, exist_ok=True)
    suite.work.mkdir(parents=True, exist_ok=True)
    set_environment(suite.work, rehearsal=suite.rehearsal)
    return run_all(suite, chosen, arguments)


def cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run_all(suite: Suite, chosen: dict[int, Check], arguments: argparse.Namespace) -> int:
    """Runs what is chosen within the time there is; prints and writes the table."""
    before = suite.done()
    waiting = [c for c in chosen.values() if not (arguments.skip_done and c.number in before)]
    left = arguments.seconds
    if arguments.skip_done:
        left -= sum(result["seconds"] for result in before.values())
    if arguments.call_seconds is not None:
        left = min(left, arguments.call_seconds)
    until = time.monotonic() + left

    def begin(check: Check) -> None:
        remaining = until - time.monotonic()
        # With too little time left for what it usually takes it would only be cut.
        if remaining < (0 if suite.rehearsal else 60 * check.minutes):
            print(f"{check.number:3} {check.name}: not begun, {remaining:.0f} s left", flush=True)
            return
        result = suite.check(check, min(check.limit, remaining))
        suite.record(result)
        print(
            f"{check.number:3} {check.name}: {result['status']} in {result['seconds']:.0f} s"
            + (f" ({result['message']})" if result["message"] else ""),
            flush=True,
        )

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(begin, waiting))
    results = {number: found for number, found in suite.done().items() if number in chosen}
    text = f"{machine()}; {suite.mode}\n\n{table(chosen, results)}"
    (suite.out / "summary.md").write_text(text)
    print(f"\n{text}")
    good = all(found["status"] != "fail" for found in results.values())
    return 0 if good and results.keys() == chosen.keys() else 1


if __name__ == "__main__":
    sys.exit(main())
