"""Every mistake of a user: status 2, one message that says what is wrong and the fix, no traces."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.asserts import contents
from helpers.data import make_rows, to_jsonl
from helpers.runs import result_of


@dataclass
class Place:
    """What a case works with: a folder of its own, a model, data, an adapter trained on both."""

    root: Path
    bert: Path
    llama: Path
    rows: Path
    fast: list[str]
    run: Path

    def train(self, *overrides: str) -> list[str]:
        """Arguments of a run that would succeed but for `overrides`."""
        return self._run("train", *overrides)

    def check(self, *overrides: str) -> list[str]:
        return self._run("check", *overrides)

    def _run(self, verb: str, *overrides: str) -> list[str]:
        base = [f"model.name_or_path={self.bert}", f"data.train={self.rows}", "output_dir=out"]
        return [verb, *self.fast, *base, *overrides]

    def on(self, name: str, content: str | bytes, *overrides: str) -> list[str]:
        """Arguments of a run on a data file of this name and content."""
        return self.train(f"data.train={self.write(name, content)}", *overrides)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def adapter(self, damage: Callable[[Path], object] = lambda folder: None) -> Path:
        """A copy of the trained adapter, damaged."""
        copy = self.root / "adapter"
        shutil.copytree(self.run / "adapter", copy)
        damage(copy)
        return copy

    def model(self, damage: Callable[[Path], object]) -> Path:
        """A copy of the tiny BERT, damaged."""
        copy = self.root / "model"
        shutil.copytree(self.bert, copy)
        damage(copy)
        return copy

    def predict(self, *overrides: str) -> list[str]:
        return ["predict", f"adapter={self.run / 'adapter'}", *overrides]


ONE_CPU = ("trainer.accelerator=cpu", "trainer.devices=1")
IN_SHARES = ("tensor parallel size", "rows for two processes")
"""Cases that leave behind what Lightning tells the processes that it starts."""


class Case(NamedTuple):
    name: str
    arguments: Callable[[Place], list[str]]
    says: str
    fix: str


def jsonl(*rows: object) -> str:
    return to_jsonl(rows)


def table(rows: list[dict[str, str]]) -> str:
    return "text,label\n" + "".join(
        f"{row['text'].replace(',', '')},{row['label']}\n" for row in rows
    )


ROWS = make_rows(40)
OTHER_TABLE = "words,label\na,b\n"
LABEL_IN_DOUBT = {"text": "a good film", "label": "positve"}


def change_json(path: Path, key: str) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "x"}))


def empty_task_state(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_state": {}}))


def truncate(path: Path, keep: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def change_tensor(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file({**tensors, first: change(tensors[first])}, path)


def other_bert(place: Place, **sizes: int) -> Path:
    """A base model like the tiny BERT but of other weights, and of other sizes if any are given."""
    from transformers import BertConfig, BertModel

    copy = place.root / "other"
    shutil.copytree(place.bert, copy)
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(place.bert, **sizes)
    BertModel(config).save_pretrained(copy)
    return copy


def tensors_of(place: Place, *names: str) -> Path:
    """A safetensors file with small matrices of these names."""
    path = place.root / "other.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, path)
    return path


def to_llama(place: Place) -> list[str]:
    return ["output=new", "task=lm", f"model.name_or_path={place.llama}"]


def run_folder(place: Place) -> Path:
    return Path(shutil.copytree(place.run, place.root / "run"))


COMMAND = [
    Case("no such verb", lambda p: ["trian"], "trian: unknown verb", "'train'"),
    Case("no such flag", lambda p: p.train("--multrun"), "--multrun", "--multirun"),
    Case("no override", lambda p: p.train("lora.rank"), "lora.rank", "KEY=VALUE"),
    Case("several values", lambda p: p.train("lora.rank=2,4"), "lora.rank=2,4", "-m lora.rank=2,4"),
    Case("unknown key", lambda p: p.train("lora.rnk=4"), "lora.rnk", "'lora.rank'"),
    Case("unknown key, check", lambda p: p.check("lora.rnk=4"), "lora.rnk", "'lora.rank'"),
    Case("plan, device", lambda p: ["plan", "device_gib=much"], "device_gib=much", "a number"),
    Case("plan, no device", lambda p: ["plan", "device_gib=0"], "device_gib", "must be above 0"),
    Case(
        "plan, int8",
        lambda p: ["plan", "model.quantization=int8"],
        "model.quantization=int8",
        "lora-lightning check",
    ),
    Case(
        "plan, new tokens", lambda p: ["plan", "model.new_tokens=[one]"], "model.new_tokens", "out"
    ),
    Case(
        "plan, an optimizer that looks at values",
        lambda p: ["plan", f"model.name_or_path={p.bert}", "optim.name=ASGD"],
        "optim.name=ASGD",
        "Use AdamW",
    ),
    Case(
        "plan, too long",
        lambda p: ["plan", f"model.name_or_path={p.bert}", "data.max_length=65"],
        "data.max_length=65",
        "at most 64",
    ),
    Case(
        "plan, no folder",
        lambda p: ["plan", "model.name_or_path=./no-such"],
        "./no-such",
        "config.json",
    ),
    Case("unknown key, sweep", lambda p: p.train("-m", "lora.rnk=4,8"), "lora.rnk", "'lora.rank'"),
    Case(
        "unknown key beside --cfg",
        lambda p: [*p.train("optim.rate=1"), "--cfg", "job"],
        "optim.rate",
        "--cfg job",
    ),
    Case("unknown choice", lambda p: p.train("lora=defalt"), "lora=defalt", "'default'"),
    Case("wrong type", lambda p: p.train("lora.rank=eight"), "lora.rank", "Integer"),
    Case(
        "no argument of the Trainer",
        lambda p: p.train("+trainer.epochs=1"),
        "trainer.epochs",
        "max_epochs",
    ),
    Case(
        "accelerator", lambda p: p.train("trainer.accelerator=gqu"), "trainer: ", "Available names"
    ),
    Case(
        "callback without _target_",
        lambda p: p.train("+callbacks.mine.patience=3"),
        "mine",
        "_target_",
    ),
    Case(
        "callback of no class",
        lambda p: p.train("+callbacks.mine._target_=nowhere.Nothing"),
        "nowhere.Nothing",
        "_target_",
    ),
    Case(
        "callback with wrong arguments",
        lambda p: p.train("+callbacks.samples.number=3"),
        "samples",
        "number",
    ),
    Case(
        "folder by Hydra's name",
        lambda p: p.train("hydra.run.dir=a"),
        "hydra.run.dir",
        "output_dir=",
    ),
    Case(
        "rank 0 in a sweep",
        lambda p: p.train("-m", "lora.rank=8,0", "seed=1,2,3"),
        "lora.rank",
        "at least 1",
    ),
]

LORA = [
    Case("rank 0", lambda p: p.train("lora.rank=0"), "lora.rank", "at least 1"),
    Case("targets", lambda p: p.train("lora.targets=[quary]"), "'quary'", "'query'"),
    Case("exclude", lambda p: p.train("lora.exclude=[pooller]"), "lora.exclude", "pooler"),
    Case("exclude all", lambda p: p.train("lora.exclude='.*'"), "leaves no module", "matched"),
    Case("layers", lambda p: p.train("lora.layers=[7]"), "lora.layers", "0 to 1"),
    Case(
        "parameter",
        lambda p: p.train("lora.target_parameters=[experts.gate_up_proj]"),
        "'experts.gate_up_proj' matches no parameter",
        "lora.targets",
    ),
    Case(
        "parts of a layer",
        lambda p: p.train("+lora.parts={query:{a:16,b:15}}"),
        "16 (a) + 15 (b) is 31",
        "32 outputs",
    ),
    Case(
        "parts of no layer",
        lambda p: p.train("+lora.parts={quary:[a,b]}"),
        "lora.parts: 'quary'",
        "'query'",
    ),
    Case(
        "modules_to_save",
        lambda p: p.train("lora.modules_to_save=[poler]"),
        "lora.modules_to_save",
        "pooler",
    ),
    Case(
        "pattern of a rank",
        lambda p: p.train("+lora.rank_pattern={quary:4}"),
        "lora.rank_pattern",
        "'query'",
    ),
    Case(
        "eva without a linear layer",
        lambda p: p.train("lora=eva", "lora.targets=[word_embeddings]"),
        "linear layers",
        "lora.init=eva",
    ),
]

DATA = [
    Case(
        "missing file",
        lambda p: p.train(f"data.train={p.write('reviews.csv', 'x').with_name('review.csv')}"),
        ": not found",
        "'reviews.csv'",
    ),
    Case(
        "missing folder", lambda p: p.train("data.train=no/a.csv"), "folder no ", "does not exist"
    ),
    Case("empty file", lambda p: p.on("a.csv", ""), "a.csv: is empty", "rows"),
    Case("header alone", lambda p: p.on("a.csv", "text,label\n"), "must hold rows", "data.train"),
    Case("ending", lambda p: p.on("a.xlsx", "x"), "a.xlsx", ".jsonl"),
    Case("zero byte", lambda p: p.on("a.csv", b"text,label\na\0b,x\n"), "line 2", "UTF-8"),
    Case("encoding", lambda p: p.on("a.csv", b"text,label\nsch\xf6n,x\n"), "line 2", "iconv"),
    Case("broken JSONL", lambda p: p.on("a.jsonl", jsonl(*ROWS) + '{"text": '), "line 41", "JSON"),
    Case("JSONL of lists", lambda p: p.on("a.jsonl", jsonl(*ROWS, [1])), "line 41", '"column"'),
    Case(
        "names that a zero cuts",
        lambda p: p.on("a.json", '[{"text": "a", "label": {"": null, "\\u0000": null}}]'),
        "'label'",
        "Rename one",
    ),
    Case("broken JSON", lambda p: p.on("a.json", '[{"text": "a"}'), "a.json", "JSON"),
    Case("JSON of numbers", lambda p: p.on("a.json", "[1, 2]"), "a.json", "list of objects"),
    Case("JSON of one number", lambda p: p.on("a.json", "3"), "a.json", "list of objects"),
    Case("no parquet", lambda p: p.on("a.parquet", "text"), "PARQUET", "ending"),
    Case(
        "unclosed quote in CSV",
        lambda p: p.on("a.csv", 'text,label\n"a,x\nb,y\n'),
        "cannot be read as CSV",
        "double quotes",
    ),
    Case("ragged CSV", lambda p: p.on("a.csv", "text,label\na,x\nb,y,z,w\n"), "line 3", "quotes"),
    Case(
        "files of different columns",
        lambda p: p.train(
            f"data.train=[{p.write('a.csv', table(ROWS))},{p.write('b.csv', OTHER_TABLE)}]"
        ),
        "b.csv",
        "columns",
    ),
    Case(
        "empty folder",
        lambda p: p.train(f"data.train={p.write('d/x.md', '').parent}"),
        "must hold .txt",
        ".csv",
    ),
    Case(
        "text column",
        lambda p: p.train("task.text_column=txt"),
        "task.text_column=txt",
        "'text'",
    ),
    Case("label column", lambda p: p.train("task.label_column=labl"), "labl", "'label'"),
    Case(
        "no text column",
        lambda p: p.on(
            "a.jsonl", jsonl(*({"x": row["text"], "label": row["label"]} for row in ROWS))
        ),
        "usual name for the text",
        "task.text_column=",
    ),
    Case(
        "no label column",
        lambda p: p.on(
            "a.jsonl", jsonl(*({"text": row["text"], "y": row["label"]} for row in ROWS))
        ),
        "usual name for the label",
        "task.label_column=",
    ),
    Case(
        "unknown label in val",
        lambda p: p.train(f"data.val={p.write('v.jsonl', jsonl(*ROWS, LABEL_IN_DOUBT))}"),
        "'positve' in row 41",
        "'positive'",
    ),
    Case(
        "unknown label in test",
        lambda p: p.train(f"data.test={p.write('v.jsonl', jsonl(LABEL_IN_DOUBT))}"),
        "'positve' in row 1",
        "'positive'",
    ),
    Case(
        "missing label",
        lambda p: p.on(
            "a.jsonl", jsonl(*ROWS, {"text": "a", "label": None}), "data.val_fraction=0"
        ),
        "first row 41",
        "Fill it in",
    ),
    Case(
        "no label in val",
        lambda p: p.train(f"data.val={p.write('v.jsonl', jsonl({'text': 'a'}))}"),
        "val data: column 'label' not found",
        "text",
    ),
    Case(
        "no label anywhere",
        lambda p: p.on("a.jsonl", jsonl(*({**row, "label": ""} for row in ROWS))),
        "column 'label': is empty in all",
        "Fill it in",
    ),
    Case(
        "one class", lambda p: p.on("a.jsonl", jsonl(*ROWS[::2])), "only 'negative'", "two classes"
    ),
    Case(
        "label is a list",
        lambda p: p.on("a.jsonl", jsonl(*({**row, "label": [row["label"]]} for row in ROWS))),
        "row 1, column 'label': a label must be a name or a number, and is a list",
        "task.label_column=NAME",
    ),
    Case(
        "label is an object",
        lambda p: p.on("a.jsonl", jsonl(*({**row, "label": {"is": 1}} for row in ROWS))),
        "row 1, column 'label': a label must be a name or a number, and is an object",
        "task.label_column=NAME",
    ),
    Case("no UTF-8", lambda p: p.train("data.train=caf\udce9"), "caf\\udce9", "Rename"),
    Case(
        "labels all distinct",
        lambda p: p.on("a.jsonl", jsonl(*({**ROWS[0], "label": f"{i} x"} for i in range(80)))),
        "too many for a class label",
        "task.label_column=",
    ),
    Case("class named twice", lambda p: p.train("task.labels=[a,b,a]"), "twice", "task.labels"),
    Case(
        "all texts empty",
        lambda p: p.on(
            "a.jsonl", jsonl(*({**row, "text": " ", "n": i} for i, row in enumerate(ROWS)))
        ),
        "empty text in all",
        "task.text_column",
    ),
    Case(
        "all cut away", lambda p: p.train("data.max_length=2"), "data.max_length=2", "at least 16"
    ),
    Case("longer than the model", lambda p: p.train("data.max_length=65"), "data.max_length", "64"),
    Case(
        "too few rows",
        lambda p: p.on("a.jsonl", jsonl(*ROWS[:4])),
        "4 rows are too few",
        "data.val",
    ),
    Case(
        "no validation",
        lambda p: p.train("data.val_fraction=0"),
        "data.val: must be given",
        "data.val=FILE",
    ),
    Case(
        "no training data",
        lambda p: p.train("data.train=null", "data=files"),
        "data: must be given",
        "FILE",
    ),
    Case(
        "only test data",
        lambda p: p.train("data.train=null", f"data.test={p.rows}"),
        "train",
        "FILE",
    ),
    Case("files and hub", lambda p: p.train("data.path=org/name"), "data.path", "either"),
    Case(
        "hub dataset offline",
        lambda p: p.train("data.train=null", "data.path=org/name"),
        "data.path=org/name",
        "network",
    ),
    Case(
        "embedded", lambda p: p.train("data.train=null", "data.embedded=revews"), "revews", "Known"
    ),
]

MODEL = [
    Case("hub model offline", lambda p: p.train("model.name_or_path=org/x"), "org/x", "network"),
    Case("model folder", lambda p: p.train("model.name_or_path=./none"), "./none", "config.json"),
    Case(
        "without config.json",
        lambda p: p.train(f"model.name_or_path={p.model(lambda m: (m / 'config.json').unlink())}"),
        "holds no config.json",
        "model.name_or_path",
    ),
    Case(
        "config.json corrupt",
        lambda p: p.train(f"model.name_or_path={p.model(lambda m: truncate(m / 'config.json'))}"),
        "config",
        "model.name_or_path",
    ),
    Case(
        "without weights",
        lambda p: p.train(
            f"model.name_or_path={p.model(lambda m: (m / 'model.safetensors').unlink())}"
        ),
        "model.safetensors",
        "model.name_or_path",
    ),
    Case(
        "weights truncated",
        lambda p: p.train(
            f"model.name_or_path={p.model(lambda m: truncate(m / 'model.safetensors'))}"
        ),
        "cannot load the model",
        "model.safetensors",
    ),
    Case(
        "without tokenizer",
        lambda p: p.train(
            f"model.name_or_path={p.model(lambda m: [f.unlink() for f in m.glob('tokenizer*')])}"
        ),
        "tokenizer_config.json",
        "model.tokenizer",
    ),
    Case(
        "another architecture's weights",
        lambda p: p.train(
            f"model.name_or_path={p.model(lambda m: shutil.copy(p.llama / 'config.json', m))}"
        ),
        "lacks most weights",
        "another model",
    ),
    Case(
        "no such architecture",
        lambda p: p.train(
            f"model.name_or_path={p.model(lambda m: change_json(m / 'config.json', 'model_type'))}"
        ),
        "`x`",
        "model.name_or_path",
    ),
    Case(
        "package", lambda p: p.train("model.name_or_path=pkg://no_pkg/m"), "no_pkg", "pip install"
    ),
    Case(
        "package folder",
        lambda p: p.train("model.name_or_path=pkg://torch/no"),
        "torch/no",
        "folder",
    ),
    Case("float16", lambda p: p.train("model.dtype=float16"), "float16", "16-mixed"),
    Case(
        "Lightning's own deepspeed",
        lambda p: p.train("trainer.strategy=deepspeed_stage_2"),
        "strategy=deepspeed_stage_2",
        "trainer=deepspeed",
    ),
    Case(
        "optimizer in shares",
        lambda p: p.train("trainer=deepspeed", *ONE_CPU, "optim.name=Adafactor"),
        "optim.name=Adafactor",
        "trainer=ddp",
    ),
    Case(
        "nodes",
        lambda p: p.train("trainer.num_nodes=2"),
        "num_nodes=2: requires the address of the other machines",
        "MASTER_ADDR",
    ),
    Case(
        "a number of devices",
        lambda p: p.train("trainer.accelerator=cpu", f"trainer.devices={10**15}"),
        "trainer.devices=1000000000000000",
        "at most 256",
    ),
    Case(
        "rows for two processes",
        lambda p: p.train(
            *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.limit_test=1")
        ),
        "at least 2 rows for 2 processes, and holds 1",
        "fewer trainer.devices",
    ),
    Case("torchrun", lambda p: p.train("trainer=torchrun"), "trainer=torchrun", "trainer=ddp"),
    Case("slurm", lambda p: p.train("trainer=slurm", *ONE_CPU), "srun has started", "trainer=ddp"),
    Case("fsdp 1", lambda p: p.train("trainer.strategy=fsdp"), "strategy=fsdp", "trainer=fsdp2"),
    Case(
        "tensor parallel size",
        lambda p: p.train("trainer=tp", *ONE_CPU, "trainer.strategy.tensor_parallel_size=2"),
        "tensor_parallel_size=2: must divide",
        "1 processes",
    ),
    Case(
        "full in shares",
        lambda p: p.train("trainer=fsdp2", *ONE_CPU, "lora=full"),
        "lora=full",
        "trainer=ddp",
    ),
    Case(
        "new token that is known",
        lambda p: p.train("model.new_tokens=[aa,good]"),
        "the tokenizer already has 'good'",
        "lora.trainable_token_indices=[",
    ),
    Case(
        "index of no token",
        lambda p: p.train("lora.trainable_token_indices=[100000]"),
        "index 100000 is not in",
        "lora.trainable_token_indices",
    ),
    Case("precision", lambda p: p.train("trainer.precision=16-true"), "16-true", "bf16-mixed"),
    Case("no precision", lambda p: p.train("trainer.precision=bf17"), "bf17", "bf16-mixed"),
    Case(
        "full in bfloat16",
        lambda p: p.train("lora=full", "model.dtype=bfloat16"),
        "lora=full",
        "model.dtype=float32",
    ),
    Case("attention", lambda p: p.train("model.attn_implementation=fast"), "fast", "eager"),
]

TRAINING = [
    Case("optimizer", lambda p: p.train("optim.name=Adamw"), "optim.name", "'AdamW'"),
    Case("its options", lambda p: p.train("+optim.options.beta=1"), "AdamW", "beta"),
    Case("schedule", lambda p: p.train("optim.scheduler=linea"), "optim.scheduler", "'linear'"),
    Case("schedule, check", lambda p: p.check("optim.scheduler=linea"), "=linea:", "'linear'"),
    Case("monitor", lambda p: p.train("task.monitor=val/acc"), "task.monitor", "'val/accuracy'"),
    Case(
        "data to be named",
        lambda p: ["train", "data=files", "trainer.precision=32-true"],
        "data: must be given",
        "data.train=FILE",
    ),
    Case(
        "its schedule's options",
        lambda p: p.train("+optim.scheduler_options.foo=3"),
        "optim.scheduler_options",
        "foo",
    ),
    Case(
        "a run without an end",
        lambda p: p.train("trainer.max_epochs=-1"),
        "trainer.max_epochs=-1",
        "trainer.max_steps=N",
    ),
    Case(
        "validation after an epoch's end",
        lambda p: p.train("trainer.val_check_interval=500"),
        "500",
        "trainer.check_val_every_n_epoch=null",
    ),
    Case(
        "a plateau without validation",
        lambda p: p.train("optim.scheduler=greedy", "trainer.limit_val_batches=0"),
        "optim.scheduler=greedy",
        "another schedule",
    ),
    Case("seed", lambda p: p.train("seed=5000000000"), "seed=5000000000: must be", "4294967295"),
    Case(
        "epochs in letters",
        lambda p: p.train("trainer.max_epochs=x"),
        "trainer.max_epochs must be",
        "a whole number",
    ),
    Case(
        "steps in parts",
        lambda p: p.train("trainer.max_steps=1.5"),
        "trainer.max_steps must be",
        "a whole number",
    ),
    Case(
        "switch in letters",
        lambda p: p.train("trainer.detect_anomaly=maybe"),
        "trainer.detect_anomaly must be",
        "true or false",
    ),
    Case(
        "warmup beyond the end",
        lambda p: p.train("optim.warmup=1000"),
        "optim.warmup=1000: this run takes 8 optimizer steps",
        "optim.warmup=0.06",
    ),
    Case(
        "no end in sight",
        lambda p: p.train("trainer.max_epochs=-1", "trainer.max_time=00:00:10:00"),
        "the run has no end",
        "trainer.max_steps=N",
    ),
    *(
        Case(
            f"no training, {key}",
            lambda p, key=key: p.train(f"trainer.{key}=0"),
            f"trainer.{key}=0: the run would not train",
            "Leave it out",
        )
        for key in ("max_epochs", "max_steps", "limit_train_batches")
    ),
    Case(
        "no time to train",
        lambda p: p.train("+trainer.max_time={seconds: 0}"),
        "without an optimizer step",
        "trainer.max_time",
    ),
    Case(
        "two folders of a sweep",
        lambda p: p.train("-m", "lora.rank=1,2", "hydra.sweep.dir=a"),
        "both name the sweep's folder",
        "Remove",
    ),
    Case(
        "validation amid accumulation",
        lambda p: p.train("trainer.val_check_interval=3", "trainer.accumulate_grad_batches=2"),
        "trainer.val_check_interval=3",
        "multiple",
    ),
    Case("task", lambda p: p.train("task.name=clasification"), "task.name", "'classification'"),
    Case(
        "start from nothing", lambda p: p.train("adapter=no"), "no does not exist", "<run>/adapter"
    ),
    Case(
        "start from another rank",
        lambda p: p.train("lora.rank=2", f"adapter={p.run / 'adapter'}"),
        "wrong shape",
        "rank",
    ),
    Case(
        "full from an adapter",
        lambda p: p.train("lora=full", f"adapter={p.run / 'adapter'}"),
        "adapter=",
        "lora=full",
    ),
]

FOLDERS = [
    Case(
        "output below a file",
        lambda p: p.train(f"output_dir={p.write('file', '')}/out"),
        "cannot be written",
        "output_dir=",
    ),
    Case(
        "folder of a run",
        lambda p: p.train(f"output_dir={run_folder(p)}"),
        "holds a run",
        "resume=",
    ),
    Case(
        "folder of a run, check",
        lambda p: p.check(f"output_dir={run_folder(p)}"),
        "holds a run",
        "resume=",
    ),
    Case("resume nothing", lambda p: ["train", "resume=no"], "resume=no", "output_dir"),
    Case(
        "resume no run",
        lambda p: ["train", f"resume={p.root}"],
        "must be the folder of a run",
        ".hydra",
    ),
    Case(
        "resume with settings",
        lambda p: ["train", f"resume={run_folder(p)}", "optim.lr=1"],
        "resumed run keeps its config",
        "not supported with optim.lr=1",
    ),
    Case("check resume", lambda p: p.check(f"resume={p.run}"), "resume", "train resume="),
    Case(
        "resume with a broken config",
        lambda p: [
            "train",
            f"resume={p.write('run/.hydra/config.yaml', 'a: [').parent.parent}",
        ],
        "config.yaml",
        "YAML",
    ),
]

ADAPTERS = [
    Case("predict without adapter", lambda p: ["predict", "text=a"], "adapter=DIR", "RUN/adapter"),
    Case("evaluate without adapter", lambda p: ["evaluate"], "adapter=DIR", "RUN/adapter"),
    Case(
        "no such adapter",
        lambda p: ["merge", "adapter=no", "output=m"],
        "adapter=no",
        "<run>/adapter",
    ),
    Case(
        "the run for its adapter",
        lambda p: ["predict", f"adapter={p.run}", "text=a"],
        "lora_lightning.json",
        "Did you mean adapter=",
    ),
    Case("neither text nor input", lambda p: p.predict(), "one of", 'text="..."'),
    Case("both text and input", lambda p: p.predict("text=a", "input=b"), "one of", "input=FILE"),
    Case("empty text", lambda p: p.predict("text="), "text is empty", 'text="..."'),
    Case("text as a flag", lambda p: p.predict("txt=a"), "txt", "text="),
    Case("input missing", lambda p: p.predict("input=no.csv"), "input=no.csv", "not found"),
    Case(
        "input without the column",
        lambda p: p.predict(f"input={p.write('a.csv', OTHER_TABLE)}", "output=o.jsonl"),
        "words, label",
        "task.text_column=",
    ),
    Case(
        "input with an empty text",
        lambda p: p.predict(
            f"input={p.write('a.jsonl', jsonl(*[{'text': 'a'}] * 60, {'text': None}))}",
            "output=o.jsonl",
            "data.eval_batch_size=1",
        ),
        "row 61",
        "'text'",
    ),
    Case(
        "output in no folder",
        lambda p: p.predict(f"input={p.rows}", "output=no/o.jsonl"),
        "output=no/o.jsonl",
        "its folder is not found",
    ),
    Case(
        "metrics into no folder",
        lambda p: ["evaluate", f"adapter={p.run / 'adapter'}", "output=no/m.json"],
        "output=no/m.json",
        "its folder is not found",
    ),
    Case(
        "evaluate without test data",
        lambda p: ["evaluate", f"adapter={p.run / 'adapter'}", "data.test_fraction=0"],
        "no test data",
        "data.test=FILE",
    ),
    Case(
        "weights truncated, adapter",
        lambda p: [
            "predict",
            f"adapter={p.adapter(lambda a: truncate(a / 'adapter_model.safetensors'))}",
            "text=a",
        ],
        "truncated or corrupt",
        "Copy it again",
    ),
    Case(
        "weights missing",
        lambda p: [
            "predict",
            f"adapter={p.adapter(lambda a: (a / 'adapter_model.safetensors').unlink())}",
            "text=a",
        ],
        "adapter_model.safetensors",
        "adapter",
    ),
    Case(
        "adapter_config.json corrupt",
        lambda p: [
            "predict",
            f"adapter={p.adapter(lambda a: truncate(a / 'adapter_config.json'))}",
            "text=a",
        ],
        "adapter_config.json",
        "JSON",
    ),
    Case(
        "sidecar corrupt",
        lambda p: [
            "evaluate",
            f"adapter={p.adapter(lambda a: truncate(a / 'lora_lightning.json'))}",
        ],
        "lora_lightning.json is damaged",
        "again",
    ),
    Case(
        "sidecar without task_state",
        lambda p: [
            "predict",
            f"adapter={p.adapter(lambda a: change_json(a / 'lora_lightning.json', 'task_state'))}",
            "text=a",
        ],
        "lora_lightning.json is damaged",
        "again",
    ),
    Case(
        "task_state of nothing",
        lambda p: [
            "predict",
            f"adapter={p.adapter(lambda a: empty_task_state(a / 'lora_lightning.json'))}",
            "text=a",
        ],
        "lora_lightning.json is damaged",
        "again",
    ),
    Case(
        "another base of the same shape",
        lambda p: p.predict(f"model.name_or_path={other_bert(p)}", "text=a"),
        "another base model",
        "model.name_or_path=",
    ),
    Case(
        "merge with another base",
        lambda p: [
            "merge",
            f"adapter={p.run / 'adapter'}",
            "output=merged",
            f"model.name_or_path={other_bert(p)}",
        ],
        "another base model",
        "model.name_or_path=",
    ),
    Case(
        "base of another shape",
        lambda p: p.predict(f"model.name_or_path={other_bert(p, hidden_size=16)}", "text=a"),
        "wrong shape",
        "base model",
    ),
    Case(
        "base gone",
        lambda p: p.predict("model.name_or_path=/no/where", "text=a"),
        "/no/where",
        "model.name_or_path",
    ),
    Case(
        "not finite",
        lambda p: [
            "predict",
            f"adapter={p.adapter(lambda a: change_tensor(a, lambda t: t * torch.nan))}",
            "text=a",
        ],
        "not finite",
        "diverged",
    ),
    Case(
        "wrong shape",
        lambda p: [
            "predict",
            f"adapter={p.adapter(lambda a: change_tensor(a, lambda t: t[:1].clone()))}",
            "text=a",
        ],
        "wrong shape",
        "rank",
    ),
    Case(
        "predictions into a table",
        lambda p: p.predict(f"input={p.rows}", "output=o.csv"),
        "output=o.csv",
        "must end in .jsonl",
    ),
    Case(
        "metrics into a table",
        lambda p: ["evaluate", f"adapter={p.run / 'adapter'}", "output=m.csv"],
        "output=m.csv",
        "must end in .json",
    ),
    Case("merge without output", lambda p: ["merge", "adapter=a"], "output=DIR", "merged model"),
    Case(
        "merge into a full folder",
        lambda p: [
            "merge",
            f"adapter={p.run / 'adapter'}",
            f"output={p.write('mine/file.txt', 'x').parent}",
        ],
        "is not empty",
        "another folder",
    ),
    Case(
        "merge into the adapter",
        lambda p: ["merge", f"adapter={p.adapter()}", f"output={p.root / 'adapter'}"],
        "adapter",
        "another folder",
    ),
    Case("import of nothing", lambda p: ["import", "output=new"], "source=", "Checkpoint of a run"),
    Case("import to nowhere", lambda p: ["import", f"source={p.run}"], "output=DIR", "New folder"),
    Case(
        "import of what is not there",
        lambda p: ["import", "source=no", "output=new"],
        "source=no",
        "not found",
    ),
    Case(
        "import of a pickle",
        lambda p: ["import", f"source={p.write('lit_model.pth.lora', 'x')}", *to_llama(p)],
        "is a pickle",
        "Convert it if you trust it",
    ),
    Case(
        "import of another layout",
        lambda p: ["import", f"source={tensors_of(p, 'a.weight')}", *to_llama(p)],
        "unknown layout, with a.weight",
        "Known layouts: kohya",
    ),
    Case(
        "import of another model",
        lambda p: ["import", f"source={tensors_of(p, 'lora_te_x.lora_down.weight')}", *to_llama(p)],
        "no lora_te_x.lora_up.weight",
        "holds",
    ),
    Case(
        "import without alpha",
        lambda p: [
            "import",
            f"source={tensors_of(p, 'lm_head.lora_A', 'lm_head.lora_B')}",
            *to_llama(p),
        ],
        "holds no alpha",
        "alpha=A",
    ),
    Case(
        "import of a classifier without its classes",
        lambda p: [
            "import",
            f"source={tensors_of(p, 'lora_te_x.lora_down.weight')}",
            *(f"model.name_or_path={p.bert}", "task=classification", "output=new"),
        ],
        "name the classes",
        "task.labels=[",
    ),
    Case(
        "import without a base",
        lambda p: ["import", f"source={tensors_of(p, 'lm_head.lora_A')}", "output=new", "task=lm"],
        "base model and task",
        "model.name_or_path=",
    ),
    Case(
        "import with settings of the adapter",
        lambda p: ["import", f"source={p.run}", "output=new", "lora.alpha=8"],
        "lora.alpha=8",
        "alpha=A",
    ),
    Case(
        "import with an alpha too many",
        lambda p: ["import", f"source={p.run / 'adapter'}", "output=new", "alpha=8"],
        "holds its own alpha",
        "Leave it out",
    ),
    Case(
        "import of a folder of checkpoints",
        lambda p: ["import", f"source={p.run / 'checkpoints'}", "output=new"],
        "holds checkpoints",
        "last.ckpt",
    ),
    Case(
        "export merged and checked",
        lambda p: ["export", "adapter=a", "output=m", "format=merged", "check=vllm"],
        "check: not supported",
        "format=merged",
    ),
]

CASES = [*COMMAND, *LORA, *DATA, *MODEL, *TRAINING, *FOLDERS, *ADAPTERS]


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_bert, tiny_llama, rows_jsonl, fast, trained_run) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, tiny_bert, tiny_llama, rows_jsonl, fast, trained_run())


def assert_clear(status: int, err: str, case: Case) -> None:
    assert status == 2, err
    assert err.startswith("error: "), err
    assert len(err.splitlines()) == 1, err
    assert len(err) < 1200, err
    assert case.says in err, err
    assert case.fix in err, err


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in IN_SHARES], ids=lambda case: case.name
)
def test_mistake_is_told_and_leaves_nothing(case, place, run_cli):
    arguments = case.arguments(place)
    before = contents(place.root)
    status, _, err = run_cli(*arguments)
    assert_clear(status, err, case)
    assert contents(place.root) == before


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("missing file", *IN_SHARES)],
    ids=lambda case: case.name,
)
def test_mistake_in_a_process_of_its_own(case, place):
    arguments = case.arguments(place)
    before = contents(place.root)
    command = [sys.executable, "-m", "lora_lightning", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_clear(done.returncode, done.stderr, case)
    assert contents(place.root) == before


# Check may well run on the login node, before torchrun or srun start the processes that train.
STARTED = ("torchrun", "slurm")
NOT_IN_CHECK = (
    *IN_SHARES,
    *STARTED,
    "plan",
    "verb",
    "flag",
    "sweep",
    "beside",
    "Hydra",
    "resume",
    "check",
    "no time to train",
)
SAME_IN_CHECK = [
    case
    for case in (*COMMAND, *LORA, *DATA, *MODEL, *TRAINING, *FOLDERS)
    if not any(word in case.name for word in NOT_IN_CHECK)
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SAME_IN_CHECK, ids=lambda case: case.name)
def test_check_refuses_what_train_refuses(case, place, run_cli):
    _, *arguments = case.arguments(place)
    before = contents(place.root)
    status, _, err = run_cli("check", *arguments)
    assert_clear(status, err, case)
    assert contents(place.root) == before


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["trainer=tp", "lora.use_dora=true"],
            "lora.use_dora=true: not supported with a sharded base",
        ),
        (
            ["trainer=fsdp2", "lora.init=pissa"],
            "lora.init=pissa: not supported with a sharded base",
        ),
        (
            ["trainer=tp", "lora.bias=all"],
            "lora.bias=all: not supported with a sharded base, whose biases it trains",
        ),
        (
            ["trainer=tp", "trainer.devices=3"],
            "tensor_parallel_size=3: must divide the model's num_attention_heads, 4",
        ),
    ],
)
def test_check_refuses_what_a_base_in_shares_cannot_have(settings, says, place, run_cli):
    """No process is started for it."""
    before = contents(place.root)
    two = ["trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2"]
    status, _, err = run_cli(*place.check(*two, *settings))
    assert status == 2
    assert err.count("error: ") == 1
    assert says in " ".join(err.split())
    assert contents(place.root) == before


def test_nearly_full_disk(place, run_cli, monkeypatch):
    usage = shutil.disk_usage(place.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    case = Case("full disk", lambda p: p.train("output_dir=a/b"), "only 1 MiB", "output_dir")
    for verb in (place.train, place.check):
        status, _, err = run_cli(*verb("output_dir=a/b"))
        assert_clear(status, err, case)
        assert contents(place.root) == {}


def test_disk_that_fills_up_while_writing(place, run_cli, monkeypatch):
    def full(*arguments, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_lightning.lora.serialization.save.save_file", full)
    status, _, err = run_cli(*place.train())
    case = Case("full disk", lambda p: [], "No space left on device", "Nothing was changed")
    warned, error, said = err.partition("error: ")  # of few rows, as training began
    assert all(line.startswith("WARNING only ") for line in warned.splitlines())
    assert_clear(status, error + said, case)
    # The checkpoints stay: what was learned is not lost. There is no half-written adapter.
    kept = contents(place.root / "out")
    assert "checkpoints/last.ckpt" in kept
    assert not [name for name in kept if "adapter" in name]
    assert json.loads(kept["result.json"])["status"] == "failed"


def test_second_try_into_the_same_folder(place, run_cli):
    mine = place.write("out/notes.txt", "mine")
    wrong, right = place.train("data.train=no.csv"), place.train()
    assert run_cli(*wrong)[0] == 2
    assert contents(place.root) == {"out": None, "out/notes.txt": b"mine"}
    status, _, err = run_cli(*right)
    assert status == 0, err
    assert result_of(place.root / "out")["status"] == "completed"
    assert mine.read_text() == "mine"


def test_used_folder_is_left_alone(place, run_cli):
    folder = run_folder(place)
    before = contents(folder)
    assert run_cli(*place.train(f"output_dir={folder}", "lora.rank=2"))[0] == 2
    assert contents(folder) == before


@pytest.mark.slow
def test_job_of_a_sweep(place, run_cli):
    """A mistake that only a job can find: the job is named, the others are done."""
    files = [place.rows, place.write("bad.jsonl", "{")]
    sweep = f"data.train={','.join(map(str, files))}"
    arguments = place.train("-m", sweep, "hydra.sweep.dir=sweep")
    status, _, err = run_cli(*(item for item in arguments if item != "output_dir=out"))
    assert status == 2
    named, message, job, _ = err.splitlines()
    assert str(files[1]) in named
    assert message == "error: 1 of 2 jobs failed."
    assert job.startswith(f"  job 1 (data.train={files[1]}): data.train")
    assert "line 1" in job
    results = [result_of(place.root / f"sweep/{job}") for job in (0, 1)]
    assert [result["status"] for result in results] == ["completed", "failed"]


def test_what_is_no_mistake_of_the_user_shows_its_traceback(place, run_cli, monkeypatch):
    def broken(*arguments, **kwargs):
        raise ZeroDivisionError("a \x1b[31mbug\x07")

    monkeypatch.setattr("lora_lightning.training.run.build_trainer", broken)
    status, _, err = run_cli(*place.train())
    assert status == 1
    assert "\nTraceback (most recent call last):\n" in err
    assert err.splitlines()[-1] == "ZeroDivisionError: a \\x1b[31mbug\\x07"
    assert result_of(place.root / "out")["status"] == "failed"
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ZeroDivisionError, match="bug"):
        run_cli(*place.train("output_dir=other"))


def test_full_error_shows_the_traceback_of_a_mistake_too(place, run_cli, monkeypatch):
    from lora_lightning import UserError

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError, match="unknown setting"):
        run_cli(*place.train("lora.rnk=4"))
