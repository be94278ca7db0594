"""Files of any content as data: our own error comes out, or rows.

FUZZ=1 tries other content in each run; the failing example and how to run it again are printed.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from contextlib import suppress

import pytest
from fuzz import FUZZ
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.lora import UserError
from lora_lightning.modeling import load_tokenizer
from lora_lightning.settings import DataConfig, ModelConfig
from lora_lightning.tasks import build_task

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["good", "bad", "", "../x", "${oc.env:HOME}", "2024-05-01", "1e999"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
ROWS = st.lists(
    st.fixed_dictionaries({}, optional={"text": VALUES, "label": VALUES})
    | st.fixed_dictionaries({"text": st.text(), "label": st.sampled_from(["good", "bad"])}),
    min_size=1,
    max_size=12,
)


def as_json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["text", "label"])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", errors="surrogatepass")


FILES = st.one_of(
    st.tuples(st.sampled_from(["csv", "tsv", "json", "jsonl", "txt", "parquet"]), st.binary()),
    st.tuples(st.just("jsonl"), ROWS.map(as_json_lines)),
    st.tuples(st.just("json"), ROWS.map(lambda rows: json.dumps(rows).encode())),
    st.tuples(st.just("csv"), ROWS.map(as_csv)),
)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return load_tokenizer(ModelConfig(name_or_path=str(tiny_bert)))


@settings(FUZZ, max_examples=100)
@given(file=FILES, task=st.sampled_from(["sentiment", "summarization"]))
def test_files_of_any_content(file, task, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / f"rows.{file[0]}"
    path.write_bytes(file[1])
    config = DataConfig(train=str(path), cache_dir=str(folder / "cache"))
    settings = {"name": task}
    if task == "summarization":
        settings |= {"source_column": "text", "target_column": "label"}
    data = LoraDataModule(build_task(settings), tokenizer, config)
    with suppress(UserError):
        data.prepare_data()
        data.setup("fit")
        next(iter(data.train_dataloader()))
    assert {each.name for each in folder.iterdir()} <= {path.name, "cache"}
    shutil.rmtree(folder)
