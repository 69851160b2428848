"""The codebook: what clustering leaves. It needs neither the training code nor the patterns to be used.

Shape letters: L layers, G groups (L, or 1 if pooled), K clusters, D neurons at a site, W bytes of a packed row.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from apc import ops
from apc.collect.patterns import ActiveRule
from apc.config.schema import WEIGHTINGS
from apc.utils.errors import UserError
from apc.utils.tensor_files import load_tensors, save_tensors, wrong_field

KIND, VERSION = "apc-codebook", 3
_OLD_NAMES = {"ones": "centroid_size"}  # in the header of version 2


@dataclass
class SiteCodebook:
    """One site's clusters.

    centroids: uint8 [G, K, W], packed masks, with exactly m ones unless the codebook's ones are free; profiles: float16 [G, K, D], the mean pattern
    of each cluster under the fitted weighting, scaled to a mean of 1 over the neurons (a cluster without members: its centroid);
    sizes: int64 [G, K], rows in each cluster; static: uint8 [L, W], the best single mask of m ones for each layer;
    thresholds: float32 [L], zero where the rule is `top`; offsets: float32 [G, K, E], what is added to an FFN's output in place of what a cluster's
    mask drops, or None.
    """

    centroids: Tensor
    profiles: Tensor
    sizes: Tensor
    static: Tensor
    thresholds: Tensor
    offsets: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class Codebook:
    """Masks for the FFNs of a model, and how they came about.

    widths: neurons at each site; provenance: model, text, configuration, versions and commit;
    density: share m / D of ones in masks of a fixed size: static, random and soft ones, and the centroids if `centroid_size` is fixed;
    centroid_size: fixed or free. Free centroids have as many ones as their clusters gave them, down to none: such a mask keeps no neuron, and the FFN
    then adds nothing for the token; penalty: of a one that a free centroid lacks, in the distance that patterns are assigned by;
    budget: how many ones the masks of each layer have, where layers differ (static masks do not), else empty.
    """

    sites: dict[str, SiteCodebook]
    widths: dict[str, int]
    layers: int
    hidden_size: int
    ffn_width: int
    scope: str
    weighting: str
    density: float
    active: str
    sparsity: float
    provenance: dict = field(default_factory=dict)
    centroid_size: str = "fixed"
    penalty: int = 1
    budget: list[int] = field(default_factory=list)

    def size(self, site: str, layer: int) -> int:
        """Ones in a layer's masks."""
        return self.budget[layer] if self.budget else ops.mask_size(self.widths[site], self.density)

    @property
    def k(self) -> int:
        return next(iter(self.sites.values())).centroids.shape[1]

    @property
    def power(self) -> int:
        """The power of the importance that patterns were weighted with; 0: binary."""
        return WEIGHTINGS[self.weighting]

    @property
    def rule(self) -> ActiveRule:
        return ActiveRule(self.active, self.sparsity, {site: book.thresholds for site, book in self.sites.items()})

    def group(self, layer: int) -> int:
        """The group whose centroids a layer uses."""
        return 0 if self.scope == "pooled" else layer

    def nearest(self, rows: Tensor, centroids: Tensor) -> Tensor:
        """int64 [..., n]: the cluster of each row, uint8 [..., n, D] importances if patterns were weighted, else packed patterns [..., n, W].

        The distance is the one that the codebook was made with: the masked one, or with free ones Hamming's. By the masked distance most rows would go
        to whatever centroid has most ones; among centroids of one size the two agree.
        """
        if self.power:
            return ops.assign_weighted(rows, centroids, self.power)[0]
        if self.centroid_size == "free":
            return ops.assign_hamming(rows, centroids, self.penalty, scores=False)[0]
        return ops.assign(rows, centroids)[0]

    def to(self, device: torch.device) -> "Codebook":
        moved = {
            site: SiteCodebook(**{name: value.to(device) for name, value in book.tensors().items()})
            for site, book in self.sites.items()
        }
        return Codebook(**{**vars(self), "sites": moved})

    def save(self, path: str | Path) -> None:
        header = {name: value for name, value in vars(self).items() if name != "sites"}
        tensors = {
            f"{name}.{site}": value for site, book in self.sites.items() for name, value in book.tensors().items()
        }
        save_tensors(Path(path), KIND, VERSION, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> "Codebook":
        """Raises UserError, naming the file, if it is missing, damaged, or doesn't hold what its header says."""
        path = Path(path)
        header, tensors = load_tensors(path, KIND, (2, VERSION), _OLD_NAMES)
        try:
            if wrong := wrong_field(header, _HEADER):
                raise ValueError(wrong)
            sites = {
                site: SiteCodebook(
                    **{name.removesuffix(f".{site}"): tensors[name] for name in tensors if name.endswith(f".{site}")}
                )
                for site in header["widths"]
            }
            book = cls(sites=sites, **header)
            problem = book.problem()
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            RuntimeError,
        ) as error:  # whatever it is that does not go together
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: damaged (its header and tensors don't match: {reason}); make it again") from error
        if problem:
            raise UserError(f"{path}: damaged ({problem}); make it again")
        return book

    def problem(self) -> str | None:
        """What is inconsistent in the codebook; None if nothing is."""
        G, L = 1 if self.scope == "pooled" else self.layers, self.layers
        if (
            not self.sites
            or min(L, self.hidden_size, self.ffn_width, *self.widths.values()) < 1
            or not 0 < self.density < 1
            or not 0 < self.sparsity < 1
        ):
            return f"{L} layers, hidden size {self.hidden_size}, widths {self.widths}, density {self.density} or sparsity {self.sparsity}"
        if (
            self.weighting not in WEIGHTINGS
            or self.scope not in ("layer", "pooled")
            or self.active not in ("threshold", "top")
        ):
            return f"unknown weighting {self.weighting}, scope {self.scope} or active rule {self.active}"
        if (
            self.centroid_size not in ("fixed", "free")
            or self.penalty < 1
            or (self.centroid_size == "free" and self.power)
        ):
            return f"centroid size {self.centroid_size}, penalty {self.penalty} and weighting {self.weighting} do not go together"
        for site, book in self.sites.items():
            D = self.widths[site]
            K, W = book.centroids.shape[-2] if book.centroids.dim() == 3 else 0, ops.row_bytes(D)
            expected = dict(
                centroids=(G, K, W),
                profiles=(G, K, D),
                sizes=(G, K),
                static=(L, W),
                thresholds=(L,),
                offsets=(G, K, self.hidden_size),
            )
            for name, value in book.tensors().items():
                if tuple(value.shape) != expected[name]:
                    return f"{name} of site {site} is {tuple(value.shape)}, expected {expected[name]}"
            if self.budget and (len(self.budget) != L or G != L or not all(0 < m <= D for m in self.budget)):
                return f"the budget {self.budget} is none for {L} layers of {D} neurons"
            m = ops.mask_size(D, self.density)
            sizes = torch.tensor([self.size(site, layer) for layer in range(G)]).unsqueeze(1)
            for name, ones in (("centroids", sizes), ("static", m)):
                masks = getattr(book, name)
                counts, inside = (ops.popcount(found).cpu() for found in (masks, ops.pack(ops.unpack(masks, D))))
                if masks.dtype != torch.uint8 or not torch.equal(counts, inside):
                    return f"a mask in {name} of site {site} has ones beyond its {D} neurons"
                if (name == "static" or self.centroid_size == "fixed") and not bool((counts == ones).all()):
                    right = m if name == "static" or not self.budget else "its layer's number of"
                    return f"a mask in {name} of site {site} does not have {right} ones in {D} neurons"
        return None


_HEADER = dict(
    widths=dict, layers=int, hidden_size=int, ffn_width=int, scope=str, weighting=str, density=float, active=str, sparsity=float, provenance=dict, centroid_size=str,
    penalty=int, budget=(list, type(None)),
)  # fmt: skip
