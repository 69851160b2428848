"""What a mask policy is: it decides which neurons of an FFN each token keeps, and states what that costs.

A policy is one class. It owns every fact about itself: what it needs, what it reads and computes, which kernel runs it,
and how it looks in a figure. Shape letters: n tokens, E hidden size, D neurons at a site, K clusters.
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
    """What a policy may look at for some tokens at one site of one layer.

    values [n, D] at the site; inputs: FFN inputs [n, E] of this layer and those before it, by layer; gate: act(gate)
    [n, D] for a policy with `reads_gate`.
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
        """float32 [n, D]. NaN counts as 0, so that a forward pass that breaks down ends with a loss that says so."""
        return self.measure(self.layer, self.site, self.values).nan_to_num_(nan=0.0)

    @cached_property
    def active(self) -> Tensor:
        """bool [n, D]"""
        return self.codebook.rule.active(self.layer, self.site, self.importance)

    @cached_property
    def energy(self) -> Tensor:
        """float32 [n, D], the square of the importance."""
        return self.importance.square()

    def captured(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of each token's importance and energy that a mask keeps, float32 [n] each; kept: float32 [n, D]."""
        tiny = torch.finfo(torch.float32).tiny
        importance, energy = (
            torch.linalg.vecdot(weights, kept) / weights.sum(-1).clamp_min(tiny)
            for weights in (self.importance, self.energy)
        )
        return importance, energy


@dataclass(frozen=True)
class MaskDecision:
    """What a policy does with some tokens.

    mask: bool [n, D], or [1, D] for all tokens; True keeps a neuron. output_delta: added to the FFN's output, [n, E], [E]
    or None.
    """

    mask: Tensor
    output_delta: Tensor | None = None


@dataclass(frozen=True)
class PolicyCost:
    """Cost of one token in one FFN, averaged over layers.

    bits: information in the choice of a mask; bytes_share, flops_share: what is read and computed, as shares of the
    dense FFN's.
    """

    bits: float
    bytes_share: float
    flops_share: float


class MaskPolicy:
    """Decides masks. A subclass gives its facts as class attributes and overrides `decide`, or `mask` alone."""

    name: ClassVar[str] = ""  # in `policies=[…]`, tables and results.json
    by_default: ClassVar[bool] = False  # evaluated where `policies` is not given
    is_bound: ClassVar[bool] = False  # needs the token's own activations: a bound, not a method
    reads_gate: ClassVar[bool] = False  # needs the whole gate projection first
    uses_codebook: ClassVar[bool] = True  # its figures depend on the codebook
    over_clusters: ClassVar[bool] = False  # its masks come from clusters
    by_cluster: ClassVar[bool] = False  # its mask is one cluster's centroid, chosen by log₂ K bits
    same_for_all: ClassVar[bool] = False  # one mask for all tokens
    forms: ClassVar[tuple[str, ...]] = ()  # forms of predictor that it can use; none: it needs no predictor
    sites: ClassVar[tuple[str, ...]] = ()  # the only sites that it works at; none: any
    tunable: ClassVar[bool] = False  # `tune.policy` may name it
    tuned_as: ClassVar[str | None] = None  # uses what is tuned for this other policy
    monitored: ClassVar[bool] = False  # measured on held-out text while its predictor trains
    gap_to: ClassVar[str | None] = None  # tables show how much worse it is than this one, in nats
    color: ClassVar[str] = "#332288"  # in figures
    marker: ClassVar[str] = "p"
    wide_line: ClassVar[bool] = False  # drawn as a wide pale line, under another that it coincides with

    def __init__(self, codebook: Codebook, predictor: Predictor | None, seed: int):
        self.codebook, self.predictor, self.seed = codebook, predictor, seed

    @classmethod
    def missing(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        """Why the policy can't run with these; None if it can."""
        if cls.sites and not set(codebook.sites) <= set(cls.sites):
            return f"needs the site {' or '.join(cls.sites)}"
        if cls.forms and predictor is None:
            return "no predictor was given"
        if cls.forms and predictor.form not in cls.forms:
            return f"needs a predictor of form {' or '.join(cls.forms)}, this one's is {predictor.form}"
        return None

    @classmethod
    def known_before_ffn(cls) -> bool:
        """Whether the mask is known before the FFN runs, so that a kernel can skip what it drops."""
        return not cls.is_bound and not cls.reads_gate

    @property
    def kernel(self) -> str | None:
        """Which FFN runs it (see `apc.sparse.sparse_ffn`): cluster, low-bit or masks; None: none can."""
        return "masks" if self.known_before_ffn() else None

    @property
    def changes_output(self) -> bool:
        """Whether its decisions add to FFN outputs."""
        return False

    def to(self, device: torch.device) -> "MaskPolicy":
        """Itself, with codebook and predictor on the device."""
        self.codebook = self.codebook.to(device)
        self.predictor = self.predictor if self.predictor is None else self.predictor.to(device)
        return self

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        return MaskDecision(self.mask(inputs))

    def mask(self, inputs: MaskInputs) -> Tensor:
        """bool [n, D], or [1, D] for all tokens."""
        raise NotImplementedError

    def size(self, inputs: MaskInputs) -> int:
        """Neurons in a mask of fixed density."""
        return self.codebook.size(inputs.site, inputs.layer)

    # What one token costs. Each policy states what it reads and computes beside the FFN rows that it keeps.

    def choice_bits(self, site: str, densities: list[float]) -> float:
        """Information in the choice of a mask at a site, per token and layer; densities: of its masks, by layer."""
        if self.by_cluster:
            return math.log2(self.codebook.k)
        if self.same_for_all:
            return 0.0
        D = self.codebook.widths[site]
        return sum(_log2_masks(D, density) for density in densities) / len(densities)

    def parameters_read(self, site: str) -> float:
        """Parameters of 16 bits that one layer reads to find the mask, and to add to the output."""
        return self.predictor.parameters_read(site) if self.forms else 0.0

    def multiplications(self, site: str) -> float:
        """Products that one layer computes for the same."""
        return self.predictor.multiplications(site) if self.forms else 0.0

    def cost(self, densities: dict[str, list[float]]) -> PolicyCost:
        """Cost of masks with these densities, at each site of each layer.

        Read are the FFN rows kept and `parameters_read`, at 16 bits a parameter, over the dense FFN's 3·E·D. At `neuron`
        one mask saves rows of all three projections; at gate, up and down each mask saves its own.
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
    """log₂ of the number of masks of this density over D neurons."""
    m = min(D, max(0, round(density * D)))
    return (math.lgamma(D + 1) - math.lgamma(m + 1) - math.lgamma(D - m + 1)) / math.log(2)


class ClusterPolicy(MaskPolicy):
    """A policy that chooses a cluster and takes its centroid for the mask."""

    over_clusters = True
    by_cluster = True

    @property
    def changes_output(self) -> bool:
        return any(book.offsets is not None for book in self.codebook.sites.values())

    def from_clusters(self, inputs: MaskInputs, ids: Tensor) -> MaskDecision:
        """The decision of clusters int64 [n]."""
        book, group = self.codebook.sites[inputs.site], self.codebook.group(inputs.layer)
        mask = ops.unpack(book.centroids[group, ids], inputs.values.shape[-1])
        return MaskDecision(mask, None if book.offsets is None else book.offsets[group, ids])

    def parameters_read(self, site: str) -> float:
        centroid = self.codebook.widths[site] / 16
        offset = self.codebook.hidden_size if self.codebook.sites[site].offsets is not None else 0
        return centroid + offset + super().parameters_read(site)


class PredictorPolicy(MaskPolicy):
    """A policy that asks a predictor before the FFN runs."""

    forms = ("cluster",)

    @property
    def changes_output(self) -> bool:
        return self.predictor.corrects or super().changes_output

    def outputs(self, inputs: MaskInputs) -> tuple[Tensor, Tensor | None]:
        """Logits float32 [n, K or D], and the predictor's correction of the FFN's output, [n, E] or None."""
        hidden = inputs.inputs[self.predictor.source_layer(inputs.layer)].nan_to_num(nan=0.0)
        logits, correction = self.predictor.layer_outputs(inputs.layer, inputs.site, hidden)
        return logits.float(), correction


def add_deltas(*parts: Tensor | None) -> Tensor | None:
    """The sum of those that are not None; None if all are."""
    found = [part for part in parts if part is not None]
    return sum(found[1:], start=found[0]) if found else None
