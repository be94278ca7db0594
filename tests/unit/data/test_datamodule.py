"""Rows to encoded splits: cuts, cache, truncation, empty rows, loaders."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from lightning.pytorch.strategies import DDPStrategy
from transformers import AutoTokenizer

from helpers.data import write_jsonl
from lora_lightning.config.schema import DataConfig, ModelConfig
from lora_lightning.config.tasks import LanguageModelConfig, SentimentConfig
from lora_lightning.data import tokenization as encode
from lora_lightning.data.collators import PackingCollator
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.data.sampler import FILLER
from lora_lightning.data.splits import make_splits
from lora_lightning.distributed.strategies import ShardedStrategy
from lora_lightning.errors import UserError
from lora_lightning.models.tokenizer import load_tokenizer
from lora_lightning.tasks import (
    IGNORE,
    LanguageModelTask,
    SentimentTask,
    build_task,
)


class CountingTask(SentimentTask):
    """Counts the rows it has tokenised."""

    encoded = 0

    def encode(self, rows, tokenizer, max_length):
        self.encoded += len(next(iter(rows.values())))
        return super().encode(rows, tokenizer, max_length)


class CountingLanguageModel(LanguageModelTask):
    """Likewise."""

    encoded = 0

    def __init__(self) -> None:
        super().__init__(LanguageModelConfig(max_new_tokens=2))

    def encode(self, rows, tokenizer, max_length):
        self.encoded += len(next(iter(rows.values())))
        return super().encode(rows, tokenizer, max_length)


@pytest.fixture
def build(tiny_bert, tmp_path):
    """Builds a data module from rows or a file; the tokenised cache is the test's own."""

    def make(
        rows, *, task=None, tokenizer=None, seed=0, limit=64, cache="cache", **settings
    ) -> LoraDataModule:
        path = rows
        if isinstance(rows, list):
            path = tmp_path / "rows.jsonl"
            write_jsonl(path, rows)
        config = DataConfig(train=str(path), cache_dir=str(tmp_path / cache), **settings)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(tiny_bert)
        data = LoraDataModule(
            task or CountingTask(), tokenizer, config, length_limit=limit, seed=seed
        )
        data.prepare_data()
        return data

    return make


def _rows(**counts: int) -> Dataset:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return Dataset.from_dict({"text": [f"text {i}" for i in range(len(labels))], "label": labels})


# Splits ------------------------------------------------------------------------------------------


def _cut(rows: Dataset, **settings) -> dict[str, Dataset]:
    config = DataConfig(train="x", **settings)
    return make_splits({"train": rows}, config, strata=lambda raw: raw["label"])


def test_splits_are_stratified_disjoint_and_complete():
    parts = _cut(_rows(a=100, b=60, c=40), val_fraction=0.1, test_fraction=0.2)
    shares = {split: Counter(rows["label"]) for split, rows in parts.items()}
    assert shares["val"] == {"a": 10, "b": 6, "c": 4}
    assert shares["test"] == {"a": 20, "b": 12, "c": 8}
    assert shares["train"] == {"a": 70, "b": 42, "c": 28}
    texts = [text for rows in parts.values() for text in rows["text"]]
    assert sorted(texts) == sorted(f"text {i}" for i in range(200))


def test_equal_rows_stay_together():
    # Every row four times, with ids that differ, as in scraped data.
    labels = [("a", "b")[i % 2] for i in range(50)] * 4
    rows = Dataset.from_dict(
        {"id": range(200), "text": [f"text {i % 50}" for i in range(200)], "label": labels}
    )
    parts = _cut(rows)
    texts = {split: set(part["text"]) for split, part in parts.items()}
    assert not texts["train"] & texts["val"]
    assert not texts["train"] & texts["test"]
    assert not texts["val"] & texts["test"]
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 168,
        "val": 16,
        "test": 16,
    }


def test_splits_depend_on_the_split_seed_alone(build, rows_jsonl):
    def texts(**changes) -> list[list[str]]:
        data = build(rows_jsonl, **changes)
        return [data.raw[split]["text"][:] for split in ("train", "val", "test")]

    first = texts(seed=0)
    torch.manual_seed(1234)
    assert texts(seed=5) == first
    assert texts(split_seed=1) != first


def test_given_splits_are_left_as_they_are():
    given = {"train": _rows(a=5, b=5), "test": _rows(a=2, b=1)}
    parts = make_splits(given, DataConfig(train="x", val_fraction=0.2, test_fraction=0.5))
    assert parts["test"] is given["test"]
    assert (len(parts["train"]), len(parts["val"])) == (8, 2)


def test_too_few_rows_to_cut():
    with pytest.raises(UserError, match="3 rows are too few to cut off val and test"):
        _cut(_rows(a=2, b=1))


# Encoding ----------------------------------------------------------------------------------------


def test_encoded_rows_are_the_tokenizers(build, tiny_bert, rows_jsonl):
    data = build(rows_jsonl)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    for split, raw in data.raw.items():
        for row, encoded in zip(raw, data.encoded[split], strict=True):
            assert encoded["input_ids"] == tokenizer(row["text"])["input_ids"]
            assert encoded["length"] == len(encoded["input_ids"])
            assert encoded["labels"] == ("negative", "positive").index(row["label"])


def test_truncated_rows_are_counted(build, tiny_bert, rows_jsonl):
    data = build(rows_jsonl, max_length=10, val_fraction=0.0, test_fraction=0.0)
    words = [len(row["text"].split()) for row in data.raw["train"]]
    assert sum(data.encoded["train"]["truncated"]) == sum(count + 2 > 10 for count in words)
    assert data.encoded["train"]["length"][:] == [min(count + 2, 10) for count in words]
    separator = AutoTokenizer.from_pretrained(tiny_bert).sep_token_id
    assert all(ids[-1] == separator for ids in data.encoded["train"]["input_ids"])


def test_empty_rows_are_dropped_and_counted(build):
    texts = ["good film", "", "bad film", "   ", None, "fine hotel", "cold soup"]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    data = build(rows, val_fraction=0.0, test_fraction=0.0)
    assert data.dropped == {"train": 3}
    assert data.raw["train"]["text"][:] == ["good film", "bad film", "fine hotel", "cold soup"]
    assert data.encoded["train"]["labels"][:] == [0, 0, 1, 0]


def test_nothing_but_empty_rows(build):
    with pytest.raises(UserError, match="empty text in all 2 rows"):
        build([{"text": "", "label": i} for i in range(2)], val_fraction=0.0, test_fraction=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 65}, "must be at most 64"),
        ({"max_length": 2}, "must leave room for text"),
    ],
)
def test_wrong_lengths_are_refused(build, rows_jsonl, settings, message):
    with pytest.raises(UserError, match=message):
        build(rows_jsonl, **settings)


def test_limits_cut_each_split(build, rows_jsonl):
    data = build(rows_jsonl, limit_train=10, limit_val=3, limit_test=500)
    assert {split: len(rows) for split, rows in data.encoded.items()} == {
        "train": 10,
        "val": 3,
        "test": 8,
    }


# Cache -------------------------------------------------------------------------------------------


def test_second_build_does_not_tokenise_again(build, rows_jsonl):
    first, second = CountingTask(), CountingTask()
    one = build(rows_jsonl, task=first)
    two = build(rows_jsonl, task=second, seed=3, batch_size=5)
    assert (first.encoded, second.encoded) == (80, 0)
    for split in ("train", "val", "test"):
        assert one.encoded[split][:] == two.encoded[split][:]


@pytest.mark.parametrize("change", ["max_length", "labels", "tokenizer", "rows"])
def test_a_change_of_what_encoding_depends_on_tokenises_again(
    change, build, tiny_bert, rows_jsonl, tmp_path
):
    build(rows_jsonl)
    task, settings, source = CountingTask(), {}, rows_jsonl
    if change == "max_length":
        settings["max_length"] = 9
    elif change == "labels":
        task = CountingTask(SentimentConfig(labels=["positive", "negative"]))
    elif change == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
        tokenizer.add_tokens(["lovely film"])
        settings["tokenizer"] = tokenizer
    else:
        source = tmp_path / "other.jsonl"
        source.write_text(rows_jsonl.read_text().replace("lovely", "tasty"))
    changed = build(source, task=task, **settings)
    assert task.encoded == 80
    ids = changed.encoded["train"]["input_ids"]
    if change == "max_length":
        assert max(map(len, ids)) == 9
    elif change == "labels":
        raw = changed.raw["train"]["label"]
        assert changed.encoded["train"]["labels"][:] == [int(label == "negative") for label in raw]


def test_truncation_set_on_the_tokenizer_does_not_change_the_cache(build, tiny_bert, rows_jsonl):
    """A fast tokenizer keeps the last call's truncation; that is no change of the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    build(rows_jsonl, tokenizer=tokenizer)
    tokenizer(["good film"], truncation=True, max_length=4, padding=True)
    task = CountingTask()
    build(rows_jsonl, tokenizer=tokenizer, task=task)
    assert task.encoded == 0


@pytest.fixture
def few_are_many(monkeypatch):
    """Has more than 20 rows encoded by several processes, 7 at a time, as one does here too."""
    monkeypatch.setattr(encode, "BATCH", 7)
    monkeypatch.setattr(encode, "ROWS_ALONE", 20)
    monkeypatch.setattr(encode, "cores", lambda: 4)


@pytest.mark.parametrize("name", ["sentiment", "lm"])
def test_several_processes_encode_as_one(
    build, rows_jsonl, tiny_llama, tmp_path, monkeypatch, capfd, few_are_many, name
):
    """The same rows, blocks of documents too, in the same file: whoever wrote it, all find it."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(tiny_llama)))
    counts = {"limit_train": 60, "val_fraction": 0.0, "test_fraction": 0.0}
    found, seen = [], []
    for cache, most in (("one", 1), ("several", 16), ("one", 16), ("several", 1)):
        monkeypatch.setattr(encode, "MOST_PROCESSES", most)
        task = CountingTask() if name == "sentiment" else CountingLanguageModel()
        data = build(rows_jsonl, task=task, tokenizer=tokenizer, cache=cache, **counts)
        found.append(data)
        seen.append(task.encoded)
    assert seen == [60, 0, 0, 0]  # the others count in processes of their own, or find the file
    for data in found[1:]:
        assert data.encoded["train"][:] == found[0].encoded["train"][:]
        assert data.encoded["train"].features == found[0].encoded["train"].features
        assert data.encoded["train"]._fingerprint == found[0].encoded["train"]._fingerprint
    files = [sorted(p.name for p in (tmp_path / cache).iterdir()) for cache in ("one", "several")]
    assert files[0] == files[1]
    assert [Path(name).suffix for name in files[0] if "." in name] == [".arrow", ".json"]
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    assert "forked" not in capfd.readouterr().err


def test_a_mistake_that_another_process_meets_is_told(build, rows_jsonl, few_are_many):
    with pytest.raises(UserError, match="row 3 is wrong"):
        build(rows_jsonl, task=RefusingTask())


def test_a_task_that_cannot_be_sent_encodes_in_this_process(build, rows_jsonl, few_are_many):
    task = CountingTask()
    task.lock = threading.Lock()
    build(rows_jsonl, task=task)
    assert task.encoded == 80


class RefusingTask(SentimentTask):
    def encode(self, rows, tokenizer, max_length):
        raise UserError("row 3 is wrong")


class DyingTask(CountingTask):
    """Kills its own process in the midst of tokenising."""

    def encode(self, rows, tokenizer, max_length):
        if self.encoded:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(rows, tokenizer, max_length)


def test_killed_write_leaves_no_wrong_cache(build):
    rows = [{"text": f"good film {i}", "label": i % 2} for i in range(1500)]
    settings = {"val_fraction": 0.0, "test_fraction": 0.0}
    process = multiprocessing.get_context("fork").Process(
        target=build, args=(rows,), kwargs={"task": DyingTask(), **settings}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    task = CountingTask()
    data = build(rows, task=task, **settings)
    assert task.encoded == 1500, "nothing of the killed write may be taken for the whole"
    assert data.encoded["train"]["labels"][:] == [i % 2 for i in range(1500)]


def test_unwritable_cache_is_told(build, rows_jsonl, tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(UserError, match="data.cache_dir"):
        build(rows_jsonl)


# Batches -----------------------------------------------------------------------------------------


def test_loaders_give_every_row_once(build, rows_jsonl):
    data = build(rows_jsonl, batch_size=6)
    for split, loader in (
        ("train", data.train_dataloader()),
        ("val", data.val_dataloader()),
        ("test", data.test_dataloader()),
    ):
        batches = list(loader)
        found = [
            tuple(ids[mask.bool()].tolist())
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        expected = [tuple(ids) for ids in data.encoded[split]["input_ids"]]
        assert sorted(found) == sorted(expected)
        assert max(len(batch["labels"]) for batch in batches) == (6 if split == "train" else 8)


def test_filler_row_has_no_label(build, rows_jsonl):
    data = build(rows_jsonl)
    examples = data.train_dataloader().dataset
    assert examples[FILLER]["labels"] == IGNORE
    assert examples[FILLER]["input_ids"] == examples[0]["input_ids"]


def test_batches_under_another_default_device_are_on_the_cpu(build, rows_jsonl):
    """Lightning calls configure_model, where EVA looks at the data, with a GPU as the default."""
    data = build(rows_jsonl)
    loaders = [data.train_dataloader(), data.val_dataloader()]
    packs = PackingCollator(0)
    expected = [list(loader.batch_sampler) for loader in loaders]
    batches = list(data.training_batches("cpu"))
    with torch.device("meta"):
        assert [list(loader.batch_sampler) for loader in loaders] == expected
        found = list(data.training_batches("cpu"))
        others = [data.longest_batch("train", 4)]
        for loader, (indices, *_) in zip(loaders, expected, strict=True):
            rows = loader.dataset.__getitems__(indices)
            others.append(loader.collate_fn([{**row, "generate": True} for row in rows]))
            others.append(packs([{**row, "labels": row["input_ids"]} for row in rows]))
    for batch in (*found, *others):
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
    torch.testing.assert_close(found, batches, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("attention", "max_tokens", "lanes"),
    [
        ("sdpa", None, [2]),
        ("flash_attention_2", None, [1]),
        ("flash_attention_2", 200, [1] * 4),
    ],
)
def test_joined_rows_are_one_lane_for_flash_attention(
    build, rows_jsonl, tiny_llama, attention, max_tokens, lanes
):
    data = build(
        rows_jsonl,
        task=build_task({"name": "lm", "max_new_tokens": 2}),
        tokenizer=load_tokenizer(ModelConfig(name_or_path=str(tiny_llama))),
        max_tokens=max_tokens,
        num_workers=0,
    )
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention))
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(model=model),
        strategy=SimpleNamespace(root_device=torch.device("cuda")),
        distributed_sampler_kwargs=None,
    )
    (batch,) = data.train_dataloader()
    parts = [batch] if max_tokens is None else batch
    assert [len(part["input_ids"]) for part in parts] == lanes
    assert sum(part["tokens"] for part in parts) == sum(data.encoded["train"]["length"])
    if attention != "sdpa":
        assert all(part["tokens"] == part["input_ids"].numel() for part in parts)
        assert all(part["tokens"] <= (max_tokens or 10**9) for part in parts)


@pytest.mark.parametrize(("device", "multiple"), [("cuda", 8), ("cpu", 1)])
def test_batches_for_a_gpu_have_rounded_widths(build, rows_jsonl, device, multiple):
    data = build(rows_jsonl, batch_size=4, max_tokens=None, limit=17, num_workers=0)
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)), distributed_sampler_kwargs=None
    )
    widths = [
        (batch["input_ids"].shape[1], int(batch["attention_mask"].sum(1).max()))
        for loader in (data.train_dataloader(), data.val_dataloader())
        for batch in loader
    ]
    assert {width for width, _ in widths} > {17}  # the longest that the model takes
    for width, longest in widths:
        assert width == min(-(-longest // multiple) * multiple, 17)


def test_batches_of_workers_are_those_of_the_process_itself(
    build, rows_jsonl, tiny_llama, monkeypatch
):
    """Over two epochs, in the second of two processes, which has no row in the last batch."""

    def touch():
        raise AssertionError("a worker must not use a GPU")

    monkeypatch.setattr(torch.cuda, "_lazy_init", touch)

    def loaders(workers):
        columns = {"source_column": "text", "target_column": "label"}
        task = build_task({"name": "summarization", "max_new_tokens": 2, **columns})
        data = build(
            rows_jsonl,
            task=task,
            tokenizer=load_tokenizer(ModelConfig(name_or_path=str(tiny_llama))),
            batch_size=7,
            max_tokens=90,
            num_workers=workers,
            limit_train=57,
        )
        data.trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            distributed_sampler_kwargs={"num_replicas": 2, "rank": 1},
        )
        return data.train_dataloader(), data.val_dataloader()

    found = []
    for workers in (0, 2):
        train, val = loaders(workers)
        pickle.dumps((train.dataset, train.collate_fn))  # as for workers that are not forked
        batches = []
        for epoch in (0, 1):
            train.batch_sampler.set_epoch(epoch)
            batches += [*train, *val]
        found.append(batches)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    parts = [part for batch in found[1] for part in batch]
    assert all({"places", "tokens", "rows"} <= set(part) for part in parts)
    assert any((part["labels"] == IGNORE).all() for part in parts)
    assert any(len(batch) > 1 for batch in found[1])


@pytest.mark.parametrize(
    ("asked", "device", "cores", "devices", "expected"),
    [
        ("auto", "cpu", 16, 1, 0),
        ("auto", "cuda", 16, 1, 4),
        ("auto", "cuda", 32, 8, 3),
        ("auto", "cuda", 4, 4, 2),
        (7, "cpu", 16, 1, 7),
        (0, "cuda", 16, 1, 0),
    ],
)
def test_workers_by_device_and_cores(
    build, rows_jsonl, monkeypatch, asked, device, cores, devices, expected
):
    data = build(rows_jsonl, num_workers=asked)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)), num_devices=devices
    )
    assert data.num_workers == expected
    with ThreadPoolExecutor(1) as pool:  # as a pack's runs are
        within = pool.submit(lambda: data.num_workers).result()
    assert within == (0 if asked == "auto" else expected)


@pytest.mark.parametrize("count", [-1, 2**40, True, "many"])
def test_a_wrong_number_of_workers_is_told(count):
    with pytest.raises(UserError, match="must be .*from 0 to 256, or auto"):
        DataConfig(num_workers=count)


def test_longest_batch(build, rows_jsonl):
    data = build(rows_jsonl)
    batch = data.longest_batch("train", 4)
    lengths = sorted(data.encoded["train"]["length"], reverse=True)[:4]
    assert batch["attention_mask"].sum(1).tolist() == lengths


def test_fit_needs_validation_rows(build, rows_jsonl):
    data = build(rows_jsonl, val_fraction=0.0)
    with pytest.raises(UserError, match="data.val: must be given"):
        data.setup("fit")


def test_lightnings_own_distributed_sampler_is_refused(build, rows_jsonl):
    data = build(rows_jsonl)
    connector = SimpleNamespace(use_distributed_sampler=True)
    data.trainer = SimpleNamespace(world_size=2, _accelerator_connector=connector)
    with pytest.raises(UserError, match="use_distributed_sampler=False"):
        data.setup("fit")


def test_fewer_rows_than_processes_are_refused(build, rows_jsonl):
    data = build(rows_jsonl)
    connector = SimpleNamespace(use_distributed_sampler=False)
    data.trainer = SimpleNamespace(
        world_size=8, _accelerator_connector=connector, strategy=DDPStrategy()
    )
    data.setup("fit")
    data.trainer.world_size = 9
    with pytest.raises(
        UserError, match="data.val: must hold at least 9 rows for 9 processes, and holds 8"
    ):
        data.setup("fit")


def test_a_budget_is_refused_where_all_must_keep_step(build, rows_jsonl):
    data = build(rows_jsonl, max_tokens=30)
    connector = SimpleNamespace(use_distributed_sampler=False)
    strategy = ShardedStrategy()
    strategy._device_mesh = {"data_parallel": SimpleNamespace(size=lambda: 2)}
    data.trainer = SimpleNamespace(
        world_size=2, _accelerator_connector=connector, strategy=strategy
    )
    with pytest.raises(UserError, match="data.max_tokens=30: is not supported with trainer=fsdp2"):
        data.setup("fit")


def test_cache_folder_can_be_anywhere(build, rows_jsonl, tmp_path):
    build(rows_jsonl)
    assert len(list(Path(tmp_path / "cache").glob("*.arrow"))) == 3


def test_rows_are_prepared_once_for_all_that_a_trainer_does(build, rows_jsonl):
    data = build(rows_jsonl, val_fraction=0.2)
    first = data.encoded["train"]
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert data.encoded["train"] is first


def test_a_batch_read_at_once_is_its_rows_one_by_one(build, rows_jsonl):
    examples = build(rows_jsonl).train_dataloader().dataset
    for indices in ([3, 0, 7], [FILLER], [2, FILLER]):
        assert examples.__getitems__(indices) == [examples[index] for index in indices]


def test_max_tokens_bounds_what_the_loaders_give(build, rows_jsonl):
    lengths = sorted(build(rows_jsonl).encoded["train"]["length"])
    data = build(rows_jsonl, max_tokens=30, batch_size=8)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        parts = [part for batch in loader for part in batch]
        assert all(part["input_ids"].numel() <= 30 or len(part["input_ids"]) == 1 for part in parts)
    found = [
        int(n)
        for batch in data.train_dataloader()
        for p in batch
        for n in p["attention_mask"].sum(1)
    ]
    assert sorted(found) == lengths
    whole = build(rows_jsonl, max_tokens=None).train_dataloader()
    assert all(isinstance(batch, dict) for batch in whole)


@pytest.mark.parametrize("wrong", [0, -5, "many", True, 2.5])
def test_wrong_max_tokens_are_refused(build, rows_jsonl, wrong):
    with pytest.raises(UserError, match="data.max_tokens=.*must be .*at least 1, or auto"):
        build(rows_jsonl, max_tokens=wrong)


def test_a_device_decides_where_the_budget_is_left_to_us(build, rows_jsonl):
    data = build(rows_jsonl)
    assert (data.tokens_on("cpu"), data.tokens_on("cuda"), data.max_tokens) == (1024, None, None)
    data = build(rows_jsonl, max_tokens=200)
    assert (data.tokens_on("cpu"), data.tokens_on("cuda"), data.max_tokens) == (200, 200, 200)


def test_rows_are_read_at_once_whatever_their_columns(monkeypatch):
    """datasets copies the description of all columns whenever it is asked for one."""
    from datasets import Dataset

    from lora_lightning.data.splits import make_splits

    wide = {f"c{n}": list(range(20)) for n in range(50)}
    rows = Dataset.from_dict({"text": [f"good {n}" for n in range(20)], **wide})
    reads, real = [], Dataset.__getitem__
    monkeypatch.setattr(
        Dataset, "__getitem__", lambda self, key: reads.append(key) or real(self, key)
    )
    found = make_splits({"train": rows}, DataConfig(val_fraction=0.2, test_fraction=0.1))
    assert {split: len(part) for split, part in found.items()} == {"train": 14, "val": 4, "test": 2}
    assert len(reads) <= 3
