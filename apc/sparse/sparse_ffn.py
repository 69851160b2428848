"""FFNs that read only the weight rows that a mask keeps, in a Hugging Face model.

Calls of a few tokens run sparse, by `ops.sparse_ffn` under the policy's masks. Calls of more tokens run dense, because
the masks of many tokens together keep most neurons anyway. So prefill is dense and decoding sparse. The crossover is
measured on the GPU at hand, so that sparse FFNs are never slower than dense ones.

Shape letters: n tokens, E hidden size, D neurons, W bytes of a packed row, H bottleneck, K clusters.
"""

import inspect
import itertools
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from apc import ops
from apc.collect.patterns import Importance
from apc.data.ffn import FFN, LayerFFN, activation_function
from apc.ops.packed_gpu import PackedClusterFFN
from apc.ops.rounded_weight import RoundedWeight
from apc.ops.sparse_ffn import KERNELS, act
from apc.sparse.layer_ffn import SPARSE_FFNS, ByClusters, SparseFFN, store_transposed
from apc.sparse.packed_weights import packed_ffn
from apc.sparse.policies import MaskPolicy, kernel_policies
from apc.sparse.timing import graph_time, host_time
from apc.utils.errors import UserError

# FFNs run sparse only below 97 % of the dense time: torch.compile speeds up dense FFNs of several tokens by about 3 %.
_MAX_TIME_RATIO = 0.97
_BEYOND_CACHE = 2**27  # bytes; more than a GPU's cache holds
# Root mean squares of the gate's values at which an FFN is compared with the kernels' formula: a small one, and large
# ones that a clamp would change. In float16, products of larger values would overflow.
_CHECKED_SIZES = {torch.float16: (1.0, 30.0), torch.bfloat16: (1.0, 30.0, 1000.0), torch.float32: (1.0, 30.0, 1000.0)}
KERNEL_ON = {"cuda": "triton", "cpu": "numba"}  # by the type of the model's device
_TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-4}  # relative, from rounding alone
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


def layer_ffns(ffns: list[FFN]) -> list[LayerFFN]:
    """The FFNs themselves. Raises UserError if they are experts."""
    layers = [ffn for ffn in ffns if isinstance(ffn, LayerFFN)]
    if len(layers) < len(ffns):
        problem = "it is one of several experts, which no kernel supports"
        raise UserError(f"{ffns[0].name}: {problem}; use kernel=None")
    return layers


def activation_of(ffn: LayerFFN) -> str:
    """The name of an FFN's activation for `ops.sparse_ffn`. Raises UserError if no kernel supports the FFN."""
    if not ffn.gated:
        raise UserError(f"{ffn.name}: it has no gate, which kernels need; use kernel=None")
    if any(linear.bias is not None for linear in ffn.linears):
        raise UserError(f"{ffn.name}: its projections have biases, which no kernel supports; use kernel=None")
    activation = activation_function(ffn)
    kind = type(activation).__name__
    name = _ACTIVATIONS.get(kind, str(getattr(activation, "__name__", kind)))
    if name == "GELU" and getattr(activation, "approximate", "none") == "tanh":
        return "gelu_tanh"
    if name not in _ACTIVATIONS.values():
        known = ", ".join(sorted(set(_ACTIVATIONS.values())))
        raise UserError(f"{ffn.name}: its activation {name} has no kernel (there are {known}); use kernel=None")
    return name


def check_call(ffn: LayerFFN) -> None:
    """Raises UserError if an FFN's forward takes more than its input, as the forward of a shared FFN does."""
    _, *others = inspect.signature(ffn.module.forward).parameters.values()
    names = [other.name for other in others if other.kind not in (other.VAR_POSITIONAL, other.VAR_KEYWORD)]
    if names:
        problem = f"its forward takes {', '.join(names)} besides its input, which no kernel supports"
        raise UserError(f"{ffn.name}: {problem}; use kernel=None")


@torch.no_grad()
def multipliers(ffn: LayerFFN) -> tuple[float, float]:
    """Factors of the gate's values and of the FFN's output, as Falcon-H1 has them; 1 and 1 elsewhere.

    down · W_down(act(gate · g) · u) is down / gate times what the formula gives for the input times `gate`, because g
    and u are linear in the input.
    """
    gate, down = (float(getattr(ffn.module, f"{part}_multiplier", 1.0)) for part in ("gate", "down"))
    return (gate, down) if gate else (1.0, 1.0)  # with 0 the comparison with the formula refuses the FFN


def check_formula(ffn: LayerFFN, weights: ops.FFNWeights) -> None:
    """Raises UserError unless an FFN computes down(act(gate) * up) as kernels do, measured on random inputs.

    `multipliers` are allowed. Some models clamp, scale, normalise or drop values between the three projections.
    """
    gate, up, down, activation = weights
    gate_multiplier, down_multiplier = multipliers(ffn)
    generator = torch.Generator(gate.device).manual_seed(0)
    hidden = torch.randn((ops.MAX_TOKENS, gate.shape[1]), device=gate.device, generator=generator).to(gate.dtype)
    scale = (hidden @ gate.T).float().square().mean().sqrt().item() or 1.0
    tolerance = _TOLERANCES[gate.dtype]
    if gate.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        tolerance = max(tolerance, _TOLERANCES[torch.float16])  # TF32 rounds to as many bits
    for size in _CHECKED_SIZES[gate.dtype]:
        x = hidden * (size / scale)
        own = ffn.module.forward(x[None])[0].float()
        if not own.isfinite().all():
            continue  # an overflow, or weights that are not finite: there is nothing to compare
        x = x * gate_multiplier
        ours = ((act(x @ gate.T, activation) * (x @ up.T)) @ down).float() * (down_multiplier / gate_multiplier)
        error = ((ours - own).norm() / own.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
        if not error <= tolerance:
            problem = f"it computes more than down(act(gate) * up), which kernels compute (they differ by {error:.1%})"
            raise UserError(f"{ffn.name} ({type(ffn.module).__name__}): {problem}; use kernel=None")


def check_model(ffns: list[FFN]) -> None:
    """Raises UserError unless kernels support each FFN and compute what it computes."""
    for ffn in layer_ffns(ffns):
        activation, down = activation_of(ffn), ffn.down.weight.T
        check_call(ffn)
        check_formula(ffn, ops.FFNWeights(ffn.projection("gate"), ffn.projection("up"), down, activation))


class SparseFFNs:
    """Sparse FFNs in place of a model's own: `install` puts them in, `remove` takes them out.

    While installed, down projections are stored only in transposed form; the model's own parameters are views of these.

    max_sparse_tokens: calls of more tokens run dense; may be changed between calls.
    """

    max_sparse_tokens: float

    def __init__(self, ffns: list[FFN], policy: MaskPolicy, kernel: str, max_sparse_tokens: float | None):
        """Raises UserError for a policy, a codebook or an FFN that has no kernel."""
        self.policy = policy
        self.kernel = _chosen_kernel(layer_ffns(ffns)[0], kernel)
        default_max = 1 if self.kernel == "torch" else ops.MAX_TOKENS
        self.max_sparse_tokens = default_max if max_sparse_tokens is None else max_sparse_tokens
        self._measures_crossover = max_sparse_tokens is None and self.kernel != "torch" and kernel == "auto"
        self._ffns, self._lookahead = layer_ffns(ffns), policy.lookahead
        self._importance = Importance(ffns)
        self._activations = [activation_of(ffn) for ffn in self._ffns]
        for ffn in self._ffns:
            check_call(ffn)
        check_policy(policy, self.kernel, layer_ffns(ffns)[0].device.type)
        self._multipliers = [multipliers(ffn) for ffn in self._ffns]
        plain = not (policy.lookahead or policy.changes_output or policy.staged)
        if set(self._multipliers) != {(1.0, 1.0)} and not plain:
            problem = "it has multipliers, which kernels support without lookahead, correction, offsets and stages only"
            raise UserError(f"{ffns[0].name}: {problem}; use kernel=None")
        self._warned = False  # whether a dense forward pass was reported
        self._clear()

    def _clear(self) -> None:
        self._own_forwards: list[Callable | None] = []  # set on the module itself, not on its class
        self._handles: list[RemovableHandle] = []
        self._sparse: list[SparseFFN] = []
        self._predicting: list[ByClusters] = []  # the sparse FFNs, if they predict clusters for later layers
        self._can_prefetch: list[bool] = []  # whether a layer's active neurons can be listed ahead of the layer
        # State of the current forward pass, by layer: FFN inputs, predictions for layers still to come, and the list of
        # the next layer's active neurons.
        self._inputs: dict[int, Tensor] = {}
        self._predictions: dict[int, ops.Prediction] = {}
        self._active_lists: dict[int, Tensor] = {}

    def install(self, model: nn.Module) -> "SparseFFNs":
        """Puts the sparse FFNs into the model, and measures the crossover if `kernel=auto` leaves it open.

        Raises UserError, and leaves the model as it was, if an FFN does not compute what the kernels compute.
        """
        kind = self.policy.kernel_by(self.kernel)
        assert kind is not None  # as `check_policy` ensures
        make, dense_calls = SPARSE_FFNS[kind], []
        try:
            for layer, (ffn, activation) in enumerate(zip(self._ffns, self._activations, strict=True)):
                self._own_forwards.append(ffn.module.__dict__.get("forward"))
                dense_calls.append(ffn.module.forward)
                store_transposed(ffn)
                sparse = make(self.policy, layer, ffn, activation, self.kernel, self._importance)
                self._sparse.append(sparse)
                check_formula(ffn, sparse.weights)
                ffn.module.forward = self._forward(layer, ffn.module.forward)
        except BaseException:
            self.remove()
            raise
        for name, module in model.named_modules():
            holds_ffns = self._ffns[0].name.startswith(f"{name}.") or module is model
            if holds_ffns and (isinstance(module, PreTrainedModel) or module is model):
                self._handles.append(module.register_forward_pre_hook(self._warn_if_dense, with_kwargs=True))
        self._can_prefetch = [sparse.can_prefetch for sparse in self._sparse]
        if self._lookahead:
            self._predicting = [sparse for sparse in self._sparse if isinstance(sparse, ByClusters)]
        if self._measures_crossover:
            with torch.cuda.device_of(self._ffns[0].down.weight):  # a CUDA graph belongs to the current device
                self.max_sparse_tokens = self._crossover(dense_calls)
        return self

    @torch.no_grad()
    def _crossover(self, dense: list[Callable]) -> int:
        """The most tokens in a call for which all layers' FFNs together are faster sparse than dense.

        Tokens get random clusters. For one token on a GPU, sparse FFNs must also beat the time to read all weights at
        copy bandwidth: dense FFNs tuned by torch.compile are that fast, the model's own may be slower. If one token is
        not faster sparse, everything runs dense, even if two tokens would be faster.
        """
        weight, k = self._ffns[0].down.weight, max(self.policy.codebook.k, 1)
        device, generator = weight.device, torch.Generator(weight.device).manual_seed(0)
        for n in range(1, ops.MAX_TOKENS + 1):
            hidden = torch.randn((n, len(weight)), dtype=weight.dtype, device=device, generator=generator)
            inputs = dict.fromkeys(range(len(self._ffns)), hidden)
            clusters = torch.randint(k, (n, 1), device=device, generator=generator).int()
            dense_ms = _time(lambda: [call(hidden.unsqueeze(0)) for call in dense], device)  # noqa: B023
            sparse_ms = _time(lambda: [call.timed(hidden, inputs, clusters) for call in self._sparse], device)  # noqa: B023
            if n == 1 and device.type == "cuda":
                dense_ms = min(dense_ms, self._time_to_read())
            if sparse_ms > _MAX_TIME_RATIO * dense_ms:
                return n - 1
        return ops.MAX_TOKENS

    def _time_to_read(self) -> float:
        """Time in ms to read all FFNs' weights once, at the bandwidth of copies (a copy reads and writes)."""
        downs = [ffn.down.weight.T for ffn in self._ffns]
        targets = [torch.empty_like(downs[0]) for _ in range(math.ceil(_BEYOND_CACHE / downs[0].nbytes))]
        pairs = list(zip(itertools.cycle(targets), downs, strict=False))
        return 3 / 2 * _time(lambda: [target.copy_(down) for target, down in pairs], downs[0].device)

    def kernel_ffns(self) -> list:
        """For each layer what `ops.decode_cpu` takes as its FFN, or None if it can't compute it.

        Dense FFNs if calls of one token run dense. Raises UserError for changes that the FFNs can't follow.
        """
        for sparse in self._sparse:
            sparse.follow_changes()
        if self.max_sparse_tokens < 1:
            from apc.ops.cluster_ffn_cpu import ClusterFFN  # imports numba

            return [ClusterFFN(sparse.weights) for sparse in self._sparse]
        return [sparse.for_step() for sparse in self._sparse]

    def dense_weights(self) -> list[ops.FFNWeights]:
        """For each layer its weights as they are now, if the FFNs have no multipliers; else nothing.

        Raises UserError for changes that the FFNs can't follow.
        """
        for sparse in self._sparse:
            sparse.follow_changes()
        plain = set(self._multipliers) == {(1.0, 1.0)}
        return [sparse.weights for sparse in self._sparse] if plain else []

    def packed_ffns(self) -> list[PackedClusterFFN]:
        """For each layer what `ops.decode_packed` takes as its FFN: dense ones if calls of one token run dense.

        Raises UserError for changes that the FFNs can't follow, and for a policy without such kernels.
        """
        packed = []
        for sparse, activation, factors in zip(self._sparse, self._activations, self._multipliers, strict=True):
            sparse.follow_changes()
            dense = self.max_sparse_tokens < 1
            own = PackedClusterFFN(packed_ffn(sparse.ffn, activation)) if dense else sparse.packed()
            if own is None or factors != (1.0, 1.0):
                what = f"policy {self.policy.name}" if own is None else "an FFN with multipliers"
                raise UserError(f"{what}: no kernel reads its weights at 4 bits")
            packed.append(own)
        return packed

    def remove(self) -> None:
        """Takes the sparse FFNs out, and stores the down projections as before; does nothing a second time."""
        for handle in self._handles:
            handle.remove()
        for ffn, forward in zip(self._ffns, self._own_forwards, strict=False):  # no forwards the second time
            ffn.module.__dict__.pop("forward", None)
            if forward is not None:
                ffn.module.forward = forward
            if not isinstance(ffn.down.weight, RoundedWeight):
                ffn.down.weight.data = ffn.down.weight.data.contiguous()
        self._clear()

    def _forward(self, layer: int, dense: Callable) -> Callable:
        """The forward of a layer's FFN: dense for many tokens, sparse for few."""
        sparse = self._sparse[layer]

        def forward(*inputs: Tensor, **named: Tensor) -> Tensor:
            x, *others = (*inputs, *named.values())
            if others:
                problem = f"it was called with {1 + len(others)} arguments, kernels take its input only"
                raise UserError(f"{sparse.ffn.name}: {problem}; use kernel=None")
            if not torch.compiler.is_compiling():  # uncompiled passes, which run first, have checked it
                sparse.follow_changes()
            hidden = x.reshape(-1, x.shape[-1])
            if len(hidden) > self.max_sparse_tokens:
                return dense(x)
            return self._run(layer, hidden).view_as(x)

        return forward

    def _warn_if_dense(self, _model: nn.Module, inputs: tuple, named: dict) -> None:
        """Says once, in one line, that a forward pass gives the dense model's results.

        A prefill, as in `generate`, is not reported: a pass with a cache, without labels, and with several tokens per
        sequence.
        """
        if self._warned or torch.compiler.is_compiling():
            return
        given = (*inputs[:1], named.get("input_ids"), named.get("inputs_embeds"))
        tokens = next((value for value in given if value is not None), None)
        if tokens is not None and tokens.is_floating_point():  # embeddings [B, n, E]
            tokens = tokens[..., 0]
        cached = any(named.get(key) is not None for key in ("cache", "past_key_values")) or named.get("use_cache")
        prefill = cached and named.get("labels") is None and tokens is not None and tokens.shape[-1] > 1
        if tokens is None or prefill or tokens.numel() <= self.max_sparse_tokens:
            return
        self._warned = True
        problem = f"a forward pass of {tokens.numel()} tokens runs dense, as any above {self.max_sparse_tokens} does"
        advice = "apc.sparsify(…, scoring=True) runs all passes under the masks"
        print(f"apc: {problem}: its results are the dense model's; {advice}", file=sys.stderr)

    def _call(self, layer: int, hidden: Tensor, inputs: dict[int, Tensor]) -> Tensor:
        """A layer's sparse FFN with its `multipliers`, [n, E] → [n, E]. inputs: FFN inputs by layer, for the policy."""
        gate, down = self._multipliers[layer]
        if gate == down == 1:
            return self._sparse[layer](hidden, inputs)
        return self._sparse[layer](hidden * gate, inputs) * (down / gate)

    def _run(self, layer: int, hidden: Tensor) -> Tensor:
        """Runs a layer's sparse FFN, [n, E] → [n, E], and stores the values that later layers need."""
        if layer == 0:
            self._predictions.clear()
            self._active_lists.clear()
        self._inputs[layer] = hidden
        self._inputs.pop(layer - self._lookahead - 1, None)
        if len(hidden) > ops.MAX_TOKENS and self.kernel == "triton":
            outputs = []
            for start in range(0, len(hidden), ops.MAX_TOKENS):
                part = slice(start, start + ops.MAX_TOKENS)
                inputs = {source: value[part] for source, value in self._inputs.items()}
                outputs.append(self._call(layer, hidden[part], inputs))
            return torch.cat(outputs)
        if not self._predicting:
            return self._call(layer, hidden, self._inputs)
        sparse = self._predicting[layer]
        prediction = self._predictions.pop(layer, None)
        if prediction is None:
            prediction = sparse.predict(self._inputs)
        active = ops.ActiveNeurons(sparse.centroids, prediction.candidates, self._active_lists.pop(layer, None))
        delta = sparse.delta(prediction)
        target = layer + self._lookahead
        if target >= len(self._predicting):
            return ops.sparse_ffn(hidden, sparse.weights, active, delta, sparse.kernel_for(hidden))
        coming, next_layer = self._predictions.get(layer + 1), None
        # The next layer's active neurons can be listed if its clusters are predicted by now or by this call.
        if self._can_prefetch[layer + 1] and (coming is not None or self._lookahead == 1):
            candidates = None if coming is None else coming.candidates
            width, centroids = self._ffns[layer + 1].width, self._predicting[layer + 1].centroids
            next_layer = ops.NextLayer(width, centroids, candidates)
        later = self._predicting[target].predictor
        output, self._predictions[target], next_list = ops.sparse_ffn_ahead(
            hidden, sparse.weights, active, later, delta, next_layer, sparse.kernel_for(hidden)
        )
        if next_list is not None:
            self._active_lists[layer + 1] = next_list
        return output


def _time(calls: Callable[[], object], device: torch.device) -> float:
    """The shortest time of `calls` in ms; they must read more than fits the device's cache, which is not flushed."""
    return graph_time(calls, repeats=3, flush_cache=False) if device.type == "cuda" else host_time(calls)


def _chosen_kernel(ffn: LayerFFN, kernel: str) -> str:
    """triton, numba or torch. Raises UserError for an unknown kernel, or one that the FFN's device lacks."""
    if kernel not in ("auto", *KERNELS):
        raise UserError(
            f"kernel={kernel}: choose auto, {', '.join(KERNELS)}, or None for masks on a dense forward pass"
        )
    device = ffn.device.type
    own = KERNEL_ON.get(device)
    chosen = own or "auto" if kernel == "auto" else kernel
    if chosen not in ("torch", own):
        problem = f"the model is on {ffn.device}, and kernels run on NVIDIA GPUs (triton) and on the CPU (numba)"
        raise UserError(f"kernel={kernel}: {problem}; move it, or use kernel=torch")
    return chosen


def check_policy(policy: MaskPolicy, kernel: str, device: str) -> None:
    """Raises UserError unless this kernel, on a device of this type, can run the policy with its codebook."""
    low_bit = None if policy.predictor is None else policy.predictor.low_bit
    kind, by_torch = policy.kernel_by(kernel), policy.kernel_by("torch")
    if by_torch is None and policy.known_before_ffn() and low_bit is not None:
        problem = f"no kernel reads a low-bit copy at {low_bit.inputs:g} of its inputs for it (predictor.inputs)"
        raise UserError(f"policy {policy.name}: {problem}; use kernel=None, or a predictor with predictor.inputs=1")
    if by_torch is None and policy.staged and any(map(policy.has_kernel_on, ("cpu", "cuda"))):
        problem = "no kernel runs stages by top share, one layer ahead, or of clusters with adapted weights (tune.lora)"
        raise UserError(f"policy {policy.name}: {problem}; use kernel=None")
    if by_torch is None:
        problem = "its masks depend on activations inside the FFN, which no kernel supports"
        raise UserError(f"policy {policy.name}: {problem}; choose {', '.join(kernel_policies(device))}")
    if kind is None and kernel == "triton":
        problem = "no kernel on a GPU runs its stages with adapted weights (tune.lora) yet"
        raise UserError(f"policy {policy.name}: {problem}; use kernel=torch, or train with tune.lora=0")
    if kind is None:
        raise UserError(f"policy {policy.name}: no kernel runs it on the CPU yet; use kernel=torch, or a GPU")
    sites = list(policy.codebook.sites)
    if sites != ["neuron"]:
        raise UserError(f"kernels need a codebook with sites=[neuron], this one has sites={sites}")
    empty = (ops.popcount(policy.codebook.sites["neuron"].centroids) == 0).nonzero()
    if len(empty):
        group, cluster = empty[0].tolist()
        advice = "make the codebook again with a higher cluster.density"
        raise UserError(f"cluster {cluster} of layer {group} keeps no neuron; {advice}")
