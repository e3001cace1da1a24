"""Modes of PyTorch for the length of a block, left as they were found."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_tf32_lock = threading.Lock()
_tf32_found: list[bool] = []


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Runs the block without dropout and leaves every submodule in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    try:
        module.eval()
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Allows TF32 in the block, where it is wanted."""
    if not on:
        yield
        return
    matmul = torch.backends.cuda.matmul
    # Runs of several modules may overlap in threads: the last to end restores what the first has found.
    with _tf32_lock:
        _tf32_found.append(_tf32_found[0] if _tf32_found else matmul.allow_tf32)
        matmul.allow_tf32 = True
    try:
        yield
    finally:
        with _tf32_lock:
            found = _tf32_found.pop()
            matmul.allow_tf32 = bool(_tf32_found) or found
