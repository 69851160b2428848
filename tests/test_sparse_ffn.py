"""Sparse FFNs: every implementation equals the dense FFN under a mask, and runs under the predicted cluster's mask."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from apc import ops
from apc.ops import sparse_ffn_sm90
from apc.ops.nvrtc import compile_program
from apc.ops.sparse_ffn_sm90 import Sizes

WAYS = [
    ("torch", "cpu"),
    ("triton", "cpu"),
    *(pytest.param(way, "cuda", marks=pytest.mark.gpu) for way in ("triton", "hopper")),
]
ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
FFNS = {"torch": ops.sparse_ffn, "triton": ops.sparse_ffn_triton, "hopper": ops.sparse_ffn_hopper}


def ffn_for(way, tensors):
    """The implementation; skips inputs that the Hopper kernel does not support."""
    if way == "hopper" and not sparse_ffn_sm90.is_supported(*tensors[1:]):
        pytest.skip("not supported by the Hopper kernel")
    return FFNS[way]


def random_ffn(n, E, D, dtype, device, spread=0):
    """hidden, gate, up, down; the stride between rows is E + spread."""
    weights = [torch.randn(D, E + spread)[:, :E] for _ in range(3)]
    return [
        (value * scale).to(dtype).to(device)
        for value, scale in zip([torch.randn(n, E), *weights], (1, E**-0.5, E**-0.5, D**-0.5), strict=True)
    ]


def expected(hidden, gate, up, down, kept, activation, added=0.0):
    x, wide = hidden.double(), [value.double() for value in (gate, up, down)]
    return (ACTIVATIONS[activation](x @ wide[0].T) * (x @ wide[1].T) * kept) @ wide[2] + added


def close(output, wanted, dtype):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    return output.dtype == dtype and (output.double() - wanted).norm() < tolerance * wanted.norm().clamp_min(1e-6)


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "E", "D", "activation"),
    [(1, 48, 200, "silu"), (3, 40, 70, "gelu"), (4, 33, 40, "relu"), (2, 128, 1, "gelu_tanh")],
)
def test_the_ffn_under_each_tokens_mask(way, device, dtype, n, E, D, activation):
    D = D if device == "cuda" else min(D, 50)  # the interpreter is slow for each neuron
    tensors = random_ffn(n, E, D, dtype, device, spread=16)
    function = ffn_for(way, tensors)
    kept = torch.rand(n, D, device=device) < torch.linspace(0.1, 0.9, n, device=device).unsqueeze(1)
    kept[:, 0] = True
    hidden, weights, active = tensors[0], ops.FFNWeights(*tensors[1:], activation), ops.ActiveNeurons(ops.pack(kept))
    output = function(hidden, weights, active)
    assert close(output, expected(*tensors, kept, activation), dtype)
    assert device == "cpu" or torch.equal(output, function(hidden, weights, active))


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "E", "D", "with_part"), [(1, 48, 300, False), (1, 33, 40, True), (3, 40, 70, True)])
def test_rows_of_up_and_down_are_read_only_where_a_refinement_asks(way, device, dtype, n, E, D, with_part):
    D = D if device == "cuda" else min(D, 24)  # the interpreter is slow for each neuron
    _check_refinements(way, random_ffn(n, E, D, dtype, device), with_part, ((0.3, 0.3), (0.0, 0.5), (1.0, 0.0)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "E", "D", "activation"),
    [
        (torch.bfloat16, 4096, 14336, "silu"),
        (torch.float16, 4096, 1000, "gelu"),
        (torch.bfloat16, 3072, 8192, "gelu_tanh"),
        (torch.float16, 576, 1536, "silu"),
        (torch.bfloat16, 264, 900, "relu"),
        (torch.float16, 8, 40, "silu"),
    ],
)
@pytest.mark.parametrize("with_part", [False, True])
def test_refinements_at_models_sizes_on_hopper(dtype, E, D, activation, with_part):
    shares = ((0.25, 0.3), (0.0, 0.0), (0.0, 1.0))
    _check_refinements("hopper", random_ffn(1, E, D, dtype, "cuda"), with_part, shares, activation)


def _check_refinements(way, tensors, with_part, shares, activation="silu"):
    """An FFN with a mask for each token, and rows that must not be read set to NaN. shares: of neurons left out."""
    function, dtype = ffn_for(way, tensors), tensors[0].dtype
    hidden, gate, up, down = tensors
    (n, _), D, device = hidden.shape, len(gate), hidden.device
    if way == "hopper" and not sparse_ffn_sm90.runs_stages(*tensors):
        pytest.skip("not supported by the Hopper kernel")
    kept = torch.rand(n, D, device=device) < 0.7
    norms, up_part = torch.rand(D, device=device) + 0.5, torch.randn(n, D, device=device) if with_part else None
    x, wide = hidden.double(), [value.double() for value in (gate, up, down)]
    gates = ACTIVATIONS[activation](x @ wide[0].T)
    first = 2 * (gates.abs() * norms).log() + (0 if up_part is None else up_part)
    second = 2 * ((gates * (x @ wide[1].T)).abs() * norms).log()
    active = ops.ActiveNeurons(ops.pack(kept))
    for each in shares:
        thresholds = torch.stack([_least(scores, share) for scores, share in zip((first, second), each, strict=True)])
        passed = kept & (first >= thresholds[0])
        read_up, passed = passed.any(0), passed & (second >= thresholds[1])
        matrices = [matrix.clone() for matrix in (gate, up, down)]
        for matrix, read in zip(matrices, (kept.any(0), read_up, passed.any(0)), strict=True):
            if way != "torch":
                matrix[~read] = torch.nan
        refinement = ops.Refinement(thresholds.float(), norms, up_part)
        output = function(hidden, ops.FFNWeights(*matrices, activation), active, refinement=refinement)
        assert close(output, expected(hidden, gate, up, down, passed, activation), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("neurons", [0, 1, 5, 200])
def test_a_refinement_of_a_clusters_neurons_in_a_graph(neurons):
    """On Hopper, for fewer neurons than warps, and when each layer's kernel starts before the last one's has ended."""
    E, D, K, layers = 1024, 2000, 50, 4
    weights = [ops.FFNWeights(*random_ffn(1, E, D, torch.bfloat16, "cuda")[1:]) for _ in range(layers)]
    kept = torch.zeros(K, D, dtype=torch.bool, device="cuda")
    kept[:, :neurons] = True
    candidates = ops.Candidates(torch.rand(1, 9, device="cuda"), torch.randint(K, (1, 9), device="cuda").int())
    active, x = ops.ActiveNeurons(ops.pack(kept), candidates), random_ffn(1, E, 1, torch.bfloat16, "cuda")[0]
    refinement = ops.Refinement(torch.tensor([-3.0, -3.0], device="cuda"), torch.ones(D, device="cuda"))
    if not sparse_ffn_sm90.runs_stages(x, *weights[0][:3]):
        pytest.skip("not supported by the Hopper kernel")

    def chain(kernel):
        hidden, outputs = x, []
        for layer in weights:
            outputs.append(ops.sparse_ffn(hidden, layer, active, kernel=kernel, refinement=refinement))
            hidden = x + 4 * outputs[-1]
        return torch.cat(outputs)

    wanted, graph = chain("torch"), torch.cuda.CUDAGraph()
    first = chain("triton")
    with torch.cuda.graph(graph):
        outputs = chain("triton")
    for _ in range(20):
        graph.replay()
        assert torch.equal(outputs, first)
    assert (outputs - wanted).norm() <= 0.05 * wanted.norm()  # a neuron at a threshold may fall on either side


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_a_refinement_lets_nan_pass(way, device, activation):
    tensors = random_ffn(1, 16, 20, torch.bfloat16 if way == "hopper" else torch.float32, device)
    function, (hidden, *matrices) = ffn_for(way, tensors), tensors
    hidden[0, 3] = torch.nan
    active = ops.ActiveNeurons(ops.pack(torch.ones(1, 20, device=device) > 0))
    refinement = ops.Refinement(torch.ones(2, device=device), torch.ones(20, device=device))
    weights = ops.FFNWeights(*matrices, activation)
    assert function(hidden, weights, active, refinement=refinement).isnan().all()


def _least(scores, share):
    """A threshold above about this share of the scores, amid the widest gap near by, which rounding can't cross."""
    if share in (0.0, 1.0):
        return scores.new_tensor(torch.inf if share else -torch.inf)
    ordered = scores.flatten().sort().values
    middle = round(share * len(ordered))
    near = ordered[max(0, middle - 5) : middle + 5]
    gap = (near[1:] - near[:-1]).argmax()
    return (near[gap] + near[gap + 1]) / 2


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_masks_of_any_number_of_neurons(way, device):
    tensors = random_ffn(1, 40, 150, torch.bfloat16 if way == "hopper" else torch.float32, device)
    function = ffn_for(way, tensors)
    for neurons in ([], [149], [31, 32], [0, 63, 64, 127, 128], range(150)):
        kept = torch.zeros(1, 150, dtype=torch.bool, device=device)
        kept[0, list(neurons)] = True
        output = function(tensors[0], ops.FFNWeights(*tensors[1:]), ops.ActiveNeurons(ops.pack(kept)))
        assert close(output, expected(*tensors, kept, "silu"), tensors[0].dtype)


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "H", "K"), [(1, 20, 100), (3, 64, 17), (4, 7, 1)])
def test_a_cluster_is_predicted_and_its_mask_correction_and_offset_used(way, device, dtype, n, H, K):
    E, D = 48, 200 if device == "cuda" else 50  # the interpreter is slow for each neuron
    hidden, gate, up, down = random_ffn(n, E, D, dtype, device)
    ffn = ffn_for(way, (hidden, gate, up, down))
    hidden *= torch.tensor([1.0, 300.0, 0.01, 5.0], device=device)[:n, None].to(dtype)
    reduce, expand, correct, offsets = (
        torch.randn(*shape, device=device).to(dtype) / 4 for shape in ((H, E), (K, H), (H, E), (K, E))
    )
    reduce_bias, expand_bias, correct_bias = (torch.randn(size, device=device) for size in (H, K, E))
    kept = torch.rand(K, D, device=device) < 0.5
    predict = ops.predict_clusters if way == "torch" else ops.predict_clusters_triton

    inner, candidates = predict(hidden, ops.PredictorWeights(reduce, reduce_bias, expand, expand_bias))
    values, ids = candidates
    exact = F.silu(
        F.rms_norm(hidden.double(), (E,), eps=torch.finfo(torch.float32).eps) @ reduce.double().T + reduce_bias.double()
    )
    logits = exact @ expand.double().T + expand_bias.double()
    assert close(inner, exact, torch.float32) and close(values.amax(-1), logits.amax(-1), torch.float32)
    chosen = logits.argmax(-1)
    assert torch.equal(ids.gather(1, values.argmax(-1, keepdim=True)).squeeze(1).long(), chosen)

    active, delta = (
        ops.ActiveNeurons(ops.pack(kept), candidates),
        ops.OutputDelta(inner, correct, correct_bias, offsets),
    )
    output = ffn(hidden, ops.FFNWeights(gate, up, down), active, delta)
    added = exact @ correct.double() + correct_bias.double() + offsets.double()[chosen]
    assert close(output, expected(hidden, gate, up, down, kept[chosen], "silu", added), dtype)


def chosen(candidates):
    return candidates.clusters.gather(1, candidates.logits.argmax(1, keepdim=True))


@pytest.mark.parametrize(
    ("device", "finds"),
    [("cpu", False), *(pytest.param("cuda", finds, marks=pytest.mark.gpu) for finds in (False, True))],
)
@pytest.mark.parametrize("by_triton", [False, True])
@pytest.mark.parametrize(
    ("n", "H", "K", "dtype"), [(2, 20, 40, torch.bfloat16), (1, 20, 90, torch.float32), (3, 300, 17, torch.float16)]
)
def test_a_later_layers_cluster_is_predicted_with_the_ffn(device, by_triton, finds, n, H, K, dtype):
    """K = 90 is more than the `finish` kernel can score beside the output's columns."""
    D = 200 if device == "cuda" else 20
    hidden, *matrices = random_ffn(n, 48, D, dtype, device)
    weights = ops.FFNWeights(*matrices)
    predictors = [[torch.randn(*shape, device=device) / 4 for shape in ((H, 48), (H,), (K, H), (K,))] for _ in range(2)]
    for predictor in predictors:
        predictor[::2] = [value.to(dtype) for value in predictor[::2]]
    own, later = (ops.PredictorWeights(*predictor) for predictor in predictors)
    kept = ops.pack(torch.rand(K, D, device=device) < 0.5)
    candidates = ops.predict_clusters(hidden, own, by_triton).candidates
    alone = ops.sparse_ffn(
        hidden, weights, ops.ActiveNeurons(kept, candidates), kernel="triton" if by_triton else "torch"
    )
    expected = ops.predict_clusters(hidden, later, by_triton)
    finds = finds and by_triton and ops.can_prefetch(weights)
    next_layer, active_list = ops.NextLayer(D, kept, candidates) if finds else None, None
    for _ in range(3 if device == "cuda" else 1):
        active = ops.ActiveNeurons(kept, candidates, active_list)
        output, prediction, active_list = ops.sparse_ffn_ahead(
            hidden, weights, active, later, next_layer=next_layer, kernel="triton" if by_triton else "torch"
        )
        assert torch.equal(output, alone) and (active_list is None) != finds
        assert torch.equal(chosen(prediction.candidates), chosen(expected.candidates))
        assert torch.allclose(prediction.bottleneck, expected.bottleneck, rtol=1e-4, atol=1e-5)
        best, expected_best = (value.candidates.logits.amax(1) for value in (prediction, expected))
        assert torch.allclose(best, expected_best, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("finds", ["never", "before", "beside"])
def test_layers_in_a_graph_predict_for_the_next_but_one(finds):
    """A chain at a real size equals each layer alone, with active lists made before a layer or on a side stream."""
    E, D, H, K, layers = 4096, 2048, 512, 2048, 6
    hidden, *_ = random_ffn(1, E, 1, torch.bfloat16, "cuda")
    weights = [ops.FFNWeights(*random_ffn(1, E, D, torch.bfloat16, "cuda")[1:]) for _ in range(layers)]
    shapes = ((H, E, E**-0.5), (H, 1, 0.1), (K, H, H**-0.5), (K, 1, 0.1))
    predictors = [
        [(torch.randn(rows, width, device="cuda") * scale) for rows, width, scale in shapes] for _ in range(layers + 2)
    ]
    predictors = [
        ops.PredictorWeights(reduce.bfloat16(), bias.squeeze(1), expand.bfloat16(), other.squeeze(1))
        for reduce, bias, expand, other in predictors
    ]
    masks = [ops.pack(torch.rand(K, D, device="cuda") < 0.5) for _ in range(layers)]
    first = [ops.predict_clusters(hidden, predictors[layer]).candidates for layer in range(2)]

    def chain():
        candidates, outputs, active_list = list(first), [], None
        for layer in range(layers):
            next_layer = None
            if finds != "never" and layer + 1 < layers:
                next_layer = ops.NextLayer(D, masks[layer + 1], candidates[layer + 1])
            active = ops.ActiveNeurons(masks[layer], candidates[layer], active_list)
            output, prediction, active_list = ops.sparse_ffn_ahead(
                hidden, weights[layer], active, predictors[layer + 2], next_layer=next_layer
            )
            candidates.append(prediction.candidates)
            outputs.append(output)
        return outputs

    with ops.use_side_stream() if finds == "beside" else contextlib.nullcontext():
        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = chain()
    for _ in range(20):
        graph.replay()
        for layer, output in enumerate(outputs):
            active = ops.ActiveNeurons(masks[layer], ops.predict_clusters(hidden, predictors[layer]).candidates)
            assert torch.equal(output, ops.sparse_ffn(hidden, weights[layer], active))


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_of_equal_logits_the_lowest_cluster(way, device):
    predict = ops.predict_clusters if way == "torch" else ops.predict_clusters_triton
    tensors = random_ffn(1, 16, 64, torch.bfloat16 if way == "hopper" else torch.float32, device)
    kept = torch.eye(64, dtype=torch.bool, device=device)[:50]
    bias = torch.zeros(50, device=device)
    bias[[17, 23, 40]] = 1.0
    zeros = (torch.zeros(*shape, device=device) for shape in ((4, 16), (4,), (50, 4)))
    candidates = predict(tensors[0], ops.PredictorWeights(*zeros, bias)).candidates
    active = ops.ActiveNeurons(ops.pack(kept), candidates)
    output = ffn_for(way, tensors)(tensors[0], ops.FFNWeights(*tensors[1:]), active)
    assert close(output, expected(*tensors, kept[17:18], "silu"), tensors[0].dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "E", "D"),
    [(1, 4096, 14336), (2, 4096, 14336), (3, 4096, 1000), (4, 8192, 2100), (1, 5120, 700), (4, 576, 1536), (1, 8, 40)],
)
def test_models_sizes_on_hopper(dtype, n, E, D):
    tensors = random_ffn(n, E, D, dtype, "cuda")
    kept = torch.rand(n, D, device="cuda") < 0.5
    arguments = tensors[0], ops.FFNWeights(*tensors[1:]), ops.ActiveNeurons(ops.pack(kept))
    output = ffn_for("hopper", tensors)(*arguments)
    assert close(output, expected(*tensors, kept, "silu"), dtype)
    assert torch.equal(output, ops.sparse_ffn(*arguments))  # which picks the same kernel
    assert close(output, ops.sparse_ffn_triton(*arguments).double(), dtype)


@pytest.mark.parametrize(
    ("dtype", "tokens", "E", "D", "candidates", "activation", "later", "listed"),
    [
        (torch.bfloat16, 1, 4096, 14336, 128, "silu", 512, True),
        (torch.float16, 1, 4096, 14336, 128, "silu", 0, False),
        (torch.bfloat16, 4, 8192, 28672, 0, "gelu", 700, False),
        (torch.float16, 3, 576, 1536, 32, "gelu_tanh", 0, True),
        (torch.float16, 2, 8, 1, 1, "relu", 3, False),
    ],
)
def test_the_kernel_for_hopper_compiles(dtype, tokens, E, D, candidates, activation, later, listed):
    program, shared = Sizes(tokens, E, D, 132, candidates, activation, dtype, later, listed).program()
    assert (
        all(name in compile_program(program) for name in (b"rows", b"find"))
        and shared < 227 * 1024
        and dict(program.constants)["STAGES"] > 1
    )


@pytest.mark.parametrize(
    ("dtype", "E", "D", "candidates", "activation", "up_part"),
    [
        (torch.bfloat16, 4096, 14336, 128, "silu", False),
        (torch.float16, 4096, 28672, 0, "gelu", True),
        (torch.float16, 8, 1, 1, "relu", True),
    ],
)
def test_the_kernel_for_stages_compiles(dtype, E, D, candidates, activation, up_part):
    program, shared = Sizes(1, E, D, 132, candidates, activation, dtype).staged_program(up_part)
    assert b"staged" in compile_program(program) and shared < 227 * 1024


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_a_nan_input_still_names_a_cluster(way, device):
    predict = ops.predict_clusters if way == "torch" else ops.predict_clusters_triton
    tensors = random_ffn(2, 16, 64, torch.bfloat16, device)
    function = ffn_for(way, tensors)
    tensors[0][0, 3] = torch.nan
    predictor = ops.PredictorWeights(*(torch.randn(*shape, device=device) for shape in ((4, 16), (4,), (50, 4), (50,))))
    candidates = predict(tensors[0], predictor).candidates
    assert (candidates.clusters >= 0).all() and (candidates.clusters < 50).all()
    masks = ops.pack(torch.ones(50, 64, dtype=torch.bool, device=device))
    output = function(tensors[0], ops.FFNWeights(*tensors[1:]), ops.ActiveNeurons(masks, candidates))
    assert output[0].isnan().all() and not output[1].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden must be float \[n, E\]"),
        ({"gate": torch.zeros(64, 15)}, r"gate float32 \[64, 15\] must be float32 \[64, 16\]"),
        ({"down": torch.zeros(64, 16).half()}, r"down float16 \[64, 16\] must be float32"),
        ({"up": torch.zeros(16, 64).T}, "its rows contiguous"),
        ({"masks": torch.zeros(2, 16, dtype=torch.uint8)}, r"masks uint8 \[2, 16\] must be uint8 \[1, 16\]"),
        ({"activation": "tanh"}, "activation tanh: choose silu, gelu, gelu_tanh, relu"),
        ({"offsets": torch.zeros(1, 16)}, "need candidates"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    names = "hidden", "gate", "up", "down"
    values = dict(zip(names, random_ffn(1, 16, 64, torch.float32, "cpu"), strict=True))
    values |= {"masks": torch.zeros(1, 16, dtype=torch.uint8)} | change
    parts = [
        kind(**{name: values[name] for name in kind._fields if name in values})
        for kind in (ops.FFNWeights, ops.ActiveNeurons, ops.OutputDelta)
    ]
    with pytest.raises(ValueError, match=message):
        ops.sparse_ffn(values["hidden"], *parts)


def test_predictor_weights_that_do_not_fit_are_refused():
    predictor = ops.PredictorWeights(torch.zeros(4, 15), torch.zeros(4), torch.zeros(9, 4), torch.zeros(9))
    with pytest.raises(ValueError, match="predict_clusters wants"):
        ops.predict_clusters(torch.zeros(1, 16), predictor)


def test_the_ops_can_be_compiled():
    hidden, gate, up, down = random_ffn(2, 16, 64, torch.float32, "cpu")
    checked = dict(test_utils=("test_schema", "test_faketensor"))
    predictor = torch.randn(4, 16), torch.zeros(4), torch.randn(9, 4), torch.zeros(9)
    torch.library.opcheck(
        torch.ops.apc.sparse_ffn,
        (hidden, gate, up, down, ops.pack(torch.rand(2, 64) < 0.5), "silu", *[None] * 6, "torch", None),
        **checked,
    )
    candidates = ops.predict_clusters(hidden, ops.PredictorWeights(*predictor), by_triton=False).candidates
    masks = ops.pack(torch.rand(9, 64) < 0.5)
    ahead = hidden, gate, up, down, masks, "silu", *candidates, *[None] * 4, "triton", None, *[None] * 3, *predictor
    torch.library.opcheck(torch.ops.apc.sparse_ffn, ahead, **checked)
    refinement = torch.zeros(2), torch.ones(64), torch.zeros(2, 64)
    staged = hidden, gate, up, down, masks, "silu", *candidates, *[None] * 4, "triton", None, *refinement
    torch.library.opcheck(torch.ops.apc.sparse_ffn, staged, **checked)
    torch.library.opcheck(torch.ops.apc.predict_clusters, (hidden, *predictor, False), **checked)
