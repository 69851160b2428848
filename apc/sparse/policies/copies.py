"""Prox's rule: an untrained low-bit copy of gate and up, read at a token's largest inputs, ranks the neurons.

Shape letters: n tokens, E hidden size, D neurons, L layers, P projections (gate and up), b bits, W bytes of a packed
row of D bits, G groups of an input's weights.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook
from apc.config.schema import PROJECTIONS
from apc.data.ffn import FFN, LayerFFN, activation_function, first_device
from apc.data.quantise import FULL_BITS, mean_bits
from apc.ops import GROUP
from apc.predict.low_bit import bit_planes, column_norms, level_index, quantised
from apc.predict.predictor import Predictor
from apc.sparse.histogram import ThresholdFinder
from apc.sparse.policies.base import PEER_COLOR, FitPass, MaskDecision, MaskInputs, MaskPolicy
from apc.sparse.policies.bounds import Dense
from apc.utils import distributed
from apc.utils.errors import UserError

BITS = 4  # of a copied weight
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 1.0)  # of inputs, among which the fit text chooses
_UNITS = 1 << 20  # captured shares are summed as integers of these, so that sums over ranks are exact
_MAX_ERROR = 0.03  # relative, of act(gate) * up in 16 bits


class Prox(MaskPolicy):
    """Keeps the neurons with the largest |act(ĝ) · û| · ‖W_down[:, i]‖ (Prox, arXiv 2607.27591).

    ĝ and û are what a 4-bit copy of gate and up gives at the token's largest inputs, those whose |x_i| times the norm
    of column i of gate and up reaches the layer's threshold. Nothing is trained. The copy is stored by input, and each
    input's weights are rounded in groups of neurons, so that skipped inputs save levels and spacings. A neuron is kept
    if its score reaches the layer's threshold.

    Of the bytes to read, the copy takes as many as let the masks capture most importance on the fit text; rows take the
    rest. (Masks differ in size here: captured energy would favour the smaller ones, and perplexity does not.)
    """

    name = "prox"
    is_peer = True
    experts = False
    calibrated = True
    uses_codebook = False
    sites = ("neuron",)
    color, marker = PEER_COLOR, "d"

    def __init__(self, codebook: Codebook, predictor: Predictor | None, seed: int):
        super().__init__(codebook, None, seed)
        self._last: tuple[MaskInputs | None, tuple[Tensor, Tensor] | None] = None, None  # what `copied` returned last

    @classmethod
    def unsupported_ffns(cls, gated: bool, experts: bool) -> str | None:
        """What the policy needs of the FFNs that these lack; None if nothing."""
        return super().unsupported_ffns(gated, experts) or (None if gated else "needs FFNs with a gate")

    @classmethod
    def check_ffns(cls, ffns: list[FFN], share: float) -> None:
        """Raises UserError if the copy alone takes this share of the bytes."""
        least = _copy_bytes(ffns, SHARES[0])
        if share <= least:
            problem = f"its copy takes {least:.1%} of the FFN's bytes at {SHARES[0]:g} of the inputs"
            raise UserError(f"policies: {cls.name}: {problem}, and it may read {share:.1%} in all; raise bytes")

    @classmethod
    def calibrated_bytes(cls, codebook: Codebook) -> int:
        """Bytes of the copy."""
        E, D = codebook.hidden_size, codebook.ffn_width
        levels, spacings = BITS * ops.row_bytes(D), 2 * -(-D // GROUP)
        return codebook.layers * (len(PROJECTIONS) * E * (levels + spacings) + 4 * E)

    @classmethod
    def calibrate(cls, fit: FitPass, share: float) -> dict[str, Tensor]:
        """The copy and its thresholds.

        planes: uint8 [L, b, P, E, W], levels' indices as in `bit_planes`; spacings: bfloat16 [L, P, E, G]; norms:
        float32 [L, E], as in `column_norms`; inputs, scores: float32 [L], the thresholds; shares: float32 [L], of
        inputs. Raises UserError as `check_ffns` does, and if an FFN's neurons are not act(gate) · up.
        """
        cls.check_ffns(fit.ffns, share)
        copies, device = [_copied(ffn) for ffn in fit.ffns], first_device(fit.ffns)
        tensors = {name: torch.stack([copy[name].to(device) for copy in copies]) for name in copies[0]}

        def codebook(**more: Tensor) -> Codebook:
            return fit.codebook.with_calibrated(cls.name, tensors | more, {})

        copy, dense = cls(codebook(), None, 0), Dense(fit.codebook, None, 0)
        left = {part: share - _copy_bytes(fit.ffns, part) for part in SHARES}
        rows = {part: min(rest, 1.0) for part, rest in left.items() if rest > 0}
        found = _thresholds(fit, dense, list(rows), lambda inputs: [copy.input_sizes(inputs)] * len(rows))
        choices = [_LargestScores(codebook(inputs=each), kept) for each, kept in zip(found, rows.values(), strict=True)]
        captures = _Captures(choices, fit)
        fit.run(dense, captures)
        best = int(distributed.all_sum(captures.sums).argmax())
        chosen, (part, kept) = choices[best], list(rows.items())[best]
        values = lambda inputs: [copy.input_sizes(inputs), chosen.scores(inputs)]
        inputs, scores = _thresholds(fit, chosen, [part, kept], values)
        return tensors | {"inputs": inputs, "scores": scores, "shares": torch.full_like(inputs, part)}

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The neurons whose scores reach the threshold."""
        mask = self.scores(inputs) >= self._tensors["scores"][inputs.layer]
        return MaskDecision(mask, read={"copy": self.inputs_read(inputs)})

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return self.codebook.calibrated[self.name]

    def input_sizes(self, inputs: MaskInputs) -> Tensor:
        """|x_i| · norms[i], float32 [n, E]."""
        return _hidden(inputs).float().abs() * self._tensors["norms"][inputs.layer]

    def inputs_read(self, inputs: MaskInputs) -> Tensor:
        """The inputs at which tokens read the copy, bool [n, E]."""
        return self.input_sizes(inputs) >= self._tensors["inputs"][inputs.layer]

    def scores(self, inputs: MaskInputs) -> Tensor:
        """|act(ĝ) · û| · ‖W_down[:, i]‖, float32 [n, D]."""
        gate, up = self.copied(inputs)
        return inputs.measure(inputs.layer, inputs.site, gate * up)

    def copied(self, inputs: MaskInputs) -> tuple[Tensor, Tensor]:
        """act(ĝ) and û, [n, D] each; computed once if asked for again."""
        last, outputs = self._last
        if outputs is None or last is not inputs:
            hidden = _hidden(inputs).masked_fill(~self.inputs_read(inputs), 0)
            outputs = _gate_and_up(inputs, hidden, self.weights(inputs.layer).mT)
            self._last = inputs, outputs
        return outputs

    def weights(self, layer: int) -> Tensor:
        """The copied weights of a layer, float32 [P, E, D]."""
        D = self.codebook.ffn_width
        levels = level_index(self._tensors["planes"][layer].unbind(), D) + (0.5 - 2 ** (BITS - 1))
        return levels * self._tensors["spacings"][layer].float().repeat_interleave(GROUP, -1)[..., :D]

    def parameters_read(self, site: str, copy: float | None = None) -> float:
        """The copy's levels and spacings at the inputs read, and the norms of columns of gate, up and down."""
        return _parameters(self.codebook.hidden_size, self.codebook.ffn_width, self._share(copy))

    def multiplications(self, site: str, copy: float | None = None) -> float:
        """Products of the inputs read with spacings and levels; sizes of inputs, and scores."""
        E, D = self.codebook.hidden_size, self.codebook.ffn_width
        return len(PROJECTIONS) * E * self._share(copy) * (D + -(-D // GROUP)) + E + 2 * D

    def _share(self, copy: float | None) -> float:
        return self._tensors["shares"].mean().item() if copy is None else copy


def _parameters(E: int, D: int, share: float) -> float:
    """16-bit parameters of a layer's copy at this share of the inputs, with the norms of columns."""
    return len(PROJECTIONS) * E * share * (D * BITS / FULL_BITS + -(-D // GROUP)) + E + D


def _copy_bytes(ffns: list[FFN], share: float) -> float:
    """The same as a share of the bytes that the FFNs are stored in."""
    E, D = ffns[0].hidden_size, ffns[0].width
    return _parameters(E, D, share) / (3 * E * D) * FULL_BITS / mean_bits(ffns)


def _hidden(inputs: MaskInputs) -> Tensor:
    """The FFN's inputs, [n, E]."""
    return inputs.inputs[inputs.layer].nan_to_num(nan=0.0)


def _gate_and_up(inputs: MaskInputs, hidden: Tensor, weights: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """act(gate) and up with these weights [D, E] of gate and of up, for inputs [n, E]; [n, D] each."""
    ffn = inputs.ffn
    assert isinstance(ffn, LayerFFN)  # `experts` says so
    pairs = zip(PROJECTIONS, weights, strict=True)
    gate, up = (ffn.linear(name, hidden.to(ffn.device), each.to(ffn.device)) for name, each in pairs)
    return activation_function(ffn)(gate).to(inputs.values.device), up.to(inputs.values.device)


def _copied(ffn: FFN) -> dict[str, Tensor]:
    """A layer of the tensors planes, spacings and norms (see `Prox.calibrate`)."""
    weights = torch.stack([ffn.projection(name).detach().float().T for name in PROJECTIONS])  # [P, E, D]
    D, last = weights.shape[-1], 2**BITS - 1
    groups = F.pad(weights, (0, -D % GROUP)).unflatten(-1, (-1, GROUP))
    spacings = (2 / last * groups.abs().amax(-1)).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
    levels = quantised(groups / spacings.float().unsqueeze(-1), BITS).flatten(-2)[..., :D]
    index = (levels + last / 2).to(torch.uint8)
    return {"planes": bit_planes(index, BITS), "spacings": spacings, "norms": column_norms(ffn, list(PROJECTIONS))}


class _LargestScores(Prox):
    """Keeps each token's top share of the neurons, in place of a threshold."""

    def __init__(self, codebook: Codebook, share: float):
        super().__init__(codebook, None, 0)
        self.share = share

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        scores = self.scores(inputs)
        return MaskDecision(ops.top_mask(scores, ops.mask_size(scores.shape[-1], self.share), check=False))


def _thresholds(
    fit: FitPass, policy: MaskPolicy, shares: list[float], values: Callable[[MaskInputs], list[Tensor]]
) -> list[Tensor]:
    """For each share, the least value of each layer that at most this share of the values reach, float32 [L].

    values: one tensor for each share, from what the model gives while it runs under the policy.
    """
    device = first_device(fit.ffns)
    finders = [ThresholdFinder(fit.codebook.layers, device) for _ in shares]
    fit.run(policy, _Counter(finders, values))
    for finder, share in zip(finders, shares, strict=True):
        finder.narrow(torch.full((fit.codebook.layers,), share, dtype=torch.float64))
    fit.run(policy, _Counter(finders, values))
    return [finder.thresholds().to(device) for finder in finders]


@dataclass
class _Counter:
    """A meter that counts values, each with its own finder."""

    finders: list[ThresholdFinder]
    values: Callable[[MaskInputs], list[Tensor]]

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        for finder, values in zip(self.finders, self.values(inputs), strict=True):
            finder.add(inputs.layer, values)


class _Captures:
    """A meter that sums the shares of importance that policies' masks capture, int64 [policies].

    It looks at the tokens `FitPass.tokens` of each window.
    """

    def __init__(self, policies: list[_LargestScores], fit: FitPass):
        self.policies, self.fit = policies, fit
        self.sums = torch.zeros(len(policies), dtype=torch.int64, device=fit.tokens.device)

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        starts = torch.arange(0, len(inputs.values), self.fit.windows.shape[1], device=inputs.values.device)
        some = inputs.some((starts.unsqueeze(1) + self.fit.tokens.to(starts.device)).flatten())
        _check_formula(some)
        for place, policy in enumerate(self.policies):
            importance, _ = some.captured(policy.decide(some).mask.float())
            self.sums[place] += (importance.double() * _UNITS).round().long().sum()


def _check_formula(inputs: MaskInputs) -> None:
    """Raises UserError unless the neurons' values are act(gate) · up, as the copy assumes."""
    ffn, values = inputs.ffn, inputs.values.float()
    gate, up = _gate_and_up(inputs, inputs.inputs[inputs.layer], map(ffn.projection, PROJECTIONS))
    own = (gate * up).float()
    error = (own - values).norm() / values.norm()
    if not error <= _MAX_ERROR:
        problem = f"its neurons are not act(gate) * up, which prox copies (they differ by {error:.1%})"
        raise UserError(f"{ffn.name} ({type(ffn.module).__name__}): {problem}; leave out the policy prox")
