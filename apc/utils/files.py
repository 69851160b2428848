"""Files that appear whole or not at all, and our own kind: safetensors whose metadata carries a JSON header, checked when read."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apc.utils.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk says that takes no more


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: under another name, flushed to the disk, then renamed. When it returns, no crash takes the file back.

    Raises UserError, naming the file, where the disk is full.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within it a new file is written whole, and flushed, under the name that it gives; then it takes `path`'s place. Raises UserError, naming the file,
    where the disk is full; then the old one stands and nothing is left of the new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        raise UserError(
            f"{path}: can't be written ({error.strerror}); make room, and run the same command again"
        ) from error
    replace_durably(temporary, path)


def replace_durably(temporary: Path, path: Path) -> None:
    """Gives a file (or folder) that is on the disk its name, and waits until the name is there too."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
