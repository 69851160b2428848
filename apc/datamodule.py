"""Hands patterns to training in large blocks of consecutive windows, each rank its own share, in an order that a seed decides.

Blocks are read ahead, and copied to the GPU while it works on earlier ones; those that fit stay there.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from apc import distributed
from apc.errors import UserError
from apc.patterns import Block, PatternSource


def block_ranges(windows: int, block_windows: int) -> list[tuple[int, int]]:
    """Window ranges [first, last) of the blocks that all ranks work on together; each has a window for every rank.

    Raises UserError if there are fewer windows than ranks.
    """
    ranks = distributed.world_size()
    if windows < ranks:
        raise UserError(f"{windows} windows of text for {ranks} processes; give more text, lower data.seq_len, or lower trainer.devices")
    each = max(block_windows, ranks)
    starts = list(range(0, windows, each))
    if len(starts) > 1 and windows - starts[-1] < ranks:
        starts.pop()  # the last block takes the short rest too
    return list(zip(starts, [*starts[1:], windows], strict=True))


def rank_range(first: int, last: int) -> tuple[int, int]:
    """This rank's windows of a block."""
    begin, end = distributed.share(last - first)
    return first + begin, first + end


class BlockStream:
    """Reads blocks of a source ahead of their use, on a thread, and onto a GPU by a stream of copies beside the one that computes.

    Args:
        fields: names of the fields to read, as in `PatternInfo.fields`.
        device: a GPU that the blocks go to; None or a CPU: they stay where the source gives them.
        keep_bytes: device memory for blocks that stay there, so that later passes find them, as far as they fit. Beside it three blocks
            are on the device at a time: one at work, one that is being copied, and one that the caller may not have let go of yet.
    """

    def __init__(self, source: PatternSource, fields: list[str], device: torch.device | None = None, keep_bytes: int = 0):
        self.source, self.fields, self.keep_bytes = source, fields, keep_bytes
        self.device = device if device is not None and device.type == "cuda" else None
        self._kept: dict[tuple[int, int], Block] = {}
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
                    while upcoming and sum(block.read is not None for block in pending) < 2:
                        pending.append(self._start(reader, upcoming.popleft()))
                    yield self._finish(pending.popleft())
            finally:
                self._settle()

    def release(self) -> None:
        """Gives the memory of kept blocks back; later passes copy them again."""
        self._settle()
        self.keep_bytes += sum(map(_size, self._kept.values()))
        self._kept.clear()

    def _settle(self) -> None:
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

    def _copy(self, windows: tuple[int, int], targets: dict[str, Tensor], free: torch.cuda.Event) -> tuple[dict[str, Tensor], list[torch.cuda.Event]]:
        """Reads a block and starts to copy its host fields into `targets`, once these are `free`. On the reader's thread.

        Returns the fields, and the events after which they hold what they should.
        """
        while len(self._done) > 1:  # or reading runs ahead of a slower GPU until the host's memory is full
            self._done.popleft().synchronize()
        read = self.source.block(*windows, self.fields).tensors()
        made = torch.cuda.current_stream(self.device).record_event()  # what the source itself computes on the GPU; copies need not wait for it
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


class BlockLoader:
    """Every block once an epoch, shuffled unless `in_order`; or, with `batch_tokens`, mini-batches of shuffled tokens of one block after another.

    Iterating yields this rank's share of each block as a `Block`; all ranks yield equally often. `progress` says what has
    been handed out, and after `resume` the next iteration goes on behind it, so that a resumed run sees each row exactly
    once.

    Args:
        fields, device, keep_bytes: as for `BlockStream`.
        block_windows: windows in a block, over all ranks.
        batch_tokens: tokens in a mini-batch of one rank; None: whole blocks.
    """

    def __init__(
        self,
        source: PatternSource,
        fields: list[str],
        block_windows: int,
        seed: int,
        batch_tokens: int | None = None,
        device: torch.device | None = None,
        keep_bytes: int = 0,
        in_order: bool = False,
    ):
        self.source, self.seed, self.batch_tokens, self.in_order = source, seed, batch_tokens, in_order
        self._stream = BlockStream(source, fields, device, keep_bytes)
        self.blocks = block_ranges(source.info.windows, block_windows)
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return sum(self._batches(block) for block in range(len(self.blocks)))

    def _batches(self, block: int) -> int:
        if self.batch_tokens is None:
            return 1
        first, last = self.blocks[block]
        largest_share = math.ceil((last - first) / distributed.world_size())
        return math.ceil(largest_share * self.source.info.seq_len / self.batch_tokens)

    def progress(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def resume(self, progress: dict[str, int]) -> None:
        self.epoch, self.position = progress["epoch"], progress["position"]

    def release(self) -> None:
        """Gives the device memory of kept blocks back; later passes copy them again."""
        self._stream.release()

    def whole_blocks(self, fields: list[str]) -> Iterator[Block]:
        """This rank's share of every block, once and in order, with other fields; the loader's own position stays."""
        yield from BlockStream(self.source, fields, self._stream.device).blocks([rank_range(*block) for block in self.blocks])

    def owned(self, tokens: Tensor) -> Tensor:
        """bool [n]: which tokens (int64 [n], on the host) are this rank's own."""
        windows = tokens // self.source.info.seq_len
        mine = torch.zeros(self.source.info.windows, dtype=torch.bool)
        for block in self.blocks:
            first, last = rank_range(*block)
            mine[first:last] = True
        return mine[windows]

    def _generator(self, *keys: int) -> torch.Generator:
        seed = self.seed
        for key in keys:
            seed = (seed * 1_000_003 + key) % (1 << 62)
        return torch.Generator().manual_seed(seed)

    def _split(self, block: int, data: Block, skip: int) -> Iterator[Block]:
        if self.batch_tokens is None:
            yield data
            return
        order = torch.randperm(data.tokens, generator=self._generator(self.epoch, block, distributed.rank()))
        for index in order.tensor_split(self._batches(block))[skip:]:
            yield data.select(index)

    def __iter__(self) -> Iterator[Block]:
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        order = list(range(len(self.blocks))) if self.in_order else torch.randperm(len(self.blocks), generator=self._generator(self.epoch)).tolist()
        skip = self.position
        while order and skip >= self._batches(order[0]):
            skip -= self._batches(order.pop(0))
        blocks = self._stream.blocks([rank_range(*self.blocks[block]) for block in order])
        for block, data in zip(order, blocks, strict=True):
            for batch in self._split(block, data, skip):
                self.position += 1
                yield batch
            skip = 0


class PatternDataModule(LightningDataModule):
    """A source of patterns with one loader over it; `source` is there for the modules' random access."""

    def __init__(self, source: PatternSource, loader: BlockLoader):
        super().__init__()
        self.source, self.loader = source, loader

    def train_dataloader(self) -> BlockLoader:
        return self.loader

    # The loader's place is kept here and not in the loader's own state_dict: Lightning 2.6 forgets that one in a checkpoint of an
    # epoch's end, and whenever the loader was set up before the checkpoint was read.
    def state_dict(self) -> dict[str, int]:
        return self.loader.progress()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.loader.resume(state_dict)
