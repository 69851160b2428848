"""Feeds patterns to training in large blocks of consecutive windows, in an order given by a seed.

Each rank gets its own share of every block.
"""

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


def _generator(seed: int, *keys: int) -> torch.Generator:
    for key in keys:
        seed = (seed * 1_000_003 + key) % (1 << 62)
    return torch.Generator().manual_seed(seed)


class BlockLoader:
    """Yields every block once per epoch, whole or in mini-batches of shuffled tokens.

    Iterating yields this rank's share of each block as a `Block`; all ranks get the same number of them. After
    `resume`, iteration continues after `progress`, so a resumed run sees each row exactly once per epoch.

    source, fields, device, keep_bytes: as for `BlockStream`; block_windows: windows in a block, over all ranks;
    seed: decides the order of blocks and tokens; batch_tokens: tokens in a mini-batch, over all ranks, or None for
    whole blocks; in_order: whether blocks come in the order of the text instead of shuffled.
    Raises UserError if there are fewer windows, or fewer tokens in a mini-batch, than ranks.
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
        ranks = distributed.world_size()
        if batch_tokens is not None and batch_tokens < ranks:
            raise UserError(
                f"predictor.batch_tokens={batch_tokens} is less than one token for each of {ranks} processes; "
                "raise it, or lower trainer.devices"
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

    def progress(self) -> dict:
        """The loader's position for a checkpoint: epoch, number of batches already yielded in it, and `_layout`.

        At the end of an epoch it is the start of the next one, and valid for any number of ranks.
        """
        ended = self.position >= len(self)
        return {"epoch": self.epoch + ended, "position": 0 if ended else self.position, "blocks": self._layout}

    def resume(self, progress: dict) -> None:
        """Moves to the position `progress`.

        Raises UserError for a position within an epoch over different blocks, because then it is unknown which
        rows were seen.
        """
        if progress["position"] and progress.get("blocks") != self._layout:
            raise UserError(
                "the checkpoint was saved in the middle of a pass, and its blocks of text differ "
                f"from those of {distributed.world_size()} processes; start as many processes as before, "
                "or delete the run's checkpoints"
            )
        self.epoch, self.position = progress["epoch"], progress["position"]

    @property
    def _layout(self) -> list[int]:
        """The number of blocks, and the windows of the first block: these two numbers identify how a text is cut."""
        return [len(self.blocks), self.blocks[0][1]]

    def release(self) -> None:
        """Frees the device memory of kept blocks; later passes copy them again."""
        self._stream.release()

    def whole_blocks(self, fields: list[str]) -> Iterator[Block]:
        """This rank's share of every block, in order and with other fields. Does not move the loader's position."""
        stream = BlockStream(self.source, fields, self._stream.device)
        return stream.blocks([rank_range(*block) for block in self.blocks])

    def owned(self, tokens: Tensor) -> Tensor:
        """Which tokens (int64 [n], on the host) belong to this rank, bool [n]."""
        mine = torch.zeros(self.source.info.windows, dtype=torch.bool)
        for block in self.blocks:
            first, last = rank_range(*block)
            mine[first:last] = True
        return mine[tokens // self.source.info.seq_len]

    def _split(self, block: int, data: Block, skip: int) -> Iterator[Block]:
        if self.batch_tokens is None:
            yield data
            return
        order = torch.randperm(data.tokens, generator=_generator(self.seed, self.epoch, block, distributed.rank()))
        for index in order.tensor_split(self._batches(block))[skip:]:
            yield data.select(index)

    def __iter__(self) -> Iterator[Block]:
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        shuffled = torch.randperm(len(self.blocks), generator=_generator(self.seed, self.epoch)).tolist()
        order = list(range(len(self.blocks))) if self.in_order else shuffled
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
    """Yields windows of a text, int64 [n, S], in mini-batches shared out over the ranks.

    Each epoch cuts the text into windows at a different offset and shuffles them. `progress` and `resume` work as
    in `BlockLoader`.

    windows: int64 [N, S], adjacent in the text; step_windows: windows in a step, over all ranks; seed: decides each
    epoch's offset and order; bos: whether windows begin with a BOS token; the yielded windows then do too. Raises
    UserError if a step has fewer windows than there are ranks.
    """

    def __init__(self, windows: Tensor, step_windows: int, seed: int, bos: bool = False):
        ranks = distributed.world_size()
        # An epoch starts at a random place in the first window, so it has one window less.
        self._usable = max(1, len(windows) - 1)
        self.step_windows = min(step_windows, self._usable)
        if self.step_windows < ranks:
            raise UserError(
                f"a step of {self.step_windows} windows is too small for {ranks} processes; give more text "
                f"({len(windows)} windows, an epoch uses one less), raise tune.batch_windows, or lower trainer.devices"
            )
        self.windows, self.seed, self.bos = windows, seed, int(bos)
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return self._usable // self.step_windows

    def progress(self) -> dict:
        """The loader's position."""
        return {"epoch": self.epoch, "position": self.position}

    def resume(self, progress: dict) -> None:
        """Moves to the position `progress`."""
        self.epoch, self.position = progress["epoch"], progress["position"]

    def release(self) -> None:
        """Does nothing: the loader has no device memory."""

    def __iter__(self) -> Iterator[Tensor]:
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        generator = _generator(self.seed, self.epoch)
        beginnings, text = self.windows[: self._usable, : self.bos], self.windows[:, self.bos :]
        S = text.shape[1]
        shift = int(torch.randint(S, (1,), generator=generator)) if len(self.windows) > 1 else 0
        text = text.flatten()[shift : shift + self._usable * S].view(self._usable, S)
        text = torch.cat([beginnings, text], dim=1)
        order = torch.randperm(self._usable, generator=generator)
        first, last = distributed.share(self.step_windows)
        for step in range(self.position, len(self)):
            self.position += 1
            yield text[order[step * self.step_windows : (step + 1) * self.step_windows][first:last]]


class ResumedDataModule(LightningDataModule):
    """A data module with one loader, whose position is part of the checkpoint."""

    def __init__(self, loader: BlockLoader | WindowLoader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> BlockLoader | WindowLoader:
        """The loader."""
        return self.loader

    # The position is stored here and not in the loader's own state_dict: Lightning 2.6 drops that one from checkpoints
    # at the end of an epoch, and ignores it if the loader was set up before the checkpoint was read.
    def state_dict(self) -> dict:
        """The loader's position."""
        return self.loader.progress()

    def load_state_dict(self, state_dict: dict) -> None:
        """Moves the loader to a checkpoint's position."""
        self.loader.resume(state_dict)


class PatternDataModule(ResumedDataModule):
    """A data module over patterns; modules read single rows from its `source`."""

    def __init__(self, source: PatternSource, loader: BlockLoader):
        super().__init__(loader)
        self.source = source
