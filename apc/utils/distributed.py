"""The ranks of a run: which one this is, and exact sums over all of them. One process alone is rank 0 of 1."""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

# Their names since torch 2.13, and before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Processes of this run on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    return rank() == 0


def start(device: torch.device) -> None:
    """Joins the process group that the launcher's environment variables describe; does nothing for a process alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
            os.environ.setdefault(
                "NCCL_NVLS_ENABLE", "0"
            )  # NVLink multicast: a process that fails with it can take the host's other GPUs with it
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


def sum_at_first(value: Tensor) -> None:
    """The sum of `value` over all ranks, in place of the first one's; the others' means nothing then. Integers stay exact."""
    if dist.is_initialized():
        dist.reduce(value, dst=0)


class Vote:
    """Whether any rank has said yes, which all learn from the same call. It goes over the CPUs' network (gloo), whatever the GPUs are at.

    To be made, and called, on all ranks together.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._under_way: tuple[dist.Work, Tensor] | None = None

    def say(self, yes: bool) -> bool:
        """What was said in the call before this one, so that nobody waits for the slowest."""
        before = self._taken()
        said = torch.tensor(int(yes))
        self._under_way = dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._group, async_op=True), said
        return before

    def close(self, yes: bool) -> bool:
        """What is said now, or was in the call before."""
        return self.say(yes) | self._taken()

    def _taken(self) -> bool:
        if self._under_way is None:
            return False
        work, said = self._under_way
        work.wait()
        self._under_way = None
        return bool(said)


def all_concat(value: Tensor, dim: int) -> Tensor:
    """The ranks' equally shaped tensors one after the other along `dim`, in rank order."""
    if not dist.is_initialized():
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts, dim=dim)


def own_rows(count: int) -> list[slice]:
    """The rows, of so many, that this rank works on: as many as every other, and the few then left over, which all ranks work on."""
    each = count // world_size()
    parts = slice(rank() * each, (rank() + 1) * each), slice(world_size() * each, count)
    return [part for part in parts if part.start < part.stop]


def sum_own_rows(value: Tensor) -> None:
    """Sums of contiguous integers [n, …] over all ranks, in place: each rank has those of its `own_rows`, and its other rows mean nothing.

    They are exact where their type holds them.
    """
    if dist.is_initialized():
        own, even, rest = _split(value)
        if len(even):
            _reduce_scatter(own, even)
        if len(rest):
            dist.all_reduce(rest)


def gather_rows(value: Tensor) -> None:
    """Brings each rank's `own_rows` of contiguous [n, …] to all, in place."""
    if dist.is_initialized():
        own, even, _ = _split(value)
        if len(even):
            _all_gather(even, own)


def _split(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of [n, …]: the rows that this rank alone works on, those that each rank has as many of, and those left over."""
    each = len(value) // world_size()
    even, rest = value[: world_size() * each], value[world_size() * each :]
    return even[rank() * each : (rank() + 1) * each], even, rest


def share(count: int, part: int | None = None, parts: int | None = None) -> tuple[int, int]:
    """The range [first, last) of `count` things that part `part` of `parts` takes (this rank of all by default), as even as can be."""
    part = rank() if part is None else part
    parts = world_size() if parts is None else parts
    return count * part // parts, count * (part + 1) // parts
