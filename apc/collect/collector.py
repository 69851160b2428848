"""Runs the model over token windows and turns its FFN activations into patterns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apc import ops
from apc.collect.patterns import ActiveRule, Block, Importance, quantise
from apc.data.ffn import check_calls, expert_modules, find_ffns
from apc.data.hooks import FFNHooks, FFNVisitor
from apc.utils import distributed
from apc.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A bin is the upper 18 bits of a float32 without its sign: each is 2**-10 wide relative to its value.
HISTOGRAM_SHIFT = 13
HISTOGRAM_BINS = 1 << (31 - HISTOGRAM_SHIFT)


class Collector:
    """Reads the patterns of token windows from a model.

    model: a causal language model, on `device`; sites: where patterns are read; batch_windows: windows
    in one forward pass; thresholded: whether the forward pass that yields blocks sets inactive values to zero, as in
    the paper; name: the model's name in listings of stores; progress: whether collecting shows a bar.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        sites: list[str],
        device: torch.device,
        batch_windows: int = 1,
        thresholded: bool = False,
        name: str = "",
        progress: bool = True,
    ):
        self.model, self.sites, self.device, self.name, self.progress = model, sites, device, name, progress
        self.batch_windows, self.thresholded = batch_windows, thresholded
        self.ffns = find_ffns(model)
        self.slots = check_calls(model, self.ffns)  # experts that a token is routed to; 0 without experts
        self.experts = len(self.ffns) // len(expert_modules(self.ffns)) if self.slots else 0
        self.importance = Importance(self.ffns)

    def calibrate(self, text: Tensor, windows: Sequence[int], sparsity: float) -> dict[str, Tensor]:
        """Thresholds float32 [L] per site, chosen for a share `sparsity` of inactive neurons.

        A threshold is the lowest bin edge that has at least a share `sparsity` of importances below it.

        Importances are counted in logarithmic bins (relative width 2**-10). So memory does not grow with the text, and
        sums over ranks are exact. text: int64 [N, seq_len]; windows: indices into it, shared out over the ranks.
        """
        counter = _Histograms(self)
        first, last = distributed.share(len(windows))
        self._forward(text, windows[first:last], counter, self.sites, padded=True)
        return {site: self._threshold(distributed.all_sum(counts), sparsity) for site, counts in counter.counts.items()}

    def _threshold(self, counts: Tensor, sparsity: float) -> Tensor:
        """Thresholds from counts int64 [L, bins]. An expert without tokens gets its layer's threshold."""
        thresholds = _quantile(counts, sparsity)
        if self.experts:
            layers = counts.unflatten(0, (-1, self.experts)).sum(1)
            whole = _quantile(layers, sparsity).repeat_interleave(self.experts)
            thresholds = torch.where(counts.sum(1).cpu() > 0, thresholds, whole)
        return thresholds

    def block(
        self,
        text: Tensor,
        windows: Sequence[int],
        rule: ActiveRule,
        with_importance: bool,
        with_hidden: bool,
        padded: bool = False,
    ) -> Block:
        """The patterns of some windows of a text.

        text: int64 [N, seq_len]; windows: indices into it; padded: whether to pad a short batch to `batch_windows`.
        On a GPU rounding depends on the batch size. Padding gives all batches one size, so patterns do not depend
        on how the text is split. Raises UserError at NaN or infinity.
        """
        reader = _PatternReader(self, rule, with_importance, with_hidden)
        self._forward(text, windows, reader, self.sites, padded)
        return reader.block(windows, text.shape[1])

    def hidden(self, text: Tensor, windows: Sequence[int]) -> Tensor:
        """Every FFN's input, bfloat16 [L, n·seq_len, E], for n windows of a text int64 [N, seq_len]."""
        if self.experts:
            raise UserError("collect.ffn_inputs=streamed: not possible with experts; set collect.ffn_inputs=stored")
        reader = _PatternReader(self, ActiveRule("top", 0.5), False, True)  # the rule is unused: no site is visited
        self._forward(text, windows, reader, sites=[])
        return reader.block(windows, text.shape[1]).tensors()["hidden"]

    @torch.inference_mode()
    def _forward(
        self, text: Tensor, windows: Sequence[int], visitor: "_Visitor", sites: list[str], padded: bool = False
    ) -> None:
        hooks = FFNHooks(self.ffns, sites, visitor)
        try:
            for start in range(0, len(windows), self.batch_windows):
                batch = list(windows[start : start + self.batch_windows])
                visitor.begin(len(batch) * text.shape[1])
                padding = batch[-1:] * (self.batch_windows - len(batch)) if padded else []
                self.model.base_model(input_ids=text[batch + padding].to(self.device), use_cache=False)
                for layer, site in visitor.nonfinite():
                    raise UserError(
                        f"NaN or infinite activations in layer {layer} ({self.ffns[layer].name}), site {site}, "
                        f"window{'s' * (len(batch) > 1)} {', '.join(map(str, batch))}: "
                        "try model.dtype=float32 or bfloat16, or check the weights"
                    )
        finally:
            hooks.remove()


class _Visitor(FFNVisitor):
    """Records the largest importance of each layer and site, to find NaN and infinity after the pass.

    Checking at once would make the host wait for the device in mid-pass. tokens: number of tokens in the current
    pass, without the padding at the end.
    """

    def __init__(self, collector: Collector):
        self._collector = collector
        self.tokens = 0
        self._largest: dict[tuple[int, str], Tensor] = {}

    def begin(self, tokens: int) -> None:
        """Prepares for a forward pass over `tokens` tokens, with padding after them."""
        self.tokens = tokens

    def unpadded(self, values: Tensor) -> Tensor:
        """The rows of values [n, ...] that belong to tokens, not to padding."""
        return values[: self.tokens] if self.route is None else values[self.route.tokens < self.tokens]

    def measure(self, layer: int, site: str, values: Tensor) -> Tensor:
        """Importance float32 [n, D] of the values, with NaN as 0."""
        importance = self._collector.importance(layer, site, values.flatten(0, -2))
        self._largest[layer, site] = importance.amax()
        return importance.nan_to_num_(nan=0.0)  # the pass goes on; the layer is reported after it

    def nonfinite(self) -> list[tuple[int, str]]:
        """Layers and sites with NaN or infinity in the current pass, in the order of the pass."""
        largest = list(self._largest.values())
        finite = torch.stack(largest).isfinite().tolist() if largest else []
        return [place for place, ok in zip(self._largest, finite, strict=True) if not ok]


class _Histograms(_Visitor):
    """Counts importances in logarithmic bins. counts: int64 [L, bins] per site."""

    def __init__(self, collector: Collector):
        super().__init__(collector)
        zeros = torch.zeros(len(collector.ffns), HISTOGRAM_BINS, dtype=torch.int64, device=collector.device)
        self.counts = {site: zeros.clone() for site in collector.sites}

    def visit(self, layer: int, site: str, values: Tensor) -> None:
        bins = self.unpadded(self.measure(layer, site, values)).view(torch.int32).flatten() >> HISTOGRAM_SHIFT
        self.counts[site][layer] += torch.bincount(bins.clamp_(min=0), minlength=HISTOGRAM_BINS)


def _quantile(counts: Tensor, share: float) -> Tensor:
    """Lower edge of the first bin with at least `share` of the counts below it.

    counts: int64 [L, bins]. Returns float32 [L].
    """
    below = counts.cumsum(1) - counts
    edges = (below >= share * counts.sum(1, keepdim=True)).int().argmax(dim=1)
    return (edges.to(torch.int32) << HISTOGRAM_SHIFT).view(torch.float32).cpu()


class _PatternReader(_Visitor):
    """Gathers the patterns of one or more forward passes and, if requested, their importances and FFN inputs.

    `_parts` has a field's tensors of each pass. Without experts: a list for each layer, of tensors [n, ...]. With
    experts: one list, of tensors [rows, n, ...], whose rows `PatternInfo.field` describes.
    """

    def __init__(self, collector: Collector, rule: ActiveRule, with_importance: bool, with_hidden: bool):
        super().__init__(collector)
        self._rule, self._with_importance, self._with_hidden = rule, with_importance, with_hidden
        self._parts: dict[str, list[list[Tensor]]] = {}
        self._passes = 0

    def _keep(self, name: str, layer: int, value: Tensor) -> None:
        """Stores rows [n, ...] of the current pass; an expert's rows at the positions of its tokens."""
        experts, slots = self._collector.experts, self._collector.slots
        value = self.unpadded(value)
        if self.route is None:
            self._parts.setdefault(name, [[] for _ in self._collector.ffns])[layer].append(value)
            return
        tokens, slot = (self.unpadded(each) for each in self.route)
        at = layer // experts if name == "hidden" else layer // experts * slots + slot
        count = len(self._collector.ffns) // experts * (1 if name == "hidden" else slots)
        passes = self._parts.setdefault(name, [[]])[0]
        if len(passes) < self._passes:
            passes.append(value.new_zeros(count, self.tokens, *value.shape[1:]))
        passes[-1][at, tokens] = value

    def begin(self, tokens: int) -> None:
        super().begin(tokens)
        self._passes += 1

    def enter(self, layer: int, hidden: Tensor) -> None:
        if self._with_hidden:
            self._keep("hidden", layer, hidden.flatten(0, -2).to(torch.bfloat16))
        if self.route is not None:
            expert = layer % self._collector.experts
            self._keep("experts", layer, torch.full_like(self.route.tokens, expert, dtype=torch.int16))

    def visit(self, layer: int, site: str, values: Tensor) -> Tensor | None:
        importance = self.measure(layer, site, values)
        active = self._rule.active(layer, site, importance)
        self._keep(f"patterns.{site}", layer, ops.pack(active))
        if self._with_importance:
            quantised, scale = quantise(importance)
            self._keep(f"importance.{site}", layer, quantised)
            self._keep(f"scale.{site}", layer, scale)
        return values.masked_fill(~active.view(values.shape), 0) if self._collector.thresholded else None

    def block(self, windows: Sequence[int], seq_len: int) -> Block:
        """One block of all passes so far; `windows`: those that the passes ran over."""
        if self._collector.experts:
            named = {name: torch.cat(passes, dim=1) for name, (passes,) in self._parts.items()}
        else:
            named = {name: torch.stack([torch.cat(parts) for parts in layers]) for name, layers in self._parts.items()}
        return Block.of_windows(named, windows, seq_len)
