"""Predicts, from an FFN's input, which cluster its pattern will fall into (or, in other forms, which neurons it will need).

Shape letters: L layers, E hidden size, H width of the bottleneck, K clusters, D neurons, n tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apc.config.schema import FORMS, PROJECTIONS
from apc.predict.low_bit import LayerScores, LowBitScores
from apc.utils.errors import UserError
from apc.utils.tensor_files import load_tensors, save_tensors, wrong_field

KIND, VERSION = "apc-predictor", 3
_OLD_NAMES = {"hidden": "bottleneck", "reads": "low_bit_projections"}  # in the header of version 2


def at_16_bits(value: Tensor) -> Tensor:
    """float32 rounded to the nearest bfloat16."""
    return value.bfloat16().float()


class Predictor(nn.Module):
    """A bottleneck MLP for every layer, E → H → K (or D) for each site, all layers in one batched product; in the low-bit form `LowBitScores` instead.

    outputs: how many logits each site gets; form, lookahead, bits and low_bit_projections as in `PredictorConfig`. corrects: whether the bottleneck is also mapped back,
    H → E, to what the FFN's output lacks under its mask (nothing at first: `apc.tuning` trains it). The low-bit form has no bottleneck without that.
    frozen: whether the low-bit copy is held as bits, and can't be trained. thresholds: float32 [L], the least score that a layer's neuron is kept for where
    a token keeps as many as it needs (`apc.thresholds` finds them), or None.
    """

    def __init__(
        self, layers: int, hidden_size: int, bottleneck: int, outputs: dict[str, int], form: str = "cluster", lookahead: int = 0, provenance=None,
        corrects: bool = False, bits: int = 1, low_bit_projections: list[str] | None = None, frozen: bool = False, with_thresholds: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("thresholds", torch.zeros(layers) if with_thresholds else None)
        self.layers, self.hidden_size, self.bottleneck, self.outputs = layers, hidden_size, bottleneck, dict(outputs)
        self.form, self.lookahead, self.provenance = form, lookahead, provenance or {}
        self.corrects, self.bits, self.low_bit_projections = corrects, bits, list(low_bit_projections or PROJECTIONS)
        self.low_bit = None
        if form == "low-bit":
            if list(outputs) != ["neuron"]:
                raise UserError(f"predictor.form=low-bit needs sites=[neuron], got {list(outputs)}")
            self.low_bit = LowBitScores(layers, hidden_size, outputs["neuron"], self.low_bit_projections, bits, frozen)
        by_bottleneck = self.low_bit is None
        has_bottleneck = by_bottleneck or corrects
        self.reduce = nn.Parameter(torch.empty(layers, hidden_size, bottleneck)) if has_bottleneck else None
        self.reduce_bias = nn.Parameter(torch.zeros(layers, bottleneck)) if has_bottleneck else None
        expands = outputs if by_bottleneck else {}
        self.expand = nn.ParameterDict(
            {site: nn.Parameter(torch.empty(layers, bottleneck, count)) for site, count in expands.items()}
        )
        self.expand_bias = nn.ParameterDict(
            {site: nn.Parameter(torch.zeros(layers, count)) for site, count in expands.items()}
        )
        self.correct = nn.Parameter(torch.zeros(layers, bottleneck, hidden_size)) if corrects else None
        self.correct_bias = nn.Parameter(torch.zeros(layers, hidden_size)) if corrects else None
        if has_bottleneck:
            nn.init.normal_(self.reduce, std=hidden_size**-0.5)
        for weight in self.expand.values():
            nn.init.normal_(weight, std=bottleneck**-0.5)

    def source_layer(self, layer: int) -> int:
        """The layer whose FFN input predicts `layer`."""
        return max(layer - self.lookahead, 0)

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """hidden [L, n, E], the FFN inputs → logits float [L, n, K] (neuron and low-bit form: [L, n, D]) per site."""
        sources = torch.tensor([self.source_layer(layer) for layer in range(self.layers)], device=hidden.device)
        if self.low_bit is not None:
            return {"neuron": self.low_bit(hidden[sources].to(self.low_bit.bias.dtype))}
        inner = F.silu(
            torch.baddbmm(self.reduce_bias.unsqueeze(1), _normalise(hidden[sources], self.reduce.dtype), self.reduce)
        )
        return {
            site: torch.baddbmm(self.expand_bias[site].unsqueeze(1), inner, weight)
            for site, weight in self.expand.items()
        }

    def layer_outputs(self, layer: int, site: str, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """One layer's logits [n, K] from hidden [n, E], the FFN input of `source_layer(layer)`, and its correction [n, E], None if it has none."""
        return LayerPredictor(
            {name: value[layer] for name, value in self._by_name().items()}, self.low_bit and self.low_bit.layer(layer)
        )(site, hidden)

    def unbind(self) -> list["LayerPredictor"]:
        """All layers taken apart at once: their gradients become one tensor, where those of `layer_outputs` are a tensor of all layers for each."""
        parts = {name: value.unbind() for name, value in self._by_name().items()}
        scores = [None] * self.layers if self.low_bit is None else self.low_bit.unbind()
        return [
            LayerPredictor({name: value[layer] for name, value in parts.items()}, scores[layer])
            for layer in range(self.layers)
        ]

    def _by_name(self) -> dict[str, Tensor]:
        """The bottleneck's parameters, [L, ...] each."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("low_bit.")}

    def copy(self, provenance: dict | None = None, corrects: bool = False) -> "Predictor":
        """A copy that can be trained, with another provenance, or one that corrects (by nothing yet, where this one does not); without thresholds."""
        header = self._header() | {"provenance": provenance or self.provenance, "corrects": corrects or self.corrects}
        header |= {"frozen": False, "with_thresholds": False}
        made = Predictor(**header)
        if self.low_bit is not None:
            made.low_bit = self.low_bit.thaw()
        own = {
            name: value
            for name, value in self.state_dict().items()
            if not name.startswith("low_bit.") and name != "thresholds"
        }
        made.load_state_dict({**made.state_dict(), **own})
        return made

    def _header(self) -> dict:
        names = (
            "layers",
            "hidden_size",
            "bottleneck",
            "outputs",
            "form",
            "lookahead",
            "provenance",
            "corrects",
            "bits",
            "low_bit_projections",
        )
        held = {
            "frozen": self.low_bit is not None and self.low_bit.frozen,
            "with_thresholds": self.thresholds is not None,
        }
        return {name: getattr(self, name) for name in names} | held

    def param_groups(self, lr: float) -> list[dict]:
        """Its parameters as an optimizer's groups: those of a score's curve learn ten times as fast as weights, which are of the order of 1 too but many."""
        curve = (
            []
            if self.low_bit is None
            else [self.low_bit.scale, self.low_bit.slope, self.low_bit.power, self.low_bit.bias]
        )
        others = [value for value in self.parameters() if not any(value is one for one in curve)]
        return [{"params": values, "lr": rate} for values, rate in ((others, lr), (curve, 10 * lr)) if values]

    def parameters_read(self, site: str) -> float:
        """Parameters of 16 bits that one layer low_bit_projections for one token at `site`; reduction and correction count at the first site only."""
        return self._bottleneck_parameters(site) + (0 if self.low_bit is None else self.low_bit.parameters_read())

    def multiplications(self, site: str) -> int:
        """Products (with what is added to them) that one layer computes for one token at `site`."""
        return self._bottleneck_parameters(site) + (0 if self.low_bit is None else self.low_bit.multiplications())

    def _bottleneck_parameters(self, site: str) -> int:
        own = [weights[site] for weights in (self.expand, self.expand_bias) if site in weights]
        shared = (
            [self.reduce, self.reduce_bias, self.correct, self.correct_bias] if site == next(iter(self.outputs)) else []
        )
        return sum(value[0].numel() for value in (*own, *shared) if value is not None)

    def rounded(self) -> "Predictor":
        """Itself, its parameters rounded to what 16 bits hold, a low-bit copy to its levels: so they are counted, and so they are scored."""
        if self.low_bit is not None:
            self.low_bit = self.low_bit.freeze()
        with torch.no_grad():
            for value in self.parameters():
                value.copy_(at_16_bits(value))
        return self

    def save(self, path: str | Path) -> None:
        save_tensors(Path(path), KIND, VERSION, self._header(), self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Predictor":
        """Raises UserError, naming the file, if it is missing, damaged, or doesn't hold what its header says."""
        header, tensors = load_tensors(Path(path), KIND, (2, VERSION), _OLD_NAMES)
        try:
            if wrong := wrong_field(header, _HEADER) or _wrong_value(header):
                raise ValueError(wrong)
            with torch.device("meta"):
                predictor = cls(**header)
            predictor.load_state_dict(tensors, assign=True)
        except (
            TypeError,
            ValueError,
            RuntimeError,
            KeyError,
            ArithmeticError,
            UserError,
        ) as error:  # whatever it is that does not go together
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: damaged (its header and tensors don't match: {reason}); make it again") from error
        return predictor.requires_grad_(False).eval()


_HEADER = dict(
    layers=int, hidden_size=int, bottleneck=int, outputs=dict, form=str, lookahead=int, provenance=dict, corrects=bool, bits=int, low_bit_projections=list, frozen=bool,
    with_thresholds=bool,
)  # fmt: skip


def _wrong_value(header: dict) -> str | None:
    """The first entry of a header, whose kinds are right, that no predictor has; None if there is none."""
    least = dict(layers=1, hidden_size=1, bottleneck=1, lookahead=0, bits=1)
    for name, value in header.items():
        counts = (
            name == "outputs" and value and all(type(count) is int and 0 < count < 1 << 30 for count in value.values())
        )
        right = (
            least[name] <= value < 1 << 30
            if name in least
            else counts
            if name == "outputs"
            else value in FORMS
            if name == "form"
            else True
        )
        if not right:
            return f"{name} is {value!r}"[:100]
    return None


def _normalise(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """To a root mean square of 1 a token, since a window's first tokens are hundreds of times larger than others."""
    return F.rms_norm(hidden.to(dtype), hidden.shape[-1:])


@dataclass(frozen=True, eq=False)  # by its identity, as torch.compile compares what is called
class LayerPredictor:
    """One layer of a `Predictor`. weights: those of its bottleneck, by their names; scores: its low-bit copy, or None."""

    weights: dict[str, Tensor]
    scores: LayerScores | None

    def __call__(self, site: str, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [n, K] from hidden [n, E], and the correction [n, E], None if it has none."""
        own, inner, correction = self.weights, None, None
        if "reduce" in own:
            inner = F.silu(torch.addmm(own["reduce_bias"], _normalise(hidden, own["reduce"].dtype), own["reduce"]))
        if "correct" in own:
            correction = torch.addmm(own["correct_bias"], inner, own["correct"])
        if self.scores is not None:
            return self.scores(hidden), correction
        return torch.addmm(own[f"expand_bias.{site}"], inner, own[f"expand.{site}"]), correction
