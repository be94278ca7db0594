"""Runs commands in forks of itself, each with one operation on files that fails.

Asked by lines of JSON; the answer is the exit status. `faulty.c` is loaded before libc.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback

from lora_lightning.cli.main import main

KINDS = ("none", "full", "broken", "killed", "short")
PATIENCE = 120
"""Seconds after which a command that does not end is ended, by SIGALRM."""


def command(arguments: list[str], errors: str) -> int:
    """Exit status of a command, with what it prints but for its errors thrown away."""
    for stream, path in ((0, os.devnull), (1, os.devnull), (2, errors)):
        flags = os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(path, flags, 0o644), stream)
    sys.argv = ["lora-lightning", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def answer(asked: dict) -> int:
    """Does in a fork what is asked; its exit status, or minus the number of its signal."""
    number = os.fork()
    if number == 0:
        signal.alarm(PATIENCE)
        os.chdir(asked["root"])
        texts = [asked[key].encode() for key in ("root", "log", "graves", "name")]
        ctypes.CDLL(None).fault_arm(*texts, asked["nth"], KINDS.index(asked["kind"]))
        os._exit(command(asked["arguments"], asked["errors"]))
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


if __name__ == "__main__":
    asks, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in asks:
        asked = json.loads(line)
        if asked["kind"] == "warm":  # in this process, so that the forks have all modules
            os.chdir(asked["root"])
            status = command(asked["arguments"], asked["errors"])
        else:
            status = answer(asked)
        print(status, file=answers, flush=True)
