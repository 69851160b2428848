"""Policies that decide neuron by neuron."""

from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook
from apc.predict.predictor import Predictor
from apc.sparse.policies.base import MaskDecision, MaskInputs, MaskPolicy, PredictorPolicy


class Gate(MaskPolicy):
    """The top share by |act(gate)|, the rule of CATS (Lee et al., 2024): gate runs in full, up and down are masked."""

    name = "gate"
    reads_gate = True
    sites = ("neuron",)
    color, marker = "#56B4E9", "X"

    def mask(self, inputs: MaskInputs) -> Tensor:
        return ops.top_mask(inputs.gate.float().abs(), self.size(inputs), check=False)


class NeuronPredictor(PredictorPolicy):
    """The top share of scores predicted neuron by neuron.

    The scores come from a bottleneck (the form of Deja Vu, Liu et al., 2023) or from a low-bit copy of gate and up.
    """

    name = "neuron-predictor"
    forms = ("neuron", "low-bit")
    tunable = True
    monitored = True
    by_threshold = False
    color, marker = "#882255", "*"

    @property
    def kernel(self) -> str:
        return "masks" if self.predictor.low_bit is None else "low-bit"

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        scores, correction = self.outputs(inputs)
        return MaskDecision(ops.top_mask(scores, self.size(inputs), check=False), correction)


class NeuronThreshold(NeuronPredictor):
    """The neurons whose score reaches their layer's threshold.

    Tokens keep as many as they need: on average over the fit text, as many as a mask of fixed size.
    """

    name = "neuron-threshold"
    tunable = False
    tuned_as = "neuron-predictor"
    monitored = False  # thresholds are found after the training
    by_threshold = True
    color, marker = "#44AA99", "<"

    @classmethod
    def missing(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        found = super().missing(codebook, predictor)
        return found or (
            None if predictor.thresholds is not None else "the predictor has no thresholds; train it again"
        )

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        scores, correction = self.outputs(inputs)
        return MaskDecision(scores >= self.predictor.thresholds[inputs.layer], correction)
