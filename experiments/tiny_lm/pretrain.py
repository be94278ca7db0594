r"""Trains the tiny language model: tokenizer, Llama of 3.0 M parameters, export.

    python pretrain.py corpus work      # an hour on two cores; goes on where it was stopped
    python pretrain.py corpus work --export ../../lora_lightning/embedded/tiny_lm

`work` receives tokenizer/, the token arrays, state.pt (every 100 steps) and log.csv. Documents are
put one behind the other, BOS text EOS, and cut into blocks: of 256 tokens, and of 512 in the last
30 % of the steps, in which the learning rate falls to zero: attention takes a third of a step over
256 and nearly half over 512. Muon (Jordan 2024) for matrices, AdamW for the embedding and norms.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, BLOCK, STEP_TOKENS = 4096, 512, 8192
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
WARMUP, DECAY = 100, 0.3
MUON_LR, ADAM_LR = 0.02, 3e-3
SAVE_EVERY = 100
# Words with the blank before them, numbers of up to three digits, punctuation, white space.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
# Line ends are tokens of their own, so that an answer's tokens do not depend on what is before it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ 'Assistant:\\n' }}{% generation %}"
    "{{ message.content + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.role | capitalize + ':\\n' + message.content + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=3000, help="of 8,192 tokens each")
    parser.add_argument("--export", type=Path, help="write the model folder there and stop")
    arguments = parser.parse_args()
    keep_memory()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(arguments.corpus, arguments.work / "tokenizer")
    model = LlamaForCausalLM(model_config(tokenizer))
    state = arguments.work / "state.pt"
    if arguments.export:
        model.load_state_dict(torch.load(state, weights_only=True)["model"])
        export(model, tokenizer, arguments.export)
        return
    parts = {
        name: load_tokens(arguments.corpus / f"{name}.jsonl", arguments.work, tokenizer)
        for name in ("train", "heldout")
    }
    train(model, parts, arguments.steps, state, arguments.work / "log.csv")


def keep_memory() -> None:
    """Has glibc keep freed memory: the kernel clearing it again took 5 to 10 % of a step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


# Tokens --------------------------------------------------------------------------------------


def load_tokenizer(corpus: Path, folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training text, trained where there is none yet."""
    if folder.is_dir():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(texts(corpus / "train.jsonl"), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=BLOCK,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def load_tokens(path: Path, work: Path, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All documents of a file as one array, BOS text EOS BOS ..."""
    cache = work / f"{path.stem}.npy"
    if not cache.exists():
        documents = list(texts(path))
        parts = []
        for start in range(0, len(documents), 1000):
            for ids in tokenizer(documents[start : start + 1000])["input_ids"]:
                parts.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16))
        np.save(cache, np.concatenate(parts))
    return np.load(cache)


def texts(path: Path):
    with path.open() as handle:
        for line in handle:
            yield json.loads(line)["text"]


# Training ------------------------------------------------------------------------------------


def train(
    model: LlamaForCausalLM, parts: dict[str, np.ndarray], steps: int, state: Path, log: Path
) -> None:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = (MUON_LR, ADAM_LR)
    first, seconds = 0, 0.0
    torch.manual_seed(0)
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for part, values in zip(optimizers, saved["optimizers"], strict=True):
            part.load_state_dict(values)
        first, seconds = saved["step"], saved["seconds"]
    loss_of = torch.compile(lambda ids: next_token_loss(model, ids), dynamic=False)
    tokens = torch.from_numpy(parts["train"])
    print(f"{len(tokens):,} tokens; {steps:,} steps = "
          f"{steps * STEP_TOKENS / len(tokens):.2f} epochs", flush=True)  # fmt: skip
    if not log.exists():
        log.write_text("step,tokens,seconds,train_loss,heldout_loss\n")
    begun, losses = time.perf_counter(), []
    for step in range(first, steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(batch(tokens, step, block_at(step, steps)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part, peak in zip(optimizers, peaks, strict=True):
            part.param_groups[0]["lr"] = peak * rate(step, steps)
            part.step()
            part.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if (step + 1) % SAVE_EVERY and step + 1 < steps:
            continue
        spent = seconds + time.perf_counter() - begun
        mean = float(torch.stack(losses).mean())
        losses.clear()
        held = heldout_loss(loss_of, torch.from_numpy(parts["heldout"]))
        with log.open("a", newline="") as handle:
            csv.writer(handle).writerow(
                [step + 1, (step + 1) * STEP_TOKENS, round(spent), round(mean, 4), round(held, 4)]
            )
        print(f"step {step + 1}/{steps}  loss {mean:.3f}  held back {held:.3f}  "
              f"{spent / 60:.1f} min", flush=True)  # fmt: skip
        saved = {
            "model": model.state_dict(),
            "optimizers": [part.state_dict() for part in optimizers],
            "step": step + 1,
            "seconds": spent,
        }
        torch.save(saved, state.with_suffix(".new"))
        state.with_suffix(".new").replace(state)


def next_token_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def block_at(step: int, steps: int) -> int:
    """Length of the blocks: short ones until the rate falls."""
    return BLOCK // 2 if step < steps - DECAY * steps else BLOCK


def batch(tokens: Tensor, step: int, block: int) -> Tensor:
    """Blocks of a step, (rows, block + 1): in a new order each epoch, by the step alone."""
    blocks, rows = (len(tokens) - 1) // block, STEP_TOKENS // block
    chosen = []
    for place in range(step * rows, (step + 1) * rows):
        epoch, index = divmod(place, blocks)
        chosen.append(int(order(blocks, epoch)[index]))
    return torch.stack([tokens[i * block : (i + 1) * block + 1].long() for i in chosen])


@cache
def order(blocks: int, epoch: int) -> Tensor:
    return torch.randperm(blocks, generator=torch.Generator().manual_seed(epoch))


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: rises, stays, falls to zero."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


@torch.no_grad()
def heldout_loss(loss_of, tokens: Tensor) -> float:
    """Mean loss over a few batches of held-back text, for the log."""
    count, total = 8, 0.0
    for number in range(count):
        with torch.autocast("cpu", torch.bfloat16):
            total += float(loss_of(batch(tokens, number, BLOCK)))
    return total / count


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The folder that ships: config, bf16 weights, tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text()).items() if "local" not in k}
    settings.write_text(json.dumps(kept, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
