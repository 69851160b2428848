"""Scores neurons with a copy of the FFN's own gate and up projections at a few bits a weight.

What a neuron will do is cheaper to find by a bad copy of its own weights than by a good small network: at one bit a weight the gate is 2.1 % of an
FFN's bytes, and all of its rank is kept. The idea is SparseInfer's (Shin et al., 2024), which predicts the sign of a ReLU's input from signs of
weights and inputs; here codes, scales and what a neuron makes of them are trained, and the neurons ranked. Shape letters: L layers, P projections,
D neurons, E hidden size, n tokens, b bits, W bytes of a packed row of E weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apc import ops
from apc.data.ffn import GatedFFN

# The spacing of 2^b equally spaced levels that distorts a normal distribution of variance 1 least (Max, "Quantizing for
# minimum distortion", 1960).
SPACING = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352}


def quantised(weights: Tensor, bits: int) -> Tensor:
    """The nearest of the levels −(2^b − 1)/2, …, −½, ½, …, (2^b − 1)/2 to each weight, in the weights' shape and dtype."""
    half = 2 ** (bits - 1)
    return weights.floor().clamp(-half, half - 1) + 0.5


class _Quantise(torch.autograd.Function):
    """`quantised`, whose gradient is 1 within the levels' range and 0 outside it (Hubara et al., Binarized neural networks, 2016)."""

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
    """A neuron's score: bias + Σ over projections of slope · z + power · log(1 + z²), where z = scale · (levels of the neuron's row) · (FFN input).

    About the logarithm of the energy that the neuron will have: for a large z it is 2 log |z|, and where z is near 0 its own noise. In training the levels are
    those nearest to `weights` float32 [L, P, D, E], in units of their spacing; `frozen` leaves only the levels, as `planes` uint8 [b, L, P, D, W]: plane i
    holds bit i of each level's index. scale, slope and power: float32 [L, P, D]; bias [L, D].
    """

    def __init__(
        self, layers: int, hidden_size: int, neurons: int, projections: list[str], bits: int, frozen: bool = False
    ):
        super().__init__()
        self.hidden_size, self.neurons, self.projections, self.bits, self.frozen = (
            hidden_size,
            neurons,
            list(projections),
            bits,
            frozen,
        )
        shape = (layers, len(projections), neurons)
        self.weights = None if frozen else nn.Parameter(torch.zeros(*shape, hidden_size))
        self.register_buffer(
            "planes", torch.zeros(bits, *shape, ops.row_bytes(hidden_size), dtype=torch.uint8) if frozen else None
        )
        self.scale, self.power, self.slope = (
            nn.Parameter(torch.ones(shape)),
            nn.Parameter(torch.ones(shape)),
            nn.Parameter(torch.zeros(shape)),
        )
        self.bias = nn.Parameter(torch.zeros(layers, neurons))

    @torch.no_grad()
    def start(self, ffns: list[GatedFFN], static_energy: Tensor) -> None:
        """From the model's own weights, and how much energy each neuron of a layer has on the fit text, [L, D] (in any unit)."""
        for layer, ffn in enumerate(ffns):
            for place, name in enumerate(self.projections):
                rows = ffn.projection(name).float()
                spacing = (rows.std(-1) * SPACING[self.bits]).clamp_min(torch.finfo(torch.float32).tiny)
                self.weights[layer, place] = rows / spacing.unsqueeze(-1)
                self.scale[layer, place] = spacing
        self.bias.copy_(static_energy.clamp_min(1e-6 * static_energy.mean()).log())

    def levels(self, layer: slice | int) -> Tensor:
        """float32 [..., P, D, E] of a layer, or several."""
        return self._levels(self.planes[:, layer] if self.frozen else self.weights[layer])

    def _levels(self, held: Tensor) -> Tensor:
        if not self.frozen:
            return _Quantise.apply(held, self.bits)
        found = torch.full((), 0.5 - 2 ** (self.bits - 1), device=held.device)
        for place, plane in enumerate(held):
            found = found + ops.unpack(plane, self.hidden_size) * 2.0**place
        return found

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [L, n, E], the FFN inputs → scores float32 [L, n, D]"""
        return self._scores(hidden, self.levels(slice(None)), self.scale, self.slope, self.power, self.bias)

    def layer(self, layer: int) -> "LayerScores":
        """One layer's part, which looks at this one's parameters."""
        held = self.planes[:, layer] if self.frozen else self.weights[layer]
        return LayerScores(self, held, *(value[layer] for value in (self.scale, self.slope, self.power, self.bias)))

    def unbind(self) -> list["LayerScores"]:
        """`layer` of all layers at once: their gradients become one tensor, where each of `layer`'s is a tensor of all layers."""
        held = self.planes.unbind(1) if self.frozen else self.weights.unbind()
        curves = (value.unbind() for value in (self.scale, self.slope, self.power, self.bias))
        return [LayerScores(self, *parts) for parts in zip(held, *curves, strict=True)]

    def _scores(
        self, hidden: Tensor, levels: Tensor, scale: Tensor, slope: Tensor, power: Tensor, bias: Tensor
    ) -> Tensor:
        """hidden [G, n, E], levels [G, P, D, E], scale, slope and power [G, P, D], bias [G, D] → float32 [G, n, D]"""
        products = hidden @ levels.flatten(1, 2).transpose(1, 2).to(hidden.dtype)
        return ops.score_curve(products.unflatten(-1, (len(self.projections), self.neurons)), scale, slope, power, bias)

    @torch.no_grad()
    def freeze(self) -> "LowBitScores":
        """A copy that holds the levels as bits; itself if it already does."""
        return self if self.frozen else self._copy(frozen=True)

    @torch.no_grad()
    def thaw(self) -> "LowBitScores":
        """A copy that can be trained; its weights are the levels themselves where it was frozen."""
        return self._copy(frozen=False)

    def _copy(self, frozen: bool) -> "LowBitScores":
        layers = len(self.bias)
        made = LowBitScores(layers, self.hidden_size, self.neurons, self.projections, self.bits, frozen).to(
            self.bias.device
        )
        for name in ("scale", "slope", "power", "bias"):
            getattr(made, name).copy_(getattr(self, name))
        for layer in range(layers):  # the levels of all layers as floats would be gigabytes
            if not frozen:
                made.weights[layer] = self.levels(layer) if self.frozen else self.weights[layer]
                continue
            index = (self.levels(layer) + (2 ** (self.bits - 1) - 0.5)).to(torch.uint8)
            for place in range(self.bits):
                made.planes[place, layer] = ops.pack((index >> place & 1).bool())
        return made

    def parameters_read(self) -> float:
        """Parameters of 16 bits that one layer projections for one token."""
        return len(self.projections) * self.neurons * (self.hidden_size * self.bits / 16 + 3) + self.neurons

    def multiplications(self) -> int:
        """Products that one layer computes for one token, whatever the bits of a weight."""
        return len(self.projections) * self.neurons * (self.hidden_size + 3)


@dataclass(frozen=True, eq=False)
class LayerScores:
    """One layer of `LowBitScores`. held: its weights [P, D, E], or its planes [b, P, D, W]; scale, slope, power [P, D]; bias [D]."""

    of: LowBitScores
    held: Tensor
    scale: Tensor
    slope: Tensor
    power: Tensor
    bias: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [n, E] → scores float32 [n, D]"""
        parts = (self.of._levels(self.held), self.scale, self.slope, self.power, self.bias)
        return self.of._scores(hidden.to(self.bias.dtype).unsqueeze(0), *(part.unsqueeze(0) for part in parts)).squeeze(
            0
        )
