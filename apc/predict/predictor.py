"""Predicts the cluster of a token's pattern, or the neurons that it needs, from an FFN's input.

Shape letters: L layers, E hidden size, H width of the bottleneck, K clusters, D neurons, n tokens.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apc.config.schema import FORMS, PROJECTIONS
from apc.predict.low_bit import LayerScores, LowBitScores, at_16_bits
from apc.utils.errors import UserError, first_line
from apc.utils.tensor_files import load_tensors, save_tensors, wrong_field

CORRECTION = "correction"  # the form of a predictor that only corrects outputs, and predicts nothing
KIND, VERSION = "apc-predictor", 4  # version 3 lacks `inputs`
_OLD_NAMES = {"hidden": "bottleneck", "reads": "low_bit_projections"}  # in the header of version 2
_LARGEST = 1 << 30  # sizes in a header lie below


@dataclass(frozen=True)
class PredictorHeader:
    """A predictor's shape and settings. With the provenance they are the header of its file.

    Raises ValueError for an impossible value, and UserError for the low-bit form at a site other than `neuron`.
    """

    layers: int
    hidden_size: int
    bottleneck: int  # width; the low-bit form has a bottleneck only if it corrects
    outputs: dict[str, int]  # logits at each site: K clusters, or D neurons
    form: str = "cluster"  # form, lookahead, bits, low_bit_projections and inputs are as in `PredictorConfig`
    lookahead: int = 0
    corrects: bool = False  # also maps the bottleneck to a correction of the FFN's output under its mask
    bits: int = 1
    low_bit_projections: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    inputs: float = 1.0
    frozen: bool = False  # the low-bit copy is stored as bits and can't be trained
    with_thresholds: bool = False  # each layer has a threshold

    def __post_init__(self):
        least = dict(layers=1, hidden_size=1, bottleneck=1, lookahead=0, bits=1)
        wrong = [name for name, low in least.items() if not low <= getattr(self, name) < _LARGEST]
        if not self.outputs or not all(type(count) is int and 0 < count < _LARGEST for count in self.outputs.values()):
            wrong.append("outputs")
        if self.form not in (*FORMS, CORRECTION):
            wrong.append("form")
        if not 0 < self.inputs <= 1 or (self.inputs < 1 and self.form != "low-bit"):
            wrong.append("inputs")
        if wrong:
            raise ValueError(f"{wrong[0]} is {getattr(self, wrong[0])!r}"[:100])
        if self.form == "low-bit" and list(self.outputs) != ["neuron"]:
            raise UserError(f"predictor.form=low-bit needs sites=[neuron], got {list(self.outputs)}")


_HEADER_TYPES = {"provenance": dict} | {
    name: get_origin(kind) or kind for name, kind in get_type_hints(PredictorHeader).items()
}


class Predictor(nn.Module):
    """A bottleneck MLP for each layer, E → H → K (or D) at each site; all layers run as one batched product.

    The low-bit form scores neurons with `low_bit` instead, and the form `correction` scores nothing. A predictor with a
    correction also maps the bottleneck back to the hidden size, H → E, and adds the result to the FFN's output. The map
    starts at zero and is trained by `apc.tune`.

    thresholds: float32 [L], the least score with which a layer keeps a neuron (see `apc.tune.thresholds`), or None.
    """

    thresholds: Tensor | None

    def __init__(self, header: PredictorHeader, provenance: dict | None = None):
        super().__init__()
        self._header, self.provenance = header, provenance or {}
        self.layers, self.hidden_size, self.bottleneck = header.layers, header.hidden_size, header.bottleneck
        self.outputs, self.form, self.lookahead = dict(header.outputs), header.form, header.lookahead
        self.corrects, self.bits = header.corrects, header.bits
        self.low_bit_projections = list(header.low_bit_projections)
        L, E, H = self.layers, self.hidden_size, self.bottleneck
        self.register_buffer("thresholds", torch.zeros(L) if header.with_thresholds else None)
        self.low_bit: LowBitScores | None = None
        if self.form == "low-bit":
            D = self.outputs["neuron"]
            self.low_bit = LowBitScores(L, E, D, self.low_bit_projections, self.bits, header.frozen, header.inputs)
        has_bottleneck = self.low_bit is None or self.corrects
        self.reduce = nn.Parameter(nn.init.normal_(torch.empty(L, E, H), std=E**-0.5)) if has_bottleneck else None
        self.reduce_bias = nn.Parameter(torch.zeros(L, H)) if has_bottleneck else None
        self.expand, self.expand_bias = nn.ParameterDict(), nn.ParameterDict()
        # Sorted, so that each site draws the same initial weights in whatever order sites are given.
        for site, count in sorted(self.outputs.items()) if self.form not in ("low-bit", CORRECTION) else ():
            self.expand[site] = nn.Parameter(nn.init.normal_(torch.empty(L, H, count), std=H**-0.5))
            self.expand_bias[site] = nn.Parameter(torch.zeros(L, count))
        self.correct = nn.Parameter(torch.zeros(L, H, E)) if self.corrects else None
        self.correct_bias = nn.Parameter(torch.zeros(L, E)) if self.corrects else None

    @property
    def header(self) -> PredictorHeader:
        """The header that matches its present state (frozen or not, with thresholds or not)."""
        frozen = self.low_bit is not None and self.low_bit.frozen
        return replace(self._header, frozen=frozen, with_thresholds=self.thresholds is not None)

    def source_layer(self, layer: int) -> int:
        """The layer whose FFN input predicts `layer`."""
        return max(layer - self.lookahead, 0)

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """FFN inputs [L, n, E] → logits float [L, n, K] at each site ([L, n, D] in the neuron and low-bit forms)."""
        sources = torch.tensor([self.source_layer(layer) for layer in range(self.layers)], device=hidden.device)
        if self.low_bit is not None:
            return {"neuron": self.low_bit(hidden[sources].to(self.low_bit.bias.dtype))}
        assert self.reduce is not None and self.reduce_bias is not None
        normalised = _normalise(hidden[sources], self.reduce.dtype)
        inner = F.silu(torch.baddbmm(self.reduce_bias.unsqueeze(1), normalised, self.reduce))
        biases = {site: bias.unsqueeze(1) for site, bias in self.expand_bias.items()}
        return {site: torch.baddbmm(biases[site], inner, weight) for site, weight in self.expand.items()}

    def layer(self, layer: int) -> "LayerPredictor":
        """One layer's part, a view of these parameters."""
        weights = {name: value[layer] for name, value in self._bottleneck().items()}
        return LayerPredictor(weights, None if self.low_bit is None else self.low_bit.layer(layer))

    def layer_outputs(self, layer: int, site: str, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """One layer's logits [n, K or D] and correction [n, E] or None, from its source layer's FFN input [n, E]."""
        return self.layer(layer)(site, hidden)

    def unbind(self) -> list["LayerPredictor"]:
        """`layer` of all layers at once, sharing one gradient tensor.

        Separate calls of `layer` would each allocate one the size of all layers.
        """
        parts = {name: value.unbind() for name, value in self._bottleneck().items()}
        scores = [None] * self.layers if self.low_bit is None else self.low_bit.unbind()
        return [
            LayerPredictor({name: values[layer] for name, values in parts.items()}, layer_scores)
            for layer, layer_scores in enumerate(scores)
        ]

    def _bottleneck(self) -> dict[str, Tensor]:
        """The bottleneck's parameters by name, [L, ...] each."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("low_bit.")}

    def copy(self, provenance: dict | None = None, corrects: bool = False) -> "Predictor":
        """A trainable copy without thresholds of scores; it has a correction if this one has or `corrects` is set."""
        header = replace(self.header, corrects=corrects or self.corrects, frozen=False, with_thresholds=False)
        copy = Predictor(header, provenance or self.provenance)
        if self.low_bit is not None:
            copy.low_bit = self.low_bit.thaw()
        copy.load_state_dict({**copy.state_dict(), **self._bottleneck()})
        return copy

    def param_groups(self, lr: float) -> list[dict]:
        """Its parameters as an optimizer's groups; the curve of low-bit scores learns ten times as fast as the rest.

        The curve's few values and the many weights are all of the order of 1.
        """
        curve = [] if self.low_bit is None else list(self.low_bit.curve)
        others = [value for value in self.parameters() if not any(value is one for one in curve)]
        return [{"params": values, "lr": rate} for values, rate in ((others, lr), (curve, 10 * lr)) if values]

    def parameters_read(self, site: str, copy: float | None = None) -> float:
        """Parameters of 16 bits that one layer reads for one token at `site`.

        copy: the share of inputs at which a low-bit copy was read; None: the share that it was made for. Parameters
        shared by several sites count at the first only.
        """
        return self._bottleneck_parameters(site) + (0 if self.low_bit is None else self.low_bit.parameters_read(copy))

    def multiplications(self, site: str, copy: float | None = None) -> float:
        """The number of multiplications, and of biases added, in one layer for one token at `site`."""
        return self._bottleneck_parameters(site) + (0 if self.low_bit is None else self.low_bit.multiplications(copy))

    def _bottleneck_parameters(self, site: str) -> int:
        own = [weights[site] for weights in (self.expand, self.expand_bias) if site in weights]
        is_first = site == next(iter(self.outputs))
        shared = [self.reduce, self.reduce_bias, self.correct, self.correct_bias] if is_first else []
        return sum(value[0].numel() for value in (*own, *shared) if value is not None)

    def rounded(self) -> "Predictor":
        """Itself, with parameters rounded to 16 bits and the low-bit copy frozen: the form that costs assume."""
        if self.low_bit is not None:
            self.low_bit = self.low_bit.freeze()
        with torch.no_grad():
            for value in self.parameters():
                value.copy_(at_16_bits(value))
        return self

    def save(self, path: str | Path) -> None:
        """Writes header and tensors to a safetensors file."""
        header = asdict(self.header) | {"provenance": self.provenance}
        save_tensors(Path(path), KIND, VERSION, header, self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Predictor":
        """The predictor in a file. Raises UserError, naming the file, if it is missing, damaged or inconsistent."""
        header, tensors = load_tensors(Path(path), KIND, (2, 3, VERSION), _OLD_NAMES)
        try:
            if wrong := wrong_field(header, _HEADER_TYPES):
                raise ValueError(wrong)
            provenance = header.pop("provenance", None)
            with torch.device("meta"):
                predictor = cls(PredictorHeader(**header), provenance)
            predictor.load_state_dict(tensors, assign=True)
        # Header and tensors of a damaged file can disagree in any of these ways.
        except (TypeError, ValueError, RuntimeError, KeyError, ArithmeticError, UserError) as error:
            reason = first_line(error)
            raise UserError(f"{path}: damaged (its header and tensors don't match: {reason}); make it again") from error
        return predictor.requires_grad_(False).eval()


def _normalise(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales each token to a root mean square of 1: a window's first tokens are hundreds of times larger."""
    return F.rms_norm(hidden.to(dtype), hidden.shape[-1:])


@dataclass(frozen=True, eq=False)  # compared by identity: torch.compile compares callables
class LayerPredictor:
    """One layer of a `Predictor`."""

    weights: dict[str, Tensor]  # the bottleneck's, by name
    scores: LayerScores | None  # the low-bit copy's

    def __call__(self, site: str, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """FFN inputs [n, E] → logits [n, K or D], and the correction [n, E] or None."""
        weights, correction = self.weights, None
        if "reduce" in weights:
            normalised = _normalise(hidden, weights["reduce"].dtype)
            inner = F.silu(torch.addmm(weights["reduce_bias"], normalised, weights["reduce"]))
        if "correct" in weights:
            correction = torch.addmm(weights["correct_bias"], inner, weights["correct"])
        if self.scores is not None:
            return self.scores(hidden), correction
        if f"expand.{site}" not in weights:  # the form `correction`
            return hidden.new_zeros(len(hidden), 0), correction
        return torch.addmm(weights[f"expand_bias.{site}"], inner, weights[f"expand.{site}"]), correction
