"""What a pattern is: the importance of each neuron for a token, which neurons are active, and blocks of packed rows in memory.

Shape letters: L layers, T tokens, D neurons at a site, E hidden size, W bytes of a packed row, n rows of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from apc import ops
from apc.data.ffn import GatedFFN, first_device


@dataclass(frozen=True)
class ActiveRule:
    """Which neurons count as active: importance > 0 and at least the layer's threshold, or among the token's own top share.

    kind: `threshold` or `top`; sparsity: target share of inactive neurons; thresholds: float32 [L] per site (threshold only).
    """

    kind: str
    sparsity: float
    thresholds: dict[str, Tensor] = field(default_factory=dict)

    def active(self, layer: int, site: str, importance: Tensor) -> Tensor:
        """bool, shaped like importance [..., D]."""
        if self.kind == "top":
            mask = ops.top_mask(importance, ops.mask_size(importance.shape[-1], 1 - self.sparsity))
        else:
            mask = importance >= self.thresholds[site][layer].to(importance.device)
        return mask & (importance > 0)


class Importance:
    """Importance of each neuron: |x| at gate, up and down; at `neuron`, |act(g)·u| times the norm of its column of W_down."""

    def __init__(self, ffns: list[GatedFFN]):
        self._norms = [ffn.output_norms().to(first_device(ffns)) for ffn in ffns]

    def __call__(self, layer: int, site: str, values: Tensor) -> Tensor:
        """values [..., D] in the model's type → float32 [..., D], not negative."""
        magnitude = values.float().abs()
        return magnitude.mul_(self._norms[layer]) if site == "neuron" else magnitude


def quantise(importance: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [..., D] → (uint8 [..., D], float32 scale [...]): 255 is the row's own largest value, so no row rounds to nothing."""
    scale = importance.amax(dim=-1) / 255
    return (importance / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round_().to(torch.uint8), scale


@dataclass
class Block:
    """Rows of some tokens, for all layers. A field that was not asked for is empty.

    positions: int64 [n], each token's index in the whole text; seq_len: tokens in a window;
    patterns: uint8 [L, n, W] per site; importance: uint8 [L, n, D] per site; scale: float32 [L, n] per site;
    hidden: bfloat16 [L, n, E], each FFN's input;
    derived: what a training works out of these rows, and finds again in its next pass if they stay where it works.
    """

    positions: Tensor
    seq_len: int
    patterns: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    scale: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    derived: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return len(self.positions)

    @property
    def first_window(self) -> int:
        return int(self.positions[0]) // self.seq_len

    def tensors(self) -> dict[str, Tensor]:
        """All fields by a flat name, e.g. `patterns.neuron`; every one is [L, n, ...]."""
        named = {
            f"{part}.{site}": value
            for part in ("patterns", "importance", "scale")
            for site, value in getattr(self, part).items()
        }
        return named if self.hidden is None else {**named, "hidden": self.hidden}

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor], positions: Tensor, seq_len: int) -> "Block":
        block = cls(positions, seq_len)
        for name, value in named.items():
            part, _, site = name.partition(".")
            if site:
                getattr(block, part)[site] = value
            else:
                block.hidden = value
        return block

    @classmethod
    def of_windows(cls, named: dict[str, Tensor], windows: Sequence[int], seq_len: int) -> "Block":
        """The block of these windows of the text."""
        positions = torch.tensor(windows, dtype=torch.int64).unsqueeze(1) * seq_len + torch.arange(seq_len)
        return cls.from_tensors(named, positions.flatten(), seq_len)

    def _map(self, change, positions: Tensor) -> "Block":
        return Block.from_tensors(
            {name: change(value) for name, value in self.tensors().items()}, positions, self.seq_len
        )

    def to(self, device, non_blocking: bool = False) -> "Block":
        block = self._map(
            lambda value: value.to(device, non_blocking=non_blocking),
            self.positions.to(device, non_blocking=non_blocking),
        )
        block.derived = (
            self.derived
        )  # itself: Lightning gives a training such a copy, and what that adds is for the next pass
        return block

    def select(self, index: Tensor) -> "Block":
        """The tokens at `index`, int64 [m] within the block."""
        return self._map(
            lambda value: value.index_select(1, index.to(value.device)), self.positions[index.to(self.positions.device)]
        )


@dataclass(frozen=True)
class PatternInfo:
    """What every holder of patterns knows about them.

    activity: int64 [L, D] per site, how often each neuron was active; identity: what decided the content.
    """

    layers: int
    hidden_size: int
    ffn_width: int
    windows: int
    seq_len: int
    widths: dict[str, int]
    rule: ActiveRule
    with_importance: bool
    with_hidden: bool
    identity: dict
    activity: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.windows * self.seq_len

    @property
    def sites(self) -> list[str]:
        return list(self.widths)

    def bytes_per_token(self) -> int:
        """Bytes that one token's rows take, all layers and fields."""
        site_bytes = sum(ops.row_bytes(D) + (D + 4 if self.with_importance else 0) for D in self.widths.values())
        return self.layers * (site_bytes + (2 * self.hidden_size if self.with_hidden else 0))

    def field(self, name: str, tokens: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape [L, tokens, ...] and type that the field `name` has in a block of so many tokens."""
        part, _, site = name.partition(".")
        width, dtype = {
            "patterns": lambda: ((ops.row_bytes(self.widths[site]),), torch.uint8),
            "importance": lambda: ((self.widths[site],), torch.uint8),
            "scale": lambda: ((), torch.float32),
            "hidden": lambda: ((self.hidden_size,), torch.bfloat16),
        }[part]()
        return (self.layers, tokens, *width), dtype

    def fields(self) -> list[str]:
        """The names that `Block.tensors` has for these patterns."""
        parts = ["patterns", "importance", "scale"] if self.with_importance else ["patterns"]
        return [f"{part}.{site}" for part in parts for site in self.widths] + (["hidden"] if self.with_hidden else [])


class PatternSource(Protocol):
    """Holds the patterns of a text: on disk (`store.PatternStore`) or in memory (`ResidentPatterns`)."""

    info: PatternInfo
    resident: torch.device | None  # whose memory holds all rows; None: a block's come from disk, or are computed

    def host_fields(self, fields: list[str]) -> list[str]:
        """Those of the fields that `block` gives in host memory; the others lie on the GPU already."""

    def block(self, first: int, last: int, fields: list[str]) -> Block:
        """Windows first … last-1, with the named fields. May be called on a thread of its own."""

    def rows(self, name: str, layers: Tensor, tokens: Tensor) -> Tensor:
        """The rows [n, ...] of field `name` at pairs (layer, global token), int64 [n] each."""


_COUNTED = 1 << 18  # rows that are counted at a time: what that takes beside them is more than narrow rows themselves


def activity(block: Block, widths: dict[str, int]) -> dict[str, Tensor]:
    """int64 [L, D] per site: how often each neuron is active in the block."""
    counts = {}
    for site, D in widths.items():
        parts = block.patterns[site].split(_COUNTED, dim=1)
        counts[site] = sum(
            ops.accumulate(part, part.new_zeros(part.shape[:2], dtype=torch.int64), 1, D)[0][:, 0] for part in parts
        )
    return counts
