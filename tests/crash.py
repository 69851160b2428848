"""Simulates the content of a disk after a crash, when only flushed data is sure to be there.

`Disk` watches a folder while something writes to it. At each flush, rename and removal it records two worst cases of a
crash at that moment: all names are up to date, but contents that were not flushed are lost; and names are as when their
folder was last flushed. Folders themselves always survive.
"""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest

Image = dict[str, bytes]


class Disk:
    """images: contents of the folder after each possible crash, by file name."""

    def __init__(self, root: Path, counts):
        self.root, self.counts = root, counts
        self.images: list[Image] = []
        self._flushed: dict[int, bytes] = {}  # contents, by inode
        self._named: dict[int, dict[str, int]] = {}  # names in a folder at its last flush, by inode
        self._folders: set[int] = set()
        for folder, _, files in os.walk(root):
            self._note_folder(Path(folder))
            for name in files:
                self._note_file(Path(folder) / name)

    def _note_file(self, path: Path) -> None:
        self._flushed[path.stat().st_ino] = path.read_bytes()

    def _note_folder(self, path: Path) -> None:
        self._folders.add(path.stat().st_ino)
        self._named[path.stat().st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}

    def inside(self, path) -> bool:
        return Path(path).resolve().is_relative_to(self.root.resolve())

    def flushed(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if self.inside(path) and self.counts(path):
            (self._note_folder if path.is_dir() else self._note_file)(path)

    def note(self) -> None:
        """Records the two images of a crash now."""
        for image in (self._all_names(), self._flushed_names(self.root.stat().st_ino, "")):
            if not self.images or image not in self.images[-2:]:
                self.images.append(image)

    def _all_names(self) -> Image:
        paths = [path for path in self.root.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.root)): self._flushed.get(path.stat().st_ino, b"") for path in paths}

    def _flushed_names(self, folder: int, prefix: str) -> Image:
        image = {}
        for name, inode in self._named.get(folder, {}).items():
            if inode in self._folders:
                image |= self._flushed_names(inode, f"{prefix}{name}/")
            else:
                image[prefix + name] = self._flushed.get(inode, b"")
        return image


@contextmanager
def watched(root: Path, counts=lambda path: True):
    """Yields a `Disk` that watches the folder during the block.

    counts: whether a flush of this path counts, to test what happens without it.
    """
    disk = Disk(root, counts)
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "unlink", "mkdir")}

    def fsync(descriptor):
        disk.note()
        real["fsync"](descriptor)
        disk.flushed(descriptor)
        disk.note()

    def changing(name):
        def change(*arguments, **options):
            disk.note()
            result = real[name](*arguments, **options)
            if name == "mkdir" and disk.inside(arguments[0]):
                disk._note_folder(Path(arguments[0]))
                disk._note_folder(Path(arguments[0]).parent)
            disk.note()
            return result

        return change

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        for name in ("replace", "rename", "unlink", "mkdir"):
            patch.setattr(os, name, changing(name))
        yield disk
    disk.note()


def restore(image: Image, folder: Path) -> Path:
    """Writes the image into the folder."""
    for name, content in image.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
