"""Filters that limit the console to messages that a user can act on."""

from __future__ import annotations

import logging
import threading
import warnings
from typing import Any


def quiet_libraries() -> None:
    """Silence messages that a user cannot act on."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.distributed").setLevel(logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # ours says more
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 products are always fp16
    logging.getLogger("huggingface_hub").propagate = False  # has its own handler beside Hydra's
    for message in (
        ".*does not have many workers.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
        ".*The dirpath has changed.*",
        ".*sync_dist=True.*",  # torchmetrics has already synchronized our metrics
        ".*You have overridden `on_before_batch_transfer` in `LightningModule`.*",
        ".*`gradient_checkpointing_enable` is deprecated.*",  # older versions have no alternative
        ".*DTensor random operators may not have complete support.*",  # heads are drawn again
        ".*FSDP2-wrapped module .* returned a view tensor.*",  # no code changes it in place
        ".*`torch.jit.script.*` is deprecated.*",  # bitsandbytes, which transformers imports
        ".*`torch.distributed.all_gather_into_tensor` is deprecated.*",  # DeepSpeed
        ".*Experiment logs directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message)
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    _quiet_writers()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()


def _quiet_writers() -> None:
    """Keep TensorBoard's thread from printing errors that its logger reports."""
    before = threading.excepthook
    if getattr(before, "of_writers", False):
        return

    def hook(args: Any) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            before(args)

    hook.of_writers = True  # type: ignore[attr-defined]
    threading.excepthook = hook
