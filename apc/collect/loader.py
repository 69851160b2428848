"""Hands patterns to training in large blocks of consecutive windows, each rank its own share, in an order that a seed decides."""

import math
from collections.abc import Iterator

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from apc.collect.patterns import Block, PatternSource
from apc.collect.prefetch import BlockStream
from apc.collect.sharding import block_ranges, rank_range
from apc.utils import distributed
from apc.utils.errors import UserError


class BlockLoader:
    """Every block once an epoch, shuffled unless `in_order`; or, with `batch_tokens`, mini-batches of shuffled tokens of one block after another.

    Iterating yields this rank's share of each block as a `Block`; all ranks yield equally often. `progress` says what has
    been handed out, and after `resume` the next iteration goes on behind it, so that a resumed run sees each row exactly
    once.

    Args:
        fields, device, keep_bytes: as for `BlockStream`.
        block_windows: windows in a block, over all ranks.
        batch_tokens: tokens in a mini-batch, over all ranks; None: whole blocks.

    Raises UserError for fewer windows, or fewer tokens in a mini-batch, than there are ranks.
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
        if batch_tokens is not None and batch_tokens < distributed.world_size():
            raise UserError(
                f"predictor.batch_tokens={batch_tokens} tokens for {distributed.world_size()} processes; raise it, or lower trainer.devices"
            )
        self._stream = BlockStream(source, fields, device, keep_bytes)
        self.blocks = block_ranges(source.info.windows, block_windows)
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return sum(self._batches(block) for block in range(len(self.blocks)))

    def _batches(self, block: int) -> int:
        if self.batch_tokens is None:
            return 1
        first, last = self.blocks[block]
        return math.ceil((last - first) * self.source.info.seq_len / self.batch_tokens)

    def progress(self) -> dict[str, int | list[int]]:
        ended = self.position >= len(
            self
        )  # in how many batches does not matter then: other numbers of ranks may have more or fewer
        return {"epoch": self.epoch + ended, "position": 0 if ended else self.position, "blocks": self._layout}

    def resume(self, progress: dict[str, int | list[int]]) -> None:
        """Raises UserError for a place within a pass over other blocks than these, which no longer says what was seen."""
        if progress["position"] and progress.get("blocks") != self._layout:
            raise UserError(
                f"the checkpoint lies within a pass over other blocks of rows than {distributed.world_size()} processes have; start as many as it began with, "
                "or delete the run's checkpoints"
            )
        self.epoch, self.position = progress["epoch"], progress["position"]

    @property
    def _layout(self) -> list[int]:
        """How many blocks there are, and the windows of the first: who has the same has the same blocks."""
        return [len(self.blocks), self.blocks[0][1]]

    def release(self) -> None:
        """Gives the device memory of kept blocks back; later passes copy them again."""
        self._stream.release()

    def whole_blocks(self, fields: list[str]) -> Iterator[Block]:
        """This rank's share of every block, once and in order, with other fields; the loader's own position stays."""
        yield from BlockStream(self.source, fields, self._stream.device).blocks(
            [rank_range(*block) for block in self.blocks]
        )

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
        order = (
            list(range(len(self.blocks)))
            if self.in_order
            else torch.randperm(len(self.blocks), generator=self._generator(self.epoch)).tolist()
        )
        skip = self.position
        while order and skip >= self._batches(order[0]):
            skip -= self._batches(order.pop(0))
        blocks = self._stream.blocks([rank_range(*self.blocks[block]) for block in order])
        for block, data in zip(order, blocks, strict=True):
            for batch in self._split(block, data, skip):
                self.position += 1
                yield batch
            skip = 0


class WindowLoader:
    """Windows of a text, int64 [n, S], a few at a time over all ranks: each epoch from another first token on and in another order.

    As in `BlockLoader`, `progress` says what has been handed out, and after `resume` the next iteration goes on behind it.
    """

    def __init__(self, windows: Tensor, step_windows: int, seed: int):
        """windows: int64 [N, S], one after the other in the text; step_windows: in a step, over all ranks. Raises UserError if a rank would have none."""
        ranks = distributed.world_size()
        # The text of an epoch begins up to S - 1 tokens later, so it has a window less.
        self._usable = max(1, len(windows) - 1)
        self.step_windows = min(step_windows, self._usable)
        if self.step_windows < ranks:
            raise UserError(
                f"steps of {self.step_windows} windows for {ranks} processes; give more text ({len(windows)} windows, one of which makes room for other "
                "beginnings), raise tune.batch_windows, or lower trainer.devices"
            )
        self.windows, self.seed = windows, seed
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return self._usable // self.step_windows

    def progress(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def resume(self, progress: dict[str, int]) -> None:
        self.epoch, self.position = progress["epoch"], progress["position"]

    def release(self) -> None:
        """Holds nothing on the device."""

    def __iter__(self) -> Iterator[Tensor]:
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % (1 << 62))
        S = self.windows.shape[1]
        shift = int(torch.randint(S, (1,), generator=generator)) if len(self.windows) > 1 else 0
        text = self.windows.flatten()[shift : shift + self._usable * S].view(self._usable, S)
        order = torch.randperm(self._usable, generator=generator)
        first, last = distributed.share(self.step_windows)
        for step in range(self.position, len(self)):
            self.position += 1
            yield text[order[step * self.step_windows : (step + 1) * self.step_windows][first:last]]


class ResumedDataModule(LightningDataModule):
    """One loader, whose place a checkpoint holds."""

    def __init__(self, loader: BlockLoader | WindowLoader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> BlockLoader | WindowLoader:
        return self.loader

    # The loader's place is kept here and not in the loader's own state_dict: Lightning 2.6 forgets that one in a checkpoint of an
    # epoch's end, and whenever the loader was set up before the checkpoint was read.
    def state_dict(self) -> dict[str, int | list[int]]:
        return self.loader.progress()

    def load_state_dict(self, state_dict: dict[str, int | list[int]]) -> None:
        self.loader.resume(state_dict)


class PatternDataModule(ResumedDataModule):
    """A source of patterns with one loader over it; `source` is there for the modules' random access."""

    def __init__(self, source: PatternSource, loader: BlockLoader):
        super().__init__(loader)
        self.source = source
