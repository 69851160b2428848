"""The codebook, the result of clustering. Using it needs neither the training code nor the patterns.

Shape letters: L layers, G groups (L, or 1 if pooled), K clusters, D neurons at a site, W bytes of a packed row.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_origin

import torch
from torch import Tensor

from apc import ops
from apc.collect.patterns import ActiveRule
from apc.config.schema import WEIGHTINGS
from apc.utils.errors import UserError, first_line
from apc.utils.tensor_files import load_tensors, save_tensors, wrong_field

KIND, VERSION = "apc-codebook", 4  # version 3 lacks `calibrated`
_CALIBRATED = "calibrated."  # the prefix of these tensors' names in a file, before the policy and a dot
_OLD_NAMES = {"ones": "centroid_size"}  # in the header of version 2


@dataclass
class SiteCodebook:
    """One site's clusters.

    centroids: uint8 [G, K, W], packed masks. Each has exactly m ones, or any number if the codebook's centroid_size
        is free.
    profiles: float16 [G, K, D], each cluster's mean pattern under the codebook's weighting, scaled to a mean of 1 over
        the neurons. The profile of an empty cluster is its centroid, scaled in the same way. [G, K, 0] if they were
        left out, as for sharing.
    sizes: int64 [G, K], rows in each cluster.
    static: uint8 [L, W], the best single mask of m ones for each layer.
    thresholds: float32 [L], the importance from which a neuron is active; zero if the rule is `top`.
    offsets: float32 [G, K, E], a vector that replaces the output of the neurons that the cluster's mask drops; or None.
    """

    centroids: Tensor
    profiles: Tensor
    sizes: Tensor
    static: Tensor
    thresholds: Tensor
    offsets: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class Codebook:
    """Masks for the FFNs of a model, and their provenance.

    widths: neurons at each site.
    density: the share m / D of ones in masks of fixed size. These are static, random and soft masks, and the centroids
        if centroid_size is fixed.
    provenance: model, text, configuration, versions and commit.
    centroid_size: fixed or free. The number of ones of a free centroid depends on its cluster's patterns. If it has no
        ones, the FFN's output is zero.
    penalty: for free centroids, the cost of each one that a pattern has and the centroid lacks, in the distance by
        which patterns are assigned.
    budget: the number of ones in each layer's masks, if it differs by layer; else empty. Static and random masks have
        m ones with any budget.
    projections: weight matrices in an FFN: 3 with a gate, 2 without.
    experts: routed experts per layer in a mixture of experts, else 0. In a mixture, L counts all routed experts, layer
        by layer.
    calibrated: what policies took from fit text, by policy: named tensors with a row for each layer.
    calibration: how they did, by policy: the share of bytes that it keeps to, and what it was made with.
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
    projections: int = 3
    experts: int = 0
    calibrated: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    calibration: dict[str, dict] = field(default_factory=dict)

    def size(self, site: str, layer: int) -> int:
        """Number of ones in each of a layer's masks of fixed size."""
        return self.budget[layer] if self.budget else ops.mask_size(self.widths[site], self.density)

    @property
    def k(self) -> int:
        """Clusters per group."""
        return next(iter(self.sites.values())).centroids.shape[1]

    @property
    def power(self) -> int:
        """The power of the importance in the weighting; 0: binary patterns."""
        return WEIGHTINGS[self.weighting]

    @property
    def rule(self) -> ActiveRule:
        """The rule for active neurons that the patterns were collected with."""
        return ActiveRule(self.active, self.sparsity, {site: book.thresholds for site, book in self.sites.items()})

    def group(self, layer: int) -> int:
        """The group whose centroids a layer uses."""
        return 0 if self.scope == "pooled" else layer

    def nearest(self, rows: Tensor, centroids: Tensor) -> Tensor:
        """The nearest cluster of each row, int64 [..., n], by the distance that the codebook was clustered with.

        rows: importances uint8 [..., n, D] if the weighting has a power, else packed patterns uint8 [..., n, W]. The
        distance is the masked one, or the Hamming distance if centroid_size is free: by the masked distance, most rows
        would then go to the centroid with the most ones. For centroids of one size the two agree.
        """
        if self.power:
            return ops.assign_weighted(rows, centroids, self.power)[0]
        if self.centroid_size == "free":
            return ops.assign_hamming(rows, centroids, self.penalty, scores=False)[0]
        return ops.assign(rows, centroids)[0]

    def to(self, device: torch.device) -> "Codebook":
        """The codebook on a device."""
        moved = {
            site: SiteCodebook(**{name: value.to(device) for name, value in book.tensors().items()})
            for site, book in self.sites.items()
        }
        calibrated = {
            policy: {name: value.to(device) for name, value in tensors.items()}
            for policy, tensors in self.calibrated.items()
        }
        return replace(self, sites=moved, calibrated=calibrated)

    def with_calibrated(self, policy: str, tensors: dict[str, Tensor], facts: dict) -> "Codebook":
        """A copy with a policy's tensors, and the facts of how they were made."""
        calibrated, calibration = self.calibrated | {policy: tensors}, self.calibration | {policy: facts}
        return replace(self, calibrated=calibrated, calibration=calibration)

    def without_calibrated(self) -> "Codebook":
        """A copy that no policy is calibrated for."""
        return replace(self, calibrated={}, calibration={})

    def without_profiles(self) -> "Codebook":
        """A copy without profiles, which only the policy `soft` and tuning need."""
        sites = {site: replace(book, profiles=book.profiles[..., :0]) for site, book in self.sites.items()}
        return replace(self, sites=sites)

    def save(self, path: str | Path) -> None:
        """Writes the codebook to a file."""
        header = {name: value for name, value in vars(self).items() if name not in ("sites", "calibrated")}
        books = self.sites.items()
        tensors = {f"{name}.{site}": value for site, book in books for name, value in book.tensors().items()}
        for policy, named in self.calibrated.items():
            tensors |= {f"{_CALIBRATED}{policy}.{name}": value for name, value in named.items()}
        save_tensors(Path(path), KIND, VERSION, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> "Codebook":
        """The codebook in a file. Raises UserError, naming the file, if it is missing, damaged or inconsistent."""
        path = Path(path)
        header, tensors = load_tensors(path, KIND, (2, 3, VERSION), _OLD_NAMES)
        try:
            if wrong := wrong_field(header, _HEADER):
                raise ValueError(wrong)
            calibrated: dict[str, dict[str, Tensor]] = {policy: {} for policy in header.get("calibration", ())}
            for name in [name for name in tensors if name.startswith(_CALIBRATED)]:
                policy, _, part = name.removeprefix(_CALIBRATED).partition(".")
                calibrated[policy][part] = tensors.pop(name)
            of_site = {
                site: {name.removesuffix(f".{site}"): tensors[name] for name in tensors if name.endswith(f".{site}")}
                for site in header["widths"]
            }
            sites = {site: SiteCodebook(**named) for site, named in of_site.items()}
            book = cls(sites, **header, calibrated=calibrated)
            problem = book.problem()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            reason = first_line(error)
            raise UserError(f"{path}: damaged (its header and tensors don't match: {reason}); make it again") from error
        if problem:
            raise UserError(f"{path}: damaged ({problem}); make it again")
        return book

    def problem(self) -> str | None:
        """The first inconsistency in the codebook; None if there is none."""
        smallest = min(self.layers, self.hidden_size, self.ffn_width, *self.widths.values())
        if not self.sites or smallest < 1 or not 0 < self.density < 1 or not 0 < self.sparsity < 1:
            sizes = f"{self.layers} layers, hidden size {self.hidden_size}, widths {self.widths}"
            return f"{sizes}, density {self.density} or sparsity {self.sparsity}"
        known = self.weighting in WEIGHTINGS and self.scope in ("layer", "pooled")
        if not known or self.active not in ("threshold", "top"):
            return f"unknown weighting {self.weighting}, scope {self.scope} or active rule {self.active}"
        if self.projections not in (2, 3) or self.experts < 0 or (self.experts and self.layers % self.experts):
            return f"{self.projections} projections, {self.experts} experts"
        weighted_and_free = self.centroid_size == "free" and self.power
        if self.centroid_size not in ("fixed", "free") or self.penalty < 1 or weighted_and_free:
            settings = f"centroid size {self.centroid_size}, penalty {self.penalty} and weighting {self.weighting}"
            return f"{settings} do not go together"
        for policy, tensors in self.calibrated.items():
            if wrong := [name for name, value in tensors.items() if value.shape[:1] != (self.layers,)]:
                return f"{wrong[0]} of the policy {policy} does not have a row for each of {self.layers} layers"
        return next(filter(None, (self._site_problem(site, book) for site, book in self.sites.items())), None)

    def _site_problem(self, site: str, book: SiteCodebook) -> str | None:
        """The first inconsistency in a site's shapes or masks; None if there is none."""
        G, L, D = 1 if self.scope == "pooled" else self.layers, self.layers, self.widths[site]
        K, W = book.centroids.shape[-2] if book.centroids.dim() == 3 else 0, ops.row_bytes(D)
        shapes = dict(centroids=(G, K, W), profiles=(G, K, D), sizes=(G, K), static=(L, W), thresholds=(L,))
        shapes["offsets"] = G, K, self.hidden_size
        if not book.profiles.shape[-1]:
            shapes["profiles"] = G, K, 0
        for name, value in book.tensors().items():
            if tuple(value.shape) != shapes[name]:
                return f"{name} of site {site} is {tuple(value.shape)}, expected {shapes[name]}"
        if self.budget and (len(self.budget) != L or G != L or not all(0 < m <= D for m in self.budget)):
            return f"the budget {self.budget} does not fit {L} layers of {D} neurons"
        m = ops.mask_size(D, self.density)
        layer_sizes = torch.tensor([self.size(site, layer) for layer in range(G)]).unsqueeze(1)
        for name, masks, ones in (("centroids", book.centroids, layer_sizes), ("static", book.static, m)):
            counts, inside = ops.popcount(masks).cpu(), ops.popcount(ops.pack(ops.unpack(masks, D))).cpu()
            if masks.dtype != torch.uint8 or not torch.equal(counts, inside):
                return f"a mask in {name} of site {site} has ones beyond its {D} neurons"
            if (name == "static" or self.centroid_size == "fixed") and not bool((counts == ones).all()):
                expected = m if name == "static" or not self.budget else "its layer's number of"
                return f"a mask in {name} of site {site} does not have {expected} ones in {D} neurons"
        return None


_HEADER: dict = {each.name: get_origin(each.type) or each.type for each in fields(Codebook)}
del _HEADER["sites"], _HEADER["calibrated"]
_HEADER["budget"] = list, type(None)
