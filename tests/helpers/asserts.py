"""Comparisons of tensors and folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def assert_tensors_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float = 0, atol: float = 1e-6
) -> None:
    """Check tensors by name."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name],
            tensor,
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_close_in_scale(actual: Tensor, expected: Tensor) -> None:
    """Check a tensor to 1e-5 of the largest value, or of 1 where all are smaller."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every file and folder below a folder, with the bytes of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def flip_bit(path: Path, at: int | None = None) -> None:
    """Flip the lowest bit of a byte of a file: of the one in the middle, or at an index."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)
