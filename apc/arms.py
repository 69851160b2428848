"""Arms: where the mask of a token's FFN comes from. Shape letters: n tokens, E hidden size, D neurons at a site, K clusters."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from apc import ops
from apc.codebook import Codebook
from apc.errors import UserError
from apc.patterns import Importance, quantise
from apc.predictor import Predictor


@dataclass
class Tokens:
    """What an arm may look at to choose the masks of some tokens at one site of one layer.

    values [n, D] at the site; inputs: FFN inputs [n, E] of this layer and those before it; gate: act(gate) [n, D] if it was asked for.
    """

    layer: int
    site: str
    values: Tensor
    inputs: dict[int, Tensor]
    codebook: Codebook
    measure: Importance
    gate: Tensor | None = None

    @cached_property
    def importance(self) -> Tensor:
        """float32 [n, D]; NaN counts as 0, so that a forward pass that breaks down ends with a loss that says so"""
        return self.measure(self.layer, self.site, self.values).nan_to_num_(nan=0.0)

    @cached_property
    def active(self) -> Tensor:
        """bool [n, D]"""
        return self.codebook.rule.active(self.layer, self.site, self.importance)

    @cached_property
    def energy(self) -> Tensor:
        """float32 [n, D], the square of the importance"""
        return self.importance.square()

    def captured(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of each token's importance and of its energy that a mask keeps, float32 [n] each; kept: the mask as float32 [n, D]."""
        tiny = torch.finfo(torch.float32).tiny
        return tuple(torch.linalg.vecdot(weights, kept) / weights.sum(-1).clamp_min(tiny) for weights in (self.importance, self.energy))


@dataclass(frozen=True)
class Choice:
    """What an arm does with some tokens: mask bool [n, D] (or [1, D], the same for all), True where a neuron is kept; added, to the FFN's output:
    [n, E], [E] or None."""

    mask: Tensor
    added: Tensor | None = None


class Arm:
    """Chooses masks. Subclasses say what they need, and whether finding the mask already takes the token's own activations."""

    name = ""
    excludes_finding = False
    reads_gate = False

    def __init__(self, codebook: Codebook, predictor: Predictor | None, seed: int):
        self.codebook, self.predictor, self.seed = codebook, predictor, seed

    @classmethod
    def missing(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        """Why this arm can't run with what there is; None if it can."""
        return None

    @property
    def adds(self) -> bool:
        """Whether its choices add to FFN outputs."""
        return False

    def choose(self, tokens: Tokens) -> Choice:
        return Choice(self.mask(tokens))

    def mask(self, tokens: Tokens) -> Tensor:
        """bool [n, D] (or [1, D], the same for all), True where a neuron is kept."""
        raise NotImplementedError  # every arm below gives its own

    def size(self, tokens: Tokens) -> int:
        """Ones in a mask of fixed density."""
        return self.codebook.size(tokens.site, tokens.layer)


class Exact(Arm):
    """The token's own active neurons."""

    name = "exact"
    excludes_finding = True

    def mask(self, tokens: Tokens) -> Tensor:
        return tokens.active


class Static(Arm):
    """One mask for each layer: the neurons that captured most over the fit text."""

    name = "static"

    def mask(self, tokens: Tokens) -> Tensor:
        return ops.unpack(self.codebook.sites[tokens.site].static[tokens.layer : tokens.layer + 1], tokens.values.shape[-1])


class Random(Arm):
    """One mask for each layer and site, drawn from the seed."""

    name = "random"

    def mask(self, tokens: Tokens) -> Tensor:
        place = tokens.layer, tokens.site, tokens.values.device
        if place not in self._drawn:  # once: a CUDA graph can't copy it from the host each time
            self._drawn[place] = self._draw(tokens)
        return self._drawn[place]

    @cached_property
    def _drawn(self) -> dict[tuple, Tensor]:
        return {}

    def _draw(self, tokens: Tokens) -> Tensor:
        D = tokens.values.shape[-1]
        site = list(self.codebook.sites).index(tokens.site)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + tokens.layer * len(self.codebook.sites) + site)
        mask = torch.zeros(1, D, dtype=torch.bool)
        mask[0, torch.randperm(D, generator=generator)[: ops.mask_size(D, self.codebook.density)]] = True
        return mask.to(tokens.values.device)


class _ByCluster(Arm):
    """Arms that choose a cluster, and take its centroid for the mask."""

    @property
    def adds(self) -> bool:
        return any(book.offsets is not None for book in self.codebook.sites.values())

    def by_cluster(self, tokens: Tokens, ids: Tensor) -> Choice:
        """The choice of clusters int64 [n]."""
        book, group = self.codebook.sites[tokens.site], self.codebook.group(tokens.layer)
        mask = ops.unpack(book.centroids[group, ids], tokens.values.shape[-1])
        return Choice(mask, None if book.offsets is None else book.offsets[group, ids])


class Oracle(_ByCluster):
    """The nearest centroid (by the distance that the codebook was made with), found from the token's own activations."""

    name = "oracle"
    excludes_finding = True

    def choose(self, tokens: Tokens) -> Choice:
        centroids = self.codebook.sites[tokens.site].centroids[self.codebook.group(tokens.layer)]
        rows = quantise(tokens.importance)[0] if self.codebook.power else ops.pack(tokens.active)
        return self.by_cluster(tokens, self.codebook.nearest(rows, centroids))


class ThresholdedOracle(Oracle):
    """Of the token's own active neurons those that its nearest centroid keeps (how the paper scores)."""

    name = "thresholded-oracle"

    def choose(self, tokens: Tokens) -> Choice:
        nearest = super().choose(tokens)
        return replace(nearest, mask=nearest.mask & tokens.active)


def _sum(*parts: Tensor | None) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return sum(found[1:], start=found[0]) if found else None


class _NeedsPredictor(Arm):
    forms = ("cluster",)

    @classmethod
    def missing(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        if predictor is None:
            return "no predictor was given"
        if predictor.form not in cls.forms:
            return f"needs a predictor of form {' or '.join(cls.forms)}, this one's is {predictor.form}"
        return None

    @property
    def adds(self) -> bool:
        return self.predictor.corrects or super().adds

    def outputs(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """Logits float32 [n, K or D], and what the predictor itself adds to the FFN's output, [n, E] or None."""
        hidden = tokens.inputs[self.predictor.source_layer(tokens.layer)].nan_to_num(nan=0.0)
        logits, correction = self.predictor.layer_outputs(tokens.layer, tokens.site, hidden)
        return logits.float(), correction


class Predicted(_NeedsPredictor, _ByCluster):
    """The centroid of the likeliest cluster, known before the FFN runs."""

    name = "predicted"

    def choose(self, tokens: Tokens) -> Choice:
        logits, correction = self.outputs(tokens)
        chosen = self.by_cluster(tokens, logits.argmax(-1))
        return replace(chosen, added=_sum(chosen.added, correction))


class Soft(_NeedsPredictor, _ByCluster):
    """The top share of the profiles mixed by the predicted probabilities, known before the FFN runs."""

    name = "soft"

    def choose(self, tokens: Tokens) -> Choice:
        book, group = self.codebook.sites[tokens.site], self.codebook.group(tokens.layer)
        logits, correction = self.outputs(tokens)
        shares = logits.softmax(-1)
        mask = ops.top_mask(shares @ book.profiles[group].float(), self.size(tokens), check=False)
        return Choice(mask, _sum(correction, None if book.offsets is None else shares @ book.offsets[group]))


class NeuronPredictor(_NeedsPredictor):
    """The top share of scores predicted neuron by neuron: by a bottleneck (the form of Deja Vu, Liu et al., 2023), or a low-bit copy of gate and up."""

    name = "neuron-predictor"
    forms = ("neuron", "low-bit")

    def choose(self, tokens: Tokens) -> Choice:
        scores, correction = self.outputs(tokens)
        return Choice(ops.top_mask(scores, self.size(tokens), check=False), correction)


class NeuronThreshold(_NeedsPredictor):
    """The neurons whose score, as `neuron-predictor` has it, reaches the layer's threshold: tokens keep as many as they need, in the mean over the fit text
    as many as a mask of fixed size."""

    name = "neuron-threshold"
    forms = ("neuron", "low-bit")

    @classmethod
    def missing(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        found = super().missing(codebook, predictor)
        return found or (None if predictor.thresholds is not None else "the predictor has no thresholds; train it again")

    def choose(self, tokens: Tokens) -> Choice:
        scores, correction = self.outputs(tokens)
        return Choice(scores >= self.predictor.thresholds[tokens.layer], correction)


class Gate(Arm):
    """The top share by |act(gate)| (the rule of CATS, Lee et al., 2024): the gate runs in full, up and down are masked."""

    name = "gate"
    reads_gate = True

    @classmethod
    def missing(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        return None if list(codebook.sites) == ["neuron"] else "needs the site neuron"

    def mask(self, tokens: Tokens) -> Tensor:
        return ops.top_mask(tokens.gate.float().abs(), self.size(tokens), check=False)


class KeepAll(Arm):
    """The dense FFN, as an arm whose masks keep every neuron: what the others are measured beside."""

    name = "dense"

    def mask(self, tokens: Tokens) -> Tensor:
        return torch.ones(1, tokens.values.shape[-1], dtype=torch.bool, device=tokens.values.device)


ARMS = {arm.name: arm for arm in (Exact, Static, Random, Oracle, ThresholdedOracle, Predicted, Soft, Gate, NeuronPredictor, NeuronThreshold)}


def make_arm(name: str, codebook: Codebook, predictor: Predictor | None, seed: int = 0) -> Arm:
    """Raises UserError for an unknown arm, or one whose inputs are missing."""
    if name not in ARMS:
        raise UserError(f"arm {name}: unknown; choose dense, {', '.join(ARMS)}")
    problem = ARMS[name].missing(codebook, predictor)
    if problem:
        raise UserError(f"arm {name}: {problem}")
    return ARMS[name](codebook, predictor, seed)
