"""Runs a model on a sample of the fit text under a policy, to calibrate policies and predictors.

Shape letters: L layers, n windows, S tokens in a window.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from apc.cluster.codebook import Codebook
from apc.config.schema import StagesConfig
from apc.data.ffn import FFN, LayerFFN, first_device, norms_behind
from apc.data.hooks import FFNHooks, FFNVisitor
from apc.predict.predictor import Predictor
from apc.sparse.histogram import ThresholdFinder
from apc.sparse.masked_forward import MaskedForward
from apc.sparse.policies import MaskDecision, MaskInputs, MaskPolicy, Meter
from apc.sparse.policies.bounds import Dense
from apc.sparse.policies.neurons import NeuronPredictor
from apc.tune.costs import drop_costs
from apc.utils import distributed
from apc.utils.determinism import deterministic

GRADIENT_TOKENS = 128  # of each window


@dataclass
class SamplePass:
    """Implements `FitPass`. windows: int64 [n, S], the sample, of which each rank runs its share."""

    model: Any  # a Hugging Face causal language model
    ffns: list[FFN]
    codebook: Codebook
    predictor: Predictor | None
    windows: Tensor
    batch_windows: int = 1
    stages: StagesConfig = StagesConfig()
    seed: int = 0

    def __post_init__(self):
        device = first_device(self.ffns)
        self.codebook = self.codebook.to(device)
        self.predictor = None if self.predictor is None else self.predictor.to(device)
        S = self.windows.shape[1]
        self.tokens = torch.linspace(0, S - 1, min(GRADIENT_TOKENS, S), device=device).round().long()
        self._gradients: dict[int, Tensor] = {}

    @cached_property
    def norms(self) -> list[nn.Module | None]:
        """The norm behind each FFN; see `norms_behind`."""
        return norms_behind(self.model, self.ffns)

    def own_windows(self) -> range:
        """The windows that this rank runs."""
        return range(*distributed.share(len(self.windows)))

    @torch.no_grad()
    def visit(self, window: int, visitor: FFNVisitor, sites: list[str]) -> None:
        """Runs one window with a visitor of these sites."""
        self._forward(self.model.base_model, window, FFNHooks(self.ffns, sites, visitor))

    def residual_update(self, layer: int, output: Tensor) -> Tensor:
        """What outputs [..., E] of a layer's FFN add to the residual stream; see `FitPass`."""
        norm = self.norms[layer]
        return output if norm is None else norm(output.to(self.ffns[layer].device)).to(output.device)

    def output_gradients(self, window: int) -> Tensor:
        """The gradients to each FFN's `residual_update`; see `FitPass`. Computed once for all policies."""
        if window in self._gradients:
            return self._gradients[window]
        pairs = zip(self.ffns, self.norms, strict=True)
        added = _AddedZeros([norm or ffn.down for ffn, norm in pairs if isinstance(ffn, LayerFFN)])
        device = first_device(self.ffns)
        with torch.enable_grad(), deterministic(device):
            logits = self._forward(self.model, window, added).logits[0].float()
            generator = torch.Generator(device).manual_seed(window)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            gradients = torch.autograd.grad(-logits.log_softmax(-1).gather(1, labels).sum(), added.zeros)
        flat = [gradient.flatten(0, -2).to(device)[self.tokens].float() for gradient in gradients]
        self._gradients[window] = torch.stack(flat)
        return self._gradients[window]

    def _forward(self, model: Any, window: int, hooks: "FFNHooks | _AddedZeros") -> Any:
        """The model's output for one window, with hooks that are then removed."""
        try:
            ids = self.windows[window : window + 1].to(first_device(self.ffns))
            return model(input_ids=ids, use_cache=False)
        finally:
            hooks.remove()

    @torch.no_grad()
    def run(self, policy: MaskPolicy, meter: Meter | None = None, whole: bool = False) -> None:
        """Runs the model under the policy over this rank's windows, or all of them in one batch; see `FitPass`."""
        device, every = first_device(self.ffns), len(self.windows)
        (first, last), size = ((0, every), every) if whole else (distributed.share(every), self.batch_windows)
        body: Any = self.model.base_model
        hooks = MaskedForward(self.ffns, policy, meter).hook()
        try:
            for start in range(first, last, size):
                batch = self.windows[start : min(start + size, last)].to(device)
                body(input_ids=batch, use_cache=False)
        finally:
            hooks.remove()

    def costs(self, policy: MaskPolicy, visit: Callable[[MaskInputs], Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The costs of dropping neurons, window by window and layer by layer; see `FitPass`."""
        options = dict(seed=self.seed, lookahead=policy.lookahead, sees_gate=policy.sees_gate)
        return drop_costs(self.model, self.ffns, self.codebook, self.windows, visit, **options)


class _AddedZeros:
    """Adds zeros to the outputs of modules in each forward pass, so that they have gradients."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.zeros: list[Tensor] = []
        self._handles = [module.register_forward_hook(self._add) for module in modules]

    def _add(self, _module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        self.zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + self.zeros[-1]

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()


@dataclass
class _ScoreCounter:
    """A meter that counts the scores of neurons."""

    policy: NeuronPredictor
    finder: ThresholdFinder

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        self.finder.add(inputs.layer, self.policy.outputs(inputs)[0])


@dataclass
class _InputCounter:
    """A meter that counts the sizes of the inputs of a low-bit copy."""

    policy: NeuronPredictor
    finder: ThresholdFinder

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        low_bit = self.policy.predictor.low_bit
        assert low_bit is not None
        self.finder.add(inputs.layer, low_bit.input_sizes(self.policy.hidden(inputs), inputs.layer))


def find_input_thresholds(fit: SamplePass, share: float, masked: bool) -> Tensor:
    """Each layer's least size of an input at which the low-bit copy is read, float32 [L], on the host.

    On average over the sample, this share of the inputs is at least as large. masked: whether the model runs under the
    predictor's masks, of the codebook's fixed size, or dense. An expert without tokens reads all inputs: −inf.
    """
    policy = NeuronPredictor(fit.codebook, fit.predictor, 0)
    forward = policy if masked else Dense(fit.codebook, fit.predictor, 0)
    finder = ThresholdFinder(fit.codebook.layers, first_device(fit.ffns))
    fit.run(forward, _InputCounter(policy, finder))
    finder.narrow(torch.full((fit.codebook.layers,), share, dtype=torch.float64))
    fit.run(forward, _InputCounter(policy, finder))
    return finder.thresholds()


def find_thresholds(fit: SamplePass) -> Tensor:
    """Each layer's threshold: the least score with which a neuron is kept, float32 [L], on the host.

    The number of neurons kept varies by token. Over all tokens of the sample, masks of the codebook's fixed size keep a
    certain number. The threshold is the least value that at most this number of scores reach, while the model runs
    under such masks. An expert that gets none of these tokens keeps all neurons: −inf.
    """
    codebook = fit.codebook
    policy = NeuronPredictor(codebook, fit.predictor, 0)
    finder = ThresholdFinder(codebook.layers, first_device(fit.ffns))
    fit.run(policy, _ScoreCounter(policy, finder))
    sizes = [codebook.size("neuron", layer) for layer in range(codebook.layers)]
    finder.narrow(torch.tensor(sizes, dtype=torch.float64) / codebook.widths["neuron"])
    fit.run(policy, _ScoreCounter(policy, finder))
    return finder.thresholds()
