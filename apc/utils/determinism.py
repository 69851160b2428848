"""Bit-exact gradients on a GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic as torch_deterministic


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Makes gradients bit-exact on one GPU in one process.

    An operation without a deterministic version raises an error.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it for a deterministic cuBLAS
    # torch declares this setting in a way that mypy does not see.
    settings: Any = torch_deterministic
    before, fills = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    # With warnings in place of errors, the gradient of attention would not be deterministic.
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fills
