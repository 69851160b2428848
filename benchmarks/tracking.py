"""How much W&B tracking slows training on this machine: `python benchmarks/tracking.py --help`.

A run is a loop of steps of constant work; every N-th step logs numbers. W&B is disabled, offline, or online with a
server that accepts connections and never answers. The three modes take turns. The slow-down compares mean step times
without the slowest tenth of the steps; the time spent in logging calls is also measured by itself.
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

from apc.config.schema import TrackingConfig, TrainerConfig
from apc.run import tracking
from apc.run.tracking import Tracking
from apc.utils.machine import cpu_name

NUMBERS = 12
MODES = ("disabled", "offline", "hanging server")


@contextmanager
def silent_server():
    """Points this process at a W&B server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": "0" * 40}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name in settings:
                del os.environ[name]


def run(steps: int, every: int, work: Callable[[], object], mode: str, folder: Path) -> tuple[list[float], float]:
    """Seconds of each step, and the share of them spent in logging calls."""
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
    every = TrainerConfig().log_every_n_steps
    parser.add_argument("--steps", type=int, default=300, help="steps of a run")
    parser.add_argument("--work", type=float, default=50.0, help="approximate milliseconds of a step")
    parser.add_argument("--every", type=int, default=every, help="log at every N-th step", metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each mode")
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

    runs: dict[str, list[tuple[list[float], float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(options.rounds):
            for mode in MODES:
                folder = Path(temporary) / f"{mode}-{number}".replace(" ", "-")
                with silent_server():
                    runs[mode].append(run(options.steps, options.every, work, mode, folder))
    print(f"{cpu_name()}, {options.rounds} × {options.steps} steps, {NUMBERS} numbers every {options.every} steps\n")
    print("| W&B | ms per step | against disabled | share of logging calls |\n| --- | ---: | ---: | ---: |")
    disabled = _mean(runs["disabled"])
    for mode, measured in runs.items():
        mean, share = _mean(measured), statistics.mean(share for _, share in measured)
        print(f"| {mode} | {1000 * mean:.2f} | {100 * (mean / disabled - 1):+.2f} % | {100 * share:.2f} % |")


def _mean(runs: list[tuple[list[float], float]]) -> float:
    """Mean seconds of a step, without the slowest tenth of all steps."""
    steps = sorted(step for seconds, _ in runs for step in seconds)
    return statistics.mean(steps[: len(steps) * 9 // 10])


if __name__ == "__main__":
    main()
