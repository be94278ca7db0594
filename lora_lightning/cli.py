"""The command line: `lora-lightning VERB [overrides]`."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .launch.queue import end_with_parent
from .usage import HELP

VERBS = ("train", "check", "evaluate", "predict", "chat", "merge", "report")
PLAIN_KEYS = {
    "evaluate": ("adapter", "output"),
    "predict": ("adapter", "text", "input", "output"),
    "chat": ("adapter",),
    "merge": ("adapter", "output"),
}
MULTIRUN_FLAGS = ("-m", "--multirun")
HYDRA_FLAGS = (
    *MULTIRUN_FLAGS,
    *("-h", "--help", "--hydra-help", "-c", "--cfg", "--resolve", "-p", "--package"),
    *("-cd", "--config-dir", "-cn", "--config-name", "-i", "--info"),
)
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
FULL_ERROR = "HYDRA_FULL_ERROR"


def main() -> None:
    """Entry point. Exit status: 0, 2 for a mistake of the user, 130 if interrupted, else 1."""
    arguments = sys.argv[1:]
    end_with_parent()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if arguments[0] == "--version":
        from . import __version__

        print(__version__)
        return
    if arguments[0] in ("-sc", "--shell-completion"):
        _complete(arguments)
        return
    verb, rest = arguments[0], arguments[1:]
    _guarded(lambda: _dispatch(verb, rest))


def _dispatch(verb: str, arguments: list[str]) -> None:
    from .lora.errors import UserError, did_you_mean

    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS)
        raise UserError(f"there is no verb {verb!r}.{hint} Verbs: {', '.join(VERBS)}.")
    if verb != "train" and set(arguments) & {"-h", "--help"}:
        print(HELP, end="")
        return
    if verb == "train":
        _train(arguments)
    elif verb == "check":
        _check(arguments)
    elif verb == "report":
        _report(arguments)
    else:
        plain, overrides = _split(arguments, PLAIN_KEYS[verb])
        actions = {"evaluate": _evaluate, "predict": _predict, "chat": _chat, "merge": _merge}
        actions[verb](plain, overrides)


def _guarded(action: Callable[[], Any]) -> Any:
    """Runs an action; a mistake of the user becomes one message and exit status 2."""
    from .lora.errors import UserError

    try:
        return action()
    except UserError as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns Ctrl-C into an exit of its own.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        said = str(error) if isinstance(error, KeyboardInterrupt) else ""
        print(said or "interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# train ---------------------------------------------------------------------------------------


def _train(arguments: list[str]) -> None:
    from .config import compose_config, settings_of, sweep_choices
    from .lora.errors import UserError

    resume = [argument for argument in arguments if argument.startswith("resume=")]
    if resume:
        _resume(resume[0].removeprefix("resume="), [a for a in arguments if a != resume[0]])
        return
    flags = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    overrides = [re.sub(r"^(\+*)launcher\.", r"\1hydra.launcher.", item) for item in overrides]
    for flag in flags:
        _known_flag(flag)
    sweeps = bool(flags) and not set(flags) - set(MULTIRUN_FLAGS)
    if set(flags) & set(MULTIRUN_FLAGS) and not sweeps:
        others = " ".join(flag for flag in flags if flag not in MULTIRUN_FLAGS)
        raise UserError(f"-m does not go together with {others}: leave out one of them.")
    asked = [item for item in overrides if re.match(r"\+?sweep=(?!null$)", item)]
    if asked and not flags:
        print(
            f"{asked[0]} without -m: this is one run, not a sweep. For the sweep add -m.",
            file=sys.stderr,
        )
    if sweeps and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a sweep starts the processes of its jobs itself: run it once, without torchrun, and "
            "give each job its devices with trainer.devices."
        )
    if not sweeps and (flags or "LOCAL_RANK" in os.environ):
        _run_hydra(arguments)
        return
    if any(override.startswith("hydra.run.dir=") for override in overrides):
        raise UserError("the run's folder is set by output_dir=DIR: leave out hydra.run.dir.")
    # Everything is composed before Hydra makes a folder, so that mistakes leave none behind.
    for choice in sweep_choices(overrides) if flags else [overrides]:
        config = compose_config(choice)
        settings_of(config)
    if flags:
        from .launch.folder import sweep_folder

        overrides += sweep_folder(overrides)
        _run_hydra(["-m", *overrides])  # Hydra's parser wants flags before overrides
        return
    run_dir = Path(config.output_dir)
    from .storage import undone_on_mistake
    from .train import refuse_used_folder, writable

    refuse_used_folder(run_dir)
    with undone_on_mistake(run_dir):
        writable(run_dir)
        _run_hydra([*arguments, f"output_dir={_quoted(run_dir)}"])


def _known_flag(flag: str) -> None:
    from .lora.errors import UserError, did_you_mean

    if flag.partition("=")[0] not in HYDRA_FLAGS:
        raise UserError(
            f"there is no flag {flag}.{did_you_mean(flag, HYDRA_FLAGS)} Settings have no dashes: "
            "KEY=VALUE. `lora-lightning --help` shows both."
        )


def _quoted(value: object) -> str:
    """A value in quotes of Hydra's grammar."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _run_hydra(arguments: list[str]) -> None:
    """Hands over to Hydra, which makes the run's folder and calls back with the config."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from .config import CONFIG_MODULE, CONFIG_NAME, explain, register_schemas
    from .launch import register
    from .launch.process import SweepError
    from .lora.errors import UserError

    register_schemas()
    register()
    logging.getLogger("alembic").setLevel(logging.WARNING)  # Optuna's, which lists its plugins
    whole = list(sys.argv)
    composed = False
    mistakes: list[UserError] = []

    @hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)
    def task(config: Any) -> float | None:
        nonlocal composed
        composed = True
        sys.argv = whole  # Lightning starts its other ranks with this command line
        from .train import train

        config.output_dir = os.path.abspath(HydraConfig.get().runtime.output_dir)
        try:
            with _environment(FULL_ERROR, full_error):
                result = train(config)
        except UserError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # another launcher names the job, and goes on with the others first
            mistakes.append(error)
            return None
        objective = result["objective"]
        return None if objective is None else float(objective)

    sys.argv = [whole[0], *arguments]
    full_error = os.environ.get(FULL_ERROR)
    try:
        with _environment(FULL_ERROR, "1"):  # Hydra then raises instead of printing and exiting
            task()
    except (HydraException, OmegaConfBaseException) as error:
        if composed:
            raise
        raise UserError(explain(error)) from None
    except SweepError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        sys.argv = whole
    if mistakes:
        raise mistakes[0]


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Sets an environment variable for the time of the block; None unsets it."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _resume(folder: str, others: list[str]) -> None:
    from .config import read_config
    from .lora.errors import UserError

    run_dir = Path(folder).expanduser().resolve()
    if others:
        raise UserError(
            f"resume={folder} goes on with the run's own config and takes no other settings: "
            f"leave out {' '.join(others)}."
        )
    if not run_dir.is_dir():
        raise UserError(
            f"resume={folder}: there is no such folder. Give the output_dir of a run that stopped."
        )
    saved = run_dir / ".hydra" / "config.yaml"
    if not saved.is_file():
        raise UserError(
            f"resume={folder} is not the folder of a run: it holds no .hydra/config.yaml. Give the "
            "output_dir of a run that stopped."
        )
    config = read_config(saved)
    from .train import train

    result_file = run_dir / "result.json"
    if result_file.is_file() and '"status": "completed"' in result_file.read_text():
        print(f"{run_dir} is complete: nothing to resume.")
        return
    config.output_dir = str(run_dir)
    train(config, resume=True)


# The other verbs -----------------------------------------------------------------------------


def _check(arguments: list[str]) -> None:
    from .config import compose_config
    from .lora.errors import UserError

    if any(argument.startswith("resume=") for argument in arguments):
        raise UserError(
            "check looks at a new run and knows no resume. A stopped run goes on with: "
            "lora-lightning train resume=RUN_DIR"
        )
    config = compose_config(arguments)
    config.output_dir = os.path.abspath(config.output_dir)
    from .check import check

    print(check(config))


def _report(arguments: list[str]) -> None:
    from .lora.errors import UserError

    if len(arguments) != 1 or "=" in arguments[0]:
        raise UserError(
            "report takes the folder of a sweep and nothing else: lora-lightning report "
            "multirun/<date>/<time>."
        )
    from .report import report

    report(Path(arguments[0]).expanduser())


def _evaluate(plain: dict[str, str], overrides: list[str]) -> None:
    from .config import over_saved

    folder = _need(plain, "adapter", "evaluate")
    _check_output(plain, (".json",))
    from .storage import read_sidecar, write_json

    config = over_saved(read_sidecar(folder)["settings"], overrides)
    from .evaluate import evaluate

    metrics = evaluate(folder, config)
    print(json.dumps(metrics, indent=2))
    if "output" in plain:
        write_json(Path(plain["output"]), metrics)


def _predict(plain: dict[str, str], overrides: list[str]) -> None:
    from .lora.errors import UserError

    folder = _need(plain, "adapter", "predict")
    if ("text" in plain) == ("input" in plain):
        given = " ".join(overrides) or ("both" if "text" in plain else "neither")
        raise UserError(f'predict needs one of text="..." and input=FILE, but got {given}.')
    _check_output(plain, (".jsonl", ".ndjson"))
    from .evaluate import predictor_for

    predictor = predictor_for(folder, overrides)
    from .inference import predict_file, predict_text

    if "text" in plain and predictor.module.task.generative:
        from .chat import answer

        answer(predictor, plain["text"])
        return
    if "text" in plain:
        print(json.dumps(predict_text(predictor, plain["text"]), ensure_ascii=False, indent=2))
        return
    output = Path(plain["output"]) if "output" in plain else None
    count = predict_file(predictor, Path(plain["input"]), output)
    if output is not None:
        print(f"{count} rows -> {output}")


def _chat(plain: dict[str, str], overrides: list[str]) -> None:
    folder = _need(plain, "adapter", "chat")
    from .evaluate import predictor_for

    predictor = predictor_for(folder, overrides)
    from .chat import chat

    chat(predictor)


def _merge(plain: dict[str, str], overrides: list[str]) -> None:
    from .lora.errors import UserError

    folder = _need(plain, "adapter", "merge")
    if "output" not in plain:
        raise UserError("merge needs output=DIR: where the merged model goes.")
    from .evaluate import model_changes
    from .quiet import quiet_libraries

    changes = model_changes(folder, overrides)
    quiet_libraries()
    from .inference import merge

    gap = merge(folder, plain["output"], model=changes)
    print(f"merged model: {plain['output']}")
    print(f"largest logit gap between adapter and merged model: {gap:.3g}")


def _need(plain: dict[str, str], key: str, verb: str) -> Path:
    from .lora.errors import UserError

    if not plain.get(key):
        raise UserError(f"{verb} needs {key}=DIR: the adapter folder of a run (<run>/adapter).")
    return Path(plain[key]).expanduser()


def _check_output(plain: dict[str, str], suffixes: tuple[str, ...]) -> None:
    """Refuses a place that could not be written when the work is done."""
    from .lora.errors import UserError

    if "output" not in plain:
        return
    output = Path(plain["output"]).expanduser()
    if not output.resolve().parent.is_dir():
        raise UserError(f"output={output}: its folder does not exist. Make it first.")
    if output.is_dir():
        raise UserError(f"output={output} is a folder: give the name of a file.")
    if output.suffix not in suffixes:
        raise UserError(
            f"output={output}: what is written is {suffixes[0][1:].upper()}, so give a name that "
            f"ends in {suffixes[0]}."
        )


def _split(arguments: list[str], keys: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Takes out the arguments that are plain text, not Hydra's grammar: texts and paths."""
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
    """Hydra's tab completion, with the verb taken out of the line that it completes."""
    if not any(argument.startswith("query") for argument in arguments):
        _run_hydra(arguments)
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
    with _environment("COMP_LINE", line.replace(f" {verb}", "", 1)):
        _run_hydra(arguments)
