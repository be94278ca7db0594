"""The verbs of the command line: one function each, whose signature is what a user types."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from lora_lightning.distributed import environment as cluster
from lora_lightning.errors import UserError
from lora_lightning.utils.terminal import printable, say

from .parser import File, FileOrFolder, Folder, arguments_of, unknown_argument


def train(overrides: list[str]) -> None:
    """Train an adapter, then test the best one."""
    from .train import start

    start(overrides)


def plan(overrides: list[str], device_gib: float | None = None) -> None:
    """Show memory and adapter sizes, without weights.

    Args:
        device_gib: Memory of the device in GiB (default: that of this machine).
    """
    from lora_lightning.utils.checks import check_range

    check_range("device_gib", device_gib, "(0, inf)")
    from lora_lightning.config.compose import compose_config

    config = compose_config(overrides)
    from lora_lightning.training.preflight.plan import plan as plan_of

    say(plan_of(config, device_gib))


def check(overrides: list[str]) -> None:
    """Show what train would do, in seconds."""
    from lora_lightning.config.compose import compose_config

    config = compose_config(overrides)
    config.output_dir = os.path.abspath(config.output_dir)
    from lora_lightning.training.preflight.check import check as report_on

    say(report_on(config))


def evaluate(overrides: list[str], adapter: Folder, output: File | None = None) -> None:
    """Test an adapter.

    Args:
        adapter: Adapter folder of a run (RUN/adapter).
        output: JSON file for the metrics (default: they are only printed).
    """
    _check_output(output, ".json", by="evaluate", sources=[adapter])
    from lora_lightning.inference.overrides import changed_config
    from lora_lightning.utils.atomic_write import write_json
    from lora_lightning.utils.locks import locked_output

    config = changed_config(adapter, overrides, verb="evaluate")
    from lora_lightning.inference.evaluate import evaluate as metrics_of
    from lora_lightning.inference.output_files import check_output_file

    if not cluster.tells():  # only the first of several processes writes
        output = None
    if output is not None:
        check_output_file(output, by="evaluate", sources=_data_files(config))
    with locked_output(output):
        metrics = metrics_of(adapter, config)
        print(json.dumps(metrics, indent=2))
        if output is not None:
            write_json(output, metrics)


def predict(
    overrides: list[str],
    adapter: Folder,
    text: str | None = None,
    input: File | None = None,
    output: File | None = None,
) -> None:
    """Use an adapter on a text or a file.

    Args:
        adapter: Adapter folder of a run (RUN/adapter).
        text: Text to use it on.
        input: File whose rows to use it on, in any format that train reads.
        output: JSONL file for the rows with their predictions (default: they are printed).
    """
    if (text is None) == (input is None):
        got = " ".join(overrides) or ("neither" if text is None else "both")
        raise UserError(f'predict requires one of text="..." and input=FILE, not {got}.')
    sources = [adapter] if input is None else [adapter, input]
    _check_output(output, ".jsonl", ".ndjson", by="predict", sources=sources)
    from lora_lightning.inference.predictor import predictor_for

    verb = "predict" if text is None else "predict text="
    predictor = predictor_for(adapter, overrides, verb=verb)
    from lora_lightning.inference.predict_file import predict_file
    from lora_lightning.inference.predictor import predict_text

    if input is not None:
        count = predict_file(predictor, input, output)
        if output is not None:
            print(f"{count} rows -> {output}")
    elif text is not None and predictor.module.task.generative:
        from lora_lightning.inference.chat import answer

        answer(predictor, text)
    elif text is not None:
        prediction = predict_text(predictor, text)
        print(printable(json.dumps(prediction, ensure_ascii=False, indent=2), json=True))


def chat(overrides: list[str], adapter: Folder) -> None:
    """Talk with a generative adapter.

    Args:
        adapter: Adapter folder of a run (RUN/adapter).
    """
    from lora_lightning.inference.predictor import predictor_for

    predictor = predictor_for(adapter, overrides, verb="chat")
    from lora_lightning.inference.chat import chat as talk

    talk(predictor)


def report(folder: Folder, /) -> None:
    """Compare the runs of a sweep.

    Args:
        folder: The folder of a sweep (multirun/DATE/TIME).
    """
    from lora_lightning.sweeps.report import report as write_report

    write_report(folder)


def merge(overrides: list[str], adapter: Folder, output: Folder) -> None:
    """Write base model and adapter as one model.

    Args:
        adapter: Adapter folder of a run (RUN/adapter).
        output: New folder for the merged model.
    """
    from lora_lightning.inference.overrides import changed_model
    from lora_lightning.utils.quiet import quiet_libraries

    changes = changed_model(adapter, overrides, verb="merge")
    quiet_libraries()
    from lora_lightning.adapters.folder import AdapterFolder
    from lora_lightning.inference.merge import merge as write_merged
    from lora_lightning.inference.merge import quantization_gap
    from lora_lightning.utils.logs import read_json

    gap = write_merged(adapter, output, model=changes)
    print(f"merged model: {output}")
    dtype = read_json(output / "config.json").get("dtype")
    if dtype != "float32":
        print(f"its weights are {dtype}, as those of the base; for others: model.dtype=float32")
    kind, base = changes.get("quantization"), ""
    if kind:
        compensated = AdapterFolder(adapter).compensated_quantization() is not None
        into = "what LoftQ left of it" if compensated else "the base before quantization"
        print(f"trained on a base in {kind}; merged into {into}")
        base = ", both on that base"
    print(f"largest logit gap between adapter and merged model{base}: {gap:.3g}")
    if kind:
        gap = quantization_gap(adapter, output, model=changes)
        print(f"largest logit gap to the adapter on the base in {kind}: {gap:.3g}")


def export(
    overrides: list[str],
    adapter: Folder,
    output: Folder | None = None,
    format: Literal["peft", "canonical", "merged"] = "peft",
    check: list[str] | None = None,
) -> None:
    """Write an adapter for other engines, or check it.

    Args:
        adapter: Adapter folder of a run (RUN/adapter).
        output: New folder. It is required unless check is given.
        format: PEFT's files as they are, one rank and alpha for all layers, or a merged model
            (default: peft).
        check: Engines whose rules the adapter must meet: vllm, lorax.
    """
    engines = check or []
    if format == "merged":
        if engines:
            raise UserError("check: not supported with format=merged, which leaves no adapter.")
        if output is None:
            raise UserError("export requires output=DIR: New folder for the merged model.")
        merge(overrides, adapter, output)
        return
    if overrides:
        raise unknown_argument("export", overrides[0], arguments_of(export))
    if output is None and not engines:
        raise UserError("export requires output=DIR, or check=vllm,lorax, or both.")
    from lora_lightning.adapters.export import write_canonical

    canonical = format == "canonical" and output is not None
    if refused := _refusing_engines(engines, adapter, canonical=canonical):
        what = f"{adapter} with format=canonical" if canonical else str(adapter)
        unwritten = "" if output is None else " Nothing was written."
        raise UserError(f"{what} is not supported by {refused}, see above.{unwritten}")
    if output is None:
        return
    if canonical:
        rank, rounding = write_canonical(adapter, output)
        print(f"{output}: rank {rank} and one alpha; B is rounded by at most {rounding:.1g}")
    else:
        from lora_lightning.adapters.stored_adapter import copy_adapter

        copy_adapter(adapter, output)
        print(f"{output}: the files of PEFT")


def _refusing_engines(engines: list[str], source: Path, *, canonical: bool) -> str:
    """Print each engine's answer on the adapter as written, and return the engines that refuse."""
    from lora_lightning.adapters.export import engine_problems, write_canonical

    refused = []
    with TemporaryDirectory(prefix="lora_lightning-") as work:
        folder = source
        if engines and canonical:
            folder = Path(work) / "adapter"
            write_canonical(source, folder)
        for name in engines:
            problems = engine_problems(folder, name)
            say(f"{name}: {'; '.join(problems) or 'takes it'}")
            refused += [name] * bool(problems)
    return ", ".join(refused)


def import_(
    overrides: list[str],
    source: FileOrFolder,
    output: Folder,
    alpha: float | None = None,
    parts: list[str] | None = None,
) -> None:
    """Convert a checkpoint, or another tool's adapter.

    Args:
        source: Checkpoint of a run, folder of PEFT, or safetensors file of kohya, LitGPT or
            torchtune.
        output: New folder for the adapter.
        alpha: Alpha of a source that does not store it.
        parts: Adapted parts of a source that does not store which of q, k and v are adapted
            (default: q,k,v).
    """
    from lora_lightning.adapters.formats import PARTS
    from lora_lightning.inference.convert import import_adapter

    parts = list(PARTS) if parts is None else parts
    module = import_adapter(source, output, overrides, alpha=alpha, parts=parts)
    print(f"new adapter: {output}")
    if module.adapter is not None:
        say(module.adapter.summary())


def combine(
    adapter: list[Folder],
    output: Folder,
    weights: list[float] | None = None,
    method: str = "cat",
    rank: int | None = None,
    density: float = 0.5,
    whole: str = "same",
    seed: int = 0,
) -> None:
    """Make one adapter of several, or scale one.

    Args:
        adapter: Adapter folders. A single adapter is scaled.
        output: New folder for the adapter.
        weights: Weight of each adapter (default: their mean).
        method: cat, svd, linear, ties, dare_linear or dare_ties (default: cat).
        rank: Rank of the new adapter, for methods that choose one (default: the highest).
        density: Fraction of entries that ties and dare keep (default: 0.5).
        whole: Fully trained modules, such as a classifier: same requires that they are equal, first
            takes those of the first adapter, mean takes the mean (default: same).
        seed: Seed of the entries that dare drops (default: 0).
    """
    from lora_lightning.adapters.combine import combine_adapters

    gap = combine_adapters(
        adapter,
        output,
        weights=weights,
        method=method,
        rank=rank,
        density=density,
        whole=whole,
        seed=seed,
    )
    print(f"new adapter: {output}")
    print(f"off the weighted sum of the updates by {gap:.3g} of its norm")


VERBS: dict[str, Callable[..., None]] = {
    "train": train,
    "plan": plan,
    "check": check,
    "evaluate": evaluate,
    "predict": predict,
    "chat": chat,
    "report": report,
    "merge": merge,
    "export": export,
    "import": import_,
    "combine": combine,
}
"""Functions of the verbs by name."""


def _data_files(config: Any) -> list[Path]:
    """Return the files and folders that an evaluation reads data from."""
    from lora_lightning.utils.output_folders import expanded

    paths: list[Path] = []
    for key in ("test", "train", "val", "path"):
        value = getattr(config.data, key)
        items = [value] if isinstance(value, str) else value or ()
        paths += [expanded(str(item), "data") for item in items]
    return paths


def _check_output(output: Path | None, *suffixes: str, by: str, sources: list[Path]) -> None:
    """Check that an output file can be written, and replaces no other file, before any work."""
    if output is None:
        return
    if not output.resolve().parent.is_dir():
        raise UserError(f"output={output}: its folder is not found. Make it first.")
    if output.is_dir():
        raise UserError(f"output={output}: must be a file, not a folder.")
    if output.suffix not in suffixes:
        raise UserError(f"output={output}: must end in {suffixes[0]}, because {by} writes that.")
    from lora_lightning.inference.output_files import check_output_file

    check_output_file(output, by=by, sources=sources)
