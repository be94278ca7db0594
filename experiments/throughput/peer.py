"""A peer: what its documentation tells a user to write, with the flags that make it fastest.

    python peer.py trainer|trl WORK.json

transformers' Trainer with PEFT, or TRL's SFTTrainer. Rows come in the order in which ours trains on
them, which is grouped by length: as good as the peers' own grouping, and losses can be compared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from clock import Clock
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class TrainerClock(TrainerCallback):
    def __init__(self) -> None:
        self.clock = Clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.clock.loss(logs["loss"])


def main(library: str, work: dict[str, Any]) -> None:
    set_seed(0)
    rows = [json.loads(line) for line in Path(work["ordered"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    encoder = work["kind"] == "encoder"
    auto = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    head = {"num_labels": 2} if encoder else {}
    dtype = torch.bfloat16 if work["precision"] == "bf16-true" else torch.float32
    model = auto.from_pretrained(work["model"], dtype=dtype, **head, **quantized(work, dtype))
    if work["quantization"]:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=work["checkpointing"]
        )
    adapter = LoraConfig(
        r=work["rank"],
        lora_alpha=2 * work["rank"],
        target_modules="all-linear",
        task_type="SEQ_CLS" if encoder else "CAUSAL_LM",
    )
    arguments: dict[str, Any] = {
        "output_dir": work["output"],
        "per_device_train_batch_size": work["batch_size"],
        "gradient_accumulation_steps": work["accumulate"],
        "max_steps": work["steps"],
        "learning_rate": work["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "bf16": work["precision"].startswith("bf16"),
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": work["checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),  # else bf16 is refused there
    }
    if library == "trl":
        trainer = sft_trainer(model, adapter, tokenizer, rows, arguments, work)
    else:
        trainer = plain_trainer(model, adapter, tokenizer, rows, arguments, encoder=encoder)
    trainer.add_callback(TrainerClock())
    trainer.train()


def quantized(work: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of from_pretrained for a base in 4 bits."""
    if not work["quantization"]:
        return {}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=work["quantization"],
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    }


def plain_trainer(
    model: Any,
    adapter: LoraConfig,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    arguments: dict[str, Any],
    *,
    encoder: bool,
) -> Trainer:
    def encode(row: dict[str, str]) -> dict[str, Any]:
        if encoder:
            return {**tokenizer(row["text"], truncation=True), "labels": row["label"]}
        prompt = tokenizer(row["source"].strip() + "\n\nSummary:\n")["input_ids"]
        target = tokenizer(row["target"].strip(), add_special_tokens=False)["input_ids"]
        target = [*target, tokenizer.eos_token_id]
        return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}

    data = Dataset.from_list(rows)
    data = data.map(encode, remove_columns=data.column_names)
    if arguments["gradient_checkpointing"]:
        model.enable_input_require_grads()
    return Trainer(
        model=get_peft_model(model, adapter),
        args=TrainingArguments(**arguments),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer)
        if encoder
        else DataCollatorForSeq2Seq(tokenizer),
    )


def sft_trainer(
    model: Any,
    adapter: LoraConfig,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    arguments: dict[str, Any],
    work: dict[str, Any],
) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(
        [
            {"prompt": row["source"].strip() + "\n\nSummary:\n", "completion": row["target"]}
            for row in rows
        ]
    )
    settings = SFTConfig(
        **arguments,
        completion_only_loss=True,
        max_length=work["max_length"],
    )
    return SFTTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=adapter,
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
