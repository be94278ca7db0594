"""Tiny models, tokenizers and data, made on the spot: no network, no files of this repository."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, which wait for each other where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# The checks for a GPU, which tests/gpu goes through.
sys.path.append(str(Path(__file__).parent.parent / "experiments" / "gpu"))
GPUS = torch.cuda.is_available()

WORDS = (
    "the a film food hotel was is very not never good bad fine poor lovely awful slow quick warm "
    "cold and but service staff room story price cheap dear clean dirty again return would loved "
    "hated enjoyed waste time money boring funny sad happy tasty bland . ! , ?"
).split()


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


def _word_tokenizer(specials: list[str], **kwargs):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: index for index, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=specials[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in kwargs:
        first, last = kwargs["cls_token"], kwargs["sep_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B:1 {last}:1",
            special_tokens=[(first, vocab[first]), (last, vocab[last])],
        )
    else:
        bos = kwargs["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocab[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **kwargs)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """Folder of a random BERT of two layers, with a word tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny_bert")
    tokenizer = _word_tokenizer(
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
    tokenizer = _word_tokenizer(
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


CHAT_TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} : {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)


@pytest.fixture(scope="session")
def chat_llama(tiny_llama, tmp_path_factory) -> Path:
    """tiny_llama, whose tokenizer has a chat template."""
    import shutil

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
    tokenizer = _word_tokenizer(
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


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of random words of which one decides the label: learnable, of varied length."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    rows = []
    for index in range(count):
        label = ("negative", "positive")[index % 2]
        length = 3 + int(torch.randint(15, (1,), generator=generator))
        words = [pick(WORDS[:10]) for _ in range(length)]
        words[length // 2] = pick(
            ["lovely", "loved", "tasty"] if label == "positive" else ["awful", "hated", "bland"]
        )
        rows.append({"text": " ".join(words), "label": label})
    return rows


@pytest.fixture(scope="session")
def rows_jsonl(tmp_path_factory) -> Path:
    """A JSONL file of 80 labelled rows."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(80)))
    return path


class Waits(TorchDispatchMode):
    """Notes the operations for whose result a program would have to wait for a GPU.

    The device "meta" may stand for the GPU. On a CPU transformers looks, once a forward pass,
    whether there are padded or joined rows; that alone is left out there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        reads = name == "_local_scalar_dense"
        if masks or reads or name in ("nonzero", "masked_select"):
            callers = {Path(frame.filename).name for frame in traceback.extract_stack()}
            if args[0].device.type != "cpu" or "masking_utils.py" not in callers:
                self.found.append(name)
        if reads and args[0].is_meta:
            return True
        result = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):  # from the second argument, or to a new tensor
            source = args[1] if name == "copy_" else args[0]
            if source.device != result.device:
                self.found.append(f"{source.device} -> {result.device}")
        return result


class OnImitatedGpu(torch.Tensor):
    """A tensor that `ImitatedGpu` takes for one on a GPU."""


class ImitatedGpu(TorchFunctionMode):
    """Under it tensors may say they are on a GPU, and have values.

    What is drawn in one of them comes from a generator other than the CPU's, as on a GPU. What
    has to wait for one's values is noted.
    """

    DRAWS = ("uniform_", "normal_", "kaiming_uniform_", "trunc_normal_", "xavier_uniform_")
    WAITS = ("cpu", "tolist", "item", "__bool__", "__int__", "__index__", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(77)
        self.waits: list[str] = []

    @staticmethod
    def take(model: nn.Module) -> nn.Module:
        """Has the parameters of a model be on the GPU."""
        for part in model.modules():
            for name, parameter in part.named_parameters(recurse=False):
                there = parameter.detach().as_subclass(OnImitatedGpu)
                part._parameters[name] = nn.Parameter(there, parameter.requires_grad)
        return model

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args else kwargs.get("tensor")
        there = isinstance(first, OnImitatedGpu)
        if function == torch.Tensor.device.__get__ and there:
            return torch.device("cuda", 0)
        if function == torch.Tensor.is_cuda.__get__:
            return there
        if function.__name__ in self.DRAWS and there:
            kwargs["generator"] = self.generator
        asked = kwargs.get("device")
        moved = asked is not None and torch.device(asked).type == "cuda"
        if moved:
            kwargs["device"] = "cpu"
        if function.__name__ in self.WAITS and there:
            self.waits.append(function.__name__)
        result = function(*args, **kwargs)
        here = function.__name__ == "cpu" or (asked is not None and not moved)
        if not isinstance(result, torch.Tensor) or not (here or moved):
            return result
        return result.as_subclass(torch.Tensor if here else OnImitatedGpu)


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


def printed_overrides(arguments: list[str]) -> list[str]:
    """What a printed command sets: of a sweep (-m) the first of each of its values.

    Args:
        arguments: the verb and what follows it.
    """
    others = ("-", "resume=", "job", "device_gib=")
    overrides = [argument for argument in arguments[1:] if not argument.startswith(others)]
    if "-m" in arguments:
        overrides = [re.sub(r"=([^\[{,]+),.*", r"=\1", override) for override in overrides]
    return overrides


@pytest.fixture(scope="session")
def fast() -> list[str]:
    """Overrides that make a run small and silent."""
    return [
        "trainer=cpu",
        "trainer.precision=32-true",
        "trainer.max_epochs=1",
        "trainer.enable_progress_bar=false",
        "callbacks.progress_bar=null",
        "callbacks.rich_summary=null",
        "test_before=false",
        "data.batch_size=8",
    ]
