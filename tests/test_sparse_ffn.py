"""Sparse FFNs: kernels and torch's path against the dense FFN under a mask, the cluster against the predictor's, and what is refused."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from apc import ops
from apc.ops import sparse_ffn_sm90
from apc.ops.nvrtc import compile_program

WAYS = [
    ("torch", "cpu"),
    ("triton", "cpu"),
    *(pytest.param(way, "cuda", marks=pytest.mark.gpu) for way in ("triton", "hopper")),
]
FFNS = {"torch": ops.sparse_ffn, "triton": ops.sparse_ffn_triton, "hopper": ops.sparse_ffn_hopper}


def ffn_for(way, tensors):
    """Its function; skips what the kernel for Hopper does not take."""
    if way == "hopper" and not sparse_ffn_sm90.takes(*tensors[1:]):
        pytest.skip("not for the kernel for Hopper")
    return FFNS[way]


def made(n, E, D, dtype, device, spread=0):
    """hidden, gate, up, down; rows `spread` numbers further apart than they are long."""
    weights = [torch.randn(D, E + spread)[:, :E] for _ in range(3)]
    return [
        (value * scale).to(dtype).to(device)
        for value, scale in zip([torch.randn(n, E), *weights], (1, E**-0.5, E**-0.5, D**-0.5), strict=True)
    ]


def expected(hidden, gate, up, down, kept, activation, added=0.0):
    x, wide = hidden.double(), [value.double() for value in (gate, up, down)]
    act = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[
        activation
    ]
    return (act(x @ wide[0].T) * (x @ wide[1].T) * kept) @ wide[2] + added


def close(found, wanted, dtype):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    return found.dtype == dtype and (found.double() - wanted).norm() < tolerance * wanted.norm().clamp_min(1e-6)


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "E", "D", "activation"),
    [(1, 48, 200, "silu"), (3, 40, 70, "gelu"), (4, 33, 40, "relu"), (2, 128, 1, "gelu_tanh")],
)
def test_the_ffn_under_each_tokens_mask(way, device, dtype, n, E, D, activation):
    D = D if device == "cuda" else min(D, 50)  # the interpreter takes its time for each neuron
    tensors = made(n, E, D, dtype, device, spread=16)
    function = ffn_for(way, tensors)
    kept = torch.rand(n, D, device=device) < torch.linspace(0.1, 0.9, n, device=device).unsqueeze(1)
    kept[:, 0] = True
    found = function(*tensors, ops.pack(kept), activation)
    assert close(found, expected(*tensors, kept, activation), dtype)
    assert device == "cpu" or torch.equal(found, function(*tensors, ops.pack(kept), activation))


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_masks_of_any_number_of_neurons(way, device):
    tensors = made(1, 40, 150, torch.bfloat16 if way == "hopper" else torch.float32, device)
    function = ffn_for(way, tensors)
    for neurons in ([], [149], [31, 32], [0, 63, 64, 127, 128], range(150)):
        kept = torch.zeros(1, 150, dtype=torch.bool, device=device)
        kept[0, list(neurons)] = True
        assert close(function(*tensors, ops.pack(kept)), expected(*tensors, kept, "silu"), tensors[0].dtype)


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "H", "K"), [(1, 20, 100), (3, 64, 17), (4, 7, 1)])
def test_a_cluster_is_predicted_and_its_mask_correction_and_offset_used(way, device, dtype, n, H, K):
    E, D = 48, 200
    hidden, gate, up, down = made(n, E, D, dtype, device)
    ffn = ffn_for(way, (hidden, gate, up, down))
    hidden *= torch.tensor([1.0, 300.0, 0.01, 5.0], device=device)[:n, None].to(dtype)
    reduce, expand, correct, offsets = (
        torch.randn(*shape, device=device).to(dtype) / 4 for shape in ((H, E), (K, H), (H, E), (K, E))
    )
    reduce_bias, expand_bias, correct_bias = (torch.randn(size, device=device) for size in (H, K, E))
    kept = torch.rand(K, D, device=device) < 0.5
    predict = ops.predict_clusters if way == "torch" else ops.predict_clusters_triton

    inner, values, ids = predict(hidden, reduce, reduce_bias, expand, expand_bias)
    exact = F.silu(
        F.rms_norm(hidden.double(), (E,), eps=torch.finfo(torch.float32).eps) @ reduce.double().T + reduce_bias.double()
    )
    logits = exact @ expand.double().T + expand_bias.double()
    assert close(inner, exact, torch.float32) and close(values.amax(-1), logits.amax(-1), torch.float32)
    chosen = logits.argmax(-1)
    assert torch.equal(ids.gather(1, values.argmax(-1, keepdim=True)).squeeze(1).long(), chosen)

    found = ffn(hidden, gate, up, down, ops.pack(kept), "silu", (values, ids), (inner, correct, correct_bias), offsets)
    added = exact @ correct.double() + correct_bias.double() + offsets.double()[chosen]
    assert close(found, expected(hidden, gate, up, down, kept[chosen], "silu", added), dtype)


def chosen(values, ids):
    return ids.gather(1, values.argmax(1, keepdim=True))


@pytest.mark.parametrize(
    ("device", "finds"),
    [("cpu", False), *(pytest.param("cuda", finds, marks=pytest.mark.gpu) for finds in (False, True))],
)
@pytest.mark.parametrize("by_triton", [False, True])
@pytest.mark.parametrize(
    ("n", "H", "K", "dtype"), [(2, 20, 40, torch.bfloat16), (1, 20, 90, torch.float32), (3, 300, 17, torch.float16)]
)
def test_a_later_layers_cluster_is_predicted_with_the_ffn(device, by_triton, finds, n, H, K, dtype):
    """K of 90 is more than the last kernel scores beside the output's columns."""
    D = 200 if device == "cuda" else 20
    tensors = made(n, 48, D, dtype, device)
    predictors = [[torch.randn(*shape, device=device) / 4 for shape in ((H, 48), (H,), (K, H), (K,))] for _ in range(2)]
    for predictor in predictors:
        predictor[::2] = [value.to(dtype) for value in predictor[::2]]
    kept = ops.pack(torch.rand(K, D, device=device) < 0.5)
    _, *candidates = ops.predict_clusters(tensors[0], *predictors[0], by_triton)
    alone = ops.sparse_ffn(*tensors, kept, "silu", tuple(candidates), by_triton=by_triton)
    inner, values, ids = ops.predict_clusters(tensors[0], *predictors[1], by_triton)
    finds = finds and by_triton and ops.can_find(*tensors[1:])
    following, active_list = ops.NextLayer(D, kept, tuple(candidates)) if finds else None, None
    for _ in range(3 if device == "cuda" else 1):
        output, found, active_list = ops.sparse_ffn_ahead(
            *tensors,
            kept,
            "silu",
            tuple(candidates),
            tuple(predictors[1]),
            active_list=active_list,
            following=following,
            by_triton=by_triton,
        )
        assert (
            torch.equal(output, alone)
            and torch.equal(chosen(*found[1:]), chosen(values, ids))
            and (active_list is None) != finds
        )
        assert torch.allclose(found[0], inner, rtol=1e-4, atol=1e-5) and torch.allclose(
            found[1].amax(1), values.amax(1), rtol=1e-4, atol=1e-4
        )


@pytest.mark.gpu
@pytest.mark.parametrize("finds", ["never", "before", "beside"])
def test_layers_in_a_graph_predict_for_the_next_but_one(finds):
    """A chain at a real size, where a layer's neurons are found before it, or on another stream: the same as each alone."""
    E, D, H, K, layers = 4096, 2048, 512, 2048, 6
    hidden, *_ = made(1, E, 1, torch.bfloat16, "cuda")
    weights = [made(1, E, D, torch.bfloat16, "cuda")[1:] for _ in range(layers)]
    shapes = ((H, E, E**-0.5), (H, 1, 0.1), (K, H, H**-0.5), (K, 1, 0.1))
    predictors = [
        [(torch.randn(rows, width, device="cuda") * scale) for rows, width, scale in shapes] for _ in range(layers + 2)
    ]
    predictors = [
        (reduce.bfloat16(), bias.squeeze(1), expand.bfloat16(), other.squeeze(1))
        for reduce, bias, expand, other in predictors
    ]
    masks = [ops.pack(torch.rand(K, D, device="cuda") < 0.5) for _ in range(layers)]
    first = [ops.predict_clusters(hidden, *predictors[layer])[1:] for layer in range(2)]

    def chain():
        candidates, outputs, active_list = list(first), [], None
        for layer in range(layers):
            following = None
            if finds != "never" and layer + 1 < layers:
                following = ops.NextLayer(D, masks[layer + 1], candidates[layer + 1])
            output, (_, *found), active_list = ops.sparse_ffn_ahead(
                hidden,
                *weights[layer],
                masks[layer],
                "silu",
                candidates[layer],
                predictors[layer + 2],
                active_list=active_list,
                following=following,
            )
            candidates.append(tuple(found))
            outputs.append(output)
        return outputs

    with ops.whole_passes() if finds == "beside" else contextlib.nullcontext():
        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = chain()
    for _ in range(20):
        graph.replay()
        for layer, output in enumerate(found):
            predicted = ops.predict_clusters(hidden, *predictors[layer])[1:]
            assert torch.equal(output, ops.sparse_ffn(hidden, *weights[layer], masks[layer], "silu", predicted))


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_of_equal_logits_the_lowest_cluster(way, device):
    predict = ops.predict_clusters if way == "torch" else ops.predict_clusters_triton
    tensors, kept = (
        made(1, 16, 64, torch.bfloat16 if way == "hopper" else torch.float32, device),
        torch.eye(64, dtype=torch.bool, device=device)[:50],
    )
    bias = torch.zeros(50, device=device)
    bias[[17, 23, 40]] = 1.0
    _, *candidates = predict(
        tensors[0],
        torch.zeros(4, 16, device=device),
        torch.zeros(4, device=device),
        torch.zeros(50, 4, device=device),
        bias,
    )
    found = ffn_for(way, tensors)(*tensors, ops.pack(kept), "silu", tuple(candidates))
    assert close(found, expected(*tensors, kept[17:18], "silu"), tensors[0].dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "E", "D"),
    [(1, 4096, 14336), (2, 4096, 14336), (3, 4096, 1000), (4, 8192, 2100), (1, 5120, 700), (4, 576, 1536), (1, 8, 40)],
)
def test_models_sizes_on_hopper(dtype, n, E, D):
    tensors = made(n, E, D, dtype, "cuda")
    kept = torch.rand(n, D, device="cuda") < 0.5
    found = ffn_for("hopper", tensors)(*tensors, ops.pack(kept))
    assert close(found, expected(*tensors, kept, "silu"), dtype)
    assert torch.equal(found, ops.sparse_ffn(*tensors, ops.pack(kept)))  # which takes the same way
    assert close(found, ops.sparse_ffn_triton(*tensors, ops.pack(kept)).double(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "E", "D", "candidates", "activation", "later", "found"),
    [
        (1, 4096, 14336, 128, "silu", 512, True), (1, 4096, 14336, 128, "silu", 0, False), (4, 8192, 28672, 0, "gelu", 700, False),
        (3, 576, 1536, 32, "gelu_tanh", 0, True), (2, 8, 1, 1, "relu", 3, False),
    ],
)  # fmt: skip
def test_the_kernel_for_hopper_compiles(dtype, tokens, E, D, candidates, activation, later, found):
    program, shared = sparse_ffn_sm90.program(tokens, E, D, 132, candidates, activation, dtype, later, found)
    assert (
        all(name in compile_program(program) for name in (b"rows", b"find"))
        and shared < 227 * 1024
        and dict(program.constants)["STAGES"] > 1
    )


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_an_input_that_is_no_number_names_a_cluster_all_the_same(way, device):
    predict = ops.predict_clusters if way == "torch" else ops.predict_clusters_triton
    tensors = made(2, 16, 64, torch.bfloat16, device)
    function = ffn_for(way, tensors)
    tensors[0][0, 3] = torch.nan
    weights = [torch.randn(*shape, device=device) for shape in ((4, 16), (4,), (50, 4), (50,))]
    _, *candidates = predict(tensors[0], *weights)
    assert (candidates[1] >= 0).all() and (candidates[1] < 50).all()
    found = function(*tensors, ops.pack(torch.ones(50, 64, dtype=torch.bool, device=device)), "silu", tuple(candidates))
    assert found[0].isnan().all() and not found[1].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden must be float \[n, E\]"),
        ({"gate": torch.zeros(64, 15)}, r"gate float32 \[64, 15\] must be float32 \[64, 16\]"),
        ({"down": torch.zeros(64, 16).half()}, r"down float16 \[64, 16\] must be float32"),
        ({"up": torch.zeros(16, 64).T}, "rows in one piece"),
        ({"masks": torch.zeros(2, 16, dtype=torch.uint8)}, r"masks uint8 \[2, 16\] must be uint8 \[1, 16\]"),
        ({"activation": "tanh"}, "activation tanh: choose silu, gelu, gelu_tanh, relu"),
        ({"offsets": torch.zeros(1, 16)}, "need candidates"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, gate, up, down = made(1, 16, 64, torch.float32, "cpu")
    arguments = dict(hidden=hidden, gate=gate, up=up, down=down, masks=torch.zeros(1, 16, dtype=torch.uint8)) | change
    with pytest.raises(ValueError, match=message):
        ops.sparse_ffn(**arguments)
    with pytest.raises(ValueError, match="predict_clusters wants"):
        ops.predict_clusters(hidden, torch.zeros(4, 15), torch.zeros(4), torch.zeros(9, 4), torch.zeros(9))


def test_the_ops_can_be_compiled():
    hidden, gate, up, down = made(2, 16, 64, torch.float32, "cpu")
    checked = dict(test_utils=("test_schema", "test_faketensor"))
    predictor = torch.randn(4, 16), torch.zeros(4), torch.randn(9, 4), torch.zeros(9)
    torch.library.opcheck(
        torch.ops.apc.sparse_ffn,
        (hidden, gate, up, down, ops.pack(torch.rand(2, 64) < 0.5), "silu", *[None] * 6, False, None),
        **checked,
    )
    candidates = ops.predict_clusters(hidden, *predictor, by_triton=False)[1:]
    ahead = (
        hidden,
        gate,
        up,
        down,
        ops.pack(torch.rand(9, 64) < 0.5),
        "silu",
        *candidates,
        *[None] * 4,
        True,
        None,
        *predictor,
    )
    torch.library.opcheck(torch.ops.apc.sparse_ffn, ahead, **checked)
    torch.library.opcheck(torch.ops.apc.predict_clusters, (hidden, *predictor, False), **checked)
