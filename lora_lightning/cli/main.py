"""The command line: `lora-lightning VERB [overrides]`."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from lora_lightning.distributed import environment as cluster
from lora_lightning.errors import FULL_ERROR, UserError, did_you_mean, lack_of_memory
from lora_lightning.sweeps.job_process import EXIT_USER_ERROR, end_with_parent
from lora_lightning.utils.terminal import Terminal, is_text, say

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
        from .usage import overview

        print(overview(), end="")
        return
    if arguments[0] == "--version":
        from lora_lightning import __version__

        print(__version__)
        return
    if arguments[0] in ("-sc", "--shell-completion"):
        from .completion import complete

        complete(arguments)
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


def _dispatch(verb: str, words: list[str]) -> None:
    """Call the function of a verb with the values that were typed."""
    from .commands import VERBS
    from .parser import OVERRIDES, parse

    for word in words:
        if not is_text(word):
            raise UserError(f"{word}: must be text in UTF-8. Rename the file or folder.")
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS)
        raise UserError(f"{verb}: unknown verb.{hint} Verbs: {', '.join(VERBS)}.")
    if verb != "train" and {"-h", "--help"} & set(words):
        from .usage import usage

        print(usage(verb), end="")
        return
    values = parse(verb, VERBS[verb], words)
    if OVERRIDES in values:
        from lora_lightning.config.presets import with_presets

        values[OVERRIDES] = with_presets(values[OVERRIDES])
        for word in values[OVERRIDES] if verb != "train" else ():
            if re.match(r"\+*(launcher\.|resume=)", word):
                raise UserError(
                    f"{word}: not supported by {verb}. Use lora-lightning train {word}."
                )
    parameters = inspect.signature(VERBS[verb]).parameters.values()
    positional = [values.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY]
    VERBS[verb](*positional, **values)


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
                f"error: out of memory: {lack.rstrip('.')}. Close other programs, raise the limit "
                "(ulimit -v, or the container's), or use fewer and shorter rows.",
                file=sys.stderr,
            )
            sys.exit(EXIT_USER_ERROR)
        if (fault := fault_of_disk(error)) is not None:
            say(f"error: {fault}. Nothing that was complete before is lost.", file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)
        say(traceback.format_exc(), file=sys.stderr, end="")
        sys.exit(1)
