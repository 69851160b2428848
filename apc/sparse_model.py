"""Makes a Hugging Face model run its FFNs under masks: `sparsify` and `restore`, and the arms that say where a mask comes from.

Here a mask multiplies what was computed: this is what an arm costs in quality. Shape letters: n tokens, E hidden size,
D neurons at a site, K clusters.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from apc import ops
from apc.codebook import Codebook
from apc.errors import UserError
from apc.models import FFNHooks, GatedFFN, find_ffns
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
        mask = ops.top_mask(shares @ book.profiles[group].float(), self.size(tokens))
        return Choice(mask, _sum(correction, None if book.offsets is None else shares @ book.offsets[group]))


class NeuronPredictor(_NeedsPredictor):
    """The top share of scores predicted neuron by neuron: by a bottleneck (the form of Deja Vu, Liu et al., 2023), or a low-bit copy of gate and up."""

    name = "neuron-predictor"
    forms = ("neuron", "low-bit")

    def choose(self, tokens: Tokens) -> Choice:
        scores, correction = self.outputs(tokens)
        return Choice(ops.top_mask(scores, self.size(tokens)), correction)


class Gate(Arm):
    """The top share by |act(gate)| (the rule of CATS, Lee et al., 2024): the gate runs in full, up and down are masked."""

    name = "gate"
    reads_gate = True

    @classmethod
    def missing(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        return None if list(codebook.sites) == ["neuron"] else "needs the site neuron"

    def mask(self, tokens: Tokens) -> Tensor:
        return ops.top_mask(tokens.gate.float().abs(), self.size(tokens))


class KeepAll(Arm):
    """The dense FFN, as an arm whose masks keep every neuron: what the others are measured beside."""

    name = "dense"

    def mask(self, tokens: Tokens) -> Tensor:
        return torch.ones(1, tokens.values.shape[-1], dtype=torch.bool, device=tokens.values.device)


ARMS = {arm.name: arm for arm in (Exact, Static, Random, Oracle, ThresholdedOracle, Predicted, Soft, Gate, NeuronPredictor)}


def make_arm(name: str, codebook: Codebook, predictor: Predictor | None, seed: int = 0) -> Arm:
    """Raises UserError for an unknown arm, or one whose inputs are missing."""
    if name not in ARMS:
        raise UserError(f"arm {name}: unknown; choose dense, {', '.join(ARMS)}")
    problem = ARMS[name].missing(codebook, predictor)
    if problem:
        raise UserError(f"arm {name}: {problem}")
    return ARMS[name](codebook, predictor, seed)


@dataclass
class ForwardReader:
    """An `FFNVisitor` that gathers what arms look at; subclasses decide in `see` what to do with it. adds: whether a choice may add to FFN outputs
    (at the site neuron only)."""

    ffns: list[GatedFFN]
    codebook: Codebook
    lookahead: int = 0
    reads_gate: bool = False
    adds: bool = False
    _inputs: dict[int, Tensor] = field(default_factory=dict)
    _added: Tensor | None = None
    _gate: Tensor | None = None

    def __post_init__(self):
        self._measure = Importance(self.ffns)

    def hook(self) -> FFNHooks:
        return FFNHooks(self.ffns, list(self.codebook.sites) + ["gate"] * self.reads_gate + ["down"] * self.adds, self)

    def enter(self, layer: int, hidden: Tensor) -> None:
        if layer == 0:
            self._inputs.clear()
        self._inputs[layer] = hidden.flatten(0, -2)
        if layer - self.lookahead - 1 > 0:
            self._inputs.pop(layer - self.lookahead - 1, None)

    def visit(self, layer: int, site: str, values: Tensor) -> Tensor | None:
        flat = values.flatten(0, -2)
        if site == "gate" and self.reads_gate:
            module = self.ffns[layer].module
            self._gate = getattr(module, "act_fn", None) or module.activation_fn
            self._gate = self._gate(flat)
            return None
        if site == "down" and self.adds:
            return None if self._added is None else (flat + self._added.to(flat.dtype)).view_as(values)
        choice = self.see(Tokens(layer, site, flat, self._inputs, self.codebook, self._measure, self._gate))
        if choice is None:
            return None
        self._added = choice.added
        return self.apply(flat, choice.mask).view_as(values)

    def apply(self, values: Tensor, mask: Tensor) -> Tensor:
        """values [n, D] where mask, bool [n, D] or [1, D], is True, else 0, even in place of NaN."""
        return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))

    def see(self, tokens: Tokens) -> Choice | None:
        raise NotImplementedError  # every reader gives its own


class MaskedForward(ForwardReader):
    """Applies an arm's masks; a meter, if given, gets every mask with what it was measured against."""

    def __init__(self, ffns: list[GatedFFN], arm: Arm, meter=None):
        super().__init__(ffns, arm.codebook, arm.predictor.lookahead if arm.predictor else 0, arm.reads_gate, arm.adds)
        self.arm, self.meter = arm, meter

    def see(self, tokens: Tokens) -> Choice:
        choice = self.arm.choose(tokens)
        if self.meter is not None:
            self.meter.add(tokens, choice.mask)
        return choice


def check_fits(ffns: list[GatedFFN], codebook: Codebook, predictor: Predictor | None) -> None:
    """Raises UserError unless codebook and predictor have the model's shapes."""
    have = dict(layers=len(ffns), hidden_size=ffns[0].hidden_size)
    for what, thing in (("codebook", codebook), ("predictor", predictor)):
        for name, value in have.items() if thing is not None else ():
            if getattr(thing, name) != value:
                raise UserError(f"the {what} is of another model: {name} {getattr(thing, name)}, the model's is {value}; give the one made for it")
    for site, D in codebook.widths.items():
        if ffns[0].site_width(site) != D:
            raise UserError(f"the codebook is of another model: {D} neurons at {site}, the model has {ffns[0].site_width(site)}; give the one made for it")
    if predictor is not None:
        made_for = predictor.provenance.get("codebook")
        if made_for and codebook.provenance and made_for != codebook.provenance:
            raise UserError("the predictor is of another codebook (its provenance says so); give the one made for it")
        expected = {site: codebook.k if predictor.form == "cluster" else D for site, D in codebook.widths.items()}
        if predictor.outputs != expected:
            raise UserError(f"the predictor is of another codebook: it has {predictor.outputs} outputs, the codebook {expected}; give the one made for it")


def sparsify(model: nn.Module, codebook: Codebook, predictor: Predictor | None = None, arm: str = "oracle", seed: int = 0) -> nn.Module:
    """The model, changed in place so that its FFNs run under the arm's masks; `restore` takes that back.

    Args:
        codebook, predictor: as `Codebook.load` and `Predictor.load` give them; moved to the model's device.
        arm: dense, exact, static, random, oracle, thresholded-oracle, predicted, soft, gate or neuron-predictor.
        seed: what the arm `random` draws its masks from.

    Raises:
        UserError: the shapes are another model's, the arm is unknown, or its predictor is missing.
    """
    ffns = find_ffns(model)
    check_fits(ffns, codebook, predictor)
    device = ffns[0].down.weight.device
    moved = predictor.to(device) if predictor is not None else None
    chosen = None if arm == "dense" else make_arm(arm, codebook.to(device), moved, seed)
    restore(model)
    if chosen is not None:
        model._apc_hooks = MaskedForward(ffns, chosen).hook()
    return model


def restore(model: nn.Module) -> nn.Module:
    """The model as it was before `sparsify`; does nothing to one that wasn't changed."""
    hooks = model.__dict__.pop("_apc_hooks", None)
    if hooks is not None:
        hooks.remove()
    return model
