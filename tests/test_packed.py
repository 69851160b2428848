"""Products with weights of 4 bits, and decoding steps that read them, equal the same with unpacked weights."""

import copy

import pytest
import torch
from test_decode_cpu import TOLERANCE, model_of
from test_decode_gpu import DEVICES, TOKENS, check_recorded, error_of, few_programs, random_parts  # noqa: F401

import apc
from apc import ops
from apc.data.ffn import find_ffns
from apc.data.quantise import nearest_levels
from apc.ops import packed_gpu, packed_sm80
from apc.ops.nvrtc import compile_program
from apc.ops.packed import PackedRows, pack_rows
from apc.ops.packed_gpu import Norm, PackedClusterFFN, PackedFFN, PackedFFNCall, SparedNeurons
from apc.predict.predictor import at_16_bits
from apc.sparse.decode import GreedyDecoder
from apc.sparse.model_step import ModelStepGPU, NotSupported
from apc.sparse.packed_weights import packed_ffn
from apc.utils.errors import UserError


@pytest.fixture(autouse=True)
def few_parts(monkeypatch):
    """The interpreter runs programs one after the other."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(packed_gpu, "_SPREAD", 0.2)


SIZES = dict(hidden_size=96, intermediate_size=75, num_attention_heads=6, head_dim=16, num_key_value_heads=2)


def packed(matrix, group=32):
    levels = nearest_levels(matrix.float(), 4, group)
    return pack_rows(levels.index(matrix.float()), levels.step, levels.low, levels.units)


@pytest.mark.parametrize("R, E, group", [(5, 96, 32), (3, 128, 64), (1, 384, 128), (2, 32, 32)])
def test_packing_keeps_the_levels(R, E, group):
    matrix = torch.randn(R, E)
    levels, rows = nearest_levels(matrix, 4, group), packed(matrix, group)
    assert rows.unpacked().equal(levels.value(levels.index(matrix)))
    assert rows.shape == (R, E) and rows.words.shape[1] % 4 == 0
    assert rows.nbytes - R * (E / 2 + 2 * E / group + 8) <= 15 * R


@pytest.mark.parametrize("E, G", [(96, 5), (48, 3), (512, 2)])
def test_other_groups_are_refused(E, G):
    index, step = torch.zeros(2, E), torch.zeros(2, G, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"^{E} weights in {G} groups: a group must have 32, 64, 128$"):
        pack_rows(index, step, step.to(torch.int8), torch.ones(2, 2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("R, E, group", [(7, 96, 32), (9, 640, 128)])
def test_products_of_rows(device, dtype, R, E, group):
    rows, draw = packed(torch.randn(R, E), group), lambda *size: torch.randn(*size, device=device).to(dtype)
    rows = PackedRows(rows.words.to(device), E, group)
    x, added, norm, residual = draw(1, E), draw(1, E), draw(E), draw(1, R)
    bias = torch.randn(R, device=device)
    hidden, total, _ = packed_gpu.prepare(x, Norm(norm, 1e-5), added)
    assert torch.allclose(total.float(), (x + added).float(), rtol=1e-2)  # the interpreter cuts bits off
    output, _ = packed_gpu.project_packed(hidden, rows, bias, residual)
    normed = torch.nn.functional.rms_norm((x + added).float(), (E,), norm.float(), 1e-5)
    expected = normed @ rows.unpacked().T + bias + residual.float()
    assert error_of(output.float(), expected) < max(5e-5, TOLERANCE[dtype])
    normed_inside, total = packed_gpu.project_packed(x, rows, bias, residual, Norm(norm, 1e-5), added)
    assert error_of(normed_inside.float(), expected) < max(5e-5, TOLERANCE[dtype])
    assert torch.allclose(total.float(), (x + added).float(), rtol=1e-2)
    plain, _ = packed_gpu.project_packed(x, rows)
    assert error_of(plain.float(), x.float() @ rows.unpacked().T) < max(5e-5, TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("D", [5, 128, 2000])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_the_kept_neurons_are_listed(device, D, density):
    mask = torch.rand(3, D) < density
    masks = ops.pack(mask).to(device).view(torch.int32)
    candidates = ops.Candidates(
        torch.tensor([[0.5, 2, 1]], device=device), torch.tensor([[0, 2, 1]], device=device).int()
    )
    x = torch.randn(1, 96, device=device)
    hidden, _, kept = packed_gpu.prepare(x, Norm(torch.ones(96, device=device), 1e-5), None, masks, candidates, D)
    assert kept.neurons[: kept.total].tolist() == mask[2].nonzero()[:, 0].tolist()
    assert torch.allclose(hidden, torch.nn.functional.rms_norm(x, (96,), eps=1e-5), atol=1e-6)


def draw_ffn(D, E, dtype, device, spared, group=32):
    """An FFN of 4 bits, and its matrices [D, E] in float32."""
    matrices = [torch.randn(D, E) * E**-0.5 for _ in range(3)]
    rows, exact = [packed(matrix, group) for matrix in matrices], [None] * 3
    which = torch.randperm(D)[:spared]
    for place, (own, matrix) in enumerate(zip(rows, matrices, strict=True)):
        values = own.unpacked()
        values[which] = matrix[which].to(dtype).float()
        own.words[which] = 0
        rows[place] = PackedRows(own.words.to(device), E, group)
        exact[place] = values.to(device)
    kept = SparedNeurons(which.int(), *(matrix[which].to(dtype) for matrix in matrices))
    return PackedFFN(*rows, "silu", SparedNeurons(*(each.to(device) for each in kept))), exact


def formula(x, norm, matrices, kept):
    """The FFN's output float32 [1, E] over the kept neurons, bool [D]."""
    gate, up, down = matrices
    hidden = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], norm.float(), 1e-5)
    values = torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)
    return (values * kept) @ down


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("D, E, group, spared", [(75, 96, 32, 3), (200, 256, 128, 0), (33, 160, 32, 1)])
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        *((torch.float32, kept) for kept in ("half", "all", "none", "every")),
        (torch.float16, "half"),
        (torch.float16, "every"),
    ],
)
def test_an_ffn_under_a_mask(device, dtype, D, E, group, spared, kept):
    """Under the mask of a cluster, or of all neurons without a predictor."""
    ffn, matrices = draw_ffn(D, E, dtype, device, spared, group)
    x, norm = torch.randn(1, E, device=device).to(dtype), 1 + torch.randn(E, device=device).to(dtype) / 10
    bits = {"half": torch.rand(2, D) < 0.5, "none": torch.zeros(2, D) > 0}.get(kept, torch.ones(2, D) > 0)
    prediction = None
    predictor = ops.PredictorWeights(
        torch.randn(4, E, device=device).to(dtype), torch.zeros(4, device=device),
        torch.randn(2, 4, device=device).to(dtype), torch.zeros(2, device=device),
    )  # fmt: skip
    given = PackedClusterFFN(ffn) if kept == "every" else PackedClusterFFN(ffn, predictor, ops.pack(bits).to(device))
    call = PackedFFNCall(given, dtype)
    if kept != "every":
        prediction = call.empty_prediction(x)
        logits, clusters = prediction.candidates
        logits.fill_(-1)
        clusters.fill_(0)
        logits[0, -1], clusters[0, -1] = 1.0, 1
    output, coming = call(x, Norm(norm, 1e-5), prediction)
    expected = formula(x, norm, matrices, bits[1].to(device))
    assert coming is None
    if kept == "none":
        assert output.eq(0).all()
    else:
        assert error_of(output.float(), expected) < max(5e-5, TOLERANCE[dtype])


MASKED = packed_sm80.Masked(14336, 132, 256)


@pytest.mark.parametrize("device", DEVICES)
def test_the_layer_before_reads_a_predictor_at_8_bits(device):
    """Whatever its type is: runs have predictors in bfloat16, also for float16 models."""
    first, later = (draw_ffn(40, 96, torch.float16, device, 1)[0] for _ in range(2))
    draw = lambda *size: torch.randn(*size, device=device).bfloat16() / 8
    predictor = ops.PredictorWeights(draw(4, 96), draw(4).float(), draw(9, 4), draw(9).float())
    masks = ops.pack(torch.rand(9, 40) < 0.5).to(device)
    one, two = (
        PackedFFNCall(PackedClusterFFN(*given), torch.float16) for given in ((first,), (later, predictor, masks))
    )
    x, norm = torch.randn(1, 96, device=device).half(), Norm(torch.ones(96, device=device).half(), 1e-5)
    output, coming = one(x, norm, None, two)
    hidden = torch.nn.functional.rms_norm(x.float(), (96,), eps=1e-5)
    rows = packed_gpu._byte_rows(predictor.reduce, predictor.reduce_bias)
    values = (rows.levels.float() - 128) * rows.scales[:, None]
    assert (values - predictor.reduce.float()).abs().le(rows.scales[:, None] * 0.5001).all()
    assert error_of(coming.bottleneck, torch.nn.functional.silu(hidden @ values.T + rows.bias)) < 1e-3
    assert output.equal(one(x, norm)[0])


@pytest.mark.parametrize(
    ("sizes", "slots"),
    [
        (packed_sm80.Sizes("project", 4096, 32, 580, torch.bfloat16, "sm_90a", 227 * 1024), (2, 4)),
        (packed_sm80.Sizes("project", 4096, 32, 580, torch.bfloat16, "sm_90a", 227 * 1024, MASKED), (2, 4)),
        (packed_sm80.Sizes("ffn", 4096, 32, 580, torch.bfloat16, "sm_90a", 227 * 1024, MASKED), (2, 5)),
        (packed_sm80.Sizes("ffn", 8192, 32, 1156, torch.bfloat16, "sm_90a", 227 * 1024, MASKED), (1, 5)),
        (
            packed_sm80.Sizes(
                "ffn", 576, 64, 80, torch.float16, "sm_80", 163 * 1024, MASKED._replace(activation="gelu")
            ),
            (1, 10),
        ),
        (
            packed_sm80.Sizes("ffn", 4096, 32, 580, torch.bfloat16, "sm_89", 99 * 1024, MASKED._replace(candidates=0)),
            (1, 4),
        ),
    ],
)
def test_the_tensor_cores_kernels_compile(sizes, slots):
    program, shared = sizes.program()
    assert sizes.slots == slots and shared <= sizes.shared
    assert sizes.name.encode() in compile_program(program)


def test_rows_that_shared_memory_has_no_room_for():
    sizes = packed_sm80.Sizes("project", 16384, 32, 2320, torch.bfloat16, "sm_90a", 227 * 1024)
    assert sizes.slots == (1, 2) and sizes._replace(name="ffn", ffn=MASKED).slots == (1, 0)
    small = packed_sm80.Sizes("project", 4096, 32, 580, torch.bfloat16, "sm_80", 64 * 1024)
    assert small.slots == (1, 2) and small._replace(name="ffn", ffn=MASKED).slots == (1, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("R", [45, 6144])
def test_a_product_lists_the_neurons_of_an_ffn(R):
    """On Hopper; the FFN with this list equals that with the candidates, to the bit."""
    D, E, dtype = 1500, 1024, torch.bfloat16
    ffn, _ = draw_ffn(D, E, dtype, "cuda", 3)
    draw = lambda *size: torch.randn(*size, device="cuda").to(dtype)
    predictor = ops.PredictorWeights(
        draw(16, E), torch.zeros(16, device="cuda"), draw(300, 16), torch.zeros(300, device="cuda")
    )
    masks, x = torch.rand(300, D) < 0.5, draw(1, E)
    call = PackedFFNCall(PackedClusterFFN(ffn, predictor, ops.pack(masks).cuda()), dtype)
    prediction = call.predict(x)
    listing = call.listing(x, prediction)
    if listing is None:
        pytest.skip("the kernel that lists neurons is for Hopper")
    rows = PackedRows(packed(torch.randn(R, E)).words.cuda(), E, 32)
    product, _ = packed_gpu.project_packed(x, rows, listing=listing)
    assert product.equal(packed_gpu.project_packed(x, rows)[0])
    logits, clusters = prediction.candidates
    cluster = clusters[0, logits[0].argmax()].item()
    found = [neuron & 0xFFFFFF for count, _, *own in listing.listed.tolist() for neuron in own[:count]]
    assert found == masks[cluster].nonzero()[:, 0].tolist()
    assert listing.listed[:, 1].eq(cluster).all()
    assert call(x, None, prediction, None, listing)[0].equal(call(x, None, prediction)[0])


def test_nan_shows():
    ffn, _ = draw_ffn(40, 96, torch.float32, "cpu", 2)
    x = torch.randn(1, 96)
    x[0, 5] = torch.nan
    output, _ = PackedFFNCall(PackedClusterFFN(ffn), torch.float32)(x)
    assert output.isnan().all()


def rounded_copy(model):
    """The model with the values that a step of 4 bits reads."""
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q", "k", "v", "o"):
                weight = getattr(layer.self_attn, f"{name}_proj").weight
                weight.copy_(packed(weight).unpacked())
    return apc.quantise_ffns(model, 4, 32, 16)


def error_of_steps(model, device, steps=1, sparsify=lambda model: None):
    """How far logits of steps that round a model are from those of the rounded model, relatively."""
    rounded = rounded_copy(copy.deepcopy(model))
    logits, expected = [], []
    for each in (model, rounded):
        sparsify(each.to(device))
    plain, other = GreedyDecoder(rounded, 1, 16, mode=None), GreedyDecoder(model, 1, 16, mode=None)
    for decoder in (plain, other):
        decoder.prefill(TOKENS.to(device))
    for own, layer in zip(other.cache.layers, plain.cache.layers, strict=True):
        own.keys.copy_(layer.keys)
        own.values.copy_(layer.values)
    step = ModelStepGPU(model, other.cache, 4)
    for token in range(steps):
        plain.token.fill_(token)
        expected.append(plain.step().float())
        logits.append(step(torch.full((1, 1), token, device=device)).float())
    return error_of(torch.stack(logits), torch.stack(expected))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_step_equals_that_of_the_rounded_model(device, kind):
    assert error_of_steps(model_of(kind, **SIZES), device, steps=2) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_step_of_a_sparse_model(device, lookahead):
    """Clusters are predicted by the layer itself, or by one or two layers before it; with corrections and offsets."""
    model = model_of(**SIZES, num_hidden_layers=4)
    codebook, predictor = random_parts(model, lookahead=lookahead, corrects=lookahead == 1)
    if lookahead < 2:
        codebook.sites["neuron"].offsets = at_16_bits(torch.randn(4, 6, 96) / 10)
    apply = lambda each: apc.sparsify(each, codebook, predictor, "predicted", kernel="torch", max_sparse_tokens=1)
    assert error_of_steps(model, device, sparsify=apply) < 1e-4


def test_a_model_that_is_not_quantised_is_rounded_alike():
    """FFNs that nobody quantised are rounded as `quantise_ffns` would; all of it changes the logits."""
    model = model_of(**SIZES)
    plain = GreedyDecoder(model, 1, 16, mode=None)
    plain.prefill(TOKENS)
    own = ModelStepGPU(model, plain.cache, 4)
    assert 1e-3 < error_of(own(plain.token), plain.step()) < 0.7
    packed_model = PackedClusterFFN(packed_ffn(find_ffns(model)[0], "silu")).weights
    expected = packed_ffn(find_ffns(rounded_copy(model))[0], "silu")
    assert packed_model.gate.words.equal(expected.gate.words) and packed_model.down.words.equal(expected.down.words)


def test_gate_and_up_that_were_stored_at_4_bits_keep_their_levels():
    """As other libraries store them: groups of 32 along the row, a bfloat16 scale, and no group at its lowest level."""
    ffn = find_ffns(model_of(**SIZES))[0]
    with torch.no_grad():
        for weight in (ffn.gate.weight, ffn.up.weight):
            groups = weight.unflatten(1, (-1, 32))
            scale = (groups.abs().amax(2, keepdim=True) / 7).bfloat16().float()
            weight.copy_(((groups / scale).round() * scale).flatten(1))
    packed_rows = packed_ffn(ffn, "silu")
    spared = packed_rows.spared.neurons.long()
    for rows, weight in ((packed_rows.gate, ffn.gate.weight), (packed_rows.up, ffn.up.weight)):
        own = weight.detach().index_fill(0, spared, 0.0)
        assert 0 < error_of(rows.unpacked(), own) < 0.01  # rounding to 4 bits anew: 0.07


@pytest.mark.parametrize(
    "bits, changes, problem",
    [
        (4, {}, r"bits=4: steps on cpu read 8 bits; set bits=8"),
        (8, {"mode": None}, r"bits=8: mode=None; leave bits out"),
    ],
)
def test_bits_that_a_device_lacks_are_refused(bits, changes, problem):
    with pytest.raises(UserError, match=f"^{problem}$"):
        GreedyDecoder(model_of(), 1, 16, bits=bits, **changes).prefill(TOKENS)


def test_what_can_not_be_packed_is_refused():
    def reason(model):
        cache = GreedyDecoder(model, 1, 16, mode=None)
        cache.prefill(TOKENS)
        with pytest.raises(NotSupported) as caught:
            ModelStepGPU(model, cache.cache, 4)
        return str(caught.value)

    assert reason(model_of(head_dim=16)) == "a row of 72 weights is not cut into whole groups of 32"
    model = model_of(**SIZES)
    parts = random_parts(model)
    apc.sparsify(model, *parts, "static", kernel="torch")
    assert reason(model) == "policy static: no kernel reads its weights at 4 bits"
    apc.sparsify(model, *parts, "predicted")
    assert reason(model) == "masks run on a dense forward pass (kernel=None)"
    stored = apc.quantise_ffns(model_of(**SIZES), 3)
    assert "is stored at 3 bits (model.ffn_bits), not at 4" in reason(stored)


def test_wrong_products_are_refused(monkeypatch):
    model = model_of(**SIZES)
    decoder = GreedyDecoder(model, 1, 16, mode=None)
    decoder.prefill(TOKENS)
    right = packed_gpu.finish
    monkeypatch.setattr(packed_gpu, "finish", lambda *given, **named: 1.1 * right(*given, **named))
    with pytest.raises(NotSupported, match=r"^the kernel's products differ from the formula's by 10\.0%$"):
        ModelStepGPU(model, decoder.cache, 4)


@pytest.mark.gpu
def test_a_graph_adds_the_spared_neurons_of_its_own_call():
    """Not those of the call before, which are in the same memory: the spared rows make most of the output here."""
    ffn, matrices = draw_ffn(1500, 1024, torch.bfloat16, "cuda", 16)
    large = [rows * 4 for rows in ffn.spared[1:]]
    for matrix, rows in zip(matrices, large, strict=True):
        matrix[ffn.spared.neurons.long()] = rows.float()
    call = PackedFFNCall(
        PackedClusterFFN(ffn._replace(spared=SparedNeurons(ffn.spared.neurons, *large))), torch.bfloat16
    )
    x, norm = torch.randn(1, 1024, device="cuda").bfloat16(), torch.ones(1024, device="cuda").bfloat16()
    call(x, Norm(norm, 1e-5))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call(part, Norm(norm, 1e-5))[0] for part in (x, -x)]
    for _ in range(50):
        x.copy_(torch.randn(1, 1024, device="cuda"))
        graph.replay()
        for output, part in zip(outputs, (x, -x), strict=True):
            expected = formula(part, norm, matrices, torch.ones(1500, device="cuda"))
            assert error_of(output.float(), expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("lookahead", [None, 0, 1])
def test_the_decoder_records_a_step(lookahead):
    """As a CUDA graph, dense and sparse, at a size with several programs of each kernel."""
    sizes = dict(hidden_size=1024, intermediate_size=1500, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    model = rounded_copy(model_of(dtype=torch.bfloat16, num_hidden_layers=4, **sizes)).to("cuda")
    if lookahead is not None:
        parts = random_parts(model, lookahead=lookahead, decided=True)
        apc.sparsify(model, *parts, "predicted", kernel="triton", max_sparse_tokens=1)
    decoder, plain = GreedyDecoder(model, 1, 16, bits=4), GreedyDecoder(model, 1, 16, mode=None)
    check_recorded(decoder, plain)
