"""Adapters on disk: bytes, strict reading, and writes that happen whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.architectures import case
from helpers.asserts import contents
from helpers.models import randomise
from lora_lightning.lora import (
    Adapter,
    LoraConfig,
    UserError,
    load_adapter,
    read_adapter,
    save_adapter,
)
from lora_lightning.lora.serialization import save
from lora_lightning.lora.serialization.load import adapter_from
from lora_lightning.lora.serialization.peft_config import from_peft_config
from lora_lightning.utils import folder_swap
from lora_lightning.utils.folder_swap import MARK

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def bert_adapter(**settings) -> Adapter:
    settings = {"rank": 3, "alpha": 6, "modules_to_save": ["classifier"], **settings}
    adapter = Adapter(case("bert").copy(), LoraConfig(**settings))
    randomise(adapter.named_tensors())
    return adapter


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good adapter of the BERT, which tests then spoil."""
    return save_adapter(bert_adapter(), tmp_path / "adapter")


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def assert_untouched(model):
    """The model is what it was before the attempt: its modules, its weights, what trains."""
    base = case("bert").base
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in base.named_modules()
    ]
    weights = base.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# What is written -----------------------------------------------------------------------------

PROGRAM = """
import sys, torch
from torch import nn
from lora_lightning.lora import Adapter, LoraConfig, save_adapter
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
adapter = Adapter(model, LoraConfig(
    rank=2, targets=["0", "1"], rank_pattern={"0": 3}, modules_to_save=["2"], bias="all"))
save_adapter(adapter, sys.argv[1], base_model="x", also=lambda f: (f / "more").write_text("1"))
"""


def test_save_adapter_in_another_process_writes_the_same_bytes(tmp_path, monkeypatch):
    other_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "there")],
        env={**os.environ, "PYTHONHASHSEED": other_seed},
        check=True,
    )
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "here")])
    exec(PROGRAM, {})
    first, second = contents(tmp_path / "here"), contents(tmp_path / "there")
    assert set(first) == {CONFIG, WEIGHTS, MARK, "more"}
    assert first == second


def test_save_adapter_after_loading_writes_the_same_bytes(folder, tmp_path):
    again = save_adapter(bert_adapter(), tmp_path / "again")
    assert contents(again) == contents(folder)
    loaded = load_adapter(case("bert").copy(), folder)
    assert contents(save_adapter(loaded, tmp_path / "loaded")) == contents(folder)
    loaded.merge()
    assert contents(save_adapter(loaded, tmp_path / "merged")) == contents(folder)


def test_save_adapter_records_base_and_settings(tmp_path):
    adapter = bert_adapter(use_rslora=True, dropout=0.25)
    folder = save_adapter(
        adapter, tmp_path / "a", base_model="org/name", revision="abc", task_type="SEQ_CLS"
    )
    assert os.stat(folder / WEIGHTS).st_mode == os.stat(folder / CONFIG).st_mode
    config = peft.PeftConfig.from_pretrained(folder)
    assert isinstance(config, peft.LoraConfig)
    assert config.base_model_name_or_path == "org/name"
    assert config.revision == "abc"
    assert config.task_type == peft.TaskType.SEQ_CLS
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.25)
    assert config.use_rslora is True
    assert config.inference_mode is True
    assert config.modules_to_save == ["classifier"]
    # BERT's pooler is one more "dense", "classifier" the one linear layer that is left out.
    assert set(config.target_modules) == {"query", "key", "value", "dense"}
    names = {PREFIX + name for name in adapter.named_tensors()}
    assert set(load_file(folder / WEIGHTS)) == names


class Ends(nn.Module):
    """Two layers of which the one's whole name is the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module("0", nn.Linear(6, 6))
        self.add_module("1", nn.Tanh())
        self.add_module("2", nn.Sequential(nn.Linear(6, 6), nn.Tanh()))

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"^0": 4}},
        {"rank_pattern": {"^0": 5}},
        {"targets": r"^0$"},
        {"targets": r"2\.0"},
    ],
)
def test_saved_name_that_ends_another_matches_one_layer(settings, tmp_path):
    """In our own reading and in PEFT's."""
    x = torch.randn(3, 6)
    adapter = Adapter(Ends(), LoraConfig(rank=3, alpha=6, **settings))
    randomise(adapter.named_tensors())
    with torch.no_grad():
        expected = adapter.model(x)
        save_adapter(adapter, tmp_path / "a")
        loaded = load_adapter(Ends(), tmp_path / "a")
        torch.testing.assert_close(loaded.model(x), expected)
        assert loaded.layers.keys() == adapter.layers.keys()
        theirs = peft.PeftModel.from_pretrained(Ends(), tmp_path / "a")
        torch.testing.assert_close(theirs(x), expected)
        theirs.save_pretrained(tmp_path / "theirs")
        torch.testing.assert_close(load_adapter(Ends(), tmp_path / "theirs").model(x), expected)


def test_saved_name_with_regex_characters_keeps_its_rank(tmp_path):
    def model():
        return nn.ModuleDict({"a+b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})

    adapter = Adapter(model(), LoraConfig(rank=2, rank_pattern={r"a\+b": 3}))
    save_adapter(adapter, tmp_path)
    ranks = [layer.rank for layer in load_adapter(model(), tmp_path).layers.values()]
    assert ranks == [layer.rank for layer in adapter.layers.values()] == [3, 2]
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path)
    assert theirs.base_model.model["a+b"].r == {"default": 3}


def test_from_peft_config_string_targets_are_a_regex(tmp_path):
    """As PEFT reads it, though it be a plain name."""
    model = peft.get_peft_model(Ends(), peft.LoraConfig(target_modules="0", r=2))
    model.save_pretrained(tmp_path)
    assert list(load_adapter(Ends(), tmp_path).layers) == ["0"]


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"query": 5}, "alpha_pattern": {"layer.1.intermediate.dense": 2.5}},
        {"rank_pattern": {r".*layer\.0.*": 2}, "alpha": None},
        {"rank_pattern": {r".*layer\.0.*": 2}, "alpha": None, "scale": 0.7, "use_rslora": True},
        {"rank_pattern": {"query": 5, "key": 2, "value": 7}, "targets": ["query", "key", "value"]},
        {"targets": r".*layer\.1\..*(query|output\.dense)", "use_rslora": True},
        {"targets": ["query", "dense"], "exclude": ["pooler.dense"], "layers": [1]},
        {"targets": ["word_embeddings", "query"], "bias": "lora_only"},
    ],
)
def test_patterns_round_trip_through_peft(settings, tmp_path):
    adapter = bert_adapter(**settings)
    folder = save_adapter(adapter, tmp_path / "a")
    loaded = load_adapter(case("bert").copy(), folder)
    assert loaded.summary() == adapter.summary()
    expected = case("bert").logits(adapter.model)
    assert torch.equal(case("bert").logits(loaded.model), expected)
    theirs = peft.PeftModel.from_pretrained(case("bert").copy(), folder)
    torch.testing.assert_close(case("bert").logits(theirs), expected, rtol=0, atol=1e-5)
    assert contents(save_adapter(loaded, tmp_path / "b")) == contents(folder)


# What is refused -----------------------------------------------------------------------------

QUERY = "bert.encoder.layer.0.attention.self.query.lora_A.weight"


def without_one(tensors):
    del tensors[PREFIX + QUERY]


def without_head(tensors):
    del tensors[PREFIX + "classifier.weight"]


def with_one_more(tensors):
    tensors[PREFIX + "bert.encoder.layer.9.attention.self.query.lora_A.weight"] = torch.zeros(3, 32)


def of_another_rank(tensors):
    tensors[PREFIX + QUERY] = torch.zeros(4, 32)


def with_nan(tensors):
    tensors[PREFIX + QUERY][1, 2] = torch.nan


def with_infinity(tensors):
    tensors[PREFIX + "classifier.bias"][0] = -torch.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_one, rf"does not fit the model: it lacks 1 tensors \({QUERY}\)"),
        (without_head, r"it lacks 1 tensors \(classifier.weight\)"),
        (with_one_more, r"it has 1 unexpected tensors .bert.encoder.layer.9"),
        (of_another_rank, rf"{QUERY} is \(4, 32\) instead of \(3, 32\)"),
        (with_nan, rf"not finite in {QUERY}"),
        (with_infinity, r"not finite in classifier.bias"),
    ],
)
def test_load_adapter_with_wrong_tensors_raises(folder, change, message):
    edit_tensors(folder, change)
    model = case("bert").copy()
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(model, folder)
    assert str(folder) in str(caught.value)
    assert_untouched(model)


def truncated(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:50])


def bad_header(folder):
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)


def giant_header(folder):
    (folder / WEIGHTS).write_bytes(b"\xff" * 64)


def empty_weights(folder):
    (folder / WEIGHTS).write_bytes(b"")


def not_json(folder):
    (folder / CONFIG).write_text("{'r': 8")


def not_text(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00")


def a_list(folder):
    (folder / CONFIG).write_text("[1, 2]")


def no_config(folder):
    (folder / CONFIG).unlink()


def no_weights(folder):
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncated, "not a readable safetensors file, it is truncated or corrupt"),
        (cut_in_header, "truncated or corrupt"),
        (bad_header, "truncated or corrupt"),
        (giant_header, "truncated or corrupt"),
        (empty_weights, "truncated or corrupt"),
        (not_json, "adapter_config.json is not readable JSON"),
        (not_text, "adapter_config.json is not readable JSON"),
        (a_list, "must describe a LoRA adapter, not 'list'"),
        (no_config, "is not an adapter folder: adapter_config.json not found"),
        (no_weights, "adapter_model.safetensors not found"),
    ],
)
def test_load_adapter_with_damaged_files_raises(folder, spoil, message):
    spoil(folder)
    model = case("bert").copy()
    with pytest.raises(UserError, match=message):
        load_adapter(model, folder)
    assert_untouched(model)


def test_read_adapter_without_a_folder_raises(tmp_path):
    with pytest.raises(UserError, match=r"none does not exist. A run writes its adapter to"):
        read_adapter(tmp_path / "none")


class Bomb:
    """A pickle that runs code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_load_adapter_never_reads_a_pickle(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle, which can run code"):
        load_adapter(case("bert").copy(), folder)
    assert not (tmp_path / "exploded").exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes())
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "lacks .* tensors .*lora_magnitude_vector"),
        ({"lora_bias": True}, "adapter_config.json: lora_bias=True is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* not supported"),
        ({"use_superlora": True}, "use_superlora=True is unknown"),
        ({"superlora_config": {"width": 2}}, "superlora_config=.* is unknown"),
        ({"init_lora_weights": "super"}, "init_lora_weights='super' is unknown"),
        ({"use_rslora": "false"}, "use_rslora='false' must be true or false"),
        ({"trainable_token_indices": [1]}, "lacks 1 tensors .*trainable_tokens_delta"),
        ({"trainable_token_indices": [10**12]}, "index 1000000000000"),
        ({"target_parameters": ["w"]}, "'w' matches no parameter"),
        ({"init_lora_weights": "pissa"}, "'pissa' makes the adapter relative to a changed base"),
        ({"init_lora_weights": "pissa_niter_4"}, "relative to a changed base"),
        ({"init_lora_weights": "olora"}, "relative to a changed base"),
        ({"peft_type": "LOHA"}, "must describe a LoRA adapter, not 'LOHA'"),
        ({"target_modules": None}, "target_modules not found"),
        ({"target_modules": ["q_proj"]}, "leaves no module to adapt"),
        ({"r": "eight"}, "lora.rank='eight': must be a whole number"),
        ({"r": 4}, "tensors of the wrong shape"),
        ({"lora_alpha": 0}, "lora.alpha=0: must be a positive number"),
        ({"lora_dropout": "x"}, "lora.dropout='x': must be a number"),
        ({"rank_pattern": [1]}, r"lora.rank_pattern=\[1\]: must be a mapping"),
        ({"modules_to_save": 7}, r"lora.modules_to_save=\[7\]: must be a list of names"),
        ({"modules_to_save": 7.5}, "a value has the wrong type"),
        ({"modules_to_save": None}, "classifier.bias differs from the base model's"),
        ({"bias": "all"}, "lacks .* tensors"),
    ],
)
def test_load_adapter_with_unsupported_config_raises(folder, changes, message):
    edit_config(folder, **changes)
    model = case("bert").copy()
    with pytest.raises(UserError, match=message):
        load_adapter(model, folder)
    assert_untouched(model)


def test_load_adapter_accepts_peft_settings_without_effect(folder):
    """Its defaults, and keys of later versions that are off."""
    expected = case("bert").logits(load_adapter(case("bert").copy(), folder).model)
    known = peft.LoraConfig(target_modules=["query"]).to_dict()
    own = json.loads((folder / CONFIG).read_text())
    known = {key: value for key, value in known.items() if key not in {*own, "peft_type"}}
    known = json.loads(json.dumps(known, default=str))
    off = {"use_superlora": False, "superlora_config": None, "superlora_pattern": {}}
    set_once = {"eva_config": {"rho": 2.0}, "modules_to_save": "classifier"}
    edit_config(folder, **{**known, **off, **set_once})
    loaded = load_adapter(case("bert").copy(), folder)
    assert torch.equal(case("bert").logits(loaded.model), expected)


def test_load_adapter_of_peft_pissa_raises(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa")
    peft.get_peft_model(case("bert").copy(), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="relative to a changed base"):
        load_adapter(case("bert").copy(), tmp_path)


# What PEFT writes, and we take ---------------------------------------------------------------


def test_load_adapter_accepts_names_without_prefix(folder):
    expected = case("bert").logits(load_adapter(case("bert").copy(), folder).model)
    tensors = load_file(folder / WEIGHTS)
    save_file({key.removeprefix(PREFIX): t for key, t in tensors.items()}, folder / WEIGHTS)
    loaded = load_adapter(case("bert").copy(), folder)
    assert torch.equal(case("bert").logits(loaded.model), expected)


@pytest.mark.parametrize(
    ("name", "targets", "modules_to_save", "embeddings"),
    [
        ("llama", ["embed_tokens", "q_proj"], None, "auto"),
        ("llama", ["q_proj"], None, True),
        ("llama", ["embed_tokens", "lm_head", "q_proj"], None, "auto"),
        ("gpt2", ["wte", "lm_head", "c_attn"], None, "auto"),
        ("gptj", ["wte", "lm_head", "q_proj"], None, "auto"),
        ("llama", ["q_proj"], ["embed_tokens", "lm_head"], "auto"),
        ("bert", ["query", "no_such_module"], ["classifier", "score"], "auto"),
        ("distilbert", ["q_lin"], ["classifier"], "auto"),
    ],
)
def test_load_adapter_of_peft_files_gives_the_same_logits(
    name, targets, modules_to_save, embeddings, tmp_path
):
    this = case(name)
    config = peft.LoraConfig(
        r=2, target_modules=targets, modules_to_save=modules_to_save, init_lora_weights=False
    )
    torch.manual_seed(2)
    theirs = peft.get_peft_model(this.copy(), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    loaded = load_adapter(this.copy(), tmp_path)
    expected = this.logits(theirs)
    torch.testing.assert_close(this.logits(loaded.model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("pattern", [None, "layers|block"])
def test_load_adapter_with_layers_to_transform_gives_the_same_logits(name, pattern, tmp_path):
    this = case(name)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"] if name == "llama" else ["q", "wo"],
        layers_to_transform=[1],
        layers_pattern=pattern and {"llama": "layers", "t5": "block"}[name],
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(this.copy(), config).eval()
    theirs.save_pretrained(tmp_path)
    loaded = load_adapter(this.copy(), tmp_path)
    expected = this.logits(theirs)
    torch.testing.assert_close(this.logits(loaded.model), expected, rtol=0, atol=1e-5)


def test_load_adapter_with_other_base_weights_raises(tmp_path):
    this = case("llama")
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    theirs = peft.get_peft_model(this.copy(), config)
    theirs.save_pretrained(tmp_path)
    other = this.copy()
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(0.1)
    with pytest.raises(UserError, match="another base, with a resized vocabulary"):
        load_adapter(other, tmp_path)
    assert type(other.model.embed_tokens) is nn.Embedding


# Writing -------------------------------------------------------------------------------------


def disk_full(*_, **__):
    raise OSError(28, "No space left on device")


def half_written(tensors, path, **_):
    Path(path).write_bytes(b"half")
    disk_full()


@pytest.mark.parametrize("failing", [disk_full, half_written])
@pytest.mark.parametrize("present", [True, False])
def test_save_adapter_failed_write_keeps_the_folder(failing, present, tmp_path, monkeypatch):
    place = tmp_path / "runs" / "adapter"
    place.parent.mkdir()
    if present:
        save_adapter(bert_adapter(), place)
    before = contents(place) if present else None
    monkeypatch.setattr(save, "save_file", failing)
    with pytest.raises(UserError, match=r"cannot write .*adapter: .*No space left"):
        save_adapter(bert_adapter(rank=5), place)
    assert [path.name for path in place.parent.iterdir()] == (["adapter"] if present else [])
    assert not present or contents(place) == before


def test_save_adapter_failed_rename_restores_the_folder(folder, monkeypatch):
    before = contents(folder)
    rename = os.rename

    def failing(source, target):
        if Path(target) == folder and not str(source).endswith(".old"):
            disk_full()
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    monkeypatch.setattr(folder_swap, "_swap", lambda *_: False)  # as on other systems than Linux
    with pytest.raises(UserError, match="Nothing was changed there"):
        save_adapter(bert_adapter(rank=5), folder)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_save_adapter_also_writes_in_the_same_step(folder):
    before = contents(folder)

    def also(staging):
        (staging / "tokenizer.json").write_text("{}")
        assert contents(folder) == before

    save_adapter(bert_adapter(rank=5), folder, also=also)
    assert set(contents(folder)) == {CONFIG, WEIGHTS, MARK, "tokenizer.json"}
    after = contents(folder)

    def broken(staging):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        save_adapter(bert_adapter(), folder, also=broken)
    assert contents(folder) == after
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_save_adapter_into_a_foreign_folder_raises(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"is not empty.*lost: thesis\.txt"):
        save_adapter(bert_adapter(), tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}
    with pytest.raises(UserError, match=r"thesis\.txt: must be a folder, and is a file"):
        save_adapter(bert_adapter(), tmp_path / "thesis.txt")


def test_save_adapter_into_new_and_empty_folders_works(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    (tmp_path / "linked").mkdir()
    monkeypatch.chdir(tmp_path)
    for place in ("empty", "new/deep/adapter", "link", "link"):
        assert set(contents(save_adapter(bert_adapter(), place))) == {CONFIG, WEIGHTS, MARK}
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "linked", "new"]


# What else messages say -------------------------------------------------------------------------


def test_load_adapter_with_another_class_count_names_it(folder):
    import transformers as tf

    from helpers.architectures import USUAL

    other = tf.BertForSequenceClassification(tf.BertConfig(**USUAL, num_labels=3))
    with pytest.raises(
        UserError, match="have 2 outputs in the file and 3 in the model: give the model as many"
    ):
        load_adapter(other, folder)


def grown_llama():
    model = case("llama").copy()
    model.resize_token_embeddings(70, mean_resizing=False)
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "lm_head.weight has 70 rows, but the base model's has 61. Load it on the base with"),
        (
            {"modules_to_save": ["lm_head"]},
            "have 70 outputs in the file and 61 in the model: .* vocabulary rows",
        ),
    ],
    ids=["copies", "whole"],
)
def test_load_adapter_with_a_resized_vocabulary_names_it(settings, message, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **settings)
    theirs = peft.get_peft_model(grown_llama(), config)
    theirs.save_pretrained(tmp_path, save_embedding_layers=not settings)
    with pytest.raises(UserError, match=message):
        load_adapter(case("llama").copy(), tmp_path)
    grown = grown_llama()
    grown.load_state_dict(
        {
            name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
            for name, tensor in theirs.base_model.model.state_dict().items()
            if "lora_" not in name and "modules_to_save" not in name
        }
    )
    assert load_adapter(grown, tmp_path).layers


def test_adapter_from_leaves_the_given_config_unchanged(folder):
    raw, tensors = read_adapter(folder)
    config = from_peft_config({**raw, "modules_to_save": ["classifier", "score"]})
    adapter = adapter_from(case("bert").copy(), config, tensors, folder)
    assert config.modules_to_save == ["classifier", "score"]
    assert adapter.config.modules_to_save == ["classifier"]


def test_load_adapter_with_unlisted_whole_weights_names_them(folder):
    edit_tensors(folder, lambda t: t.update({f"{PREFIX}other.weight": torch.ones(70, 4)}))
    with pytest.raises(UserError, match="1 unexpected .*whole weights, of a resized vocabulary"):
        load_adapter(case("bert").copy(), folder)


def test_load_adapter_of_named_peft_adapters_names_their_folders(tmp_path):
    model = case("bert").copy()
    for name in ("mine", "yours"):
        config = peft.LoraConfig(target_modules=["query"])
        theirs = peft.get_peft_model(case("bert").copy(), config, adapter_name=name)
        theirs.save_pretrained(tmp_path)
        if name == "mine":
            with pytest.raises(UserError, match=rf"Use the adapter in {tmp_path}/mine\."):
                load_adapter(model, tmp_path)
    with pytest.raises(UserError, match=rf"Use the adapter in {tmp_path}/mine or .*/yours"):
        load_adapter(model, tmp_path)
    assert load_adapter(model, tmp_path / "mine").layers


@pytest.mark.parametrize("take", [Adapter.remove, Adapter.merge_and_unload])
def test_save_adapter_after_removal_raises(take, tmp_path):
    adapter = bert_adapter()
    take(adapter)
    with pytest.raises(UserError, match="was removed from its model: call save_adapter before"):
        save_adapter(adapter, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# What training moves without a gradient --------------------------------------------------------


class Normalised(nn.Module):
    """A base with statistics that training moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).relu())


def train_a_little(adapter: Adapter) -> torch.Tensor:
    """Steps of gradient descent; returns the output in evaluation mode."""
    torch.manual_seed(1)
    trained = [t for t in adapter.named_tensors().values() if t.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(5):
        adapter.model.train()(3 + torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter.model.eval()(STATISTICAL).detach()


STATISTICAL = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
WHOLE = pytest.mark.parametrize("whole", [[], ["norm"]], ids=["frozen", "whole"])


@WHOLE
def test_running_statistics_are_saved_and_restored(whole, tmp_path):
    base = Normalised().eval()
    before = base(STATISTICAL).detach()
    adapter = Adapter(
        Normalised(), LoraConfig(rank=2, targets=["first", "head"], modules_to_save=whole)
    )
    after = train_a_little(adapter)
    save_adapter(adapter, tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size == save.weights_bytes(adapter.exported_tensors())
    loaded = load_adapter(Normalised().eval(), tmp_path)
    torch.testing.assert_close(loaded.model(STATISTICAL), after, rtol=0, atol=0)
    theirs = peft.PeftModel.from_pretrained(Normalised(), tmp_path).eval()
    torch.testing.assert_close(theirs(STATISTICAL), after, rtol=0, atol=1e-6)
    with adapter.disabled():
        torch.testing.assert_close(adapter.model(STATISTICAL), before, rtol=0, atol=0)
    torch.testing.assert_close(adapter.model(STATISTICAL), after, rtol=0, atol=0)
    bare = adapter.remove()
    assert bare.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in bare.state_dict().items())


def test_merge_and_unload_keeps_running_statistics():
    adapter = Adapter(Normalised(), LoraConfig(rank=2, targets=["first", "head"]))
    after = train_a_little(adapter)
    model = adapter.merge_and_unload()
    torch.testing.assert_close(model(STATISTICAL), after, rtol=0, atol=1e-5)


def test_load_adapter_without_statistics_keeps_the_bases(tmp_path):
    theirs = peft.get_peft_model(Normalised(), peft.LoraConfig(r=2, target_modules=["first"]))
    theirs.save_pretrained(tmp_path)
    loaded = load_adapter(Normalised().eval(), tmp_path)
    torch.testing.assert_close(loaded.model(STATISTICAL), theirs.eval()(STATISTICAL))


def test_adapter_set_keeps_statistics_per_adapter(tmp_path):
    from lora_lightning.lora import AdapterSet

    config = {"rank": 2, "targets": ["first", "head"]}
    adapter = Adapter(Normalised(), LoraConfig(**config))
    after = train_a_little(adapter)
    save_adapter(adapter, tmp_path)
    base = Normalised().eval()
    before = base(STATISTICAL)
    adapters = AdapterSet(base)
    torch.testing.assert_close(adapters.add("a", tmp_path)(STATISTICAL), after, rtol=0, atol=0)
    assert torch.equal(adapters[None](STATISTICAL), before)
