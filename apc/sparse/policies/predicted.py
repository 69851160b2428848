"""Policies that predict a token's cluster, or mix clusters by their predicted probabilities."""

from dataclasses import replace

from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook
from apc.predict.predictor import Predictor
from apc.sparse.policies.base import ClusterPolicy, MaskDecision, MaskInputs, PredictorPolicy, add_deltas


class Predicted(PredictorPolicy, ClusterPolicy):
    """Takes the centroid of the likeliest cluster."""

    name = "predicted"
    by_default = True
    in_sparsify = True
    tunable = True
    monitored = True
    gap_to: str | None = "oracle"
    color, marker = "#D55E00", "o"

    def kernel_by(self, way: str) -> str | None:
        """cluster."""
        return "cluster"

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The likeliest cluster's centroid; its offset and the correction are added to the output."""
        logits, correction = self.outputs(inputs)
        chosen = self.from_clusters(inputs, logits.argmax(-1))
        return replace(chosen, output_delta=add_deltas(chosen.output_delta, correction))

    def clusters(self, inputs: MaskInputs) -> Tensor:
        """The likeliest clusters, int64 [n]."""
        return self.outputs(inputs)[0].argmax(-1)


class Soft(PredictorPolicy, ClusterPolicy):
    """Keeps the largest entries of the cluster profiles, mixed by the predicted probabilities."""

    name = "soft"
    by_default = True
    by_cluster = False
    monitored = True
    color, marker = "#CC79A7", "P"

    @classmethod
    def unsupported(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        """Also if the codebook has no profiles."""
        if not all(book.profiles.shape[-1] for book in codebook.sites.values()):
            return "the codebook was shared without profiles; use the run's own"
        return super().unsupported(codebook, predictor)

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The largest entries of the mixed profile; the mixed offset and the correction are added to the output."""
        book, group = self.codebook.sites[inputs.site], self.codebook.group(inputs.layer)
        logits, correction = self.outputs(inputs)
        probabilities = logits.softmax(-1)
        mask = ops.top_mask(probabilities @ book.profiles[group].float(), self.size(inputs), check=False)
        offset = None if book.offsets is None else probabilities @ book.offsets[group]
        return MaskDecision(mask, add_deltas(correction, offset))

    def parameters_read(self, site: str, copy: float | None = None) -> float:
        """The predictor's parameters, and all clusters' profiles and offsets."""
        return self._mixture_parameters(site) + self.predictor.parameters_read(site)

    def multiplications(self, site: str, copy: float | None = None) -> float:
        """One for each parameter of the mixture, plus the predictor's."""
        return self._mixture_parameters(site) + self.predictor.multiplications(site)

    def _mixture_parameters(self, site: str) -> int:
        offsets = self.codebook.hidden_size if self.codebook.sites[site].offsets is not None else 0
        return self.codebook.k * (self.codebook.widths[site] + offsets)
