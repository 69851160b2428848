"""Sparse against dense FFNs on one NVIDIA GPU, alone and in a decoding model: `python benchmarks/inference.py --help`.

The dense model is compiled by torch.compile; both run as CUDA graphs. Weights, codebook and predictor are random with
real sizes, because speed doesn't depend on their values. All times include predicting the cluster, unless the row says
that the mask is known. The results of sparse FFNs are compared with a masked dense FFN before they are timed.
Shape letters: see `apc.ops`.
"""

import argparse
import importlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
from common import Row, add_csv_option, append, comma_list, commit, markdown, row, time_cuda
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.ops import packed_gpu, sparse_ffn_sm90
from apc.ops.packed import PackedRows, pack_rows
from apc.predict.predictor import Predictor, PredictorHeader
from apc.sparse.decode import GreedyDecoder
from apc.sparse.packed_weights import GROUP
from apc.sparse.sparsify import handle_of, restore, sparsify
from apc.utils.errors import first_line

DEVICE = torch.device("cuda", 0)
COPIED = 2**31  # bytes
REPEATS = 30
COMPILED, TUNED, OWN = "dense, torch.compile", "dense, torch.compile max-autotune", "dense, apc"
TORCH_4_BITS, OWN_4_BITS = "dense, 4 bits, torch (tinygemm)", "dense, 4 bits, apc"
COARSE = 128  # weights that share levels, in torch's fastest format
MODE = "max-autotune-no-cudagraphs"  # of torch.compile; the benchmark makes its own graph of all calls
MODES = {  # label, mode of torch.compile, whether its kernels launch early, whether our kernels run one sequence, bits
    "default": (COMPILED, "default", False, False, None),
    "tuned": (f"{TUNED}, early launches", MODE, True, False, None),
    "own": (OWN, MODE, True, True, None),
    "packed": (f"{OWN}, 4 bits", MODE, True, True, 4),
}
COPY_BITS, COPY_INPUTS = 4, 0.375  # of the copy that nominates neurons for stages
STEP = 0.15  # between the shares of rows of gate, up and down that stages read
PREFILLS = (64, 512, 2048)  # tokens of calls that run dense
KERNELS, staged = (importlib.import_module(f"apc.ops.{name}") for name in ("sparse_ffn", "staged_ffn"))


@dataclass(frozen=True)
class Shape:
    """The shape of a model's FFNs and of their predictors."""

    E: int
    D: int
    H: int
    K: int
    layers: int  # take turns, so that their weights don't fit into the cache

    @property
    def dense_bytes(self) -> int:
        """Bytes of an FFN's weights."""
        return 3 * self.E * self.D * 2

    @property
    def predictor_bytes(self) -> int:
        """Bytes of a layer's cluster predictor."""
        return 2 * (self.E * self.H + self.H * self.K) + 4 * (self.H + self.K)

    @property
    def ahead_bytes(self) -> int:
        """The same where a step at 4 bits predicts a later layer's cluster: the bottleneck's rows take 8 bits."""
        return self.predictor_bytes - self.E * self.H + 4 * self.H

    @property
    def copy_bytes(self) -> int:
        """Bytes of a layer's one-bit gate and up, score curve and correction: 5.0 % of the FFN at Mistral's shape."""
        return 2 * self.D * ops.row_bytes(self.E) + 4 * (3 * 2 + 1) * self.D + 2 * 2 * self.rank * self.E

    @property
    def spaced_bytes(self) -> int:
        """Bytes of a layer's 4-bit gate and up at `COPY_INPUTS`, and of norms."""
        levels = COPY_BITS * ops.row_bytes(self.D) + 2 * math.ceil(self.D / ops.GROUP)
        return int(2 * self.E * COPY_INPUTS * levels) + 4 * (self.E + self.D)

    @property
    def rank(self) -> int:
        """Rank of the low-bit copy's correction."""
        return max(8, self.H // 4)


MISTRAL = Shape(4096, 14_336, 512, 2048, 8)
QUICK = Shape(256, 640, 32, 64, 2)


class Wrong(Exception):
    """A result differs from the masked FFN's."""


def main() -> None:
    parts = {"ffn": ffn, "packed": packed, "tiles": tiles, "decode": decode}
    lists = {  # option: (type, default, metavar, help)
        "--only": (str, ["ffn", "decode"], "PART", f"parts: {', '.join(parts)}; default: ffn,decode"),
        "--densities": (float, [0.3, 0.4, 0.5, 0.7, 1.0], "DENSITY", "shares of neurons that masks keep"),
        "--batches": (int, [1, 2, 4, 8, 16], "N", "tokens of a call"),
        "--predictors": (str, [*PREDICTORS], "NAME", f"part `decode`: {', '.join(PREDICTORS)}"),
        "--modes": (str, [*MODES], "MODE", f"part `decode`, dense model: {', '.join(MODES)}"),
    }
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--quick", action="store_true", help="check that everything runs, at tiny sizes")
    for option, (kind, default, metavar, words) in lists.items():
        parser.add_argument(option, type=comma_list(kind), default=default, metavar=f"{metavar},…", help=words)
    add_csv_option(parser)
    options = parser.parse_args()
    for name, known in (("only", parts), ("modes", MODES), ("predictors", PREDICTORS)):
        if unknown := sorted(set(getattr(options, name)) - set(known)):
            parser.error(f"--{name} takes {', '.join(known)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print("benchmarks/inference.py: needs an NVIDIA GPU; torch sees none", file=sys.stderr)
        sys.exit(2)
    try:
        append([], options.csv)  # fails now if the file can't be written
    except (OSError, ValueError) as error:
        parser.error(str(error))
    torch.manual_seed(0)
    name, start = torch.cuda.get_device_name(DEVICE), time.perf_counter()
    source, target = (torch.empty(COPIED, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    copy = 2 * COPIED / statistics.median(time_cuda([partial(target.copy_, source)], repeats=10))
    del source, target
    print(f"# {name}, torch {torch.__version__}, commit {commit()}; device copy {copy / 1e12:.2f}e12 bytes/s\n")
    try:
        for part in options.only:
            rows = []
            for result in parts[part](QUICK if options.quick else MISTRAL, options, name, copy):
                append([result], options.csv)  # at once, so that a later failure doesn't lose it
                rows.append(result)
            print(f"\n## {part}\n\n{markdown(rows)}\n", flush=True)
    except Wrong as error:
        sys.exit(f"benchmarks/inference.py: WRONG RESULT: {error}")
    print(f"{time.perf_counter() - start:.0f} s")


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All calls in sequence, as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with ops.use_side_stream():
        with torch.cuda.stream(stream):
            for _ in range(2):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    return graph


def timed(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds per call: REPEATS values, each a mean over all calls of a graph."""
    graph = graph_of(calls)
    return [seconds / len(calls) for seconds in time_cuda([graph.replay], repeats=REPEATS, calls=5)]


@dataclass
class Layer:
    """Weights of one FFN with down transposed, its masks, predictor, correction and low-bit copy."""

    weights: ops.FFNWeights
    masks: Tensor
    predictor: ops.PredictorWeights
    correction: tuple[Tensor, Tensor]  # matrix from the bottleneck to the output, and bias
    offsets: Tensor  # output offset of each cluster
    copy: tuple[Tensor, ops.ScoreCurve, Tensor]  # bits of gate and up, the curve of their scores, and the threshold
    rank: int  # of the copy's correction, which uses the first rows of the predictor's bottleneck
    nominations: Tensor  # masks of the clusters for stages
    refinement: ops.Refinement
    stages: ops.Stages  # of a 4-bit copy that is read at some inputs

    @classmethod
    def draw(cls, shape: Shape, density: float) -> "Layer":
        """A layer of random values, whose masks and scores keep this share of the neurons.

        The shares of the rows of gate, up and down that its stages read are `STEP` apart, with this mean.
        """
        draw = lambda *size: (torch.randn(*size, device=DEVICE) * size[-1] ** -0.5).bfloat16()
        weights = ops.FFNWeights(*(draw(shape.D, shape.E) for _ in range(3)))
        biases = [torch.randn(count, device=DEVICE) * 0.01 for count in (shape.H, shape.K)]
        predictor = ops.PredictorWeights(draw(shape.H, shape.E), biases[0], draw(shape.K, shape.H), biases[1])
        bits = torch.randint(0, 256, (1, 2, shape.D, ops.row_bytes(shape.E)), dtype=torch.uint8, device=DEVICE)
        # With this scale, inputs of order 1 have scores of order 1.
        curve = [torch.full((2, shape.D), value, device=DEVICE) for value in (2 * shape.E**-0.5, 1.0, 0.0)]
        copy = (bits, ops.ScoreCurve(*curve, torch.zeros(shape.D, device=DEVICE)))
        scores = ops.low_bit_scores(torch.randn(64, shape.E, device=DEVICE), *copy, by_triton=False)
        threshold = torch.full((), -1e9, device=DEVICE)
        if density < 1:
            threshold = scores.flatten()[: 1 << 20].quantile(1 - density)
        correction = draw(shape.H, shape.E), torch.randn(shape.E, device=DEVICE)
        masks, nominations = (draw_masks(shape.K, shape.D, share) for share in (density, min(1.0, density + STEP)))
        norms = weights.down.float().norm(dim=1)
        x = torch.randn(256, shape.E, device=DEVICE).bfloat16()
        gates = F.silu(x @ weights.gate.T).float().abs() * norms
        products = gates * (x @ weights.up.T).float().abs()
        least = -torch.inf * torch.ones(2, device=DEVICE)
        if density < 1:  # the shares that the later stages leave of what comes to them
            least[0] = gates.flatten()[: 1 << 20].quantile(1 - density / (density + STEP))
            least[1] = products[gates >= least[0]][: 1 << 20].quantile(1 - (density - STEP) / density)
        refinement = ops.Refinement(2 * least.log(), norms)
        offsets, copied = draw(shape.K, shape.E), (*copy, threshold)
        return cls(
            *(weights, masks, predictor, correction, offsets, copied, shape.rank, nominations, refinement),
            draw_stages(weights, norms, density),
        )

    def sparse(self, x: Tensor, how: str = "predictor") -> Tensor:
        """The FFN's output by the sparse kernels.

        how: where masks come from. known: given; copy: scores of the low-bit copy; predictor, corrected: the mask of
        the predicted cluster, without or with a correction. stages: with known nominations; predicted stages: with
        those of the predicted cluster.
        """
        if how == "known":
            return ops.sparse_ffn(x, self.weights, ops.ActiveNeurons(self.masks[: len(x)]))
        if how == "copied stages":
            return ops.staged_ffn_triton(x, self.weights, self.stages)
        if how == "stages":
            active = ops.ActiveNeurons(self.nominations[: len(x)])
            return ops.sparse_ffn(x, self.weights, active, refinement=self.refinement)
        if how == "copy":
            inner = ops.bottleneck(x, *(value[: self.rank] for value in self.predictor[:2]))
            masks = ops.low_bit_scores(x, *self.copy)
            delta = ops.OutputDelta(inner, self.correction[0][: self.rank], self.correction[1])
            return ops.sparse_ffn(x, self.weights, ops.ActiveNeurons(masks), delta)
        prediction = ops.predict_clusters(x, self.predictor)
        if how == "predicted stages":
            active = ops.ActiveNeurons(self.nominations, prediction.candidates)
            return ops.sparse_ffn(x, self.weights, active, refinement=self.refinement)
        active = ops.ActiveNeurons(self.masks, prediction.candidates)
        return ops.sparse_ffn(x, self.weights, active, self._delta(prediction, how))

    def _delta(self, prediction: ops.Prediction, how: str) -> ops.OutputDelta:
        if how != "corrected":
            return ops.OutputDelta()
        return ops.OutputDelta(prediction.bottleneck, *self.correction, self.offsets)

    def ahead(
        self, x: Tensor, prediction: ops.Prediction, later: "Layer", how: str, listed: Tensor | None, finds: bool
    ) -> tuple[Tensor, ops.Prediction, Tensor | None]:
        """As `sparse`, with a prediction and a list of active neurons (`listed`) that an earlier layer made.

        Also returns, for a later layer, the prediction from x and, if it `finds`, the list of active neurons.
        """
        next_layer = None
        if finds and ops.can_prefetch(later.weights):
            next_layer = ops.NextLayer(len(later.weights.gate), later.masks)
        active = ops.ActiveNeurons(self.masks, prediction.candidates, listed)
        delta = self._delta(prediction, how)
        return ops.sparse_ffn_ahead(x, self.weights, active, later.predictor, delta, next_layer)

    def masked(self, x: Tensor, how: str) -> tuple[Tensor, float]:
        """The output of `sparse` from a masked dense FFN in float32, and the share of the weights that it reads."""
        if how == "copied stages":
            return ops.staged_ffn(x, self.weights, self.stages).float(), ops.staged_reads(x, self.weights, self.stages)
        inner, (values, ids) = ops.predict_clusters(x, self.predictor)
        clusters = ids.gather(1, values.argmax(1, keepdim=True)).squeeze(1).long()
        masks = self.nominations if "stages" in how else self.masks
        packed = masks[: len(x)] if how in ("known", "stages") else masks[clusters]
        if how == "copy":
            packed = ops.low_bit_scores(x, *self.copy)
        gate, up, down = (matrix.float() for matrix in self.weights[:3])
        kept = ops.unpack(packed, len(gate))
        gates, read = F.silu(x.float() @ gate.T), [kept, kept, kept]
        hidden = gates * (x.float() @ up.T)
        if "stages" in how:
            least, norms, _ = self.refinement
            for stage, value in enumerate((gates, hidden)):
                kept = kept & (value.abs() * norms >= (least[stage] / 2).exp())
                read[stage + 1] = kept
        output = (hidden.bfloat16().float() * kept) @ down
        if how in ("copy", "corrected"):
            rank = self.rank if how == "copy" else len(self.correction[0])
            output += inner[:, :rank] @ self.correction[0][:rank].float() + self.correction[1]
        if how == "corrected":
            output += self.offsets[clusters].float()
        return output, float(torch.stack(read).any(1).float().mean())


def draw_stages(weights: ops.FFNWeights, norms: Tensor, density: float) -> ops.Stages:
    """Stages with a random 4-bit copy, read at `COPY_INPUTS`, whose shares of rows have this mean, `STEP` apart."""
    D, E = weights.gate.shape
    planes = torch.randint(0, 256, (COPY_BITS, 2, E, ops.row_bytes(D)), dtype=torch.uint8, device=DEVICE)
    spacings = torch.full((2, E, math.ceil(D / ops.GROUP)), 0.2 * E**-0.5, device=DEVICE).bfloat16()
    x = torch.randn(32, E, device=DEVICE).bfloat16()
    least = x.float().abs().flatten()[: 1 << 20].quantile(1 - COPY_INPUTS)
    copy = ops.SpacedCopy(planes, spacings, torch.ones(E, device=DEVICE), least)
    stages = ops.Stages(copy, torch.full((3,), -math.inf, device=DEVICE), norms)
    if density + STEP > 1:
        return stages
    scores, of_up = staged._scores(x.float(), stages, weights)
    gates = F.silu(x @ weights.gate.T).float()
    values = scores, staged.log_energy(gates.abs() * norms) + of_up
    values = *values, staged.log_energy((gates * (x @ weights.up.T).float()).abs() * norms)
    kept, left = torch.ones_like(scores, dtype=torch.bool), 1.0
    for stage, (share, value) in enumerate(zip((density + STEP, density, density - STEP), values, strict=True)):
        stages.thresholds[stage] = value[kept][: 1 << 20].quantile(1 - share / left)
        kept, left = kept & (value >= stages.thresholds[stage]), share
    return stages


def draw_masks(K: int, D: int, density: float) -> Tensor:
    """Random masks, uint8 [K, W]; each keeps this share of the neurons."""
    return ops.binarize(torch.randint(2**40, (K, D), device=DEVICE), density)


def dense_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The dense FFN with down transposed, as the kernels need it, [D, E]."""
    return (F.silu(F.linear(x, gate)) * F.linear(x, up)) @ down


def plain_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The dense FFN with down as a model stores it, [E, D]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


class Ahead:
    """A sequence of FFNs on one input; each predicts the cluster of the FFN two places later, while the next one runs.

    In a model, it predicts the next layer's cluster, while attention runs. finds: each also lists the active neurons of
    the FFN two places later.
    """

    def __init__(self, layers: list[Layer], x: Tensor, how: str, finds: bool):
        self.layers, self.x, self.how, self.finds = layers, x, how, finds
        self.predicted = [ops.predict_clusters(x, layer.predictor) for layer in layers[:2]] + [None] * len(layers)
        self.listed: list[Tensor | None] = [None] * (len(layers) + 2)
        self.calls = [partial(self.call, index) for index in range(len(layers))]

    def call(self, index: int) -> Tensor:
        """The output of one FFN."""
        later = self.layers[(index + 2) % len(self.layers)]
        finds = self.finds and index + 2 < len(self.layers)
        output, self.predicted[index + 2], self.listed[index + 2] = self.layers[index].ahead(
            self.x, self.predicted[index], later, self.how, self.listed[index], finds
        )
        return output


def ffn(shape: Shape, options: argparse.Namespace, name: str, copy: float) -> Iterator[Row]:
    """Rows for dense FFNs, and for sparse ones at each density and number of tokens. copy: bytes/s of a device copy."""
    dense, x = {}, {n: torch.randn(n, shape.E, device=DEVICE).bfloat16() for n in options.batches}
    for density in options.densities:
        layers = [Layer.draw(shape, density) for _ in range(shape.layers)]
        if density == options.densities[0]:
            for result in dense_rows(layers, shape, x, name, copy):
                if result.implementation in (COMPILED, TUNED):
                    dense[result.N] = min(dense.get(result.N, math.inf), result.seconds_median)
                yield result
        for n in [n for n in options.batches if n <= ops.MAX_TOKENS]:
            facts = dict(ok=True, ceiling=copy, share_of="copy")
            corrected = shape.predictor_bytes + 2 * shape.E * (shape.H + n) + 4 * shape.E
            ways = {  # label: (source of masks, bytes read beside the FFN's weights)
                "apc, predictor inside": ("predictor", shape.predictor_bytes),
                "apc, and its correction and offset": ("corrected", corrected),
                "apc, predicted a layer ahead": ("predictor", shape.predictor_bytes),
                "apc, predicted and found a layer ahead": ("predictor", shape.predictor_bytes),
                "apc, found a layer ahead, and its correction and offset": ("corrected", corrected),
                "apc, low-bit copy inside": ("copy", shape.copy_bytes),
                "apc, mask known": ("known", 0),
                "apc, stages, predictor inside": ("predicted stages", shape.predictor_bytes),
                "apc, stages, nominations known": ("stages", 0),
                "apc, stages of a 4-bit copy": ("copied stages", shape.spaced_bytes),
            }
            if density + STEP > 1:
                ways = {label: way for label, way in ways.items() if "stages" not in label}
            for label, (how, extra) in ways.items():
                calls = [partial(layer.sparse, x[n], how) for layer in layers]
                if "ahead" in label:
                    calls = Ahead(layers, x[n], how, "found" in label).calls
                output, (expected, share) = [call() for call in calls][-1].float(), layers[-1].masked(x[n], how)
                if not (output - expected).norm() < 1e-2 * expected.norm():
                    error = float((output - expected).norm() / expected.norm())
                    raise Wrong(f"{label}, density {density}, {n} tokens: relative error {error:.2g} of the output")
                moved = int(shape.dense_bytes * share) + extra
                size, facts["note"] = (1, n, shape.K, shape.D), f"{n} tokens; {100 * share:.1f} % of the weights"
                result = row(f"FFN, density {density:g}", label, size, timed(calls), name, moved=moved, **facts)
                print(
                    f"density {density:g}, {n} tokens, {label}: {1e6 * result.seconds_median:.1f} µs for "
                    f"{100 * share:.1f} % of the weights, {100 * result.share:.0f} % of copy, "
                    f"dense / sparse {dense[n] / result.seconds_median:.2f}",
                    flush=True,
                )
                yield result


def dense_rows(layers: list[Layer], shape: Shape, x: dict[int, Tensor], name: str, copy: float) -> Iterator[Row]:
    """Rows for torch.compile's FFN, with down as a model stores it and with down transposed."""
    stored = [layer.weights.down.T.contiguous() for layer in layers]
    for n, given in (x | {n: torch.randn(n, shape.E, device=DEVICE).bfloat16() for n in PREFILLS}).items():
        facts = dict(ok=True, moved=shape.dense_bytes, ceiling=copy, share_of="copy", note=f"{n} tokens")
        ways = {COMPILED: (plain_ffn, {}), "dense, down transposed": (dense_ffn, {})}
        if n <= ops.MAX_TOKENS:
            ways[TUNED] = plain_ffn, {"mode": MODE}
        for label, (function, how) in ways.items():
            compiled = torch.compile(function, dynamic=False, **how)
            downs = stored if function is plain_ffn else [layer.weights.down for layer in layers]
            calls = [
                partial(compiled, given, *layer.weights[:2], down) for layer, down in zip(layers, downs, strict=True)
            ]
            result = row("FFN, dense", label, (1, n, 0, shape.D), timed(calls), name, **facts)
            print(
                f"{label}, {n} tokens: {1e6 * result.seconds_median:.1f} µs, {100 * result.share:.0f} % of copy",
                flush=True,
            )
            yield result


def packed_bytes(shape: Shape) -> int:
    """Bytes of an FFN at 4 bits."""
    return 3 * shape.D * 16 * math.ceil((shape.E / 2 + 2 * shape.E / GROUP + 8) / 16)


def packed(shape: Shape, options: argparse.Namespace, name: str, copy: float) -> Iterator[Row]:
    """Rows for one token's FFN at 4 bits, in groups of `GROUP`: torch's dense one, and ours dense and sparse."""
    x = torch.randn(1, shape.E, device=DEVICE).bfloat16()
    hidden, facts = F.rms_norm(x, x.shape[1:]), dict(ok=True, ceiling=copy, share_of="copy")
    stored = [[draw_packed(shape.D, shape.E) for _ in range(3)] for _ in range(shape.layers)]
    best = {}

    def measured(operation: str, label: str, calls: list[Callable[[], object]], moved: float) -> Row:
        result = row(operation, label, (1, 1, shape.K, shape.D), timed(calls), name, moved=int(moved), **facts)
        best[label] = result.seconds_median
        ratios = ", ".join(f"{best[each] / best[label]:.2f} × as fast as {each}" for each in (TORCH_4_BITS, OWN_4_BITS))
        print(
            f"{operation}, {label}: {1e6 * best[label]:.1f} µs, {100 * result.share:.0f} % of copy; {ratios}",
            flush=True,
        )
        return result

    ffns = [packed_gpu.PackedFFN(*matrices, "silu") for matrices in stored]
    every = [packed_gpu.PackedFFNCall(packed_gpu.PackedClusterFFN(each), torch.bfloat16) for each in ffns]
    best[TORCH_4_BITS] = best[OWN_4_BITS] = math.nan
    for group in (GROUP, COARSE):
        label = TORCH_4_BITS if group == GROUP else f"{TORCH_4_BITS}, groups of {COARSE}"
        moved = 3 * shape.D * shape.E * (0.5 + 4 / group)  # torch's levels take 32 bits a group
        yield measured("FFN, 4 bits, dense", label, torch_packed(shape, x, group), moved)
    check_packed_ffn(every[0](hidden)[0], ffns[0], hidden, torch.ones(shape.D, device=DEVICE))
    yield measured("FFN, 4 bits, dense", OWN_4_BITS, [partial(call, hidden) for call in every], packed_bytes(shape))
    for density in options.densities:
        calls, known = [], []
        for each in ffns:
            draw = lambda *size: (torch.randn(*size, device=DEVICE) * size[-1] ** -0.5).bfloat16()
            biases = [torch.zeros(count, device=DEVICE) for count in (shape.H, shape.K)]
            predictor = ops.PredictorWeights(draw(shape.H, shape.E), biases[0], draw(shape.K, shape.H), biases[1])
            ffn = packed_gpu.PackedClusterFFN(each, predictor, draw_masks(shape.K, shape.D, density))
            calls.append(packed_gpu.PackedFFNCall(ffn, torch.bfloat16))
            known.append(calls[-1].predict(hidden))

        def inside(index: int) -> Tensor:
            return calls[index](hidden, None, calls[index].predict(hidden))[0]  # noqa: B023

        def ahead(index: int) -> Tensor:
            place = (index + 1) % shape.layers
            output, known[place] = calls[index](hidden, None, known[index], calls[place])  # noqa: B023
            return output

        logits, clusters = known[0].candidates
        mask = ops.unpack(calls[0].masks[clusters[0, logits[0].argmax()]].view(torch.uint8), shape.D)
        check_packed_ffn(inside(0), ffns[0], hidden, mask.float())
        kept = packed_bytes(shape) * ops.mask_size(shape.D, density) / shape.D
        ways = (
            ("apc, predictor inside", inside, shape.predictor_bytes),
            ("apc, predicted a layer ahead", ahead, shape.ahead_bytes),
        )
        for label, call, extra in ways:
            todo = [partial(call, index) for index in range(shape.layers)]
            yield measured(f"FFN, 4 bits, density {density:g}", label, todo, kept + extra)


def draw_packed(R: int, E: int) -> PackedRows:
    """A random matrix at 4 bits with variance 1 / E."""
    random = lambda low, high, *size: torch.randint(low, high, size, device=DEVICE)
    units = torch.tensor([[E**-0.5 / 4.6 / 160, 7.5 * E**-0.5 / 4.6 / 100]], device=DEVICE).expand(R, 2)
    step, low = random(130, 190, R, E // GROUP).to(torch.uint8), -random(80, 120, R, E // GROUP).to(torch.int8)
    return pack_rows(random(0, 16, R, E), step, low, units)


def check_packed_ffn(output: Tensor, ffn: packed_gpu.PackedFFN, hidden: Tensor, kept: Tensor) -> None:
    """Raises Wrong unless an FFN's output is that of the formula in float32. kept: float32 [D]."""
    gate, up, down = (matrix.unpacked() for matrix in ffn[:3])
    x = hidden.float()
    expected = (F.silu(x @ gate.T) * (x @ up.T) * kept) @ down
    error = ((output.float() - expected).norm() / expected.norm()).item()
    if not error < 1e-2:
        raise Wrong(f"an FFN at 4 bits: relative error {error:.2g} of the output")


def torch_packed(shape: Shape, x: Tensor, group: int) -> list[Callable[[], Tensor]]:
    """torch's dense FFNs at 4 bits, with gate and up in one product."""
    multiply = torch.ops.aten._weight_int4pack_mm

    def draw(R: int, E: int) -> tuple[Tensor, Tensor]:
        weights = torch.randint(0, 256, (R, E // 2), dtype=torch.uint8, device=DEVICE)
        levels = (torch.randn(E // group, R, 2, device=DEVICE) * 0.01).bfloat16()
        return torch.ops.aten._convert_weight_to_int4pack(weights, 8), levels

    inner = torch.compile(lambda both: F.silu(both[:, : shape.D]) * both[:, shape.D :], dynamic=False)

    def call(first: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]) -> Tensor:
        both = multiply(x, first[0], group, first[1])
        return multiply(inner(both), down[0], group, down[1])

    return [partial(call, draw(2 * shape.D, shape.E), draw(shape.E, shape.D)) for _ in range(shape.layers)]


def tiles(shape: Shape, options: argparse.Namespace, name: str, copy: float) -> list[Row]:
    """Rows for other tiles of the kernels, for one token at the first density.

    The constants of `sparse_ffn.py` and `sparse_ffn_sm90.py` were chosen by these.
    """
    density, x = options.densities[0], torch.randn(1, shape.E, device=DEVICE).bfloat16()
    layers = [Layer.draw(shape, density) for _ in range(shape.layers)]
    moved = int(shape.dense_bytes * ops.mask_size(shape.D, density) / shape.D)
    arguments = [(x, layer.weights, ops.ActiveNeurons(layer.masks[:1])) for layer in layers]
    ways = [
        ("Triton", ops.sparse_ffn_triton, KERNELS._ROWS_TILE, dict(ROWS=count, STAGES=stages, num_warps=warps))
        for count, stages, warps in itertools.product((1, 2, 4), (2, 3, 4), (4, 8))
    ]
    if ops.can_prefetch(layers[0].weights):
        ways += [
            ("Hopper", ops.sparse_ffn_hopper, sparse_ffn_sm90._TILE, dict(ROWS=count, STAGES=stages))
            for count, stages in itertools.product((1, 2, 4), (2, 4, 8))
        ]
    facts = {"moved": moved, "ok": False, "ceiling": copy, "share_of": "copy"}
    operation, size, rows = f"FFN tiles, density {density:g}", (1, 1, shape.K, shape.D), []
    for label, function, constants, values in ways:
        before = dict(constants)
        constants.update(values)
        sparse_ffn_sm90._prepare.cache_clear()
        note = f"{label}: " + ", ".join(f"{key} {value}" for key, value in values.items())
        try:
            seconds = timed([partial(function, *given) for given in arguments])
        except (RuntimeError, triton.runtime.errors.OutOfResources) as error:  # this tile needs too much memory
            print(f"{note}: {first_line(error)[:100]}", flush=True)
            continue
        finally:
            constants.update(before)
            sparse_ffn_sm90._prepare.cache_clear()
        rows.append(row(operation, "apc, mask known", size, seconds, name, note=note, **facts))
        print(f"{note}: {1e6 * rows[-1].seconds_median:.1f} µs, {100 * rows[-1].share:.0f} % of copy", flush=True)
    return sorted(rows, key=lambda result: result.seconds_median)[:8]


def decode(shape: Shape, options: argparse.Namespace, name: str, copy: float) -> Iterator[Row]:
    """Rows for a decoding step of a model with random weights and Mistral-7B's shape, after a prompt of 512 tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    quick = shape is QUICK
    layers, prompt = (2, 16) if quick else (32, 512)
    config = AutoConfig.for_model(
        "mistral",
        hidden_size=shape.E,
        intermediate_size=shape.D,
        num_hidden_layers=layers,
        num_attention_heads=shape.E // 128,
        head_dim=128,
        num_key_value_heads=max(1, shape.E // 512),
        vocab_size=32_000,
        max_position_embeddings=4096,
        sliding_window=None,
    )
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    tokens = {n: torch.randint(32_000, (n, prompt), device=DEVICE) for n in options.batches}
    parameters = sum(value.nbytes for value in model.parameters()) - model.get_input_embeddings().weight.nbytes
    dense = {}
    ffns = layers * shape.dense_bytes
    inner = parameters - ffns - model.lm_head.weight.nbytes  # of attention, and norms

    def moved_by(ffn_bytes: float, bits: int | None) -> int:
        """Bytes that a step reads, of which so many are the FFNs' at 16 bits."""
        share = 1.0 if bits is None else packed_bytes(shape) / shape.dense_bytes
        return int(parameters - ffns - inner + share * (inner + ffn_bytes))

    def measure(
        operation: str,
        label: str,
        n: int,
        moved: int,
        mode: str = MODE,
        early: bool = True,
        own: bool = True,
        bits: int | None = None,
    ) -> Row:
        torch.compiler.reset()  # after eight compiled versions of a function, torch would run it uncompiled
        decoder = GreedyDecoder(model, n, 2 * prompt, mode, early, bits, own)
        decoder.record(tokens[n])
        decoder.prefill(tokens[n])
        steps = min(prompt // 2, 64)
        seconds = time_cuda([decoder.step], repeats=steps, warmup=4)
        checked = own and decoder.reason is None  # our steps are compared with the model's prefill
        facts = {"moved": moved, "ok": checked, "ceiling": copy, "share_of": "copy"}
        facts["note"] = f"{n} sequences, after {prompt} tokens"
        result = row(operation, label, (layers, n, shape.K, shape.D), seconds, name, **facts)
        step = result.seconds_median
        if "dense" in operation:
            dense[n, bits] = min(dense.get((n, bits), step), step)
        what = f"{operation}, {label}, {n} sequences"
        ratio = dense.get((n, bits), math.nan) / step
        print(f"{what}: {1e3 * step:.3f} ms a step, {n / step:.0f} tokens/s, dense / this {ratio:.3f}", flush=True)
        return result

    for n in options.batches:
        for label, mode, early, own, bits in (MODES[each] for each in options.modes):
            if n == 1 or not own or (bits is None and n <= ops.MAX_TOKENS):
                moved = moved_by(ffns, bits)
                yield measure("decode, dense", label.removeprefix("dense, "), n, moved, mode, early, own, bits)
    for density in options.densities:
        codebook = random_codebook(shape, layers, density)
        for way in options.predictors:
            predictor, policy, extra = PREDICTORS[way](shape, layers, density)
            before = torch.cuda.memory_allocated()
            most = handle_of(sparsify(model, codebook, predictor, policy, kernel="auto")).max_sparse_tokens
            extra_memory = torch.cuda.memory_allocated() - before
            print(
                f"density {density:g}, {way}: {extra_memory / 1e6:.0f} MB beside the model, "
                f"{100 * extra_memory / ffns:.2f} % of its FFNs; up to {most} tokens run sparse",
                flush=True,
            )
            operation = f"decode, density {density:g}"
            for n in options.batches if set(options.modes) - {"packed"} else ():
                sparse, union = n <= most, 1 - (1 - density) ** n  # neurons that any of n random masks keeps
                moved = moved_by(ffns * union, None) + layers * extra if sparse else parameters
                yield measure(operation, f"apc, {way}: {'sparse' if sparse else 'dense'}", n, moved)
            if "packed" in options.modes and policy == "predicted" and most:
                moved = moved_by(ffns * density, 4) + layers * (shape.ahead_bytes if predictor.lookahead else extra)
                yield measure(operation, f"apc, 4 bits, {way}: sparse", 1, moved, bits=4)
            restore(model)


def random_codebook(shape: Shape, layers: int, density: float) -> Codebook:
    """A codebook of random masks."""
    masks = torch.stack([draw_masks(shape.K, shape.D, density).cpu() for _ in range(layers)])
    profiles = torch.ones((), dtype=torch.float16).expand(layers, shape.K, shape.D)
    book = SiteCodebook(
        masks, profiles, torch.ones(layers, shape.K, dtype=torch.int64), masks[:, 0].clone(), torch.zeros(layers)
    )
    return Codebook(
        {"neuron": book}, {"neuron": shape.D}, layers, shape.E, shape.D, "layer", "energy", density, "top", 0.5
    )


def random_clusters(shape: Shape, layers: int, density: float, lookahead: int) -> tuple[Predictor, str, int]:
    """A predictor of clusters, its policy, and the bytes of a layer that it reads for one token."""
    predictor = Predictor(PredictorHeader(layers, shape.E, shape.H, {"neuron": shape.K}, lookahead=lookahead))
    return predictor.requires_grad_(False).eval().rounded(), "predicted", shape.predictor_bytes


def random_low_bit(shape: Shape, layers: int, density: float) -> tuple[Predictor, str, int]:
    """The same for a low-bit copy with a correction.

    Its scores are sums of two normal numbers, so the threshold follows from the density.
    """
    sizes = (layers, shape.E, shape.rank, {"neuron": shape.D})
    header = PredictorHeader(*sizes, "low-bit", corrects=True, frozen=True, with_thresholds=True)
    predictor = Predictor(header)
    copy = predictor.requires_grad_(False).eval().low_bit
    copy.planes.random_(0, 256)
    for value, number in ((copy.scale, 2 * shape.E**-0.5), (copy.slope, 1.0), (copy.power, 0.0)):
        value.fill_(number)
    predictor.thresholds.fill_(statistics.NormalDist(0, 2**0.5).inv_cdf(1 - density) if density < 1 else -math.inf)
    return predictor.rounded(), "neuron-threshold", shape.copy_bytes


PREDICTORS = {
    "lookahead 1": partial(random_clusters, lookahead=1),
    "lookahead 0": partial(random_clusters, lookahead=0),
    "low-bit copy": random_low_bit,
}


if __name__ == "__main__":
    main()
