"""The base class of mask policies. A policy decides which neurons of an FFN each token keeps, and states the cost.

A policy is one class that owns every fact about itself: what it needs, what it reads and computes, which kernel runs
it, and how figures draw it.

Shape letters: n tokens, E hidden size, D neurons at a site, K clusters.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook
from apc.collect.patterns import Importance
from apc.predict.predictor import Predictor


@dataclass
class MaskInputs:
    """What a policy may read to choose the masks of n tokens at one site of one layer.

    values: activations at the site, [n, D]; inputs: FFN inputs [n, E] by layer, of this layer and as many before it as
    the predictor looks ahead; measure: computes importances; gate: act(gate) [n, D] for a policy with `reads_gate`.
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
        """Each neuron's importance, float32 [n, D]; NaN counts as 0, so that the broken pass ends with a NaN loss."""
        return self.measure(self.layer, self.site, self.values).nan_to_num_(nan=0.0)

    @cached_property
    def active(self) -> Tensor:
        """Which neurons are active, bool [n, D]."""
        return self.codebook.rule.active(self.layer, self.site, self.importance)

    @cached_property
    def energy(self) -> Tensor:
        """Each neuron's energy, the square of its importance, float32 [n, D]."""
        return self.importance.square()

    def captured(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of each token's importance and energy that a mask captures, float32 [n] each.

        kept: the mask as numbers, float32 [n, D].
        """
        tiny = torch.finfo(torch.float32).tiny
        importance, energy = (
            torch.linalg.vecdot(weights, kept) / weights.sum(-1).clamp_min(tiny)
            for weights in (self.importance, self.energy)
        )
        return importance, energy


@dataclass(frozen=True)
class MaskDecision:
    """A policy's decision for n tokens.

    mask: bool [n, D], or [1, D] for all tokens; True keeps a neuron.
    output_delta: added to the FFN's output, [n, E], [E] or None.
    """

    mask: Tensor
    output_delta: Tensor | None = None


@dataclass(frozen=True)
class PolicyCost:
    """Cost of one token in one FFN, averaged over layers.

    bits: information in the choice of the mask; bytes_share, flops_share: bytes read and multiplications, as fractions
    of the dense FFN's.
    """

    bits: float
    bytes_share: float
    flops_share: float


class MaskPolicy:
    """Decides masks. A subclass states its facts as class attributes and overrides `mask`, or `decide`.

    codebook, predictor: as `Codebook.load` and `Predictor.load` return them; seed: of masks that are drawn at random.
    """

    name: ClassVar[str] = ""  # its name in `policies=[…]`, tables and results.json
    by_default: ClassVar[bool] = False  # it is evaluated if `policies` is not given
    is_bound: ClassVar[bool] = False  # it reads the token's own activations: a bound, not a method to use
    reads_gate: ClassVar[bool] = False  # it reads the gate projection of all neurons first
    uses_codebook: ClassVar[bool] = True  # its results depend on the codebook
    over_clusters: ClassVar[bool] = False  # its masks are made from clusters, so K matters
    by_cluster: ClassVar[bool] = False  # its mask is the centroid of one cluster, a choice of log₂ K bits
    same_for_all: ClassVar[bool] = False  # it has one mask for all tokens
    forms: ClassVar[tuple[str, ...]] = ()  # the forms of predictor that it can use; empty: it needs no predictor
    sites: ClassVar[tuple[str, ...]] = ()  # the only sites where it works; empty: it works at any site
    tunable: ClassVar[bool] = False  # `tune.policy` may name it
    tuned_as: ClassVar[str | None] = None  # the policy whose tuning it uses, if not its own
    monitored: ClassVar[bool] = False  # it is measured on held-out text while its predictor trains
    gap_to: ClassVar[str | None] = None  # the policy that tables compare it with: the gap is in nats per token
    color: ClassVar[str] = "#332288"  # its colour in figures
    marker: ClassVar[str] = "p"  # its marker in figures
    wide_line: ClassVar[bool] = False  # figures draw it as a wide pale line below a line that coincides with it

    def __init__(self, codebook: Codebook, predictor: Predictor | None, seed: int):
        self.codebook, self.predictor, self.seed = codebook, predictor, seed

    @classmethod
    def missing(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        """Why the policy can't run with this codebook and predictor; None if it can."""
        if cls.sites and not set(codebook.sites) <= set(cls.sites):
            return f"needs the site {' or '.join(cls.sites)}"
        if not cls.forms:
            return None
        if predictor is None:
            return "no predictor was given"
        if predictor.form not in cls.forms:
            return f"needs a predictor of form {' or '.join(cls.forms)}, this one's is {predictor.form}"
        return None

    @classmethod
    def known_before_ffn(cls) -> bool:
        """Whether the mask is known before the FFN runs: only then can a kernel skip neurons."""
        return not cls.is_bound and not cls.reads_gate

    @property
    def kernel(self) -> str | None:
        """The kind of sparse FFN that runs it: cluster, low-bit or masks (see `apc.sparse.sparse_ffn`); None: none."""
        return "masks" if self.known_before_ffn() else None

    @property
    def changes_output(self) -> bool:
        """Whether its decisions may have an output delta."""
        return False

    @property
    def lookahead(self) -> int:
        """How many layers ahead its predictor looks; 0 without a predictor."""
        return 0 if self.predictor is None else self.predictor.lookahead

    def to(self, device: torch.device) -> "MaskPolicy":
        """Itself, with codebook and predictor moved to the device."""
        self.codebook = self.codebook.to(device)
        self.predictor = self.predictor if self.predictor is None else self.predictor.to(device)
        return self

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The decision for some tokens; by default `mask`, and nothing added to the output."""
        return MaskDecision(self.mask(inputs))

    def mask(self, inputs: MaskInputs) -> Tensor:
        """The neurons to keep, bool [n, D], or [1, D] for all tokens."""
        raise NotImplementedError

    def size(self, inputs: MaskInputs) -> int:
        """How many neurons a mask of fixed size keeps in this layer."""
        return self.codebook.size(inputs.site, inputs.layer)

    def choice_bits(self, site: str, densities: list[float]) -> float:
        """Information in the choice of a mask at a site, in bits per token, averaged over layers.

        densities: the fraction of neurons that the masks of each layer keep.
        """
        if self.by_cluster:
            return math.log2(self.codebook.k)
        if self.same_for_all:
            return 0.0
        D = self.codebook.widths[site]
        return sum(_log2_masks(D, density) for density in densities) / len(densities)

    def parameters_read(self, site: str) -> float:
        """Parameters of 16 bits that one layer reads for one token, beside the FFN rows that the mask keeps."""
        return 0.0

    def multiplications(self, site: str) -> float:
        """Multiplications that one layer computes for one token, beside those with the FFN rows that the mask keeps."""
        return 0.0

    def cost(self, densities: dict[str, list[float]]) -> PolicyCost:
        """Cost of masks that keep these fractions of the neurons, by site and layer.

        bytes_share counts the kept FFN rows and `parameters_read`, flops_share the kept rows and `multiplications`,
        both over the dense FFN's 3·E·D parameters. A mask at `neuron` saves rows of all three projections; a mask at
        gate, up or down saves rows of that projection.
        """
        book = self.codebook
        dense = 3 * book.hidden_size * book.ffn_width
        bits, read, computed, kept = 0.0, 0.0, 0.0, 1.0
        for site in book.widths:
            density = sum(densities[site]) / len(densities[site])
            projections = 3 if site == "neuron" else 1
            kept -= (projections - self.reads_gate) * (1 - density) / 3
            bits += self.choice_bits(site, densities[site])
            read += self.parameters_read(site)
            computed += self.multiplications(site)
        return PolicyCost(bits, kept + read / dense, kept + computed / dense)


def _log2_masks(D: int, density: float) -> float:
    """log₂ of the number of masks that keep this fraction of D neurons."""
    m = min(D, max(0, round(density * D)))
    return (math.lgamma(D + 1) - math.lgamma(m + 1) - math.lgamma(D - m + 1)) / math.log(2)


class ClusterPolicy(MaskPolicy):
    """A policy that chooses a cluster for each token and takes the cluster's centroid as the mask."""

    over_clusters = True
    by_cluster = True

    @property
    def changes_output(self) -> bool:
        """Whether the clusters have offsets."""
        return any(book.offsets is not None for book in self.codebook.sites.values())

    def from_clusters(self, inputs: MaskInputs, ids: Tensor) -> MaskDecision:
        """The decision for tokens of these clusters, int64 [n]."""
        book, group = self.codebook.sites[inputs.site], self.codebook.group(inputs.layer)
        mask = ops.unpack(book.centroids[group, ids], inputs.values.shape[-1])
        return MaskDecision(mask, None if book.offsets is None else book.offsets[group, ids])

    def parameters_read(self, site: str) -> float:
        """The centroid, at one bit a neuron, and the offset."""
        centroid = self.codebook.widths[site] / 16
        offset = self.codebook.hidden_size if self.codebook.sites[site].offsets is not None else 0
        return centroid + offset + super().parameters_read(site)


class PredictorPolicy(MaskPolicy):
    """A policy that asks a predictor before the FFN runs."""

    forms: ClassVar[tuple[str, ...]] = ("cluster",)
    predictor: Predictor

    @property
    def changes_output(self) -> bool:
        """Whether the predictor corrects outputs, or the clusters have offsets."""
        return self.predictor.corrects or super().changes_output

    def outputs(self, inputs: MaskInputs) -> tuple[Tensor, Tensor | None]:
        """The predictor's logits float32 [n, K or D], and its correction of the FFN's output, [n, E] or None."""
        hidden = inputs.inputs[self.predictor.source_layer(inputs.layer)].nan_to_num(nan=0.0)
        logits, correction = self.predictor.layer_outputs(inputs.layer, inputs.site, hidden)
        return logits.float(), correction

    def parameters_read(self, site: str) -> float:
        """The predictor's parameters, and a chosen cluster's."""
        return self.predictor.parameters_read(site) + super().parameters_read(site)

    def multiplications(self, site: str) -> float:
        """The predictor's multiplications."""
        return self.predictor.multiplications(site) + super().multiplications(site)


def add_deltas(*parts: Tensor | None) -> Tensor | None:
    """The sum of the parts that are not None; None if all are None."""
    deltas = [part for part in parts if part is not None]
    return sum(deltas[1:], start=deltas[0]) if deltas else None
