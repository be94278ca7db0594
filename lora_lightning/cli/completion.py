"""Tab completion: Hydra's, with the verb and its arguments added."""

from __future__ import annotations

import os

from .commands import VERBS
from .hydra_run import environment, run_hydra
from .parser import arguments_of


def complete(arguments: list[str]) -> None:
    """Install, remove or answer the completion of a shell, as the arguments say."""
    if not any(argument.startswith("query") for argument in arguments):
        run_hydra(arguments)
        return
    line = os.environ.get("COMP_LINE", "")
    words = [*line.split(), ""] if line.endswith(" ") else line.split()
    verb, last = (words[1], words[-1]) if len(words) > 1 else ("", "")
    if len(words) <= 2:
        print(" ".join(name for name in VERBS if name.startswith(last)))
        return
    own = arguments_of(VERBS[verb]) if verb in VERBS else {}
    if keys := [f"{key}=" for key in own if key.startswith(last)]:
        print(" ".join(keys))
    with environment("COMP_LINE", line.replace(f" {verb}", "", 1)):
        run_hydra(arguments)
