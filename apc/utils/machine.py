"""Names the machine that times are measured on."""

import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The CPU's model and the number of threads that torch uses."""
    info = Path("/proc/cpuinfo")
    lines = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    model = lines[0].split(":", 1)[1].strip() if lines else platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"
