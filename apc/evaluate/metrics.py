"""What masks capture, what they cost, and perplexity. Sums first, over all ranks; one division last."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apc.cluster.codebook import Codebook
from apc.sparse.policies import MaskInputs
from apc.utils import distributed

BATCHES = (2, 4, 8, 16, 32, 64)  # tokens whose masks are joined: what a batch of so many reads
_FIELDS = (
    "active", "mask", "hits", "rows", "importance", "energy", "rows_first", "importance_first", "energy_first", "neurons",
    *(f"union_{batch}" for batch in BATCHES), *(f"neurons_{batch}" for batch in BATCHES),
)  # fmt: skip


class MaskMeter:
    """Sums over tokens, for each site and layer, of what a mask keeps. first: bool [n], which of the next tokens begin a window."""

    def __init__(self, codebook: Codebook, device: torch.device):
        self._sites = list(codebook.sites)
        self._sums = torch.zeros(len(self._sites), codebook.layers, len(_FIELDS), dtype=torch.float64, device=device)
        self.first: Tensor | None = None

    def add(self, tokens: MaskInputs, mask: Tensor) -> None:
        """mask: bool [n, D] or [1, D]"""
        n, D = tokens.values.shape
        kept = mask.to(torch.float32).expand(n, D)
        active = tokens.active.to(torch.float32)
        importance, energy = (share.double() for share in tokens.captured(kept))
        first = self.first.double()
        rest = 1 - first
        hits = torch.linalg.vecdot(active, kept)  # a row's counts are exact in float32, all rows' together would not be
        found = (
            active.sum(-1).double().sum(), kept.sum(-1).double().sum(), hits.double().sum(),
            rest.sum(), importance @ rest, energy @ rest, first.sum(), importance @ first, energy @ first,
            torch.full_like(first[0], n * D), *_unions(kept[_shuffled(n).to(kept.device)] if len(mask) > 1 else kept),
        )  # fmt: skip
        self._sums[self._sites.index(tokens.site), tokens.layer] += torch.stack(found)

    def totals(self) -> Tensor:
        """float64 [sites, L, fields], summed over all ranks."""
        return distributed.all_sum(self._sums.clone())


@cache
def _shuffled(n: int) -> Tensor:
    """The order in which tokens are put into batches: the same for all layers and policies."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))


def _unions(kept: Tensor) -> list[Tensor]:
    """kept float32 [n, D], in the order of batches → for each size in `BATCHES` the neurons that some token of a batch keeps, summed over batches; then
    for each size all neurons of all its batches. A batch that would not be full is left out. float64 [] each."""
    ones, neurons = [], []
    for _ in BATCHES:
        pairs = len(kept) // 2
        kept = torch.maximum(kept[0 : 2 * pairs : 2], kept[1 : 2 * pairs : 2])
        ones.append(kept.sum(-1).double().sum())
        neurons.append(torch.full_like(ones[-1], kept.numel()))
    return ones + neurons


def mask_figures(totals: Tensor) -> dict[str, float | dict[str, float | None] | None]:
    """density, coverage, precision, captured importance and energy (first tokens of windows apart), and the density of the union of the masks of so
    many tokens as `BATCHES` says, drawn from windows that ran together, from sums [..., fields]."""
    s = dict(zip(_FIELDS, totals.reshape(-1, len(_FIELDS)).sum(0).tolist(), strict=True))

    def ratio(top: str, bottom: str) -> float | None:
        return s[top] / s[bottom] if s[bottom] else None

    return {
        "density": ratio("mask", "neurons"), "coverage": ratio("hits", "active"), "precision": ratio("hits", "mask"),
        "captured_importance": ratio("importance", "rows"), "captured_energy": ratio("energy", "rows"),
        "captured_importance_first": ratio("importance_first", "rows_first"), "captured_energy_first": ratio("energy_first", "rows_first"),
        "union_density": {str(batch): ratio(f"union_{batch}", f"neurons_{batch}") for batch in BATCHES},
    }  # fmt: skip


def layer_figures(totals: Tensor) -> dict[str, list[float | None]]:
    """The same figures for each layer, over its sites; totals [sites, L, fields]."""
    layers = [mask_figures(totals[:, layer]) for layer in range(totals.shape[1])]
    return {name: [figures[name] for figures in layers] for name in layers[0] if name != "union_density"}


def site_densities(totals: Tensor, sites: list[str]) -> dict[str, list[float]]:
    """The share of neurons that masks keep at each site of each layer; totals [sites, L, fields]."""
    return {site: [mask_figures(layer)["density"] for layer in totals[index]] for index, site in enumerate(sites)}


def window_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean next-token loss (nats) of each window, scored alone: int64 [n, seq_len] → float64 [n]."""
    logits = model(input_ids=windows, use_cache=False).logits
    losses = [F.cross_entropy(one[:-1].float(), ids[1:]) for one, ids in zip(logits, windows, strict=True)]
    return torch.stack(losses).double()


def perplexity(losses: Tensor) -> float:
    """exp of the mean loss; infinity where that overflows. losses: float64 [windows]."""
    mean = losses.mean().item()
    return math.exp(mean) if mean < 700 else math.inf


def perplexity_ratio(losses: Tensor, dense: Tensor) -> tuple[float, float | None, float | None]:
    """(ratio to dense, lower, upper): perplexity over the dense model's, and its 95 % interval from differences paired by window
    (Student's t). A single window has no interval."""
    difference = losses - dense
    mean, count = difference.mean().item(), len(difference)
    ratio = math.exp(min(mean, 700))
    if count < 2:
        return ratio, None, None
    half = student_t95(count - 1) * difference.std().item() / math.sqrt(count)
    return ratio, math.exp(min(mean - half, 700)), math.exp(min(mean + half, 700))


def student_t95(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Cornish-Fisher expansion about the normal's; exact table below 4 degrees)."""
    table = {1: 12.706, 2: 4.303, 3: 3.182}
    if freedom in table:
        return table[freedom]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
