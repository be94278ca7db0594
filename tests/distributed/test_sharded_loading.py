"""A base that is in shares: no process ever holds all of it, nor all logits at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "workers" / "load_sharded_base.py"
HEAD = Path(__file__).parent / "workers" / "sharded_lm_head.py"


@pytest.fixture(scope="module")
def large(tiny_llama, tmp_path_factory) -> tuple[Path, float]:
    """Folder of a Llama stored in fp32, and the MiB of its weights in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    own_weights = shutil.ignore_patterns("*.safetensors")  # they would be taken before the shards
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True, ignore=own_weights)
    config = LlamaConfig.from_pretrained(
        tiny_llama,
        **{"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 4096},
        **{"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8},
        head_dim=128,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="40MB")
    return folder, sum(2 * p.numel() for p in model.parameters()) / 2**20


def said_by(processes: int, script: Path, *arguments: str) -> str:
    """What a script prints that several processes run."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={processes}", str(script), *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(folder: Path, processes: int, tensor: int) -> tuple[list[float], set[str]]:
    """MiB at the peak by rank, and the modules that are gathered each for itself."""
    out = said_by(processes, SCRIPT, str(folder), str(tensor))
    told = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    return [float(value) for value in told["MiB"]], set(told["units"])


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2], ids=["fsdp2", "tp"])
def test_no_process_holds_the_whole_base(tensor, large):
    folder, whole = large
    assert whole > 250  # beside which what libraries take does not count
    (alone,), units = loaded(folder, 1, 1)
    assert units == set()
    assert alone > 0.9 * whole
    found, units = loaded(folder, 2, tensor)
    layers = {f"model.layers.{number}" for number in range(8)}
    assert units >= layers if tensor == 1 else not units
    assert len(found) == 2
    assert max(found) < 0.75 * whole
    assert sum(found) > 0.9 * whole


def test_the_loss_over_a_gathered_head_never_has_all_logits(tiny_llama, tmp_path):
    """By chunks of 4 rows: 20 targets in one process, 3 in the other."""
    from transformers import (
        AutoTokenizer,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sizes = LlamaConfig.from_pretrained(tiny_llama).to_diff_dict()
    tied = LlamaForCausalLM(LlamaConfig(**{**sizes, "tie_word_embeddings": True}))
    root = GPT2LMHeadModel(
        GPT2Config(
            **{"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4},
            **{"bos_token_id": 0, "eos_token_id": 2},
        )
    )
    for name, model in (("tied", tied), ("root", root)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    cases = [f"{case}={tiny_llama}" for case in ("own", "adapted", "dropped")]
    cases += [f"{case}={tmp_path / case}" for case in ("tied", "root")]
    out = said_by(2, HEAD, *cases)
    found = json.loads(next(line for line in out.splitlines() if line.startswith("FOUND"))[6:])
    assert len(found) == len(cases)
    for case, by_rank in found.items():
        assert [most for most, _, _ in by_rank] == [4, 3], case
        for _, ours, expected in by_rank:
            assert ours == pytest.approx(expected, rel=1e-5, abs=1e-5), case
            assert len(expected) > 6
