"""The README's commands work as printed, and CI runs its two set-up commands."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import printed_overrides

from lora_lightning.config import compose_config, settings_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line]
OURS = [shlex.split(line) for line in COMMANDS if line.startswith("lora-lightning")]
EXAMPLES = [text for kind, text in BLOCKS if kind == "python"]
QUICK = ["debug=limit", "callbacks.progress_bar=null", "callbacks.rich_summary=null"]
VERBS_RUN = ("predict", "evaluate", "merge", "combine", "export", "import", "chat")


def test_every_command_is_of_a_kind_that_is_tested():
    for line in COMMANDS:
        assert line.startswith(("lora-lightning ", "pip install -c constraints.txt", "tensorboard"))


def test_set_up_commands_are_two_and_ci_calls_them():
    setup = [line for line in COMMANDS if line.startswith("pip install")]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert len(setup) == 2
    assert all(line in ci for line in setup)


@pytest.mark.parametrize(
    "arguments",
    [a for a in OURS if a[1] in ("train", "check", "plan")],
    ids=lambda a: " ".join(a[1:]),
)
def test_settings_compose(arguments):
    """Also those that need a GPU or the hub; a sweep with the first of each of its values."""
    settings_of(compose_config(printed_overrides(arguments[1:])))


def test_settings_of_the_table_compose():
    """The settings in the README's table of LoRA options."""
    cells = [row.split(" | ")[0] for row in README.splitlines() if row.startswith("| `")]
    overrides = [shlex.split(code) for cell in cells for code in re.findall(r"`([^`]+)`", cell)]
    assert len(overrides) >= 9
    for override in overrides:
        settings_of(compose_config(override))


@pytest.mark.slow
def test_the_tour_runs_in_order(tmp_path, monkeypatch, run_cli, chat_llama):
    """Every command that needs no GPU, in the README's order, on fewer rows.

    Tasks that write text have a tiny local model in the place of the hub's.
    """
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "text": f"{word} thing number {i}",
            "review": f"{word} {i}",
            "label": label,
            "stars": stars,
        }
        for i in range(40)
        for word, label, stars in (("lovely", "positive", 5), ("awful", "negative", 1))
    ]
    Path("reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"document": f"{word} film {i}"} for i in range(20) for word in ("good", "bad")]
    files = {
        "texts": texts,
        "pairs": [{**row, "summary": "fine"} for row in texts],
        "talks": [{"prompt": row["document"], "completion": "fine"} for row in texts],
        "pages": [{"text": row["document"]} for row in texts],
    }
    for name, lines in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("reviews.csv").write_text(
        "review,stars\n" + "".join(f"{row['review']},{row['stars']}\n" for row in rows)
    )
    ran = set()
    for _, verb, *arguments in OURS:
        line = " ".join(arguments)
        if "task=" in line and "model." in line and "trainer=" not in line:
            arguments = [a for a in arguments if not a.startswith("model.name_or_path=")]
            arguments += [f"model.name_or_path={chat_llama}", "task.max_new_tokens=8"]
            arguments += ["callbacks.samples.count=1"]
        elif (
            verb == "report"
            or "trainer=" in line
            or "model.name" in line
            or "--" in line
            or "-m" in arguments
        ):
            continue
        if verb == "train" and "resume=" not in line:
            arguments = [*[a for a in arguments if a != "debug=limit"], *QUICK]
        monkeypatch.setattr("sys.stdin", io.StringIO("very good ?\n"))
        status, out, err = run_cli(verb, *arguments)
        assert status == 0, f"{verb} {line}: {err}"
        ran.add(verb)
        if verb == "predict" and "text=" in line and "demo" in line:
            assert json.loads(out)["label"] in ("negative", "positive")
    assert ran == {"train", "check", "plan", *VERBS_RUN}
    assert len(Path("summaries.jsonl").read_text().splitlines()) == len(texts)
    assert len(Path("labelled.jsonl").read_text().splitlines()) == len(rows)
    assert Path("outputs/merged/config.json").is_file()
    assert {path.name for path in Path("outputs/demo").iterdir()} == set(
        re.findall(
            r"^([\w.]+)/?  +", re.search(r"## A run's folder\n(.*?)\n## ", README, re.S)[1], re.M
        )
    ) - {"result"} | {"result.json"}


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_python_examples_run(number, tmp_path, monkeypatch, run_cli):
    monkeypatch.chdir(tmp_path)
    code = EXAMPLES[number]
    if "outputs/demo" in code:
        assert run_cli("train", "output_dir=outputs/demo", *QUICK)[0] == 0
    if "outputs/half" in code:
        half = ("adapter=outputs/demo/adapter", "weights=0.5", "output=outputs/half")
        assert run_cli("combine", *half)[0] == 0
    exec(compile(code, f"README example {number}", "exec"), {})


def test_help_texts_run(run_cli):
    for flags in (["--help"], ["train", "--help"], ["train", "--cfg", "job"]):
        status, out, _ = run_cli(*flags)
        assert status == 0
        assert "lora" in out
