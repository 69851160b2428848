"""Scores neurons with a low-bit copy of the FFN's own gate and up projections.

At one bit a weight, a copied gate takes 2.1 % of the FFN's bytes, stays full-rank, and costs less than a small network
of the same quality. The idea is SparseInfer's (Shin et al., 2024), which predicts the sign of a ReLU's input from the
signs of weights and inputs. Here the levels, their scales and the curve from products to scores are trained.

Shape letters: L layers, P projections, D neurons, E hidden size, n tokens, b bits, W bytes of a packed row of E bits.
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
    """

    weights: nn.Parameter | None
    planes: Tensor | None

    def __init__(
        self, layers: int, hidden_size: int, neurons: int, projections: list[str], bits: int, frozen: bool = False
    ):
        super().__init__()
        self.hidden_size, self.neurons, self.projections = hidden_size, neurons, list(projections)
        self.bits, self.frozen = bits, frozen
        shape = (layers, len(projections), neurons)
        planes_shape = (bits, *shape, ops.row_bytes(hidden_size))
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
        """A view of planes [L, b, P, D, W] if frozen, of weights [L, P, D, E] if not."""
        return self.weights if self.planes is None else self.planes.transpose(0, 1)  # type: ignore[return-value]

    def _levels(self, stored: Tensor) -> Tensor:
        """Planes [..., b, P, D, W] if frozen, weights [..., P, D, E] if not → levels float32 [..., P, D, E]."""
        if not self.frozen:
            return _Quantise.apply(stored, self.bits)
        levels = torch.full((), 0.5 - 2 ** (self.bits - 1), device=stored.device)
        for bit, plane in enumerate(stored.unbind(-4)):
            levels = levels + ops.unpack(plane, self.hidden_size) * 2.0**bit
        return levels

    def forward(self, hidden: Tensor) -> Tensor:
        """FFN inputs [L, n, E] → scores float32 [L, n, D]."""
        return self._scores(hidden, self.levels(slice(None)), self.curve)

    def layer(self, layer: int) -> "LayerScores":
        """One layer's part, a view of these parameters."""
        return LayerScores(self, self._stored()[layer], tuple(value[layer] for value in self.curve))

    def unbind(self) -> list["LayerScores"]:
        """`layer` of all layers at once, sharing one gradient tensor.

        Separate calls of `layer` would each allocate one the size of all layers.
        """
        curves = zip(*(value.unbind() for value in self.curve), strict=True)
        return [LayerScores(self, *parts) for parts in zip(self._stored().unbind(), curves, strict=True)]

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
            for bit in range(self.bits):
                planes[layer, bit] = ops.pack((index >> bit & 1).bool())
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
        """A copy with the same curve, whose weights or planes are zeros."""
        shape = (len(self.bias), self.hidden_size, self.neurons)
        copy = LowBitScores(*shape, self.projections, self.bits, frozen).to(self.bias.device)
        for target, value in zip(copy.curve, self.curve, strict=True):
            target.copy_(value)
        return copy

    def parameters_read(self) -> float:
        """Parameters of 16 bits that one layer reads for one token."""
        return len(self.projections) * self.neurons * (self.hidden_size * self.bits / 16 + 3) + self.neurons

    def multiplications(self) -> int:
        """Products that one layer computes for one token, whatever the bits of a weight."""
        return len(self.projections) * self.neurons * (self.hidden_size + 3)


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
    stored: Tensor  # planes [b, P, D, W] if frozen, else weights [P, D, E]
    curve: Curve

    def __call__(self, hidden: Tensor) -> Tensor:
        """FFN inputs [n, E] → scores float32 [n, D]."""
        curve = tuple(value.unsqueeze(0) for value in self.curve)
        levels = self.module._levels(self.stored).unsqueeze(0)
        return self.module._scores(hidden.to(curve[-1].dtype).unsqueeze(0), levels, curve).squeeze(0)
