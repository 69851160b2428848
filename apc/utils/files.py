"""Files that are written whole or not at all, and locks between processes."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from apc.utils.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # error numbers of a disk that is full


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; it then survives a crash. Raises UserError if the disk is full."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path. The block writes and flushes a file there, which then replaces `path`.

    Raises UserError, naming the file, if the disk is full; the old file then stays and the temporary one is deleted.
    """
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
    """Renames a file or folder that is on the disk already, and waits until the new name is on the disk too."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_lock(path: Path, message: str) -> Iterator[None]:
    """Locks the file `path` during the block. The lock ends with the process, however that ends; the file stays.

    Raises UserError(message) at once if another process has the lock, and OSError if the file can't be written.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(message) from error
    try:
        yield
    finally:
        lock.release()
