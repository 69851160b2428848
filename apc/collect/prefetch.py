"""Blocks of patterns on their way to a GPU: read ahead, copied while it works on earlier ones, and kept there as far as they fit."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apc.collect.patterns import Block, PatternSource

BLOCKS_IN_FLIGHT = 3  # blocks on the device besides those that stay: at work, being copied, and not let go of yet
BLOCKS_READ = 2  # blocks that are read into host memory ahead of their use


class BlockStream:
    """Reads blocks of a source ahead of their use, on a thread, and onto a GPU by a stream of copies beside the one that computes.

    Args:
        fields: names of the fields to read, as in `PatternInfo.fields`.
        device: a GPU that the blocks go to; None or a CPU: they stay where the source gives them.
        keep_bytes: device memory for blocks that stay there, so that later passes find them, as far as they fit. Beside it three blocks
            are on the device at a time: one at work, one that is being copied, and one that the caller may not have let go of yet.
    """

    def __init__(
        self, source: PatternSource, fields: list[str], device: torch.device | None = None, keep_bytes: int = 0
    ):
        self.source, self.fields, self.keep_bytes = source, fields, keep_bytes
        self.device = device if device is not None and device.type == "cuda" else None
        self._kept: dict[tuple[int, int], Block] = {}
        self._resident = source.resident == (self.device or torch.device("cpu"))
        self._derived: dict[tuple[int, int], dict[str, Tensor]] = {}  # of blocks that stay where they are worked on
        self._pending: deque[_Pending] = deque()
        self._copies = None if self.device is None else torch.cuda.Stream(self.device)
        self._done: deque[torch.cuda.Event] = deque()

    def blocks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Block]:
        """The blocks of these window ranges [first, last), in order. What the source raises for a block is raised where that block is due."""
        with ThreadPoolExecutor(max_workers=1) as reader:
            upcoming = deque(ranges)
            pending = self._pending = deque()
            try:
                while upcoming or pending:
                    while upcoming and sum(block.read is not None for block in pending) < BLOCKS_READ:
                        pending.append(self._start(reader, upcoming.popleft()))
                    due = pending.popleft()
                    block = self._finish(due)
                    if due.windows in self._kept or self._resident:
                        block.derived = self._derived.setdefault(due.windows, {})
                    yield block
            finally:
                self._drain()

    def release(self) -> None:
        """Gives the memory of kept blocks, and of what was derived of blocks, back; later passes copy and derive them again."""
        self._drain()
        self._derived.clear()
        self.keep_bytes += sum(map(_size, self._kept.values()))
        self._kept.clear()

    def _drain(self) -> None:
        """Waits until nothing reads or copies any more: the memory of what is pending is free again only then."""
        for block in self._pending:
            if block.read is not None:
                block.read.exception()  # waits; an error is raised where the block is due, and these are not due any more
        if self._copies is not None:
            self._copies.synchronize()

    def _start(self, reader: ThreadPoolExecutor, windows: tuple[int, int]) -> "_Pending":
        if windows in self._kept:
            return _Pending(windows, block=self._kept[windows])
        if self.device is None:
            return _Pending(windows, reader.submit(self.source.block, *windows, self.fields))
        info = self.source.info
        tokens = (windows[1] - windows[0]) * info.seq_len
        # Taken here and not on the thread: what had this memory before belongs to work on the current stream up to now.
        targets = {}
        for name in self.source.host_fields(self.fields):
            shape, dtype = info.field(name, tokens)
            targets[name] = torch.empty(shape, dtype=dtype, device=self.device)
        free = torch.cuda.current_stream(self.device).record_event()
        return _Pending(windows, reader.submit(self._copy, windows, targets, free), targets)

    def _finish(self, pending: "_Pending") -> Block:
        """Waits for a block to be read. For its copy only the current CUDA stream waits."""
        windows, seq_len = pending.windows, self.source.info.seq_len
        if pending.read is None:
            return pending.block
        if self.device is None:
            return pending.read.result()
        tensors, events = pending.read.result()
        for event in events:
            torch.cuda.current_stream(self.device).wait_event(event)
        positions = torch.arange(windows[0] * seq_len, windows[1] * seq_len, device=self.device)
        block = Block.from_tensors(tensors, positions, seq_len)
        if pending.targets and windows not in self._kept and _size(block) <= self.keep_bytes:
            self.keep_bytes -= _size(block)
            self._kept[windows] = block
        return block

    def _copy(
        self, windows: tuple[int, int], targets: dict[str, Tensor], free: torch.cuda.Event
    ) -> tuple[dict[str, Tensor], list[torch.cuda.Event]]:
        """Reads a block and starts to copy its host fields into `targets`, once these are `free`. On the reader's thread.

        Returns the fields, and the events after which they hold what they should.
        """
        while len(self._done) > 1:  # or reading runs ahead of a slower GPU until the host's memory is full
            self._done.popleft().synchronize()
        read = self.source.block(*windows, self.fields).tensors()
        made = torch.cuda.current_stream(
            self.device
        ).record_event()  # what the source itself computes on the GPU; copies need not wait for it
        with torch.cuda.device(self.device), torch.cuda.stream(self._copies):
            self._copies.wait_event(free)
            for name, target in targets.items():
                value = read[name] if read[name].is_pinned() else read[name].pin_memory()
                if value.is_contiguous():
                    target.copy_(value, non_blocking=True)
                else:  # one piece for each layer; torch would gather them in host memory first
                    for to, layer in zip(target, value, strict=True):
                        to.copy_(layer, non_blocking=True)
            self._done.append(self._copies.record_event())
        return read | targets, [made, self._done[-1]]


@dataclass
class _Pending:
    """A block on its way. read: what the thread makes of it; targets: the device memory that it is copied to. Or a block that was kept."""

    windows: tuple[int, int]
    read: Future | None = None
    targets: dict[str, Tensor] = field(default_factory=dict)
    block: Block | None = None


def _size(block: Block) -> int:
    return sum(value.nbytes for value in block.tensors().values())
