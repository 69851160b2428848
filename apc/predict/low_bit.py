"""Scores neurons with a low-bit copy of the FFN's own gate and up projections.

At one bit a weight, a copied gate takes 2.1 % of the FFN's bytes, stays full-rank, and costs less than a small network
of the same quality. The idea is SparseInfer's (Shin et al., 2024), which predicts the sign of a ReLU's input from the
signs of weights and inputs. Here the levels, their scales and the curve from products to scores are trained.

The copy can be read at a token's largest inputs only, as Prox does (arXiv 2607.27591). At equal bytes, three bits on
half of the inputs rank neurons better than two bits on three quarters of them.

Shape letters: L layers, P projections, D neurons, E hidden size, n tokens, b bits, W bytes of a packed row of bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apc import ops
from apc.data.ffn import FFN
from apc.utils.errors import UserError

# The spacing of 2^b equally spaced levels that distorts a normal distribution of variance 1 least (Max, "Quantizing for
# minimum distortion", 1960).
SPACING = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352}

Curve = tuple[Tensor, ...]  # scale, slope, power [..., P, D] and bias [..., D]


def quantised(weights: Tensor, bits: int) -> Tensor:
    """Each weight's nearest level out of −(2^b − 1)/2, …, −½, ½, …, (2^b − 1)/2, in the weights' shape and dtype."""
    half = 2 ** (bits - 1)
    return weights.floor().clamp(-half, half - 1) + 0.5


def bit_planes(index: Tensor, bits: int) -> Tensor:
    """The bits of levels' indices, packed: uint8 [..., M] below 2^b → uint8 [b, ..., row_bytes(M)]."""
    return torch.stack([ops.pack((index >> bit & 1).bool()) for bit in range(bits)])


def level_index(planes: tuple[Tensor, ...], width: int) -> Tensor:
    """The indices that `bit_planes` packed: b planes uint8 [..., W], the lowest bit first → float32 [..., width]."""
    index = torch.zeros((), device=planes[0].device)
    for bit, plane in enumerate(planes):
        index = index + ops.unpack(plane, width) * 2.0**bit
    return index


def at_16_bits(value: Tensor) -> Tensor:
    """float32 rounded to the nearest bfloat16."""
    return value.bfloat16().float()


def column_norms(ffn: FFN, projections: list[str]) -> Tensor:
    """The norm of each column of an FFN's projections together, float32 [E], rounded to 16 bits.

    |x_i| times the norm of column i is how much input i can change the projections' outputs.
    """
    squares = [ffn.projection(name).float().square().sum(0) for name in projections]
    return at_16_bits(torch.stack(squares).sum(0).sqrt())


class _Quantise(torch.autograd.Function):
    """`quantised` with a straight-through gradient within the range of the levels (Hubara et al., 2016), 0 outside."""

    @staticmethod
    def forward(ctx, weights: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.half = 2 ** (bits - 1)
        return quantised(weights, bits)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return gradient * (weights.abs() <= ctx.half), None


class LowBitScores(nn.Module):
    """Scores each neuron by bias + Σ over projections of slope · z + power · log(1 + z²).

    z is scale · (levels of the neuron's row) · (FFN input). A score estimates the logarithm of the neuron's
    energy. For large |z| that is about 2 log |z|; the 1 accounts for the noise of z near 0.

    During training, `weights` float32 [L, P, D, E] are in units of the level spacing, and the forward pass rounds
    each weight to its nearest level. A frozen copy stores only the levels, as `planes` uint8 [b, L, P, D, W]:
    plane i holds bit i of each level's index. scale, slope, power: float32 [L, P, D]; bias: float32 [L, D].

    inputs: the mean share of inputs at which a token reads the copy. If it is below 1, input i of a token takes part
    if |x_i| · norms[i] reaches the layer's threshold; to the copy, the others are 0. norms: float32 [L, E];
    input_thresholds: float32 [L]. Such a copy is stored by input, so that what a token does not need can be skipped:
    planes uint8 [b, L, P, E, W], with the bits of an input's D weights side by side.
    """

    weights: nn.Parameter | None
    planes: Tensor | None
    norms: Tensor | None
    input_thresholds: Tensor | None

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        neurons: int,
        projections: list[str],
        bits: int,
        frozen: bool = False,
        inputs: float = 1.0,
    ):
        super().__init__()
        self.hidden_size, self.neurons, self.projections = hidden_size, neurons, list(projections)
        self.bits, self.frozen, self.inputs = bits, frozen, inputs
        self.by_input = inputs < 1
        shape = (layers, len(projections), neurons)
        rows, self._width = (hidden_size, neurons) if self.by_input else (neurons, hidden_size)
        planes_shape = (bits, *shape[:2], rows, ops.row_bytes(self._width))
        self.register_buffer("norms", torch.zeros(layers, hidden_size) if self.by_input else None)
        self.register_buffer("input_thresholds", torch.zeros(layers) if self.by_input else None)
        self.weights = None if frozen else nn.Parameter(torch.zeros(*shape, hidden_size))
        self.register_buffer("planes", torch.zeros(planes_shape, dtype=torch.uint8) if frozen else None)
        self.scale, self.power = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
        self.slope = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(layers, neurons))

    @property
    def curve(self) -> Curve:
        """The parameters of the curve, of all layers."""
        return self.scale, self.slope, self.power, self.bias

    @torch.no_grad()
    def copy_ffns(self, ffns: list[FFN], static_energy: Tensor) -> None:
        """Copies the model's own weights; the bias starts as the logarithm of static_energy [L, D], in any unit."""
        weights = self._stored()
        for layer, ffn in enumerate(ffns):
            if self.norms is not None:
                self.norms[layer] = column_norms(ffn, self.projections)
            for index, name in enumerate(self.projections):
                rows = ffn.projection(name).float()
                spacing = (rows.std(-1) * SPACING[self.bits]).clamp_min(torch.finfo(torch.float32).tiny)
                weights[layer, index] = rows / spacing.unsqueeze(-1)
                self.scale[layer, index] = spacing
        self.bias.copy_(static_energy.clamp_min(1e-6 * static_energy.mean()).log())

    def levels(self, layer: slice | int) -> Tensor:
        """Levels of one layer or several, float32 [..., P, D, E]."""
        return self._levels(self._stored()[layer])

    def _stored(self) -> Tensor:
        """A view of planes [L, b, P, D or E, W] if frozen, of weights [L, P, D, E] if not."""
        return self.weights if self.planes is None else self.planes.transpose(0, 1)  # type: ignore[return-value]

    def _levels(self, stored: Tensor) -> Tensor:
        """Planes [..., b, P, D or E, W] if frozen, weights [..., P, D, E] if not → levels float32 [..., P, D, E]."""
        if not self.frozen:
            return _Quantise.apply(stored, self.bits)
        levels = level_index(stored.unbind(-4), self._width) + (0.5 - 2 ** (self.bits - 1))
        return levels.transpose(-1, -2) if self.by_input else levels

    def input_sizes(self, hidden: Tensor, layer: slice | int = slice(None)) -> Tensor:
        """|x_i| · norms[i], float32; hidden: a layer's FFN inputs [n, E], or [L, n, E]. Only if `inputs` is below 1."""
        assert self.norms is not None
        return hidden.float().abs() * self.norms[layer].unsqueeze(-2)

    def inputs_read(self, hidden: Tensor, layer: slice | int = slice(None)) -> Tensor:
        """The inputs at which tokens read the copy, bool in the shape of hidden, which is as in `input_sizes`."""
        assert self.input_thresholds is not None
        return self.input_sizes(hidden, layer) >= self.input_thresholds[layer][..., None, None]

    def _largest(self, hidden: Tensor, layer: slice | int = slice(None)) -> Tensor:
        """FFN inputs, with 0 for those that take no part."""
        return hidden.masked_fill(~self.inputs_read(hidden, layer), 0) if self.by_input else hidden

    def forward(self, hidden: Tensor) -> Tensor:
        """FFN inputs [L, n, E] → scores float32 [L, n, D]."""
        return self._scores(self._largest(hidden), self.levels(slice(None)), self.curve)

    def layer(self, layer: int) -> "LayerScores":
        """One layer's part, a view of these parameters."""
        return LayerScores(self, layer, self._stored()[layer], tuple(value[layer] for value in self.curve))

    def unbind(self) -> list["LayerScores"]:
        """`layer` of all layers at once, sharing one gradient tensor.

        Separate calls of `layer` would each allocate one the size of all layers.
        """
        curves = zip(*(value.unbind() for value in self.curve), strict=True)
        parts = zip(self._stored().unbind(), curves, strict=True)
        return [LayerScores(self, layer, *part) for layer, part in enumerate(parts)]

    def _scores(self, hidden: Tensor, levels: Tensor, curve: Curve) -> Tensor:
        """hidden [G, n, E], levels [G, P, D, E], curve [G, P, D] and [G, D] → float32 [G, n, D]."""
        products = hidden @ levels.flatten(1, 2).transpose(1, 2).to(hidden.dtype)
        return ops.score_curve(products.unflatten(-1, (len(self.projections), self.neurons)), *curve)

    @torch.no_grad()
    def freeze(self) -> "LowBitScores":
        """A copy that stores the levels as bits; itself if it already does."""
        if self.frozen:
            return self
        copy = self._empty_copy(frozen=True)
        planes = copy._stored()
        for layer in range(len(planes)):  # one at a time: the levels of all layers as floats would take gigabytes
            index = (self.levels(layer) + (2 ** (self.bits - 1) - 0.5)).to(torch.uint8)
            planes[layer] = bit_planes(index.transpose(-1, -2) if self.by_input else index, self.bits)
        return copy

    @torch.no_grad()
    def thaw(self) -> "LowBitScores":
        """A copy that can be trained. The copy of a frozen one starts from the levels."""
        copy = self._empty_copy(frozen=False)
        weights = copy._stored()
        for layer, stored in enumerate(self._stored()):
            weights[layer] = self._levels(stored) if self.frozen else stored
        return copy

    def _empty_copy(self, frozen: bool) -> "LowBitScores":
        """A copy with the same curve, norms and thresholds, whose weights or planes are zeros."""
        shape = (len(self.bias), self.hidden_size, self.neurons)
        copy = LowBitScores(*shape, self.projections, self.bits, frozen, self.inputs).to(self.bias.device)
        small = {name: value for name, value in self.state_dict().items() if name not in ("weights", "planes")}
        copy.load_state_dict(small, strict=False)
        return copy

    def parameters_read(self, share: float | None = None) -> float:
        """Parameters of 16 bits that one layer reads for one token.

        share: the share of inputs at which the token reads levels; None: `inputs`. The rest is read in full.
        """
        levels = self.hidden_size * self.bits / 16 * (self.inputs if share is None else share)
        norms = self.hidden_size if self.by_input else 0
        return len(self.projections) * self.neurons * (levels + 3) + self.neurons + norms

    def multiplications(self, share: float | None = None) -> float:
        """Products that one layer computes for one token, whatever the bits of a weight; share: as above."""
        levels = self.hidden_size * (self.inputs if share is None else share)
        norms = self.hidden_size if self.by_input else 0
        return len(self.projections) * self.neurons * (levels + 3) + norms


def check_projections(ffns: list[FFN], projections: list[str]) -> None:
    """Raises UserError if the copy would include a gate but the FFNs have none."""
    if "gate" in projections and not ffns[0].gated:
        raise UserError(
            f"predictor.low_bit_projections={projections}: the model's FFNs have no gate; "
            "set predictor.low_bit_projections=[up]"
        )


@dataclass(frozen=True, eq=False)
class LayerScores:
    """One layer of `LowBitScores`."""

    module: LowBitScores
    index: int  # the layer's
    stored: Tensor  # planes [b, P, D or E, W] if frozen, else weights [P, D, E]
    curve: Curve

    def __call__(self, hidden: Tensor) -> Tensor:
        """FFN inputs [n, E] → scores float32 [n, D]."""
        curve = tuple(value.unsqueeze(0) for value in self.curve)
        levels = self.module._levels(self.stored).unsqueeze(0)
        hidden = self.module._largest(hidden.to(curve[-1].dtype), self.index)
        return self.module._scores(hidden.unsqueeze(0), levels, curve).squeeze(0)

    def up_part(self, hidden: Tensor) -> Tensor | None:
        """What the copy of up adds to the scores of FFN inputs [n, E], float32 [n, D]; None if only gate is copied."""
        if "up" not in self.module.projections:
            return None
        at = self.module.projections.index("up")
        *curve, bias = self.curve
        levels = self.module._levels(self.stored[:, at : at + 1] if self.module.frozen else self.stored[at : at + 1])
        hidden = self.module._largest(hidden.to(bias.dtype), self.index)
        products = (hidden @ levels[0].T.to(hidden.dtype))[None, :, None]
        scale, slope, power = (each[None, at : at + 1] for each in curve)
        return ops.score_curve(products, scale, slope, power, torch.zeros_like(bias)[None])[0]
