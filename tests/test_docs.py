"""The pages of docs/ run as they stand, each from its first block to its last."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import printed_overrides

from lora_lightning.config import compose_config, settings_of

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.md"))}
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```", flags=re.M | re.S)
COMMON_FILES = {"eight-gpus": "my-chats", "slurm": "my-chats"}
"""Pages that take the files of another."""
IN_PROCESSES = ("eight-gpus", "sweep")
"""Pages whose commands are run as processes."""
LONG = ("my-chats", "my-csv", "deploy-vllm")
"""Pages that take their time."""


def files_of(page: str) -> dict[str, str]:
    """What a page's blocks with a file's name hold, by that name."""
    return {name: text for _, name, text in FENCE.findall(PAGES[page]) if name}


def commands_of(page: str, kind: str) -> list[list[str]]:
    """The lines of our command in a page's blocks of a kind."""
    blocks = FENCE.findall(PAGES[page])
    text = "".join(body for found, _, body in blocks if found == kind)
    lines = text.replace("\\\n", " ").splitlines()
    found = [line[line.index("lora-lightning ") :] for line in lines if "lora-lightning " in line]
    return [shlex.split(line)[1:] for line in found]


def write_files(page: str, folder: Path) -> None:
    for name, text in files_of(COMMON_FILES.get(page, page)).items():
        (folder / name).write_text(text)


def test_the_index_names_every_page():
    assert set(re.findall(r"\]\(([\w-]+)\.md\)", PAGES["README"])) == PAGES.keys() - {"README"}


@pytest.mark.parametrize(
    ("page", "arguments"),
    [(page, line) for page in PAGES for kind in ("bash", "text", "sbatch")
     for line in commands_of(page, kind)
     if line[0] in ("train", "check", "plan")],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)  # fmt: skip
def test_settings_compose(page, arguments):
    """Also of what needs a GPU, a cluster or the hub; the launcher of a cluster aside."""
    own = [part for part in arguments if not part.startswith("hydra")]
    settings_of(compose_config(printed_overrides(own)))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page in LONG else ())
        for page in PAGES
        if page not in (*IN_PROCESSES, "README")
    ],
)
def test_a_page_runs(page, tmp_path, monkeypatch, run_cli):
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    for arguments in commands_of(page, "bash"):
        status, _, err = run_cli(*arguments)
        assert status == 0, f"{' '.join(arguments)}: {err}"
    if page == "my-csv":
        rows = files_of(page)["tickets.csv"].splitlines()[1:]
        answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
        right = sum(
            row.endswith(f",{answer['prediction']['label']}")
            for row, answer in zip(rows, answers, strict=True)
        )
        assert right > 0.8 * len(rows)
    if page == "deploy-vllm":
        stored = json.loads(Path("served/adapter_config.json").read_text())
        assert stored["r"] == 8  # the page's --max-lora-rank


@pytest.mark.slow
@pytest.mark.parametrize("page", IN_PROCESSES)
def test_a_page_of_several_processes_runs(page, tmp_path):
    write_files(page, tmp_path)
    said = [
        subprocess.run(
            [sys.executable, "-m", "lora_lightning", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        )
        for arguments in commands_of(page, "bash")
    ]
    if page == "eight-gpus":
        assert "complete" in said[-1].stdout + said[-1].stderr  # as the page says
        assert json.loads((tmp_path / "rehearsal/result.json").read_text())["status"] == "completed"
    else:
        assert len((tmp_path / "ranks/results.csv").read_text().splitlines()) == 1 + 4
        assert (tmp_path / "ranks/report.html").is_file()
