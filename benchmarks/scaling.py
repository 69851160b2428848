"""What more GPUs gain: `python benchmarks/scaling.py [--quick] [--ranks N …] [--only PART …] [--csv PATH]`, which starts a process for each GPU itself.

Parts: `lloyd` (Lloyd iterations through `ClusteringModule`, as `lloyd.py` times them, and the exchange between the ranks apart), `collect`
(patterns of a model of Mistral-7B's shape with random weights) and `model` (no measurement: what `apc/exchange.py` says of 8 and 64 GPUs, in a table
of its own, and how far it is off where there are measurements). Strong scaling: all GPUs together have the work that one has alone; weak: each has.
First small clusterings on each number of ranks are compared with one rank's, bit for bit; the timed ones too, afterwards.

10.68 M rows of 32 layers are 1,304 windows of 256 tokens here, which 8 GPUs share out evenly; 163 of 2,048 they would not. Shape letters: see
`apc/ops/bits.py`.
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
from common import RESULTS, Row, append, commit, cpu_name, markdown, row, time_cpu, time_cuda
from lloyd import Clock
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

PARTS = ("lloyd", "collect", "model")
MODELLED = (8, 64)
MODEL = "mistralai/Mistral-7B-v0.1"
ITERATION, EXCHANGE, COLLECT = (
    "Lloyd iteration, {} scaling",
    "exchange of a Lloyd iteration",
    "collect 1 M tokens, {} scaling",
)


@dataclass(frozen=True)
class Size:
    layers: int
    windows: int
    seq_len: int
    block_windows: int  # of each rank
    clusters: tuple[int, ...]
    width: int
    epochs: int
    collected: int  # windows
    collected_len: int


FULL = Size(32, 1304, 256, 64, (2048, 16384), 14336, 8, collected=128, collected_len=2048)
QUICK = Size(2, 13, 32, 2, (7, 16), 300, 4, collected=8, collected_len=32)
ROWS = FULL.layers * FULL.windows * FULL.seq_len


@dataclass(frozen=True)
class Timed:
    """Seconds of one operation on so many ranks. shape: (G, N, K, D); digest: of the centroids that came out, or ""."""

    operation: str
    ranks: int
    shape: tuple[int, int, int, int]
    seconds: list[float]
    digest: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that everything runs and agrees; on a CPU too"
    )
    parser.add_argument(
        "--ranks",
        nargs="+",
        type=int,
        help="how many processes; by default 1, 2, 4 … up to the GPUs there are (on a CPU: 1, 2, 4)",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--csv",
        type=Path,
        default=RESULTS,
        help="file that the rows are added to, and that the model reads beside results.csv",
    )
    parser.add_argument(
        "--within", type=float, default=H100.within, help="modelled bytes/s of a GPU to others of its host"
    )
    parser.add_argument("--between", type=float, default=H100.between, help="modelled bytes/s of a GPU to other hosts")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    parts = [part for part in arguments.only if part != "model"]
    if parts and not on_gpu and not arguments.quick:
        print(
            "benchmarks/scaling.py needs NVIDIA GPUs, and torch sees none; --quick runs tiny sizes on the CPU",
            file=sys.stderr,
        )
        sys.exit(2)
    there = torch.cuda.device_count() if on_gpu else 4
    counts = sorted({1, *(arguments.ranks or [count for count in (2, 4, 8) if count <= there])})
    if parts and on_gpu and counts[-1] > there:
        print(f"--ranks {counts[-1]}: this machine has {there} GPUs that PyTorch sees", file=sys.stderr)
        sys.exit(2)
    if parts:
        rows = []
        for found in measure(counts, parts, arguments.quick, torch.cuda.get_device_name(0) if on_gpu else cpu_name()):
            append(found, arguments.csv)  # at once: what was measured stays, whatever comes after it
            rows += found
        print(f"\nMEASURED, commit {commit()}, torch {torch.__version__}\n\n{markdown(rows)}")
    if "model" in arguments.only:
        print("\n" + modelled([RESULTS, arguments.csv], Links(arguments.within, arguments.between)))


def measure(counts: list[int], parts: list[str], quick: bool, device: str) -> Iterator[list[Row]]:
    """The parts on each number of ranks, one after the other, and the rows of each."""
    found: list[Timed] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in counts:
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            torch.multiprocessing.spawn(work, (ranks, port, parts, quick, Path(folder)), nprocs=ranks)
            new = torch.load(Path(folder) / f"{ranks}.pt", weights_only=False)  # of our own making, just now
            found += new
            yield [as_row(timed, found, device) for timed in new]


def as_row(timed: Timed, found: list[Timed], device: str) -> Row:
    """The row of a measurement, beside those of one rank and of the exchange. Raises AssertionError where centroids are not one rank's."""
    G, N, K, D = timed.shape
    name, implementation = f"{timed.ranks} × {device}", f"apc × {timed.ranks}"
    median = statistics.median(timed.seconds)
    if timed.operation == EXCHANGE:
        sent = exchange_of(K, D).sent(timed.ranks)
        return row(timed.operation, implementation, timed.shape, timed.seconds, name, ok=False, moved=sent, ceiling=H100.within,
                   share_of="NVLink 4, data sheet", note=f"bytes that a rank sends: {sent:,.0f}")  # fmt: skip
    weak = "weak" in timed.operation
    alone = next(
        other for other in found if other.operation == timed.operation and other.ranks == 1 and other.shape[2] == K
    )
    gained = (
        statistics.median(alone.seconds) / median * (timed.ranks if weak and K else 1)
    )  # what is collected is timed for each million tokens
    note = f"{gained:.2f} × one rank"
    exchange = next(
        (other for other in found if (other.operation, other.ranks, other.shape[2]) == (EXCHANGE, timed.ranks, K)), None
    )
    if exchange is not None:
        seconds = statistics.median(exchange.seconds)
        note += f"; {1000 * seconds:.3g} ms or {100 * seconds / median:.1f} % of it are the exchange"
    ok = bool(timed.digest) and not weak and timed.ranks > 1
    if ok and timed.digest != alone.digest:
        raise AssertionError(f"{timed.operation}, K {K:,}: the centroids of {timed.ranks} ranks are not those of one")
    note += "; the same centroids as one rank's" if ok else ""
    moved = None if K else 1e6 * G * ops.row_bytes(D)
    rate = (G * alone.shape[1] * K * D if K else moved) / statistics.median(alone.seconds)
    return row(timed.operation, implementation, timed.shape, timed.seconds, name, ok=ok, moved=moved, ceiling=timed.ranks * rate,
               share_of=f"{timed.ranks} × one rank's", note=note)  # fmt: skip


# ---- in each rank


def work(rank: int, ranks: int, port: int, parts: list[str], quick: bool, folder: Path) -> None:
    """What one process does; the first writes `folder`/RANKS.pt. Raises AssertionError where the centroids are not one rank's."""
    if ranks > 1:
        environment = dict(
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=ranks,
            LOCAL_WORLD_SIZE=ranks,
            GROUP_RANK=0,
            MASTER_ADDR="localhost",
            MASTER_PORT=port,
        )
        os.environ |= {name: str(value) for name, value in (environment | {"TORCHELASTIC_RUN_ID": port}).items()}
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    distributed.start(device)  # which leaves NVLink multicast off
    check(device, folder)
    size = QUICK if quick else FULL
    found = []
    if "lloyd" in parts:
        found += lloyd(size, device)
    if "collect" in parts:
        found += collecting(size, device)
    if rank == 0:
        torch.save(found, folder / f"{ranks}.pt")
    if ranks > 1:
        torch.distributed.destroy_process_group()


def make_source(size: Size, windows: int, device: torch.device) -> ResidentPatterns:
    """This rank's windows of random patterns in host memory; each window is the same on any number of ranks."""
    D = size.width
    info = PatternInfo(size.layers, 64, D, windows, size.seq_len, {"gate": D}, ActiveRule("top", 0.5), False, False, {},
                       {"gate": torch.ones(size.layers, D, dtype=torch.int64)})  # fmt: skip
    blocks = block_ranges(windows, size.block_windows * distributed.world_size())
    owned = [window for block in blocks for window in range(*rank_range(*block))]
    source = ResidentPatterns(info, owned, torch.device("cpu"), locked=device.type == "cuda")
    generator = torch.Generator(device)
    whole, bits = divmod(D, 8)
    for window in owned:
        generator.manual_seed(window)
        value = torch.randint(
            0, 256, (size.layers, size.seq_len, ops.row_bytes(D)), dtype=torch.uint8, device=device, generator=generator
        )
        if bits:
            value[..., whole] &= (1 << bits) - 1
        value[..., whole + bool(bits) :] = 0
        source.add(Block.of_windows({"patterns.gate": value}, [window], size.seq_len))
    return source


def fit(source: ResidentPatterns, k: int, size: Size, device: torch.device) -> tuple[str, list[float]]:
    """Clusters binary patterns, pooled, from a random start → digest of the centroids, seconds of each pass: those of the slowest rank."""
    gc.collect()  # what an earlier fit held
    ranks = distributed.world_size()
    cfg = ClusterConfig(k=k, weighting="binary", scope="pooled", max_epochs=size.epochs, tolerance=0.0)
    with device:
        module, clock = ClusteringModule(cfg, source.info, 0), Clock(device)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=ranks if ranks > 1 or device.type == "cpu" else [device.index],
        strategy=SumsOnDevices() if ranks > 1 else SumsOnDevice(device), max_epochs=size.epochs, logger=False, callbacks=[EndTogether(), clock],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    block_windows = size.block_windows * ranks
    budget = keep_bytes(source.info, module.fields(), size.block_windows, device, module.working_bytes())
    loader = BlockLoader(source, module.fields(), block_windows, 0, device=device, keep_bytes=budget)
    trainer.fit(module, datamodule=PatternDataModule(source, loader))
    loader.release()
    digest = hashlib.sha256(module.get("centroids", "gate").cpu().numpy().tobytes()).hexdigest()
    return digest, slowest(clock.seconds, device)


def slowest(seconds: list[float], device: torch.device) -> list[float]:
    return distributed.all_max(torch.tensor(seconds, dtype=torch.float64, device=device)).tolist()


def check(device: torch.device, folder: Path) -> None:
    """Raises AssertionError unless small clusterings give the centroids that one rank found, which leaves them in `folder`."""
    source, ranks = make_source(QUICK, QUICK.windows, device), distributed.world_size()
    path = folder / "checked.pt"
    found = {k: fit(source, k, QUICK, device)[0] for k in (3, *QUICK.clusters)}  # 3: fewer than four ranks
    if ranks == 1:
        torch.save(found, path)
    for k, digest in torch.load(path).items():
        if found[k] != digest:
            raise AssertionError(f"K {k}: the centroids of {ranks} ranks are not those of one")


def exchange_of(K: int, D: int) -> Exchange:
    """What a pass of one pooled site exchanges, but for a few numbers."""
    return Exchange(scattered=4 * K * D, gathered=K * ops.row_bytes(D), reduced=8 * K)


def kinds(windows: int) -> list[tuple[list[str], int]]:
    """The kinds of scaling and the windows of all ranks together; for one rank they are the same."""
    ranks = distributed.world_size()
    return [(["strong", "weak"], windows)] if ranks == 1 else [(["strong"], windows), (["weak"], windows * ranks)]


def lloyd(size: Size, device: torch.device) -> list[Timed]:
    ranks, D, found = distributed.world_size(), size.width, []
    if ranks > 1:
        found = [Timed(EXCHANGE, ranks, (1, 0, k, D), time_exchange(k, D, device)) for k in size.clusters]
    for kind, windows in kinds(size.windows):
        source = make_source(size, windows, device)
        N = source.info.tokens * size.layers
        for k in size.clusters:
            digest, seconds = fit(source, k, size, device)
            found += [
                Timed(ITERATION.format(each), ranks, (1, N, k, D), seconds[2:], digest) for each in kind
            ]  # the first draws the start, and copies rows
            if distributed.is_main():
                print(
                    f"{ranks} ranks, {' and '.join(kind)}, N {N:,}, K {k:,}: {statistics.median(seconds[2:]):.4f} s",
                    flush=True,
                )
        del source
        gc.collect()  # its host memory, before the next takes as much
    return found


def time_exchange(K: int, D: int, device: torch.device) -> list[float]:
    """Seconds of what a pass exchanges, nothing else to do."""
    sums, sizes = torch.zeros(K, D, dtype=torch.int32, device=device), torch.zeros(K, dtype=torch.int64, device=device)
    centroids = torch.zeros(K, ops.row_bytes(D), dtype=torch.uint8, device=device)

    def exchange() -> None:
        distributed.all_sum(sizes)
        distributed.sum_own_rows(sums)
        distributed.gather_rows(centroids)

    seconds = time_cuda([exchange], 20) if device.type == "cuda" else time_cpu({"exchange": exchange})["exchange"]
    return slowest(seconds, device)


def collecting(size: Size, device: torch.device) -> list[Timed]:
    """Seconds for each million tokens, of all ranks together: the forward pass, thresholds, patterns kept on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ranks = distributed.world_size()
    shape = dict(estimate.known()["shapes"][MODEL])
    if size is QUICK:
        shape |= dict(
            hidden_size=64,
            intermediate_size=size.width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=100,
        )
    config = AutoConfig.for_model(**shape)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    collector = Collector(model, ["neuron"], device, batch_windows=8 if device.type == "cuda" else 1)
    cfg = CollectConfig(
        storage="device", importance=False, calibration_windows=8, batch_tokens=8 * ranks * size.collected_len
    )
    found = []
    for kind, count in kinds(size.collected):
        tokens = torch.randint(
            config.vocab_size, (count, size.collected_len), generator=torch.Generator().manual_seed(1)
        )
        seconds = []
        for _ in range(4):  # the first compiles
            distributed.barrier()
            start = time.perf_counter()
            patterns = collect.collect(
                cfg, collector, Windows(tokens, "random", 1, ""), "threshold", 0.5, {}, with_hidden=False
            )
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append((time.perf_counter() - start) * 1e6 / tokens.numel())
            info = patterns.info
            del patterns
        taken = slowest(seconds[1:], device)
        found += [
            Timed(COLLECT.format(each), ranks, (info.layers, tokens.numel(), 0, info.widths["neuron"]), taken)
            for each in kind
        ]
        if distributed.is_main():
            print(
                f"{ranks} ranks, {' and '.join(kind)}, {tokens.numel():,} tokens: {statistics.median(taken):.3f} s for each million",
                flush=True,
            )
    return found


# ---- the model


def modelled(paths: list[Path], links: Links) -> str:
    """A table of what `iteration_seconds` says of iterations from one H100's, the last that the files have. Beside it how far the model is off for the
    last iterations on several GPUs of each kind, from one GPU's, and for the bytes that were sent, of the same commit."""
    D, N = FULL.width, ROWS
    read = [
        row for path in dict.fromkeys(paths) if path.exists() for row in csv.DictReader(path.read_text().splitlines())
    ]
    rows = [row for row in read if row["operation"].startswith("Lloyd iteration") and "host memory" not in row["note"]]
    sent = {
        _where(row): float(row["note"].split(": ")[1].replace(",", "")) for row in read if row["operation"] == EXCHANGE
    }
    lines = [
        f"MODELLED, not measured: an iteration, N {N:,}, D {D:,}, strong scaling, from one H100's; rings at {links.within / 1e9:g} GB/s within a host of 8,",
        f"{links.between / 1e9:g} GB/s a GPU between hosts. The time of one GPU is taken to be shared out evenly.",
        "",
        "| K | GPUs | one GPU, measured s | a GPU sends MB | exchange ms | iteration ms | times one GPU |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    errors = []
    for k in FULL.clusters:
        same = [row for row in rows if (int(row["N"]), int(row["K"]), int(row["D"])) == (N, k, D)]
        alone = [row for row in same if row["implementation"] in ("apc", "apc × 1")]
        on_h100 = [float(row["seconds_median"]) for row in alone if "H100" in row["device"]]
        if not on_h100:
            raise SystemExit(
                f"{RESULTS}: has no Lloyd iteration of one H100 with N {N:,}, K {k:,}, D {D:,}; run benchmarks/lloyd.py or scaling.py on one"
            )
        seconds, exchange = on_h100[-1], exchange_of(k, D)
        for ranks in MODELLED:
            total = iteration_seconds(seconds, exchange, ranks, links)
            lines.append(f"| {k:,} | {ranks} | {seconds:.4g} | {exchange.sent(ranks) / 1e6:,.0f} | {1000 * exchange.seconds(ranks, links):.3g} "
                         f"| {1000 * total:.3g} | {seconds / total:.2f} |")  # fmt: skip
        one_of = {(row["commit"], row["device"].split(" × ")[-1]): float(row["seconds_median"]) for row in alone}
        several = [
            row
            for row in same
            if row["operation"] == ITERATION.format("strong") and row not in alone and _where(row) in sent
        ]
        for last in {each["device"]: each for each in several}.values():
            ranks, card = last["device"].split(" × ")
            one, taken = one_of[last["commit"], card], float(last["seconds_median"])
            error = (one / int(ranks) + sent[_where(last)] / links.bandwidth(int(ranks))) / taken - 1
            errors.append(f"K {k:,}, {last['device']}: {100 * error:+.1f} % against {1000 * taken:.3g} ms measured")
    unchecked = "Its error is not known: only one GPU was measured, so the part in communication rests on data sheets."
    return "\n".join([*lines, "", f"Its error: {'; '.join(errors)}." if errors else unchecked])


def _where(row: dict[str, str]) -> tuple[str, str, str]:
    """What a row of an iteration and one of its exchange have in common."""
    return row["commit"], row["device"], row["K"]


if __name__ == "__main__":
    main()
