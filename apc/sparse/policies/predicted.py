"""Policies that predict a cluster, or mix clusters by their predicted probabilities."""

from dataclasses import replace

from apc import ops
from apc.sparse.policies.base import ClusterPolicy, MaskDecision, MaskInputs, PredictorPolicy, add_deltas


class Predicted(PredictorPolicy, ClusterPolicy):
    """The centroid of the likeliest cluster."""

    name = "predicted"
    by_default = True
    tunable = True
    monitored = True
    gap_to = "oracle"
    kernel = "cluster"
    color, marker = "#D55E00", "o"

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        logits, correction = self.outputs(inputs)
        chosen = self.from_clusters(inputs, logits.argmax(-1))
        return replace(chosen, output_delta=add_deltas(chosen.output_delta, correction))


class Soft(PredictorPolicy, ClusterPolicy):
    """The top share of the profiles, mixed by the predicted probabilities."""

    name = "soft"
    by_default = True
    by_cluster = False
    monitored = True
    color, marker = "#CC79A7", "P"

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        book, group = self.codebook.sites[inputs.site], self.codebook.group(inputs.layer)
        logits, correction = self.outputs(inputs)
        shares = logits.softmax(-1)
        mask = ops.top_mask(shares @ book.profiles[group].float(), self.size(inputs), check=False)
        return MaskDecision(
            mask, add_deltas(correction, None if book.offsets is None else shares @ book.offsets[group])
        )

    def parameters_read(self, site: str) -> float:
        return self._of_all_clusters(site) + self.predictor.parameters_read(site)

    def multiplications(self, site: str) -> float:
        return self._of_all_clusters(site) + self.predictor.multiplications(site)

    def _of_all_clusters(self, site: str) -> int:
        """Profiles and offsets of every cluster are read, and multiplied."""
        offsets = self.codebook.hidden_size if self.codebook.sites[site].offsets is not None else 0
        return self.codebook.k * (self.codebook.widths[site] + offsets)
