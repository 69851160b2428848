"""Patterns held in memory, and how much of a device's memory blocks of them may take."""

import math
import weakref

import torch
import torch.utils.deterministic
from torch import Tensor

from apc.collect.patterns import Block, PatternInfo
from apc.collect.prefetch import BLOCKS_IN_FLIGHT
from apc.config.schema import CollectConfig
from apc.utils.errors import UserError


def page_locked(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Host memory that a GPU can copy from by itself, zeroed, until `unlock_pages`. No more than asked for: torch's allocator of such memory
    takes the next power of two. Raises UserError where the system does not let as much memory be locked.
    """
    value = torch.zeros(shape, dtype=dtype)  # by all threads, where locking would touch page after page on one
    if value.nbytes:
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(value.data_ptr(), value.nbytes, 0))
        except torch.cuda.CudaError as error:
            raise UserError(
                f"the system does not let {value.nbytes / 2**30:.1f} GiB of host memory be locked for the GPU ({error}); use collect.storage=disk"
            ) from error
    return value


def unlock_pages(pointers: list[int]) -> None:
    for pointer in pointers:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(pointer))


class ResidentPatterns:
    """Patterns kept as whole tensors [L, n, ...] in host or device memory, for the windows that this rank owns."""

    def __init__(self, info: PatternInfo, owned: list[int], device: torch.device, locked: bool = False):
        """owned: ascending window indices that will be added, in this order. locked: host memory that a GPU can copy from by itself."""
        self.info, self.resident = info, device
        self._slots = {window: slot for slot, window in enumerate(owned)}
        self._tensors: dict[str, Tensor] = {}
        self._locked: list[int] | None = None
        if locked:
            self._locked = []
            weakref.finalize(self, unlock_pages, self._locked).atexit = False

    def add(self, block: Block) -> None:
        """Copies a block of whole windows in, of which each is the next one owned."""
        slot = self._slots[block.first_window] * self.info.seq_len
        values = block.tensors()
        self.reserve(list(values))
        for name, value in values.items():
            for to, layer in zip(self._tensors[name][:, slot : slot + block.tokens], value, strict=True):
                to.copy_(layer)  # in one piece: torch gathers what is not before it leaves the GPU

    def reserve(self, fields: list[str]) -> None:
        """Takes the memory of these fields, for all windows; `add` would when the first comes."""
        for name in set(fields) - set(self._tensors):
            shape, dtype = self.info.field(name, len(self._slots) * self.info.seq_len)
            if self._locked is None:
                self._tensors[name] = torch.empty(shape, dtype=dtype, device=self.resident)
            else:
                self._tensors[name] = page_locked(shape, dtype)
                self._locked += [self._tensors[name].data_ptr()] if self._tensors[name].nbytes else []

    def host_fields(self, fields: list[str]) -> list[str]:
        return fields if self.resident.type == "cpu" else []

    def block(self, first: int, last: int, fields: list[str]) -> Block:
        S = self.info.seq_len
        slot = self._slots[first] * S if last > first else 0
        named = {name: self._tensors[name][:, slot : slot + (last - first) * S] for name in fields}
        return Block.of_windows(named, range(first, last), S)

    def rows(self, name: str, layers: Tensor, tokens: Tensor) -> Tensor:
        S = self.info.seq_len
        slots = torch.tensor([self._slots[window] * S for window in (tokens // S).tolist()], dtype=torch.int64)
        local = (slots + tokens.cpu() % S).to(self.resident)
        return self._tensors[name][layers.to(self.resident), local]


def block_bytes(info: PatternInfo, fields: list[str], windows: int) -> int:
    """What so many windows take on a device, with these fields."""
    shapes = [info.field(name, windows * info.seq_len) for name in fields]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def keep_bytes(info: PatternInfo, fields: list[str], block_windows: int, device: torch.device, needed: int) -> int:
    """Device memory in which blocks, of so many windows for this rank, can stay, where a training needs so many bytes for other things: nine tenths of
    all, less what is used."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return room_for_blocks(info, fields, block_windows, free + unused, total, needed)


def room_for_blocks(
    info: PatternInfo, fields: list[str], block_windows: int, free: int, total: int, needed: int
) -> int:
    """What is left for blocks that stay, of `free` bytes of a device's `total`: three blocks are on their way, and a tenth stays free."""
    return max(0, free - BLOCKS_IN_FLIGHT * block_bytes(info, fields, block_windows) - needed - total // 10)


def windows_in_block(cfg: CollectConfig, info: PatternInfo) -> int:
    """Windows that one step of clustering or predictor training takes, over all ranks."""
    return max(1, cfg.batch_tokens // info.seq_len)
