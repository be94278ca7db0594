"""The house rules of the structure; the directions of imports are contracts in pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "lora_lightning").rglob("*.py"))


def test_imports_keep_the_layers(capsys):
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_package_root_holds_few_files():
    assert len(list((ROOT / "lora_lightning").glob("*.py"))) <= 5


def test_help_and_config_import_no_torch():
    code = (
        "import sys; import lora_lightning.config.compose; import lora_lightning.cli.main;"
        "print(sorted({'torch', 'lightning', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_torch_load_is_weights_only():
    for path in FILES:
        text = path.read_text()
        assert "import pickle" not in text
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path}: {call}"
