"""How runs scale over GPUs: `python benchmarks/scaling.py --help`. Starts one process per GPU itself.

Parts:
- `lloyd`: Lloyd iterations through `ClusteringModule`, as `lloyd.py` times them, and the exchange between ranks alone.
- `collect`: patterns of a model with random weights and the shape of Mistral-7B.
- `model`: no measurement. The prediction of `apc/estimate/exchange.py` for 8 and 64 GPUs, and its error where
  results.csv has measurements.

Strong scaling: all GPUs together do the work of one. Weak scaling: each GPU does as much work as one alone. Before the
timed runs, small clusterings on each number of ranks are compared with one rank's, bit for bit; so are the timed ones.

The 10.68 M rows of 32 layers are 1,304 windows of 256 tokens here, because 8 GPUs can't share 163 windows of 2,048
tokens evenly. Shape letters: see `apc.ops`.
"""

import argparse
import csv
import gc
import hashlib
import logging
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import RESULTS, Row, add_csv_option, append, commit, markdown, row, time_cpu, time_cuda
from lloyd import Clock, random_rows
from pytorch_lightning import Trainer

from apc import ops
from apc.cluster.lloyd import ClusteringModule
from apc.collect import collect
from apc.collect.collector import Collector
from apc.collect.loader import BlockLoader, PatternDataModule
from apc.collect.memory import ResidentPatterns, keep_bytes
from apc.collect.patterns import ActiveRule, Block, PatternInfo
from apc.collect.sharding import block_ranges, rank_range
from apc.config.schema import ClusterConfig, CollectConfig
from apc.data.text import Windows
from apc.estimate import estimate
from apc.estimate.exchange import H100, Exchange, Links, iteration_seconds
from apc.run.callbacks import EndTogether
from apc.run.trainer import SumsOnDevice, SumsOnDevices
from apc.utils import distributed
from apc.utils.machine import cpu_name

PARTS = ("lloyd", "collect", "model")
MODELLED = (8, 64)  # GPUs
MODEL = "mistralai/Mistral-7B-v0.1"
ITERATION, COLLECT = "Lloyd iteration, {} scaling", "collect 1 M tokens, {} scaling"
EXCHANGE = "exchange of a Lloyd iteration"


@dataclass(frozen=True)
class Size:
    """The work of one GPU."""

    layers: int
    windows: int
    seq_len: int
    block_windows: int  # per rank
    clusters: tuple[int, ...]
    width: int
    epochs: int
    collected: int  # windows of the part `collect`
    collected_len: int  # tokens of such a window


FULL = Size(32, 1304, 256, 64, (2048, 16384), 14336, 8, collected=128, collected_len=2048)
QUICK = Size(2, 13, 32, 2, (7, 16), 300, 4, collected=8, collected_len=32)
ROWS = FULL.layers * FULL.windows * FULL.seq_len


@dataclass(frozen=True)
class Timed:
    """Seconds of one operation on some ranks. shape: (G, N, K, D); digest: of the resulting centroids, or ""."""

    operation: str
    ranks: int
    shape: tuple[int, int, int, int]
    seconds: list[float]
    digest: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--quick", action="store_true", help="check that everything runs, at tiny sizes; also on a CPU")
    ranks_help = "numbers of processes; default: 1, 2, 4, 8 up to the number of GPUs (on a CPU: 1, 2, 4)"
    parser.add_argument("--ranks", nargs="+", type=int, metavar="N", help=ranks_help)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; default: all")
    add_csv_option(parser)  # the part `model` reads this file too, beside results.csv
    rates = {"--within": (H100.within, "GPUs of its host"), "--between": (H100.between, "other hosts")}
    for option, (rate, target) in rates.items():
        words = f"part `model`: bytes/s of a GPU to {target}; default: {rate:g}"
        parser.add_argument(option, type=float, default=rate, metavar="RATE", help=words)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    parts = [part for part in arguments.only if part != "model"]
    if parts and not on_gpu and not arguments.quick:
        print("benchmarks/scaling.py: needs NVIDIA GPUs; --quick runs tiny sizes on the CPU", file=sys.stderr)
        sys.exit(2)
    available = torch.cuda.device_count() if on_gpu else 4
    counts = sorted({1, *(arguments.ranks or [count for count in (2, 4, 8) if count <= available])})
    if parts and on_gpu and counts[-1] > available:
        print(f"--ranks {counts[-1]}: torch sees {available} GPUs; give at most that many", file=sys.stderr)
        sys.exit(2)
    if parts:
        rows = []
        device = torch.cuda.get_device_name(0) if on_gpu else cpu_name()
        for new in measure(counts, parts, arguments.quick, device):
            append(new, arguments.csv)  # at once, so that a later failure doesn't lose them
            rows += new
        print(f"\nMEASURED, commit {commit()}, torch {torch.__version__}\n\n{markdown(rows)}")
    if "model" in arguments.only:
        print("\n" + modelled([RESULTS, arguments.csv], Links(arguments.within, arguments.between)))


def measure(counts: list[int], parts: list[str], quick: bool, device: str) -> Iterator[list[Row]]:
    """Runs the parts on each number of ranks in turn; yields the rows of each."""
    results: list[Timed] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in counts:
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            torch.multiprocessing.spawn(work, (ranks, port, parts, quick, Path(folder)), nprocs=ranks)
            new = torch.load(Path(folder) / f"{ranks}.pt", weights_only=False)  # safe: `work` just wrote it
            results += new
            yield [as_row(timed, results, device) for timed in new]


def as_row(timed: Timed, results: list[Timed], device: str) -> Row:
    """The row of a measurement, with its speed-up over one rank and the share of the exchange in its note.

    results: all measurements so far, those of one rank among them. Raises AssertionError if the centroids differ from
    those of one rank.
    """
    G, N, K, D = timed.shape
    name, implementation = f"{timed.ranks} × {device}", f"apc × {timed.ranks}"
    median = statistics.median(timed.seconds)
    if timed.operation == EXCHANGE:
        sent = exchange_of(K, D).sent(timed.ranks)
        facts = {"ok": False, "moved": sent, "ceiling": H100.within, "share_of": "NVLink 4, data sheet"}
        note = f"bytes that a rank sends: {sent:,.0f}"
        return row(timed.operation, implementation, timed.shape, timed.seconds, name, note=note, **facts)
    weak = "weak" in timed.operation
    by_kind = {(other.operation, other.ranks, other.shape[2]): other for other in results}
    alone, exchange = by_kind[timed.operation, 1, K], by_kind.get((EXCHANGE, timed.ranks, K))
    # Collecting (K = 0) is timed per million tokens of all ranks, so its weak scaling needs no factor.
    speedup = statistics.median(alone.seconds) / median * (timed.ranks if weak and K else 1)
    note = f"{speedup:.2f} × one rank"
    if exchange is not None:
        seconds = statistics.median(exchange.seconds)
        note += f"; {1000 * seconds:.3g} ms or {100 * seconds / median:.1f} % of it are the exchange"
    ok = bool(timed.digest) and not weak and timed.ranks > 1
    if ok and timed.digest != alone.digest:
        raise AssertionError(f"{timed.operation}, K {K:,}: the centroids of {timed.ranks} ranks differ from one rank's")
    note += "; the same centroids as one rank's" if ok else ""
    moved = None if K else 1e6 * G * ops.row_bytes(D)
    rate = (G * alone.shape[1] * K * D if K else moved) / statistics.median(alone.seconds)
    facts = {"ok": ok, "moved": moved, "ceiling": timed.ranks * rate, "share_of": f"{timed.ranks} × one rank's"}
    return row(timed.operation, implementation, timed.shape, timed.seconds, name, note=note, **facts)


def work(rank: int, ranks: int, port: int, parts: list[str], quick: bool, folder: Path) -> None:
    """Runs the parts as one of the ranks; the first rank writes the results to `folder`/RANKS.pt.

    Raises AssertionError if small clusterings differ from one rank's.
    """
    if ranks > 1:
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment |= {"GROUP_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port}
        os.environ |= {name: str(value) for name, value in environment.items()}
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    distributed.start(device)
    check(device, folder)
    size = QUICK if quick else FULL
    results = []
    if "lloyd" in parts:
        results += lloyd(size, device)
    if "collect" in parts:
        results += collecting(size, device)
    if rank == 0:
        torch.save(results, folder / f"{ranks}.pt")
    if ranks > 1:
        torch.distributed.destroy_process_group()


def make_source(size: Size, windows: int, device: torch.device) -> ResidentPatterns:
    """This rank's windows of random patterns, in host memory. A window is the same on any number of ranks."""
    D = size.width
    totals = {"gate": torch.ones(size.layers, D, dtype=torch.int64)}
    shape = size.layers, 64, D, windows, size.seq_len
    info = PatternInfo(*shape, {"gate": D}, ActiveRule("top", 0.5), False, False, {}, totals)
    blocks = block_ranges(windows, size.block_windows * distributed.world_size())
    owned = [window for block in blocks for window in range(*rank_range(*block))]
    source = ResidentPatterns(info, owned, torch.device("cpu"), locked=device.type == "cuda")
    generator = torch.Generator(device)
    for window in owned:
        rows = random_rows((size.layers, size.seq_len), D, generator.manual_seed(window))
        source.add(Block.of_windows({"patterns.gate": rows}, [window], size.seq_len))
    return source


def fit(source: ResidentPatterns, k: int, size: Size, device: torch.device) -> tuple[str, list[float]]:
    """Clusters binary patterns, pooled, from a random start: (digest of the centroids, seconds of each pass).

    The seconds are those of the slowest rank.
    """
    gc.collect()  # frees the blocks of an earlier fit
    ranks = distributed.world_size()
    cfg = ClusterConfig(k=k, weighting="binary", scope="pooled", max_epochs=size.epochs, tolerance=0.0)
    with device:
        module, clock = ClusteringModule(cfg, source.info, 0), Clock(device)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=ranks if ranks > 1 or device.type == "cpu" else [device.index],
        strategy=SumsOnDevices() if ranks > 1 else SumsOnDevice(device),
        max_epochs=size.epochs,
        logger=False,
        callbacks=[EndTogether(), clock],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    block_windows = size.block_windows * ranks
    budget = keep_bytes(source.info, module.fields(), size.block_windows, device, module.working_bytes())
    loader = BlockLoader(source, module.fields(), block_windows, 0, device=device, keep_bytes=budget)
    trainer.fit(module, datamodule=PatternDataModule(source, loader))
    loader.release()
    digest = hashlib.sha256(module.get("centroids", "gate").cpu().numpy().tobytes()).hexdigest()
    return digest, slowest(clock.seconds, device)


def slowest(seconds: list[float], device: torch.device) -> list[float]:
    """The largest of all ranks' seconds, value by value."""
    return distributed.all_max(torch.tensor(seconds, dtype=torch.float64, device=device)).tolist()


def check(device: torch.device, folder: Path) -> None:
    """Raises AssertionError unless small clusterings give the same centroids as on one rank.

    One rank must have run before: it saves the digests of its centroids in `folder`.
    """
    source, ranks = make_source(QUICK, QUICK.windows, device), distributed.world_size()
    path = folder / "checked.pt"
    digests = {k: fit(source, k, QUICK, device)[0] for k in (3, *QUICK.clusters)}  # 3: fewer clusters than four ranks
    if ranks == 1:
        torch.save(digests, path)
    for k, digest in torch.load(path).items():
        if digests[k] != digest:
            raise AssertionError(f"K {k}: the centroids of {ranks} ranks differ from one rank's")


def exchange_of(K: int, D: int) -> Exchange:
    """The exchange of a pass over one pooled site, without a few small tensors."""
    return Exchange(scattered=4 * K * D, gathered=K * ops.row_bytes(D), reduced=8 * K)


def kinds(windows: int) -> list[tuple[list[str], int]]:
    """(names of the kinds of scaling, windows of all ranks together). On one rank, strong and weak are the same run."""
    ranks = distributed.world_size()
    return [(["strong", "weak"], windows)] if ranks == 1 else [(["strong"], windows), (["weak"], windows * ranks)]


def lloyd(size: Size, device: torch.device) -> list[Timed]:
    """Measures Lloyd iterations, strong and weak scaling, and the exchange by itself."""
    ranks, D, results = distributed.world_size(), size.width, []
    if ranks > 1:
        results = [Timed(EXCHANGE, ranks, (1, 0, k, D), time_exchange(k, D, device)) for k in size.clusters]
    for kind, windows in kinds(size.windows):
        source = make_source(size, windows, device)
        N = source.info.tokens * size.layers
        for k in size.clusters:
            digest, seconds = fit(source, k, size, device)
            seconds = seconds[2:]  # the first pass draws the initial centroids and copies rows
            results += [Timed(ITERATION.format(each), ranks, (1, N, k, D), seconds, digest) for each in kind]
            if distributed.is_main():
                what = f"{ranks} ranks, {' and '.join(kind)}, N {N:,}, K {k:,}"
                print(f"{what}: {statistics.median(seconds):.4f} s", flush=True)
        del source
        gc.collect()  # frees its host memory before the next source takes as much
    return results


def time_exchange(K: int, D: int, device: torch.device) -> list[float]:
    """Seconds of the exchange of one pass, without computation beside it."""
    sums, sizes = torch.zeros(K, D, dtype=torch.int32, device=device), torch.zeros(K, dtype=torch.int64, device=device)
    centroids = torch.zeros(K, ops.row_bytes(D), dtype=torch.uint8, device=device)

    def exchange() -> None:
        distributed.all_sum(sizes)
        distributed.sum_own_rows(sums)
        distributed.gather_rows(centroids)

    seconds = time_cuda([exchange], 20) if device.type == "cuda" else time_cpu({"exchange": exchange})["exchange"]
    return slowest(seconds, device)


def collecting(size: Size, device: torch.device) -> list[Timed]:
    """Measures collecting patterns: forward pass, thresholds, patterns kept on the device.

    The seconds are per million tokens of all ranks together.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    ranks = distributed.world_size()
    shape = dict(estimate.known()["shapes"][MODEL])
    if size is QUICK:
        shape |= {"hidden_size": 64, "intermediate_size": size.width, "num_hidden_layers": 2, "vocab_size": 100}
        shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(**shape)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    collector = Collector(model, ["neuron"], device, batch_windows=8 if device.type == "cuda" else 1)
    batch_tokens = 8 * ranks * size.collected_len
    cfg = CollectConfig(storage="device", importance=False, calibration_windows=8, batch_tokens=batch_tokens)
    results = []
    for kind, count in kinds(size.collected):
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(config.vocab_size, (count, size.collected_len), generator=generator)
        windows = Windows(tokens, "random", 1, "")
        seconds = []
        for _ in range(4):  # the first compiles kernels
            distributed.barrier()
            start = time.perf_counter()
            patterns = collect.collect(cfg, collector, windows, "threshold", 0.5, {}, with_hidden=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append((time.perf_counter() - start) * 1e6 / tokens.numel())
            info = patterns.info
            del patterns
        shape = (info.layers, tokens.numel(), 0, info.widths["neuron"])
        seconds = slowest(seconds[1:], device)
        results += [Timed(COLLECT.format(each), ranks, shape, seconds) for each in kind]
        if distributed.is_main():
            what = f"{ranks} ranks, {' and '.join(kind)}, {tokens.numel():,} tokens"
            print(f"{what}: {statistics.median(seconds):.3f} s per million", flush=True)
    return results


def modelled(paths: list[Path], links: Links) -> str:
    """A table of `iteration_seconds` on several GPUs, from the last iteration of one H100 in these files.

    Below it, the error of the model: for the last measured iterations on several GPUs of each kind, with one GPU's time
    and the bytes sent from rows of the same commit.
    """
    D, N = FULL.width, ROWS
    files = [path.read_text() for path in dict.fromkeys(paths) if path.exists()]
    rows = [row for text in files for row in csv.DictReader(text.splitlines())]
    iterations = [
        row for row in rows if row["operation"].startswith("Lloyd iteration") and "host memory" not in row["note"]
    ]
    exchanges = [row for row in rows if row["operation"] == EXCHANGE]
    sent = {_key(row): float(row["note"].split(": ")[1].replace(",", "")) for row in exchanges}
    lines = [
        f"MODELLED, not measured: an iteration, N {N:,}, D {D:,}, strong scaling, from the time of one H100,",
        f"which is divided evenly. Rings at {links.within / 1e9:g} GB/s within a host of 8 GPUs, at "
        f"{links.between / 1e9:g} GB/s per GPU between hosts.",
        "",
        "| K | GPUs | one GPU, measured s | a GPU sends MB | exchange ms | iteration ms | times one GPU |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    errors = []
    for k in FULL.clusters:
        same = [row for row in iterations if (int(row["N"]), int(row["K"]), int(row["D"])) == (N, k, D)]
        alone = [row for row in same if row["implementation"] in ("apc", "apc × 1")]
        on_h100 = [float(row["seconds_median"]) for row in alone if "H100" in row["device"]]
        if not on_h100:
            raise SystemExit(
                f"{RESULTS}: no Lloyd iteration of one H100 with N {N:,}, K {k:,}, D {D:,}; "
                "run benchmarks/lloyd.py or benchmarks/scaling.py on one"
            )
        seconds, exchange = on_h100[-1], exchange_of(k, D)
        for ranks in MODELLED:
            total = iteration_seconds(seconds, exchange, ranks, links)
            lines.append(
                f"| {k:,} | {ranks} | {seconds:.4g} | {exchange.sent(ranks) / 1e6:,.0f} "
                f"| {1000 * exchange.seconds(ranks, links):.3g} | {1000 * total:.3g} | {seconds / total:.2f} |"
            )
        one_of = {(row["commit"], row["device"].split(" × ")[-1]): float(row["seconds_median"]) for row in alone}
        several = [
            row
            for row in same
            if row["operation"] == ITERATION.format("strong") and row not in alone and _key(row) in sent
        ]
        for last in {each["device"]: each for each in several}.values():
            ranks, card = last["device"].split(" × ")
            one, measured = one_of[last["commit"], card], float(last["seconds_median"])
            predicted = one / int(ranks) + sent[_key(last)] / links.bandwidth(int(ranks))
            error = 100 * (predicted / measured - 1)
            errors.append(f"K {k:,}, {last['device']}: {error:+.1f} % against {1000 * measured:.3g} ms measured")
    unknown = "Error of the model: unknown. Only one GPU was measured; the exchange is from data sheets."
    return "\n".join([*lines, "", f"Error of the model: {'; '.join(errors)}." if errors else unknown])


def _key(row: dict[str, str]) -> tuple[str, str, str]:
    """Equal for the row of an iteration and the row of its exchange."""
    return row["commit"], row["device"], row["K"]


if __name__ == "__main__":
    main()
