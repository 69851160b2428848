"""Stores the weights of a model's FFNs at a few bits each, by rounding to the nearest level.

A neuron has a row of gate, a row of up and a column of down, each of E weights. Each is cut into groups along E, so
that a mask that drops the neuron saves its bits in all projections. A group has 2^b equally spaced levels, which span
its values, or less if that lowers the squared error. If the values lie on fewer equally spaced levels already, as in a
model that was stored at 4 bits, it takes these. The lowest level and the spacing take 8 bits each, as shares of the
row's largest, which take 16 bits (GGUF's K-quants are similar). The neurons with the largest down weights are
spared: their rows stay at 16 bits, because one large weight widens the spacing of its whole group.

Shape letters: D neurons, E hidden size, G groups of a row.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apc.data.ffn import FFN, Expert, find_ffns
from apc.ops.rounded_weight import is_rounded
from apc.utils.errors import UserError

FULL_BITS = 16  # of a weight that is not quantised, and of a row's largest lowest level and spacing
_GROUP_BITS = 8  # of a group's lowest level, and of its spacing
_MOST_LOW, _MOST_STEP = 127, 255  # the largest of their numbers
_SPANS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # the levels span the best of these shares of a group's range
_MOST_KEPT = 4  # bits, at most, of levels that are looked for in the values
_OFF_LEVEL = 0.125  # spacings between a value and its level, at most: values of 16 bits are rounded
_STORED = "apc_stored_ffns"  # the attribute of an FFN's module that holds a `StoredFFN` for each of its FFNs


@dataclass(frozen=True)
class Levels:
    """The levels of the weights in some rows: low + step · k, with k from 0 to 2^bits − 1.

    low: int8 [D, G], step: uint8 [D, G]: shares of the row's largest, in 127ths and 255ths, for each group of `group`
    weights; a row's last group may be shorter. row_low, row_step: float16 [D], these largest.
    """

    bits: int
    group: int
    low: Tensor
    step: Tensor
    row_low: Tensor
    row_step: Tensor

    @property
    def overhead(self) -> int:
        """Bits of a row in addition to those of its weights."""
        return 2 * _GROUP_BITS * self.low.shape[1] + 2 * FULL_BITS

    @property
    def units(self) -> Tensor:
        """What steps and lows of each row are counted in, float32 [D, 2]."""
        return torch.stack([self.row_step.float() / _MOST_STEP, self.row_low.float() / _MOST_LOW], dim=1)

    def index(self, rows: Tensor) -> Tensor:
        """The index k of each weight's nearest level, float32 [D, E]; rows: [D, E]."""
        low, step = self._levels(rows.device)
        tiny = torch.finfo(torch.float32).tiny
        index = ((_groups(rows.float(), self.group) - low) / step.clamp_min(tiny)).round()
        return index.clamp(0, 2**self.bits - 1).flatten(1)[:, : rows.shape[1]]

    def value(self, index: Tensor) -> Tensor:
        """The weights, float32 [D, E]; index: k float32 [D, E], which may lie between two levels."""
        low, step = self._levels(index.device)
        return (low + step * _groups(index, self.group)).flatten(1)[:, : index.shape[1]]

    def upper(self, index: Tensor, planes: int) -> Tensor:
        """Weights as far as their upper bit planes determine them, float32 [D, E]; index: k float32 [D, E].

        With the upper `planes` bits of k known, 2^(bits − planes) levels are possible. The result is their mean.
        """
        possible = 2 ** (self.bits - planes)
        return self.value((index / possible).floor() * possible + (possible - 1) / 2)

    def _levels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The lowest level and the spacing of each group, float32 [D, G, 1]."""
        step_unit, low_unit = self.units.to(device).unsqueeze(1).unbind(2)
        return (self.low.to(device) * low_unit).unsqueeze(2), (self.step.to(device) * step_unit).unsqueeze(2)


def _groups(rows: Tensor, group: int) -> Tensor:
    """rows [D, E] → [D, G, group]; a short last group is filled up with its last value."""
    return F.pad(rows, (0, -rows.shape[1] % group), mode="replicate").unflatten(1, (-1, group))


def nearest_levels(rows: Tensor, bits: int, group: int) -> Levels:
    """For each group of rows float32 [D, E] the levels with the least squared error, the widest of equals.

    Groups whose values lie on levels of as many bits keep them, apart from the rounding of low and step.
    """
    least, most = _groups(rows, group).aminmax(dim=-1)
    last, tiny = _spacings(_groups(rows, group), bits), torch.finfo(torch.float32).tiny
    row_low, row_step = least.abs().amax(1).half(), ((most - least) / last).amax(1).half()
    low_unit, step_unit = (row_low.float() / _MOST_LOW).unsqueeze(1), (row_step.float() / _MOST_STEP).unsqueeze(1)
    choices = []
    for span, down, up in ((1.0, torch.floor, torch.ceil), *((span, torch.round, torch.round) for span in _SPANS)):
        margin = (1 - span) / 2 * (most - least)
        low = down((least + margin) / low_unit.clamp_min(tiny)).clamp(-_MOST_LOW, _MOST_LOW)
        step = up((most - margin - low * low_unit) / (last * step_unit).clamp_min(tiny)).clamp(0, _MOST_STEP)
        levels = Levels(bits, group, low.to(torch.int8), step.to(torch.uint8), row_low, row_step)
        error = _groups((levels.value(levels.index(rows)) - rows).square(), group).sum(-1)
        choices.append((error, levels.low, levels.step))
    errors, lows, steps = (torch.stack(values) for values in zip(*choices, strict=True))
    best = errors.argmin(0, keepdim=True)  # the first of equals
    return Levels(bits, group, lows.gather(0, best)[0], steps.gather(0, best)[0], row_low, row_step)


def _spacings(groups: Tensor, bits: int) -> Tensor:
    """How many spacings of its levels each group's range takes, float32 [D, G]; groups: float32 [D, G, group].

    2^bits − 1 as a rule. Fewer if all values lie on levels with a larger spacing, of which they do not reach both ends.
    Short groups and levels of many bits can't be told from chance.
    """
    last = 2**bits - 1
    spacings = torch.full(groups.shape[:2], float(last), device=groups.device)
    if bits > _MOST_KEPT or groups.shape[2] < 2 * 2**bits:
        return spacings
    few = groups.sort(dim=2).values.diff(dim=2).ne(0).sum(2) <= last
    least, most = groups[few].aminmax(dim=1, keepdim=True)
    shares = (groups[few] - least) / (most - least).clamp_min(torch.finfo(torch.float32).tiny)
    kept = spacings[few]
    for count in range(2 ** (bits - 1), last + 1):  # with fewer, twice as many fit too
        on_levels = (shares * count - (shares * count).round()).abs().amax(1) <= _OFF_LEVEL
        kept[on_levels] = count
    spacings[few] = kept
    return spacings


@dataclass(frozen=True)
class StoredFFN:
    """How the weights of one FFN are stored.

    settings: bits, group and spared, as in `quantise_ffns`; levels: by projection, with a row for each neuron.
    spared: bool [D], the neurons whose rows stay at 16 bits.
    """

    settings: tuple[int, int, int]
    levels: dict[str, Levels]
    spared: Tensor

    @property
    def bits(self) -> int:
        """Bits of a weight of the other neurons, without their levels."""
        return self.settings[0]


def stored(ffn: FFN) -> StoredFFN | None:
    """How an FFN's weights are stored; None if they were not quantised."""
    return getattr(ffn.module, _STORED, {}).get(_key(ffn))


def _key(ffn: FFN) -> int:
    return ffn.index if isinstance(ffn, Expert) else 0


def neuron_bits(ffn: FFN) -> Tensor:
    """Bits stored for each weight of a neuron, on average over its row of E weights, float32 [D]; 16 if not quantised.

    A neuron has the same in all projections.
    """
    form = stored(ffn)
    if form is None:
        return torch.full((ffn.width,), float(FULL_BITS), device=ffn.device)
    levels = form.levels["down"]
    return torch.where(form.spared, float(FULL_BITS), levels.bits + levels.overhead / ffn.hidden_size)


def mean_bits(ffns: list[FFN]) -> float:
    """Bits stored for a weight of the FFNs, on average."""
    return math.fsum(neuron_bits(ffn).double().mean().item() for ffn in ffns) / len(ffns)


def neuron_rows(ffn: FFN) -> dict[str, Tensor]:
    """Each projection's weights with a row for each neuron, [D, E]: views of the model's own."""
    rows = {name: ffn.projection(name) for name in ("gate", "up") if name == "up" or ffn.gated}
    return rows | {"down": ffn.down_matrix.T}


@torch.no_grad()
def quantise_ffns(model: nn.Module, bits: int, group: int = 32, spared: int = 16) -> nn.Module:
    """The model itself, with the weights of its FFNs rounded to the values that so many bits can store.

    bits: of a weight; group: weights of a row that share levels; spared: neurons in each FFN, those with the largest
    down weights, that stay as they are. The weights keep their type, and attention, embeddings and FFNs that masks
    leave alone keep their values. A second call with the same settings changes nothing.

    Raises UserError if the settings do not fit the FFNs, or the FFNs are already stored with other settings.
    """
    if is_rounded(model):
        raise UserError("quantise_ffns: the model's matrices are stored at 8 bits already; load the model anew")
    ffns, settings = find_ffns(model), (bits, group, spared)
    ffn, form = ffns[0], stored(ffns[0])
    if form is not None:
        if form.settings != settings:
            before = "at {} bits in groups of {}, with {} neurons spared".format(*form.settings)
            raise UserError(f"{type(model).__name__}: its FFNs are already stored {before}; load the model again")
        return model
    if group > ffn.hidden_size:
        raise UserError(f"model.ffn_group={group}: a row of the FFNs has {ffn.hidden_size} weights; lower it")
    if spared > ffn.width:
        raise UserError(f"model.ffn_spared={spared}: the FFNs have {ffn.width} neurons; lower it")
    for ffn in ffns:
        _quantise(ffn, settings)
    return model


def _quantise(ffn: FFN, settings: tuple[int, int, int]) -> None:
    form = stored_form(ffn, *settings)
    for name, weights in neuron_rows(ffn).items():
        rows, levels = weights.float(), form.levels[name]
        weights.copy_(torch.where(form.spared.unsqueeze(1), rows, levels.value(levels.index(rows))))
    ffn.module.__dict__.setdefault(_STORED, {})[_key(ffn)] = form


@torch.no_grad()
def stored_form(ffn: FFN, bits: int = 4, group: int = 32, spared: int = 16) -> StoredFFN:
    """How an FFN's weights would be stored with these settings, as in `quantise_ffns`; the weights stay."""
    largest = ffn.down_matrix.float().abs().amax(0).argsort(descending=True, stable=True)[:spared]
    is_spared = torch.zeros(ffn.width, dtype=torch.bool, device=largest.device)
    is_spared[largest] = True
    levels = {name: nearest_levels(rows.float(), bits, group) for name, rows in neuron_rows(ffn).items()}
    return StoredFFN((bits, group, spared), levels, is_spared)
