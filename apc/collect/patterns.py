"""Activation patterns: importance of each neuron for a token, the rule for active neurons, and blocks of packed rows.

Shape letters: L layers, T tokens, D neurons at a site, E hidden size, W bytes of a packed row, n rows of a block.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from apc import ops
from apc.data.ffn import FFN, first_device


@dataclass(frozen=True)
class ActiveRule:
    """Decides which neurons are active.

    A neuron is active if its importance is above 0 and either at least the layer's threshold or among the token's
    largest.

    kind: `threshold` or `top`; sparsity: target share of inactive neurons;
    thresholds: float32 [L] per site, for kind `threshold` only.
    """

    kind: str
    sparsity: float
    thresholds: dict[str, Tensor] = field(default_factory=dict)

    def active(self, layer: int, site: str, importance: Tensor) -> Tensor:
        """Mask of the active neurons, bool, shaped like importance [..., D]."""
        if self.kind == "top":
            mask = ops.top_mask(importance, ops.mask_size(importance.shape[-1], 1 - self.sparsity))
        else:
            mask = importance >= self.thresholds[site][layer].to(importance.device)
        return mask & (importance > 0)


class Importance:
    """Importance: |x| at gate, up and down; |act(g)·u| times the norm of the neuron's column of W_down at `neuron`."""

    def __init__(self, ffns: list[FFN]):
        self._norms = [ffn.output_norms().to(first_device(ffns)) for ffn in ffns]

    def __call__(self, layer: int, site: str, values: Tensor) -> Tensor:
        """Importance of values [..., D] in the model's type: float32 [..., D], not negative."""
        magnitude = values.float().abs()
        return magnitude.mul_(self._norms[layer]) if site == "neuron" else magnitude


def quantise(importance: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises importances float32 [..., D] to uint8 [..., D], with a scale float32 [...] for each row.

    A row's largest importance becomes 255, so that no row becomes all zeros.
    """
    scale = importance.amax(dim=-1) / 255
    return (importance / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round_().to(torch.uint8), scale


@dataclass
class Block:
    """Rows of some tokens, for all layers. A field that was not requested is empty.

    positions: int64 [n], each token's index in the whole text; seq_len: tokens in a window;
    patterns: uint8 [L, n, W] per site; importance: uint8 [L, n, D] per site; scale: float32 [L, n] per site;
    hidden: bfloat16 [L, n, E], each FFN's input;
    experts: only in a mixture of experts, int16 [L·k, n]: the k experts that each token is routed to in each of the L
    layers. The other fields then have the shape [L·k, n, ...], except hidden, which a layer's experts share.
    derived: values that a training computes from these rows and reuses in its next pass if the rows stay on its device.
    """

    positions: Tensor
    seq_len: int
    patterns: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    scale: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    experts: Tensor | None = None
    derived: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of tokens, n."""
        return len(self.positions)

    @property
    def first_window(self) -> int:
        """Index of the first token's window in the text."""
        return int(self.positions[0]) // self.seq_len

    def tensors(self) -> dict[str, Tensor]:
        """All fields by a flat name, e.g. `patterns.neuron`; each is [L, n, ...]."""
        parts = ("patterns", "importance", "scale")
        named = {f"{part}.{site}": value for part in parts for site, value in getattr(self, part).items()}
        whole = {"hidden": self.hidden, "experts": self.experts}
        return named | {name: value for name, value in whole.items() if value is not None}

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor], positions: Tensor, seq_len: int) -> "Block":
        """The block with fields as `tensors` returns them."""
        block = cls(positions, seq_len, hidden=named.get("hidden"), experts=named.get("experts"))
        for part, _, site in (name.partition(".") for name in named):
            if site:
                getattr(block, part)[site] = named[f"{part}.{site}"]
        return block

    @classmethod
    def of_windows(cls, named: dict[str, Tensor], windows: Sequence[int], seq_len: int) -> "Block":
        """The block of these windows of the text, with fields as `tensors` returns them."""
        positions = torch.tensor(windows, dtype=torch.int64).unsqueeze(1) * seq_len + torch.arange(seq_len)
        return cls.from_tensors(named, positions.flatten(), seq_len)

    def _map(self, change: Callable[[Tensor], Tensor], positions: Tensor) -> "Block":
        named = {name: change(value) for name, value in self.tensors().items()}
        return Block.from_tensors(named, positions, self.seq_len)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Block":
        """The block on a device.

        The copy shares `derived` with this block, so that values stored in it survive Lightning's copy of each
        batch.
        """

        def move(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=non_blocking)

        block = self._map(move, move(self.positions))
        block.derived = self.derived
        return block

    def select(self, index: Tensor) -> "Block":
        """The tokens at `index`, int64 [m] within the block."""
        positions = self.positions[index.to(self.positions.device)]
        return self._map(lambda value: value.index_select(1, index.to(value.device)), positions)


@dataclass(frozen=True)
class PatternInfo:
    """Shapes and origin of collected patterns, the same for every `PatternSource`.

    activity: int64 [L, D] per site, how often each neuron is active; identity: the settings that decide the content, as
    `pattern_identity` lists them; projections: weight matrices in an FFN, 2 without a gate;
    experts, slots: in a mixture of experts, the routed experts per layer, and how many of them each token is routed to;
    else 0. In a mixture, L counts all routed experts, layer by layer.
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
    projections: int = 3
    experts: int = 0
    slots: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return self.windows * self.seq_len

    @property
    def sites(self) -> list[str]:
        """The sites where patterns were read."""
        return list(self.widths)

    def bytes_per_token(self, fields: list[str] | None = None) -> int:
        """Bytes of one token's rows, over all layers and these fields; None: all fields."""
        shapes = [self.field(name, 1) for name in (self.fields() if fields is None else fields)]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)

    def field(self, name: str, tokens: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape [L, tokens, ...] and type of the field `name` in a block of `tokens` tokens, as `Block` stores it."""
        part, _, site = name.partition(".")
        D = self.widths.get(site, 0)
        row, dtype = {
            "patterns": ([ops.row_bytes(D)], torch.uint8),
            "importance": ([D], torch.uint8),
            "scale": ([], torch.float32),
            "hidden": ([self.hidden_size], torch.bfloat16),
            "experts": ([], torch.int16),
        }[part]
        rows = self.layers
        if self.experts:
            rows = self.layers // self.experts * (1 if name == "hidden" else self.slots)
        return (rows, tokens, *row), dtype

    def fields(self) -> list[str]:
        """Names of all fields, as in `Block.tensors`."""
        parts = ["patterns", "importance", "scale"] if self.with_importance else ["patterns"]
        rows = [f"{part}.{site}" for part in parts for site in self.widths]
        return rows + ["hidden"] * self.with_hidden + self.routes()

    def routes(self) -> list[str]:
        """Names of the fields that `by_ffn` needs in addition: `experts` in a mixture of experts, else none."""
        return ["experts"] if self.experts else []


class PatternSource(Protocol):
    """The patterns of a text: on disk (`PatternStore`), in memory (`ResidentPatterns`), or partly streamed."""

    info: PatternInfo

    @property
    def resident(self) -> torch.device | None:
        """The device whose memory holds all rows; None if blocks are read from disk or computed."""
        return None

    def host_fields(self, fields: list[str]) -> list[str]:
        """The fields that `block` returns in host memory; the others are on the GPU already."""
        return fields

    def block(self, first: int, last: int, fields: list[str]) -> Block:
        """Windows [first, last) with the named fields. May run on another thread."""

    def rows(self, name: str, layers: Tensor, tokens: Tensor) -> Tensor:
        """Rows [n, ...] of the field `name` at pairs (layer, position in the text), int64 [n] each."""


def by_ffn(block: Block, info: PatternInfo) -> Block:
    """The block regrouped by FFN: fields [L, n, ...] from fields as they are stored.

    Without experts it is the block itself. In a mixture of experts, an expert's rows are those of the tokens routed to
    it. Rows of zeros pad them to the n of the busiest expert. positions are then int64 [L, n], −1 for padding.
    """
    if block.experts is None:
        return block
    N, k, n, stored = info.experts, info.slots, block.tokens, len(block.experts)
    experts = block.experts.long().view(-1, k * n)  # [layers, k·n]
    ffn = (experts + N * torch.arange(len(experts), device=experts.device).unsqueeze(1)).flatten()
    counts, order = torch.bincount(ffn, minlength=info.layers), ffn.argsort(stable=True)
    column = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[ffn[order]]
    index = torch.full((info.layers, max(1, int(counts.max()))), -1, device=order.device)
    index[ffn[order], column] = order
    empty, source = index < 0, index.clamp_min(0)

    def rows(value: Tensor) -> Tensor:
        taken = value.flatten(0, 1)[source if len(value) == stored else source // (k * n) * n + source % n]
        return taken.masked_fill_(empty.view(*empty.shape, *[1] * (taken.dim() - 2)), 0)

    named = {name: rows(value) for name, value in block.tensors().items() if name != "experts"}
    positions = block.positions.to(source.device)[source % n].masked_fill_(empty, -1)
    grouped = Block.from_tensors(named, positions, block.seq_len)
    grouped.derived = block.derived
    return grouped


def read_rows(source: PatternSource, name: str, ffns: Tensor, tokens: Tensor) -> Tensor:
    """Rows [n, ...] of the field `name` at pairs (FFN, position in the text), int64 [n] each.

    A row is zero if the token is not routed to that expert.
    """
    info = source.info
    if not info.experts:
        return source.rows(name, ffns, tokens)
    k = info.slots
    slots = (ffns // info.experts * k).unsqueeze(1) + torch.arange(k)
    experts = source.rows("experts", slots.flatten(), tokens.repeat_interleave(k)).view(-1, k).cpu()
    found = experts == (ffns % info.experts).unsqueeze(1)
    rows = source.rows(name, slots.gather(1, found.int().argmax(1, keepdim=True)).squeeze(1), tokens)
    absent = ~found.any(1).to(rows.device)
    return rows.masked_fill(absent.view(-1, *[1] * (rows.dim() - 1)), 0)


_ROWS_AT_ONCE = 1 << 18  # rows counted at a time: counting narrow rows needs more memory than the rows themselves


def activity(block: Block, info: PatternInfo) -> dict[str, Tensor]:
    """How often each neuron is active in the block, int64 [L, D] per site."""
    block, counts = by_ffn(block, info), {}
    for site, D in info.widths.items():
        rows = block.patterns[site]
        counts[site] = torch.zeros(len(rows), D, dtype=torch.int64, device=rows.device)
        for part in rows.split(_ROWS_AT_ONCE, dim=1):
            ids = part.new_zeros(part.shape[:2], dtype=torch.int64)
            counts[site] += ops.accumulate(part, ids, 1, D)[0][:, 0]
    return counts
