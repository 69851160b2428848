"""What tracking costs a training on this machine: `python benchmarks/tracking.py [--steps N] [--work MS]`.

Steps of so much work, each of which logs as many numbers as the predictor's do, with W&B off, offline, and towards a server that accepts and never
answers. Runs of the three take turns; the slow-down is that of the median step, and what the step itself waits for is timed apart.
"""

import argparse
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from common import cpu_name

from apc import tracking
from apc.tracking import Tracking, TrackingConfig

NUMBERS = 12
MODES = ("disabled", "offline", "hanging server")


@contextmanager
def silent_server():
    """A W&B server for this process that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": "0" * 40}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name in settings:
                del os.environ[name]


def run(steps: int, work: Callable[[], object], mode: str, folder: Path) -> tuple[list[float], float]:
    """Seconds of each step, and the share of them that went to logging."""
    with Tracking(TrackingConfig(wandb="online" if mode == "hanging server" else mode), folder, "benchmark", {}) as record:
        seconds, logging = [], 0.0
        for step in range(steps):
            start = time.perf_counter()
            work()
            worked = time.perf_counter()
            record.log({"predictor/step": step} | {f"predictor/number_{i}": float(step) for i in range(NUMBERS)})
            end = time.perf_counter()
            seconds.append(end - start)
            logging += end - worked
    return seconds, logging / sum(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--steps", type=int, default=300, help="in a run")
    parser.add_argument("--work", type=float, default=50.0, help="milliseconds of a step, about")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    a = torch.randn(256, 256)
    start = time.perf_counter()
    for _ in range(50):
        a @ a
    times = max(1, round(50 * options.work / 1000 / (time.perf_counter() - start)))
    tracking.INIT_TIMEOUT_S = 2

    def work() -> None:
        for _ in range(times):
            a @ a

    found: dict[str, list[tuple[list[float], float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.rounds):
            for mode in MODES:
                with silent_server():
                    found[mode].append(run(options.steps, work, mode, Path(place) / f"{mode}-{number}".replace(" ", "-")))
    alone = statistics.median(step for seconds, _ in found["disabled"] for step in seconds)
    print(f"{cpu_name()}, {options.rounds} × {options.steps} steps, {NUMBERS} numbers a step\n")
    print("| W&B | median step, ms | against disabled | of a step, spent logging |\n| --- | ---: | ---: | ---: |")
    for mode, runs in found.items():
        step = statistics.median(step for seconds, _ in runs for step in seconds)
        share = statistics.median(share for _, share in runs)
        print(f"| {mode} | {1000 * step:.2f} | {100 * (step / alone - 1):+.2f} % | {100 * share:.2f} % |")


if __name__ == "__main__":
    main()
