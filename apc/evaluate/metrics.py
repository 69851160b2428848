"""Figures of masks, and perplexity. Sums are taken over all ranks first; ratios are one division at the end.

Shape letters: n tokens, D neurons at a site, L layers.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apc.cluster.codebook import Codebook
from apc.data.quantise import neuron_bits
from apc.evaluate.tables import MIN_WINDOWS
from apc.sparse.policies import MaskDecision, MaskInputs
from apc.utils import distributed

# A loss is suspect if it is below the dense model's by more than this many nats. Masks that drop little may help a
# little: at sparsity 0.05 the policy `exact` on SmolLM2 differs from dense by -0.00008 ± 0.0001 nats (bundled text, 16
# windows of 512).
MIN_GAIN = 0.005
BATCHES = (2, 4, 8, 16, 32, 64)  # batch sizes, in tokens, for which the union of the masks is measured
_FIELDS = (
    *("active", "mask", "hits", "rows", "importance", "energy"),
    *("rows_first", "importance_first", "energy_first", "zeros", "neurons", "tokens"),
    *("read_gate", "read_up", "read_down", "read_copy", "copy_tokens"),
    *("bits_gate", "bits_up", "bits_down"),
    *(f"union_{batch}" for batch in BATCHES),
    *(f"neurons_{batch}" for batch in BATCHES),
)
_RATIOS = {
    "density": ("mask", "neurons"),
    "coverage": ("hits", "active"),
    "precision": ("hits", "mask"),
    "captured_importance": ("importance", "rows"),
    "captured_energy": ("energy", "rows"),
    "captured_importance_first": ("importance_first", "rows_first"),
    "captured_energy_first": ("energy_first", "rows_first"),
    "zeros": ("zeros", "neurons"),
}
PROJECTIONS = ("gate", "up", "down")  # of an FFN; those without a gate have the last two
_UNIONS = {str(batch): (f"union_{batch}", f"neurons_{batch}") for batch in BATCHES}


class MaskMeter:
    """Sums figures of masks over tokens, for each site and layer.

    first: bool [n], which tokens of the next forward pass begin a window; these are summed separately. Set it
    before `add`.
    """

    first: Tensor

    def __init__(self, codebook: Codebook, device: torch.device):
        self._sites = list(codebook.sites)
        self._bits: dict[int, Tensor] = {}  # by layer
        self._sums = torch.zeros(len(self._sites), codebook.layers, len(_FIELDS), dtype=torch.float64, device=device)

    def add(self, tokens: MaskInputs, decision: MaskDecision) -> None:
        """Adds the decision for n tokens."""
        (n, D), mask = tokens.values.shape, decision.mask
        kept, active = mask.expand(n, D), tokens.active
        importance, energy = (share.double() for share in tokens.captured(kept.float()))
        first = (self.first if tokens.tokens is None else self.first[tokens.tokens]).double()
        rest = 1 - first
        sums = [active.sum(), mask.sum() * (n // len(mask)), (active & kept).sum()]
        sums += [rest.sum(), importance @ rest, energy @ rest]
        sums += [first.sum(), importance @ first, energy @ first]
        sums += [(tokens.values == 0).sum(), *(torch.full_like(first[0], count) for count in (n * D, n))]
        read = {projection: decision.read.get(projection, mask) for projection in PROJECTIONS}
        counts = {id(weights): _token_counts(weights, n) for weights in read.values()}
        copy = decision.read.get("copy", mask.new_zeros(1, 1))
        sums += [*(counts[id(weights)].mean() for weights in read.values()), _token_counts(copy, n).mean()]
        sums += [torch.full_like(first[0], n if "copy" in decision.read else 0)]
        for name, weights in read.items():
            bits = counts[id(weights)]
            if name in decision.bits:
                sums.append(_token_counts(decision.bits[name], n).mean())
            else:
                stored = self._stored_bits(tokens)
                # Where weights are not those of neurons, the mean stands for all.
                sums.append((bits * stored).mean() if len(bits) == len(stored) else bits.mean() * stored.mean())
        unions = _unions(kept[_shuffled(n, mask.device)] if len(mask) > 1 else kept)
        place = self._sites.index(tokens.site), tokens.layer
        self._sums[place] += torch.stack([each.double() for each in sums + unions])

    def _stored_bits(self, tokens: MaskInputs) -> Tensor:
        """The bits stored for a weight of each neuron of the tokens' FFN, float64 [D]."""
        if tokens.layer not in self._bits:
            self._bits[tokens.layer] = neuron_bits(tokens.ffn).to(self._sums)
        return self._bits[tokens.layer]

    def totals(self) -> Tensor:
        """The sums over all ranks, float64 [sites, L, fields]."""
        return distributed.all_sum(self._sums.clone())


def _token_counts(weights: Tensor, n: int) -> Tensor:
    """The sums over n tokens of weights [n, width], or [1, width] for all of them, float64 [width].

    Exact for bool: float32 holds counts of up to 2²⁴ tokens.
    """
    dtype = torch.float32 if weights.dtype == torch.bool else torch.float64
    return weights.sum(0, dtype=dtype).double() * (n // len(weights))


@lru_cache(256)  # bounded, because experts get all kinds of numbers of tokens
def _shuffled(n: int, device: torch.device) -> Tensor:
    """A random order in which n tokens form batches, the same for all layers and policies."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(device)


def _unions(kept: Tensor) -> list[Tensor]:
    """For each batch size, the sizes of its unions of masks, summed over batches; then D times the number of batches.

    The union of a batch is the set of neurons that at least one of its tokens keeps. Consecutive tokens form batches;
    tokens that do not fill a batch are left out. kept: the masks, bool [n, D]. Each result is an int64 [].
    """
    ones, neurons = [], []
    for _ in BATCHES:
        pairs = len(kept) // 2
        kept = kept[0 : 2 * pairs : 2] | kept[1 : 2 * pairs : 2]
        ones.append(kept.sum())
        neurons.append(torch.full_like(ones[-1], kept.numel()))
    return ones + neurons


def mask_figures(totals: Tensor) -> dict[str, float | None | dict[str, float | None]]:
    """Density, coverage, precision, and captured importance and energy of masks, from sums [..., fields].

    First tokens of windows count in the `_first` figures and in density, coverage and precision, but not in the
    other captured shares. `union_density` gives, for each batch size, the density of the union of the masks in a batch
    of tokens. The tokens of a batch are drawn from the windows of one forward pass. A figure without data is None.
    """
    return {**_ratios(totals), "union_density": _ratios(totals, _UNIONS)}


def layer_figures(totals: Tensor) -> dict[str, list[float | None]]:
    """`mask_figures` of each layer, over its sites, without unions; totals: [sites, L, fields]."""
    layers = [_ratios(layer) for layer in totals.unbind(1)]
    return {name: [layer[name] for layer in layers] for name in _RATIOS}


def layer_reads(
    totals: Tensor, sites: list[str], projections: int, field: str = "read", full: float = 1.0
) -> dict[str, list[float | None]]:
    """The share of each projection's weights that each layer reads, by name; None without tokens.

    totals: [sites, L, fields]; projections: 3, or 2 without a gate. field: `bits` for the bits read per weight. full:
    the value of a projection that no site masks, and that is read in full. Under `copy`: the share of inputs at which a
    low-bit copy is read, if decisions say so; not with `bits`.
    """
    shares: dict[str, list[float | None]] = {}
    for name in PROJECTIONS[-projections:]:
        site = "neuron" if "neuron" in sites else name
        layers = totals[sites.index(site)] if site in sites else ()
        found = [_ratios(layer, {name: (f"{field}_{name}", "tokens")})[name] for layer in layers]
        shares[name] = found or [full] * totals.shape[1]
    copies = [_ratios(layer, {"copy": ("read_copy", "copy_tokens")})["copy"] for layer in totals.unbind(1)]
    return shares if field != "read" or set(copies) == {None} else shares | {"copy": copies}


def mean_reads(
    totals: Tensor, sites: list[str], projections: int, experts: int = 0, field: str = "read", full: float = 1.0
) -> dict[str, float]:
    """`layer_reads`, averaged over layers; experts: as in `site_densities`."""
    if experts:
        totals = totals.unflatten(1, (-1, experts)).sum(2)
    reads = layer_reads(totals, sites, projections, field, full)
    return {name: sum(share or 0.0 for share in shares) / len(shares) for name, shares in reads.items()}


def site_densities(totals: Tensor, sites: list[str], experts: int = 0) -> dict[str, list[float]]:
    """The density of the masks at each site of each layer; totals: [sites, L, fields].

    experts: as in `Codebook`. In a mixture, a layer's density averages over all tokens of its experts, because experts
    get different numbers of tokens, and some get none.
    """
    if experts:
        totals = totals.unflatten(1, (-1, experts)).sum(2)
    return {site: [_ratios(layer)["density"] or 0.0 for layer in of] for site, of in zip(sites, totals, strict=True)}


def _ratios(totals: Tensor, pairs: dict[str, tuple[str, str]] = _RATIOS) -> dict[str, float | None]:
    """For each pair of fields the quotient of their sums; None without data."""
    sums = dict(zip(_FIELDS, totals.reshape(-1, len(_FIELDS)).sum(0).tolist(), strict=True))
    return {name: sums[top] / sums[bottom] if sums[bottom] else None for name, (top, bottom) in pairs.items()}


def window_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean next-token loss of each window in nats, float64 [n]; windows: int64 [n, seq_len], each scored alone."""
    logits = model(input_ids=windows, use_cache=False).logits
    losses = [F.cross_entropy(one[:-1].float(), ids[1:]) for one, ids in zip(logits, windows, strict=True)]
    return torch.stack(losses).double()


def perplexity(losses: Tensor) -> float:
    """The exponential of the mean loss, infinity if it overflows; losses: float64 [n]."""
    mean = losses.mean().item()
    return math.exp(mean) if mean < 700 else math.inf


def perplexity_ratio(losses: Tensor, dense: Tensor) -> tuple[float, float | None, float | None]:
    """Perplexity over the dense model's, and the bounds of its 95 % confidence interval; losses, dense: float64 [n].

    The interval is Student's t for loss differences paired by window, so its bounds are positive. Fewer than
    MIN_WINDOWS windows have no interval.
    """
    mean, half = _mean_difference(losses, dense)
    ratio = math.exp(min(mean, 700))
    if len(losses) < MIN_WINDOWS:
        return ratio, None, None
    return ratio, math.exp(max(min(mean - half, 700), -700)), math.exp(min(mean + half, 700))


def is_below(losses: Tensor, dense: Tensor) -> bool:
    """Whether losses are below the dense model's by more than MIN_GAIN, and significantly so at the 95 % level.

    losses, dense: float64 [n].
    """
    mean, half = _mean_difference(losses, dense)
    return mean < -MIN_GAIN and mean + half < 0


def _mean_difference(losses: Tensor, dense: Tensor) -> tuple[float, float]:
    """Mean of the loss differences, and half the width of its 95 % interval: infinite for a single window."""
    from scipy.stats import t

    difference = losses - dense
    mean, count = difference.mean().item(), len(difference)
    if count < 2:
        return mean, math.inf
    return mean, float(t.ppf(0.975, count - 1)) * difference.std().item() / math.sqrt(count)


def unigram_loss(windows: Tensor) -> float:
    """Loss in nats per token of a unigram model of the scored tokens themselves: the entropy of their frequencies.

    windows: int64 [n, seq_len]; the first token of each is not scored.
    """
    counts = windows[:, 1:].unique(return_counts=True)[1].double()
    return torch.special.entr(counts / counts.sum()).sum().item()
