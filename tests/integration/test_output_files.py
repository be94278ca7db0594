"""Files that predict and evaluate write: by one process at a time, whole, through no link."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from helpers.data import make_rows, write_jsonl
from lora_lightning.inference.output_files import check_output_file
from lora_lightning.lora import UserError
from lora_lightning.utils.locks import locked_output

ROWS = make_rows(120, seed=5)


@pytest.fixture(scope="module")
def adapters(trained_run) -> list[Path]:
    """Two of the same task."""
    return [trained_run(*more) / "adapter" for more in ([], ["seed=1"])]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("in.jsonl"), ROWS)


@pytest.fixture
def _impatient(monkeypatch):
    """Has no process wait for another's output."""
    for module in ("utils.locks", "inference.predict_file"):
        monkeypatch.setattr(
            f"lora_lightning.{module}.locked_output", partial(locked_output, patience=0)
        )


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().split("\n")[:-1]]


def predictions(pipe, adapter: Path, stop_at: int | None) -> None:
    """Predicts row by row in a process of its own, which waits at one until it is told to go on."""
    from lora_lightning.inference.predict_file import predict_file
    from lora_lightning.inference.predictor import Predictor, predictor_for

    answer = Predictor.__call__

    def watched(self, rows, *, first=1):
        pipe.send(first)
        if first == stop_at:
            pipe.recv()
        return answer(self, rows, first=first)

    Predictor.__call__ = watched
    predictor = predictor_for(adapter, ["data.eval_batch_size=1"])
    pipe.send(f"{predict_file(predictor, Path('in.jsonl'), Path('out.jsonl'))} rows")


def start(adapter: Path, *, stop_at: int | None = None):
    fork = multiprocessing.get_context("fork")
    pipe, end = fork.Pipe()
    process = fork.Process(target=predictions, args=(end, adapter, stop_at), daemon=True)
    process.start()
    end.close()
    while stop_at is not None and pipe.recv() != stop_at:
        pass
    return process, pipe


def heard_to_its_end(pipe) -> list[int]:
    """At which rows groups began."""
    heard = []
    while not heard or heard[-1] != f"{len(ROWS)} rows":
        heard.append(pipe.recv())
    return heard[:-1]


def written() -> bool:
    whole = texts(Path("out.jsonl")) == [row["text"] for row in ROWS]
    return whole and sorted(os.listdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.usefixtures("_impatient")
def test_predict_refuses_an_output_that_another_process_writes(run_cli, adapters):
    """Whatever adapter the other one has; what it writes is whole."""
    process, pipe = start(adapters[0], stop_at=51)
    try:
        for adapter in adapters:
            command = ["predict", f"adapter={adapter}", "input=in.jsonl", "output=out.jsonl"]
            status, out, err = run_cli(*command, "data.eval_batch_size=1")
            assert (status, out) == (2, "")
            assert "out.jsonl is being written by another process" in " ".join(err.split())
        pipe.send("go on")
        assert heard_to_its_end(pipe) == [101]
        process.join(60)
    finally:
        process.kill()
    assert written()


@pytest.mark.usefixtures("_impatient")
def test_evaluate_refuses_an_output_that_another_process_writes(run_cli, adapters, rows_jsonl):
    command = ["evaluate", f"adapter={adapters[0]}", f"data.test={rows_jsonl}", "output=out.json"]
    with locked_output(Path("out.json")):
        status, out, err = run_cli(*command)
        assert (status, out) == (2, "")
        assert "out.json is being written by another process" in " ".join(err.split())
        assert not Path("out.json").exists()
    assert run_cli(*command)[0] == 0
    assert json.loads(Path("out.json").read_text())["rows"] == 80
    assert sorted(os.listdir()) == ["in.jsonl", "out.json"]


def test_predict_after_a_kill_resumes(adapters):
    process, _ = start(adapters[0], stop_at=101)
    process.kill()
    process.join(60)
    (left,) = Path().glob("out.jsonl.*.partial")
    assert len(texts(left)) == 100
    again, pipe = start(adapters[0])
    assert heard_to_its_end(pipe) == [101]
    again.join(60)
    assert written()


@pytest.mark.parametrize("change", [lambda lines: lines * 2, lambda lines: lines[:-1]])
def test_predict_refuses_partial_output_that_another_program_changed(
    change, run_cli, adapters, monkeypatch
):
    """What another program has done to them is told, and no output is made of it."""
    from lora_lightning.inference.predictor import Predictor

    answer = Predictor.__call__

    def beside(self, rows, *, first=1):
        if first > 1:
            (file,) = Path().glob("out.jsonl.*.partial")
            lines = file.read_bytes().splitlines(keepends=True)
            with file.open("r+b") as handle:
                handle.truncate()
                handle.writelines(change(lines))
        return answer(self, rows, first=first)

    monkeypatch.setattr(Predictor, "__call__", beside)
    command = ["predict", f"adapter={adapters[0]}", "input=in.jsonl", "output=out.jsonl"]
    status, out, err = run_cli(*command, "data.eval_batch_size=1")
    assert (status, out) == (2, "")
    assert re.search(r"holds \d+ lines for 120 rows.* Remove it", " ".join(err.split()))
    assert not Path("out.jsonl").exists()


def test_predict_refuses_partial_output_that_is_a_link(run_cli, adapters):
    process, _ = start(adapters[0], stop_at=51)
    process.kill()
    process.join(60)
    (left,) = Path().glob("out.jsonl.*.partial")
    left.rename("victim")
    left.symlink_to("victim")
    before = Path("victim").read_bytes()
    command = ["predict", f"adapter={adapters[0]}", "input=in.jsonl", "output=out.jsonl"]
    status, _, err = run_cli(*command, "data.eval_batch_size=1")
    assert status == 2
    assert "output=out.jsonl: cannot be written" in " ".join(err.split())
    assert Path("victim").read_bytes() == before


MINE = {
    "rows.jsonl": '{"text": "a film", "label": "positive"}\n',
    "notes.json": '{"done": ["a"]}\n',
    "list.json": "[1, 2]\n",
    "broken.jsonl": "{\n",
}


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("in.jsonl", "output=in.jsonl: is what predict reads"),
        ("linked.jsonl", "output=linked.jsonl: is what predict reads"),
        ("rows.jsonl", "predict did not write it: it holds text, label"),
        ("broken.jsonl", "predict did not write it: it holds something else"),
        ("notes.json", "evaluate did not write it: it holds done"),
        ("list.json", "evaluate did not write it: it holds something else"),
        ("peft/adapter_config.json", "evaluate did not write it: it holds alpha_pattern"),
        ("RUN/result.json", "is in the run"),
        ("RUN/pause.json", "is in the run"),
        ("RUN/samples.jsonl", "is in the run"),
        ("RUN/adapter/scores.json", "is in the run"),
    ],
)
def test_output_that_another_program_wrote_is_refused(
    output, told, adapters, rows_jsonl, tmp_path, run_cli
):
    shutil.copytree(adapters[0], tmp_path / "peft")
    for name, content in MINE.items():
        Path(name).write_text(content)
    Path("linked.jsonl").hardlink_to("in.jsonl")
    output = output.replace("RUN", str(adapters[0].parent))
    before = Path(output).read_bytes() if Path(output).exists() else None
    verb = ["predict", "input=in.jsonl"]
    if output.endswith(".json"):
        verb = ["evaluate", f"data.test={rows_jsonl}"]
    status, _, err = run_cli(*verb, f"adapter={adapters[0]}", f"output={output}")
    assert status == 2
    assert told in " ".join(err.split())
    assert (Path(output).read_bytes() if Path(output).exists() else None) == before


def test_output_of_the_same_command_or_an_empty_file_is_replaced(adapters, rows_jsonl, run_cli):
    commands = {
        "out.jsonl": ["predict", "input=in.jsonl"],
        "out.json": ["evaluate", f"data.test={rows_jsonl}"],
    }
    for output, verb in commands.items():
        Path(output).touch()
        for adapter in adapters:
            status, _, err = run_cli(*verb, f"adapter={adapter}", f"output={output}")
            assert status == 0, err


def test_check_output_file_refuses_files_that_the_command_reads(tmp_path):
    """Nor is a source that is not there a traceback."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"prediction": "by hand"}\n')
    for source in (tmp_path / "in", tmp_path / "in" / "a.jsonl"):
        with pytest.raises(UserError, match=r"is (in )?what predict reads"):
            check_output_file(tmp_path / "in" / "a.jsonl", by="predict", sources=[source])
    check_output_file(
        tmp_path / "in" / "a.jsonl", by="predict", sources=[tmp_path / "absent.jsonl"]
    )


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_output_lock_with_content_is_refused_and_kept(verb, run_cli, adapters, rows_jsonl):
    name = {"predict": "out.jsonl", "evaluate": "out.json"}[verb]
    reads = {"predict": "input=in.jsonl", "evaluate": f"data.test={rows_jsonl}"}[verb]
    mine = Path(f".{name}.lock")
    mine.write_text("mine")
    status, _, err = run_cli(verb, f"adapter={adapters[0]}", reads, f"output={name}")
    assert status == 2
    assert f"{mine} is not empty" in " ".join(err.split())
    assert mine.read_text() == "mine"
    assert not Path(name).exists()


def test_output_lock_that_gets_content_is_kept():
    lock = Path(".out.jsonl.lock")
    with locked_output(Path("out.jsonl")):
        lock.write_text("mine")
    assert lock.read_text() == "mine"


@pytest.mark.parametrize("key", ["data.test", "data.val", "data.path", "data.test in a list"])
def test_evaluate_refuses_an_output_that_it_reads(key, run_cli, adapters):
    """Even a file that looks like an evaluation of its own."""
    content = json.dumps({"rows": 1, "test/loss": 1.0, "text": "a", "label": "good"})
    Path("in.json").write_text(content)
    folder = Path("folder")
    folder.mkdir()
    place = {"data.path": folder}.get(key, Path("in.json"))
    output = folder / "in.json" if place == folder else place
    value = f"[{place}]" if "list" in key else str(place)
    more = ["data.train=null"] if key == "data.path" else []
    status, _, err = run_cli(
        "evaluate", f"adapter={adapters[0]}", f"{key.split()[0]}={value}", f"output={output}", *more
    )
    assert status == 2
    assert "what evaluate reads" in " ".join(err.split())
    assert Path("in.json").read_text() == content
    assert not list(folder.iterdir())


RING, NOBODY = "ring", "~nouser/x"
PATHS = {
    **{
        f"{verb} output={place}{end}": [verb, "adapter=A", reads, f"output={place}{end}"]
        for place in (RING, NOBODY)
        for verb, reads, end in (
            ("predict", "input=in.jsonl", ".jsonl"),
            ("evaluate", "data.test=in.jsonl", ".json"),
        )
    },
    **{
        f"{verb} output={place}": [verb, "adapter=A", f"output={place}"]
        for place in (RING, NOBODY)
        for verb in ("merge", "export", "combine")
    },
    **{
        f"import {key}={NOBODY}": ["import", f"{other}=o", f"{key}={NOBODY}"]
        for key, other in (("source", "output"), ("output", "source"))
    },
    f"predict input={NOBODY}": ["predict", "adapter=A", f"input={NOBODY}"],
    f"predict adapter={NOBODY}": ["predict", f"adapter={NOBODY}", "text=x"],
    f"data.test={NOBODY}": ["evaluate", "adapter=A", f"data.test='{NOBODY}'"],
    f"data.train={NOBODY}": ["check", f"data.train='{NOBODY}'", "model.name_or_path=BASE"],
    f"model.name_or_path={NOBODY}": ["plan", f"model.name_or_path='{NOBODY}'"],
    f"model.tokenizer={NOBODY}": [
        *("check", "model.name_or_path=BASE", "data.train=in.jsonl"),
        f"model.tokenizer='{NOBODY}'",
    ],
    f"resume={NOBODY}": ["train", f"resume={NOBODY}"],
    f"resume={RING}": ["train", f"resume={RING}"],
    f"report={NOBODY}": ["report", NOBODY],
    f"hydra.sweep.dir={RING}": [
        *("train", "-m", "model.name_or_path=BASE", "data.train=in.jsonl", "seed=1,2"),
        f"hydra.sweep.dir={RING}",
    ],
    **{
        said: [
            *("check", "model.name_or_path=BASE", "data.train=in.jsonl"),
            f"data.cache_dir='{place}'",
        ]
        for place, said in ((RING, f"/{RING}: "), (NOBODY, f"data.cache_dir={NOBODY}"))
    },
}


@pytest.mark.parametrize("said", PATHS)
def test_path_that_cannot_be_resolved_is_refused_by_its_setting(said, run_cli, adapters, tiny_bert):
    for end in ("", ".json", ".jsonl"):
        Path(f"{RING}{end}").symlink_to(f"other{end}")
        Path(f"other{end}").symlink_to(f"{RING}{end}")
    before = sorted(os.listdir())
    filled = {"adapter=A": f"adapter={adapters[0]}"}
    filled["model.name_or_path=BASE"] = f"model.name_or_path={tiny_bert}"
    status, _, err = run_cli(*(filled.get(item, item) for item in PATHS[said]))
    assert status == 2, err
    assert said.split()[-1] in " ".join(err.split())
    assert "Traceback" not in err
    assert sorted(os.listdir()) == before
