"""Checks whether this machine has what a run needs, and says what to do about the rest.

apc doctor [run.dir=FOLDER] [collect.dir=FOLDER]

Prints a line per check: ok, note (works, but read this) or FAIL. The exit code is 1 if any check failed.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet

from apc.collect.store import store_folder
from apc.commands import cache
from apc.config.load import load_config
from apc.config.schema import Config
from apc.data import bundled
from apc.utils import hub, wheels
from apc.utils.errors import first_line
from apc.utils.packages import DISTRIBUTION, installed_version, requirements

if TYPE_CHECKING:
    import torch

LOW_DISK_SPACE = 5 << 30  # bytes
SHOWN_PACKAGES = ("torch", "triton", "pytorch-lightning", "transformers", "wandb")  # with their versions if they are ok


@dataclass(frozen=True)
class Finding:
    """One line of the output."""

    level: str  # ok, note or FAIL
    text: str
    advice: str = ""  # what to do about it

    def line(self) -> str:
        """The printed line."""
        return f"{self.level:<4}  {self.text}" + (f": {self.advice}" if self.advice else "")


def check_python() -> Iterator[Finding]:
    """Python and the packages, compared with the project's requirements."""
    if installed_version(DISTRIBUTION) is None:
        yield Finding("note", f"{DISTRIBUTION} is not installed", "its packages are not checked; pip install -e .")
        return
    wanted = SpecifierSet(importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"])
    python = f"Python {platform.python_version()}"
    yield (
        Finding("ok", python)
        if platform.python_version() in wanted
        else Finding("FAIL", python, f"use a version {wanted}")
    )
    missing = []
    for extra in ("", "train"):
        for needed in requirements(extra):
            version = installed_version(needed.name)
            if version is None and extra:
                missing.append(needed.name)
            elif version is None or not needed.specifier.contains(version, prereleases=True):
                yield Finding("FAIL", f"{needed.name} {version or 'is not installed'}", f"pip install '{needed}'")
            elif needed.name in SHOWN_PACKAGES:
                yield Finding("ok", f"{needed.name} {version}")
    if missing:
        text = f"{', '.join(missing)} not installed; apc train, evaluate and sweep need them, loading a run does not"
        yield Finding("note", text, f"pip install '{DISTRIBUTION}[train]'")


def check_gpu() -> Iterator[Finding]:
    """Each GPU that torch sees: its free memory, and whether the kernels run on it and give the right result."""
    import torch

    if not torch.cuda.is_available():
        why = f"torch (CUDA {torch.version.cuda}) sees none; look at `nvidia-smi` and CUDA_VISIBLE_DEVICES"
        if torch.version.cuda is None:
            why = "torch is built without CUDA"
        advice = "everything runs on the CPU, slowly; if there is an NVIDIA GPU, install a torch with CUDA"
        yield Finding("note", f"no GPU, {why}", advice)
        return
    for index in range(torch.cuda.device_count()):
        device, name = torch.device("cuda", index), torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(device)
        memory = f"GPU {index}: {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield (
            Finding("ok", memory)
            if free > total // 2
            else Finding("note", memory, "another process uses most of it; see `nvidia-smi`")
        )
        try:
            right = _kernels_are_right(device)
        except Exception as error:  # any error at all means that kernels do not run
            failed = f"GPU {index}: kernels do not run ({first_line(error)})"
            yield Finding("FAIL", failed, "update the driver, or use model.device=cpu")
            continue
        yield (
            Finding("ok", f"GPU {index}: kernels are right")
            if right
            else Finding("FAIL", f"GPU {index}: kernels give wrong results", "try another GPU; report this output")
        )


def _kernels_are_right(device: "torch.device") -> bool:
    """Whether two kernels give the CPU's results."""
    import torch

    from apc import ops

    active = torch.rand(300, 130, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = ops.pack(active)
    counts = ops.popcount(ops.pack(active.to(device))).cpu()
    ids = ops.assign(rows.to(device), rows[:7].to(device))[0].cpu()
    return torch.equal(counts, active.sum(1, dtype=torch.int32)) and torch.equal(ids, ops.assign(rows, rows[:7])[0])


def check_disk(cfg: Config) -> Iterator[Finding]:
    """The folders that a run writes to."""
    for key, folder in (
        ("run.dir", Path(cfg.run.dir)),
        ("collect.dir", store_folder(cfg.collect)),
        ("APC_CACHE", wheels.cache_dir()),
    ):
        another = f"choose another folder with {key}=FOLDER"
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        try:
            with tempfile.NamedTemporaryFile(dir=existing):
                pass
        except OSError as error:
            yield Finding("FAIL", f"{folder} can't be written ({error.strerror})", another)
            continue
        free = shutil.disk_usage(existing).free
        space = f"{folder}: {free / 2**30:.1f} GiB free"
        advice = f"make room, or {another}; `--dry-run` estimates how much a run needs"
        yield Finding("ok", space) if free > LOW_DISK_SPACE else Finding("note", space, advice)


def check_cache(cfg: Config) -> Iterator[Finding]:
    """Collected patterns, and the bundled models and text."""
    folder = store_folder(cfg.collect)
    paths = cache.stores(folder) if folder.is_dir() else []
    partial = [path for path in paths if path.suffix == ".partial"]
    size = sum(map(cache.size, paths)) / 2**30
    counts = f"{len(paths) - len(partial)} stores, {len(partial)} interrupted"
    yield Finding("ok", f"collected patterns: {counts}, {size:.2f} GiB in {folder}")
    places = {f"model {model.name}": model.folder for model in bundled.MODELS.values()}
    for name, path in (places | {"text": wheels.cache_dir() / bundled.TEXT_FILE}).items():
        yield (
            Finding("ok", f"bundled {name}: in {path}")
            if path.exists()
            else Finding("note", f"bundled {name}: not fetched yet", "the first run that needs it gets it from PyPI")
        )


def check_services() -> Iterator[Finding]:
    """W&B and the Hugging Face hub. A run needs neither."""
    if installed_version("wandb") is not None:
        from apc.run.tracking import choose_mode, is_wandb_failure, one_line

        later = "`wandb login` puts runs online; `wandb sync runs/NAME/wandb` uploads one later"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mode = choose_mode("auto")
        except Exception as error:
            if not is_wandb_failure(error):
                raise
            yield Finding("note", f"W&B: can't start ({one_line(error)})", "correct its WANDB_ variables or settings")
        else:
            advice = {"online": "", "offline": later, "disabled": "WANDB_MODE says so"}[mode]
            yield Finding("ok" if mode == "online" else "note", f"W&B: {mode}", advice)
    if hub.hub_reachable():
        yield Finding("ok", "Hugging Face hub: reachable")
        return
    cached = "models and data sets by id come from the local cache; or give folders and files"
    advice = "HF_HUB_OFFLINE says so" if os.environ.get("HF_HUB_OFFLINE") else cached
    yield Finding("note", "Hugging Face hub: not reachable", advice)


def main(words: list[str] | None = None) -> None:
    """The command `apc doctor`. words: its arguments; None: those of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="apc doctor", description=__doc__, formatter_class=raw)
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides, as for train.py")
    failed = 0
    cfg = load_config(None, parser.parse_args(words).words)
    for finding in chain(check_python(), check_gpu(), check_disk(cfg), check_cache(cfg), check_services()):
        print(finding.line(), flush=True)
        failed += finding.level == "FAIL"
    if failed:
        print(f"{failed} checks failed", file=sys.stderr)
        sys.exit(1)
