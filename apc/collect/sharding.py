"""Which windows each rank works on."""

from apc.utils import distributed
from apc.utils.errors import UserError


def block_ranges(windows: int, block_windows: int, ranks: int | None = None) -> list[tuple[int, int]]:
    """Window ranges [first, last) of the blocks that all ranks share; each block has at least one window per rank.

    ranks: number of ranks; None: that of this run. Raises UserError if there are fewer windows than ranks.
    """
    ranks = distributed.world_size() if ranks is None else ranks
    if windows < ranks:
        raise UserError(
            f"{windows} windows of text are too few for {ranks} processes; "
            "give more text, lower data.seq_len, or lower trainer.devices"
        )
    each = max(block_windows, ranks)
    starts = list(range(0, windows, each))
    if len(starts) > 1 and windows - starts[-1] < ranks:
        starts.pop()  # too few windows for a block of their own: the previous block takes them
    return list(zip(starts, [*starts[1:], windows], strict=True))


def rank_range(first: int, last: int) -> tuple[int, int]:
    """This rank's windows [first, last) of a block."""
    begin, end = distributed.share(last - first)
    return first + begin, first + end
