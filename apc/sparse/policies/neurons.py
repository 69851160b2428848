"""Policies whose predictor scores single neurons."""

from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook
from apc.predict.predictor import Predictor
from apc.sparse.policies.base import MaskDecision, MaskInputs, PredictorPolicy


class NeuronPredictor(PredictorPolicy):
    """Keeps the neurons with the highest predicted scores.

    The scores come from a bottleneck (the form of Deja Vu, Liu et al., 2023) or from a low-bit copy of gate and up.
    """

    name = "neuron-predictor"
    in_sparsify = True
    forms = ("neuron", "low-bit")
    tunable = True
    monitored = True
    by_threshold = False  # it keeps the scores above a threshold, not a fixed number of them
    color, marker = "#882255", "*"

    def kernel_by(self, way: str) -> str | None:
        """low-bit for a low-bit predictor, unless it is read at some inputs only; else masks."""
        low_bit = self.predictor.low_bit
        return "masks" if low_bit is None else None if low_bit.by_input else "low-bit"

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The highest scores, as many as a mask of fixed size keeps."""
        scores, correction = self.outputs(inputs)
        return MaskDecision(ops.top_mask(scores, self.size(inputs), check=False), correction, self.copy_read(inputs))

    def copy_read(self, inputs: MaskInputs) -> dict[str, Tensor]:
        """The entry of `MaskDecision.read` for a low-bit copy that is not read at all inputs; else nothing."""
        low_bit = self.predictor.low_bit
        if low_bit is None or not low_bit.by_input:
            return {}
        return {"copy": low_bit.inputs_read(self.hidden(inputs), inputs.layer)}


class NeuronThreshold(NeuronPredictor):
    """Keeps the neurons whose score reaches their layer's threshold.

    Each token keeps as many as it needs. On average over the fit text that is as many as a mask of fixed size keeps.
    """

    name = "neuron-threshold"
    in_sparsify = False
    tunable = False
    tuned_as = "neuron-predictor"
    monitored = False  # thresholds are computed after the training
    by_threshold = True
    color, marker = "#44AA99", "<"

    @classmethod
    def missing(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        """Why the policy can't run with this codebook and predictor; None if it can."""
        reason = super().missing(codebook, predictor)
        if reason is None and predictor is not None and predictor.thresholds is None:
            return "the predictor has no thresholds; train it again"
        return reason

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The scores that reach the threshold."""
        assert self.predictor.thresholds is not None  # `missing` checks it
        scores, correction = self.outputs(inputs)
        mask = scores >= self.predictor.thresholds[inputs.layer]
        return MaskDecision(mask, correction, self.copy_read(inputs))
