"""Safetensors files with a JSON header and a checksum, both checked when the file is read."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from apc.utils.errors import UserError, first_line
from apc.utils.files import write_atomic


def raw_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor, without its shape and type."""
    flat = value.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def save_tensors(path: Path, kind: str, version: int, header: dict, tensors: dict[str, Tensor]) -> None:
    """Writes tensors and a JSON header, with a checksum over both. `kind` and `version` say what the file is."""
    on_host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(header)
    metadata = {"format": kind, "version": str(version), "header": text, "sha256": _digest(text, on_host)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(on_host, metadata))


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(raw_bytes(value))
    return digest.hexdigest()


def load_tensors(
    path: Path, kind: str, versions: tuple[int, ...], old_names: dict[str, str] | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """Header and tensors of a file that `save_tensors` wrote in one of `versions`.

    old_names: header entries to rename, old to new. Raises UserError, naming the file, if it is missing, damaged, or of
    another kind or version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise UserError(f"{path}: not an {kind} file")
            readable = [str(version) for version in versions]
            if metadata.get("version") not in readable:
                raise UserError(
                    f"{path}: {kind} version {metadata.get('version')}, this program reads {' and '.join(readable)}; "
                    "make it again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if _digest(metadata["header"], tensors) != metadata["sha256"]:
                raise ValueError("checksum mismatch")
            header = json.loads(metadata["header"])
            if old_names and isinstance(header, dict):
                header = {old_names.get(name, name): value for name, value in header.items()}
            return header, tensors
    except (SafetensorError, ValueError, KeyError, RecursionError, OSError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); make it again, or restore it from a copy") from error


def wrong_field(header: object, kinds: dict[str, type | tuple[type, ...]]) -> str | None:
    """Describes the first header entry of a wrong type, else None. An int passes as a float, a bool not as an int."""
    if not isinstance(header, dict):
        return f"the header is {header!r}"[:100]
    for name, kind in kinds.items():
        value, allowed = header.get(name), kind if isinstance(kind, tuple) else (kind,)
        if name in header and not (type(value) in allowed or (type(value) is int and float in allowed)):
            return f"{name} is {value!r}"[:100]
    return None


def digest_of(value: object) -> str:
    """The sha256 of nested dictionaries, lists and tuples of tensors and plain values."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)};".encode())
            digest.update(raw_bytes(value))
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)};".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(f"{type(value).__name__} {len(value)};".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{type(value).__name__} {value!r};".encode())

    add(value)
    return digest.hexdigest()
