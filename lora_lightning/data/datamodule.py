"""Data module that tokenizes the rows of a task once and batches them by length."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from lora_lightning.config.schema import DataConfig
from lora_lightning.distributed.strategies import data_ranks, in_step
from lora_lightning.distributed.strategy_internals import uses_distributed_sampler
from lora_lightning.errors import UserError
from lora_lightning.models.forward import uses_flash
from lora_lightning.models.tokenizer import check_tokens_known
from lora_lightning.tasks import Task
from lora_lightning.utils.terminal import say

from .collators import (
    Located,
    MicroBatches,
    PackingCollator,
    PaddingCollator,
)
from .examples import (
    Examples,
    highest_ids,
    longest_input,
    mark_rows_to_generate,
    tokens_at_a_time,
)
from .loading import load_splits
from .row_counts import row_warnings
from .sampler import LengthBucketBatchSampler, ResumableDataLoader
from .splits import make_splits
from .tokenization import (
    Encoding,
    cores,
    encode_cached,
    in_main_thread,
)

GPU_MULTIPLE = 8
"""On a GPU, the padded length of a batch is a multiple of this number. GPU kernels work in blocks,
and a mask is copied if its rows do not begin at such a block."""


class LoraDataModule(L.LightningDataModule):
    """Data module of a task, from rows to batches.

    Tokenized rows are cached by content, which covers rows, tokenizer, task settings and length.
    Missing splits are cut from the training rows. The batch sampler serves all ranks itself, so
    the Trainer needs `use_distributed_sampler=False`.

    Args:
        task: task that turns rows into examples.
        tokenizer: tokenizer of the base model.
        config: settings that choose the rows and their batching.
        length_limit: longest input that the model takes. None (default) means unlimited.
        rows: number of rows in the model's embeddings, which bounds the token ids. None (default)
            means as many as the tokenizer has.
        seed: seed of the batch order (default: 0).
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        config: DataConfig,
        *,
        length_limit: int | None = None,
        rows: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.task = task
        self.tokenizer = tokenizer
        self.config = config
        self.length_limit = length_limit
        self.rows = rows
        self.seed = seed
        if config.packing and not task.packs:
            raise UserError(
                f"data.packing=true: is not supported with task={task.name} and this model. It "
                "requires a causal model and a task whose target is text."
            )
        self.max_length = self._max_length(length_limit)
        self.raw: dict[str, Any] = {}
        self.encoded: dict[str, Any] = {}
        self.dropped: dict[str, int] = {}
        self._has_warned = False

    def _max_length(self, length_limit: int | None) -> int:
        asked = longest_input(self.config, length_limit, self.tokenizer.model_max_length)
        if self.config.max_length is None:
            return asked
        special = self.tokenizer.num_special_tokens_to_add()
        if asked <= special:
            raise UserError(
                f"data.max_length={asked}: must leave room for text beside {special} special "
                "tokens. Use at least 16."
            )
        return asked

    # Lightning's hooks -----------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fill the cache, in one process per node."""
        if not self.encoded:
            self._build()

    def setup(self, stage: str | None = None) -> None:
        """Load the encoded rows, in every process."""
        if not self.encoded:
            self._build()
        if stage == "fit":
            self._check_splits_to_fit()
        if self.trainer is not None and self.trainer.world_size > 1:
            self._check_ranks(self.trainer)

    def _check_splits_to_fit(self) -> None:
        for split in ("train", "val"):
            if not self.has(split):
                fraction = ", or data.val_fraction above 0" if split == "val" else ""
                raise UserError(
                    f"data.{split}: must be given for training. Type data.{split}=FILE{fraction}."
                )

    def _check_ranks(self, trainer: L.Trainer) -> None:
        if uses_distributed_sampler(trainer):
            raise UserError(
                "Trainer(use_distributed_sampler=True): is not supported with LoraDataModule. Give "
                "use_distributed_sampler=False, because it spreads the rows itself."
            )
        if in_step(trainer.strategy) and isinstance(self.config.max_tokens, int):
            raise UserError(
                f"data.max_tokens={self.config.max_tokens}: is not supported with trainer=fsdp2, "
                "whose ranks must make equally many forward passes. Remove it, and lower "
                "data.batch_size."
            )
        ranks = data_ranks(trainer)
        for split in ("val", "test"):
            rows = len(self.encoded[split]) if self.has(split) else ranks
            if rows < ranks:  # torchmetrics cannot gather from a rank without rows
                raise UserError(
                    f"data.{split}: must hold at least {ranks} rows for {ranks} processes, and "
                    f"holds {rows}. Give more rows, or fewer trainer.devices."
                )

    def warn_about_rows(self) -> None:
        """Warn, once, of rows that make a run's metrics doubtful."""
        if not self._has_warned and self.has("train"):
            for line in row_warnings(self):
                _report(f"WARNING {line}")
        self._has_warned = True

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        return self._loader("val", shuffle=False) if self.has("val") else []

    def test_dataloader(self) -> Any:
        return self._loader("test", shuffle=False) if self.has("test") else []

    def has(self, split: str) -> bool:
        """Return whether a split has rows."""
        return split in self.encoded

    # Rows ------------------------------------------------------------------------------------

    def _build(self) -> None:
        raw = load_splits(self.config)
        self.task.learn(raw)
        for note in self.task.notes:
            _report(note)
        raw = make_splits(raw, self.config, strata=self.task.strata)
        for split in raw:
            limit = getattr(self.config, f"limit_{split}")
            if limit is not None:
                raw[split] = raw[split].select(range(min(limit, len(raw[split]))))
        encoding = Encoding(self.task, self.tokenizer, self.max_length)
        for split, rows in raw.items():
            encoded = encode_cached(rows, encoding, self.config.cache_dir)
            if self.rows is not None:
                ids = highest_ids(encoded)
                check_tokens_known(ids, self.rows, self.tokenizer, where=f"the {split} data")
            kept = [i for i, length in enumerate(encoded["length"][:]) if length > 0]
            self.dropped[split] = len(encoded) - len(kept)
            if not kept:
                raise UserError(
                    f"the {split} data has nothing to learn: {self.task.dropped_means} in all "
                    f"{len(rows)} rows. {self.task.dropped_advice}"
                )
            if self.dropped[split]:
                _report(
                    f"{split}: {self.dropped[split]} of {len(rows)} rows are dropped: "
                    f"{self.task.dropped_means}."
                )
            encoded = encoded.select(kept)
            if split != "train" and self.task.generate_rows:
                encoded = mark_rows_to_generate(encoded, self.task.generate_rows)
            self.raw[split], self.encoded[split] = rows.select(encoded["row"][:]), encoded

    # Batches ---------------------------------------------------------------------------------

    def _batches(self, split: str, *, shuffle: bool) -> LengthBucketBatchSampler:
        config = self.config
        batch_size = config.batch_size
        if not shuffle:
            batch_size = config.eval_batch_size or 2 * config.batch_size
        # Processes that share the matrices of a layer see the same rows.
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        return LengthBucketBatchSampler(
            self.encoded[split]["length"][:],
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            **ranks,
        )

    def rows_trained_on(self, epoch: int, batches: Iterable[int]) -> list[dict[str, Any]]:
        """Return the raw rows of some batches of an epoch, over all ranks, with long values cut."""
        sampler = self._batches("train", shuffle=True)
        sampler.set_epoch(epoch)
        order = sampler.global_batches()
        rows = [self.raw["train"][row] for batch in batches for row in order[batch]]
        return [{name: str(value)[:500] for name, value in row.items()} for row in rows]

    def _loader(self, split: str, *, shuffle: bool) -> DataLoader[Any]:
        packing = self.task.joins_rows or (shuffle and self.config.packing)
        collate: Any = self.collate(packing=packing)
        max_tokens, workers = self.max_tokens, self.num_workers
        module: Any = getattr(self.trainer, "lightning_module", None)
        if packing and uses_flash(getattr(module, "model", None)):
            # The flash kernel has no mask and does not compute masked positions.
            collate.width, collate.multiple = max_tokens, 1
        if max_tokens is not None:
            collate = MicroBatches(collate, max_tokens)
        if workers:  # else tokenizers warns each worker against using it, and none does
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        return ResumableDataLoader(
            Examples(self.encoded[split]),
            batch_sampler=self._batches(split, shuffle=shuffle),
            collate_fn=Located(collate, self.task),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._on_gpu,
        )

    @property
    def _on_gpu(self) -> bool:
        strategy = self.trainer.strategy if self.trainer is not None else None
        return strategy is not None and strategy.root_device.type == "cuda"

    @property
    def num_workers(self) -> int:
        """Number of processes that prepare the batches of a split."""
        asked = self.config.num_workers
        if asked != "auto":
            return int(asked)
        if self.trainer is None or not self._on_gpu or not in_main_thread():
            return 0
        return min(4, max(2, cores() // self.trainer.num_devices - 1))

    @property
    def packs(self) -> bool:
        """Whether batches hold rows that only position ids separate."""
        return self.config.packing or self.task.joins_rows

    @property
    def max_tokens(self) -> int | None:
        """Number of tokens computed at a time, or None if batches stay whole."""
        strategy = self.trainer.strategy if self.trainer is not None else None
        if strategy is None or in_step(strategy):
            return self.tokens_on("other")
        return self.tokens_on(strategy.root_device.type)

    def tokens_on(self, device_type: str) -> int | None:
        """Return the number of tokens computed at a time on a device type, by the config alone."""
        return tokens_at_a_time(self.config, device_type)

    def collate(self, *, packing: bool = False) -> PackingCollator | PaddingCollator:
        """Return a collator for rows of this data."""
        pad = self.tokenizer.pad_token_id
        multiple = GPU_MULTIPLE if self._on_gpu else 1
        if packing:
            return PackingCollator(pad, multiple=multiple)
        return PaddingCollator(pad, multiple=multiple, limit=self.length_limit)

    def training_batches(self, device_type: str) -> Iterator[dict[str, Any]]:
        """Yield batches with each training row once.

        The order depends on the seed. It is the same on all ranks and in every run.
        """
        rows = Examples(self.encoded["train"])
        tokens = self.tokens_on(device_type)
        size = self.config.batch_size
        size = size if tokens is None else max(1, min(size, tokens // self.max_length))
        generator = torch.Generator().manual_seed(self.seed)
        # Lightning may make a GPU the default device while this runs (configure_model).
        order = torch.randperm(len(rows), generator=generator, device="cpu")
        collate = self.collate(packing=self.task.joins_rows)
        for chosen in order.split(size):
            yield self.task.locate(collate([rows[index] for index in chosen.tolist()]))

    def longest_batch(self, split: str, size: int) -> dict[str, Any]:
        """Return a batch of the longest rows of a split, which needs the most memory."""
        lengths = self.encoded[split]["length"][:]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])[:size]
        examples = Examples(self.encoded[split])
        collate = self.collate(packing=self.task.joins_rows)
        return collate([examples[row] for row in order])


@rank_zero_only
def _report(message: str) -> None:
    """Print a message to stderr, because a run silences Lightning's logger at that level."""
    say(message, file=sys.stderr)
