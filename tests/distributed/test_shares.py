"""A base that is read in shares: no process ever holds all of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("load_in_shares.py")


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


def loaded(folder: Path, processes: int, tensor: int) -> tuple[list[float], set[str]]:
    """MiB at the peak by rank, and the modules that are gathered each for itself."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={processes}", str(SCRIPT), str(folder), str(tensor)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
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
