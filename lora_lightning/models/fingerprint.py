"""Fingerprint of a base model, which distinguishes it from others of the same shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from lora_lightning.distributed.parallel_dims import full_tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a short hash of a base model, from names, shapes and a few values of each tensor.

    Values are hashed in bfloat16, so a base stored in fp32 and loaded in bf16 has the same hash.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = full_tensor(tensor.detach()).reshape(-1)
        if not flat.is_floating_point() or flat.is_meta or not flat.numel():
            continue
        sample = flat[:: max(1, flat.numel() // 16)][:16].to(torch.bfloat16).cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
