"""Files that appear whole or not at all, and our own kind: safetensors whose metadata carries a JSON header, checked when read."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from apc.errors import UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: under another name, flushed to the disk, then renamed. When it returns, no crash takes the file back."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
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


def save_tensors(path: Path, kind: str, version: int, header: dict, tensors: dict[str, Tensor]) -> None:
    """Writes tensors and a JSON header; `kind` and `version` say what the file is."""
    metadata = {"format": kind, "version": str(version), "header": json.dumps(header)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata))


def load_tensors(path: Path, kind: str, version: int) -> tuple[dict, dict[str, Tensor]]:
    """(header, tensors). Raises UserError, naming the file, if it is missing, damaged, or of another kind or version."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise UserError(f"{path}: not an {kind} file")
            if metadata.get("version") != str(version):
                raise UserError(f"{path}: {kind} version {metadata.get('version')}, this program reads {version}; make it again")
            return json.loads(metadata["header"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}); make it again, or restore it from a copy") from error
