"""The command line: `lora-lightning VERB [overrides]`."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lora_lightning.distributed import environment as cluster
from lora_lightning.errors import (
    FULL_ERROR,
    UserError,
    did_you_mean,
    lack_of_memory,
)
from lora_lightning.sweeps.queue import EXIT_USER_ERROR, end_with_parent
from lora_lightning.utils.terminal import (
    Terminal,
    is_text,
    printable,
    say,
)

from .usage import HELP

VERBS = (
    *("train", "plan", "check", "evaluate", "predict", "chat"),
    *("merge", "combine", "export", "import", "report"),
)
PLAIN_KEYS = {
    "plan": ("device_gib",),
    "evaluate": ("adapter", "output"),
    "predict": ("adapter", "text", "input", "output"),
    "chat": ("adapter",),
    "merge": ("adapter", "output"),
    "export": ("adapter", "output", "format", "check"),
    "import": ("source", "output", "alpha", "parts"),
    "combine": ("adapter", "output", "weights", "method", "rank", "density", "whole", "seed"),
}
NO_SETTINGS = ("export", "combine")
FORMATS = ("peft", "canonical", "merged")
EXIT_BY_SIGNAL = 128


def main() -> None:
    """Run the command line.

    The exit status is 0, or 2 for a mistake of the user. It is 130, 143, 138 or 129 if Ctrl-C,
    SIGTERM, SIGUSR1 or SIGHUP has stopped a run. Otherwise it is 1, for example if one of the
    processes of a run was killed.
    """
    arguments = sys.argv[1:]
    _open_absent_streams()
    end_with_parent()
    _set_allocator()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if arguments[0] == "--version":
        from lora_lightning import __version__

        print(__version__)
        return
    if arguments[0] in ("-sc", "--shell-completion"):
        _complete(arguments)
        return
    verb, rest = arguments[0], arguments[1:]
    _guarded(lambda: _dispatch(verb, rest))


def _open_absent_streams() -> None:
    """Open the null device for standard streams that were closed, as cron and `<&-` do.

    Python sets closed streams to None. The next files opened would take their numbers and receive
    their output. Terminal streams are wrapped, so that the terminal may close during a run.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif name != "stdin" and getattr(sys, name).isatty():
            setattr(sys, name, Terminal(getattr(sys, name)))


def _set_allocator() -> None:
    """Let torch grow its blocks of GPU memory, because batches of many lengths would leave holes.

    torch reads the variable at import. A value set by the user stays.
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"


def _dispatch(verb: str, arguments: list[str]) -> None:
    for argument in arguments:
        if not is_text(argument):
            raise UserError(f"{argument} is no text in UTF-8: rename the file or folder.")
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS)
        raise UserError(f"there is no verb {verb!r}.{hint} Verbs: {', '.join(VERBS)}.")
    if verb != "train" and set(arguments) & {"-h", "--help"}:
        print(HELP, end="")
        return
    if verb == "train":
        from .train import start

        start(arguments)
    elif verb == "report":
        _report(arguments)
    else:
        plain, overrides = _split(arguments, PLAIN_KEYS.get(verb, ()))
        if verb not in NO_SETTINGS:
            from lora_lightning.config.presets import with_presets

            overrides = with_presets(overrides)
        actions = {
            "check": _check,
            "plan": _plan,
            "evaluate": _evaluate,
            "predict": _predict,
            "chat": _chat,
            "merge": _merge,
            "combine": _combine,
            "export": _export,
            "import": _import,
        }
        actions[verb](plain, overrides)


def _guarded(action: Callable[[], Any]) -> Any:
    """Run an action; report a mistake of the user as one message, with exit status 2.

    Tracebacks of other errors are shown escaped, because the message may quote somebody else's
    file.
    """
    try:
        return action()
    except UserError as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        cluster.let_rank_zero_tell()
        say(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns Ctrl-C into its own SystemExit.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        said = str(error) if isinstance(error, KeyboardInterrupt) else ""
        if cluster.tells():
            say(said or "interrupted", file=sys.stderr)
        signum = getattr(error, "signum", signal.SIGINT)
        cluster.requeue_if_warned(signum)
        sys.exit(EXIT_BY_SIGNAL + signum)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BaseException as error:  # a panic of a Rust library is no Exception
        from lora_lightning.utils.atomic_write import fault_of_disk

        if os.environ.get(FULL_ERROR) == "1":
            raise
        if (lack := lack_of_memory(error)) is not None:
            say(
                f"error: out of memory: {lack.rstrip('.')}. Close other programs, give this one a "
                "higher limit (ulimit -v, a container's), or fewer and shorter rows.",
                file=sys.stderr,
            )
            sys.exit(EXIT_USER_ERROR)
        if (fault := fault_of_disk(error)) is not None:
            say(f"error: {fault}. Nothing that was whole before is lost.", file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)
        say(traceback.format_exc(), file=sys.stderr, end="")
        sys.exit(1)


# The other verbs -----------------------------------------------------------------------------


def _check(_: dict[str, str], arguments: list[str]) -> None:
    from lora_lightning.config.compose import compose_config

    if any(argument.startswith("resume=") for argument in arguments):
        raise UserError(
            "check looks at a new run and knows no resume. A stopped run goes on with: "
            "lora-lightning train resume=RUN_DIR"
        )
    config = compose_config(arguments)
    config.output_dir = os.path.abspath(config.output_dir)
    from lora_lightning.training.preflight.check import check

    say(check(config))


def _plan(plain: dict[str, str], overrides: list[str]) -> None:
    size = _number(plain["device_gib"], float, "device_gib") if "device_gib" in plain else None
    if size is not None and not size > 0:
        raise UserError(f"device_gib must be a number of GiB above 0, got {plain['device_gib']}.")
    from lora_lightning.config.compose import compose_config

    config = compose_config(overrides)
    from lora_lightning.training.preflight.plan import plan

    say(plan(config, size))


def _report(arguments: list[str]) -> None:
    if len(arguments) != 1 or "=" in arguments[0]:
        raise UserError(
            "report takes the folder of a sweep and nothing else: lora-lightning report "
            "multirun/<date>/<time>."
        )
    from lora_lightning.sweeps.report import report

    report(_expanded(arguments[0], "report"))


def _evaluate(plain: dict[str, str], overrides: list[str]) -> None:
    folder = _need(plain, "adapter", "evaluate")
    _check_output(plain, (".json",), by="evaluate")
    from lora_lightning.inference.overrides import changed_config
    from lora_lightning.utils.atomic_write import write_json
    from lora_lightning.utils.locks import locked_output

    config = changed_config(folder, overrides, verb="evaluate")
    from lora_lightning.inference.evaluate import evaluate
    from lora_lightning.inference.output_files import check_output_file

    writes = "output" in plain and cluster.tells()  # only the first of several processes
    output = _expanded(plain["output"], "output") if writes else None
    if output is not None:
        check_output_file(output, by="evaluate", sources=_data_of(config))
    with locked_output(output):
        metrics = evaluate(folder, config)
        print(json.dumps(metrics, indent=2))
        if output is not None:
            write_json(output, metrics)


def _predict(plain: dict[str, str], overrides: list[str]) -> None:
    folder = _need(plain, "adapter", "predict")
    if ("text" in plain) == ("input" in plain):
        given = " ".join(overrides) or ("both" if "text" in plain else "neither")
        raise UserError(f'predict needs one of text="..." and input=FILE, but got {given}.')
    _check_output(plain, (".jsonl", ".ndjson"), by="predict")
    from lora_lightning.inference.predictor import predictor_for

    verb = "predict text=" if "text" in plain else "predict"
    predictor = predictor_for(folder, overrides, verb=verb)
    from lora_lightning.inference.predict_file import predict_file
    from lora_lightning.inference.predictor import predict_text

    if "text" in plain and predictor.module.task.generative:
        from lora_lightning.inference.chat import answer

        answer(predictor, plain["text"])
        return
    if "text" in plain:
        found = predict_text(predictor, plain["text"])
        print(printable(json.dumps(found, ensure_ascii=False, indent=2), json=True))
        return
    output = _expanded(plain["output"], "output") if "output" in plain else None
    count = predict_file(predictor, _expanded(plain["input"], "input"), output)
    if output is not None:
        print(f"{count} rows -> {output}")


def _chat(plain: dict[str, str], overrides: list[str]) -> None:
    folder = _need(plain, "adapter", "chat")
    from lora_lightning.inference.predictor import predictor_for

    predictor = predictor_for(folder, overrides, verb="chat")
    from lora_lightning.inference.chat import chat

    chat(predictor)


def _merge(plain: dict[str, str], overrides: list[str]) -> None:
    folder = _need(plain, "adapter", "merge")
    if "output" not in plain:
        raise UserError("merge needs output=DIR: where the merged model goes.")
    from lora_lightning.inference.overrides import changed_model
    from lora_lightning.utils.quiet import quiet_libraries

    changes = changed_model(folder, overrides, verb="merge")
    quiet_libraries()
    from lora_lightning.adapters.folder import AdapterFolder
    from lora_lightning.inference.merge import merge, quantization_gap
    from lora_lightning.utils.logs import read_json

    output = _expanded(plain["output"], "output")
    gap = merge(folder, output, model=changes)
    print(f"merged model: {output}")
    dtype = read_json(output / "config.json").get("dtype")
    if dtype != "float32":
        print(f"its weights are {dtype}, as those of the base; for others: model.dtype=float32")
    kind, beside = changes.get("quantization"), ""
    if kind:
        of_quantized = AdapterFolder(folder).compensated_quantization() is not None
        into = "what is left of it" if of_quantized else "the base as it was before"
        print(f"trained on a base in {kind}; merged into {into}")
        beside = ", both on that base"
    print(f"largest logit gap between adapter and merged model{beside}: {gap:.3g}")
    if kind:
        gap = quantization_gap(folder, output, model=changes)
        print(f"largest logit gap to the adapter on the base in {kind}: {gap:.3g}")


def _export(plain: dict[str, str], others: list[str]) -> None:
    source = _need(plain, "adapter", "export")
    form, engines = plain.get("format", "peft"), _listed(plain.get("check", ""))
    if form not in FORMATS:
        raise UserError(
            f"format must be one of {', '.join(FORMATS)}, got {form!r}."
            f"{did_you_mean(form, FORMATS)}"
        )
    if form == "merged":
        if engines:
            raise UserError("check is about adapters, and format=merged leaves none: drop one.")
        _merge({key: plain[key] for key in ("adapter", "output") if key in plain}, others)
        return
    _none_but_known("export", others)
    if "output" not in plain and not engines:
        raise UserError("export needs output=DIR, or check=vllm,lorax, or both.")
    from lora_lightning.adapters.export import write_canonical

    canonical = form == "canonical" and "output" in plain
    if refused := _refused_by(engines, source, canonical=canonical):
        what = f"{source} with format=canonical" if canonical else str(source)
        nothing = " Nothing was written." if "output" in plain else ""
        raise UserError(f"{what} is not for {refused}, for the reasons above.{nothing}")
    if "output" not in plain:
        return
    folder = _expanded(plain["output"], "output")
    if canonical:
        rank, rounding = write_canonical(source, folder)
        print(f"{folder}: rank {rank} and one alpha; B is rounded by at most {rounding:.1g}")
    else:
        from lora_lightning.adapters.stored_adapter import copy_adapter

        copy_adapter(source, folder)
        print(f"{folder}: the files of PEFT")


def _refused_by(engines: list[str], source: Path, *, canonical: bool) -> str:
    """Print each engine's answer on the adapter as written, and return the engines that refuse."""
    from lora_lightning.adapters.export import engine_problems, write_canonical

    refused = []
    with TemporaryDirectory(prefix="lora_lightning-") as work:
        folder = source
        if engines and canonical:
            folder = Path(work) / "adapter"
            write_canonical(source, folder)
        for name in engines:
            found = engine_problems(folder, name)
            say(f"{name}: {'; '.join(found) or 'takes it'}")
            refused += [name] * bool(found)
    return ", ".join(refused)


def _import(plain: dict[str, str], overrides: list[str]) -> None:
    for key, what in (("source", "FILE or DIR: what to import"), ("output", "DIR: where to")):
        if not plain.get(key):
            raise UserError(f"import needs {key}={what}.")
    alpha = _number(plain["alpha"], float, "alpha") if "alpha" in plain else None
    parts = _listed(plain.get("parts", "q,k,v"))
    from lora_lightning.inference.convert import import_adapter

    source, output = (_expanded(plain[key], key) for key in ("source", "output"))
    module = import_adapter(source, output, overrides, alpha=alpha, parts=parts)
    print(f"new adapter: {output}")
    if module.adapter is not None:
        say(module.adapter.summary())


def _none_but_known(verb: str, others: list[str]) -> None:
    known = PLAIN_KEYS[verb]
    for other in others:
        key = other.partition("=")[0]
        raise UserError(
            f"{verb} knows no {key}.{did_you_mean(key, known)} It takes {', '.join(known)}."
        )


def _combine(plain: dict[str, str], others: list[str]) -> None:
    _none_but_known("combine", others)
    _need(plain, "adapter", "combine")
    if "output" not in plain:
        raise UserError("combine needs output=DIR: where the new adapter goes.")
    numbers: dict[str, Any] = {}
    for key, kind in (("rank", int), ("density", float), ("seed", int)):
        if key in plain:
            numbers[key] = _number(plain[key], kind, key)
    weights = None
    if "weights" in plain:
        weights = [_number(part, float, "weights") for part in _listed(plain["weights"])]
    from lora_lightning.adapters.combine import combine_adapters

    folders = [_expanded(folder, "adapter") for folder in _listed(plain["adapter"])]
    output = _expanded(plain["output"], "output")
    method = plain.get("method", "cat")
    gap = combine_adapters(
        folders,
        output,
        weights=weights,
        method=method,
        whole=plain.get("whole", "same"),
        **numbers,
    )
    print(f"new adapter: {output}")
    print(f"off the weighted sum of the updates by {gap:.3g} of its norm")


def _listed(value: str) -> list[str]:
    return [part.strip() for part in value.strip("[]").split(",") if part.strip()]


def _number(value: str, kind: type, key: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{key}: {value!r} is not {what}.") from None


def _need(plain: dict[str, str], key: str, verb: str) -> Path:
    if not plain.get(key):
        raise UserError(f"{verb} needs {key}=DIR: the adapter folder of a run (<run>/adapter).")
    return _expanded(plain[key], key)


def _expanded(path: str, setting: str) -> Path:
    from lora_lightning.utils.output_folders import expanded

    return expanded(path, setting)


def _data_of(config: Any) -> list[Path]:
    """Return the files and folders that an evaluation reads data from."""
    data = config.data
    given = [getattr(data, key) for key in ("test", "train", "val", "path")]
    named = [
        item for value in given for item in ([value] if isinstance(value, str) else value or ())
    ]
    return [_expanded(str(item), "data") for item in named]


def _check_output(plain: dict[str, str], suffixes: tuple[str, ...], *, by: str) -> None:
    """Raise UserError for an output path that could not or must not be written, before any work."""
    if "output" not in plain:
        return
    output = _expanded(plain["output"], "output")
    if not output.resolve().parent.is_dir():
        raise UserError(f"output={output}: its folder does not exist. Make it first.")
    if output.is_dir():
        raise UserError(f"output={output} is a folder: give the name of a file.")
    if output.suffix not in suffixes:
        raise UserError(
            f"output={output}: what is written is {suffixes[0][1:].upper()}, so give a name that "
            f"ends in {suffixes[0]}."
        )
    from lora_lightning.inference.output_files import check_output_file

    sources = [_expanded(plain[key], key) for key in ("input", "adapter") if key in plain]
    check_output_file(output, by=by, sources=sources)


def _split(arguments: list[str], keys: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Split off the arguments that are plain text (texts and paths), not Hydra's grammar."""
    plain: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in keys:
            plain[key] = value
        else:
            overrides.append(argument)
    return plain, overrides


def _complete(arguments: list[str]) -> None:
    """Run Hydra's tab completion, with the verb removed from the line to complete."""
    from .train import environment, run_hydra

    if not any(argument.startswith("query") for argument in arguments):
        run_hydra(arguments)
        return
    line = os.environ.get("COMP_LINE", "")
    words = [*line.split(), ""] if line.endswith(" ") else line.split()
    verb, last = (words[1], words[-1]) if len(words) > 1 else ("", "")
    if len(words) <= 2:
        print(" ".join(known for known in VERBS if known.startswith(last)))
        return
    keys = [f"{key}=" for key in PLAIN_KEYS.get(verb, ()) if key.startswith(last)]
    if keys:
        print(" ".join(keys))
    with environment("COMP_LINE", line.replace(f" {verb}", "", 1)):
        run_hydra(arguments)
