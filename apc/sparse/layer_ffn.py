"""One layer's FFN that reads only the weight rows that a policy's masks keep, for each kind of policy.

`sparse_ffn.py` puts them into a model. Shape letters: n tokens, E hidden size, D neurons, W bytes of a packed row, H
bottleneck, K clusters.
"""

import functools
import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apc import ops
from apc.collect.patterns import Importance
from apc.data.ffn import LayerFFN
from apc.ops.packed_gpu import PackedClusterFFN
from apc.ops.rounded_weight import RoundedWeight, memory_of
from apc.sparse.masked_forward import check_parts, parts_of
from apc.sparse.packed_weights import packed_ffn
from apc.sparse.policies import MaskInputs, MaskPolicy
from apc.sparse.policies.neurons import NeuronPredictor
from apc.sparse.policies.predicted import Predicted
from apc.sparse.policies.staged import StagedNeuron, StagedPredicted, StagedProx
from apc.utils.errors import UserError

if TYPE_CHECKING:
    from apc.ops.decode_cpu import StagedFFN
    from apc.ops.staged_ffn_cpu import StagedCPU


def store_transposed(ffn: LayerFFN) -> None:
    """Stores an FFN's down projection in transposed form only: the model's own parameter becomes a view of it."""
    if isinstance(ffn.down.weight, RoundedWeight):  # which is transposed
        return
    ffn.down.weight.data = ffn.down.weight.detach().T.contiguous().T


class SparseFFN:
    """One layer's FFN under a policy's masks; `source` is the layer whose FFN input decides them."""

    can_prefetch = False  # whether `ops.sparse_ffn_ahead` of the layer before can list its active neurons

    def __init__(
        self,
        policy: MaskPolicy,
        layer: int,
        ffn: LayerFFN,
        activation: str,
        kernel: str,
        importance: Importance,
    ):
        self.policy, self.layer, self.importance = policy, layer, importance
        self.ffn, self.activation, self.kernel = ffn, activation, kernel
        self.by_triton = kernel == "triton"
        self.source = layer if policy.predictor is None else policy.predictor.source_layer(layer)
        self._parts, self._device, self._dtype = parts_of(ffn), ffn.down.weight.device, ffn.down.weight.dtype
        self._linears = list(ffn.linears)
        self._addresses, self._weights = self._weight_addresses(), self._view_weights()
        self._rounded = self._which_are_rounded()

    def _which_are_rounded(self) -> list[bool]:
        return [isinstance(linear.weight, RoundedWeight) for linear in self._linears]

    def _weight_addresses(self) -> list[int]:
        return [memory_of(linear.weight) for linear in self._linears]

    def _view_weights(self) -> ops.FFNWeights:
        gate, up = self.ffn.projection("gate").detach(), self.ffn.projection("up").detach()
        return ops.FFNWeights(gate, up, self.ffn.down.weight.detach().T, self.activation)

    @property
    def weights(self) -> ops.FFNWeights:
        """The module's weights as they are now, or were at the last `follow_changes`."""
        return self._view_weights() if torch.compiler.is_compiling() else self._weights

    def kernel_for(self, hidden: Tensor) -> str:
        """The kernel for inputs [n, E]: with many tokens torch, whose products use each weight that they read often."""
        return "torch" if self.kernel == "numba" and len(hidden) > ops.MAX_TOKENS else self.kernel

    def follow_changes(self) -> None:
        """Stores new down weights in transposed form. Raises UserError for changes that this FFN can't follow."""
        check_parts(self.ffn, self._parts)
        for name, part in self._parts.items():
            if part._forward_hooks or part._forward_pre_hooks:
                problem = f"its {name} has forward hooks, which a kernel does not call"
                raise UserError(f"{self.ffn.name}: {problem}; remove them, or use kernel=None")
        if self._weight_addresses() == self._addresses:
            return
        down = self.ffn.down.weight
        if down.device != self._device or down.dtype != self._dtype:
            now, before = f"{down.dtype} on {down.device}", f"{self._dtype} on {self._device}"
            problem = f"its weights are {now}, at sparsify they were {before}"
            raise UserError(f"{self.ffn.name}: {problem}; call apc.sparsify again")
        if self._which_are_rounded() != self._rounded:
            problem = "some of its weights are stored at 8 bits now and were not at sparsify, or the other way round"
            raise UserError(f"{self.ffn.name}: {problem}; call apc.sparsify again")
        if not down.T.is_contiguous():
            store_transposed(self.ffn)
        self._addresses, self._weights = self._weight_addresses(), self._view_weights()

    def __call__(self, hidden: Tensor, inputs: dict[int, Tensor], clusters: Tensor | None = None) -> Tensor:
        """The output [n, E]. inputs: FFN inputs [n, E] by layer; clusters: int32 [n, 1], replace predicted ones."""
        raise NotImplementedError

    def timed(self, hidden: Tensor, inputs: dict[int, Tensor], clusters: Tensor) -> Tensor:
        """A call as usual in decoding, for random hidden [n, E]."""
        return self(hidden, inputs, clusters)

    def for_step(self):
        """What `ops.decode_cpu` takes as this FFN; None if that can't compute it."""
        return None

    def packed(self) -> PackedClusterFFN | None:
        """What `ops.decode_packed` takes as this FFN, with weights of 4 bits; None if that can't compute it."""
        return None


class ByMasks(SparseFFN):
    """An FFN under masks that the policy itself decides for each token."""

    def __init__(self, *given):
        super().__init__(*given)
        self.number = next(_NUMBERS)
        _POLICY_FFNS[self.number] = self

    def __call__(self, hidden: Tensor, inputs: dict[int, Tensor], clusters: Tensor | None = None) -> Tensor:
        """The output under the policy's masks, with what it adds."""
        masks, delta = torch.ops.apc.choose(inputs[self.source], self.ffn.width, self.number)
        return ops.sparse_ffn(hidden, self.weights, ops.ActiveNeurons(masks), kernel=self.kernel_for(hidden)) + delta


_NUMBERS = itertools.count()
_POLICY_FFNS: weakref.WeakValueDictionary[int, ByMasks] = weakref.WeakValueDictionary()


@torch.library.custom_op("apc::choose", mutates_args=())
def _choose(hidden: Tensor, neurons: int, number: int) -> tuple[Tensor, Tensor]:
    """A policy's masks uint8 [n, W] and output delta [n, E], from FFN inputs [n, E] and the number of a `ByMasks`.

    One operation for torch.compile, which then does not trace the policy.
    """
    ffn = _POLICY_FFNS[number]
    values = hidden.new_empty(1).expand(len(hidden), neurons)  # only their shape: they are not known yet
    inputs = MaskInputs(ffn.layer, "neuron", values, {ffn.source: hidden}, ffn.policy.codebook, ffn.importance, ffn.ffn)
    decision = ffn.policy.decide(inputs)
    masks = ops.pack(decision.mask.expand(len(hidden), neurons))
    zeros = torch.zeros_like(hidden)
    return masks, zeros if decision.output_delta is None else zeros + decision.output_delta.to(hidden.dtype)


@_choose.register_fake
def _(hidden: Tensor, neurons: int, number: int) -> tuple[Tensor, Tensor]:
    return hidden.new_empty((len(hidden), ops.row_bytes(neurons)), dtype=torch.uint8), torch.empty_like(hidden)


class ByClusters(SparseFFN):
    """An FFN under the mask of the cluster that a predictor chooses."""

    def __init__(self, policy: Predicted, layer: int, *given):
        super().__init__(policy, layer, *given)
        weights = self.weights
        book, group = policy.codebook.sites["neuron"], policy.codebook.group(layer)
        parts = policy.predictor.layer(layer).weights
        to_stored, to_fp32 = _converters(weights.down.device)
        to_rows = _converters(weights.down.device, by_torch=self.kernel != "numba")[0]
        self.predictor = ops.PredictorWeights(
            to_rows(parts["reduce"].T),
            to_fp32(parts["reduce_bias"]),
            to_rows(parts["expand.neuron"].T),
            to_fp32(parts["expand_bias.neuron"]),
        )
        self._on_cpu = None
        if self.kernel == "numba":
            from apc.ops.predict_cpu import PredictorCPU  # imports numba
            from apc.ops.rounded import rounded_predictor

            if isinstance(weights.gate, RoundedWeight):
                self.predictor = rounded_predictor(self.predictor)
            self._on_cpu = PredictorCPU(self.predictor, weights.gate.dtype)
        # The clusters' masks, uint8 [K, W], and what decides which of their rows of up and down are read.
        self.centroids, self.refinement = book.centroids[group].to(weights.down.device).contiguous(), None
        if isinstance(policy, StagedPredicted):
            tensors = {name: value[layer].to(weights.down.device) for name, value in policy.tensors.items()}
            self.centroids = tensors["masks"].contiguous()
            self.refinement = ops.Refinement(tensors["thresholds"][1:], self.ffn.output_norms())
        # [H, E] and float32 [E]
        self.correct = (
            (to_stored(parts["correct"]), to_fp32(parts["correct_bias"])) if policy.predictor.corrects else None
        )
        self.offsets = None if book.offsets is None else to_stored(book.offsets[group])  # [K, E]
        same_type = self.predictor.reduce.dtype == weights.gate.dtype
        self.can_prefetch = self.by_triton and same_type and ops.can_prefetch(weights)

    def __call__(self, hidden: Tensor, inputs: dict[int, Tensor], clusters: Tensor | None = None) -> Tensor:
        """The output under the cluster's mask, refined by stages, with correction and offset."""
        prediction = self.predict(inputs)
        if clusters is not None:
            prediction = ops.Prediction(prediction.bottleneck, ops.Candidates(clusters.float(), clusters))
        active = ops.ActiveNeurons(self.centroids, prediction.candidates)
        delta, kernel = self.delta(prediction), self.kernel_for(hidden)
        return ops.sparse_ffn(hidden, self.weights, active, delta, kernel, self.refinement)

    def timed(self, hidden: Tensor, inputs: dict[int, Tensor], clusters: Tensor) -> Tensor:
        """A call that reads all rows of the clusters' neurons: what stages leave out depends on the inputs."""
        usual, every = self.refinement, None
        if usual is not None:
            every = usual._replace(thresholds=torch.full_like(usual.thresholds, -torch.inf))
        self.refinement = every
        try:
            return self(hidden, inputs, clusters)
        finally:
            self.refinement = usual

    def for_step(self):
        """The kernel with the weights as they are now; None without one."""
        if self._on_cpu is None:
            return None
        from apc.ops.cluster_ffn_cpu import ClusterFFN  # imports numba

        correct = None if self.correct is None else (self.correct[0].to(self.predictor.reduce.dtype), self.correct[1])
        return ClusterFFN(self.weights, self.predictor, self.centroids, correct, self.offsets, self.source)

    def packed(self) -> PackedClusterFFN | None:
        """The kernels with the weights as they are now; None for stages."""
        if self.refinement is not None:
            return None
        weights = packed_ffn(self.ffn, self.activation)
        return PackedClusterFFN(weights, self.predictor, self.centroids, self.correct, self.offsets, self.source)

    def predict(self, inputs: dict[int, Tensor]) -> ops.Prediction:
        """The bottleneck and the candidates for each token's cluster."""
        hidden = inputs[self.source]
        if self._on_cpu is None or len(hidden) > ops.MAX_TOKENS or torch.compiler.is_compiling():
            return ops.predict_clusters(hidden, self.predictor, self.by_triton)
        return self._on_cpu(hidden)

    def delta(self, prediction: ops.Prediction) -> ops.OutputDelta:
        """The correction from the bottleneck and the clusters' offsets, where there are any."""
        if self.correct is None:
            return ops.OutputDelta(offsets=self.offsets)
        return ops.OutputDelta(prediction.bottleneck, *self.correct, self.offsets)


class ByLowBitCopy(SparseFFN):
    """An FFN under the mask of the neurons that a low-bit copy of gate and up scores highest, or above a threshold."""

    def __init__(self, policy: NeuronPredictor, layer: int, *given):
        super().__init__(policy, layer, *given)
        device, predictor = self.ffn.down.weight.device, policy.predictor
        assert predictor.low_bit is not None  # the policy's kernel is low-bit
        thresholds = predictor.thresholds if policy.by_threshold else None
        parts, scores = predictor.layer(layer).weights, predictor.low_bit.freeze().layer(layer)
        to_stored, to_fp32 = _converters(device)
        # Masks keep the scores above the threshold, float32 [], or a fixed number of the highest ones.
        self.threshold = None if thresholds is None else to_fp32(thresholds[layer])
        self.size = policy.codebook.size("neuron", layer) if thresholds is None else None
        self.planes = scores.stored.to(device).contiguous()  # uint8 [b, P, D, W]
        self.curve = ops.ScoreCurve(*map(to_fp32, scores.curve))
        # Weights and biases to the bottleneck, [H, E] and float32 [H], and from it, [H, E] and float32 [E]. None
        # without a correction.
        self.reduce = (to_stored(parts["reduce"].T), to_fp32(parts["reduce_bias"])) if predictor.corrects else None
        self.correct = (to_stored(parts["correct"]), to_fp32(parts["correct_bias"])) if predictor.corrects else None
        self._projections, self._looks_ahead = tuple(predictor.low_bit.projections), predictor.lookahead > 0

    def for_step(self):
        """The kernel for stages, of which only the first leaves neurons out; None without one or for a fixed number."""
        if self.kernel != "numba" or self.threshold is None or self._looks_ahead:
            return None
        return _staged_step(self._on_cpu, self.weights)

    @functools.cached_property
    def _on_cpu(self):
        from apc.ops.staged_ffn_cpu import StagedCPU  # imports numba

        assert self.threshold is not None  # `for_step` checks it
        copy = ops.LowBitCopy(self.planes, self.curve, self._projections)
        every = self.threshold.new_tensor(-torch.inf)
        thresholds, correction = torch.stack([self.threshold, every, every]), None
        if self.reduce is not None and self.correct is not None:
            correction = ops.Correction(*self.reduce, *self.correct)
        return StagedCPU(ops.Stages(copy, thresholds, self.ffn.output_norms(), None, correction), self.weights)

    def __call__(self, hidden: Tensor, inputs: dict[int, Tensor], clusters: Tensor | None = None) -> Tensor:
        """The output under the mask of the scores, with the correction."""
        source, by_triton, delta = inputs[self.source], self.by_triton, ops.OutputDelta()
        if self.reduce is not None and self.correct is not None:
            delta = ops.OutputDelta(ops.bottleneck(source, *self.reduce, by_triton), *self.correct)
        masks = ops.low_bit_scores(source, self.planes, self.curve, self.threshold, by_triton)
        if self.size is not None:
            masks = torch.ops.apc.top_packed(masks, self.size)
        return ops.sparse_ffn(hidden, self.weights, ops.ActiveNeurons(masks), delta, self.kernel_for(hidden))


class InStages(SparseFFN):
    """An FFN in the stages of a low-bit copy."""

    def __init__(self, policy: StagedNeuron | StagedProx, layer: int, *given):
        super().__init__(policy, layer, *given)
        predictor, tensors, low_rank, correction = policy.predictor, policy.tensors, None, None
        if policy.adapts_weights:
            pair = lambda name: (tensors[f"lora_{name}_a"][layer], tensors[f"lora_{name}_b"][layer])
            low_rank = ops.LowRank(pair("gate"), pair("up"), pair("down"))
        if predictor is not None and predictor.corrects:
            parts, (to_stored, to_fp32) = predictor.layer(layer).weights, _converters(self._device)
            correction = ops.Correction(
                to_stored(parts["reduce"].T),
                to_fp32(parts["reduce_bias"]),
                to_stored(parts["correct"]),
                to_fp32(parts["correct_bias"]),
            )
        copy, thresholds = policy.stored_copy(layer), tensors["thresholds"][layer]
        self.stages = ops.Stages(copy, thresholds, self.ffn.output_norms(), low_rank, correction)
        self._on_cpu = None
        if self.kernel == "numba":
            from apc.ops.staged_ffn_cpu import StagedCPU  # imports numba

            self._on_cpu = StagedCPU(self.stages, self.weights)
        self.number = next(_NUMBERS)
        _STAGED_FFNS[self.number] = self

    def __call__(self, hidden: Tensor, inputs: dict[int, Tensor], clusters: Tensor | None = None) -> Tensor:
        """The output in stages."""
        if torch.compiler.is_compiling() or (hidden.requires_grad and torch.is_grad_enabled()):
            return torch.ops.apc.staged(hidden, self.number)  # whose backward pass is an error
        return self.compute(hidden)

    def compute(self, hidden: Tensor) -> Tensor:
        """The output [n, E] for hidden [n, E], in its type."""
        if self.by_triton:
            return ops.staged_ffn_triton(hidden, self.weights, self.stages)
        if self._on_cpu is None or len(hidden) > ops.MAX_TOKENS:
            return ops.staged_ffn(hidden, self.weights, self.stages)
        return self._on_cpu(hidden, self.weights)

    def timed(self, hidden: Tensor, inputs: dict[int, Tensor], clusters: Tensor) -> Tensor:
        """A call for inputs that are scaled so that as many rows are read as on the text of the calibration."""
        return self(hidden * self._usual_scale, inputs, clusters)

    def for_step(self):
        """The kernel with the weights as they are now; None without one."""
        return None if self._on_cpu is None else _staged_step(self._on_cpu, self.weights)

    @functools.cached_property
    def _usual_scale(self) -> float:
        """The factor by which random inputs of variance 1 make it read its share of rows; 1 if that is not known."""
        total = self.policy.codebook.calibration.get(self.policy.name, {}).get("bytes")
        if total is None:
            return 1.0
        D, E = self.weights.gate.shape
        share = total - self.policy.parameters_read("neuron") / (3 * D * E)
        generator = torch.Generator(self._device).manual_seed(0)
        hidden = torch.randn((ops.MAX_TOKENS, E), device=self._device, generator=generator)
        low, high = -10.0, 10.0  # powers of two; larger inputs read more
        for _ in range(9):
            middle = (low + high) / 2
            read = ops.staged_reads((hidden * 2**middle).to(self._dtype), self.weights, self.stages)
            low, high = (low, middle) if read > share else (middle, high)
        return 2.0**low


def _staged_step(staged: "StagedCPU", weights: ops.FFNWeights) -> "StagedFFN":
    """What a decoding step on the CPU takes as its FFN."""
    from apc.ops.decode_cpu import StagedFFN  # imports numba

    return StagedFFN(staged, weights)


_STAGED_FFNS: weakref.WeakValueDictionary[int, InStages] = weakref.WeakValueDictionary()


@torch.library.custom_op("apc::staged", mutates_args=())
def _staged(hidden: Tensor, number: int) -> Tensor:
    """The output of an `InStages` by its number, [n, E]: one operation for torch.compile."""
    return _STAGED_FFNS[number].compute(hidden)


@_staged.register_fake
def _(hidden: Tensor, number: int) -> Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("apc::top_packed", mutates_args=())
def _top_packed(scores: Tensor, m: int) -> Tensor:
    """Packed masks uint8 [n, W] of the m largest scores in each row; scores: float [n, D]."""
    return ops.pack(ops.top_mask(scores, m, check=False))


@_top_packed.register_fake
def _(scores: Tensor, m: int) -> Tensor:
    return scores.new_empty((len(scores), ops.row_bytes(scores.shape[1])), dtype=torch.uint8)


def _converters(device: torch.device, by_torch: bool = True) -> list:
    """Conversions of a predictor's matrices and of its other values, to the types that they are stored in.

    Matrices: bfloat16, which is exact because training rounded them; by torch on the CPU float32, to which it would
    convert them in each call. Other values: float32.
    """
    types = (torch.float32 if device.type == "cpu" and by_torch else torch.bfloat16, torch.float32)
    return [lambda value, dtype=dtype: value.detach().to(device, dtype).contiguous() for dtype in types]


SPARSE_FFNS: dict[str, type[SparseFFN]] = {
    "cluster": ByClusters,
    "low-bit": ByLowBitCopy,
    "masks": ByMasks,
    "stages": InStages,
}
