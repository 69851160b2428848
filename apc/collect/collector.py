"""Runs the model over token windows and turns what its FFNs compute into patterns."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from apc import ops
from apc.collect.patterns import ActiveRule, Block, Importance, quantise
from apc.data.ffn import FFNHooks, GatedFFN, find_ffns
from apc.utils import distributed
from apc.utils.errors import UserError

HISTOGRAM_SHIFT = 13  # a float32's bits shifted right by this many: 2**18 bins, each 2**-10 wide relative to its value
HISTOGRAM_BINS = 1 << (31 - HISTOGRAM_SHIFT)


class Collector:
    """Reads the patterns of token windows off a model.

    Args:
        model: a causal language model with gated FFNs.
        sites: where patterns are read.
        device: where the model is.
        batch_windows: windows in one forward pass.
        thresholded: whether inactive values become zero in the forward pass that blocks are read from, as in the paper's.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[str],
        device: torch.device,
        batch_windows: int = 1,
        thresholded: bool = False,
    ):
        self.model, self.sites, self.device, self.batch_windows, self.thresholded = (
            model,
            sites,
            device,
            batch_windows,
            thresholded,
        )
        self.ffns = find_ffns(model)
        self.importance = Importance(self.ffns)

    def calibrate(self, text: Tensor, windows: Sequence[int], sparsity: float) -> dict[str, Tensor]:
        """Thresholds float32 [L] per site: the least bin edge with at least a share `sparsity` of all importances below it.

        Counts go into logarithmic bins (relative width 2**-10), so memory does not grow with the text and the sums over
        ranks are exact. text: int64 [N, seq_len]; windows: indices into it, of which each rank runs its share.
        """
        counter = _Histograms(len(self.ffns), self.sites, self.importance, self.device)
        first, last = distributed.share(len(windows))
        self._forward(text, windows[first:last], counter, filled=True)
        return {site: _quantile(distributed.all_sum(counts), sparsity) for site, counts in counter.counts.items()}

    def block(
        self,
        text: Tensor,
        windows: Sequence[int],
        rule: ActiveRule,
        with_importance: bool,
        with_hidden: bool,
        filled: bool = False,
    ) -> Block:
        """The patterns of some windows of a text.

        text: int64 [N, seq_len]; windows: indices into it; filled: whether a short forward pass is made as large as the others: a GPU's products of
        another size round otherwise, so that where passes are short would be seen in the patterns. Raises UserError at NaN or infinity.
        """
        reader = _PatternReader(self.ffns, self.importance, rule, with_importance, with_hidden, self.thresholded)
        self._forward(text, windows, reader, filled)
        return reader.block(windows, text.shape[1])

    def hidden(self, text: Tensor, windows: Sequence[int]) -> Tensor:
        """Every FFN's input, bfloat16 [L, n·seq_len, E], for n windows of a text int64 [N, seq_len]."""
        reader = _PatternReader(
            self.ffns, self.importance, ActiveRule("top", 0.5), with_importance=False, with_hidden=True
        )
        self._forward(text, windows, reader, sites=[])
        return reader.block(windows, text.shape[1]).hidden

    @torch.inference_mode()
    def _forward(
        self,
        text: Tensor,
        windows: Sequence[int],
        visitor: "_Visitor",
        filled: bool = False,
        sites: list[str] | None = None,
    ) -> None:
        hooks = FFNHooks(self.ffns, self.sites if sites is None else sites, visitor)
        try:
            for start in range(0, len(windows), self.batch_windows):
                batch = list(windows[start : start + self.batch_windows])
                visitor.tokens = len(batch) * text.shape[1]
                fill = batch[-1:] * (self.batch_windows - len(batch)) if filled else []
                self.model.base_model(input_ids=text[batch + fill].to(self.device), use_cache=False)
                self._check_finite(visitor, batch)
        finally:
            hooks.remove()

    def _check_finite(self, visitor: "_Visitor", windows: list[int]) -> None:
        bad = visitor.pop_nonfinite()
        if bad is not None:
            layer, site = bad
            where = f"window {windows[0]}" if len(windows) == 1 else f"windows {', '.join(map(str, windows))}"
            raise UserError(
                f"NaN or infinite activations in layer {layer} ({self.ffns[layer].name}), site {site}, {where}: "
                "try model.dtype=float32 or bfloat16, or check the weights"
            )


class _Visitor:
    """Notes the largest importance of each layer and site, to find NaN and infinity without waiting for the device in mid-pass."""

    def __init__(self, importance: Importance):
        self._importance = importance
        self.tokens = 0  # of the pass, that count; what comes after them fills it
        self._largest: list[tuple[int, str, Tensor]] = []

    def enter(self, layer: int, hidden: Tensor) -> None:
        pass

    def measure(self, layer: int, site: str, values: Tensor) -> Tensor:
        """float32 [n, D]"""
        importance = self._importance(layer, site, values.flatten(0, -2))
        self._largest.append((layer, site, importance.amax()))
        return importance.nan_to_num_(nan=0.0)  # the pass goes on to its end, where the layer is named

    def pop_nonfinite(self) -> tuple[int, str] | None:
        """The first layer and site with a NaN or infinity since the last call."""
        seen, self._largest = self._largest, []
        if not seen:
            return None
        finite = torch.stack([largest for *_, largest in seen]).isfinite().tolist()
        return next((seen[i][:2] for i, ok in enumerate(finite) if not ok), None)


class _Histograms(_Visitor):
    def __init__(self, layers: int, sites: list[str], importance: Importance, device: torch.device):
        super().__init__(importance)
        self.counts = {site: torch.zeros(layers, HISTOGRAM_BINS, dtype=torch.int64, device=device) for site in sites}

    def visit(self, layer: int, site: str, values: Tensor) -> None:
        bins = self.measure(layer, site, values)[: self.tokens].view(torch.int32).flatten() >> HISTOGRAM_SHIFT
        self.counts[site][layer] += torch.bincount(bins.clamp_(min=0), minlength=HISTOGRAM_BINS)


def _quantile(counts: Tensor, share: float) -> Tensor:
    """counts int64 [L, bins] → float32 [L]: the lower edge of the first bin with at least `share` of the counts below it."""
    below = counts.cumsum(1) - counts
    edges = (below >= share * counts.sum(1, keepdim=True)).int().argmax(dim=1)
    return (edges.to(torch.int32) << HISTOGRAM_SHIFT).view(torch.float32).cpu()


class _PatternReader(_Visitor):
    def __init__(
        self,
        ffns: list[GatedFFN],
        importance: Importance,
        rule: ActiveRule,
        with_importance: bool,
        with_hidden: bool,
        thresholded: bool = False,
    ):
        super().__init__(importance)
        self._layers, self._rule, self._thresholded = len(ffns), rule, thresholded
        self._with_importance, self._with_hidden = with_importance, with_hidden
        self._parts: dict[str, list[list[Tensor]]] = {}

    def _keep(self, name: str, layer: int, value: Tensor) -> None:
        self._parts.setdefault(name, [[] for _ in range(self._layers)])[layer].append(value)

    def enter(self, layer: int, hidden: Tensor) -> None:
        if self._with_hidden:
            self._keep("hidden", layer, hidden.flatten(0, -2)[: self.tokens].to(torch.bfloat16))

    def visit(self, layer: int, site: str, values: Tensor) -> Tensor | None:
        importance = self.measure(layer, site, values)
        active = self._rule.active(layer, site, importance)
        self._keep(f"patterns.{site}", layer, ops.pack(active[: self.tokens]))
        if self._with_importance:
            quantised, scale = quantise(importance[: self.tokens])
            self._keep(f"importance.{site}", layer, quantised)
            self._keep(f"scale.{site}", layer, scale)
        return values.masked_fill(~active.view(values.shape), 0) if self._thresholded else None

    def block(self, windows: Sequence[int], seq_len: int) -> Block:
        named = {name: torch.stack([torch.cat(parts) for parts in layers]) for name, layers in self._parts.items()}
        return Block.of_windows(named, windows, seq_len)


def progress(total_tokens: int, title: str) -> tqdm:
    """A progress bar in tokens, on the first rank only."""
    return tqdm(
        total=total_tokens,
        desc=title,
        unit=" tokens",
        unit_scale=True,
        disable=not distributed.is_main(),
        mininterval=1.0,
    )
