"""Decides on which GPU a run of a sweep may start, if more runs than GPUs may run at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

CONTEXT_BYTES = 10**9  # what a process takes of a GPU besides the memory that torch counts, at most


def free_gpu_memory(gpu: int) -> int:
    """Bytes of a GPU's memory that no process has. The first call takes up to half a gigabyte of it."""
    return torch.cuda.mem_get_info(gpu)[0]


@dataclass(eq=False)
class Guest:
    """A run on a GPU."""

    name: str
    gpu: int
    alone: bool  # no other may start on this GPU
    had_company: bool  # another run was there at some time


class SharedGPUs:
    """The runs on each GPU.

    A run is taken to need as much memory as the largest finished run of the sweep. Until one has finished, none starts
    beside another. On a GPU without a run of the sweep, a run always starts.

    count: GPUs; jobs: runs at a time; free_memory: tells a GPU's free bytes, only called if jobs exceed GPUs.
    """

    def __init__(self, count: int, jobs: int, free_memory: Callable[[int], int] = free_gpu_memory) -> None:
        self._guests: list[list[Guest]] = [[] for _ in range(count)]
        self._unused = [0] * count  # free bytes of each GPU before the first of its guests came
        self._free_memory = free_memory if jobs > count else lambda gpu: 0
        self._largest = 0

    def learn(self, held: int) -> None:
        """Notes the bytes that a finished run held of its GPU, as torch counts them; 0: not known."""
        self._largest = max(self._largest, held)

    def find(self, alone: bool) -> tuple[int | None, str]:
        """The GPU where a run may start, or None and what it has to wait for; alone: it needs a GPU of its own."""
        order = sorted(range(len(self._guests)), key=lambda gpu: len(self._guests[gpu]))
        lacks = {gpu: self._lack(gpu, alone) for gpu in order}
        return next(((gpu, "") for gpu in order if not lacks[gpu]), (None, lacks[order[0]]))

    def _lack(self, gpu: int, alone: bool) -> str:
        """What a run has to wait for on this GPU; empty if nothing."""
        guests, need = self._guests[gpu], self._largest + CONTEXT_BYTES
        names = " and ".join(guest.name for guest in guests)
        if not guests:
            return ""
        if alone or any(guest.alone for guest in guests):
            return f"the end of {names}, because {'it' if alone else names} needs GPU {gpu} alone"
        if not self._largest:
            return f"the end of {names}: only a finished run shows how much GPU memory a run of this sweep needs"
        # The guests may still grow to their full size, and other programs may have come.
        left = min(self._free_memory(gpu), self._unused[gpu] - len(guests) * need)
        if left >= need:
            return ""
        size = f"{need / 1e9:.1f} GB of GPU {gpu}, which the largest finished run needed"
        return f"{size}; {max(0, left) / 1e9:.1f} GB are left beside {names}"

    def enter(self, name: str, gpu: int, alone: bool) -> Guest:
        """Adds a run that starts on this GPU."""
        guests = self._guests[gpu]
        if not guests:
            self._unused[gpu] = self._free_memory(gpu)
        for other in guests:
            other.had_company = True
        guests.append(Guest(name, gpu, alone, bool(guests)))
        return guests[-1]

    def leave(self, guest: Guest) -> None:
        """Removes a run that has ended."""
        self._guests[guest.gpu].remove(guest)
