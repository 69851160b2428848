"""Sparse FFNs of one token on the CPU, against dense ones by torch: `python benchmarks/cpu_decode.py --help`.

Weights are random and rotate over several layers, so that no cache holds them. Each output is compared with a float32
reference before anything is timed. All arms take turns. The share is that of the bandwidth at which torch sums 1 GB on
as many threads. Shape letters: see `apc.ops`.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Row, add_csv_option, append, comma_list, cpu_name, markdown, row, time_cpu
from torch import Tensor

from apc import ops

SHAPES = {"smollm2": (576, 1536, 30), "1b": (2048, 8192, 4), "7b": (4096, 14336, 2)}  # E, D, layers that rotate
CLUSTERS, DENSITY = 2048, 0.5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--shapes", type=comma_list(), default=list(SHAPES), help=", ".join(SHAPES))
    kinds = comma_list(lambda name: getattr(torch, name))
    parser.add_argument("--dtypes", type=kinds, default=[torch.bfloat16, torch.float32], help="types of weights")
    parser.add_argument("--threads", type=comma_list(int), default=[1, torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds over all layers")
    add_csv_option(parser)
    arguments = parser.parse_args()
    rows = []
    for threads in sorted(set(arguments.threads)):
        torch.set_num_threads(threads)
        bandwidth = read_bandwidth()
        print(f"{cpu_name()}: reads {bandwidth / 1e9:.1f} GB/s", flush=True)
        for shape in arguments.shapes:
            for dtype in arguments.dtypes:
                rows += ffns(shape, dtype, arguments.repeats, bandwidth)
    append(rows, arguments.csv)
    print(f"\ntorch {torch.__version__}, commit {rows[0].commit}\n\n{markdown(rows)}")


def read_bandwidth() -> float:
    """Bytes per second at which torch sums 1 GB of float32."""
    values = torch.ones(2**28)
    return values.nbytes / min(time_cpu({"sum": values.sum}, 7)["sum"])


@torch.no_grad()
def ffns(shape: str, dtype: torch.dtype, repeats: int, bandwidth: float) -> list[Row]:
    """Rows for the FFNs of a shape: dense by torch and by apc, sparse under given masks, and under predicted ones."""
    E, D, L = SHAPES[shape]
    x = torch.randn(1, E).to(dtype)
    layers = [ops.FFNWeights(*(torch.randn(D, E).mul_(0.02).to(dtype) for _ in range(3))) for _ in range(L)]
    downs = [weights.down.T.contiguous() for weights in layers]  # as models store it
    H = min(512, E // 8)
    predictors = [
        ops.PredictorWeights(torch.randn(H, E), torch.zeros(H), torch.randn(CLUSTERS, H), torch.zeros(CLUSTERS))
        for _ in range(L)
    ]
    masks = [ops.pack(torch.rand(CLUSTERS, D).argsort(-1) < round(DENSITY * D)) for _ in range(L)]
    every = ops.ActiveNeurons(ops.pack(torch.ones(1, D, dtype=torch.bool)))
    halves = [ops.ActiveNeurons(each[:1]) for each in masks]

    def dense(layer: int) -> Tensor:
        gate, up, _, _ = layers[layer]
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), downs[layer])

    def predicted(layer: int) -> Tensor:
        candidates = ops.predict_clusters(x, predictors[layer], by_triton=False).candidates
        return ops.sparse_ffn(x, layers[layer], ops.ActiveNeurons(masks[layer], candidates), kernel="numba")

    arms: dict[str, Callable[[int], Tensor]] = {
        "torch, dense": dense,
        "apc, all neurons": lambda layer: ops.sparse_ffn(x, layers[layer], every, kernel="numba"),
        "apc, half": lambda layer: ops.sparse_ffn(x, layers[layer], halves[layer], kernel="numba"),
        "apc, half, predicted": predicted,
    }
    own = ops.ActiveNeurons(masks[0], ops.predict_clusters(x, predictors[0], by_triton=False).candidates)
    for name, active in zip(arms, (every, every, halves[0], own), strict=True):
        check(name, arms[name](0), x, layers[0], active)
    calls = {name: lambda arm=arm: [arm(layer) for layer in range(L)] for name, arm in arms.items()}
    seconds = {name: [each / L for each in times] for name, times in time_cpu(calls, repeats).items()}
    weights, slowest = 3 * E * D * dtype.itemsize, statistics.median(seconds["torch, dense"])
    predictor = 4 * H * (E + CLUSTERS)  # in float32, as `sparsify` stores it on a CPU
    read = dict(zip(arms, (weights, weights, DENSITY * weights, DENSITY * weights + predictor), strict=True))
    kind = str(dtype).removeprefix("torch.")
    return [
        row(
            f"FFN on the CPU, {kind}", name, (L, 1, CLUSTERS, D), times, cpu_name(),
            ok=True, moved=round(read[name]), ceiling=bandwidth, share_of="reading",
            note=f"E {E}, {slowest / statistics.median(times):.2f} × as fast as torch",
        )
        for name, times in seconds.items()
    ]  # fmt: skip


def check(name: str, output: Tensor, x: Tensor, weights: ops.FFNWeights, active: ops.ActiveNeurons) -> None:
    """Raises AssertionError unless the output is that of the formula in float32."""
    exact = ops.FFNWeights(*(matrix.float() for matrix in weights[:3]), weights.activation)
    expected = ops.sparse_ffn(x.float(), exact, active, kernel="torch")
    error = ((output.float() - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE[x.dtype]:
        raise AssertionError(f"{name}: differs from the formula by {error:.2%}")


if __name__ == "__main__":
    main()
