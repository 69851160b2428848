"""The ranks of a run: which one this is, and exact sums over all of them. One process alone is rank 0 of 1."""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def start(device: torch.device) -> None:
    """Joins the process group that the launcher's environment variables describe; does nothing for a process alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


@contextmanager
def main_first():
    """The first rank goes through the block before the others enter it: it fetches and caches, they find."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks; integers stay exact. The result may be `value` itself, changed."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def all_max(value: Tensor) -> Tensor:
    """The largest of `value` over all ranks, element by element. The result may be `value` itself, changed."""
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def all_concat(value: Tensor, dim: int) -> Tensor:
    """The ranks' equally shaped tensors one after the other along `dim`, in rank order."""
    if not dist.is_initialized():
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts, dim=dim)


def share(count: int, part: int | None = None, parts: int | None = None) -> tuple[int, int]:
    """The range [first, last) of `count` things that part `part` of `parts` takes (this rank of all by default), as even as can be."""
    part = rank() if part is None else part
    parts = world_size() if parts is None else parts
    return count * part // parts, count * (part + 1) // parts
