"""Where the matrices of an adapter lie in tensor parallelism, and what is trained so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.data import make_rows, write_jsonl
from lora_lightning import UserError
from lora_lightning.distributed.matrix_shards import Cut, ShardedDropout, even_bounds
from lora_lightning.distributed.strategies import BY_ELEMENT, ShardedStrategy
from lora_lightning.lora.layers.fused_parts import Part, cut_parts

SCRIPT = Path(__file__).parent / "workers" / "train_sharded_adapter.py"
RANK = 4
WIDTH, LAYERS = 32, 2
FEATURES = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
FEATURES |= {"gate_proj": (32, 65), "up_proj": (32, 65), "down_proj": (65, 32)}
"""Inputs and outputs of the adapted layers."""
BY_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@pytest.fixture(scope="module")
def uneven(tiny_llama, tmp_path_factory) -> Path:
    """Folder of a Llama whose hidden layer has an odd number of units."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("uneven")
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_llama, intermediate_size=65)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(uneven, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("rows")
    data = folder / "train.jsonl"
    write_jsonl(data, make_rows(40))
    return [
        *("trainer.precision=32-true", "trainer.max_epochs=2", "trainer.enable_progress_bar=false"),
        *("trainer.accelerator=cpu", "trainer.gradient_clip_val=0.1"),
        *("trainer.enable_checkpointing=false", "trainer.enable_model_summary=false"),
        *("optim.name=AdamW", "optim.lr=1e-2", f"lora.rank={RANK}", "data.batch_size=8"),
        *(f"lora.targets=[{','.join(FEATURES)}]", f"model.name_or_path={uneven}"),
        *(f"data.{split}={data}" for split in ("train", "val", "test")),
        f"data.cache_dir={folder / 'cache'}",
    ]


def run(
    settings: list[str], folder: Path, count: int = 1
) -> tuple[list, list[list[int]], dict[str, torch.Tensor]]:
    """Shapes of what is held by rank, shapes of sums in the first batch, and the weights."""
    trainer = "trainer=cpu" if count == 1 else "trainer=tp"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={count}", str(SCRIPT), trainer, f"trainer.devices={count}"),
            *(*settings, f"output_dir={folder}"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (told,) = (line for line in done.stdout.splitlines() if line.startswith("HELD"))
    return *json.loads(told.removeprefix("HELD")), torch.load(folder / "weights.pt")


def matrix(name: str) -> tuple[str, str]:
    """The adapted layer, and which of its matrices it is."""
    *_, layer, leaf = name.split(".")
    return layer, leaf


def share(size: int, rank: int) -> int:
    """Of two processes, the first has what is left over."""
    return size // 2 + (size % 2 if rank == 0 else 0)


@pytest.mark.slow
def test_of_each_layer_one_matrix_is_held_in_shares_with_the_optimizers_state(settings, tmp_path):
    """Uneven ones too; what comes out equals what one process learns, to rounding."""
    (alone,), _, truth = run(settings, tmp_path / "one")
    held, sums, ours = run(settings, tmp_path / "two", 2)
    assert alone.keys() == held[0].keys() == held[1].keys()
    assert sum("lora_" in name for name in alone) == 2 * len(FEATURES) * LAYERS
    for rank, names in enumerate(held):
        for name, shapes in names.items():
            layer, leaf = matrix(name)
            if layer == "score":
                expected = alone[name][0]
            else:
                fan_in, fan_out = FEATURES[layer]
                by_columns = layer in BY_COLUMNS
                expected = {
                    "lora_A": [RANK, fan_in if by_columns else share(fan_in, rank)],
                    "lora_B": [share(fan_out, rank) if by_columns else fan_out, RANK],
                }[leaf]
            assert shapes == [expected] * 3  # the parameter, and AdamW's two moments
    assert ours.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=0)
    assert max(tensor.abs().max() for name, tensor in truth.items() if "lora_B" in name) > 1e-2
    # Of activations, what Megatron sums for the base alone: the outputs of the embedding, of each
    # attention and each MLP, and the gradients of the inputs of these, but for the first of them.
    activations = [shape for shape in sums if len(shape) > 2]
    assert [shape[-1] for shape in activations] == [WIDTH] * (1 + 2 * LAYERS + 2 * LAYERS - 1)
    # Once a step: the gradients of whole matrices, their norm in shares, and the loss.
    assert len(sums) - len(activations) <= 4


@pytest.mark.slow
def test_parts_of_fused_layers_are_cut_where_the_base_is(settings, tmp_path):
    """A process whose outputs hold none of an adapted part holds no row of its B."""
    parts = "+lora.parts={q_proj: {a: 12, -b: 20}, o_proj: [a, b], up_proj: {-a: 40, b: 25}}"
    settings = [*settings, parts]
    (alone,), _, truth = run(settings, tmp_path / "one")
    held, _, ours = run(settings, tmp_path / "two", 2)
    rows = {"q_proj": (12, 0), "up_proj": (0, 25)}  # of 16 and 16; of 33 and 32
    for rank, names in enumerate(held):
        for name, shapes in names.items():
            layer, leaf = matrix(name)
            if leaf == "lora_B" and layer in rows:
                assert shapes == [[rows[layer][rank], RANK]] * 3
    assert sum(a[0] != b[0] for a, b in zip(alone.values(), held[0].values(), strict=True)) > 0
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_what_a_run_starts_from_is_cut_too(settings, tmp_path):
    """From an adapter that one process has trained, and from a checkpoint's weights."""
    from lora_lightning.config.compose import compose_config
    from lora_lightning.training.run import train

    keeps = [s for s in settings if not s.startswith(("trainer.enable_ch", "trainer.enable_mo"))]
    first = tmp_path / "first"
    train(compose_config(["trainer=cpu", *keeps, f"output_dir={first}"]))
    still = ["trainer.max_epochs=1", "optim.name=SGD", "optim.lr=1e-30"]
    *_, truth = run([*settings, *still, f"adapter={first / 'adapter'}"], tmp_path / "one")
    assert max(tensor.abs().max() for name, tensor in truth.items() if "lora_B" in name) > 1e-2
    (best,) = (first / "checkpoints").glob("best-*.ckpt")
    for number, source in enumerate((first / "adapter", best)):
        *_, ours = run([*settings, *still, f"adapter={source}"], tmp_path / f"two{number}", 2)
        assert ours.keys() == truth.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in truth.items())


@pytest.mark.parametrize("size", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_cuts_are_those_of_torch_chunk(size, count):
    bounds = even_bounds(size, count)
    whole = torch.arange(3.0 * size).view(3, size)
    shares = [Cut(1, bounds).take(whole, rank) for rank in range(count)]
    chunks = whole.chunk(count, 1)
    assert all(torch.equal(share, chunk) for share, chunk in zip(shares, chunks, strict=False))
    assert all(share.shape == (3, 0) for share in shares[len(chunks) :])
    assert {Cut(1, bounds).shape(share) for share in shares} == {whole.shape}


def test_parts_within_some_rows():
    parts = (Part("a", 4, True), Part("b", 2, False), Part("c", 3, True))
    assert [part.size for part in cut_parts(parts, 0, 9)] == [4, 2, 3]
    assert [part.size for part in cut_parts(parts, 3, 7)] == [1, 2, 1]
    assert [part.size for part in cut_parts(parts, 4, 6)] == [0, 2, 0]
    assert [part.adapted for part in cut_parts(parts, 4, 6)] == [True, False, True]


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "Muon"])
def test_optimizers_that_look_at_whole_matrices_are_refused(name):
    with pytest.raises(
        UserError, match=f"optim.name={name}: is not supported with tensor parallelism"
    ):
        ShardedStrategy.check(name)


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_others_do_the_same_on_shares(name):
    """A step on the two halves of a matrix is that on the whole of it."""
    ShardedStrategy.check(name)
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    halves = [torch.nn.Parameter(half.detach().clone()) for half in whole.chunk(2)]
    kind = getattr(torch.optim, name)
    first, second = kind([whole], lr=0.1), kind(halves, lr=0.1)
    for _ in range(3):
        whole.grad = torch.randn_like(whole)
        for half, grad in zip(halves, whole.grad.chunk(2), strict=True):
            half.grad = grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(torch.cat(halves), whole.detach(), atol=1e-12, rtol=0)


def test_dropout_of_shares_is_that_of_the_whole():
    x, bounds = torch.randn(6, 5, 7), even_bounds(7, 3)
    torch.manual_seed(4)
    whole = torch.nn.functional.dropout(x, 0.4)
    shares = []
    for rank in range(3):
        torch.manual_seed(4)
        dropout = ShardedDropout(0.4, Cut(1, bounds), rank)
        shares.append(dropout(x[..., bounds[rank] : bounds[rank + 1]]))
    torch.testing.assert_close(torch.cat(shares, -1), whole)
    assert dropout.eval()(shares[-1]) is shares[-1]
