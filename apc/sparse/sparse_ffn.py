"""FFNs that read only the weight rows that a mask keeps, in a Hugging Face model.

Calls of a few tokens run sparse, by `ops.sparse_ffn` under the policy's masks. Calls of more tokens run dense, because
the masks of many tokens together keep most neurons anyway. So prefill is dense and decoding sparse. The crossover is
measured on the GPU at hand, so that sparse FFNs are never slower than dense ones.

Shape letters: n tokens, E hidden size, D neurons, H bottleneck, K clusters.
"""

import itertools
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from apc import ops
from apc.collect.patterns import Importance
from apc.data.ffn import GatedFFN
from apc.sparse.masked_forward import activation_function
from apc.sparse.policies import MaskDecision, MaskInputs, MaskPolicy, kernel_policies
from apc.sparse.policies.neurons import NeuronPredictor
from apc.sparse.policies.predicted import Predicted
from apc.sparse.timing import graph_time
from apc.utils.errors import UserError

KERNELS = ("auto", "triton", "torch")
# FFNs run sparse only below 97 % of the dense time: torch.compile speeds up dense FFNs of several tokens by about 3 %.
_MAX_TIME_RATIO = 0.97
_BEYOND_CACHE = 2**27  # bytes written in turn that no GPU's cache holds
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}


def activation_of(ffn: GatedFFN) -> str:
    """The name of an FFN's activation for `ops.sparse_ffn`. Raises UserError if it has no kernel."""
    activation = activation_function(ffn)
    kind = type(activation).__name__
    name = _ACTIVATIONS.get(kind, str(getattr(activation, "__name__", kind)))
    if name == "GELU" and getattr(activation, "approximate", "none") == "tanh":
        return "gelu_tanh"
    if name not in _ACTIVATIONS.values():
        known = ", ".join(sorted(set(_ACTIVATIONS.values())))
        raise UserError(f"{ffn.name}: its activation {name} has no kernel (there are {known}); use kernel=None")
    return name


class SparseFFNs:
    """Sparse FFNs in place of a model's own: `install` puts them in, `remove` takes them out.

    While they are installed, the down projections are stored transposed, once: the model's own parameters become views
    of the transposed weights, one layer after the other.

    max_sparse_tokens: calls of more tokens run dense; may be changed between calls.
    """

    max_sparse_tokens: float

    def __init__(self, ffns: list[GatedFFN], policy: MaskPolicy, kernel: str, max_sparse_tokens: float | None):
        """Raises UserError for a policy, a codebook or an FFN that has no kernel."""
        self.policy = policy
        self.by_triton = _by_triton(ffns[0], kernel)
        default_max = ops.MAX_TOKENS if self.by_triton else 1
        self.max_sparse_tokens = default_max if max_sparse_tokens is None else max_sparse_tokens
        self._measures_crossover = max_sparse_tokens is None and self.by_triton and kernel == "auto"
        self._ffns, self._lookahead = ffns, policy.lookahead
        self._importance = Importance(ffns)
        self._activations = [_check_ffn(ffn) for ffn in ffns]
        check_policy(policy)
        self._own_forwards: list[Callable | None] = []  # set on the module itself, not on its class
        self._sparse: list[_SparseFFN] = []
        self._predicting: list[_ClusterFFN] = []  # the sparse FFNs, if they predict clusters for later layers
        self._can_prefetch: list[bool] = []  # whether a layer's active neurons can be listed ahead of the layer
        # State of the current forward pass, by layer: FFN inputs, predictions for layers still to come, and the list of
        # the next layer's active neurons.
        self._inputs: dict[int, Tensor] = {}
        self._predictions: dict[int, ops.Prediction] = {}
        self._active_lists: dict[int, Tensor] = {}

    def install(self) -> "SparseFFNs":
        """Puts the sparse FFNs into the model, and measures the crossover if `kernel=auto` leaves it open."""
        assert self.policy.kernel is not None  # as `check_policy` ensures
        make = _SPARSE_FFNS[self.policy.kernel]
        dense_calls, sparse_calls = [], []
        for layer, ffn in enumerate(self._ffns):
            self._own_forwards.append(ffn.module.__dict__.get("forward"))
            down = ffn.down.weight.detach().T.contiguous()
            ffn.down.weight.data = down.T  # frees the weights as they were stored before
            gate, up = ffn.projection("gate").detach(), ffn.projection("up").detach()
            weights = _Weights(ops.FFNWeights(gate, up, down, self._activations[layer]), self.by_triton)
            sparse = make(self.policy, layer, down.device, self._importance)
            dense_calls.append(ffn.module.forward)
            sparse_calls.append(partial(sparse, weights=weights))
            self._sparse.append(sparse)
            if isinstance(sparse, _ClusterFFN) and self._lookahead:
                self._predicting.append(sparse)
            self._can_prefetch.append(isinstance(sparse, _ClusterFFN) and sparse.can_prefetch(weights))
            ffn.module.forward = self._forward(layer, ffn.module.forward, weights)
        if self._measures_crossover:
            with torch.cuda.device(self._ffns[0].down.weight.device):  # a CUDA graph belongs to the current device
                self.max_sparse_tokens = self._crossover(dense_calls, sparse_calls)
        return self

    @torch.no_grad()
    def _crossover(self, dense: Sequence[Callable], sparse: Sequence[Callable]) -> int:
        """The most tokens in a call for which all layers' FFNs together are faster sparse than dense.

        Tokens get random clusters. For one token, sparse FFNs have to beat reading all weights at the bandwidth of
        copies too: dense FFNs tuned by torch.compile are that fast, while the model's own may be slower. If one token
        does not pay, none run sparse, even if two tokens under one mask would pay.
        """
        weight = self._ffns[0].down.weight
        generator = torch.Generator(weight.device).manual_seed(0)
        for n in range(1, ops.MAX_TOKENS + 1):
            size = (n, self._ffns[0].hidden_size)
            hidden = torch.randn(size, dtype=weight.dtype, device=weight.device, generator=generator)
            inputs = dict.fromkeys(range(len(self._ffns)), hidden)
            k = max(self.policy.codebook.k, 1)
            clusters = torch.randint(k, (n, 1), device=weight.device, generator=generator).int()
            dense_ms = _time(lambda: [call(hidden.unsqueeze(0)) for call in dense])  # noqa: B023
            sparse_ms = _time(lambda: [call(hidden, inputs, clusters=clusters) for call in sparse])  # noqa: B023
            if n == 1:
                dense_ms = min(dense_ms, self._time_to_read())
            if sparse_ms > _MAX_TIME_RATIO * dense_ms:
                return n - 1
        return ops.MAX_TOKENS

    def _time_to_read(self) -> float:
        """Time in ms to read all FFNs' weights once, at the bandwidth of copies (a copy reads and writes)."""
        downs = [ffn.down.weight.T for ffn in self._ffns]
        targets = [torch.empty_like(downs[0]) for _ in range(math.ceil(_BEYOND_CACHE / downs[0].nbytes))]
        pairs = list(zip(itertools.cycle(targets), downs, strict=False))
        return 3 / 2 * _time(lambda: [target.copy_(down) for target, down in pairs])

    def remove(self) -> None:
        """Takes the sparse FFNs out, and stores the down projections as before; does nothing a second time."""
        if not self._own_forwards:
            return
        for ffn, forward in zip(self._ffns, self._own_forwards, strict=True):
            del ffn.module.forward
            if forward is not None:
                ffn.module.forward = forward
            ffn.down.weight.data = ffn.down.weight.data.contiguous()
        for values in (self._own_forwards, self._sparse, self._predicting, self._can_prefetch):
            values.clear()
        for state in (self._inputs, self._predictions, self._active_lists):
            state.clear()

    def _forward(self, layer: int, dense: Callable, weights: "_Weights") -> Callable:
        """The forward of a layer's FFN: dense for many tokens, sparse for few."""

        def forward(x: Tensor) -> Tensor:
            hidden = x.reshape(-1, x.shape[-1])
            if len(hidden) > self.max_sparse_tokens:
                return dense(x)
            return self._run(layer, hidden, weights).view_as(x)

        return forward

    def _run(self, layer: int, hidden: Tensor, weights: "_Weights") -> Tensor:
        """A layer's sparse FFN, [n, E] → [n, E]; leaves what later layers need."""
        if layer == 0:
            self._predictions.clear()
            self._active_lists.clear()
        self._inputs[layer] = hidden
        self._inputs.pop(layer - self._lookahead - 1, None)
        if len(hidden) > ops.MAX_TOKENS and self.by_triton:
            parts = [slice(at, at + ops.MAX_TOKENS) for at in range(0, len(hidden), ops.MAX_TOKENS)]
            return torch.cat([self._run_part(layer, hidden, part, weights) for part in parts])
        if not self._predicting:
            return self._sparse[layer](hidden, self._inputs, weights)
        sparse = self._predicting[layer]
        prediction = self._predictions.pop(layer, None)
        if prediction is None:
            prediction = sparse.predict(self._inputs, weights)
        active_list = self._active_lists.pop(layer, None)
        target = layer + self._lookahead
        if target >= len(self._predicting):
            return sparse.run(hidden, prediction, weights, active_list)
        next_layer = self._next_layer(layer + 1)
        output, self._predictions[target], next_list = sparse.run_ahead(
            hidden, prediction, weights, self._predicting[target], active_list, next_layer
        )
        if next_list is not None:
            self._active_lists[layer + 1] = next_list
        return output

    def _run_part(self, layer: int, hidden: Tensor, part: slice, weights: "_Weights") -> Tensor:
        """A layer's sparse FFN for a part of the tokens."""
        inputs = {source: value[part] for source, value in self._inputs.items()}
        return self._sparse[layer](hidden[part], inputs, weights)

    def _next_layer(self, layer: int) -> ops.NextLayer | None:
        """The next layer, if its active neurons can be listed now.

        Its clusters must be predicted by now, or be those that this call predicts.
        """
        prediction = self._predictions.get(layer)
        if not self._can_prefetch[layer] or (prediction is None and self._lookahead > 1):
            return None
        candidates = None if prediction is None else prediction.candidates
        return ops.NextLayer(self._ffns[layer].width, self._predicting[layer].centroids, candidates)


def _time(calls: Callable[[], object]) -> float:
    """GPU time in ms of calls that read more than the GPU's cache holds."""
    return graph_time(calls, repeats=3, flush_cache=False)


@cache
def _warn_no_triton() -> None:
    """Warns, once in a process, that torch takes the place of Triton kernels."""
    print(
        "apc: no Triton kernels on the CPU; sparse FFNs run by torch, which shows quality, not speed", file=sys.stderr
    )


def _by_triton(ffn: GatedFFN, kernel: str) -> bool:
    if kernel not in KERNELS:
        raise UserError(f"kernel={kernel}: choose {', '.join(KERNELS)}, or None for masks on a dense forward pass")
    device = ffn.down.weight.device
    if kernel == "triton" and device.type != "cuda":
        raise UserError(f"kernel=triton: the model is on {device}; move it to an NVIDIA GPU, or use kernel=torch")
    if kernel == "auto" and device.type != "cuda":
        _warn_no_triton()
    return device.type == "cuda" and kernel != "torch"


def _check_ffn(ffn: GatedFFN) -> str:
    """The name of its activation. Raises UserError if it has biases, or an activation without a kernel."""
    linears = [linear for linear in (ffn.gate, ffn.up, ffn.gate_up, ffn.down) if linear is not None]
    if any(linear.bias is not None for linear in linears):
        raise UserError(f"{ffn.name}: its projections have biases, which no kernel supports; use kernel=None")
    return activation_of(ffn)


def check_policy(policy: MaskPolicy) -> None:
    """Raises UserError unless kernels can run the policy.

    They can't if its masks are known only after the FFN, if it masks other sites than `neuron`, or if a centroid of its
    codebook keeps no neuron.
    """
    if policy.kernel is None:
        raise UserError(
            f"policy {policy.name}: its mask is known only after the FFN has run, so no kernel can skip neurons; "
            f"choose {', '.join(kernel_policies())}"
        )
    if list(policy.codebook.sites) != ["neuron"]:
        raise UserError(
            f"kernels need a codebook with sites=[neuron], this one has sites={list(policy.codebook.sites)}"
        )
    empty = (ops.popcount(policy.codebook.sites["neuron"].centroids) == 0).nonzero()
    if len(empty):
        group, cluster = empty[0].tolist()
        raise UserError(
            f"cluster {cluster} of layer {group} keeps no neuron; make the codebook again with a higher cluster.density"
        )


@dataclass(eq=False)
class _Weights:
    """An FFN's own weights, and whether Triton runs it."""

    ffn: ops.FFNWeights
    by_triton: bool


@dataclass(eq=False)
class _PolicyFFN:
    """An FFN under masks that the policy itself decides for each token."""

    policy: MaskPolicy
    layer: int
    importance: Importance
    number: int = field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        _POLICY_FFNS[self.number] = self

    @classmethod
    def of(cls, policy: MaskPolicy, layer: int, device: torch.device, importance: Importance) -> "_PolicyFFN":
        return cls(policy, layer, importance)

    def __call__(
        self, hidden: Tensor, inputs: dict[int, Tensor], weights: _Weights, clusters: Tensor | None = None
    ) -> Tensor:
        masks, delta = torch.ops.apc.choose(inputs[self.source], len(weights.ffn.gate), self.number)
        return ops.sparse_ffn(hidden, weights.ffn, ops.ActiveNeurons(masks), by_triton=weights.by_triton) + delta

    @property
    def source(self) -> int:
        return self.layer if self.policy.predictor is None else self.policy.predictor.source_layer(self.layer)

    def decide(self, hidden: Tensor, D: int) -> MaskDecision:
        """The decision for FFN inputs [n, E]. Of the values the policy sees the shape only: they are not known yet."""
        values = hidden.new_empty(1).expand(len(hidden), D)
        inputs = {self.source: hidden}
        return self.policy.decide(
            MaskInputs(self.layer, "neuron", values, inputs, self.policy.codebook, self.importance)
        )


_POLICY_FFNS: weakref.WeakValueDictionary[int, _PolicyFFN] = weakref.WeakValueDictionary()


@torch.library.custom_op("apc::choose", mutates_args=())
def _choose(hidden: Tensor, neurons: int, number: int) -> tuple[Tensor, Tensor]:
    """A policy's masks uint8 [n, V] and output delta [n, E], from FFN inputs [n, E] and the number of a `_PolicyFFN`.

    One operation for torch.compile, which then does not trace the policy.
    """
    decision = _POLICY_FFNS[number].decide(hidden, neurons)
    masks = ops.pack(decision.mask.expand(len(hidden), neurons))
    zeros = torch.zeros_like(hidden)
    return masks, zeros if decision.output_delta is None else zeros + decision.output_delta.to(hidden.dtype)


@_choose.register_fake
def _(hidden: Tensor, neurons: int, number: int) -> tuple[Tensor, Tensor]:
    return hidden.new_empty((len(hidden), ops.row_bytes(neurons)), dtype=torch.uint8), torch.empty_like(hidden)


@dataclass
class _ClusterFFN:
    """An FFN under the mask of the cluster that a predictor chooses."""

    source: int  # the layer whose FFN input the predictor reads
    predictor: ops.PredictorWeights
    centroids: Tensor  # uint8 [K, W]
    correct: tuple[Tensor, Tensor] | None  # [H, E], float32 [E]
    offsets: Tensor | None  # [K, E]

    @classmethod
    def of(cls, policy: Predicted, layer: int, device: torch.device, importance: Importance) -> "_ClusterFFN":
        book, group = policy.codebook.sites["neuron"], policy.codebook.group(layer)
        weights = policy.predictor.layer(layer).weights
        half, full = to_bf16(device), to_fp32(device)
        return cls(
            policy.predictor.source_layer(layer),
            ops.PredictorWeights(
                half(weights["reduce"].T),
                full(weights["reduce_bias"]),
                half(weights["expand.neuron"].T),
                full(weights["expand_bias.neuron"]),
            ),
            book.centroids[group].to(device).contiguous(),
            (half(weights["correct"]), full(weights["correct_bias"])) if policy.predictor.corrects else None,
            None if book.offsets is None else half(book.offsets[group]),
        )

    def __call__(
        self, hidden: Tensor, inputs: dict[int, Tensor], weights: _Weights, clusters: Tensor | None = None
    ) -> Tensor:
        prediction = self.predict(inputs, weights)
        if clusters is not None:  # int32 [n, 1], in place of the predicted ones
            prediction = ops.Prediction(prediction.bottleneck, ops.Candidates(clusters.float(), clusters))
        return self.run(hidden, prediction, weights)

    def can_prefetch(self, weights: _Weights) -> bool:
        """Whether `ops.sparse_ffn_ahead` of the layer before can list its active neurons."""
        same_type = self.predictor.reduce.dtype == weights.ffn.gate.dtype
        return weights.by_triton and same_type and ops.can_prefetch(weights.ffn)

    def predict(self, inputs: dict[int, Tensor], weights: _Weights) -> ops.Prediction:
        """The prediction for this layer from the FFN input of its source layer."""
        return ops.predict_clusters(inputs[self.source], self.predictor, weights.by_triton)

    def run(
        self, hidden: Tensor, prediction: ops.Prediction, weights: _Weights, active_list: Tensor | None = None
    ) -> Tensor:
        """The FFN's output [n, E]; active_list: its active neurons, if they were listed before."""
        active = ops.ActiveNeurons(self.centroids, prediction.candidates, active_list)
        return ops.sparse_ffn(hidden, weights.ffn, active, self._delta(prediction), weights.by_triton)

    def run_ahead(
        self,
        hidden: Tensor,
        prediction: ops.Prediction,
        weights: _Weights,
        later: "_ClusterFFN",
        active_list: Tensor | None,
        next_layer: ops.NextLayer | None,
    ) -> tuple[Tensor, ops.Prediction, Tensor | None]:
        """`run`, the prediction for a later layer from the same tokens, and the next layer's active neurons or None."""
        active = ops.ActiveNeurons(self.centroids, prediction.candidates, active_list)
        delta = self._delta(prediction)
        return ops.sparse_ffn_ahead(hidden, weights.ffn, active, later.predictor, delta, next_layer, weights.by_triton)

    def _delta(self, prediction: ops.Prediction) -> ops.OutputDelta:
        """The correction from the bottleneck and the clusters' offsets, where there are any."""
        if self.correct is None:
            return ops.OutputDelta(offsets=self.offsets)
        return ops.OutputDelta(prediction.bottleneck, *self.correct, self.offsets)


@dataclass
class _LowBitFFN:
    """An FFN under the mask of the neurons that a low-bit copy of gate and up scores highest, or above a threshold."""

    source: int  # the layer whose FFN input the copy reads
    size: int | None  # of masks of a fixed size; None: by the threshold
    threshold: Tensor | None  # float32 []
    planes: Tensor  # uint8 [b, P, D, W]
    curve: ops.ScoreCurve
    reduce: tuple[Tensor, Tensor] | None  # to the bottleneck: [H, E], float32 [H]; None: no correction
    correct: tuple[Tensor, Tensor] | None  # from the bottleneck: [H, E], float32 [E]

    @classmethod
    def of(cls, policy: NeuronPredictor, layer: int, device: torch.device, importance: Importance) -> "_LowBitFFN":
        predictor = policy.predictor
        assert predictor.low_bit is not None  # the policy's kernel is low-bit
        thresholds = predictor.thresholds if policy.by_threshold else None
        weights, scores = predictor.layer(layer).weights, predictor.low_bit.freeze().layer(layer)
        scale, slope, power, bias = scores.curve
        half, full = to_bf16(device), to_fp32(device)
        return cls(
            predictor.source_layer(layer),
            policy.codebook.size("neuron", layer) if thresholds is None else None,
            None if thresholds is None else full(thresholds[layer]),
            scores.stored.to(device).contiguous(),
            ops.ScoreCurve(full(scale), full(slope), full(power), full(bias)),
            (half(weights["reduce"].T), full(weights["reduce_bias"])) if predictor.corrects else None,
            (half(weights["correct"]), full(weights["correct_bias"])) if predictor.corrects else None,
        )

    def __call__(
        self, hidden: Tensor, inputs: dict[int, Tensor], weights: _Weights, clusters: Tensor | None = None
    ) -> Tensor:
        source, by_triton, delta = inputs[self.source], weights.by_triton, ops.OutputDelta()
        if self.reduce is not None and self.correct is not None:
            delta = ops.OutputDelta(ops.bottleneck(source, *self.reduce, by_triton), *self.correct)
        masks = ops.low_bit_scores(source, self.planes, self.curve, self.threshold, by_triton)
        if self.size is not None:
            masks = torch.ops.apc.top_packed(masks, self.size)
        return ops.sparse_ffn(hidden, weights.ffn, ops.ActiveNeurons(masks), delta, by_triton)


@torch.library.custom_op("apc::top_packed", mutates_args=())
def _top_packed(scores: Tensor, m: int) -> Tensor:
    """Packed masks uint8 [n, V] of the m largest scores in each row; scores: float [n, D]."""
    return ops.pack(ops.top_mask(scores, m, check=False))


@_top_packed.register_fake
def _(scores: Tensor, m: int) -> Tensor:
    return scores.new_empty((len(scores), ops.row_bytes(scores.shape[1])), dtype=torch.uint8)


def to_bf16(device: torch.device) -> Callable[[Tensor], Tensor]:
    """A conversion to bfloat16 on the device. Trained parameters are already rounded to bfloat16."""
    return lambda value: value.detach().to(device, torch.bfloat16).contiguous()


def to_fp32(device: torch.device) -> Callable[[Tensor], Tensor]:
    """A conversion to float32 on the device."""
    return lambda value: value.detach().to(device, torch.float32).contiguous()


_SparseFFN = _ClusterFFN | _LowBitFFN | _PolicyFFN
_SPARSE_FFNS: dict[str, Callable[..., _SparseFFN]] = {
    "cluster": _ClusterFFN.of,
    "low-bit": _LowBitFFN.of,
    "masks": _PolicyFFN.of,
}
