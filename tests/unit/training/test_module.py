"""LoraModule: what is trained, what is stored, and what one optimizer step is."""

from __future__ import annotations

import csv
import traceback
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModel, AutoModelForCausalLM

from helpers.asserts import assert_tensors_close
from helpers.gpu import Waits
from helpers.modules import LABELS, LORA, SGD, batches_of, encoded_rows, make_module
from lora_lightning.config.compose import compose_config, settings_of
from lora_lightning.config.schema import ModelConfig, OptimConfig
from lora_lightning.data.collators import PackingCollator, PaddingCollator
from lora_lightning.distributed.strategies import OneDeviceStrategy
from lora_lightning.lora import (
    Adapter,
    LoraConfig,
    UserError,
    forward_pass,
    products,
    save_adapter,
)
from lora_lightning.lora.layers.lora_layer import LoraLayer
from lora_lightning.models.forward import classification_logits
from lora_lightning.tasks import IGNORE, SentimentTask, build_task
from lora_lightning.training.callbacks import throughput as measured
from lora_lightning.training.callbacks.graceful_stop import StopSignals
from lora_lightning.training.callbacks.last_checkpoint import LastCheckpoint
from lora_lightning.training.callbacks.progress import ProgressBar
from lora_lightning.training.callbacks.throughput import RunClock, Throughput
from lora_lightning.training.components import build_components
from lora_lightning.training.module import LoraModule
from lora_lightning.training.run import train


def fit(module, batches, *, val=None, epochs=1, callbacks=(), **kwargs) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )
    loaders = [DataLoader(part, batch_size=None) for part in (batches, val or [])]
    trainer.fit(module, loaders[0], loaders[1] if val else None)
    return trainer


def snapshot(module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in module.trainable_tensors().items()}


def base_weights(folder, auto_class) -> dict[str, torch.Tensor]:
    return auto_class.from_pretrained(folder).state_dict()


# What is trained ---------------------------------------------------------------------------------


def test_optimizer_holds_the_adapter_alone(tiny_bert):
    module = make_module(tiny_bert)
    trainer = fit(module, batches_of(encoded_rows(8), [4, 4]))
    held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(t) for t in module.adapter.named_tensors().values()}
    names = set(module.adapter.named_tensors())
    linears = 2 * (4 + 2) + 1  # each layer's attention and MLP, and the pooler
    assert sum("lora_A" in name for name in names) in (linears, linears - 1)
    assert {"classifier.weight", "classifier.bias"} <= names


def test_training_leaves_the_base_bit_identical(tiny_bert):
    module = make_module(tiny_bert)
    before = snapshot(module)
    fit(module, batches_of(encoded_rows(24), [8, 8, 8]), epochs=3)
    after = snapshot(module)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    truth = base_weights(tiny_bert, AutoModel)
    found = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in module.model.bert.named_parameters()
    }
    whole = set(module.adapter.named_tensors())
    compared = [name for name in truth if name in found and f"bert.{name}" not in whole]
    assert len(compared) >= len(truth) - 2
    assert all(torch.equal(truth[name], found[name]) for name in compared)


def test_full_fine_tuning_trains_every_tensor(tiny_bert):
    module = make_module(tiny_bert, lora=None)
    assert module.adapter is None
    before = snapshot(module)
    trainer = fit(module, batches_of(encoded_rows(24), [8, 8, 8]))
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.model.parameters()}
    assert all(p.requires_grad for p in module.model.parameters())
    # A bias of attention's keys shifts all scores of a query alike, which softmax takes out.
    without_effect = {f"bert.encoder.layer.{i}.attention.self.key.bias" for i in range(2)}
    changed = {name for name, t in snapshot(module).items() if not torch.equal(t, before[name])}
    assert set(before) - changed <= without_effect


class Unfreeze(L.Callback):
    """Trains a layer of the base too, from an epoch on, as Lightning's BaseFinetuning can."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            layer = pl_module.model.bert.encoder.layer[0].output.LayerNorm
            layer.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": list(layer.parameters())})


@pytest.mark.parametrize("epoch", [0, 1])
def test_base_layer_unfrozen_by_a_callback_raises(epoch, tiny_bert):
    """No checkpoint would hold it; so it is said before it is trained."""
    module = make_module(tiny_bert)
    weight = module.model.bert.encoder.layer[0].output.LayerNorm.weight
    before = weight.detach().clone()
    with pytest.raises(UserError, match=r"LayerNorm.weight of the frozen base .*modules_to_save"):
        fit(module, batches_of(encoded_rows(8), [4, 4]), epochs=2, callbacks=[Unfreeze(epoch)])
    assert torch.equal(weight, before)
    assert module.trainer.global_step == 2 * epoch


class Counting(nn.Module):
    """A layer with a buffer of its own that a pass in training moves."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("mean_square", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean_square.lerp_(x.detach().square().mean(), 0.1)
        return self.layer(x)


def test_base_buffer_moved_by_training_raises(tiny_bert):
    module = make_module(tiny_bert)
    first = module.model.bert.encoder.layer[0].output
    first.LayerNorm = Counting(first.LayerNorm)
    with pytest.raises(UserError, match=r"training changes .*LayerNorm.mean_square.*no adapter"):
        fit(module, batches_of(encoded_rows(8), [4, 4]))


def test_checkpoint_holds_running_statistics_of_the_base(tiny_bert, tmp_path):
    module, other = make_module(tiny_bert), make_module(tiny_bert)
    for one in (module, other):
        config = one.adapter.config
        one.adapter.remove()
        one.model.bert.pooler.activation = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(32))
        one.adopt(one.model, Adapter(one.model, config))
    fit(module, batches_of(encoded_rows(8), [4, 4]))
    state = module.state_dict()
    assert int(state["model.bert.pooler.activation.1.num_batches_tracked"]) == 2
    other.load_state_dict(state)
    inputs = batches_of(encoded_rows(4, seed=1), [4])[0]
    logits = [
        one.eval().model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        for one in (module, other)
    ]
    assert torch.equal(logits[0].logits, logits[1].logits)


def test_bf16_base_with_fp32_adapter_learns(tiny_llama):
    module = make_module(tiny_llama, optim=OptimConfig(lr=3e-2), dtype="bfloat16")
    assert {t.dtype for t in snapshot(module).values()} == {torch.float32}
    frozen = [p for p in module.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    before = [p.clone() for p in frozen]
    batches = batches_of(encoded_rows(4), [4])
    with torch.no_grad():
        start = module.task.loss(module.model, batches[0]).total.item()
    fit(module, batches, epochs=8)
    with torch.no_grad():
        end = module.task.loss(module.model, batches[0]).total.item()
    assert end < 0.3 * start
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))


class Recorder(LoraModule):
    """Notes in what mode each step runs, and whether dropout changes its loss."""

    modes: list[bool]
    noise: list[float]

    def training_step(self, batch, batch_idx):
        self.modes.append(all(module.training for module in self.model.modules()))
        losses = []
        for seed in (1, 2):
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed)
                losses.append(self.task.loss(self.model, batch).total.item())
        self.noise.append(abs(losses[0] - losses[1]))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        assert not any(module.training for module in self.model.modules())
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_sets_train_mode_on_every_layer(tiny_llama, dropout):
    """At every step, also after a validation; Llama itself has no dropout, so LoRA's shows."""
    module = make_module(tiny_llama, lora=LoraConfig(rank=4, dropout=dropout), kind=Recorder)
    module.modes, module.noise = [], []
    batches = batches_of(encoded_rows(16), [4, 4, 4, 4])
    fit(module, batches, val=batches, epochs=2, val_check_interval=2)
    assert module.modes == [True] * 8
    assert all(isinstance(layer, LoraLayer) for layer in module.adapter.layers.values())
    if dropout:
        assert min(module.noise) > 1e-4
    else:
        assert max(module.noise) == 0.0


def test_initialization_depends_on_the_seed_alone(tiny_bert):
    def tensors(seed: int) -> dict[str, torch.Tensor]:
        task = SentimentTask()
        task.restore(LABELS)
        module = LoraModule(task, ModelConfig(name_or_path=str(tiny_bert)), LORA, seed=seed)
        module.configure_model()
        model = module.model
        module.configure_model()
        assert module.model is model, "a second call must not build again"
        return snapshot(module)

    torch.manual_seed(1)
    one = tensors(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = tensors(0), tensors(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], again[name]) for name in one)
    drawn = [name for name in one if "lora_A" in name or name == "classifier.weight"]
    assert all(not torch.equal(one[name], other[name]) for name in drawn)


def test_warm_start_begins_with_the_weights_of_the_adapter(tiny_bert, tmp_path):
    first = make_module(tiny_bert)
    save_adapter(first.adapter, tmp_path / "adapter", base_model=str(tiny_bert))
    task = SentimentTask()
    task.restore(LABELS)
    second = LoraModule(
        task,
        ModelConfig(name_or_path=str(tiny_bert)),
        LORA,
        seed=77,
        start_from=str(tmp_path / "adapter"),
    )
    second.configure_model()
    expected = snapshot(first)
    assert all(torch.equal(t, expected[name]) for name, t in snapshot(second).items())


# One optimizer step ------------------------------------------------------------------------------


def reference(folder, steps: list[list[dict]], *, clip: float | None = None):
    """Trains in plain torch, row by row: the mean over the targets of each step's rows."""
    module = make_module(folder)
    parameters = list(module.trainable_tensors().values())
    gradients = {}
    for rows in steps:
        rows = [row for row in rows if row["labels"] != IGNORE]
        for parameter in parameters:
            parameter.grad = None
        for row in rows:
            logits = classification_logits(module.model, PaddingCollator(1)([row]))
            label = torch.tensor([row["labels"]])
            (nn.functional.cross_entropy(logits, label) / len(rows)).backward()
        gradients = {n: t.grad.clone() for n, t in module.trainable_tensors().items()}
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        with torch.no_grad():
            for parameter in parameters:
                parameter -= SGD.lr * parameter.grad
    return snapshot(module), gradients


class LastGradients(L.Callback):
    """Keeps the gradients of the last step, as the optimizer gets them."""

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        tensors = pl_module.trainable_tensors()
        if all(tensor.grad is not None for tensor in tensors.values()):
            self.gradients = {name: tensor.grad.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [([8], 1), ([1] * 8, 8), ([4, 3, 1], 3), ([4, 3, 1], 8), ([2, 6], 2)],
    ids=["1x8", "8x1", "4+3+1", "short window", "2+6"],
)
def test_optimizer_step_is_the_mean_over_all_targets(tiny_llama, sizes, accumulate):
    rows = encoded_rows(8)
    rows[2]["labels"] = rows[5]["labels"] = IGNORE  # targets are counted, not rows
    expected, gradients = reference(tiny_llama, [rows])
    module, last = make_module(tiny_llama), LastGradients()
    trainer = fit(
        module, batches_of(rows, sizes), accumulate_grad_batches=accumulate, callbacks=[last]
    )
    assert trainer.global_step == 1
    assert_tensors_close(snapshot(module), expected)
    assert max(g.abs().max() for g in gradients.values()) > 1e-2
    assert trainer.callback_metrics["train/loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(
            classification_logits(make_module(tiny_llama).model, batches_of(rows, [8])[0]),
            torch.tensor([row["labels"] for row in rows]),
            ignore_index=IGNORE,
        ).item(),
        abs=1e-6,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_micro_batches_equal_the_whole_batch(tiny_llama, accumulate):
    """Two epochs of batches of 8 and 4 rows in uneven parts, one of them without any target."""
    rows = encoded_rows(12)
    rows[8]["labels"] = rows[9]["labels"] = IGNORE
    a_step = [rows[:8], rows[8:]] if accumulate == 1 else [rows]
    expected, _ = reference(tiny_llama, 2 * a_step, clip=0.3)
    module = make_module(tiny_llama)
    parts = batches_of(rows, [5, 2, 1, 2, 2])
    trainer = fit(
        module,
        [parts[:3], parts[3:]],
        accumulate_grad_batches=accumulate,
        epochs=2,
        gradient_clip_val=0.3,
    )
    assert trainer.global_step == 2 * len(a_step)
    assert_tensors_close(snapshot(module), expected)


def test_short_last_accumulation_window_equals_the_reference(tiny_llama):
    """13 rows as 4+4+3 | 1+1 with accumulation over three: two steps an epoch, twice."""
    rows = encoded_rows(13)
    expected, _ = reference(tiny_llama, 2 * [rows[:11], rows[11:]])
    module = make_module(tiny_llama)
    batches = batches_of(rows, [4, 4, 3, 1, 1])
    trainer = fit(module, batches, accumulate_grad_batches=3, epochs=2)
    assert trainer.global_step == 4
    assert_tensors_close(snapshot(module), expected)


@pytest.mark.parametrize(("sizes", "accumulate"), [([8], 1), ([4, 3, 1], 3), ([4, 3, 1], 8)])
def test_gradient_clipping_sees_the_normalized_gradient(tiny_llama, sizes, accumulate):
    rows = encoded_rows(8)
    _, gradients = reference(tiny_llama, [rows])
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    for clip in (0.5 * norm, 1.5 * norm):  # the one bites, the other does not
        expected, _ = reference(tiny_llama, [rows], clip=clip)
        module = make_module(tiny_llama)
        fit(
            module,
            batches_of(rows, sizes),
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
        )
        assert_tensors_close(snapshot(module), expected)


def test_gradient_checkpointing_gives_the_same_step(tiny_llama):
    results = []
    for checkpointing in (False, True):
        module, calls = make_module(tiny_llama, gradient_checkpointing=checkpointing), []
        block = module.model.model.layers[0]
        block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        fit(module, batches_of(encoded_rows(8), [8]))
        results.append(snapshot(module))
        assert len(calls) == (2 if checkpointing else 1), "the forward pass is to run again"
    assert_tensors_close(results[1], results[0], atol=1e-7)


def test_non_finite_loss_stops_training(tiny_llama):
    module = make_module(tiny_llama)
    module.model.score.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="lower optim.lr"):
        fit(module, batches_of(encoded_rows(4), [4]))


class First(L.Callback):
    """Watches the second step, and what the callbacks after it do at its end."""

    def __init__(self) -> None:
        self.waits = Waits()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.waits.__enter__()


class Last(L.Callback):
    def __init__(self, first: First) -> None:
        self.first = first

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.first.waits.__exit__(None, None, None)


@pytest.mark.parametrize("kind", ["sentiment", "lm"])
def test_training_step_does_not_wait_for_its_device(tiny_llama, tmp_path, kind):
    rows = encoded_rows(12)
    if kind == "lm":
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
        module = LoraModule({"name": "lm"}, ModelConfig(name_or_path=str(tiny_llama)), LORA, SGD)
    else:
        module = make_module(tiny_llama)
    first = First()
    ours = [Throughput(), RunClock(), LearningRateMonitor("step"), ProgressBar()]
    batches = [PaddingCollator(1)(rows[i : i + 4]) for i in (0, 4, 8)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[first, *ours, Last(first)],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert trainer.global_step == 3
    assert first.waits.found == []


class Copies(TorchDispatchMode):
    """Notes what is copied between the host and the device, and where in our code."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        found = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if isinstance(found, torch.Tensor) and found.device != source.device:
                frames = [f for f in traceback.extract_stack() if "lightning" in f.filename]
                self.found.append(f"{Path(frames[-1].filename).name}:{frames[-1].lineno}")
        return found


class _Stream(IterableDataset):
    """Batches whose number is not known, so that Lightning asks no device for it."""

    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Done(Exception):
    """Ends a training after its third step."""


class Watched(L.Callback):
    def __init__(self) -> None:
        self.copies = Copies()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:  # Lightning makes its metrics in the first step
            self.copies.found.clear()
        self.copies.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.copies.__exit__(None, None, None)
        if batch_idx == 3:
            raise Done


@pytest.mark.parametrize("kind", ["sentiment", "lm"])
def test_training_step_copies_nothing_between_host_and_device(tiny_llama, kind, monkeypatch):
    """The meta device stands for a GPU: reading a value from it raises, and copies are counted."""
    rows = encoded_rows(16)
    if kind == "lm":
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
        module = LoraModule({"name": "lm"}, ModelConfig(name_or_path=str(tiny_llama)), LORA)
        module.configure_model()
    else:
        module = make_module(tiny_llama, optim=OptimConfig())
    watched = Watched()
    monkeypatch.setattr(module, "_check_losses", lambda: None)  # reads them where they are logged
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda self, device: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # not of meta
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=OneDeviceStrategy("meta"),
        max_steps=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        callbacks=[watched, LastCheckpoint("unused"), StopSignals()],
    )
    batches = [PaddingCollator(1)(rows[i : i + 4]) for i in range(0, 16, 4)]
    with pytest.raises(NotImplementedError, match="out of meta") as ended:  # Lightning's teardown
        trainer.fit(module, DataLoader(_Stream(batches), batch_size=None))
    assert isinstance(ended.value.__context__, Done)
    assert module.device.type == "meta"
    assert trainer.global_step == 2
    assert watched.copies.found == []


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_first_step_groups_layers_as_later_steps_do(tiny_llama, tiny_t5, kind, monkeypatch):
    """A resumed run would otherwise begin with other last bits than one without a break."""
    monkeypatch.setattr(products, "GROUPED_ON", ("cpu",))
    calls = []
    together = forward_pass.fused_group

    def counted(x, steps, *args, **kwargs):
        calls.append(len(steps))
        return together(x, steps, *args, **kwargs)

    monkeypatch.setattr(forward_pass, "fused_group", counted)
    rows = [{**row, "labels": row["input_ids"]} for row in encoded_rows(12)]
    task, folder = ("lm", tiny_llama) if kind == "llama" else ("summarization", tiny_t5)
    module = LoraModule({"name": task}, ModelConfig(name_or_path=str(folder)), LORA, SGD)
    module.task.encoder_decoder = kind == "t5"
    steps = []

    class Steps(L.Callback):
        def on_train_batch_end(self, *_):
            steps.append(calls.copy())
            calls.clear()

        def on_train_start(self, *_):
            calls.clear()

    fit(module, batches_of(rows, [4, 4, 4]), callbacks=[Steps()])
    assert len(steps[0]) > 1
    assert steps[0] == steps[1] == steps[2]


def test_throughput_counts_training_time_alone(tiny_llama, tmp_path, monkeypatch):
    """By a clock that says half a second a batch, and a hundred a validation."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measured.time, "monotonic", lambda: clock.now)

    class WithoutTensors(Throughput):
        """Fails where counting would launch a kernel."""

        def on_train_batch_end(self, *args):
            with NoTensors():
                super().on_train_batch_end(*args)

    class NoTensors(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise AssertionError(function)

    class Clock(L.Callback):
        def on_train_batch_start(self, *_):
            clock.now += 0.5

        def on_validation_batch_start(self, *_):
            clock.now += 100

    rows = encoded_rows(11)
    padded, rest = batches_of(rows, [4, 4, 3])[:2], rows[8:]
    packed = PackingCollator()([{**row, "labels": row["input_ids"]} for row in rest])
    located = [SentimentTask().locate(batch) for batch in (*padded, packed)]
    counts = [measured._batch_counts(batch) for batch in (*located, located[::2])]
    lengths = [len(row["input_ids"]) for row in rows]
    expected = [(4, sum(lengths[:4])), (4, sum(lengths[4:8])), (3, sum(lengths[8:]))]
    assert counts == [*expected, (7, sum(lengths[:4] + lengths[8:]))]
    module, logger = make_module(tiny_llama), CSVLogger(tmp_path)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        log_every_n_steps=3,
        val_check_interval=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Clock(), WithoutTensors()],
    )
    loader = DataLoader([padded[0], padded[1], padded[1], padded[0]], batch_size=None)
    trainer.fit(module, loader, DataLoader(padded[:1], batch_size=None))
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as handle:
        lines = [line for line in csv.DictReader(handle) if line["throughput/rows_per_second"]]
    found = [(int(line["step"]), float(line["throughput/rows_per_second"])) for line in lines]
    assert found == [(3, 8), (4, 8)]  # the last one at the end
    seen = sum(lengths[:8]) + sum(lengths[4:8])
    assert float(lines[0]["throughput/tokens_per_second"]) == pytest.approx(seen / 1.5)


@pytest.mark.parametrize(("precision", "mixed"), [("bf16-mixed", True), ("32-true", False)])
def test_packing_probe_runs_in_the_training_context(tiny_llama, monkeypatch, precision, mixed):
    """Flash attention takes no fp32, which an fp32 base gives it outside of autocast."""
    contexts = []
    monkeypatch.setattr(
        "lora_lightning.training.fit_start.check_packing",
        lambda model: contexts.append(torch.is_autocast_enabled("cpu")),
    )
    module = make_module(tiny_llama)
    module.trainer = L.Trainer(accelerator="cpu", precision=precision, logger=False)
    module.trainer.datamodule = SimpleNamespace(packs=True)
    module.on_test_start()
    assert contexts == [mixed]


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_t5"])
def test_generation_runs_once_an_epoch_and_equals_row_by_row(kind, request, monkeypatch):
    """Batches of 4, two of them cut to micro-batches; 7 rows are marked, of 12."""
    folder = request.getfixturevalue(kind)
    settings = {"name": "summarization", "max_new_tokens": 6, "text_metrics": ["rouge", "bleu"]}
    module = LoraModule(settings, ModelConfig(name_or_path=str(folder)), LORA, SGD, seed=3)
    both = kind == "tiny_t5"
    module.task.encoder_decoder = both
    module.configure_model()
    model, task = module.model, module.task
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # else the same token follows everything
        parameter.data.normal_(std=0.4, generator=generator)
    rows = []
    for index, length in enumerate([3, 9, 4, 7, 5, 8, 6, 3, 9, 4, 7, 5]):
        ids = torch.randint(4, 40, (length + 2,), generator=generator).tolist()
        prompt, answer = ids[:length], ids[length:]
        row = {"input_ids": prompt, "labels": answer}
        if not both:
            row = {"input_ids": ids, "labels": [IGNORE] * length + answer}
        rows.append({**row, "generate": index not in (0, 4, 5, 6, 7)})
    pad = PaddingCollator(1)
    batches = [pad(rows[:4]), [pad(rows[4:6]), pad(rows[6:8])], [pad(rows[8:9]), pad(rows[9:])]]
    calls, texts = [], {}
    generate = model.generate

    def counted(**inputs):
        calls.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", counted)
    compare = task._compare

    def noted(metrics, predictions, references):
        texts.update(zip(references, predictions, strict=True))
        compare(metrics, predictions, references)

    monkeypatch.setattr(task, "_compare", noted)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    for _ in range(2):  # the second epoch has its own rows alone
        calls.clear()
        (found,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
        assert calls == [4, 3]
    expected = {}
    for row in rows:
        if row["generate"]:
            (answer,) = task._answers(pad([row]))
            (prediction,) = task.predict(model, pad([row]))
            expected[task.decode(answer)] = prediction["generated"]
    assert texts == expected
    assert len(set(texts.values())) > 3
    truth = task.compare(list(expected.values()), list(expected))
    assert {name: found[f"val/{name}"] for name in truth} == pytest.approx(truth)


def test_run_clock_stops_when_the_device_is_done(monkeypatch):
    clock = SimpleNamespace(now=10.0)
    waited = []

    def synchronize(device):
        waited.append(str(device))
        clock.now += 7

    monkeypatch.setattr(measured.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    strategy = SimpleNamespace(root_device=torch.device("cuda", 3))
    loop = SimpleNamespace(_should_accumulate=lambda: False)
    trainer = SimpleNamespace(strategy=strategy, world_size=1, fit_loop=loop)
    run = RunClock()
    run.on_train_start(trainer, SimpleNamespace(device=torch.device("cpu")))
    for _ in range(2):
        clock.now += 2
        run.on_train_batch_end(trainer, None, None, [{"rows": 2, "tokens": 5}], 0)
    assert run.state_dict() == {"seconds": 4, "tokens": 10}
    assert waited == []
    run.on_train_end(trainer, None)
    assert (run.seconds, run.tokens, waited) == (11, 10, ["cuda:3"])


# Checkpoints -------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny_bert, tmp_path):
    """A trained module and its checkpoint's path."""
    module = make_module(tiny_bert, optim=OptimConfig(lr=1e-2))
    trainer = fit(module, batches_of(encoded_rows(16), [8, 8]))
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    return module, tmp_path / "some.ckpt"


def test_checkpoint_holds_the_adapter_alone_and_no_code(checkpoint):
    module, path = checkpoint
    content = torch.load(path, weights_only=True)
    expected = snapshot(module)
    assert set(content["state_dict"]) == {
        name
        for name, parameter in module.named_parameters()
        if any(parameter is tensor for tensor in module.trainable_tensors().values())
    }
    assert sum(t.numel() for t in content["state_dict"].values()) == sum(
        t.numel() for t in expected.values()
    )
    assert len(content["optimizer_states"][0]["state"]) == len(expected)
    assert content["hyper_parameters"]["lora"] == asdict(LORA)


def test_load_from_checkpoint_gives_equal_logits(checkpoint):
    module, path = checkpoint
    loaded = LoraModule.load_from_checkpoint(path, map_location="cpu")
    batch = batches_of(encoded_rows(9, seed=8), [9])[0]
    module.eval()
    loaded.eval()
    with torch.no_grad():
        expected = module.task.loss(module.model, batch).outputs
        assert torch.equal(loaded.task.loss(loaded.model, batch).outputs, expected)
    assert loaded.task.labels == ["negative", "positive"]


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "not finite"])
def test_load_from_checkpoint_with_damaged_state_raises(checkpoint, damage):
    module, path = checkpoint
    state = torch.load(path, weights_only=True)["state_dict"]
    name = next(name for name in state if "lora_A" in name)
    before = snapshot(module)
    if damage == "missing":
        del state[name]
    elif damage == "unexpected":
        state["model.bert.other.lora_A"] = torch.zeros(1)
        name = "other.lora_A"
    elif damage == "shape":
        state[name] = state[name][:2]
    else:
        state[name][0, 0] = float("nan")
    with pytest.raises(UserError, match=name.rpartition("model.")[2].replace(".", r"\.")):
        module.load_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in snapshot(module).items())


def test_checkpoint_of_other_labels_raises(checkpoint, tiny_bert):
    _, path = checkpoint
    content = torch.load(path, weights_only=True)
    module = make_module(tiny_bert)
    content["hyper_parameters"]["task_state"]["labels"] = ["positive", "negative"]
    with pytest.raises(UserError, match="labels differ"):
        module.on_load_checkpoint(content)


def test_checkpoint_of_another_module_raises(tiny_bert):
    with pytest.raises(UserError, match="not written by lora_lightning"):
        make_module(tiny_bert).on_load_checkpoint({"state_dict": {}})


def test_full_fine_tuning_checkpoint_round_trip_is_exact(tiny_bert, tmp_path):
    module = make_module(tiny_bert, lora=None)
    fit(module, batches_of(encoded_rows(8), [8])).save_checkpoint(tmp_path / "full.ckpt")
    loaded = LoraModule.load_from_checkpoint(tmp_path / "full.ckpt", map_location="cpu")
    expected = snapshot(module)
    assert all(torch.equal(t, expected[name]) for name, t in snapshot(loaded).items())


def test_disabled_adapter_equals_the_base(tiny_llama):
    module = make_module(tiny_llama)
    assert isinstance(module.adapter, Adapter)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).model.eval()
    batch = batches_of(encoded_rows(3), [3])[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    module.eval()
    with torch.no_grad(), module.adapter.disabled():
        found = module.model.model(**inputs).last_hidden_state
    with torch.no_grad():
        assert torch.equal(found, base(**inputs).last_hidden_state)


def test_eva_warm_start_keeps_the_settings_of_the_adapter(tiny_bert, rows_jsonl, fast, tmp_path):
    """Layers and ranks are the adapter's, all else the run's."""
    own = [*fast, "lora=eva", f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"]
    train(compose_config([*own, f"output_dir={tmp_path / 'run'}"]))
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    ranks = {name: len(a) for name, a in stored.items() if name.endswith("lora_A.weight")}
    settings = settings_of(compose_config([*own, "lora.dropout=0.1", "lora.rank=2"]))
    for start in ("adapter", "checkpoints/last.ckpt"):
        source = str(tmp_path / "run" / start)
        module, _ = build_components(settings, build_task(settings.task), seed=5, start_from=source)
        module.task.restore({"labels": ["a", "b"], "text_column": "text", "label_column": "label"})
        module.configure_model()
        layers = module.adapter.layers
        prefix = "base_model.model."
        found = {f"{prefix}{name}.lora_A.weight": layer.rank for name, layer in layers.items()}
        assert found == ranks
        assert {layer.dropout.p for layer in layers.values()} == {0.1}
