"""Quantised bases: LoRA on them is LoRA on the dense weights that they stand for."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from helpers.models import IDS, logits
from lora_lightning.config.schema import ModelConfig
from lora_lightning.data.collators import PaddingCollator
from lora_lightning.inference.predictor import PROBES, load_trained
from lora_lightning.lora import (
    Adapter,
    LoraConfig,
    UserError,
    save_adapter,
)
from lora_lightning.lora.initialization.loftq import initialize_loftq, weight_of
from lora_lightning.lora.layers.base import dequantized
from lora_lightning.models.loading import load_classifier, load_generator
from lora_lightning.models.quantization import experts_left
from lora_lightning.tasks.language_modeling import LanguageModelTask
from lora_lightning.training.module import LoraModule

KINDS = ("nf4", "int8")


def generator(folder, kind=None) -> nn.Module:
    config = ModelConfig(str(folder), quantization=kind, dtype="float32")
    return load_generator(config, AutoTokenizer.from_pretrained(folder)).eval()


def dense_twin(model, folder) -> nn.Module:
    """The unquantised model with the values that the quantised weights stand for."""
    twin = generator(folder)
    with torch.no_grad():
        for name, module in twin.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(dequantized(model.get_submodule(name)))
    return twin


def adapted(model, **settings) -> Adapter:
    adapter = Adapter(model, LoraConfig(rank=3, **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in adapter.named_tensors().values():
            if tensor.requires_grad and tensor.dim() == 2:
                tensor.normal_(std=0.1)
    return adapter


def gradients(adapter) -> dict[str, torch.Tensor]:
    adapter.model.zero_grad()
    adapter.model.train()
    adapter.model(input_ids=IDS).logits.square().mean().backward()
    adapter.model.eval()
    return {name: t.grad.clone() for name, t in adapter.named_tensors().items() if t.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_it_is_lora_on_what_the_weights_stand_for(kind, settings, tiny_llama):
    """Logits and gradients; those after an evaluation too, in which nothing may be repacked."""
    model = generator(tiny_llama, kind)
    twin = dense_twin(model, tiny_llama)
    assert not torch.equal(logits(twin), logits(generator(tiny_llama)))
    ours, truth = (adapted(base, **settings) for base in (model, twin))
    before = gradients(ours)
    # int8 takes its inputs in 8 bits in evaluation, by the library's design
    close = {"rtol": 1e-4, "atol": 1e-4} if kind == "nf4" else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(logits(model), logits(twin), **close)
    expected = gradients(truth)
    for found in (before, gradients(ours)):
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_from_the_weights(kind, tiny_llama):
    """PiSSA's part is that of the dequantised weight, and the model is what it was."""
    model = generator(tiny_llama, kind)
    base = logits(model)
    adapter = Adapter(model, LoraConfig(rank=3, init="pissa"))
    torch.testing.assert_close(logits(model), base, rtol=1e-3, atol=1e-3)
    layer = next(iter(adapter.layers.values()))
    weight = dequantized(layer.base_layer).double()
    u, s, vt = torch.linalg.svd(weight)
    part = layer.scaling * layer.first_B.double() @ layer.first_A.double()
    torch.testing.assert_close(part, u[:, :3] * s[:3] @ vt[:3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_pefts_on_the_same_base(kind, tiny_llama, tmp_path):
    model = generator(tiny_llama, kind)
    adapter = adapted(model)
    save_adapter(adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(generator(tiny_llama, kind), tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "least", "most"), [("nf4", 0.12, 0.16), ("int8", 0.24, 0.28)])
def test_bytes(kind, least, most, tiny_llama):
    """Of the linear layers: 4 bits or 8 of 32; heads as they were."""

    def size(model) -> float:
        return sum(
            p.numel() * p.element_size()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and "lm_head" not in name
            for p in module.parameters()
        )

    model = generator(tiny_llama, kind)
    assert least < size(model) / size(generator(tiny_llama)) < most
    assert type(model.lm_head) is nn.Linear
    whole = sum(p.numel() for p in generator(tiny_llama).parameters())
    adapter = Adapter(model, LoraConfig(rank=1))
    assert adapter.summary().total - adapter.summary().trainable == whole
    with pytest.raises(UserError, match="its weight is quantized"):
        adapter.merge()


def test_experts_that_stay_as_they_are_are_told(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=len(tokenizer), **sizes, **heads)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = generator(tmp_path, "nf4").requires_grad_(False)
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters()}
    assert kinds["gate_up_proj"] == kinds["down_proj"] == torch.float32
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    assert "the weights of experts are not quantised and stay float32" in experts_left(model)
    assert experts_left(generator(tiny_llama, "nf4").requires_grad_(False)) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_is_not_quantised(kind, tiny_bert):
    config = ModelConfig(str(tiny_bert), quantization=kind)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    model, whole = load_classifier(config, tokenizer, ["a", "b"])
    assert type(model.classifier) is nn.Linear
    assert type(model.bert.encoder.layer[0].attention.self.query) is not nn.Linear
    Adapter(model, LoraConfig(modules_to_save=whole))


def test_a_run_with_all_that_follows(fast, tiny_bert, rows_jsonl, tmp_path, run_cli):
    """Train, predict on the quantised base, go on exactly, and merge into the base as it was."""
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", *fast]
    where += ["model.quantization=nf4", "trainer.max_epochs=2", "optim.lr=1e-2"]
    run = tmp_path / "run"
    status, _, err = run_cli("train", *where, f"output_dir={run}")
    assert status == 0, err
    module = load_trained(run / "adapter")
    assert type(module.model.bert.encoder.layer[0].attention.self.query.base_layer) is not nn.Linear
    assert json.loads((run / "result.json").read_text())["total_parameters"] > 20_000

    status, out, err = run_cli(
        "merge", f"adapter={run / 'adapter'}", f"output={tmp_path / 'merged'}"
    )
    assert status == 0, err
    assert "trained on a base in nf4; merged into the base as it was before" in out
    plain = load_trained(run / "adapter", model={"quantization": None})
    told = float(re.search(r"gap to the adapter on the base in nf4: (\S+)", out).group(1))
    batch = PaddingCollator(0)(
        [{"input_ids": ids} for ids in module.tokenizer(list(PROBES))["input_ids"]]
    )
    with torch.no_grad():
        off = [one.eval().task.logits(one.model, batch) for one in (module, plain)]
    assert told == pytest.approx((off[0] - off[1]).abs().max().item(), rel=0.02)
    assert told > 1e-4
    name = "bert.encoder.layer.0.attention.self.query"
    layer = plain.adapter.layers[name]
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    expected = layer.base_layer.weight + layer.delta_weight()
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.quantization=nf5"], "Did you mean 'nf4'"),
        (["model.quantization=nf4", "lora=full"], "freezes the base, and lora=full trains it"),
        (["model.quantization=int8", "model.compile=layer"], "do not go together"),
    ],
)
def test_mistakes_are_told(settings, message, fast, tiny_bert, rows_jsonl, tmp_path, run_cli):
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", *fast]
    status, _, err = run_cli("train", *where, *settings, f"output_dir={tmp_path / 'run'}")
    assert status == 2
    assert message in " ".join(err.split())


def test_the_library_that_is_missing_is_told(tiny_llama, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(UserError, match=r'pip install "lora_lightning\[quant\]"'):
        generator(tiny_llama, "nf4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@torch.no_grad()
def test_loftq_starts_nearer_to_the_weights(kind, model, request):
    """By r singular values of what is missing, as Eckart and Young have it."""
    folder = request.getfixturevalue(model)
    original, quantised = generator(folder), generator(folder, kind)
    adapter = Adapter(quantised, LoraConfig(rank=3, alpha=5))
    initialize_loftq(adapter, original)
    for name, layer in adapter.layers.items():
        weight = weight_of(original.get_submodule(name)).double()
        missing = weight - layer.dense_weight().double()
        left = missing - layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        singular = torch.linalg.svdvals(missing)
        assert left.norm() == pytest.approx(float(singular[3:].norm()), rel=1e-3)
        assert left.norm() < 0.95 * missing.norm()


@pytest.fixture(scope="module")
def tiny_gpt2(tiny_llama, tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny_gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=64)
    ).save_pretrained(folder)
    return folder


def test_loftq_loads_the_unquantised_base_on_the_cpu(tiny_llama, monkeypatch):
    """A GPU, which "meta" stands for, may have no room for it beside the quantised one."""

    def build_model(task, config, tokenizer, shards=None):
        built.append((config.quantization, torch.get_default_device().type))
        return LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama)), []

    built: list[tuple[str | None, str]] = []
    monkeypatch.setattr(LanguageModelTask, "build_model", build_model)
    module = LoraModule(
        LanguageModelTask(),
        ModelConfig(str(tiny_llama), quantization="nf4"),
        LoraConfig(init="loftq"),
    )
    with torch.device("meta"):
        module.configure_model()
    assert built == [("nf4", "meta"), (None, "cpu")]
    assert next(iter(module.adapter.layers.values())).lora_A.is_meta


@pytest.mark.slow
def test_a_loftq_run(tiny_llama, rows_jsonl, run_cli, fast, tmp_path):
    """It trains, PEFT has its logits on the same base, and merged it is the model trained."""
    run = tmp_path / "run"
    status, _, err = run_cli(
        *(
            "train",
            *fast,
            "task=lm",
            "task.generation.max_new_tokens=8",
            "lora=loftq",
            "model.dtype=float32",
        ),
        *("model.quantization=nf4", f"model.name_or_path={tiny_llama}", "optim.lr=0.01"),
        *(f"data.train={rows_jsonl}", f"output_dir={run}"),
    )
    assert status == 0, err
    trained = load_trained(run / "adapter").model
    theirs = peft.PeftModel.from_pretrained(generator(tiny_llama, "nf4"), run / "adapter").eval()
    torch.testing.assert_close(logits(trained), logits(theirs), rtol=1e-4, atol=1e-4)

    adapter = f"adapter={run / 'adapter'}"
    status, out, err = run_cli("merge", adapter, f"output={tmp_path / 'merged'}")
    assert status == 0, err
    assert "merged into what is left of it" in out
    merged = generator(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-3, atol=1e-3)
    wrong = peft.PeftModel.from_pretrained(generator(tiny_llama), run / "adapter").eval()
    assert (logits(wrong) - logits(trained)).abs().max() > 1e-2

    for arguments in (
        ("predict", adapter, "text=a", "model.quantization=null"),
        ("export", adapter, f"output={tmp_path / 'files'}"),
        ("combine", adapter, "weights=0.5", f"output={tmp_path / 'half'}"),
    ):
        status, _, err = run_cli(*arguments)
        assert status == 2, arguments
        assert "lora.init=loftq" in err
        assert "lora-lightning merge" in err

    again = [
        *("train", *fast, "task=lm", "task.generation.max_new_tokens=8", "model.dtype=float32")
    ]
    again += [f"model.name_or_path={tiny_llama}", f"data.train={rows_jsonl}"]
    again += [f"output_dir={tmp_path / 'other'}"]
    last = f"adapter={run / 'checkpoints' / 'last.ckpt'}"
    for start in (adapter, last):
        for own in (["model.quantization=nf4"], []):
            status, _, err = run_cli(*again, start, *own)
            assert status == 2, (start, own)
            assert "would be missing, or there twice" in err
    status, _, err = run_cli(*again, last, "lora=loftq", "model.quantization=nf4")
    assert status == 0, err
    status, _, err = run_cli(
        "import", last.replace("adapter", "source"), f"output={tmp_path / 'i'}"
    )
    assert status == 0, err
    sidecar = json.loads((tmp_path / "i" / "lora_lightning.json").read_text())
    assert sidecar["settings"]["lora"]["init"] == "loftq"


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_a_base_is_quantised_where_its_weights_are(shards, tiny_llama, tmp_path):
    """And not because its config says so; what was saved quantised is loaded so."""
    asks = generator(tiny_llama, "nf4")
    asks.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "saved")
    model = generator(tmp_path / "saved")
    torch.testing.assert_close(logits(model), logits(asks))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    generator(tiny_llama).save_pretrained(tmp_path / "plain", max_shard_size=shards)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "plain")
    for kind in (None, "int8"):
        with pytest.raises(UserError, match=r"layers \(bitsandbytes\), but its weights are not"):
            generator(tmp_path / "plain", kind)


def test_a_base_with_an_adapter_beside_it_is_refused(tiny_llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    save_adapter(adapted(generator(tiny_llama)), tmp_path / "adapter")
    for path in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(path, base)
    with pytest.raises(UserError, match="holds an adapter beside the base model"):
        generator(base)
