"""FFNs that read only what a mask keeps, in a Hugging Face model.

For a few tokens at once an FFN runs under its policy's masks by `ops.sparse_ffn`; for more, where the masks together keep most neurons anyway, it runs as the
model's own: prefill is dense, and decoding sparse. From how many tokens on is measured on the GPU at hand, so that sparse FFNs never cost.

Shape letters: n tokens, E hidden size, D neurons, H bottleneck, K clusters.
"""

import itertools
import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from apc import ops
from apc.collect.patterns import Importance
from apc.data.ffn import GatedFFN
from apc.sparse.policies import MaskDecision, MaskInputs, MaskPolicy
from apc.sparse.policies.neurons import NeuronPredictor
from apc.sparse.policies.predicted import Predicted
from apc.sparse.timing import graph_time
from apc.utils.errors import UserError

KERNELS = ("auto", "triton", "torch")
_WORTH = 0.97  # of the dense FFNs' time, that sparse ones may take; torch.compile makes those of several tokens faster by about as much
_UNCACHED = 2**27  # bytes, written one after the other, that no GPU's cache holds
_ACTIVATIONS = {
    "SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "GELU": "gelu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh", "ReLU": "relu",
}  # fmt: skip


def activation_of(ffn: GatedFFN) -> str:
    """Its activation's name, as `ops.sparse_ffn` takes it. Raises UserError for one that it does not have."""
    found = getattr(ffn.module, "act_fn", None) or ffn.module.activation_fn
    name = _ACTIVATIONS.get(type(found).__name__) or getattr(found, "__name__", type(found).__name__)
    if name == "GELU" and getattr(found, "approximate", "none") == "tanh":
        return "gelu_tanh"
    if name not in _ACTIVATIONS.values():
        raise UserError(
            f"{ffn.name}: its activation {name} has no kernel (there are {', '.join(sorted(set(_ACTIVATIONS.values())))}); use kernel=None"
        )
    return name


class SparseFFNs:
    """The FFNs of a model under a policy's masks; `install` puts them in place of the model's own, `remove` takes that back.

    The down projections are stored transposed while they are installed, once: the model's own parameters become views of that, one after the other.
    """

    def __init__(self, ffns: list[GatedFFN], policy: MaskPolicy, kernel: str, max_sparse_tokens: float | None):
        """Raises UserError for a policy, a codebook or an FFN that no kernel takes."""
        self._ffns, self.policy = ffns, policy
        self.max_sparse_tokens = max_sparse_tokens  # of the next calls
        self.by_triton = _by_triton(ffns[0], kernel)
        if max_sparse_tokens is None:  # with auto on a GPU it is measured, once all is in its place
            self.max_sparse_tokens = ops.MAX_TOKENS if self.by_triton else 1
        self._measures = max_sparse_tokens is None and self.by_triton and kernel == "auto"
        self._inputs: dict[int, Tensor] = {}
        self._measure = Importance(ffns)
        self._activations = [_check(ffn) for ffn in ffns]
        check_policy(policy)
        self._own: list[Callable | None] = []
        self._sparse: list[_ClusterFFN | _LowBitFFN | _PolicyFFN] = []
        self._can_prefetch: list[bool] = []  # whether a layer's neurons can be found before it
        self._ahead: dict[
            int, tuple[Tensor, Tensor, Tensor]
        ] = {}  # what was predicted for layers still to come, of the pass at hand
        self._active_lists: dict[int, Tensor] = {}  # which neurons the next layer's FFN takes, likewise

    def install(self) -> "SparseFFNs":
        dense_calls, sparse_calls = [], []
        for layer, ffn in enumerate(self._ffns):
            self._own.append(ffn.module.__dict__.get("forward"))
            down = ffn.down.weight.detach().T.contiguous()
            ffn.down.weight.data = down.T  # and what it was is freed
            own = _Weights(
                ffn.projection("gate").detach(),
                ffn.projection("up").detach(),
                down,
                self._activations[layer],
                self.by_triton,
            )
            sparse = _FFN_OF[self.policy.kernel](self.policy, layer, down.device, self._measure)
            dense_calls.append(ffn.module.forward)
            sparse_calls.append(partial(sparse, own=own))
            self._sparse.append(sparse)
            self._can_prefetch.append(isinstance(sparse, _ClusterFFN) and sparse.can_be_found(own))
            ffn.module.forward = self._forward(layer, ffn.module.forward, own)
        if self._measures:
            with torch.cuda.device(self._ffns[0].down.weight.device):  # a graph is of the device at hand
                self.max_sparse_tokens = self._crossover(dense_calls, sparse_calls)
        return self

    @torch.no_grad()
    def _crossover(self, dense: list[Callable], sparse: list[Callable]) -> int:
        """The most tokens in a call that all layers' FFNs together take less time for sparse than dense; clusters of tokens are drawn at random.

        Dense ones of one token, tuned by torch.compile, read their weights as fast as they can be copied, and the model's own may not; so that is what
        sparse ones have to be faster than. Where that fails none run sparse, though two under one mask may pay then.
        """
        weight = self._ffns[0].down.weight
        generator = torch.Generator(weight.device).manual_seed(0)
        for n in range(1, ops.MAX_TOKENS + 1):
            hidden = torch.randn(
                n, self._ffns[0].hidden_size, dtype=weight.dtype, device=weight.device, generator=generator
            )
            inputs = dict.fromkeys(range(len(self._ffns)), hidden)
            clusters = torch.randint(
                max(self.policy.codebook.k, 1), (n, 1), device=weight.device, generator=generator
            ).int()
            dense_ms = _time(lambda: [call(hidden.unsqueeze(0)) for call in dense])  # noqa: B023
            sparse_ms = _time(lambda: [call(hidden, inputs, clusters=clusters) for call in sparse])  # noqa: B023
            if n == 1:
                dense_ms = min(dense_ms, self._time_to_read())
            if sparse_ms > _WORTH * dense_ms:
                return n - 1
        return ops.MAX_TOKENS

    def _time_to_read(self) -> float:
        """Time in ms to read all FFNs' weights once, at the bandwidth of copies (which read and write)."""
        downs = [ffn.down.weight.T for ffn in self._ffns]
        into = [torch.empty_like(downs[0]) for _ in range(math.ceil(_UNCACHED / downs[0].nbytes))]
        return 3 / 2 * _time(lambda: [copy.copy_(down) for copy, down in zip(itertools.cycle(into), downs)])  # noqa: B905

    def remove(self) -> None:
        for ffn, forward in zip(self._ffns, self._own, strict=True):
            del ffn.module.forward
            if forward is not None:
                ffn.module.forward = forward
            ffn.down.weight.data = ffn.down.weight.data.contiguous()
        for held in (self._own, self._sparse, self._can_prefetch, self._inputs, self._ahead, self._active_lists):
            held.clear()

    def _forward(self, layer: int, dense: Callable, own: "_Weights") -> Callable:
        """What takes the place of an FFN's forward."""
        lookahead = self.policy.predictor.lookahead if self.policy.predictor is not None else 0

        def forward(x: Tensor) -> Tensor:
            hidden = x.reshape(-1, x.shape[-1])
            if len(hidden) > self.max_sparse_tokens:
                return dense(x)
            if layer == 0:
                self._ahead.clear()
                self._active_lists.clear()
            self._inputs[layer] = hidden
            self._inputs.pop(layer - lookahead - 1, None)
            sparse, inputs = self._sparse[layer], self._inputs
            if len(hidden) > ops.MAX_TOKENS and self.by_triton:
                parts = [slice(at, at + ops.MAX_TOKENS) for at in range(0, len(hidden), ops.MAX_TOKENS)]
                outputs = [
                    sparse(hidden[part], {key: value[part] for key, value in inputs.items()}, own) for part in parts
                ]
                return torch.cat(outputs).view_as(x)
            if not (lookahead and isinstance(sparse, _ClusterFFN)):
                return sparse(hidden, inputs, own).view_as(x)
            predicted, active_list = (
                self._ahead.pop(layer, None) or sparse.predict(inputs, own),
                self._active_lists.pop(layer, None),
            )
            if layer + lookahead < len(self._sparse):
                following = self._following(layer + 1)
                output, self._ahead[layer + lookahead], found = sparse.run_ahead(
                    hidden, predicted, own, self._sparse[layer + lookahead], active_list, following
                )
                if following is not None:
                    self._active_lists[layer + 1] = found
            else:
                output = sparse.run(hidden, predicted, own, active_list)
            return output.view_as(x)

        return forward

    def _following(self, layer: int) -> ops.NextLayer | None:
        """A layer whose neurons can be found now: its cluster was predicted already, or is just being."""
        ahead = self._ahead.get(layer)
        if not self._can_prefetch[layer] or (ahead is None and self.policy.predictor.lookahead > 1):
            return None
        return ops.NextLayer(
            self._ffns[layer].width, self._sparse[layer].centroids, None if ahead is None else ahead[1:]
        )


def _time(calls: Callable[[], object]) -> float:
    """Milliseconds that the GPU takes for calls that read more than its cache holds."""
    return graph_time(calls, repeats=3, flush_cache=False)


def _by_triton(ffn: GatedFFN, kernel: str) -> bool:
    if kernel not in KERNELS:
        raise UserError(
            f"kernel={kernel}: choose {', '.join(KERNELS)}, or None for masks that multiply what was computed"
        )
    cuda = ffn.down.weight.is_cuda
    if kernel == "triton" and not cuda:
        raise UserError(
            f"kernel=triton: the model is on {ffn.down.weight.device}; move it to an NVIDIA GPU, or use kernel=torch"
        )
    if kernel == "auto" and not cuda and not _by_triton.said:
        print(
            "apc: no Triton kernels for a model on the CPU; sparse FFNs run by torch there, which shows quality and not speed",
            file=sys.stderr,
        )
        _by_triton.said = True
    return cuda and kernel != "torch"


_by_triton.said = False


def _check(ffn: GatedFFN) -> str:
    linears = [linear for linear in (ffn.gate, ffn.up, ffn.gate_up, ffn.down) if linear is not None]
    if any(linear.bias is not None for linear in linears):
        raise UserError(f"{ffn.name}: its projections have biases, which no kernel takes; use kernel=None")
    return activation_of(ffn)


def check_policy(policy: MaskPolicy) -> None:
    """Raises UserError for a policy whose masks are known too late, or of other sites, or for a codebook with a mask that keeps no neuron."""
    if policy.kernel is None:
        raise UserError(
            f"policy {policy.name}: its mask is known only after what it would skip was computed; kernels take predicted, soft, neuron-predictor, static"
        )
    if list(policy.codebook.sites) != ["neuron"]:
        raise UserError(
            f"sites {list(policy.codebook.sites)}: kernels take sites=[neuron], whose masks skip a row of all three projections"
        )
    book = policy.codebook.sites["neuron"]
    empty = (ops.popcount(book.centroids) == 0).nonzero()
    if len(empty):
        group, cluster = empty[0].tolist()
        raise UserError(
            f"cluster {cluster} of layer {group} keeps no neuron; make the codebook again with a higher cluster.density"
        )


@dataclass(eq=False)
class _Weights:
    """What an FFN has of its own: gate, up and the transposed down [D, E], its activation's name, and whether kernels take it."""

    gate: Tensor
    up: Tensor
    down: Tensor
    activation: str
    by_triton: bool

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate, self.up, self.down


@dataclass(eq=False)
class _PolicyFFN:
    """An FFN under the masks that a policy chooses for each token."""

    policy: MaskPolicy
    layer: int
    measure: Importance
    number: int = field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        _CHOOSERS[self.number] = self

    def __call__(
        self, hidden: Tensor, inputs: dict[int, Tensor], own: _Weights, clusters: Tensor | None = None
    ) -> Tensor:
        masks, added = torch.ops.apc.choose(inputs[self.source], len(own.gate), self.number)
        return ops.sparse_ffn(hidden, *own.matrices, masks, own.activation, by_triton=own.by_triton) + added

    @property
    def source(self) -> int:
        return self.layer if self.policy.predictor is None else self.policy.predictor.source_layer(self.layer)

    def choose(self, hidden: Tensor, D: int) -> MaskDecision:
        shape = hidden.new_empty(1).expand(len(hidden), D)  # no policy that comes here looks at values
        return self.policy.decide(
            MaskInputs(self.layer, "neuron", shape, {self.source: hidden}, self.policy.codebook, self.measure)
        )


_CHOOSERS: weakref.WeakValueDictionary[int, _PolicyFFN] = weakref.WeakValueDictionary()


@torch.library.custom_op("apc::choose", mutates_args=())
def _choose(hidden: Tensor, neurons: int, chooser: int) -> tuple[Tensor, Tensor]:
    """FFN inputs [n, E] → the masks that a policy chooses, uint8 [n, V], and what it adds to the output, [n, E]: one operation for torch.compile, which
    needs not look into policies."""
    choice = _CHOOSERS[chooser].choose(hidden, neurons)
    added = torch.zeros_like(hidden)
    return ops.pack(
        choice.mask.expand(len(hidden), neurons)
    ), added if choice.output_delta is None else added + choice.output_delta.to(hidden.dtype)


@_choose.register_fake
def _(hidden: Tensor, neurons: int, chooser: int) -> tuple[Tensor, Tensor]:
    return hidden.new_empty((len(hidden), ops.row_bytes(neurons)), dtype=torch.uint8), torch.empty_like(hidden)


@dataclass
class _ClusterFFN:
    """An FFN under the mask of the cluster that a predictor chooses: by kernels that follow each other without another's help."""

    source: int
    reduce: Tensor  # [H, E]
    reduce_bias: Tensor  # float32 [H]
    expand: Tensor  # [K, H]
    expand_bias: Tensor  # float32 [K]
    centroids: Tensor  # uint8 [K, W]
    correct: tuple[Tensor, Tensor] | None  # [H, E], float32 [E]
    offsets: Tensor | None  # [K, E]

    @classmethod
    def of(cls, policy: Predicted, layer: int, device: torch.device, measure: Importance) -> "_ClusterFFN":
        book = policy.codebook.sites["neuron"]
        predictor, group = policy.predictor, policy.codebook.group(layer)
        half, full = to_bf16(device), to_fp32(device)
        return cls(
            predictor.source_layer(layer),
            half(predictor.reduce[layer].T),
            full(predictor.reduce_bias[layer]),
            half(predictor.expand["neuron"][layer].T),
            full(predictor.expand_bias["neuron"][layer]),
            book.centroids[group].to(device).contiguous(),
            (half(predictor.correct[layer]), full(predictor.correct_bias[layer])) if predictor.corrects else None,
            None if book.offsets is None else half(book.offsets[group]),
        )

    def __call__(
        self, hidden: Tensor, inputs: dict[int, Tensor], own: _Weights, clusters: Tensor | None = None
    ) -> Tensor:
        predicted = self.predict(inputs, own)
        if clusters is not None:  # int32 [n, 1], in place of those predicted
            predicted = predicted[0], clusters.float(), clusters
        return self.run(hidden, predicted, own)

    @property
    def predictor(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.reduce, self.reduce_bias, self.expand, self.expand_bias

    def can_be_found(self, own: _Weights) -> bool:
        """Whether its neurons can be, by `ops.sparse_ffn_ahead` of the layer before."""
        return own.by_triton and self.reduce.dtype == own.gate.dtype and ops.can_find(*own.matrices)

    def predict(self, inputs: dict[int, Tensor], own: _Weights) -> tuple[Tensor, Tensor, Tensor]:
        """As `ops.predict_clusters`."""
        return ops.predict_clusters(inputs[self.source], *self.predictor, own.by_triton)

    def run(
        self, hidden: Tensor, predicted: tuple[Tensor, Tensor, Tensor], own: _Weights, active_list: Tensor | None = None
    ) -> Tensor:
        inner, *candidates = predicted
        return ops.sparse_ffn(
            hidden,
            *own.matrices,
            self.centroids,
            own.activation,
            tuple(candidates),
            self._correction(inner),
            self.offsets,
            own.by_triton,
            active_list,
        )

    def run_ahead(
        self, hidden: Tensor, predicted: tuple[Tensor, Tensor, Tensor], own: _Weights, later: "_ClusterFFN", active_list: Tensor | None,
        following: ops.NextLayer | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None]:  # fmt: skip
        """The output, and what is predicted for a later layer's FFN from these tokens; active_list, following: as for `ops.sparse_ffn_ahead`."""
        inner, *candidates = predicted
        return ops.sparse_ffn_ahead(
            hidden, *own.matrices, self.centroids, own.activation, tuple(candidates), later.predictor, self._correction(inner), self.offsets, active_list,
            following, own.by_triton,
        )  # fmt: skip

    def _correction(self, inner: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        return None if self.correct is None else (inner, *self.correct)


@dataclass
class _LowBitFFN:
    """An FFN under the mask of the neurons that a low-bit copy of gate and up scores highest, or from a threshold on."""

    source: int
    size: int | None  # of masks of a fixed size; None: by the threshold
    threshold: Tensor | None  # float32 []
    planes: Tensor  # uint8 [b, P, D, W]
    curve: tuple[Tensor, Tensor, Tensor, Tensor]  # scale, slope and power float32 [P, D], bias [D]
    correct: (
        tuple[Tensor, Tensor, Tensor, Tensor] | None
    )  # reduce [H, E] and its bias [H], correction [H, E] and its bias [E]

    @classmethod
    def of(cls, policy: NeuronPredictor, layer: int, device: torch.device, measure: Importance) -> "_LowBitFFN":
        predictor, by_threshold = policy.predictor, policy.by_threshold
        half, full = to_bf16(device), to_fp32(device)
        copy = predictor.low_bit.freeze()
        correct = (half(predictor.reduce[layer].T), full(predictor.reduce_bias[layer])) if predictor.corrects else None
        return cls(
            predictor.source_layer(layer),
            None if by_threshold else policy.codebook.size("neuron", layer),
            full(predictor.thresholds[layer]) if by_threshold else None,
            copy.planes[:, layer].to(device).contiguous(),
            tuple(full(value[layer]) for value in (copy.scale, copy.slope, copy.power, copy.bias)),
            (*correct, half(predictor.correct[layer]), full(predictor.correct_bias[layer])) if correct else None,
        )

    def __call__(
        self, hidden: Tensor, inputs: dict[int, Tensor], own: _Weights, clusters: Tensor | None = None
    ) -> Tensor:
        source, correction = inputs[self.source], None
        if self.correct is not None:
            reduce, bias, *rest = self.correct
            correction = (ops.bottleneck(source, reduce, bias, own.by_triton), *rest)
        masks = ops.low_bit_scores(source, self.planes, *self.curve, self.threshold, own.by_triton)
        if self.size is not None:
            masks = torch.ops.apc.top_packed(masks, self.size)
        return ops.sparse_ffn(
            hidden, *own.matrices, masks, own.activation, correction=correction, by_triton=own.by_triton
        )


@torch.library.custom_op("apc::top_packed", mutates_args=())
def _top_packed(scores: Tensor, m: int) -> Tensor:
    """float [n, D] → masks uint8 [n, V] of each row's m largest."""
    return ops.pack(ops.top_mask(scores, m, check=False))


@_top_packed.register_fake
def _(scores: Tensor, m: int) -> Tensor:
    return scores.new_empty((len(scores), ops.row_bytes(scores.shape[1])), dtype=torch.uint8)


def to_bf16(device: torch.device) -> Callable[[Tensor], Tensor]:
    """To bfloat16, which what was trained is rounded to already."""
    return lambda value: value.detach().to(device, torch.bfloat16).contiguous()


def to_fp32(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda value: value.detach().to(device, torch.float32).contiguous()


_FFN_OF: dict[str, Callable] = {
    "cluster": _ClusterFFN.of,
    "low-bit": _LowBitFFN.of,
    "masks": lambda policy, layer, device, measure: _PolicyFFN(policy, layer, measure),
}
