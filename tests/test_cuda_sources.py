"""Kernels in CUDA C++, run on the CPU: they equal their formulas and give the same bits in any order of threads."""

import math

import pytest
import torch

import emulator
from apc import ops
from apc.ops import nvrtc, packed_gpu, packed_sm80, products_sm80
from apc.ops.packed import PackedRows, pack_rows
from emulator import guarded, guarded_empty

if reason := emulator.unavailable():
    pytest.skip(reason, allow_module_level=True)

BF16, F16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 6e-3, F16: 1e-3}  # relative, of a result rounded to this type
EPSILON = 1e-5
ARCHITECTURES = ["sm_80", "sm_90a"]
ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture
def machine(monkeypatch, libraries):
    """A function that makes the emulator the GPU, with an architecture and a number of multiprocessors.

    Outputs of kernels are 0xFF bytes at first, between pages that can't be accessed.
    """
    gpu = emulator.Emulator(libraries)

    def start(arch, multiprocessors=2):
        for module in (packed_sm80, products_sm80):
            monkeypatch.setattr(module, "_prepare", module._prepare.__wrapped__)  # without its cache
        monkeypatch.setattr(nvrtc, "machine", lambda index: (multiprocessors, 227 * 1024, arch))
        monkeypatch.setattr(nvrtc, "function", gpu.function)
        monkeypatch.setattr(nvrtc, "launch", gpu.launch)
        monkeypatch.setattr(torch, "empty_like", lambda x: guarded_empty(x.shape, x.dtype))
        monkeypatch.setattr(
            torch.Tensor, "new_empty", lambda self, shape, dtype=None: guarded_empty(shape, dtype or self.dtype)
        )
        return gpu

    return start


def in_both_orders(gpu, run):
    """The tensors that run() returns, which must have the same bits in both orders of threads."""
    gpu.backwards = False
    results = run()
    gpu.backwards = True
    for first, second in zip(results, run(), strict=True):
        same = first.view(torch.uint8).equal(second.view(torch.uint8))
        assert same, "results depend on the order of threads"
    return results


def check(values, expected, dtype):
    error = (values.float() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]


def draw(*shape, dtype):
    return guarded(torch.randn(shape).to(dtype))


def draw_packed(R, E, group):
    """Rows of 4 bits with values around 0."""
    step = torch.randint(1, 200, (R, E // group))
    low = torch.randint(-9, 10, step.shape) - step // 2
    units = torch.tensor([1.0, 15.0]) * torch.rand(R, 1) / 500 * E**-0.5
    rows = pack_rows(torch.randint(16, (R, E)), step.byte(), low.to(torch.int8), units)
    return PackedRows(guarded(rows.words), E, group)


def with_nan(x):
    """A copy with NaN in one place of the last row."""
    x = guarded(x)
    x[-1, torch.randint(x.shape[1], ())] = math.nan
    return x


def input_of(x, norm, added=None):
    """The sum x + added as a kernel stores it, and the input [n, E] float32 that its products have."""
    total = x if added is None else (x.float() + added.float()).to(x.dtype)
    if norm is None:
        return total, total.float()
    scale = 1 / torch.sqrt(total.float().pow(2).mean(1, keepdim=True) + EPSILON)
    return total, (total.float() * (norm.float() * scale)).to(x.dtype).float()


def options(**tensors):
    """None of these tensors, each of them alone, and all."""
    for chosen in ((), *zip(tensors), tensors):
        yield {name: tensors[name] if name in chosen else None for name in tensors}


@pytest.mark.parametrize(
    ("n", "E", "rows", "activation", "dtype", "arch", "multiprocessors"),
    [
        pytest.param(1, 576, [37, 11, 9], "", BF16, "sm_90a", 3, id="three matrices"),
        pytest.param(2, 1088, [20, 9, 9], "", F16, "sm_80", 2, id="two vectors, E not a multiple of a batch"),
        pytest.param(3, 96, [17, 16, 3], "", F16, "sm_90a", 2, id="three vectors"),
        pytest.param(4, 72, [33], "", BF16, "sm_80", 1, id="four vectors"),
        pytest.param(1, 1088, [21, 21], "silu", F16, "sm_90a", 2, id="gated"),
        pytest.param(4, 96, [21, 21], "gelu", BF16, "sm_80", 2, id="four vectors, gated"),
    ],
)
def test_products(machine, n, E, rows, activation, dtype, arch, multiprocessors):
    gpu = machine(arch, multiprocessors)
    matrices = [draw(R, E, dtype=dtype) for R in rows]
    R = rows[0] if activation else sum(rows)
    x, norm = draw(n, E, dtype=dtype), guarded((1 + torch.randn(E) / 5).to(dtype))
    added, residual, bias = draw(n, E, dtype=dtype), draw(n, R, dtype=dtype), guarded(torch.randn(R))

    def products(x, norm, added, bias, residual):
        return products_sm80.products(x, matrices, norm, EPSILON, added, bias, residual, activation)

    for chosen in options(norm=norm, added=added, **{} if activation else dict(bias=bias, residual=residual)):
        given = dict(bias=None, residual=None) | chosen
        output, total = in_both_orders(gpu, lambda given=given: products(x, **given))
        expected_total, hidden = input_of(x, given["norm"], given["added"])
        each = [hidden @ matrix.float().T for matrix in matrices]
        expected = ACTIVATIONS[activation](each[0]) * each[1] if activation else torch.cat(each, 1)
        expected += sum(each.float() for each in (given["bias"], given["residual"]) if each is not None)
        assert total.equal(expected_total)
        check(output, expected, dtype)
    output, _ = products(with_nan(x), norm, None, None, None)
    assert output[-1].isnan().all() and not output[:-1].isnan().any()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("E", "group", "R", "dtype", "multiprocessors"), [(96, 32, 21, BF16, 1), (640, 128, 149, F16, 2)]
)
def test_a_product_of_packed_rows(machine, arch, E, group, R, dtype, multiprocessors):
    gpu = machine(arch, multiprocessors)
    rows = draw_packed(R, E, group)
    x, norm = draw(1, E, dtype=dtype), guarded((1 + torch.randn(E) / 5).to(dtype))
    added, residual, bias = draw(1, E, dtype=dtype), draw(1, R, dtype=dtype), guarded(torch.randn(R))

    def project(x, bias, residual, norm, added):
        return packed_sm80.project(x, rows, bias, residual, norm, EPSILON, added)

    for given in options(bias=bias, residual=residual, norm=norm, added=added):
        output, total = in_both_orders(gpu, lambda given=given: project(x, **given))
        expected_total, hidden = input_of(x, given["norm"], given["added"])
        expected = hidden @ rows.unpacked().T
        expected += sum(each.float() for each in (given["bias"], given["residual"]) if each is not None)
        assert total.equal(expected_total)
        check(output, expected, dtype)
    assert project(with_nan(x), None, None, None, None)[0].isnan().all()


class FFN:
    """An FFN of 4 bits with neurons of 16 bits, a mask, and the bottleneck of a later layer's predictor."""

    def __init__(self, D, E, group, dtype, spared, kept, bottleneck, activation="silu"):
        self.matrices = [draw_packed(D, E, group) for _ in range(3)]
        self.exact = [rows.unpacked() for rows in self.matrices]
        self.neurons = guarded(torch.randperm(D)[:spared].int())
        self.spared = [draw(spared, E, dtype=dtype).mul_(E**-0.5) for _ in range(3)]
        for rows, values, spared_rows in zip(self.matrices, self.exact, self.spared, strict=True):
            rows.words[self.neurons] = 0
            values[self.neurons] = spared_rows.float()
        self.dtype, self.activation = dtype, activation
        self.x, self.norm = draw(1, E, dtype=dtype), guarded((1 + torch.randn(E) / 5).to(dtype))
        self.kept = {"half": torch.rand(D) < 0.5, "none": torch.zeros(D) > 0}.get(kept, torch.ones(D) > 0)
        if kept == "half":
            self.kept[self.neurons[:2]] = torch.tensor([True, False])
        self.mask = None, None, None  # every neuron
        if kept != "every":
            masks = torch.stack((torch.rand(D) < 0.5, torch.rand(D) < 0.5, self.kept))
            logits, clusters = torch.randn(1, 40).clamp(max=2), torch.randint(0, 2, (1, 40)).int()
            logits[0, 37], clusters[0, 37] = 5.0, 2
            self.mask = tuple(map(guarded, (ops.pack(masks).view(torch.int32), logits, clusters)))
        rows = torch.randn(bottleneck, E) * E**-0.5
        self.later = tuple(map(guarded, packed_gpu._byte_rows(rows, torch.randn(bottleneck))))

    def __call__(self, x, listed=None):
        """The output [1, E], the spared neurons' values and the bottleneck's."""
        inner, bottleneck = (guarded_empty((1, len(each)), torch.float32) for each in (self.neurons, self.later[2]))
        gate, up, down = self.spared
        partial = packed_sm80.ffn(
            x, self.norm, EPSILON, self.matrices, self.activation, self.mask, listed,
            (self.neurons, gate, up), inner, (*self.later, bottleneck),
        )  # fmt: skip
        return partial.sum(0) + inner @ down.float(), inner, bottleneck

    def expected(self):
        """What a call returns, by formula."""
        _, hidden = input_of(self.x, self.norm)
        gate, up, down = self.exact
        values = (ACTIVATIONS[self.activation](hidden @ gate.T) * (hidden @ up.T)).to(self.dtype).float() * self.kept
        root = torch.sqrt(hidden.pow(2).mean() + packed_sm80.EPSILON)
        levels, scales, bias = self.later
        bottleneck = torch.nn.functional.silu(hidden / root @ (levels.float() - 128).T * scales + bias)
        return values @ down, values[:, self.neurons], bottleneck

    def check(self, gpu, listed=None):
        for values, expected in zip(in_both_orders(gpu, lambda: self(self.x, listed)), self.expected(), strict=True):
            if expected.any():
                check(values, expected, self.dtype)
            assert values[expected == 0].eq(0).all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("D", "E", "group", "dtype", "spared", "kept", "bottleneck", "activation"),
    [
        (203, 576, 64, BF16, 5, "half", 6, "silu"),
        (61, 256, 128, F16, 2, "half", 13, "gelu"),
        (33, 96, 32, F16, 1, "none", 1, "silu"),
        (107, 160, 32, BF16, 0, "every", 0, "silu"),
    ],
    ids=["half of the neurons", "half of them, groups of 128", "no neuron", "every neuron, nothing else"],
)
def test_an_ffn(machine, arch, D, E, group, dtype, spared, kept, bottleneck, activation):
    gpu = machine(arch)
    ffn = FFN(D, E, group, dtype, spared, kept, bottleneck, activation)
    ffn.check(gpu)
    if kept != "none":
        output, inner, later = ffn(with_nan(ffn.x))
        assert output.isnan().all() and later.isnan().all()
        assert inner[0].isnan().equal(ffn.kept[ffn.neurons])


def test_an_ffn_whose_neurons_an_earlier_product_listed(machine):
    gpu = machine("sm_90a")
    ffn = FFN(203, 576, 64, BF16, 5, "half", 6)
    masks, logits, clusters = ffn.mask
    rows, candidates = draw_packed(45, 576, 64), ops.Candidates(logits, clusters)
    listed = guarded_empty((2, 2 + packed_sm80._masked(ffn.x, ffn.matrices[0], 40).most), torch.int32)
    listing = packed_sm80.Listing(ffn.matrices[0], masks, candidates, listed)
    output, _ = in_both_orders(gpu, lambda: packed_sm80.project(ffn.x, rows, None, None, None, 0, None, listing))
    check(output, ffn.x.float() @ rows.unpacked().T, BF16)
    found = [neuron & 0xFFFFFF for count, _, *own in listed.tolist() for neuron in own[:count]]
    assert found == ffn.kept.nonzero()[:, 0].tolist() and listed[:, 1].eq(2).all()
    ffn.check(gpu, listed)


def run_products(gpu):
    matrix, x, added = (draw(n, 576, dtype=BF16) for n in (85, 1, 1))
    run = lambda: products_sm80.products(x, [matrix], None, EPSILON, added, None, None, "")
    check(in_both_orders(gpu, run)[0], input_of(x, None, added)[1] @ matrix.float().T, BF16)


def run_project(gpu):
    rows, x = draw_packed(149, 640, 128), draw(1, 640, dtype=F16)
    run = lambda: packed_sm80.project(x, rows, None, None, None, EPSILON, None)
    check(in_both_orders(gpu, run)[0], x.float() @ rows.unpacked().T, F16)


def run_ffn(gpu):
    FFN(203, 576, 64, BF16, 5, "half", 6).check(gpu)


@pytest.mark.parametrize(
    ("run", "arch", "line", "becomes"),
    [
        (run_products, "sm_90a", "__syncthreads();\n        if (!writes) return;", "if (!writes) return;"),
        (run_products, "sm_90a", "wait_for_groups<DEPTH - 1>();", "wait_for_groups<DEPTH>();"),
        (run_products, "sm_90a", "row = min(row, R - 1);", ""),
        (run_project, "sm_90a", "wait_for_warps();  // the input is set", ""),
        (run_project, "sm_90a", "wait_for_team(team);  // all warps have read them", ""),
        (run_project, "sm_90a", "replace_slot(ring, s, copy);\n        replace", "replace"),
        (run_ffn, "sm_80", "wait_for_team(team);  // down has arrived, and all warps have read gate and up", ""),
    ],
    ids=[
        "no barrier after the parts",
        "a wait that ends a group early",
        "rows outside of a matrix",
        "no barrier after the input",
        "no barrier of a team",
        "a slot that stays taken",
        "no barrier after copies",
    ],
)
def test_a_fault_is_found(machine, monkeypatch, run, arch, line, becomes):
    """By the test of a kernel with this line changed."""
    source = nvrtc.Program.source

    def faulty(program):
        before, after = source(program).split(line)
        return before + becomes + after

    gpu = machine(arch)
    run(gpu)
    monkeypatch.setattr(nvrtc.Program, "source", faulty)
    with pytest.raises((AssertionError, emulator.Fault)):
        run(gpu)
