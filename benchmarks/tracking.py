"""What tracking costs a training on this machine: `python benchmarks/tracking.py [--steps N] [--work MS] [--every N]`.

Steps of so much work, of which every so many log numbers, as `trainer.log_every_n_steps` has it, with W&B off, offline, and towards a server that accepts
and never answers. Runs of the three take turns; the slow-down is that of the mean step without the slowest tenth, and what
steps wait for is timed apart.
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

from apc.config.schema import TrackingConfig, TrainerConfig
from apc.run import tracking
from apc.run.tracking import Tracking

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


def run(steps: int, every: int, work: Callable[[], object], mode: str, folder: Path) -> tuple[list[float], float]:
    """Seconds of each step, and the share of them that went to logging."""
    with Tracking(
        TrackingConfig(wandb="online" if mode == "hanging server" else mode), folder, "benchmark", {}
    ) as record:
        seconds, logging = [], 0.0
        for step in range(steps):
            start = time.perf_counter()
            work()
            worked = time.perf_counter()
            if step % every == 0:
                record.log({"predictor/step": step} | {f"predictor/number_{i}": float(step) for i in range(NUMBERS)})
            end = time.perf_counter()
            seconds.append(end - start)
            logging += end - worked
    return seconds, logging / sum(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--steps", type=int, default=300, help="in a run")
    parser.add_argument("--work", type=float, default=50.0, help="milliseconds of a step, about")
    parser.add_argument(
        "--every", type=int, default=TrainerConfig().log_every_n_steps, help="steps between those that log"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    a = torch.randn(256, 256)
    for _ in range(200):
        a @ a
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
                    found[mode].append(
                        run(
                            options.steps, options.every, work, mode, Path(place) / f"{mode}-{number}".replace(" ", "-")
                        )
                    )
    print(f"{cpu_name()}, {options.rounds} × {options.steps} steps, {NUMBERS} numbers each {options.every} steps\n")
    print("| W&B | a step, ms | against disabled | of it, spent logging |\n| --- | ---: | ---: | ---: |")
    alone = _mean(found["disabled"])
    for mode, runs in found.items():
        share = statistics.mean(share for _, share in runs)
        print(f"| {mode} | {1000 * _mean(runs):.2f} | {100 * (_mean(runs) / alone - 1):+.2f} % | {100 * share:.2f} % |")


def _mean(runs: list[tuple[list[float], float]]) -> float:
    steps = sorted(step for seconds, _ in runs for step in seconds)
    return statistics.mean(steps[: len(steps) * 9 // 10])


if __name__ == "__main__":
    main()
