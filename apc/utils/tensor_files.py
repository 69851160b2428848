"""Safetensors files with a JSON header and a checksum, checked when they are read."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from apc.utils.errors import UserError
from apc.utils.files import write_atomic


def save_tensors(path: Path, kind: str, version: int, header: dict, tensors: dict[str, Tensor]) -> None:
    """Writes tensors and a JSON header; `kind` and `version` say what the file is, and a checksum that it is still that."""
    held, said = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, json.dumps(header)
    metadata = {"format": kind, "version": str(version), "header": said, "sha256": _digest(said, held)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(held, metadata))


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_tensors(
    path: Path, kind: str, versions: tuple[int, ...], old_names: dict[str, str] | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """(header, tensors) of a file of one of these versions; `old_names` of header entries become the new ones.

    Raises UserError, naming the file, if it is missing, damaged, or of another kind or version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise UserError(f"{path}: not an {kind} file")
            if metadata.get("version") not in map(str, versions):
                raise UserError(
                    f"{path}: {kind} version {metadata.get('version')}, this program reads {' and '.join(map(str, versions))}; make it again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if _digest(metadata["header"], tensors) != metadata["sha256"]:
                raise UserError(
                    f"{path}: damaged (it does not hold what its checksum says); make it again, or restore it from a copy"
                )
            header = json.loads(metadata["header"])
            if old_names and isinstance(header, dict):
                header = {old_names.get(name, name): value for name, value in header.items()}
            return header, tensors
    except (SafetensorError, ValueError, KeyError, RecursionError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: damaged ({reason}); make it again, or restore it from a copy") from error


def wrong_field(header: object, kinds: dict[str, type | tuple[type, ...]]) -> str | None:
    """The first entry of a header that is not of its kind; None if all that are there are. A bool is no int, and a whole number is a float."""
    if not isinstance(header, dict):
        return f"the header is {header!r}"[:100]
    for name, kind in kinds.items():
        value, wanted = header.get(name), kind if isinstance(kind, tuple) else (kind,)
        if name in header and not (type(value) in wanted or (type(value) is int and float in wanted)):
            return f"{name} is {value!r}"[:100]
    return None


def digest_of(value: object) -> str:
    """A sha256 of nested dictionaries, lists and tuples of tensors and plain values."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            held = value.detach().cpu().contiguous()
            digest.update(f"{held.dtype} {tuple(held.shape)};".encode())
            digest.update(held.view(-1).view(torch.uint8).numpy() if held.numel() else b"")
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)};".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, (list, tuple)):
            digest.update(f"{type(value).__name__} {len(value)};".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{type(value).__name__} {value!r};".encode())

    add(value)
    return digest.hexdigest()
