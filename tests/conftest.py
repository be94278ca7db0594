"""Tiny models, tokenizers and data, made on the spot: no network, no files of this repository."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from helpers.data import make_rows, write_jsonl
from helpers.models import CHAT_TEMPLATE, word_tokenizer
from helpers.runs import QUIET, TrainedRuns

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, which wait for each other where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# The checks for a GPU, which tests/gpu goes through.
sys.path.append(str(Path(__file__).parent.parent / "experiments" / "gpu"))
GPUS = torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    """Skips what is marked gpu where there is none."""
    if not GPUS:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="torch.cuda is not available"))


HIDDEN = {"is_available": lambda: False, "device_count": lambda: 0}
VISIBLE = {name: getattr(torch.cuda, name) for name in HIDDEN}


@pytest.fixture(scope="session", autouse=True)
def _hidden_gpus():
    """Lets tests and fixtures find no GPU, in this process and in those that they start."""
    with pytest.MonkeyPatch.context() as patch:
        if GPUS:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            for name, value in HIDDEN.items():
                patch.setattr(torch.cuda, name, value)
        yield


@pytest.fixture(autouse=True)
def _gpus_for_their_own_tests(request, monkeypatch):
    """Shows the GPUs to a test that is marked gpu."""
    if GPUS and request.node.get_closest_marker("gpu") is not None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        for name, value in VISIBLE.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture(autouse=True)
def _own_environment():
    """Takes away what Lightning leaves in the environment, such as where processes meet."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory):
    """Keeps caches of datasets out of the user's home, for this process and its children."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_DATASETS_CACHE = cache


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """Folder of a random BERT of two layers, with a word tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny_bert")
    tokenizer = word_tokenizer(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """Folder of a random Llama of two layers, whose tokenizer has BOS and EOS but no padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = word_tokenizer(
        ["<s>", "<unk>", "</s>"], bos_token="<s>", unk_token="<unk>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tiny_llama):
    """A function that loads tiny_llama afresh."""
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="session")
def tiny_mixtral(tiny_llama, tmp_path_factory) -> Path:
    """Folder of a random Mixtral of two layers with four experts each, with tiny_llama's tokens."""
    from transformers import AutoTokenizer, LlamaConfig, MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("tiny_mixtral")
    sizes = LlamaConfig.from_pretrained(tiny_llama).to_diff_dict()
    for name in ("architectures", "model_type"):
        del sizes[name]
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_llama(tiny_llama, tmp_path_factory) -> Path:
    """tiny_llama, whose tokenizer has a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat_llama") / "model"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory) -> Path:
    """Folder of a random T5 of two layers a side, whose tokenizer ends texts with EOS."""
    from tokenizers import processors
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny_t5")
    tokenizer = word_tokenizer(
        ["<pad>", "<unk>", "</s>"],
        bos_token="<pad>",
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    tokenizer.bos_token = None
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_jsonl(tmp_path_factory) -> Path:
    """A JSONL file of 80 labelled rows."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows(80))


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Runs `lora-lightning ARGUMENTS` in this process; returns (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        from lora_lightning.cli.main import main

        monkeypatch.setattr(sys, "argv", ["lora-lightning", *arguments])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def fast() -> list[str]:
    """Overrides that make a run small and silent."""
    return [
        *QUIET,
        "trainer.max_epochs=1",
        "test_before=false",
        "data.batch_size=8",
    ]


@pytest.fixture(scope="session")
def trained_run(fast, tiny_bert, rows_jsonl, tmp_path_factory):
    """Run folders by their overrides, of tiny_bert on rows_jsonl; see `TrainedRuns`."""
    defaults = [*fast, f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"]
    runs = TrainedRuns(tmp_path_factory.mktemp("trained"), defaults)
    yield runs
    runs.check_unchanged()
