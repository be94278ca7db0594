"""New tokens in whole runs: trained, stored, loaded again by every verb, merged, or refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_packed_sweep import alone, assert_runs_equal, make_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.data import write_jsonl
from helpers.models import logits
from helpers.runs import result_of
from lora_lightning import load_trained
from lora_lightning.config.compose import compose_config, with_direction
from lora_lightning.config.instantiate import instantiate_all
from lora_lightning.config.schema import ModelConfig
from lora_lightning.inference.convert import import_adapter
from lora_lightning.lora import UserError
from lora_lightning.models.tokenizer import load_tokenizer
from lora_lightning.sweeps.packed.pack import Pack
from lora_lightning.training.run import train

NEW = """model.new_tokens=["<think>","</think>"]"""
NAMES = ("film", "food", "hotel", "staff", "room", "story", "price")
ANSWER = "<think> good </think>"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Every target has both new tokens around a known one, and some sources have one."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"document": f"the {NAMES[i % 7]} {'<think>' * (i % 2)} was", "summary": ANSWER}
        for i in range(60)
    ]
    write_jsonl(path, rows)
    return path


@pytest.fixture(scope="module")
def bases(tiny_llama, tmp_path_factory) -> dict[str, Path]:
    """A model whose output layer is its own, and one whose output layer is the embeddings."""
    tied = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(tiny_llama, tied)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight.data *= 10  # else a frozen head could make no token likely
    model.save_pretrained(tied)
    return {"untied": tiny_llama, "tied": tied}


@pytest.fixture(scope="module")
def changes(bases, pairs):
    """A function that returns what a run changes of fast ones."""

    def make(name: str, *more: str) -> list[str]:
        return [
            *(
                "task=summarization",
                'task.prompt="{source}"',
                "task.generation.max_new_tokens=6",
                NEW,
            ),
            *(f"model.name_or_path={bases[name]}", f"data.train={pairs}", "data.batch_size=4"),
            *("trainer.max_epochs=6", "optim.lr=1.5e-2", "task.generate_rows=0"),
            *("callbacks.samples=null", *more),
        ]

    return make


@pytest.fixture(scope="module")
def settings(changes, fast):
    """A function that returns the settings of a run."""
    return lambda name, *more: [*fast, *changes(name, *more)]


@pytest.fixture(scope="module")
def trained(trained_run, changes):
    """A function that returns the run of a model by its name."""
    return lambda name, *more: trained_run(*changes(name, *more))


def logits_of_new(model, tokenizer) -> torch.Tensor:
    ids = torch.tensor([tokenizer("the film <think> was <think>good</think>")["input_ids"]])
    return logits(model.eval(), ids)


def last_line(out: str) -> str:
    """Without what a run printed before it."""
    return out.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_new_tokens_are_learned_and_merged(name, trained, bases, run_cli, tmp_path):
    run = trained(name)
    adapter = run / "adapter"
    status, out, _ = run_cli("predict", f"adapter={adapter}", "text=the room was")
    assert (status, last_line(out)) == (0, ANSWER)
    assert result_of(run)["test/token_accuracy"] == 1.0

    old = AutoTokenizer.from_pretrained(bases[name])
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer("the film<think>good</think>", add_special_tokens=False)["input_ids"]
    assert ids == [*old("the film", add_special_tokens=False)["input_ids"], len(old), *ids[3:]]
    assert ids[3:] == [*old("good", add_special_tokens=False)["input_ids"], len(old) + 1]

    module = load_trained(adapter)
    expected = logits_of_new(module.model, tokenizer)
    status, out, _ = run_cli("merge", f"adapter={adapter}", f"output={tmp_path / 'merged'}")
    assert status == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of_new(merged, again), expected, rtol=0, atol=1e-4)
    assert merged.config.vocab_size == len(old) + 2 == len(again)
    assert merged.config.tie_word_embeddings is (name == "tied")
    base = AutoModelForCausalLM.from_pretrained(bases[name])
    for end in ("model.embed_tokens", "lm_head"):
        rows, were = merged.get_submodule(end).weight, base.get_submodule(end).weight
        assert torch.equal(rows[:-2], were)
        assert (rows[-2:] - were.mean(0)).abs().amax(1).min() > 0.05  # they have moved


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_new_tokens_load_in_peft(name, trained, bases):
    import peft

    adapter = trained(name) / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(bases[name])
    base.resize_token_embeddings(len(tokenizer))
    theirs = logits_of_new(peft.PeftModel.from_pretrained(base, adapter), tokenizer)
    ours = logits_of_new(load_trained(adapter).model, tokenizer)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    card = (adapter / "README.md").read_text()
    assert f"base.resize_token_embeddings({len(tokenizer)})" in card
    stored = load_file(adapter / "adapter_model.safetensors")
    rows = [t for n, t in stored.items() if n.endswith("trainable_tokens_delta")]
    assert [t.shape for t in rows] == [(2, 32)] * (1 if name == "tied" else 2)


@pytest.mark.slow
def test_new_tokens_train_on_a_16_bit_base_with_checkpointed_layers(trained):
    run = trained("tied", "trainer.precision=bf16-true", "model.gradient_checkpointing=true")
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    rows = stored["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert not torch.equal(rows, rows.bfloat16().float())
    assert result_of(run)["test/token_accuracy"] == 1.0
    # The base is told to be the same in either precision, of which a grown row would not be.
    for dtype in ("float32", "bfloat16"):
        model = load_trained(run / "adapter", model={"dtype": dtype}).model
        assert model.lm_head.rows.dtype == torch.float32


def test_new_tokens_on_another_base_are_refused(trained, bases, tmp_path):
    shutil.copytree(bases["tied"], tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(bases["tied"])
    model.model.embed_tokens.weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="trained on another base model"):
        load_trained(trained("tied") / "adapter", model={"name_or_path": str(tmp_path / "other")})


@pytest.mark.slow
def test_new_tokens_run_resumes_exactly(settings, trained, tmp_path):
    short = ("callbacks.last.every_n_steps=1", "trainer.max_epochs=2")
    whole = trained("untied", *short)
    part = tmp_path / "part"
    overrides = settings("untied", *short, f"output_dir={part}")
    with pytest.raises(RuntimeError, match="killed"):
        train(compose_config(overrides), callbacks=[*_callbacks(overrides), _die()])
    train(compose_config(overrides), resume=True)
    files = [run / "adapter" / "adapter_model.safetensors" for run in (part, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def _callbacks(overrides):
    return instantiate_all(with_direction(compose_config(overrides)).callbacks)


def _die():
    from lightning.pytorch.callbacks import Callback

    class Die(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 9:
                raise RuntimeError("killed")

    return Die()


@pytest.mark.slow
def test_new_tokens_run_warm_starts_from_the_same_tokens(settings, trained, tmp_path):
    first = trained("tied")
    for source in (first / "adapter", first / "checkpoints" / "last.ckpt"):
        config = compose_config(
            [
                *settings("tied", f"adapter={source}", f"output_dir={tmp_path / source.name}"),
                *("optim.lr=1e-9", "trainer.max_epochs=1"),
            ]
        )
        train(config)
        rows = load_file(tmp_path / source.name / "adapter" / "adapter_model.safetensors")
        was = load_file(first / "adapter" / "adapter_model.safetensors")
        assert rows.keys() == was.keys()
        if source.name == "adapter":
            for name, tensor in was.items():
                torch.testing.assert_close(rows[name], tensor, rtol=0, atol=1e-6)
        other = settings(
            "tied", f"adapter={source}", f"output_dir={tmp_path / f'no-{source.name}'}"
        )
        other[other.index(NEW)] = """model.new_tokens=["</think>","<think>"]"""
        with pytest.raises(UserError, match="Give the same tokens in the same order"):
            train(compose_config(other))


@pytest.mark.slow
def test_full_fine_tuning_stores_a_model_with_the_grown_vocabulary(trained, run_cli, bases):
    run = trained("tied", "lora=full", "optim.lr=1e-2")
    model = AutoModelForCausalLM.from_pretrained(run / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    rows = len(AutoTokenizer.from_pretrained(bases["tied"])) + 2
    assert model.config.vocab_size == len(tokenizer) == model.lm_head.weight.shape[0] == rows
    status, out, _ = run_cli("predict", f"adapter={run / 'adapter'}", "text=the room was")
    assert (status, last_line(out)) == (0, ANSWER)


@pytest.mark.slow
def test_new_tokens_decide_the_class_of_an_encoder(tiny_bert, fast, tmp_path, run_cli):
    """The encoder has no output layer to learn; the token that decides the label is a new one."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"text": f"the {NAMES[i % 7]} was [{'UP' if i % 2 else 'DOWN'}] number", "label": i % 2}
        for i in range(80)
    ]
    write_jsonl(path, rows)
    common = [f"model.name_or_path={tiny_bert}", f"data.train={path}", "optim.lr=1e-2"]
    new = """model.new_tokens=["[UP]","[DOWN]"]"""
    run = tmp_path / "run"
    result = train(
        compose_config([*fast, *common, new, f"output_dir={run}", "trainer.max_epochs=6"])
    )
    assert result["test/accuracy"] == 1.0
    status, out, _ = run_cli("evaluate", f"adapter={run / 'adapter'}", "trainer=cpu")
    assert status == 0
    assert json.loads(out[out.index("{") :])["test/accuracy"] == 1.0


@pytest.mark.slow
def test_new_tokens_are_learned_by_an_encoder_decoder(tiny_t5, pairs, fast, tmp_path, run_cli):
    run = tmp_path / "run"
    overrides = [*fast, "task=summarization", f"model.name_or_path={tiny_t5}", NEW]
    overrides += [f"data.train={pairs}", "optim.lr=3e-2", f"output_dir={run}"]
    train(compose_config([*overrides, "trainer.max_epochs=8", "task.generation.max_new_tokens=6"]))
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert [n for n in stored if "token_adapter" in n] == [
        "base_model.model.shared.token_adapter.trainable_tokens_delta"
    ]
    status, out, _ = run_cli("predict", f"adapter={run / 'adapter'}", "text=the room was")
    assert (status, last_line(out)) == (0, ANSWER)


@pytest.mark.slow
def test_new_tokens_in_packed_runs_equal_solo_runs(settings, tmp_path):
    ranks = ["lora.rank=2", "lora.rank=5"]
    common = settings("tied", "trainer.log_every_n_steps=1", "trainer.max_epochs=2")
    folders = [make_run(tmp_path / f"packed{i}", [*common, r]) for i, r in enumerate(ranks)]
    pack = Pack(folders)
    pack.run()
    assert [slot.error for slot in pack.slots] == [None, None]
    for index, rank in enumerate(ranks):
        assert_runs_equal(folders[index], alone(tmp_path / f"alone{index}", [*common, rank]))


@pytest.mark.slow
def test_new_tokens_combine_with_the_same_tokens_alone(trained, run_cli, tmp_path):
    adapter = trained("untied") / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    expected = logits_of_new(load_trained(adapter).model, tokenizer)
    status, _, _ = run_cli(
        *("combine", f"adapter={adapter},{adapter}", f"output={tmp_path / 'combined'}")
    )
    assert status == 0
    found = logits_of_new(load_trained(tmp_path / "combined").model, tokenizer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    status, out, err = run_cli("export", f"adapter={adapter}", "check=vllm,lorax")
    assert status == 2
    assert out.count("rows of new tokens") == 2
    other = trained("tied") / "adapter"
    status, _, err = run_cli(
        "combine", f"adapter={adapter},{other}", f"output={tmp_path / 'no'}", "whole=first"
    )
    assert status == 2
    assert "rows of the same tokens" in " ".join(err.split()) or "one base model" in err


def test_check_shows_new_tokens(settings, run_cli, tmp_path):
    arguments = settings("untied", f"output_dir={tmp_path / 'out'}")
    arguments[arguments.index(NEW)] = """model.new_tokens=["<think>","</think>","<never>"]"""
    status, out, err = run_cli("check", *arguments)
    assert status == 0, err
    assert "embeddings grown from 53 rows to 56" in out
    assert re.search(r"'<think>', id 53, in (\d+) of \1 training rows", out)
    assert "WARNING no training row has '<never>'" in out
    assert "model.embed_tokens                3 rows" in out
    assert "lm_head                           3 rows" in out


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('["<think>","good"]', "the tokenizer already has 'good'.*trainable_token_indices=\\["),
        ('["<think>","<think>"]', "must name each token once, not '<think>' twice"),
        ('["<think>",""]', "must be a list of texts that are not empty"),
        ('["<think>"," "]', "must be a list of texts that are not empty"),
    ],
)
def test_new_tokens_with_a_wrong_list_are_refused(value, message, settings, run_cli, tmp_path):
    arguments = settings("untied", f"output_dir={tmp_path / 'out'}")
    arguments[arguments.index(NEW)] = f"model.new_tokens={value}"
    for verb in ("train", "check"):
        status, _, err = run_cli(verb, *arguments)
        assert status == 2
        assert err.count("\n") == 1
        assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


def test_new_tokens_with_unsupported_settings_are_refused(settings, trained, run_cli, tmp_path):
    def refused(message, *arguments):
        status, _, err = run_cli(*arguments)
        assert status == 2
        assert message in err

    run = ("train", *settings("untied", f"output_dir={tmp_path / 'out'}"))
    refused("both set which rows are trained", *run, "lora.trainable_token_indices=[3]")
    refused("lora.targets: not supported on", *run, "lora.targets=[embed_tokens,q_proj]")
    refused("lora.modules_to_save: not supported on", *run, "lora.modules_to_save=[lm_head]")
    adapter = f"adapter={trained('tied') / 'adapter'}"
    refused("the tokens of adapter=", "predict", adapter, "text=a", NEW.replace("<", "[", 1))


def test_tokenizer_with_more_tokens_than_the_model_is_refused_by_its_texts(
    settings, trained, bases, run_cli, tmp_path
):
    """Told before training, and only where a text has one of those tokens."""
    larger = load_tokenizer(ModelConfig(str(bases["untied"]), new_tokens=["<think>", "</think>"]))
    larger.save_pretrained(tmp_path / "tokenizer")
    run = settings("untied", f"model.tokenizer={tmp_path / 'tokenizer'}", "trainer.max_epochs=1")
    run.remove(NEW)
    for verb in ("train", "check"):
        status, _, err = run_cli(verb, *run, f"output_dir={tmp_path / 'out'}")
        assert status == 2
        assert "the train data: holds the token '</think>', id 54" in err
        assert "the model has 53 embeddings" in err
        assert "model.new_tokens=[...]" in err
    assert not (tmp_path / "out").exists()

    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(f'{{"document": "the {n}", "summary": "good"}}\n' for n in NAMES * 4))
    train(compose_config([*run, f"data.train={plain}", f"output_dir={tmp_path / 'plain'}"]))
    adapter = f"adapter={tmp_path / 'plain' / 'adapter'}"
    status, _, err = run_cli("predict", adapter, "text=the film <think>")
    assert status == 2
    assert "holds the token '<think>', id 53" in err


def test_new_tokens_are_imported_from_peft_and_from_a_checkpoint(trained, bases, tmp_path):
    run = trained("tied")
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    expected = logits_of_new(load_trained(run / "adapter").model, tokenizer)
    (best,) = (run / "checkpoints").glob("best-*.ckpt")
    base = f"model.name_or_path={bases['tied']}"
    for name, source in (("peft", run / "adapter"), ("checkpoint", best)):
        task = ["task=summarization", base] if name == "peft" else []
        import_adapter(source, tmp_path / name, [*task, "trainer.precision=32-true"])
        found = load_trained(tmp_path / name)
        assert torch.equal(logits_of_new(found.model, tokenizer), expected)
        assert found.tokenizer.get_vocab() == tokenizer.get_vocab()


def in_processes(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_lightning", "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_new_tokens_in_two_processes_equal_one(settings, tmp_path):
    where = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2"]
    common = ["trainer.max_epochs=1", "optim.name=SGD", "data.max_tokens=null"]
    two, one = tmp_path / "two", tmp_path / "one"
    given = [item for item in settings("tied", *common) if item != "trainer=cpu"]
    done = in_processes(*given, *where, f"output_dir={two}")
    assert done.returncode == 0, done.stderr
    train(compose_config(settings("tied", *common, "data.batch_size=4", f"output_dir={one}")))
    ours, truth = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (two, one))
    assert ours.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp2", "tp"])
def test_new_tokens_on_a_sharded_base_are_refused(way, settings, tmp_path):
    given = [item for item in settings("tied") if item != "trainer=cpu"]
    where = [f"trainer={way}", "trainer.accelerator=cpu", "trainer.devices=1"]
    done = in_processes(*given, *where, f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "model.new_tokens: not supported with a sharded base" in done.stderr
    assert "Use trainer=ddp" in done.stderr
    assert not (tmp_path / "out").exists()
