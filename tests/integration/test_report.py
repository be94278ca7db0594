"""What a sweep's report says, against numbers worked out here."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
from itertools import product
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lora_lightning.config.compose import compose_config
from lora_lightning.lora import UserError
from lora_lightning.sweeps.folder import note
from lora_lightning.sweeps.report import read_sweep, report
from lora_lightning.sweeps.report.plots import pareto_front
from lora_lightning.sweeps.report.tables import best_lines
from lora_lightning.utils.locks import locked

RANKS, RATIOS, SEEDS = (2, 4, 8), (1, 2), (0, 1)


def accuracy(rank: int, ratio: int, seed: int) -> float:
    return 0.8 + 0.01 * rank - 0.02 * ratio + 0.005 * seed


def write_run(folder: Path, overrides: list[str], result: dict | None, curve=()) -> None:
    """A run's folder as far as a report reads it."""
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    config = compose_config(overrides)
    (folder / ".hydra/config.yaml").write_text(OmegaConf.to_yaml(config))
    (folder / ".hydra/overrides.yaml").write_text(OmegaConf.to_yaml(overrides))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    if curve:
        (folder / "csv").mkdir()
        lines = ["step,train/loss,val/accuracy", "1,0.7,", *(f"{s},,{v}" for s, v in curve)]
        (folder / "csv/metrics.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def sweep_dir(tmp_path) -> Path:
    """12 complete jobs, one that failed, one that runs, and one that waits."""
    root = tmp_path / "sweep"
    for job, (rank, ratio, seed) in enumerate(product(RANKS, RATIOS, SEEDS)):
        value = accuracy(rank, ratio, seed)
        result = {
            "status": "completed",
            "objective": value,
            "val/accuracy": value,
            "test/accuracy": value - 0.1,
            "trainable_parameters": 1000 * rank,
            "seconds": 2.0,
            "device": "cpu",
            "precision": "32-true",
            "versions": {"python": "3.11", "torch": "2.13"},
        }
        overrides = [f"lora.rank={rank}", f"lora.alpha_ratio={ratio}", f"seed={seed}"]
        write_run(root / str(job), [*overrides, "lora.use_rslora=true"], result, [(5, value)])
    more = ["lora.alpha_ratio=1", "seed=0", "lora.use_rslora=true"]
    failed = {"status": "failed", "error": "UserError: <rank> is too large\nand so on"}
    write_run(root / "12", ["lora.rank=16", *more], failed)
    write_run(root / "13", ["lora.rank=32", *more], {"status": "running"}, [(5, 0.4)])
    write_run(root / "14", ["lora.rank=64", *more], None)
    return root


def test_settings_are_means_over_seeds_the_best_first(sweep_dir):
    sweep = read_sweep(sweep_dir)
    assert sweep.varied == ["lora.rank", "lora.alpha_ratio", "seed"]
    assert sweep.counts() == "12 completed, 1 failed, 1 running, 1 waiting"
    best = sweep.settings[0]
    assert best.values == {"lora.rank": "8", "lora.alpha_ratio": "1"}
    values = [accuracy(8, 1, seed) for seed in SEEDS]
    assert best.mean("objective") == pytest.approx(statistics.fmean(values))
    assert best.deviation("objective") == pytest.approx(statistics.stdev(values))
    means = [setting.mean("objective") for setting in sweep.settings[:6]]
    assert means == sorted(means, reverse=True)
    assert len(sweep.settings) == 9
    assert (sweep.best.jobs, sweep.headline) == ("8 9", "test/accuracy")
    assert sweep.best.runs[0].adapter == {
        "rank": 8,
        "alpha": 8.0,
        "scale": pytest.approx(8 / 8**0.5),
    }


def test_what_is_wrong_with_each_job_is_said_once(sweep_dir, capsys):
    for job in ("3", "13", "14"):
        failed = {"status": "failed", "error": "UserError: <rank> is too large"}
        (sweep_dir / job / "result.json").write_text(json.dumps(failed))
    report(sweep_dir)
    assert "jobs 3 12 13 14 failed: <rank> is too large\n" in capsys.readouterr().out
    assert "* job 3 12 13 14: &lt;rank&gt; is too large\n" in (sweep_dir / "report.md").read_text()


@pytest.mark.parametrize(("marked", "step"), [({}, 6), ({"first_step": 1}, 5)])
def test_curves_count_steps_from_one(marked, step, tmp_path):
    """Runs of earlier versions, whose result has no mark, count from 0."""
    write_run(tmp_path / "0", [], {"status": "running", **marked}, [(5, 0.4)])
    assert read_sweep(tmp_path).runs[0].curve == [(step, 0.4)]


def test_where_less_is_better_the_least_is_the_best(sweep_dir):
    for path in sweep_dir.glob("*/.hydra/config.yaml"):
        config = OmegaConf.load(path)
        config.task.monitor = "val/loss"
        OmegaConf.save(config, path)
    assert read_sweep(sweep_dir).best.jobs == "2 3"  # rank 2, ratio 2


def test_what_is_written(sweep_dir, capsys):
    report(sweep_dir)
    said = capsys.readouterr().out
    assert "job 12 failed: <rank> is too large" in said
    assert f"tensorboard --logdir {sweep_dir}\n" in said
    rows = list(csv.DictReader((sweep_dir / "results.csv").open()))
    assert [row["job"] for row in rows] == [str(job) for job in range(15)]
    for row, (rank, ratio, seed) in zip(rows, product(RANKS, RATIOS, SEEDS), strict=False):
        assert float(row["objective"]) == accuracy(rank, ratio, seed)
        assert float(row["scale"]) == pytest.approx(ratio * rank / rank**0.5)
        assert (row["seed"], row["test/accuracy"]) == (
            str(seed),
            str(accuracy(rank, ratio, seed) - 0.1),
        )
    assert (rows[12]["objective"], rows[12]["error"]) == ("", "<rank> is too large")
    markdown = (sweep_dir / "report.md").read_text()
    assert "| 8 9 | 8 | 1 | 2.828 | 0.8625 ± 0.0035 | 0.7625 ± 0.0035 | 8,000 | 2 s |" in markdown
    page = (sweep_dir / "report.html").read_text()
    for text in (markdown, page):
        assert "Made with cpu 32-true, python 3.11, torch 2.13." in text
    assert page.count("<svg") == 4
    assert "&lt;rank&gt; is too large" in page
    assert "<rank>" not in page
    for rank, ratio in product(RANKS, RATIOS):  # each cell of the heatmap
        assert f"{statistics.fmean(accuracy(rank, ratio, s) for s in SEEDS):.4f}</text>" in page
    linked = re.findall(r"(?:src|href)=[\"']?([^\"' >]+)", page)
    assert all(target.startswith(("#", "data:")) for target in linked)  # nothing to load
    sweep = read_sweep(sweep_dir)
    command = shlex.split(dict(best_lines(sweep.best, sweep))["Again"])
    assert command[:2] == ["lora-lightning", "train"]
    assert not any(item.startswith("seed=") for item in command)
    again = compose_config(command[2:])
    assert (again.lora.rank, again.lora.alpha_ratio) == (8, 1)
    before = page
    report(sweep_dir)
    assert (sweep_dir / "report.html").read_text() == before


def test_runs_of_a_sweep_that_is_gone_are_not_running(sweep_dir):
    with locked(sweep_dir, setting="hydra.sweep.dir"):
        assert read_sweep(sweep_dir).counts() == "12 completed, 1 failed, 1 running, 1 waiting"
    assert read_sweep(sweep_dir).counts() == "12 completed, 1 failed, 1 interrupted, 1 waiting"


def test_what_halving_has_not_finished_shows_where_it_stands(sweep_dir):
    rung = {"planned": 80, "monitor": "val/accuracy"}
    rungs = [{**rung, "step": step, "value": step / 100} for step in (10, 20)]
    paused = {"status": "paused", "steps": 20, "rungs": rungs}
    write_run(sweep_dir / "13", ["lora.rank=32", "seed=0"], paused)
    report(sweep_dir)
    markdown = (sweep_dir / "report.md").read_text()
    assert "| 0.2000 at step 20 |" in markdown
    assert "of the optimizer steps of all jobs to their end so far." in markdown
    for job in ("13", "14"):
        write_run(sweep_dir / job, ["lora.rank=32", "seed=0"], {**paused, "status": "stopped"})
    report(sweep_dir)
    assert "so far" not in (sweep_dir / "report.md").read_text()


@pytest.mark.parametrize("width", [60, 200])
def test_a_narrow_terminal_goes_without_some_columns(sweep_dir, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    report(sweep_dir)
    out = capsys.readouterr().out
    assert "val/loss" in out or "val/accuracy" in out
    assert "status" in out
    assert ("tokens/s" in out) == (width == 200)


def test_pareto_front():
    points = [(1, 0.5), (2, 0.7), (2, 0.6), (3, 0.7), (4, 0.9), (5, 0.8)]
    assert pareto_front(points) == {0, 1, 4}


def test_mistakes_are_told(tmp_path, run_cli):
    with pytest.raises(UserError, match="holds no run"):
        read_sweep(tmp_path)
    write_run(tmp_path / "multirun/day/hour/3", ["lora.rank=2"], None)
    note(tmp_path / "multirun/day/hour", ["lora.rank=2"], "running")
    with pytest.raises(UserError, match="the newest: .*multirun/day/hour"):
        read_sweep(tmp_path / "multirun")
    with pytest.raises(UserError, match="give the folder of its sweep: .*multirun/day/hour\\."):
        read_sweep(tmp_path / "multirun/day/hour/3")
    for arguments, told in (
        ([str(tmp_path / "none")], "no such folder"),
        ([], "takes the folder of a sweep"),
        (["lora.rank=2"], "takes the folder of a sweep"),
    ):
        status, _, err = run_cli("report", *arguments)
        assert status == 2
        assert told in err


MARKUP = "<img src=x onerror=alert(1)>|`a`\n\n```\n# b ![](http://c)"
SHOWN = "&lt;img src=x onerror=alert(1)&gt;&#124;&#96;a&#96;\\n\\n&#96;&#96;&#96;\\n# b ![]&#40;http://c)"


def test_values_of_others_are_plain_text_in_markdown(tmp_path):
    """In cells, errors, names and the command, which is a block of its own."""
    folder = tmp_path / MARKUP.replace("/", "").replace("\n", "")
    values = (MARKUP, "b")
    for job, value in enumerate(values):
        quoted = value.replace("'", "\\'")
        result = {"status": "completed", "objective": 1.0 - job, "versions": {MARKUP: "1"}}
        write_run(folder / str(job), [f"tags=['{quoted}']"], result)
    failed = {"status": "failed", "error": MARKUP.replace("\n", " ")}
    write_run(folder / "2", ["tags=[c]"], failed)
    report(folder)
    text = (folder / "report.md").read_text()
    assert f"| 0 | ['{SHOWN}'] |" in text
    assert f"Made with {SHOWN} 1." in text
    plain, command = re.split(r"(?m)^````bash\n", text)
    command, rest = re.split(r"(?m)^````$", command)
    assert f"tags=['{MARKUP}']" in shlex.split(command)
    for mark in ("<", "`", "]("):
        assert mark not in plain + rest
    rows = [line for line in plain.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {rows[0].count("|")}
    assert len(rows) == 2 + 3


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t"])
def test_values_of_others_are_no_formula_in_a_table(start, tmp_path):
    """A program for tables would run =HYPERLINK(...), and show what an apostrophe begins."""
    evil = f"{start}HYPERLINK(1)"
    for job, value in enumerate((evil, "b")):
        result = {"status": "completed", "objective": -0.5, "monitor": "m"}
        write_run(tmp_path / str(job), [f"task.label_column={json.dumps(value)}"], result)
    report(tmp_path)
    with (tmp_path / "results.csv").open(newline="") as handle:
        rows = list(csv.reader(handle))
    cells = [cell for row in rows for cell in row]
    assert not [cell for cell in cells if cell.startswith(start) and not _is_number(cell)]
    assert "-0.5" in cells


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("status", ["completed", "failed", "running"])
def test_damaged_curves_of_a_run_that_has_ended_are_told(status, tmp_path, run_cli):
    write_run(tmp_path / "0", ["lora.rank=2"], {"status": status}, [(5, 0.4)])
    path = tmp_path / "0" / "csv" / "metrics.csv"
    path.write_bytes(path.read_bytes() + b"6,,0.5,7\n" + bytes(20))
    code, _, err = run_cli("report", str(tmp_path))
    assert code == 0
    told = f"warning: {path}: 2 damaged lines left out.\n"
    assert err == ("" if status == "running" else told)


OTHERS = {
    "text": lambda path: path.write_text("# My own thoughts\n"),
    "no text": lambda path: path.write_bytes(b"\xff"),
    "link": lambda path: path.symlink_to("nowhere"),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["results.csv", "report.md", "report.html"])
def test_a_file_of_others_is_not_replaced(name, kind, tmp_path, run_cli):
    write_run(tmp_path / "0", ["lora.rank=2"], {"status": "running"})
    OTHERS[kind](tmp_path / name)
    status, _, err = run_cli("report", str(tmp_path))
    assert status == 2
    assert f"{tmp_path / name} is no report of lora-lightning" in err
    assert sorted(os.listdir(tmp_path)) == sorted(["0", name])


def test_a_report_replaces_its_own_files(tmp_path):
    write_run(tmp_path / "0", ["lora.rank=2"], {"status": "running"})
    (tmp_path / "report.md").touch()
    report(tmp_path)
    write_run(tmp_path / "1", ["lora.rank=4"], {"status": "running"})
    report(tmp_path)
    assert "2 runs" in (tmp_path / "report.md").read_text()
    assert "2 runs" in (tmp_path / "report.html").read_text()
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3


FORGED_CONFIGS = {
    "no task": {"task": None},
    "no monitor": {"task": {"name": "sentiment"}},
    "a monitor of nothing": {"task": {"monitor": "${nothere}"}},
    "a monitor of itself": {"task": {"monitor": "${task.monitor}"}},
    "another kind of monitor": {"task": {"monitor": [1]}},
    "no lora": {"lora": None},
    "lora as a list": {"lora": [1]},
    "a setting that is none": {"lora": {"rank": 2, "nonsense": 1}},
    "another kind of setting": {"lora": {"rank": "two"}},
    "a rank that is none": {"lora": {"rank": -1}},
    "a seed that is none": {"seed": "${nothere}"},
    "another kind of seed": {"seed": {"a": 1}},
}
FORGED_RESULTS = [{"rungs": 5}, {"rungs": [{}]}, {"versions": [1]}, {"steps": [1]}, {"status": 1}]
FORGED_OVERRIDES = ["lora.rank=2,4", "lora.rank=range(1,3)", "lora.rank=choice(1,2)"]


@pytest.mark.parametrize("forged", [*FORGED_CONFIGS, *FORGED_RESULTS, *FORGED_OVERRIDES], ids=str)
def test_a_run_of_others_is_named_that_makes_no_sense(forged, tmp_path, run_cli):
    write_run(tmp_path / "0", ["lora.rank=2"], {"status": "running"})
    folder = tmp_path / "1"
    write_run(folder, ["lora.rank=2"], {"status": "running"})
    if isinstance(forged, dict):
        path = folder / "result.json"
        path.write_text(json.dumps(forged))
    elif forged in FORGED_CONFIGS:
        path = folder / ".hydra" / "config.yaml"
        config = OmegaConf.load(path)
        path.write_text(OmegaConf.to_yaml({**config, **FORGED_CONFIGS[forged]}))
    else:
        path = folder / ".hydra" / "overrides.yaml"
        path.write_text(OmegaConf.to_yaml([forged]))
    status, _, err = run_cli("report", str(tmp_path))
    assert status == 2
    assert err.startswith("error: ")
    assert str(path) in err


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_is_none(value, tmp_path):
    for job in range(2):
        result = {"status": "completed", "objective": value, "val/loss": value, "seconds": 1.0}
        write_run(tmp_path / str(job), ["lora.rank=2", f"seed={job}"], result)
    sweep = report(tmp_path)
    assert [run.objective for run in sweep.runs] == [None, None]
    assert sweep.best is None


def test_one_job_without_anything_measured(tmp_path, run_cli):
    write_run(tmp_path / "0", ["lora=full"], {"status": "running"})
    status, out, err = run_cli("report", str(tmp_path))
    assert status == 0, err
    assert "1 running" in " ".join(out.split())


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_in_a_browser(sweep_dir, tmp_path):
    """It is laid out: the pictures have a size and none is wider than the page."""
    report(sweep_dir)
    page = sweep_dir / "report.html"
    probe = (
        "<script>onload=()=>{document.title=JSON.stringify([...document.querySelectorAll('svg')]"
        ".map(s=>s.getBoundingClientRect()).map(r=>[r.width,r.height,r.right])"
        ".concat([[innerWidth,document.documentElement.scrollWidth,0]]))}</script>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{probe}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, probed.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    *pictures, (inner, scrolled, _) = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert len(pictures) == 4
    assert all(width > 200 and height > 100 for width, height, _ in pictures)
    assert all(right <= inner for _, _, right in pictures)
    assert scrolled <= inner


@pytest.mark.parametrize("mode", ["null", "max"])
def test_the_best_of_losses_is_the_lowest(tmp_path, mode):
    """The second as runs have it that were made before such a mode was refused."""
    for job, value in enumerate((0.674, 0.633, 0.608)):
        overrides = ["task.monitor=val/loss", f"task.mode={mode}", "seed=0", f"lora.rank={job + 1}"]
        write_run(tmp_path / str(job), overrides, {"status": "completed", "objective": value})
    sweep = read_sweep(tmp_path)
    assert [setting.runs[0].job for setting in sweep.settings] == ["2", "1", "0"]
    assert sweep.best is not None
    assert sweep.best.jobs == "2"


def _small_sweep(root: Path, values: dict[int, tuple[float, ...]], *, monitor="val/f1") -> Path:
    """Settings by rank with a value for each seed, on 20 rows."""
    job = 0
    for rank, found in values.items():
        for seed, value in enumerate(found):
            result = {
                "status": "completed",
                "objective": value,
                "rows": {"train": 100, "val": 20, "test": 20},
                "baseline": {"name": "majority class", "val/f1": 0.35, "val/accuracy": 0.55},
                "warnings": ["only 20 val rows: each makes 5 % of the metrics"],
            }
            given = [f"task.monitor={monitor}", f"lora.rank={rank}", f"seed={seed}"]
            write_run(root / str(job), given, result)
            job += 1
    return root


def test_no_lucky_seed_is_the_best(tmp_path, capsys):
    """Rank 4 has the best mean; rank 16 the best single run, by luck."""
    values = {2: (0.70, 0.72), 4: (0.95, 0.96), 8: (0.94, 0.95), 16: (1.0, 0.88), 32: (0.2, 0.3)}
    root = _small_sweep(tmp_path / "sweep", values)
    hydra = {
        "overrides": {"hydra": ["hydra.searchpath=[file:///my conf]", "hydra.mode=MULTIRUN"]},
        "job": {"config_name": "whole"},
    }
    (root / "2/.hydra/hydra.yaml").write_text(OmegaConf.to_yaml({"hydra": hydra}))
    sweep = read_sweep(root)
    lines = dict(best_lines(sweep.best, sweep))
    assert lines["Best"] == "lora.rank=4: val/f1 0.9550 ± 0.0071, mean of 2 seeds"
    assert lines["Doubts"].startswith("one of 20 rows is 5 % of val/f1; the seeds share their rows")
    assert lines["Beside"] == "majority class: val/f1 0.3500"
    assert lines["Warning"] == "only 20 val rows: each makes 5 % of the metrics"
    assert lines["Adapter"] == f"{root / '2/adapter'} (the first of jobs 2 3)"
    command = shlex.split(lines["Again"])
    assert command[2:5] == ["--config-name", "whole", "hydra.searchpath=[file:///my conf]"]
    assert command[5:] == ["task.monitor=val/f1", "lora.rank=4"]

    def apart(rank: int) -> bool:
        pairs = [(statistics.fmean(values[r]), statistics.stdev(values[r])) for r in (4, rank)]
        variance = sum(s**2 / 2 + m * (1 - m) / 20 for m, s in pairs)
        return abs(pairs[0][0] - pairs[1][0]) > 2 * variance**0.5

    near = [f"lora.rank={rank}" for rank in (8, 16, 2, 32) if not apart(rank)]
    assert "lora.rank=16" in near
    assert "lora.rank=32" not in near
    assert [one.name for one in sweep.alike()] == near
    assert lines["Alike"].endswith(f"so not told from it: {'; '.join(near)}")
    report(root)
    out = " ".join(capsys.readouterr().out.split())
    assert all(line in out for line in lines.values())


def test_one_seed_of_a_loss_tells_no_difference(tmp_path):
    root = _small_sweep(tmp_path / "sweep", {2: (0.70,), 4: (0.69,)}, monitor="val/loss")
    sweep = read_sweep(root)
    lines = dict(best_lines(sweep.best, sweep))
    assert lines["Best"] == "lora.rank=4: val/loss 0.6900, one seed"
    assert "a seed each does not tell" in lines["Alike"]
    assert lines["Again"].endswith("task.monitor=val/loss lora.rank=4 seed=0")
