"""What it costs to drop a neuron, measured by one backward pass of the dense model.

Shape letters: L layers, D neurons, n tokens, S tokens in a window.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apc.cluster.codebook import Codebook
from apc.data.ffn import FFN
from apc.sparse.masked_forward import ForwardReader
from apc.sparse.policies import MaskDecision, MaskInputs
from apc.utils import distributed


class _MaskGradients(ForwardReader):
    """Gives each layer of the dense model a mask of ones with a gradient, and keeps what `visit` returns."""

    def __init__(self, ffns: list[FFN], codebook: Codebook, visit: Callable[[MaskInputs], Tensor], **options: Any):
        super().__init__(ffns, codebook, **options)
        self._visit = visit
        self.masks: list[Tensor] = []
        self.visited: list[Tensor] = []

    def see(self, tokens: MaskInputs) -> MaskDecision:
        with torch.no_grad():
            self.visited.append(self._visit(tokens))
        self.masks.append(torch.ones_like(tokens.values, requires_grad=True))
        return MaskDecision(self.masks[-1])

    def apply(self, values: Tensor, mask: Tensor) -> Tensor:
        return values * mask


def drop_costs(
    model: nn.Module,
    ffns: list[FFN],
    codebook: Codebook,
    windows: Tensor,
    visit: Callable[[MaskInputs], Tensor],
    seed: int = 0,
    **options: Any,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields, for each of this rank's windows and each layer: the layer, what `visit` returned there, and the costs.

    The cost of dropping a neuron for a token is half the square of the gradient to the neuron's mask, for labels drawn
    from the model, in nats, float32 [S, D]. That is the diagonal of the Fisher information (as in Theis et al., 2018),
    which needs no labels from the text.

    windows: int64 [n, S]; visit: gets each layer's inputs; seed: of the labels; options: lookahead, sees_gate.
    """
    device = ffns[0].device
    for window in range(*distributed.share(len(windows))):
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + window)
        reader = _MaskGradients(ffns, codebook, visit, **options)
        hooks = reader.hook()
        try:
            logits = model(input_ids=windows[window : window + 1].to(device), use_cache=False).logits[0].float()
        finally:
            hooks.remove()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        gradients = torch.autograd.grad(-logits.log_softmax(-1).gather(1, labels).sum(), reader.masks)
        for layer, (visited, gradient) in enumerate(zip(reader.visited, gradients, strict=True)):
            yield layer, visited, gradient.float().square() / 2
