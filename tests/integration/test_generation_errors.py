"""Bad data for tasks whose target is text: one clear message, or a drop that is counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from helpers.data import write_jsonl

STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% endfor %}"
)
GOOD = [{"document": f"the film {i}", "summary": f"good {i}"} for i in range(40)]
TALKS = [{"prompt": f"food {i} ?", "completion": f"good {i}"} for i in range(40)]


class Case(NamedTuple):
    name: str
    task: str
    rows: list[dict]
    settings: list[str]
    says: str
    fix: str


def messages(*turns: object) -> dict:
    return {"messages": list(turns)}


def turn(role: object, content: object) -> dict:
    return {"role": role, "content": content}


REFUSED = [
    Case(
        "no source",
        "summarization",
        [{"a": "x", "summary": "y"}] * 9,
        [],
        "usual name for the source",
        "task.source_column",
    ),
    Case(
        "no target",
        "summarization",
        [{"document": "x", "a": "y"}] * 9,
        [],
        "usual name for the target",
        "task.target_column",
    ),
    Case(
        "source misspelt",
        "summarization",
        GOOD,
        ["task.source_column=dokument"],
        "dokument",
        "'document'",
    ),
    Case(
        "target misspelt",
        "summarization",
        GOOD,
        ["task.target_column=sumary"],
        "sumary",
        "'summary'",
    ),
    Case(
        "source is a list",
        "summarization",
        [*GOOD, {"document": "x", "summary": "y"}],
        ["task.source_column=summary", "task.target_column=nothing"],
        "nothing",
        "The data has",
    ),
    Case(
        "mixed types",
        "summarization",
        [{"document": ["a"], "summary": "b"}] * 40,
        [],
        "must hold text",
        "convert it",
    ),
    Case(
        "all empty",
        "summarization",
        [{"document": f"x {i}", "summary": " "} for i in range(40)],
        [],
        "nothing to learn",
        "task.source_column",
    ),
    Case(
        "all targets too long",
        "summarization",
        [{"document": "x", "summary": f"good {i} " * 99} for i in range(40)],
        [],
        "longer than data.max_length",
        "raise data.max_length",
    ),
    Case(
        "no room for a prompt",
        "summarization",
        GOOD,
        ["task.generation.max_new_tokens=64"],
        "must leave room for a prompt",
        "Lower the former",
    ),
    Case(
        "prompt without source", "summarization", GOOD, ["task.prompt=Summary"], "{source}", "once"
    ),
    Case(
        "unknown metric", "summarization", GOOD, ["task.text_metrics=[rogue]"], "=rogue:", "'rouge'"
    ),
    Case(
        "unknown monitor",
        "summarization",
        GOOD,
        ["task.monitor=val/rougel"],
        "val/rougel",
        "val/rougeL",
    ),
    Case(
        "rouge: must be one of",
        "summarization",
        GOOD,
        ["task.monitor=val/rougeL", "task.generate_rows=0"],
        "val/rougeL",
        "val/perplexity",
    ),
    Case(
        "temperature",
        "summarization",
        GOOD,
        ["task.generation.temperature=0"],
        "task.generation.temperature",
        "do_sample=false",
    ),
    Case(
        "top_p",
        "summarization",
        GOOD,
        ["task.generation.top_p=1.5"],
        "task.generation.top_p",
        "at most 1",
    ),
    Case(
        "beams",
        "summarization",
        GOOD,
        ["task.generation.num_beams=0"],
        "task.generation.num_beams",
        "at least 1",
    ),
    Case("no text", "lm", [{"a": "b"}] * 9, [], "usual name for the text", "task.text_column"),
    Case(
        "nothing to compare",
        "lm",
        [{"text": "a"}] * 9,
        ["task.generate_rows=4"],
        "generate_rows=4: not supported",
        "task=lm",
    ),
    Case(
        "no conversations",
        "instruct",
        [{"a": "b"}] * 9,
        [],
        "no conversations found",
        "task.messages_column",
    ),
    Case(
        "no role",
        "instruct",
        [messages({"content": "a"})] * 9,
        [],
        "message 1 must have a role",
        "assistant",
    ),
    Case(
        "unknown role",
        "instruct",
        [messages(turn("boss", "a"))] * 9,
        [],
        "role 'boss' not found",
        "assistant",
    ),
    Case(
        "no content",
        "instruct",
        [messages(turn("user", None))] * 9,
        [],
        "must hold text",
        "message 1",
    ),
    Case(
        "messages are a text",
        "instruct",
        [{"messages": "hello"}] * 9,
        [],
        "list of messages",
        "train data, row 1",
    ),
    Case(
        "never the assistant",
        "instruct",
        [messages(turn("user", f"film {i}")) for i in range(40)],
        [],
        "nothing to learn",
        "assistant speaks",
    ),
    Case(
        "template refuses",
        "instruct",
        TALKS,
        ["task.system=hello"],
        "rejects the roles",
        "no system",
    ),
    Case(
        "no template",
        "instruct",
        TALKS,
        [],
        "requires a tokenizer with a chat template",
        "model.tokenizer",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_bad_data_is_one_clear_message(
    case, run_cli, tiny_llama, chat_llama, tmp_path, monkeypatch, fast
):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama if case.name == "no template" else chat_llama
    if case.name == "template refuses":
        model = tmp_path / "model"
        AutoTokenizer.from_pretrained(chat_llama).save_pretrained(model)
        (model / "chat_template.jinja").write_text(STRICT)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(chat_llama / name, model / name)
    write_jsonl(Path("rows.jsonl"), case.rows)
    room = (
        []
        if any("max_new_tokens" in item for item in case.settings)
        else ["task.generation.max_new_tokens=8"]
    )
    before = sorted(Path().rglob("*"))
    status, _, err = run_cli(
        "train",
        *fast,
        f"task={case.task}",
        *room,
        *case.settings,
        f"model.name_or_path={model}",
        "data.train=rows.jsonl",
        "output_dir=out",
    )
    assert status == 2, err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert case.says in err
    assert case.fix in err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("name", ["packing an encoder-decoder", "lm of one", "instruct of one"])
def test_what_an_encoder_decoder_cannot_do(name, run_cli, tiny_t5, tmp_path, fast):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({**row, "text": "a", "prompt": "a", "completion": "b"}) + "\n"
            for row in GOOD
        )
    )
    settings = {
        "packing an encoder-decoder": ["task=summarization", "data.packing=true"],
        "lm of one": ["task=lm"],
        "instruct of one": ["task=instruct"],
    }[name]
    status, _, err = run_cli(
        "train",
        *fast,
        *settings,
        f"model.name_or_path={tiny_t5}",
        f"data.train={rows}",
        f"output_dir={tmp_path / 'o'}",
    )
    assert status == 2
    assert "causal model" in err


def test_rows_that_are_dropped_are_counted(run_cli, tiny_llama, tmp_path, fast):
    rows = [
        *GOOD,
        {"document": "x", "summary": ""},
        {"document": "", "summary": "y"},
        {"document": "x", "summary": "good " * 80},
    ]
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    write_jsonl(train, rows)
    write_jsonl(val, GOOD[:8])
    status, out, err = run_cli(
        "check",
        *fast,
        "task=summarization",
        "task.generation.max_new_tokens=8",
        f"model.name_or_path={tiny_llama}",
        f"data.train={train}",
        f"data.val={val}",
        "data.test_fraction=0",
        f"output_dir={tmp_path / 'o'}",
    )
    assert status == 0, err
    assert "40 rows" in out
    assert "3 rows dropped" in out
