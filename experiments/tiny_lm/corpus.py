r"""The corpus of the tiny language model: docstrings of Python packages, from their wheels.

    pip download --no-deps --only-binary=:all: -d wheels -r packages.txt
    python corpus.py wheels corpus

Writes corpus/train.jsonl and corpus/heldout.jsonl (`text`, `package`), each in a random order.
Whole packages are held back. A docstring is left out if it

* is shorter than 40 characters, or mostly not English text,
* stands in another place already, but for its white space,
* shares 13 words in a row with a docstring of the standard library,
* would be held back but shares 13 words in a row with the training part.

A package gives at most 1.5 MB, so that large ones do not set the tone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.data.docstrings import docstrings

SPAN = 13
PACKAGE_BYTES = 1_500_000
HELD_OUT = 40  # one package in so many
SHORTEST, LONGEST = 40, 20_000
VENDORED = re.compile(
    r"(^|/)(_?vendor(ed)?|_vendored_packages|third_?party|extern(al|als)?|backports|lib2to3|"
    r"site-packages|python_?modules|stdlib|typeshed|packages/six)(/|$)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path)
    parser.add_argument("corpus", type=Path)
    arguments = parser.parse_args()
    arguments.corpus.mkdir(parents=True, exist_ok=True)

    library = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            for text in docstrings(path.read_bytes()):
                library |= spans(text)
    print(f"{len(library):,} spans of the standard library")

    seen: set[bytes] = set()
    parts: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}
    for wheel in sorted(arguments.wheels.glob("*.whl"), key=lambda path: path.name.lower()):
        package = wheel.name.split("-")[0].lower()
        kept, size = [], 0
        for text in sorted(package_docstrings(wheel), key=digest):
            key = digest(text)
            if key in seen or not readable(text) or not library.isdisjoint(spans(text)):
                continue
            seen.add(key)
            size += len(text)
            if size > PACKAGE_BYTES:
                break
            kept.append({"text": text, "package": package})
        held = int.from_bytes(digest(package)[:4], "big") % HELD_OUT == 0
        parts["heldout" if held else "train"] += kept
        print(f"{package:<32} {len(kept):>6,} docstrings{'  (held back)' if held else ''}")

    trained = {span for row in parts["train"] for span in spans(row["text"])}
    before = len(parts["heldout"])
    parts["heldout"] = [row for row in parts["heldout"] if trained.isdisjoint(spans(row["text"]))]
    print(f"held back: {before - len(parts['heldout'])} left out that training text overlaps with")
    for name, rows in parts.items():
        rows.sort(key=lambda row: digest(row["text"]))
        with (arguments.corpus / f"{name}.jsonl").open("w") as handle:
            handle.writelines(json.dumps(row) + "\n" for row in rows)
        size = sum(len(row["text"]) for row in rows)
        packages = len({row["package"] for row in rows})
        print(f"{name}: {len(rows):,} docstrings, {size / 1e6:.1f} MB, {packages} packages")


def package_docstrings(wheel: Path) -> Iterator[str]:
    """All docstrings of a wheel, code that it carries from elsewhere left out."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and not VENDORED.search(name):
                yield from docstrings(archive.read(name))


def readable(text: str) -> bool:
    """Whether a text is of fair length and mostly English letters."""
    if not SHORTEST <= len(text) <= LONGEST:
        return False
    letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
    return letters / len(text) > 0.65 and sum(not c.isascii() for c in text) < len(text) / 50


def spans(text: str) -> set[int]:
    """Hashes of all runs of 13 words; of a shorter text, of all its words."""
    words = re.findall(r"\w+", text.lower())
    return {
        int.from_bytes(digest(" ".join(words[i : i + SPAN]))[:8], "big")
        for i in range(max(1, len(words) - SPAN + 1))
    }


def digest(text: str) -> bytes:
    """A hash of a text that does not see white space."""
    return hashlib.blake2b(" ".join(text.split()).encode(errors="replace"), digest_size=16).digest()


if __name__ == "__main__":
    sys.exit(main())
