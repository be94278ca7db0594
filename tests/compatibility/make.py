"""Makes the files of test_earlier_files.py, with the version of the package that is installed.

    python tests/compatibility/make.py

It replaces tests/compatibility/files, which then holds the path of this folder: run it in a clone
below /tmp. Files that a later version cannot read break a promise, so they are made again only
where a release says so.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lora_lightning.config.compose import compose_config
from lora_lightning.lora import Adapter, LoraConfig, save_adapter
from lora_lightning.training.run import train

FILES = Path(__file__).parent / "files"
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "frozen-a": {"freeze_A": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 7.0}},
    "embeddings": {"targets": ["embed_tokens", "q_proj"]},
    "whole-head": {"targets": ["v_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"targets": ["v_proj"], "trainable_token_indices": [3, 5]},
    "experts": {"targets": ["q_proj"], "target_parameters": EXPERTS},
    "parts": {"targets": ["q_proj", "gate_proj"], "parts": {"gate_proj": {"a": 8, "b": 16}}},
    "bias": {"targets": ["q_proj"], "bias": "lora_only"},
}
"""Settings of `LoraConfig` by the name of a folder: an adapter of each kind."""
IDS = torch.tensor([[1, 5, 3, 7, 2, 9], [4, 4, 8, 3, 6, 1]])

RUN = [
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "callbacks.progress_bar=null",
    "callbacks.rich_summary=null",
    "callbacks.last.every_n_steps=1",
    "logger.tensorboard=null",
    "model.name_or_path=pkg://lora_lightning/embedded/tiny_lm",
    "lora.targets=[q_proj,v_proj]",
    "lora.dropout=0.1",
    "data.batch_size=4",
    "data.limit_train=64",
    "data.limit_val=12",
    "data.limit_test=12",
    "test_before=false",
    "optim.lr=1e-2",
]
"""A short run on what the package brings, so that no path is in its files."""


def base_of(kind: str) -> str:
    """Return the name of the base of a kind."""
    return "mixtral" if kind == "experts" else "llama"


def make_adapters() -> None:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True))
    llama.save_pretrained(FILES / "bases" / "llama")
    mixtral = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))
    mixtral.save_pretrained(FILES / "bases" / "mixtral")
    expected = {}
    for kind, settings in KINDS.items():
        base = AutoModelForCausalLM.from_pretrained(FILES / "bases" / base_of(kind)).eval()
        adapter = Adapter(base, LoraConfig(**{"rank": 2, "alpha": 4.0, **settings}))
        with torch.no_grad():
            for tensor in adapter.named_tensors().values():
                if tensor.requires_grad:
                    tensor.add_(0.1 * torch.randn_like(tensor))
            expected[kind] = adapter.model(IDS).logits.contiguous()
        save_adapter(adapter, FILES / "adapters" / kind)
    save_file(expected, FILES / "logits.safetensors")


def make_runs() -> None:
    """A run and a sweep that were ended amid their training, and what they come to."""
    whole = FILES / "whole"
    train(compose_config([*RUN, f"output_dir={whole}"]))
    shutil.copytree(whole / "adapter", FILES / "adapter")
    (FILES / "adapter" / "README.md").unlink()
    result = json.loads((whole / "result.json").read_text())
    measured = {key: value for key, value in result.items() if key.startswith("test/")}
    (FILES / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    shutil.rmtree(whole)

    stop_amid(FILES / "run", f"output_dir={FILES / 'run'}")
    stop_amid(FILES / "sweep" / "0", "-m", f"hydra.sweep.dir={FILES / 'sweep'}", "seed=0,1")


def stop_amid(run: Path, *more: str) -> None:
    """Kill the training of `run` after its second checkpoint."""
    command = [sys.executable, "-m", "lora_lightning", "train", *RUN, *more]
    process = subprocess.Popen(command, start_new_session=True)
    while not (run / "checkpoints" / "last-previous.ckpt").exists():
        assert process.poll() is None, "it ended too early"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    shutil.rmtree(FILES, ignore_errors=True)
    make_adapters()
    make_runs()
