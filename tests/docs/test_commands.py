"""Commands, settings, Python blocks and links of README.md and docs/ work as printed."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.runs import result_of
from lora_lightning.cli.main import main
from lora_lightning.config.compose import compose_config, settings_of

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```", flags=re.M | re.S)
QUICK = ["debug=limit", "callbacks.progress_bar=null", "callbacks.rich_summary=null"]
AS_PRINTED = ("my-csv", "my-chats", "deploy-vllm", "multi-gpu", "sweeps")
"""Pages whose trainings are small enough; in other pages they get QUICK."""
SETTINGS_VERBS = ("train", "check", "plan")


def blocks_of(page: str, *kinds: str) -> list[str]:
    return [body for kind, _, body in FENCE.findall(PAGES[page]) if kind in kinds]


def printed_overrides(arguments: list[str]) -> list[str]:
    """What a printed command sets: of a sweep (-m) the first of each of its values.

    Args:
        arguments: the verb and what follows it.
    """
    others = ("-", "resume=", "job", "device_gib=")
    overrides = [argument for argument in arguments[1:] if not argument.startswith(others)]
    if "-m" in arguments:
        overrides = [re.sub(r"=([^\[{,]+),.*", r"=\1", override) for override in overrides]
    return overrides


def commands_of(page: str, *kinds: str) -> list[list[str]]:
    """The arguments of each lora-lightning line in a page's blocks of some kinds."""
    lines = "".join(blocks_of(page, *kinds)).replace("\\\n", " ").splitlines()
    ours = [line[line.index("lora-lightning ") :] for line in lines if "lora-lightning " in line]
    return [shlex.split(line, comments=True)[1:] for line in ours]


def table_settings() -> list[list[str]]:
    """The settings in the first cells of all tables with the header `setting`."""
    rows = [
        row
        for text in PAGES.values()
        for table in re.findall(r"^\| setting \|.*\n\|[-|]+\n((?:\|.*\n)*)", text, re.M)
        for row in table.splitlines()
    ]
    codes = [code for row in rows for code in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    settings = [shlex.split(code) for code in dict.fromkeys(codes)]
    return [parts for parts in settings if not parts[0].startswith("launcher.")]


NAMED_FILES = {
    name: text for page in PAGES.values() for _, name, text in FENCE.findall(page) if name
}
TOURS = [page for page in PAGES if commands_of(page, "bash")]
EXAMPLES = [(page, body) for page in PAGES for body in blocks_of(page, "python")]
COMPOSED = {
    " ".join(arguments): arguments
    for page in PAGES
    for arguments in commands_of(page, "bash", "text", "sbatch")
    if arguments[0] in SETTINGS_VERBS and "--config-dir" not in arguments
}


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """Folder with outputs/demo, a short run of the default task, and outputs/half."""
    folder = tmp_path_factory.mktemp("demo")
    half = ["adapter=outputs/demo/adapter", "weights=0.5", "output=outputs/half"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (["train", "output_dir=outputs/demo", *QUICK], ["combine", *half]):
            patch.setattr("sys.argv", ["lora-lightning", *command])
            main()
    return folder


def run_process(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lora_lightning", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
    return done.stdout + done.stderr


def test_shell_lines_are_all_of_a_tested_kind():
    other = ("pip install -c constraints.txt", "tensorboard ", "pytest", "ruff ", "python tests/")
    for page in PAGES:
        for line in "".join(blocks_of(page, "bash")).replace("\\\n", " ").splitlines():
            assert line.startswith(("lora-lightning ", *other)), line


def test_ci_calls_the_two_set_up_commands():
    lines = "".join(blocks_of("README.md", "bash")).splitlines()
    setup = [line for line in lines if line.startswith("pip install")]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert len(setup) == 2
    assert all(line in ci for line in setup)


def test_readme_fits_its_limits():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 150
    assert all(len(line) <= 120 for line in lines if not line.startswith("|"))


def test_index_names_every_page():
    index = re.findall(r"\]\(([\w-]+\.md)\)", PAGES["docs/README.md"])
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert sorted(index) == sorted(pages)


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#?)([^)]*)\)", PAGES[page]):
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)", path.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


@pytest.mark.parametrize("arguments", COMPOSED.values(), ids=COMPOSED.keys())
def test_settings_of_command_compose(arguments):
    """Also of what needs a GPU, a cluster or the hub; a launcher of a cluster aside."""
    own = [part for part in arguments if not part.startswith("hydra")]
    settings_of(compose_config(printed_overrides(own)))


def test_settings_of_tables_compose():
    settings = table_settings()
    assert len(settings) >= 50
    for override in settings:
        settings_of(compose_config(override))


@pytest.mark.parametrize(
    ("page", "code"), EXAMPLES, ids=[f"{p}-{i}" for i, (p, _) in enumerate(EXAMPLES)]
)
def test_python_block_runs(page, code, tmp_path, monkeypatch, request):
    if "outputs/" in code:
        shutil.copytree(request.getfixturevalue("demo_run"), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("page", TOURS)
def test_page_runs_from_first_to_last_block(page, tmp_path, monkeypatch, run_cli, demo_run):
    """Starts from the files that the pages show, and from outputs/demo where the page uses it."""
    commands = commands_of(page, "bash")
    for name, text in NAMED_FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if "outputs/demo" in PAGES[page] and ["train", "output_dir=outputs/demo"] not in commands:
        shutil.copytree(demo_run / "outputs/demo", tmp_path / "outputs/demo")
    monkeypatch.chdir(tmp_path)
    said = ""
    for verb, *arguments in commands:
        complete = any(part.startswith(("resume=", "--")) for part in arguments)
        if verb == "train" and not complete and Path(page).stem not in AS_PRINTED:
            arguments = [*arguments, *QUICK]
        if "-m" in arguments or "trainer.devices=2" in arguments:
            said = run_process([verb, *arguments], tmp_path)
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO("very good ?\n"))
        status, said, err = run_cli(verb, *arguments)
        assert status == 0, f"{verb} {' '.join(arguments)}: {err}"
    check_results(page, said, tmp_path)


def check_results(page: str, said: str, folder: Path) -> None:
    """Assert what a page says of its results.

    Args:
        page: the page's path.
        said: what its last command printed.
        folder: where its commands ran.
    """
    if page == "docs/my-csv.md":
        rows = NAMED_FILES["tickets.csv"].splitlines()[1:]
        answers = [json.loads(line) for line in (folder / "answers.jsonl").open()]
        right = sum(
            row.endswith(f",{answer['prediction']['label']}")
            for row, answer in zip(rows, answers, strict=True)
        )
        assert right > 0.8 * len(rows)
    if page == "docs/deploy-vllm.md":
        stored = json.loads((folder / "served/adapter_config.json").read_text())
        assert stored["r"] == 8  # the page's --max-lora-rank
    if page == "docs/multi-gpu.md":
        assert "complete" in said  # as the page says
        assert result_of(folder / "rehearsal")["status"] == "completed"
    if page == "docs/sweeps.md":
        assert len((folder / "ranks/results.csv").read_text().splitlines()) == 1 + 4
        assert (folder / "ranks/report.html").is_file()
    if page == "README.md":
        assert (folder / "outputs/merged/config.json").is_file()


def test_run_folder_page_names_what_a_run_holds(demo_run):
    tree = blocks_of("docs/run-folder.md", "text")[0]
    names = {path.name for path in (demo_run / "outputs/demo").iterdir()}
    assert names == set(re.findall(r"^([\w.]+)/?  +", tree, re.M)) | {".lock"} - {".lock.owner"}


def test_help_texts_run(run_cli):
    for flags in (["--help"], ["train", "--help"], ["train", "--cfg", "job"]):
        status, out, _ = run_cli(*flags)
        assert status == 0
        assert "lora" in out
