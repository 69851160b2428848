"""Prefetches blocks of patterns to a GPU: reads ahead, copies during computation, and keeps blocks that fit."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from apc.collect.patterns import Block, PatternSource

BLOCKS_IN_FLIGHT = 3  # on the device besides kept blocks: one in use, one being copied, one that the caller still holds
BLOCKS_READ = 2  # blocks read into host memory ahead of their use


class BlockStream:
    """Reads blocks of a source ahead, on a thread, and copies them to a GPU on a separate CUDA stream.

    source: where blocks come from; fields: names of the fields to read, as in `PatternInfo.fields`; device: a GPU to
    copy blocks to; with None or a CPU, blocks stay where the source has them; keep_bytes: device memory for blocks that
    stay there for later passes, besides `BLOCKS_IN_FLIGHT` blocks.
    """

    def __init__(
        self, source: PatternSource, fields: list[str], device: torch.device | None = None, keep_bytes: int = 0
    ):
        self.source, self.fields, self.keep_bytes = source, fields, keep_bytes
        self.device = device if device is not None and device.type == "cuda" else None
        self._kept: dict[tuple[int, int], Block] = {}
        self._resident = source.resident == (self.device or torch.device("cpu"))
        self._derived: dict[tuple[int, int], dict[str, Tensor]] = {}  # of blocks that stay on the device
        self._pending: deque[_Pending] = deque()
        self._copies = None if self.device is None else torch.cuda.Stream(self.device)
        self._copied: deque[torch.cuda.Event] = deque()

    def blocks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Block]:
        """The blocks of these window ranges [first, last), in order.

        If the source fails to read a block, its error is raised when that block is due.
        """
        upcoming, pending = deque(ranges), deque[_Pending]()
        self._pending = pending
        with ThreadPoolExecutor(max_workers=1) as reader:
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
        """Frees kept blocks and derived values; later passes copy and derive them again."""
        self._drain()
        self._derived.clear()
        self.keep_bytes += sum(map(_size, self._kept.values()))
        self._kept.clear()

    def _drain(self) -> None:
        """Waits until no read and no copy is running; only then is the memory of pending blocks free."""
        for block in self._pending:
            if block.read is not None:
                block.read.exception()  # waits; errors of blocks that nobody needs any more are ignored
        if self._copies is not None:
            self._copies.synchronize()

    def _start(self, reader: ThreadPoolExecutor, windows: tuple[int, int]) -> "_Pending":
        if windows in self._kept:
            return _Pending(windows, block=self._kept[windows])
        if self.device is None:
            return _Pending(windows, reader.submit(self.source.block, *windows, self.fields))
        tokens = (windows[1] - windows[0]) * self.source.info.seq_len
        targets = {}
        for name in self.source.host_fields(self.fields):
            shape, dtype = self.source.info.field(name, tokens)
            # Allocated here and not on the thread: the current stream may still use this memory for earlier work.
            targets[name] = torch.empty(shape, dtype=dtype, device=self.device)
        free = torch.cuda.current_stream(self.device).record_event()
        return _Pending(windows, reader.submit(self._copy, windows, targets, free), targets)

    def _finish(self, pending: "_Pending") -> Block:
        """The block. The host waits until it is read; only the current CUDA stream waits for its copy."""
        if pending.block is not None:
            return pending.block
        assert pending.read is not None
        if self.device is None:
            return pending.read.result()
        tensors, events = pending.read.result()
        for event in events:
            torch.cuda.current_stream(self.device).wait_event(event)
        seq_len = self.source.info.seq_len
        first, last = pending.windows
        block = Block.from_tensors(tensors, torch.arange(first * seq_len, last * seq_len, device=self.device), seq_len)
        if pending.targets and pending.windows not in self._kept and _size(block) <= self.keep_bytes:
            self.keep_bytes -= _size(block)
            self._kept[pending.windows] = block
        return block

    def _copy(
        self, windows: tuple[int, int], targets: dict[str, Tensor], free: torch.cuda.Event
    ) -> tuple[dict[str, Tensor], list[torch.cuda.Event]]:
        """Reads a block and starts copying its host fields into `targets`, after the event `free`. Runs on the thread.

        Returns the fields, and the events after which they are valid.
        """
        copies = self._copies
        assert copies is not None
        while len(self._copied) > 1:  # else reading would fill the host's memory ahead of a slower GPU
            self._copied.popleft().synchronize()
        fields = self.source.block(*windows, self.fields).tensors()
        computed = torch.cuda.current_stream(self.device).record_event()  # the source may compute fields on the GPU
        with torch.cuda.device(self.device), torch.cuda.stream(copies):
            copies.wait_event(free)
            for name, target in targets.items():
                value = fields[name] if fields[name].is_pinned() else fields[name].pin_memory()
                if value.is_contiguous():
                    target.copy_(value, non_blocking=True)
                else:  # layer by layer: torch would first gather the layers in host memory
                    for layer_target, layer in zip(target, value, strict=True):
                        layer_target.copy_(layer, non_blocking=True)
            self._copied.append(copies.record_event())
        return fields | targets, [computed, self._copied[-1]]


@dataclass
class _Pending:
    """A block on its way: either a kept `block`, or one that the thread is reading."""

    windows: tuple[int, int]
    read: Future | None = None
    targets: dict[str, Tensor] | None = None  # device memory that the thread copies to
    block: Block | None = None


def _size(block: Block) -> int:
    return sum(value.nbytes for value in block.tensors().values())
