"""Tasks whose target is text: what the model sees, what it learns, what it generates."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import transformers as tf
from datasets import Dataset
from torch.nn import functional as F
from torchmetrics import MeanMetric

from helpers.gpu import ImitatedGpu, OnImitatedGpu, Waits
from lora_lightning.config.schema import ModelConfig
from lora_lightning.data.collators import MicroBatches, PackingCollator, PaddingCollator
from lora_lightning.lora import Adapter, LoraConfig, UserError
from lora_lightning.models.forward import check_packing
from lora_lightning.models.model_config import load_model_config
from lora_lightning.models.private_api import masks_without_waiting
from lora_lightning.models.tokenizer import load_tokenizer
from lora_lightning.tasks import IGNORE, build_task, to_device
from lora_lightning.tasks.metrics import Perplexity, Rouge, TokenAccuracy


def setup(folder, **settings):
    """A task that knows its model's kind, and the tokenizer."""
    config = ModelConfig(name_or_path=str(folder))
    task = build_task(settings)
    task.prepare(load_model_config(config))
    return task, load_tokenizer(config), config


def encode(task, tokenizer, rows, max_length=64, **more):
    data = Dataset.from_list(rows)
    task.learn({"train": data})
    encoded = task.encode(data[:], tokenizer, max_length, **more)
    return [
        {name: values[i] for name, values in encoded.items()}
        for i in range(len(encoded["input_ids"]))
    ]


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


# Summarization -----------------------------------------------------------------------------------

ROW = {"document": "the film was funny and sad", "summary": "good film"}


def test_causal_example_token_by_token(tiny_llama):
    task, tokenizer, _ = setup(
        tiny_llama, name="summarization", prompt="the {source} again", max_new_tokens=4
    )
    (example,) = encode(task, tokenizer, [ROW])
    seen = "<s> the the film was funny and sad again good film </s>".split()
    assert words(tokenizer, example["input_ids"]) == seen
    learned = [None if i == IGNORE else words(tokenizer, [i])[0] for i in example["labels"]]
    assert learned == [None] * 9 + ["good", "film", "</s>"]
    (prompt,) = encode(task, tokenizer, [ROW], targets=False)
    assert prompt["input_ids"] == example["input_ids"][:9]
    assert "labels" not in prompt


def test_eos_is_learned_where_it_pads(tiny_llama):
    task, tokenizer, _ = setup(tiny_llama, name="summarization", max_new_tokens=4)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = encode(task, tokenizer, [ROW, {"document": "staff", "summary": "slow slow slow"}])
    batch = PaddingCollator(tokenizer.pad_token_id)(rows)
    for row, labels in zip(rows, batch["labels"], strict=True):
        kept = labels[labels != IGNORE].tolist()
        assert kept[-1] == tokenizer.eos_token_id
        assert kept.count(tokenizer.eos_token_id) == 1
        assert batch["attention_mask"].sum(1).tolist() == [len(r["input_ids"]) for r in rows]
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1


def test_encoder_decoder_example(tiny_t5):
    task, tokenizer, _ = setup(tiny_t5, name="summarization", prompt="{source}")
    (example,) = encode(task, tokenizer, [ROW])
    assert words(tokenizer, example["input_ids"]) == "the film was funny and sad </s>".split()
    assert words(tokenizer, example["labels"]) == ["good", "film", "</s>"]
    assert task.peft_task_type == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("max_length", [12, 16, 20])
def test_the_source_is_shortened_never_the_target(tiny_llama, max_length):
    task, tokenizer, _ = setup(
        tiny_llama, name="summarization", prompt="very {source} never", max_new_tokens=3
    )
    target = "good good good good good"
    rows = [{"document": "cold " * 50, "summary": target}, {"document": "cold", "summary": "good"}]
    long, short = encode(task, tokenizer, rows, max_length)
    assert len(long["input_ids"]) == max_length
    assert words(tokenizer, long["input_ids"])[-7:] == ["never", *target.split(), "</s>"]
    assert words(tokenizer, long["input_ids"])[:3] == ["<s>", "very", "cold"]
    assert long["truncated"]
    assert not short["truncated"]
    # A prediction's prompt leaves the room that generation needs.
    prompt = encode(task, tokenizer, rows, max_length, targets=False)[0]["input_ids"]
    assert len(prompt) + 3 + 1 == max_length


def test_rows_without_anything_to_learn_are_empty(tiny_llama):
    task, tokenizer, _ = setup(tiny_llama, name="summarization", max_new_tokens=4)
    rows = [
        ROW,
        {"document": "", "summary": "good"},
        {"document": "bad", "summary": "  "},
        {"document": "bad", "summary": None},
        {"document": "bad", "summary": "good " * 100},
    ]
    found = encode(task, tokenizer, rows)
    assert [len(example["input_ids"]) > 0 for example in found] == [True] + [False] * 4


# Language modelling ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [4, 5, 7, 64])
def test_lm_predicts_each_token_once(tiny_llama, max_length):
    task, tokenizer, _ = setup(tiny_llama, name="lm", max_new_tokens=2, blocks=False)
    text = "the a film food hotel is was very not never good bad"
    examples = encode(task, tokenizer, [{"text": text}, {"text": "fine"}], max_length)
    assert all(len(example["input_ids"]) <= max_length for example in examples)
    for row, expected in ((0, text.split()), (1, ["fine"])):
        mine = [example for example in examples if example["row"] == row]
        learned = [label for example in mine for label in example["labels"][1:]]
        assert words(tokenizer, learned) == [*expected, "</s>"]
        assert mine[0]["input_ids"][0] == tokenizer.bos_token_id
        assert sum(ids.count(0) for ids in (e["input_ids"] for e in mine)) == 1
        assert all(example["labels"][0] == IGNORE for example in mine)
        assert all(e["labels"][1:] == e["input_ids"][1:] for e in mine)


DOCUMENTS = [
    "the a film food hotel is was very not never good bad fine poor",
    "lovely film",
    "",
    "slow but warm",
    "the staff was never good and the room was cold",
]


@pytest.mark.parametrize("max_length", [9, 12, 40, 64])
def test_lm_blocks_are_full_and_hold_each_token_once(tiny_llama, max_length):
    """Where a document begins, or goes on in a new block, its first token is given, not learned."""
    task, tokenizer, _ = setup(tiny_llama, name="lm", max_new_tokens=2)
    rows = [{"text": text} for text in DOCUMENTS]
    examples = encode(task, tokenizer, rows, max_length)
    blocks = [example for example in examples if example["input_ids"]]
    assert len(examples) - len(blocks) == 1  # the empty document, to be counted as dropped
    # A block ends where no document can begin in what is left of it.
    assert all(max_length - 8 < len(e["input_ids"]) <= max_length for e in blocks[:-1])
    learned = []
    for example in blocks:
        for label, token, place in zip(
            example["labels"], example["input_ids"], example["position_ids"], strict=True
        ):
            assert label == (IGNORE if place == 0 else token)
            learned += [label] if label != IGNORE else []
    texts = [text for text in DOCUMENTS if text]
    assert words(tokenizer, learned) == [w for text in texts for w in (*text.split(), "</s>")]
    begun = [e["input_ids"].count(tokenizer.bos_token_id) for e in blocks]
    assert sum(begun) == len(texts)


def test_lm_blocks_give_the_loss_of_documents_apart(tiny_llama):
    """Documents of a block do not see each other; one whose end is elsewhere loses its context."""
    losses = []
    for blocks in (True, False):
        task, tokenizer, config = setup(tiny_llama, name="lm", max_new_tokens=2, blocks=blocks)
        examples = encode(task, tokenizer, [{"text": text} for text in DOCUMENTS if text], 64)
        assert len(examples) == (1 if blocks else 4)
        model, _ = adapted(task, config, tokenizer)
        collate = PackingCollator() if blocks else PaddingCollator(tokenizer.pad_token_id)
        output = task.loss(model, collate(examples))
        losses.append((output.total.item(), int(output.count)))
    assert losses[0][1] == losses[1][1] == 33
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-12)


# Conversations -----------------------------------------------------------------------------------


def chat(chat_llama, **settings):
    task, tokenizer, _ = setup(chat_llama, name="instruct", max_new_tokens=4, **settings)
    tokenizer.add_tokens(["system", "user", "assistant", ":"])
    return task, tokenizer


def test_multi_turn_conversation_token_by_token(chat_llama):
    task, tokenizer = chat(chat_llama)
    messages = [
        ("system", "very good"),
        ("user", "the film ?"),
        ("assistant", "funny"),
        ("user", "food ?"),
        ("assistant", "not good"),
    ]
    rows = [{"messages": [{"role": r, "content": c} for r, c in messages]}]
    (example,) = encode(task, tokenizer, rows)
    table = [
        (word, label != IGNORE)
        for word, label in zip(
            words(tokenizer, example["input_ids"]), example["labels"], strict=True
        )
    ]
    assert table == [
        *((w, False) for w in "<s> system : very good </s>".split()),
        *((w, False) for w in "<s> user : the film ? </s>".split()),
        *((w, False) for w in "<s> assistant :".split()),
        *((w, True) for w in "funny </s>".split()),
        *((w, False) for w in "<s> user : food ? </s>".split()),
        *((w, False) for w in "<s> assistant :".split()),
        *((w, True) for w in "not good </s>".split()),
    ]
    (prompt,) = encode(task, tokenizer, [{"messages": rows[0]["messages"][:4]}], targets=False)
    assert prompt["input_ids"] == example["input_ids"][: len(prompt["input_ids"])]
    assert words(tokenizer, prompt["input_ids"])[-3:] == ["<s>", "assistant", ":"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "food ?", "completion": "good"},
        {"question": "food ?", "answer": "good"},
        {"instruction": "food ?", "input": "", "output": "good"},
        {"conversations": [{"from": "human", "value": "food ?"}, {"from": "gpt", "value": "good"}]},
        {
            "prompt": [{"role": "user", "content": "food ?"}],
            "completion": [{"role": "assistant", "content": "good"}],
        },
        {
            "messages": [
                {"role": "user", "content": "food ?"},
                {"role": "assistant", "content": "good"},
                {"role": "user", "content": "again ?"},
            ]
        },
    ],
    ids=["prompt", "question", "alpaca", "sharegpt", "lists", "open end"],
)
def test_all_spellings_of_a_conversation_are_one(chat_llama, row):
    task, tokenizer = chat(chat_llama)
    (example,) = encode(task, tokenizer, [row])
    assert words(tokenizer, example["input_ids"]) == (
        "<s> user : food ? </s> <s> assistant : good </s>".split()
    )


def test_alpaca_input_and_system_message(chat_llama):
    task, tokenizer = chat(chat_llama, system="very good")
    (example,) = encode(
        task, tokenizer, [{"instruction": "food ?", "input": "soup", "output": "good"}]
    )
    assert words(tokenizer, example["input_ids"])[:6] == "<s> system : very good </s>".split()
    assert words(tokenizer, example["input_ids"])[9:12] == ["food", "?", "<unk>"]


def test_long_conversation_loses_its_earliest_exchange(chat_llama):
    task, tokenizer = chat(chat_llama)
    turns = [
        ("system", "very"),
        ("user", "film ?"),
        ("assistant", "sad"),
        ("user", "food ?"),
        ("assistant", "good"),
    ]
    row = {"messages": [{"role": r, "content": c} for r, c in turns]}
    whole = encode(task, tokenizer, [row])[0]
    cut = encode(task, tokenizer, [row], len(whole["input_ids"]) - 1)[0]
    assert cut["truncated"]
    assert words(tokenizer, cut["input_ids"]) == (
        "<s> system : very </s> <s> user : food ? </s> <s> assistant : good </s>".split()
    )
    assert encode(task, tokenizer, [row], 8)[0]["input_ids"] == []


def test_template_without_an_end_gets_eos(chat_llama):
    task, tokenizer = chat(chat_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    (example,) = encode(task, tokenizer, [{"prompt": "food ?", "completion": "good"}])
    assert words(tokenizer, example["input_ids"]) == "user : food ? assistant : good </s>".split()
    assert [label != IGNORE for label in example["labels"]] == [False] * 6 + [True] * 2


BAD = {
    "no role": ({"messages": [{"content": "a"}]}, "message 1 must have a role"),
    "unknown role": ({"messages": [{"role": "boss", "content": "a"}]}, "role 'boss' not found"),
    "no text": (
        {"messages": [{"role": "user", "content": None}]},
        "must hold text, and holds NoneType",
    ),
    "not a list": ({"messages": "hello"}, "must be a list of messages"),
    "no columns": ({"a": "b"}, "no conversations found"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_conversations_are_told(chat_llama, case):
    row, message = BAD[case]
    task, tokenizer = chat(chat_llama)
    with pytest.raises(UserError, match=message):
        encode(task, tokenizer, [row])


def test_no_assistant_turn_is_nothing_to_learn(chat_llama):
    task, tokenizer = chat(chat_llama)
    (example,) = encode(task, tokenizer, [{"messages": [{"role": "user", "content": "food ?"}]}])
    assert example["input_ids"] == []


def test_no_template_is_told(chat_llama):
    task, tokenizer = chat(chat_llama)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="requires a tokenizer with a chat template"):
        encode(task, tokenizer, [{"prompt": "food ?", "completion": "good"}])


# Loss, gradients, packing ------------------------------------------------------------------------


def rows_of(task, tokenizer, count=5):
    texts = [
        "the film was funny",
        "food",
        "a hotel is never cheap but clean",
        "cold staff",
        "return",
    ]
    targets = ["good", "not very good", "fine , fine", "bad", "lovely film again"]
    rows = [{"document": d, "summary": s} for d, s in zip(texts, targets, strict=True)]
    return encode(task, tokenizer, rows[:count])


def reference_loss(model, task, example):
    """Summed loss and count for one row, straight from the definition."""
    ids = torch.tensor([example["input_ids"]])
    labels = torch.tensor(example["labels"])
    if task.encoder_decoder:
        start = torch.tensor([[model.config.decoder_start_token_id, *example["labels"][:-1]]])
        logits = model(input_ids=ids, decoder_input_ids=start).logits[0]
    else:
        logits, labels = model(input_ids=ids).logits[0, :-1], labels[1:]
    logp = logits.log_softmax(-1)
    picked = [-logp[i, label] for i, label in enumerate(labels.tolist()) if label != IGNORE]
    return sum(picked), len(picked)


def adapted(task, config, tokenizer):
    model, _ = task.build_model(config, tokenizer)
    model.double().eval()
    adapter = Adapter(model, LoraConfig(rank=2))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for layer in adapter.layers.values():
            layer.lora_A.data = torch.randn_like(layer.lora_A, dtype=torch.float64)
            layer.lora_B.data = torch.randn_like(layer.lora_B, dtype=torch.float64) * 0.1
    return model, adapter


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_t5"])
def test_gradients_equal_a_float64_reference(kind, request):
    """Batched, row by row, and packed: the same gradient of the mean over all target tokens."""
    task, tokenizer, config = setup(
        request.getfixturevalue(kind), name="summarization", prompt="{source}", max_new_tokens=4
    )
    rows = rows_of(task, tokenizer)
    model, adapter = adapted(task, config, tokenizer)
    pad = PaddingCollator(tokenizer.pad_token_id)
    ways = {"batch": [pad(rows)], "micro-batches": [pad(rows[:2]), pad(rows[2:])]}
    ways["rounded"] = [PaddingCollator(tokenizer.pad_token_id, multiple=8)(rows)]
    if task.packs:
        ways["packed"] = [PackingCollator()(rows)]
        ways["packed in lanes"] = [PackingCollator(tokenizer.pad_token_id, width=24)(rows)]
        assert len(ways["packed in lanes"][0]["input_ids"]) > 1
        rounded = PackingCollator(tokenizer.pad_token_id, width=23, multiple=8)
        ways["packed in rounded lanes"] = [rounded(rows)]
        ways["packed micro-batches"] = [PackingCollator()(rows[:3]), PackingCollator()(rows[3:])]

    def gradients(parts):
        model.zero_grad()
        for total, _ in parts:
            total.backward()
        count = sum(int(count) for _, count in parts)
        layers = adapter.layers.values()
        grads = [m.grad / count for layer in layers for m in (layer.lora_A, layer.lora_B)]
        return torch.cat([grad.flatten() for grad in grads]), count

    expected, tokens = gradients([reference_loss(model, task, row) for row in rows])
    assert expected.norm() > 0
    for name, batches in ways.items():
        outputs = [task.loss(model, batch) for batch in batches]
        found, count = gradients([(output.total, output.count) for output in outputs])
        assert count == tokens, name
        assert (found - expected).norm() / expected.norm() < 1e-6, name


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_t5"])
def test_loss_is_that_of_transformers(kind, request):
    task, tokenizer, config = setup(
        request.getfixturevalue(kind), name="summarization", max_new_tokens=4
    )
    rows = rows_of(task, tokenizer)
    model, _ = task.build_model(config, tokenizer)
    model.eval()
    batch = PaddingCollator(tokenizer.pad_token_id)(rows)
    output = task.loss(model, batch)
    own = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
    torch.testing.assert_close(output.total / output.count, own)
    ids = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).logits.argmax(
        -1
    )
    labels = batch["labels"]
    if not task.encoder_decoder:
        ids, labels = ids[:, :-1], labels[:, 1:]
    assert int(output.outputs) == int(((ids == labels) & (labels != IGNORE)).sum())


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_GATED = {**SMALL, "intermediate_size": 64}
PACKS = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, SMALL_GATED),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config,
        {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "qwen3": (
        tf.Qwen3ForCausalLM,
        tf.Qwen3Config,
        {**SMALL_GATED, "head_dim": 8, "num_key_value_heads": 2},
    ),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig, {**SMALL_GATED, "num_key_value_heads": 2}),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, SMALL_GATED),
    "phi": (tf.PhiForCausalLM, tf.PhiConfig, SMALL_GATED),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig,
        {**SMALL_GATED, "num_key_value_heads": 2, "head_dim": 8},
    ),
}
REFUSED = {
    "bloom": (
        tf.BloomForCausalLM,
        tf.BloomConfig,
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "falcon": (tf.FalconForCausalLM, tf.FalconConfig, SMALL),
    "mamba": (tf.MambaForCausalLM, tf.MambaConfig, {k: SMALL[k] for k in list(SMALL)[:3]}),
}


def build(entry):
    torch.manual_seed(0)
    model_class, config_class, sizes = entry
    return model_class(config_class(**sizes)).eval()


@pytest.mark.parametrize("name", PACKS)
def test_packed_logits_equal_separate_ones(name):
    model = build(PACKS[name])
    check_packing(model)
    rows = [[5, 9, 3, 20], [7], [40, 41, 3, 9, 5, 6, 8], [9, 9]]
    batch = PackingCollator()([{"input_ids": ids, "labels": ids} for ids in rows])
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits[0]
        alone = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in rows]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.fixture
def flash(monkeypatch):
    """Imitates the kernels of flash attention; gives the names of those that have run."""
    from transformers import modeling_flash_attention_utils as attention

    used: list[str] = []

    def attend(query, key, value):  # (rows, positions, heads, width)
        states = (states.transpose(1, 2) for states in (query, key, value))
        return F.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )

    def plain(query, key, value, **_):
        used.append("plain")
        return attend(query, key, value)

    def by_bounds(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        # As a tensor where transformers has looked for the bounds itself.
        used.append("by bounds" if type(max_seqlen_q) is int else "by position ids")
        assert cu_seqlens_q.dtype == torch.int32
        if query.is_meta:
            return torch.empty_like(query)
        stretches = list(pairwise(cu_seqlens_q.tolist()))
        assert (stretches[0][0], stretches[-1][1]) == (0, len(query))
        assert max_seqlen_q == max(stop - start for start, stop in stretches)
        parts = [[t[None, start:stop] for t in (query, key, value)] for start, stop in stretches]
        return torch.cat([attend(*part)[0] for part in parts])

    def given(**options):
        return {name: options[name] for name in ("max_seqlen_q", "max_seqlen_k") if name in options}

    kernels = (plain, by_bounds, None, None, None), (given, given)
    monkeypatch.setattr(attention, "lazy_import_flash_attention", lambda *_, **__: kernels)
    return used


def ways_to_join(rows, pad):
    """Batches of the same rows: in lanes, as one, and as micro-batches of both."""
    lanes, one = PackingCollator(pad, width=24), PackingCollator(pad, width=None)
    ways = {
        "lanes": [lanes(rows)],
        "one": [one(rows)],
        "lanes apart": MicroBatches(lanes, 24)(rows),
        "micro-batches": MicroBatches(PackingCollator(pad, width=24), 24)(rows),
        "row by row": [PaddingCollator(pad)([row]) for row in rows],
    }
    shapes = {name: [tuple(b["input_ids"].shape) for b in way] for name, way in ways.items()}
    assert shapes["lanes"][0][0] > 1
    assert len(shapes["lanes apart"]) > 1
    assert shapes["one"] == [(1, sum(len(row["input_ids"]) for row in rows))]
    return ways


def test_rows_joined_for_flash_attention_do_not_see_each_other(tiny_llama, flash):
    task, tokenizer, config = setup(
        tiny_llama, name="summarization", prompt="{source}", max_new_tokens=4
    )
    rows = rows_of(task, tokenizer)
    model, adapter = adapted(task, config, tokenizer)
    expected = sum(reference_loss(model, task, row)[0] for row in rows)
    layers = list(adapter.layers.values())
    gradients = torch.autograd.grad(expected, [layer.lora_B for layer in layers])
    model.config._attn_implementation = "flash_attention_2"
    check_packing(model)
    flash.clear()
    for name, batches in ways_to_join(rows, tokenizer.pad_token_id).items():
        total = sum(task.loss(model, batch).total for batch in batches)
        assert float(total) == pytest.approx(float(expected), rel=1e-6), name
        found = torch.autograd.grad(total, [layer.lora_B for layer in layers])
        torch.testing.assert_close(found, gradients, rtol=1e-5, atol=1e-5, msg=name)
        assert set(flash) == {"by bounds"}, name


def test_packing_is_refused_where_flash_attention_gets_lanes(tiny_llama, flash, monkeypatch):
    """transformers keeps rows apart in a batch of one lane alone."""
    model = tf.LlamaForCausalLM.from_pretrained(tiny_llama)
    model.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr("lora_lightning.models.forward.uses_flash", lambda model: False)
    with pytest.raises(UserError, match="see each other"):
        check_packing(model)
    assert set(flash) == {"plain", "by position ids"}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("attention", ["flash_attention_2", "sdpa"])
def test_joined_rows_do_not_wait_for_their_device(tiny_llama, flash, attention, rows):
    """The device "meta" stands for a GPU."""
    task, tokenizer, config = setup(tiny_llama, name="summarization", max_new_tokens=4)
    model, _ = task.build_model(config, tokenizer)
    model.config._attn_implementation = attention
    model.to("meta", torch.bfloat16)
    pad = tokenizer.pad_token_id
    collate = PackingCollator(pad, width=24) if rows > 1 else PaddingCollator(pad)
    batch = to_device(task.locate(collate(rows_of(task, tokenizer, rows))), torch.device("meta"))
    with Waits() as waits, masks_without_waiting(torch.device("meta")):
        task.loss(model, batch).total.backward()
    assert waits.found == []
    assert flash == (["by bounds"] * 2 if attention == "flash_attention_2" else [])


@pytest.mark.parametrize("kind", ["lm", "summarization", "sentiment"])
def test_masks_made_without_a_look_at_the_rows_change_no_loss(kind, request):
    folder = request.getfixturevalue("tiny_t5" if kind == "summarization" else "tiny_llama")
    task, tokenizer, config = setup(folder, name=kind)
    if kind == "sentiment":
        task.learn({"train": Dataset.from_list([{"text": "a", "label": i} for i in ("x", "y")])})
    model, _ = task.build_model(config, tokenizer)
    model.eval()
    lists = [[7 + (i * n) % 20 for i in range(n)] for n in (9, 4, 6, 9, 3)]
    rows = [{"input_ids": ids, "labels": 0 if kind == "sentiment" else ids} for ids in lists]
    for some in (rows, rows[:1]):  # padded, and not
        collators = [PaddingCollator(1)] + ([PackingCollator(1, width=24)] if kind == "lm" else [])
        for collate in collators:
            batch = collate(some)
            expected = task.loss(model, batch).total
            with masks_without_waiting(torch.device("cuda")):
                found = task.loss(model, batch).total
            assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_to_generate_for_are_read_from_a_gpu_once_a_batch(tiny_llama):
    task, tokenizer, _ = setup(tiny_llama, name="summarization", max_new_tokens=4)
    batch = PaddingCollator(tokenizer.pad_token_id)(rows_of(task, tokenizer))
    batch["generate"] = [True, False, True, True, True]
    expected = task.collect(batch)
    assert len(expected) == 4
    with ImitatedGpu() as gpu:
        there = {
            name: value.as_subclass(OnImitatedGpu) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        found = task.collect(there)
    assert found == expected
    assert gpu.waits == ["cpu"] * 3  # ids, mask and labels


def test_lanes_hold_every_row_once_and_pad_at_their_ends():
    rows = [
        {"input_ids": [10 * n + i for i in range(n)], "labels": [n] * n} for n in (3, 6, 5, 2, 9)
    ]
    batch = PackingCollator(pad_token_id=99, width=8)(rows)
    assert batch["input_ids"].tolist() == [  # 9 is the longest: three lanes of up to 9
        [30, 31, 32, 60, 61, 62, 63, 64, 65],
        [50, 51, 52, 53, 54, 20, 21, 99, 99],
        [90, 91, 92, 93, 94, 95, 96, 97, 98],
    ]
    assert batch["position_ids"].tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 0, 1, 0, 0],
        list(range(9)),
    ]
    assert (batch["rows"], batch["tokens"]) == (5, 25)
    assert batch["bounds"].tolist() == [0, 3, 9, 14, 16, 18, 27]
    assert (batch["bounds"].dtype, batch["longest"]) == (torch.int32, 9)
    expected = [[3, 3, 6, 6, 6, 6, 6], [5, 5, 5, 5, 2], [9] * 8]
    assert [[i for i in row if i != IGNORE] for row in batch["labels"].tolist()] == expected


@pytest.mark.parametrize("name", REFUSED)
def test_packing_is_refused_where_rows_would_see_each_other(name):
    model = build(REFUSED[name]).train()
    with pytest.raises(UserError, match=r"data.packing=true: .* see each other"):
        check_packing(model)
    assert model.training


# Generation and metrics --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_t5"])
def test_batched_generation_equals_one_by_one(kind, request):
    """Left padding changes nothing; texts end at the first end token."""
    task, tokenizer, config = setup(
        request.getfixturevalue(kind), name="summarization", max_new_tokens=8
    )
    rows = rows_of(task, tokenizer)
    model, _ = task.build_model(config, tokenizer)
    model.train()
    prompts = [
        row["input_ids"]
        for row in encode(
            task,
            tokenizer,
            [
                {"document": d, "summary": "a"}
                for d in ("film", "the a food", "very very good hotel again")
            ],
            targets=False,
        )
    ]
    together = task.generate(model, prompts)
    assert model.training
    model.eval()
    for prompt, found in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        if task.encoder_decoder:
            new = torch.tensor([[model.config.decoder_start_token_id]])
        else:
            new = ids[:, :0]
        expected: list[int] = []
        for _ in range(8):  # greedy, without any cache
            with torch.no_grad():
                logits = (
                    model(input_ids=ids, decoder_input_ids=new).logits
                    if task.encoder_decoder
                    else model(input_ids=torch.cat([ids, new], 1)).logits
                )
            token = int(logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            expected.append(token)
            new = torch.cat([new, torch.tensor([[token]])], 1)
        assert found == expected
    batch = PaddingCollator(tokenizer.pad_token_id)(rows)
    with Waits() as waits:
        prompts, answers = task._prompts(batch), task._answers(batch)
    assert prompts == [
        row["input_ids"]
        if task.encoder_decoder
        else row["input_ids"][: row["labels"].count(IGNORE)]
        for row in rows
    ]
    assert answers == [[i for i in row["labels"] if i != IGNORE] for row in rows]
    assert waits.found == []  # a batch is fetched whole, not token by token


def test_rouge_sums_over_ranks_as_one():
    from rouge_score.rouge_scorer import RougeScorer

    predictions = ["the cat sat", "a dog ran fast", "", "rain falls"]
    references = ["the cat sat down", "dogs ran", "nothing", "the rain falls again"]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    whole, first, second = Rouge(), Rouge(), Rouge()
    whole.update(predictions, references)
    first.update(predictions[:3], references[:3])
    second.update(predictions[3:], references[3:])
    first.sums, first.count = first.sums + second.sums, first.count + second.count
    for name, value in whole.compute().items():
        assert float(value) == pytest.approx(sum(s[name].fmeasure for s in scores) / 4)
        assert float(first.compute()[name]) == pytest.approx(float(value))


def test_perplexity_and_token_accuracy():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    perplexity, accuracy = Perplexity(), TokenAccuracy()
    for row in range(3):
        loss = F.cross_entropy(logits[row], labels[row], reduction="sum")
        perplexity.update(loss, torch.tensor(7))
        accuracy.update((logits[row].argmax(-1) == labels[row]).sum(), torch.tensor(7))
    mean = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(perplexity.compute()) == pytest.approx(math.exp(mean), rel=1e-5)
    assert float(accuracy.compute()) == pytest.approx(
        float((logits.argmax(-1) == labels).float().mean())
    )


def test_token_accuracy_is_the_rounded_quotient():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        count = torch.randint(1, 2**24, (), generator=generator)
        correct = torch.randint(2**24, (), generator=generator) % (count + 1)
        accuracy = TokenAccuracy()
        accuracy.update(correct, count)
        assert torch.equal(accuracy.compute(), correct / count)


def test_mean_metric_of_torchmetrics_ignores_weights_without_its_check_for_nan():
    """The reason for own metrics. If this fails, torchmetrics' MeanMetric can replace them."""
    metric = MeanMetric(nan_strategy="disable")
    metric.update(torch.tensor(1.0), torch.tensor(3.0))
    metric.update(torch.tensor(5.0), torch.tensor(1.0))
    assert float(metric.compute()) == 3  # and not 2


def test_an_encoder_is_refused(tiny_bert):
    task, tokenizer, config = setup(tiny_bert, name="summarization")
    with pytest.raises(UserError, match="must be a language model"):
        task.build_model(config, tokenizer)
