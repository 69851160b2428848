"""Imports and compiles everything that a run needs, in the process from which the tests' processes are forked."""

import gc

import matplotlib.figure
import torch

import train
from apc import ops
from apc.collect import collect
from apc.estimate import estimate

torch.set_num_threads(1)
for power in (1, 2):
    ops.assign_weighted(torch.ones(2, 9, dtype=torch.uint8), ops.pack(torch.ones(2, 9, dtype=torch.bool)), power)
ops.assign(ops.pack(torch.ones(2, 9, dtype=torch.bool)), ops.pack(torch.ones(2, 9, dtype=torch.bool)))
matplotlib.figure.Figure().savefig("/dev/null", format="png")
gc.freeze()
__all__ = ["collect", "estimate", "train"]
