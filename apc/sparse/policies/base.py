"""The base class of mask policies. A policy decides which neurons of an FFN each token keeps, and states the cost.

Shape letters: n tokens, E hidden size, D neurons at a site, K clusters.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from apc import ops
from apc.cluster.codebook import Codebook
from apc.collect.patterns import Importance, quantise
from apc.config.schema import StagesConfig
from apc.data.ffn import FFN
from apc.data.hooks import FFNVisitor
from apc.data.quantise import FULL_BITS
from apc.predict.predictor import Predictor

PEER_COLOR = "#767676"  # figures draw the rules of other authors grey


@dataclass
class MaskInputs:
    """What a policy may read to choose the masks of n tokens at one site of one layer."""

    layer: int
    site: str
    values: Tensor  # activations at the site, [n, D]
    inputs: dict[int, Tensor]  # FFN inputs [n, E], of this layer and as many before it as the predictor looks ahead
    codebook: Codebook
    measure: Importance
    ffn: FFN
    gate: Tensor | None = None  # act(gate) [n, D] for a policy with `sees_gate`
    tokens: Tensor | None = None  # int64 [n], the tokens' places in the forward pass; None: all tokens of it

    def some(self, places: Tensor) -> "MaskInputs":
        """The same for the tokens at these places, int64 [m]."""
        inputs = {layer: hidden[places] for layer, hidden in self.inputs.items()}
        gate = None if self.gate is None else self.gate[places]
        tokens = places if self.tokens is None else self.tokens[places]
        return replace(self, values=self.values[places], inputs=inputs, gate=gate, tokens=tokens)

    @cached_property
    def importance(self) -> Tensor:
        """Each neuron's importance, float32 [n, D].

        NaN counts as 0, so that masks can still be chosen; the NaN then shows in the loss.
        """
        return self.measure(self.layer, self.site, self.values).nan_to_num_(nan=0.0)

    @cached_property
    def active(self) -> Tensor:
        """Which neurons are active, bool [n, D]."""
        return self.codebook.rule.active(self.layer, self.site, self.importance)

    @cached_property
    def energy(self) -> Tensor:
        """Each neuron's energy, the square of its importance, float32 [n, D]."""
        return self.importance.square()

    @cached_property
    def totals(self) -> tuple[Tensor, Tensor]:
        """The sums of importance and energy over neurons, above 0, float32 [n] each."""
        tiny = torch.finfo(torch.float32).tiny
        return self.importance.sum(-1).clamp_min(tiny), self.energy.sum(-1).clamp_min(tiny)

    def captured(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of importance and energy that a mask float32 [n, D] captures, float32 [n] each."""
        importance, energy = (torch.linalg.vecdot(each, kept) for each in (self.importance, self.energy))
        return importance / self.totals[0], energy / self.totals[1]


@dataclass(frozen=True)
class MaskDecision:
    """A policy's decision for n tokens.

    read: which weights of a projection (gate, up, down) are read, if not those that `mask` keeps: bool over the
    projection's rows or columns, [n, …], or [1, …] for all tokens. Costs use its mean. Under `copy`: at which inputs a
    low-bit copy is read, if not at all of them, bool [n, E].
    bits: the bits that are read of a projection's weights, if not all stored bits of the weights that are read: float32
    over its rows, likewise.
    """

    mask: Tensor  # bool [n, D], or [1, D] for all tokens; True keeps a neuron
    output_delta: Tensor | None = None  # added to the FFN's output, [n, E] or [E]
    read: Mapping[str, Tensor] = field(default_factory=dict)
    bits: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyCost:
    """Cost of one token in one FFN, averaged over layers."""

    bits: float  # information in the choice of the mask
    bytes_share: float  # bytes read, as a fraction of the dense FFN's at 16 bits
    flops_share: float  # multiplications, likewise


class Meter(Protocol):
    """Measures decisions, as `apc.evaluate.metrics.MaskMeter` does."""

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        """Adds the decision for some tokens."""


class FitPass(Protocol):
    """The model and a sample of the fit text, on which a policy is calibrated (`apc.tune.calibrate`)."""

    model: nn.Module
    ffns: list[FFN]
    codebook: Codebook  # on the model's device
    predictor: Predictor | None  # likewise
    stages: StagesConfig
    windows: Tensor  # int64 [n, S], the sample; each rank runs its share
    tokens: Tensor  # int64 [t], the tokens of each window that have `output_gradients`

    def run(self, policy: "MaskPolicy", meter: Meter | None = None, whole: bool = False) -> None:
        """Runs the model under the policy over this rank's windows of the sample; the meter gets each decision.

        With the policy `dense` the model stays as it is. What the meter counts must be summed over ranks afterwards.
        whole: every rank runs the whole sample, in one batch.
        """

    def costs(
        self, policy: "MaskPolicy", visit: Callable[[MaskInputs], Tensor]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Runs the dense model over this rank's windows, for a policy whose masks `visit` looks at.

        Yields, for each window and layer, the layer, what `visit` returned there, and the cost of dropping each neuron
        for each token, in nats, float32 [n, D].
        """

    def own_windows(self) -> range:
        """The windows that this rank runs."""

    def visit(self, window: int, visitor: FFNVisitor, sites: list[str]) -> None:
        """Runs one window with a visitor of these sites, without gradients."""

    def residual_update(self, layer: int, output: Tensor) -> Tensor:
        """What outputs [..., E] of a layer's FFN add to the residual stream: behind the norm, if one follows."""

    def output_gradients(self, window: int) -> Tensor:
        """The gradients of a window's loss to each FFN's `residual_update` at `tokens`, float32 [L, t, E].

        The loss is the sum over all tokens of −log p(label), for labels drawn from the model.
        """


class MaskPolicy:
    """Decides masks. A subclass states its facts as class attributes and overrides `mask`, or `decide`."""

    name = ""  # its name in `policies=[…]`, tables and results.json
    by_default = False  # it is evaluated if `policies` is not given; a `calibrated` one only if `bytes` is
    in_sparsify = False  # `sparsify` may choose it if no policy is named; see `default_policy`
    is_bound = False  # it reads the token's own activations: a bound, not a method to use
    sees_gate = False  # it needs act(gate) of all neurons: `MaskInputs.gate`
    masks_input = False  # `input_mask` masks the input of gate and up
    experts = True  # it works in a mixture of experts
    ranks_by_planes = False  # it needs an FFN that is stored at a few bits
    calibrated = False  # it needs `calibrate` on fit text, and keeps to the key `bytes` in place of the density
    staged = False  # it reads gate, up and down in stages: see `apc.sparse.policies.staged`
    uses_codebook = True  # its results depend on the codebook
    over_clusters = False  # its masks are made from clusters, so K matters
    by_cluster = False  # its mask is the centroid of one cluster, a choice of log₂ K bits
    same_for_all = False  # it has one mask for all tokens
    forms: tuple[str, ...] = ()  # the forms of predictor that it can use; empty: it needs no predictor
    corrected = False  # tuning gives it a predictor that only corrects outputs, though it predicts nothing
    sites: tuple[str, ...] = ()  # the only sites where it works; empty: it works at any site
    tunable = False  # `tune.policy` may name it
    tuned_as: str | None = None  # the policy whose tuning it uses, if not its own
    monitored = False  # it is measured on held-out text while its predictor trains
    gap_to: str | None = None  # the policy that tables compare it with: the gap is in nats per token
    is_peer = False  # a rule of other authors, to compare with
    color = "#332288"  # its colour in figures
    marker = "p"  # its marker in figures
    wide_line = False  # figures draw it as a wide pale line below a line that coincides with it

    def __init__(self, codebook: Codebook, predictor: Predictor | None, seed: int):
        self.codebook, self.predictor, self.seed = codebook, predictor, seed

    @classmethod
    def missing(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        """Why the policy can't run with this codebook and predictor; None if it can."""
        reason = cls.unsupported(codebook, predictor)
        if reason is None and cls.calibrated and cls.name not in codebook.calibrated:
            return f"the codebook has no thresholds for it; run train.py with policies=[{cls.name}] again"
        return reason

    @classmethod
    def unsupported(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        """Why the policy can't run, calibrated or not; None if it can."""
        if cls.sites and not set(codebook.sites) <= set(cls.sites):
            return f"needs the site {' or '.join(cls.sites)}"
        if problem := cls.unsupported_ffns(gated=codebook.projections == 3, experts=bool(codebook.experts)):
            return problem
        if not cls.forms:
            return None
        if predictor is None:
            return "no predictor was given"
        if predictor.form not in cls.forms:
            return f"needs a predictor of form {' or '.join(cls.forms)}, this one's is {predictor.form}"
        return None

    @classmethod
    def unsupported_ffns(cls, gated: bool, experts: bool) -> str | None:
        """What the policy needs of the FFNs that these lack; None if nothing. experts: they are a mixture's."""
        if cls.sees_gate and not (gated and (cls.experts or not experts)):
            return "needs FFNs with a gate, outside a mixture of experts"
        return None if cls.experts or not experts else "does not support a mixture of experts"

    @classmethod
    def check_bytes(cls, share: float) -> None:
        """Raises UserError if a `calibrated` policy can't keep to this share of the dense FFN's bytes."""

    @classmethod
    def check_ffns(cls, ffns: list[FFN], share: float) -> None:
        """Raises UserError if a `calibrated` policy can't keep to this share of the bytes of these FFNs as stored."""
        cls.check_bytes(share)

    @classmethod
    def calibrate(cls, fit: FitPass, share: float) -> dict[str, Tensor]:
        """What the policy takes from fit text to read this share of the dense FFN's bytes: tensors [L, …] by name.

        The bytes are those that the FFN is stored in. The codebook keeps the tensors, in `calibrated`. Only for
        policies with `calibrated`.
        """
        raise NotImplementedError

    @classmethod
    def calibrated_bytes(cls, codebook: Codebook) -> int:
        """Bytes of the large tensors among those that `calibrate` returns for a codebook of this shape."""
        return 0

    @classmethod
    def known_before_ffn(cls) -> bool:
        """Whether the mask is known before the FFN runs: then a kernel can skip neurons in all three matrices."""
        return not cls.is_bound and not cls.sees_gate

    @classmethod
    def has_kernel_on(cls, device: str) -> bool:
        """Whether kernels on a device of this type, cuda or cpu, run it; `kernel_by` says if this one's parts fit."""
        return cls.known_before_ffn()

    def kernel_by(self, way: str) -> str | None:
        """The kind of sparse FFN that runs it: cluster, low-bit, masks or stages (see `apc.sparse.sparse_ffn`).

        None: no kernel does. way: one of `apc.ops.sparse_ffn.KERNELS`.
        """
        return "masks" if self.known_before_ffn() else None

    @property
    def changes_output(self) -> bool:
        """Whether its decisions may have an output delta."""
        return False

    @property
    def adds_to_projections(self) -> bool:
        """Whether `projection_delta` adds to the outputs of gate and up."""
        return False

    def projection_delta(self, layer: int, projection: str, hidden: Tensor) -> Tensor:
        """What is added to the output of gate or up, [n, D]; hidden: FFN inputs [n, E], before `input_mask`."""
        raise NotImplementedError

    @property
    def lookahead(self) -> int:
        """How many layers ahead its predictor looks; 0 without a predictor."""
        return 0 if self.predictor is None else self.predictor.lookahead

    def to(self, device: torch.device) -> "MaskPolicy":
        """Itself, with codebook and predictor moved to the device."""
        self.codebook = self.codebook.to(device)
        if self.predictor is not None:
            self.predictor.to(device)
        return self

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The decision for some tokens; by default `mask`, and nothing added to the output."""
        return MaskDecision(self.mask(inputs))

    def mask(self, inputs: MaskInputs) -> Tensor:
        """The neurons to keep, bool [n, D], or [1, D] for all tokens."""
        raise NotImplementedError

    def input_mask(self, layer: int, hidden: Tensor) -> Tensor:
        """Which of the FFN's inputs [n, E] gate and up read, bool [n, E]. Only for policies with `masks_input`."""
        raise NotImplementedError

    def size(self, inputs: MaskInputs) -> int:
        """How many neurons a mask of fixed size keeps in this layer."""
        return self.codebook.size(inputs.site, inputs.layer)

    def choice_bits(self, site: str, densities: list[float]) -> float:
        """Bits per token for the choice of a mask, averaged over layers; densities: the fraction each layer keeps."""
        if self.by_cluster:
            return math.log2(self.codebook.k)
        if self.same_for_all:
            return 0.0
        return subset_bits(self.codebook.widths[site], densities)

    def parameters_read(self, site: str, copy: float | None = None) -> float:
        """16-bit parameters that one layer reads for one token, in addition to the FFN rows that the mask keeps.

        copy: the share of inputs at which a low-bit copy was read; None: the share that it was made for.
        """
        return 0.0

    def multiplications(self, site: str, copy: float | None = None) -> float:
        """Multiplications in one layer for one token, in addition to those with the FFN rows that the mask keeps."""
        return 0.0

    def cost(
        self, densities: dict[str, list[float]], read: Mapping[str, float], bits: Mapping[str, float]
    ) -> PolicyCost:
        """Cost of masks that keep these fractions of the neurons, by site and layer.

        read: the share of each projection's weights that is read, by name; under `copy` that of a low-bit copy's
        inputs, if it was measured. bits: the bits read, per weight of each projection. The share of bytes counts these
        bits and `parameters_read`; the share of FLOPs counts the weights read and `multiplications`. Both are relative
        to the dense FFN's P·E·D weights, at 16 bits, with P = 3 projections, or 2 without a gate.
        """
        P, sites = self.codebook.projections, list(self.codebook.widths)
        dense = P * self.codebook.hidden_size * self.codebook.ffn_width
        copy = {"copy": read["copy"]} if "copy" in read else {}
        kept = sum(share for name, share in read.items() if name != "copy") / P
        choice = sum(self.choice_bits(site, densities[site]) for site in sites)
        added = sum(self.parameters_read(site, **copy) for site in sites)
        computed = sum(self.multiplications(site, **copy) for site in sites)
        return PolicyCost(choice, sum(bits.values()) / (FULL_BITS * P) + added / dense, kept + computed / dense)


class ClusterPolicy(MaskPolicy):
    """A policy that chooses a cluster for each token and takes the cluster's centroid as the mask."""

    over_clusters = True
    by_cluster = True

    @property
    def changes_output(self) -> bool:
        """Whether the clusters have offsets."""
        return any(book.offsets is not None for book in self.codebook.sites.values())

    def clusters(self, inputs: MaskInputs) -> Tensor:
        """The tokens' clusters, int64 [n]."""
        raise NotImplementedError

    def centroids(self, inputs: MaskInputs) -> Tensor:
        """The masks of the layer's clusters, uint8 [K, W]."""
        return self.codebook.sites[inputs.site].centroids[self.codebook.group(inputs.layer)]

    def from_clusters(self, inputs: MaskInputs, ids: Tensor) -> MaskDecision:
        """The decision for tokens of these clusters, int64 [n]."""
        book, group = self.codebook.sites[inputs.site], self.codebook.group(inputs.layer)
        mask = ops.unpack(self.centroids(inputs)[ids], inputs.values.shape[-1])
        return MaskDecision(mask, None if book.offsets is None else book.offsets[group, ids])

    def parameters_read(self, site: str, copy: float | None = None) -> float:
        """The centroid, at one bit a neuron, and the offset."""
        centroid = self.codebook.widths[site] / 16
        offset = self.codebook.hidden_size if self.codebook.sites[site].offsets is not None else 0
        return centroid + offset + super().parameters_read(site)


class PredictorPolicy(MaskPolicy):
    """A policy that asks a predictor before the FFN runs."""

    forms: tuple[str, ...] = ("cluster",)
    predictor: Predictor

    @property
    def changes_output(self) -> bool:
        """Whether the predictor corrects outputs, or the clusters have offsets."""
        return self.predictor.corrects or super().changes_output

    def hidden(self, inputs: MaskInputs) -> Tensor:
        """The FFN inputs that the predictor reads, [n, E]."""
        return inputs.inputs[self.predictor.source_layer(inputs.layer)].nan_to_num(nan=0.0)

    def outputs(self, inputs: MaskInputs) -> tuple[Tensor, Tensor | None]:
        """The predictor's logits float32 [n, K or D], and its correction of the FFN's output, [n, E] or None."""
        logits, correction = self.predictor.layer_outputs(inputs.layer, inputs.site, self.hidden(inputs))
        return logits.float(), correction

    def parameters_read(self, site: str, copy: float | None = None) -> float:
        """The predictor's parameters, and a chosen cluster's."""
        return self.predictor.parameters_read(site, copy) + super().parameters_read(site)

    def multiplications(self, site: str, copy: float | None = None) -> float:
        """The predictor's multiplications."""
        return self.predictor.multiplications(site, copy) + super().multiplications(site)


def subset_bits(D: int, densities: list[float]) -> float:
    """The bits of a choice of these fractions of D neurons, log₂ of the number of such choices, averaged."""
    sizes = [min(D, max(0, round(density * D))) for density in densities]
    nats = [math.lgamma(D + 1) - math.lgamma(m + 1) - math.lgamma(D - m + 1) for m in sizes]  # log of D choose m
    return sum(choice / math.log(2) for choice in nats) / len(nats)


def own_clusters(codebook: Codebook, inputs: MaskInputs, centroids: Tensor) -> Tensor:
    """The nearest of packed centroids uint8 [K, W] to each token's own pattern, int64 [n]."""
    rows = quantise(inputs.importance)[0] if codebook.power else ops.pack(inputs.active)
    return codebook.nearest(rows, centroids)


def add_deltas(*parts: Tensor | None) -> Tensor | None:
    """The sum of the parts that are not None; None if all are None."""
    deltas = [part for part in parts if part is not None]
    return sum(deltas[1:], start=deltas[0]) if deltas else None
