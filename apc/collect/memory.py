"""Patterns in memory, and how much device memory blocks of them may take."""

import weakref

import torch
import torch.utils.deterministic
from torch import Tensor

from apc.collect.patterns import Block, PatternInfo
from apc.collect.prefetch import BLOCKS_IN_FLIGHT
from apc.config.schema import CollectConfig
from apc.utils.errors import UserError


def page_locked(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeroed host memory that a GPU can copy from directly, until `unlock_pages`.

    Takes exactly the bytes of the shape; torch's own pinned allocator rounds up to a power of two. Raises UserError if
    the system does not allow this much memory to be locked.
    """
    value = torch.zeros(shape, dtype=dtype)  # all threads touch the pages here; locking would use only one thread
    if value.nbytes:
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(value.data_ptr(), value.nbytes, 0))
        except torch.cuda.CudaError as error:
            raise UserError(
                f"the system does not let {value.nbytes / 2**30:.1f} GiB of host memory be locked for the GPU "
                f"({error}); use collect.storage=disk"
            ) from error
    return value


def unlock_pages(pointers: list[int]) -> None:
    """Unlocks memory from `page_locked`, by the addresses of its tensors."""
    for pointer in pointers:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(pointer))


class ResidentPatterns:
    """Patterns as whole tensors [L, n, ...] in host or device memory, for the windows that this rank owns.

    owned: ascending indices of the windows that will be added, in this order; locked: whether to use host memory that a
    GPU can copy from directly. Nothing is reserved before the first `add`.
    """

    def __init__(self, info: PatternInfo, owned: list[int], device: torch.device, locked: bool = False):
        self.info, self.resident = info, device
        self._slots = {window: slot for slot, window in enumerate(owned)}
        self._tensors: dict[str, Tensor] = {}
        self._locked, self._addresses = locked, list[int]()  # of locked tensors
        weakref.finalize(self, unlock_pages, self._addresses).atexit = False

    def add(self, block: Block) -> None:
        """Copies in a block of whole windows, the next ones that this rank owns."""
        slot = self._slots[block.first_window] * self.info.seq_len
        values = block.tensors()
        self.reserve(list(values))
        for name, value in values.items():
            # Layer by layer: torch would first gather a copy that is not contiguous on the GPU.
            for target, layer in zip(self._tensors[name][:, slot : slot + block.tokens], value, strict=True):
                target.copy_(layer)

    def reserve(self, fields: list[str]) -> None:
        """Allocates these fields for all windows; `add` does it with the first block."""
        for name in set(fields) - set(self._tensors):
            shape, dtype = self.info.field(name, len(self._slots) * self.info.seq_len)
            if not self._locked:
                self._tensors[name] = torch.empty(shape, dtype=dtype, device=self.resident)
            else:
                value = self._tensors[name] = page_locked(shape, dtype)
                self._addresses += [value.data_ptr()] if value.nbytes else []

    def host_fields(self, fields: list[str]) -> list[str]:
        """See `PatternSource`."""
        return fields if self.resident.type == "cpu" else []

    def block(self, first: int, last: int, fields: list[str]) -> Block:
        """See `PatternSource`. The fields are views of the memory here."""
        S = self.info.seq_len
        slot = self._slots[first] * S if last > first else 0
        named = {name: self._tensors[name][:, slot : slot + (last - first) * S] for name in fields}
        return Block.of_windows(named, range(first, last), S)

    def rows(self, name: str, layers: Tensor, tokens: Tensor) -> Tensor:
        """See `PatternSource`."""
        S = self.info.seq_len
        slots = torch.tensor([self._slots[window] * S for window in (tokens // S).tolist()], dtype=torch.int64)
        return self._tensors[name][layers.to(self.resident), (slots + tokens.cpu() % S).to(self.resident)]


def block_bytes(info: PatternInfo, fields: list[str], windows: int) -> int:
    """Bytes on a device of a block of `windows` windows with these fields."""
    return windows * info.seq_len * info.bytes_per_token(fields)


def keep_bytes(info: PatternInfo, fields: list[str], block_windows: int, device: torch.device, needed: int) -> int:
    """Bytes of device memory for blocks kept between passes: nine tenths of the total, less what is in use.

    block_windows: windows of this rank in a block; needed: bytes that the training needs for other things.
    """
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return room_for_blocks(info, fields, block_windows, free + unused, total, needed)


def room_for_blocks(
    info: PatternInfo, fields: list[str], block_windows: int, free: int, total: int, needed: int
) -> int:
    """Bytes left for blocks kept between passes, if `free` of the device's `total` bytes are free.

    Subtracts the blocks in flight, the bytes `needed` for other things, and a tenth of the total as a reserve.
    """
    return max(0, free - BLOCKS_IN_FLIGHT * block_bytes(info, fields, block_windows) - needed - total // 10)


def windows_in_block(cfg: CollectConfig, info: PatternInfo) -> int:
    """Windows in one step of clustering or predictor training, over all ranks."""
    return max(1, cfg.batch_tokens // info.seq_len)
