"""The house rules of the structure: which way imports run, and who may know which library."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lora_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of ours, over and above itself. Nothing may import cli.
FOUNDATION = {"lora", "settings", "atomic_write"}
MODEL_SIDE = FOUNDATION | {"modeling", "optim", "tasks", "metrics", "parallel", "strategies"}
MODEL_SIDE |= {"checkpoint", "forward", "offload", "placement", "quantization", "vocabulary"}
MODEL_SIDE |= {"warm_start", "zero", "untrusted", "terminal", "logs"}
RUN_SIDE = MODEL_SIDE | {"module", "data", "callbacks", "storage", "config", "quiet"}
RUN_SIDE |= {"presets", "paths"}
ALLOWED = {
    "lora": set(),
    "atomic_write": {"lora"},
    "settings": {"lora"},
    "quiet": set(),
    "usage": set(),
    "presets": {"lora"},
    "paths": {"lora"},
    "config": FOUNDATION | {"paths", "presets", "untrusted"},
    "untrusted": FOUNDATION,
    "terminal": set(),
    "logs": {"terminal"},
    "cpu": set(),
    "parallel": {"lora"},
    "placement": {"lora", "parallel"},
    "zero": {"lora", "strategies"},
    "strategies": {"lora", "parallel", "precision"},
    "signals": set(),
    "checkpoint": {"lora"},
    "cluster": {"lora"},
    "modeling": FOUNDATION
    | {"cpu", "parallel", "quantization", "skeleton", "untrusted"}
    | {"vocabulary"},
    "forward": {"lora"},
    "offload": {"lora"},
    "vocabulary": FOUNDATION,
    "warm_start": FOUNDATION | {"checkpoint", "logs", "untrusted"},
    "skeleton": FOUNDATION,
    "alive": set(),
    "quantization": FOUNDATION,
    "optim": FOUNDATION,
    "metrics": set(),
    "head": {"lora", "parallel"},
    "precision": {"lora"},
    "tasks": FOUNDATION | {"modeling", "metrics", "head", "parallel", "forward", "terminal"},
    "data": FOUNDATION
    | {"forward", "paths", "tasks", "strategies", "vocabulary", "terminal", "untrusted"},
    "combinations": {"lora", "settings"},
    "first_look": MODEL_SIDE,
    "losses": {"lora", "atomic_write", "storage"},
    "module": MODEL_SIDE | {"combinations", "first_look", "losses"},
    "callbacks": MODEL_SIDE | {"module", "signals"},
    "retention": MODEL_SIDE | {"module", "data", "callbacks"},
    "storage": MODEL_SIDE | {"lock"},
    "outcome": RUN_SIDE,
    "card": RUN_SIDE,
    "trainer": RUN_SIDE | {"cluster", "precision"},
    "earlier": RUN_SIDE,
    "train": RUN_SIDE
    | {"trainer", "earlier", "cluster", "precision", "outcome", "card", "signals", "lock"}
    | {"cpu", "memory", "restoring", "retention", "losses", "__init__"},
    "restoring": {"lora", "atomic_write", "checkpoint", "config"},
    "memory": RUN_SIDE | {"signals"},
    "rehearsal": RUN_SIDE | {"alive", "head", "skeleton"},
    "plan": RUN_SIDE | {"precision", "rehearsal", "skeleton"},
    "packed": RUN_SIDE | {"train", "launch", "memory", "precision", "cpu"},
    "lock": {"lora"},
    "report": FOUNDATION | {"config", "presets", "lock", "logs", "terminal", "untrusted"},
    "launch": FOUNDATION
    | {"config", "earlier", "paths", "report", "lock", "logs", "signals", "terminal"},
    "written": {"lora", "storage"},
    "inference": RUN_SIDE | {"lock", "written"},
    "chat": RUN_SIDE | {"inference"},
    "stored": {"lora", "storage", "untrusted"},
    "combine": {"lora", "storage", "stored"},
    "portable": {"lora", "storage", "stored"},
    "layouts": {"lora"},
    "imported": RUN_SIDE | {"checkpoint", "layouts"},
    "check": RUN_SIDE | {"combinations", "train", "trainer", "earlier", "memory", "precision"},
    "evaluate": RUN_SIDE | {"trainer", "inference", "precision"},
    "cli": RUN_SIDE
    | {
        "cluster",
        "start",
        "train",
        "inference",
        "written",
        "check",
        "plan",
        "chat",
        "combine",
        "portable",
        "imported",
        "stored",
        "evaluate",
        "usage",
        "launch",
        "lock",
        "report",
        "__init__",
    },
    "start": RUN_SIDE | {"cluster", "earlier", "launch", "train", "usage"},
    "__main__": {"cli"},
    "__init__": RUN_SIDE | {"inference"},
}
ONLY_IN = {
    "hydra": {"config", "presets", "start", "launch", "report/sweep"},
    "lightning": {
        "strategies",
        "zero",
        "signals",
        "module",
        "losses",
        "data/datamodule",
        "callbacks",
        "restoring",
        "retention",
        "outcome",
        "train",
        "trainer",
        "earlier",
        "packed",
    },
    "peft": set(),
    "deepspeed": {"zero"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Absolute dotted names of all that a file imports, at any depth of its code."""
    package = ["lora_lightning", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "lora_lightning":
                found += [f"{module}.{alias.name}" for alias in node.names]
            else:
                found.append(module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = part_of(path)
    for name in imports_of(path):
        if not name.startswith("lora_lightning."):
            continue
        target = name.split(".")[1]
        if not (PACKAGE / target).is_dir() and not (PACKAGE / f"{target}.py").is_file():
            target = "__init__"
        assert target == part or target in ALLOWED[part], f"{path} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries_stay_where_they_belong(path):
    here = str(path.relative_to(PACKAGE)).removesuffix(".py")
    for name in imports_of(path):
        library = name.split(".")[0]
        if library in ONLY_IN:
            places = ONLY_IN[library]
            assert here in places or part_of(path) in places, f"{path} must not import {library}"


def test_every_part_is_listed():
    assert {part_of(path) for path in FILES} == set(ALLOWED)


def test_help_and_config_errors_need_no_torch():
    code = (
        "import sys; import lora_lightning.config; import lora_lightning.cli;"
        "print(sorted({'torch', 'lightning', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_pickle_is_read():
    for path in FILES:
        text = path.read_text()
        assert "import pickle" not in text
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path}: {call}"
