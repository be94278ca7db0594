"""Summarization dataset built from the docstrings of the standard library.

The body of a docstring is the document, and its first line is the summary. The package ships no
rows. Each machine reads the source files of its own Python. The rows are the same wherever the
Python version and its source files are the same.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.errors import UserError
from lora_lightning.utils.atomic_write import atomic_write

from .cache import is_whole, report_damage, write_sums

VERSION = 1  # increase it when the built rows change
SUMMARY_WORDS = (3, 25)
BODY_WORDS = (12, 300)
SPAN = 13
"""Consecutive words that a validation or test row must not share with a training row."""
TESTS = {"test", "tests"}
APPLICATIONS = {"idlelib", "turtledemo"}
"""Programs that come with the library, but only in some distributions of Python."""
_SIGNATURE = re.compile(r"[\w.]+\s*\(")
_NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

Row = dict[str, str]


def docstring_files(folder: Path) -> dict[str, Path]:
    """Return the JSONL file of each split, and build missing files in `folder`.

    Args:
        folder: cache folder. Files of different Python versions coexist in it.

    Raises:
        UserError: this Python comes without the source of its standard library.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    target = folder / f"docstrings-{version}-v{VERSION}"
    paths = {split: target / f"{split}.jsonl" for split in ("train", "val", "test")}
    sums = target / "sums.json"
    if not is_whole(paths.values(), sums):
        if sums.exists():
            report_damage(target)
        splits = build_docstrings(Path(sysconfig.get_path("stdlib")))
        target.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            # Write atomically, because another process may build the same file.
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            atomic_write(paths[split], "".join(lines))
        write_sums(paths.values(), sums)
    return paths


def build_docstrings(library: Path) -> dict[str, list[Row]]:
    """Build rows with `module`, `document` and `summary` by split.

    Each top-level module belongs to one split only. The summary is the first line of a docstring.
    The document is the text after the blank line.

    A row is dropped if its summary is a signature, is part of the document, or occurs twice. A
    validation or test row is dropped if it shares 13 consecutive words with the training rows.

    Raises:
        UserError: `library` holds no source files.
    """
    found: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        module = parts[0].removesuffix(".py")
        if module not in sys.stdlib_module_names or module in APPLICATIONS:
            continue
        if TESTS.intersection(parts):
            continue
        for text in docstrings(path.read_bytes()):
            row = _row(module, text)
            if row is None:
                continue
            keys = {_plain(row["summary"]), _plain(row["document"])}
            if seen.isdisjoint(keys):
                found[_split_of(module)].append(row)
            seen |= keys
    if not all(found.values()):
        raise UserError(
            f"data.embedded=docstrings is made from the source files of Python's standard library, "
            f"and {library} holds none: give data of your own, data.train=FILE, or use a Python "
            "that has them."
        )
    trained = {span for row in found["train"] for span in _spans(row["document"])}
    for split in ("val", "test"):
        found[split] = [row for row in found[split] if trained.isdisjoint(_spans(row["document"]))]
    return found


def _row(module: str, text: str) -> Row | None:
    """Return the row of a docstring, or None if it is not a summary and a body."""
    first, _, rest = text.partition("\n")
    blank, _, rest = rest.partition("\n")
    summary, document = first.strip(), rest.strip()
    if blank or _SIGNATURE.match(summary) or not summary[:1].isalpha():
        return None
    for words, (least, most) in ((summary, SUMMARY_WORDS), (document, BODY_WORDS)):
        if not least <= len(words.split()) <= most:
            return None
    if _plain(summary) in _plain(document):
        return None
    return {"module": module, "document": document, "summary": summary}


def _split_of(module: str) -> str:
    """Return the split of a module.

    One module in eight is for test and one for validation. `_pyio` is in the same split as `io`.
    """
    name = module.removeprefix("_py").removeprefix("_")
    number = hashlib.sha256(name.encode()).digest()[0] % 8
    return {0: "test", 1: "val"}.get(number, "train")


def docstrings(source: bytes) -> Iterator[str]:
    """Yield the docstrings of a file's module, classes and functions, without indentation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for old escapes in strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, _NODES):
            text = ast.get_docstring(node)
            if text:
                yield "\n".join(line.rstrip() for line in text.strip().splitlines())


def _plain(text: str) -> str:
    """Return the words of a text in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _spans(text: str) -> set[str]:
    words = _plain(text).split()
    return {" ".join(words[i : i + SPAN]) for i in range(max(1, len(words) - SPAN + 1))}
