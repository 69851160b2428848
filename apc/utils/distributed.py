"""Ranks of a run, and exact sums over them. A single process is rank 0 of 1."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both functions.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's rank among those on its machine, from the launcher's environment."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Number of ranks on this machine, from the launcher's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def start(device: torch.device) -> None:
    """Joins the process group that the launcher's environment describes; a single process needs none."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # No NVLink multicast: a process that fails while using it can take down the host's other GPUs.
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block before the others, so that they find in the cache what it fetched."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def barrier() -> None:
    """Waits until every rank gets here."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(value: Tensor) -> Tensor:
    """Sum over all ranks, exact for integers. May change `value` and return it."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def all_max(value: Tensor) -> Tensor:
    """Elementwise maximum over all ranks. May change `value` and return it."""
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def sum_at_first(value: Tensor) -> None:
    """Replaces rank 0's `value` by the sum over all ranks, exact for integers; undefined on other ranks afterwards."""
    if dist.is_initialized():
        dist.reduce(value, dst=0)


class Vote:
    """Tells all ranks, in the same call, whether any of them voted yes.

    Votes go through gloo on the CPU, so they do not wait for the GPU. All ranks must create it and call it together.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[dist.Work, Tensor] | None = None

    def say(self, yes: bool) -> bool:
        """Votes, and returns the result of the previous call, so that no rank waits for the slowest one."""
        previous = self._result()
        flag = torch.tensor(int(yes))
        self._pending = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True), flag
        return previous

    def close(self, yes: bool) -> bool:
        """Votes, waits, and returns whether any rank voted yes in this call or the previous one."""
        return self.say(yes) | self._result()

    def _result(self) -> bool:
        """Result of the pending vote; False if there is none."""
        if self._pending is None:
            return False
        work, flag = self._pending
        work.wait()
        self._pending = None
        return bool(flag)


def all_concat(value: Tensor, dim: int) -> Tensor:
    """The ranks' tensors, equal in shape, concatenated along `dim` in rank order."""
    if not dist.is_initialized():
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts, dim=dim)


def own_rows(count: int) -> list[slice]:
    """Which of `count` rows this rank processes, as slices.

    Every rank has ⌊count / ranks⌋ rows of its own. All ranks also process the remaining rows at the end.
    """
    each = count // world_size()
    parts = slice(rank() * each, (rank() + 1) * each), slice(world_size() * each, count)
    return [part for part in parts if part.start < part.stop]


def sum_own_rows(value: Tensor) -> None:
    """Sums contiguous integers [n, …] over all ranks in place; each rank gets the sums of its `own_rows`.

    The other rows are undefined afterwards. Sums are exact if the type holds them.
    """
    if dist.is_initialized():
        own, even, rest = _split(value)
        if len(even):
            _reduce_scatter(own, even)
        if len(rest):
            dist.all_reduce(rest)


def gather_rows(value: Tensor) -> None:
    """Copies each rank's `own_rows` of a contiguous [n, …] to all ranks, in place."""
    if dist.is_initialized():
        own, even, _ = _split(value)
        if len(even):
            _all_gather(even, own)


def _split(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of [n, …]: this rank's equal share, all ranks' equal shares, and the remainder."""
    each = len(value) // world_size()
    even, rest = value[: world_size() * each], value[world_size() * each :]
    return even[rank() * each : (rank() + 1) * each], even, rest


def share(count: int, part: int | None = None, parts: int | None = None) -> tuple[int, int]:
    """Range [first, last) number `part` of `count` items that are split into `parts` nearly equal ranges.

    By default each rank has one range, and the result is this rank's.
    """
    part = rank() if part is None else part
    parts = world_size() if parts is None else parts
    return count * part // parts, count * (part + 1) // parts
