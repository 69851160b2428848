"""Makes a Hugging Face model run its FFNs under an arm's masks: `sparsify` and `restore`.

A mask multiplies what was computed, which is what an arm costs in quality, or says what is computed at all (`sparse_ffns.py`). Shape letters: n tokens,
E hidden size, D neurons at a site.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from apc.arms import Arm, Choice, Tokens, make_arm
from apc.codebook import Codebook
from apc.errors import UserError
from apc.models import FFNHooks, GatedFFN, find_ffns, home_of
from apc.patterns import Importance
from apc.predictor import Predictor
from apc.sparse_ffns import SparseFFNs


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


def sparsify(
    model: nn.Module, codebook: Codebook, predictor: Predictor | None = None, arm: str = "oracle", seed: int = 0, kernel: str | None = None,
    dense_above: float | None = None,
) -> nn.Module:  # fmt: skip
    """The model, changed in place so that its FFNs run under the arm's masks; `restore` takes that back.

    Args:
        codebook, predictor: as `Codebook.load` and `Predictor.load` give them; moved to the model's device.
        arm: dense, exact, static, random, oracle, thresholded-oracle, predicted, soft, gate, neuron-predictor or neuron-threshold.
        seed: what the arm `random` draws its masks from.
        kernel: None: masks multiply what was computed, which shows quality. Else FFNs read only what is kept: by Triton kernels (`triton`), by `torch`,
            or `auto`, by kernels where the model is on an NVIDIA GPU. For arms that know their masks before the FFN runs.
        dense_above: with a kernel, how many tokens in a call run sparse at most; FFNs of more run dense, as in prefill. None: with `auto` on a GPU what
            is measured there (0 if sparse is never faster, as in small models), else what the kernels take at once, with `torch` 1. math.inf: all run sparse.

    Raises:
        UserError: the shapes are another model's, the arm is unknown, its predictor is missing, or no kernel takes it.
    """
    ffns = find_ffns(model)
    check_fits(ffns, codebook, predictor)
    device = home_of(ffns)
    if kernel is not None and any(ffn.down.weight.device != device for ffn in ffns):
        raise UserError(f"kernel={kernel}: the model's layers lie on several devices, which kernels do not take; leave kernel out")
    by_kernels = kernel is not None and predictor is not None and (arm == "predicted" or predictor.low_bit is not None)
    if not by_kernels:  # which take along what they need, and no profiles
        codebook, predictor = codebook.to(device), predictor.to(device) if predictor is not None else None
    chosen = None if arm == "dense" else make_arm(arm, codebook, predictor, seed)
    restore(model)
    if chosen is not None and kernel is None:
        model._apc_hooks = MaskedForward(ffns, chosen).hook()
    elif chosen is not None:
        model._apc_hooks = SparseFFNs(ffns, chosen, kernel, dense_above).install()
    return model


def restore(model: nn.Module) -> nn.Module:
    """The model as it was before `sparsify`; does nothing to one that wasn't changed."""
    hooks = model.__dict__.pop("_apc_hooks", None)
    if hooks is not None:
        hooks.remove()
    return model
