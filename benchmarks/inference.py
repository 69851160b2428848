"""Sparse FFNs against dense ones on one NVIDIA GPU, alone and in a whole model that decodes: `python benchmarks/inference.py --help`.

Dense is the same model as torch.compile makes it; both run as CUDA graphs. Weights, codebook and predictor are random, of real sizes: speed does not
depend on their values. Predicting the cluster is inside every time. Results are compared with the masked dense FFN before they are timed.
Shape letters: see `apc/ops/sparse_ffn.py`.
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
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from common import RESULTS, Row, append, commit, markdown, row, time_cuda
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.ops import sparse_ffn_sm90
from apc.predict.predictor import Predictor
from apc.sparse.decode import GreedyDecoder
from apc.sparse.sparsify import handle_of, restore, sparsify

DEVICE = torch.device("cuda", 0)
COPIED = 2**31  # bytes
REPEATS = 30
COMPILED, TUNED = "dense, torch.compile", "dense, torch.compile max-autotune"
MODE = "max-autotune-no-cudagraphs"  # of torch.compile; the graphs are ours, of all calls together
MODES = {
    "default": (COMPILED, "default", False),
    "tuned": (f"{TUNED}, early launches", MODE, True),
}  # label, mode, early launches
PREFILLS = (64, 512, 2048)  # tokens at once, which run dense
KERNELS = importlib.import_module("apc.ops.sparse_ffn")


@dataclass(frozen=True)
class Shape:
    """Of a model's FFNs, and of what predicts their clusters."""

    E: int
    D: int
    H: int
    K: int
    layers: int  # whose weights take turns, so that no cache holds them

    @property
    def dense_bytes(self) -> int:
        return 3 * self.E * self.D * 2

    @property
    def predictor_bytes(self) -> int:
        return 2 * (self.E * self.H + self.H * self.K) + 4 * (self.H + self.K)

    @property
    def copy_bytes(self) -> int:
        """Of gate and up at one bit, with what makes scores of their products, and a correction: 5.0 % of the FFN at Mistral's shape."""
        return 2 * self.D * ops.row_bytes(self.E) + 4 * (3 * 2 + 1) * self.D + 2 * 2 * self.rank * self.E

    @property
    def rank(self) -> int:
        """Of the low-bit copy's correction."""
        return max(8, self.H // 4)


MISTRAL = Shape(4096, 14_336, 512, 2048, 8)
QUICK = Shape(256, 640, 32, 64, 2)


class Wrong(Exception):
    """A result that is not the masked FFN's."""


def main() -> None:
    parts = {"ffn": ffn, "tiles": tiles, "decode": decode}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=["ffn", "decode"],
        metavar="PART,…",
        help=f"of {', '.join(parts)}",
    )
    parser.add_argument(
        "--densities", type=lambda text: [float(value) for value in text.split(",")], default=[0.3, 0.4, 0.5, 0.7, 1.0]
    )
    parser.add_argument(
        "--batches", type=lambda text: [int(value) for value in text.split(",")], default=[1, 2, 4, 8, 16]
    )
    parser.add_argument(
        "--predictors",
        type=lambda text: text.split(","),
        default=[*PREDICTORS],
        metavar="WAY,…",
        help=f"of decode: {', '.join(PREDICTORS)}",
    )
    parser.add_argument(
        "--modes",
        type=lambda text: text.split(","),
        default=[*MODES],
        metavar="MODE,…",
        help=f"of decode's dense model: {', '.join(MODES)}",
    )
    parser.add_argument("--csv", type=Path, default=RESULTS, help="file that the rows are added to")
    options = parser.parse_args()
    for name, known in (("only", parts), ("modes", MODES), ("predictors", PREDICTORS)):
        if unknown := sorted(set(getattr(options, name)) - set(known)):
            parser.error(f"--{name} takes {', '.join(known)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print("benchmarks/inference.py needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        sys.exit(2)
    try:
        append([], options.csv)  # what cannot be added to is found out now
    except (OSError, ValueError) as error:
        parser.error(str(error))
    torch.manual_seed(0)
    name, start = torch.cuda.get_device_name(DEVICE), time.perf_counter()
    source, target = (torch.empty(COPIED, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    copy = 2 * COPIED / statistics.median(time_cuda([partial(target.copy_, source)], repeats=10))
    del source, target
    print(
        f"# {name}, torch {torch.__version__}, commit {commit()}; device copy {copy / 1e12:.2f}e12 bytes/s\n",
        flush=True,
    )
    try:
        for part in options.only:
            rows = []
            for found in parts[part](QUICK if options.quick else MISTRAL, options, name, copy):
                append([found], options.csv)  # at once: what was measured stays, whatever comes after it
                rows.append(found)
            print(f"\n## {part}\n\n{markdown(rows)}\n", flush=True)
    except Wrong as error:
        sys.exit(f"benchmarks/inference.py: WRONG RESULT: {error}")
    print(f"{time.perf_counter() - start:.0f} s")


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All calls, one after the other, as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with ops.whole_passes():
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
    """Seconds of one call, the mean over all of a graph's, several times."""
    graph = graph_of(calls)
    return [seconds / len(calls) for seconds in time_cuda([graph.replay], repeats=REPEATS, calls=5)]


# ---- the FFN alone


@dataclass
class Layer:
    """Weights of one FFN, down transposed, its clusters and their predictor."""

    gate: Tensor
    up: Tensor
    down: Tensor
    masks: Tensor
    predictor: tuple[Tensor, Tensor, Tensor, Tensor]
    correction: tuple[Tensor, Tensor]  # from the bottleneck to the output, and its bias
    offsets: Tensor  # of the clusters
    copy: tuple[Tensor, ...]  # bits of gate and up, scale, slope, power, bias and threshold of their scores
    rank: int  # of the correction that goes with them: the first rows of the predictor's

    @classmethod
    def draw(cls, shape: Shape, density: float) -> "Layer":
        draw = lambda *size: (torch.randn(*size, device=DEVICE) * size[-1] ** -0.5).bfloat16()
        weights = [draw(shape.D, shape.E) for _ in range(3)]
        biases = [torch.randn(count, device=DEVICE) * 0.01 for count in (shape.H, shape.K)]
        predictor = (draw(shape.H, shape.E), biases[0], draw(shape.K, shape.H), biases[1])
        bits = torch.randint(0, 256, (1, 2, shape.D, ops.row_bytes(shape.E)), dtype=torch.uint8, device=DEVICE)
        curve = [
            torch.full((2, shape.D), value, device=DEVICE) for value in (2 * shape.E**-0.5, 1.0, 0.0)
        ]  # scores of the order of 1 for inputs of that
        copy = (bits, *curve, torch.zeros(shape.D, device=DEVICE))
        scores = ops.low_bit_scores(torch.randn(64, shape.E, device=DEVICE), *copy, by_triton=False)
        threshold = (
            scores.flatten()[: 1 << 20].quantile(1 - density) if density < 1 else torch.full((), -1e9, device=DEVICE)
        )
        correction = draw(shape.H, shape.E), torch.randn(shape.E, device=DEVICE)
        masks = draw_masks(shape.K, shape.D, density)
        return cls(*weights, masks, predictor, correction, draw(shape.K, shape.E), (*copy, threshold), shape.rank)

    def sparse(self, x: Tensor, how: str = "predictor") -> Tensor:
        if how == "known":
            return ops.sparse_ffn(x, self.gate, self.up, self.down, self.masks[: len(x)])
        if how == "copy":
            inner, masks = (
                ops.bottleneck(x, *(value[: self.rank] for value in self.predictor[:2])),
                ops.low_bit_scores(x, *self.copy),
            )
            return ops.sparse_ffn(
                x,
                self.gate,
                self.up,
                self.down,
                masks,
                correction=(inner, self.correction[0][: self.rank], self.correction[1]),
            )
        inner, *candidates = ops.predict_clusters(x, *self.predictor)
        added = ((inner, *self.correction), self.offsets) if how == "corrected" else (None, None)
        return ops.sparse_ffn(x, self.gate, self.up, self.down, self.masks, "silu", tuple(candidates), *added)

    def ahead(
        self, x: Tensor, predicted: tuple[Tensor, Tensor, Tensor], later: "Layer", how: str, listed: Tensor | None, finds: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None]:  # fmt: skip
        """As `sparse`, of what was predicted and found before; what this layer's input predicts for a later one, and that one's neurons if they are wanted."""
        inner, *candidates = predicted
        added = ((inner, *self.correction), self.offsets) if how == "corrected" else (None, None)
        following = (
            ops.NextLayer(len(later.gate), later.masks)
            if finds and ops.can_find(later.gate, later.up, later.down)
            else None
        )
        return ops.sparse_ffn_ahead(
            x,
            self.gate,
            self.up,
            self.down,
            self.masks,
            "silu",
            tuple(candidates),
            later.predictor,
            *added,
            listed,
            following,
        )

    def masked(self, x: Tensor, how: str) -> tuple[Tensor, Tensor]:
        """The same in float32, by masks that multiply; and the masks, bool [n, D]."""
        inner, values, ids = ops.predict_clusters(x, *self.predictor)
        clusters = ids.gather(1, values.argmax(1, keepdim=True)).squeeze(1).long()
        packed = (
            self.masks[: len(x)]
            if how == "known"
            else ops.low_bit_scores(x, *self.copy)
            if how == "copy"
            else self.masks[clusters]
        )
        kept = ops.unpack(packed, len(self.gate))
        hidden = F.silu(x.float() @ self.gate.float().T) * (x.float() @ self.up.float().T)
        output = (hidden.bfloat16().float() * kept) @ self.down.float()
        if how in ("copy", "corrected"):
            rank = self.rank if how == "copy" else len(self.correction[0])
            output += inner[:, :rank] @ self.correction[0][:rank].float() + self.correction[1]
        return output + self.offsets[clusters].float() if how == "corrected" else output, kept


def draw_masks(K: int, D: int, density: float) -> Tensor:
    return ops.binarize(torch.randint(2**40, (K, D), device=DEVICE), density)


def dense_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(F.linear(x, gate)) * F.linear(x, up)) @ down


def plain_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down as a model stores it, [E, D]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


class Ahead:
    """FFNs of one input in a row, each of which predicts the cluster of the next but one and, if it `finds`, its neurons, beside the next one: in a model
    that is the next one's, beside an attention."""

    def __init__(self, layers: list[Layer], x: Tensor, how: str, finds: bool):
        self.layers, self.x, self.how, self.finds = layers, x, how, finds
        self.predicted = [ops.predict_clusters(x, *layer.predictor) for layer in layers[:2]] + [None] * len(layers)
        self.listed: list[Tensor | None] = [None] * (len(layers) + 2)
        self.calls = [partial(self.call, index) for index in range(len(layers))]

    def call(self, index: int) -> Tensor:
        later = self.layers[(index + 2) % len(self.layers)]
        output, self.predicted[index + 2], self.listed[index + 2] = self.layers[index].ahead(
            self.x,
            self.predicted[index],
            later,
            self.how,
            self.listed[index],
            self.finds and index + 2 < len(self.layers),
        )
        return output


def ffn(shape: Shape, options: argparse.Namespace, name: str, copy: float) -> Iterator[Row]:
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
            ways = {
                "apc, predictor inside": ("predictor", shape.predictor_bytes), "apc, and its correction and offset": ("corrected", corrected),
                "apc, predicted a layer ahead": ("predictor", shape.predictor_bytes),
                "apc, predicted and found a layer ahead": ("predictor", shape.predictor_bytes),
                "apc, found a layer ahead, and its correction and offset": ("corrected", corrected),
                "apc, low-bit copy inside": ("copy", shape.copy_bytes), "apc, mask known": ("known", 0),
            }  # fmt: skip
            for label, (how, extra) in ways.items():
                calls = (
                    Ahead(layers, x[n], how, "found" in label).calls
                    if "ahead" in label
                    else [partial(layer.sparse, x[n], how) for layer in layers]
                )
                found, (expected, masks) = [call() for call in calls][-1].float(), layers[-1].masked(x[n], how)
                if not (found - expected).norm() < 1e-2 * expected.norm():
                    error = float((found - expected).norm() / expected.norm())
                    raise Wrong(f"{label}, density {density}, {n} tokens: {error:.2g} of the output is another")
                moved = int(shape.dense_bytes * masks.any(0).float().mean())
                seconds = timed(calls)
                size = (1, n, shape.K, shape.D)
                result = row(
                    f"FFN, density {density:g}",
                    label,
                    size,
                    seconds,
                    name,
                    moved=moved + extra,
                    note=f"{n} tokens",
                    **facts,
                )
                print(f"density {density:g}, {n} tokens, {label}: {1e6 * result.seconds_median:.1f} µs, dense / sparse "
                      f"{dense[n] / result.seconds_median:.2f}", flush=True)  # fmt: skip
                yield result


def dense_rows(layers: list[Layer], shape: Shape, x: dict[int, Tensor], name: str, copy: float) -> Iterator[Row]:
    """torch.compile's FFN with the down projection as a model stores it, and with the transposed one that the kernels need."""
    stored = [layer.down.T.contiguous() for layer in layers]
    for n, given in (x | {n: torch.randn(n, shape.E, device=DEVICE).bfloat16() for n in PREFILLS}).items():
        facts = dict(ok=True, moved=shape.dense_bytes, ceiling=copy, share_of="copy", note=f"{n} tokens")
        ways = {COMPILED: (plain_ffn, {}), "dense, down transposed": (dense_ffn, {})}
        if n <= ops.MAX_TOKENS:
            ways[TUNED] = plain_ffn, {"mode": MODE}
        for label, (function, how) in ways.items():
            compiled = torch.compile(function, dynamic=False, **how)
            downs = stored if function is plain_ffn else [layer.down for layer in layers]
            calls = [
                partial(compiled, given, layer.gate, layer.up, down) for layer, down in zip(layers, downs, strict=True)
            ]
            result = row("FFN, dense", label, (1, n, 0, shape.D), timed(calls), name, **facts)
            print(
                f"{label}, {n} tokens: {1e6 * result.seconds_median:.1f} µs, {100 * result.share:.0f} % of copy",
                flush=True,
            )
            yield result


def tiles(shape: Shape, options: argparse.Namespace, name: str, copy: float) -> list[Row]:
    """The kernels at other tiles, one token at the first density: what the constants of `sparse_ffn.py` and `sparse_ffn_sm90.py` were chosen by."""
    density, x = options.densities[0], torch.randn(1, shape.E, device=DEVICE).bfloat16()
    layers = [Layer.draw(shape, density) for _ in range(shape.layers)]
    moved = int(shape.dense_bytes * ops.mask_size(shape.D, density) / shape.D)
    weights = [(x, layer.gate, layer.up, layer.down, layer.masks[:1]) for layer in layers]
    ways = [("Triton", ops.sparse_ffn_triton, KERNELS._ROWS_TILE, dict(ROWS=count, STAGES=stages, num_warps=warps))
            for count, stages, warps in itertools.product((1, 2, 4), (2, 3, 4), (4, 8))]  # fmt: skip
    if sparse_ffn_sm90.takes(*weights[0][1:4]):
        ways += [("Hopper", ops.sparse_ffn_hopper, sparse_ffn_sm90._TILE, dict(ROWS=count, STAGES=stages))
                 for count, stages in itertools.product((1, 2, 4), (2, 4, 8))]  # fmt: skip
    rows = []
    for label, function, constants, values in ways:
        before = dict(constants)
        constants.update(values)
        sparse_ffn_sm90._prepare.cache_clear()
        note = f"{label}: " + ", ".join(f"{key} {value}" for key, value in values.items())
        try:
            seconds = timed([partial(function, *given) for given in weights])
        except (
            RuntimeError,
            triton.runtime.errors.OutOfResources,
        ) as error:  # a tile that does not fit; the others go on
            print(f"{note}: {(str(error).splitlines() or [type(error).__name__])[0][:100]}", flush=True)
            continue
        finally:
            constants.update(before)
            sparse_ffn_sm90._prepare.cache_clear()
        rows.append(row(f"FFN tiles, density {density:g}", "apc, mask known", (1, 1, shape.K, shape.D), seconds, name, moved=moved, ok=False, note=note,
                        ceiling=copy, share_of="copy"))  # fmt: skip
        print(f"{note}: {1e6 * rows[-1].seconds_median:.1f} µs, {100 * rows[-1].share:.0f} % of copy", flush=True)
    return sorted(rows, key=lambda result: result.seconds_median)[:8]


# ---- a whole model


def decode(shape: Shape, options: argparse.Namespace, name: str, copy: float) -> Iterator[Row]:
    """Mistral-7B's shape with random weights: a step from one token to the next, after a prompt of 512 tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    quick = shape is QUICK
    layers, prompt = (2, 16) if quick else (32, 512)
    config = AutoConfig.for_model(
        "mistral", hidden_size=shape.E, intermediate_size=shape.D, num_hidden_layers=layers, num_attention_heads=shape.E // 128, head_dim=128,
        num_key_value_heads=max(1, shape.E // 512), vocab_size=32_000, max_position_embeddings=4096, sliding_window=None,
    )  # fmt: skip
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    tokens = {n: torch.randint(32_000, (n, prompt), device=DEVICE) for n in options.batches}
    parameters = sum(value.nbytes for value in model.parameters()) - model.get_input_embeddings().weight.nbytes
    dense = {}

    def measure(operation: str, label: str, n: int, moved: int, mode: str = MODE, early: bool = True) -> Row:
        torch.compiler.reset()  # which keeps no more than eight versions of a function, and then runs it as it is
        decoder = GreedyDecoder(model, n, 2 * prompt, mode, early)
        decoder.record(tokens[n])
        decoder.prefill(tokens[n])
        steps = min(prompt // 2, 64)
        seconds = time_cuda([decoder.step], repeats=steps, warmup=4)
        result = row(operation, label, (layers, n, shape.K, shape.D), seconds, name, moved=moved, ok=False, ceiling=copy, share_of="copy",
                     note=f"{n} sequences, after {prompt} tokens")  # fmt: skip
        step = result.seconds_median
        dense[n] = min(dense.get(n, step), step) if "dense" in operation else dense[n]
        print(
            f"{operation}, {label}, {n} sequences: {1e3 * step:.3f} ms a step, {n / step:.0f} tokens/s, dense / this {dense[n] / step:.3f}",
            flush=True,
        )
        return result

    for n in options.batches:
        for label, mode, early in (MODES[name] for name in options.modes):
            yield measure("decode, dense", label.removeprefix("dense, "), n, parameters, mode, early)
    ffns = layers * shape.dense_bytes
    for density in options.densities:
        codebook = random_codebook(shape, layers, density)
        for way in options.predictors:
            predictor, policy, extra = PREDICTORS[way](shape, layers, density)
            before = torch.cuda.memory_allocated()
            most = handle_of(sparsify(model, codebook, predictor, policy, kernel="auto")).max_sparse_tokens
            held = torch.cuda.memory_allocated() - before
            print(f"density {density:g}, {way}: {held / 1e6:.0f} MB beside the model, {100 * held / ffns:.2f} % of its FFNs; "
                  f"up to {most} tokens run sparse", flush=True)  # fmt: skip
            moved = int(parameters - ffns + ffns * density + layers * extra)
            for n in options.batches:
                label = f"apc, {way}: {'sparse' if n <= most else 'dense'}"
                yield measure(f"decode, density {density:g}", label, n, moved if n == 1 else parameters)
            restore(model)


def random_codebook(shape: Shape, layers: int, density: float) -> Codebook:
    masks = torch.stack([draw_masks(shape.K, shape.D, density).cpu() for _ in range(layers)])
    profiles = torch.ones((), dtype=torch.float16).expand(layers, shape.K, shape.D)
    book = SiteCodebook(
        masks, profiles, torch.ones(layers, shape.K, dtype=torch.int64), masks[:, 0].clone(), torch.zeros(layers)
    )
    return Codebook(
        {"neuron": book}, {"neuron": shape.D}, layers, shape.E, shape.D, "layer", "energy", density, "top", 0.5
    )


def random_clusters(shape: Shape, layers: int, density: float, lookahead: int) -> tuple[Predictor, str, int]:
    """A predictor of clusters, its policy, and the bytes that it reads of a layer for one token."""
    predictor = Predictor(layers, shape.E, shape.H, {"neuron": shape.K}, lookahead=lookahead)
    return predictor.requires_grad_(False).eval().rounded(), "predicted", shape.predictor_bytes


def random_low_bit(shape: Shape, layers: int, density: float) -> tuple[Predictor, str, int]:
    """The same for a low-bit copy with a correction. Its scores are sums of two normal numbers, so its thresholds are known."""
    predictor = Predictor(
        layers, shape.E, shape.rank, {"neuron": shape.D}, "low-bit", corrects=True, frozen=True, with_thresholds=True
    )
    copy = predictor.requires_grad_(False).eval().low_bit
    copy.planes.random_(0, 256)
    for value, number in ((copy.scale, 2 * shape.E**-0.5), (copy.slope, 1.0), (copy.power, 0.0)):
        value.fill_(number)
    predictor.thresholds.fill_(statistics.NormalDist(0, 2**0.5).inv_cdf(1 - density) if density < 1 else -math.inf)
    return predictor.rounded(), "neuron-threshold", shape.copy_bytes


PREDICTORS = {
    "lookahead 1": partial(random_clusters, lookahead=1), "lookahead 0": partial(random_clusters, lookahead=0), "low-bit copy": random_low_bit,
}  # fmt: skip


if __name__ == "__main__":
    main()
