"""Command that trains runs together.

Usage: python -m lora_lightning.sweeps.packed [--memory GIB] FOLDER ...
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from pathlib import Path

from lora_lightning.lora import UserError
from lora_lightning.sweeps.job_process import end_with_parent
from lora_lightning.utils.run_folder import RunFolder
from lora_lightning.utils.terminal import printable

from .capacity import slots_at_a_time
from .pack import Pack


def main(folders: list[Path], gib: float | None = None) -> int:
    """Train the runs of these folders together and return the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    errors: list[BaseException] = []
    try:
        try:
            count = slots_at_a_time(folders, gib)
        except UserError:
            count = len(folders)  # each run reports the error itself
        for start in range(0, len(folders), count):
            pack = Pack(folders[start : start + count])
            pack.run()
            errors += [slot.error for slot in pack.slots if slot.error is not None]
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # an error of no single run: report it in each log
        mistake = isinstance(error, UserError)
        text = printable(f"error: {error}\n" if mistake else traceback.format_exc())
        for folder in folders:
            with RunFolder(folder).log.open("a", encoding="utf-8") as log:
                log.write(text)
        return 2 if mistake else 1
    if not errors:
        return 0
    return 2 if all(isinstance(error, UserError) for error in errors) else 1


if __name__ == "__main__":
    end_with_parent()
    parser = argparse.ArgumentParser(description="Train the runs in some folders together.")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--memory", type=float, help="limit of memory in GiB")
    arguments = parser.parse_args()
    sys.exit(main(arguments.folders, arguments.memory))
