"""Patterns on disk: shards of .npy files beside a manifest, found again by a hash of what decided their content.

<folder>/<key>-<fields>/manifest.json            what the store holds, and each file's size and sha256
<folder>/<key>-<fields>/00000-patterns.neuron.npy …   [L, tokens of the shard, …]
<folder>/<key>-<fields>.partial/                 being collected; a later run goes on after the last whole shard
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apc.collect.manifest import DTYPES, FORMAT, Damaged, file_problem, manifest_checksum, read_manifest
from apc.collect.patterns import ActiveRule, Block, PatternInfo, activity
from apc.config.schema import CollectConfig
from apc.utils import distributed, wheels
from apc.utils.errors import UserError
from apc.utils.files import FULL, replace_durably, sync_folder, write_atomic

PARTIAL = ".partial"
THRESHOLDS = "thresholds.json"  # of a partial store
SHARD_BYTES = 256 << 20  # large enough for long sequential reads, small enough that an interrupted run loses seconds


def store_key(identity: dict) -> str:
    """16 hex digits that stand for what decides a store's content."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def find_store(folder: Path, info: PatternInfo) -> Path | None:
    """A complete store of these patterns that has at least the fields of `info`."""
    key, needed = store_key(info.identity), _field_letters(info)
    for path in sorted(folder.glob(f"{key}-*")):
        if (
            not path.name.endswith(PARTIAL)
            and (path / "manifest.json").is_file()
            and set(needed) <= set(path.name.rpartition("-")[2])
        ):
            return path
    return None


def _field_letters(info: PatternInfo) -> str:
    return "p" + "i" * info.with_importance + "h" * info.with_hidden


def shard_windows(info: PatternInfo) -> int:
    return max(1, SHARD_BYTES // (info.bytes_per_token() * info.seq_len))


def store_bytes(info: PatternInfo) -> int:
    """Bytes of a store's arrays: rows, and how often each neuron was active in each shard. Without the files' headers and the manifest."""
    shards = len(_shard_ranges(info.windows, shard_windows(info)))
    return (
        info.bytes_per_token() * info.tokens + shards * info.layers * sum(info.widths.values()) * torch.int64.itemsize
    )


class StoreWriter:
    """Writes shards into a partial folder, each whole or not at all, and gives the folder its name when the last one is there.

    Raises UserError where the disk has too little room, before anything is written, or runs full on the way.
    """

    def __init__(self, folder: Path, info: PatternInfo):
        self.info = info
        self.path = folder / f"{store_key(info.identity)}-{_field_letters(info)}"
        self.partial = self.path.with_name(self.path.name + PARTIAL)
        self.shards = _shard_ranges(info.windows, shard_windows(info))

    def prepare(self) -> None:
        """Makes the partial folder and checks that what is missing fits the disk."""
        if self.path.exists():
            raise UserError(f"{self.path}: has no manifest; {repair(self.path)}")
        self.partial.mkdir(parents=True, exist_ok=True)
        missing = sum(last - first for first, last in self.missing()) * self.info.seq_len * self.info.bytes_per_token()
        free = shutil.disk_usage(self.partial).free
        if missing > free:
            raise UserError(
                f"{self.partial.parent}: the patterns need {_gib(missing)} and {_gib(free)} are free; make room, lower data.fit_windows, "
                "or choose collect.dir=FOLDER, collect.ffn_inputs=streamed or collect.storage=memory"
            )

    def thresholds(self, calibrate: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Those that the shards there were collected with, else calibrated now and kept; to be called on all ranks."""
        path = self.partial / THRESHOLDS
        kept = path.is_file()
        distributed.barrier()  # all have looked
        if kept:
            return {site: torch.tensor(values) for site, values in json.loads(path.read_text()).items()}
        found = calibrate()
        if distributed.is_main():
            write_atomic(path, json.dumps({site: values.tolist() for site, values in found.items()}).encode())
        return found

    def missing(self) -> list[tuple[int, int]]:
        """Window ranges of the shards that are not there yet."""
        return [shard for index, shard in enumerate(self.shards) if not self._entry_path(index).is_file()]

    def _entry_path(self, index: int) -> Path:
        return self.partial / f"{index:05d}.json"

    def add(self, block: Block) -> None:
        """Writes the shard that `block` is. Its entry comes last, so a shard with an entry is whole."""
        index = next(i for i, (first, _) in enumerate(self.shards) if first == block.first_window)
        named = block.tensors() | {
            f"activity.{site}": counts for site, counts in activity(block, self.info.widths).items()
        }
        try:
            files = {
                f"{index:05d}-{name}.npy": _write_array(self.partial / f"{index:05d}-{name}.npy", value)
                for name, value in named.items()
            }
            sync_folder(self.partial)  # no entry without its arrays
            write_atomic(
                self._entry_path(index), json.dumps({"windows": list(self.shards[index]), "files": files}).encode()
            )
        except OSError as error:
            if error.errno not in FULL:
                raise
            for path in self.partial.glob(f"{index:05d}-*"):
                path.unlink()
            raise UserError(
                f"{self.partial}: the disk is full; {index} of {len(self.shards)} shards are kept and the same command goes on from there "
                "once there is room (or choose collect.dir=FOLDER)"
            ) from error

    def finish(self) -> Path:
        """Writes the manifest and gives the store its name."""
        info = self.info
        manifest = {
            "format": "apc-patterns", "version": FORMAT, "identity": info.identity, "layers": info.layers,
            "hidden_size": info.hidden_size, "ffn_width": info.ffn_width,
            "windows": info.windows, "seq_len": info.seq_len, "widths": info.widths, "fields": info.fields(),
            "active": info.rule.kind, "sparsity": info.rule.sparsity,
            "thresholds": {site: values.tolist() for site, values in info.rule.thresholds.items()},
            "shards": [json.loads(self._entry_path(index).read_text()) for index in range(len(self.shards))],
        }  # fmt: skip
        manifest["checksum"] = manifest_checksum(manifest)
        write_atomic(self.partial / "manifest.json", json.dumps(manifest, indent=1).encode())
        replace_durably(self.partial, self.path)
        for name in [self._entry_path(index).name for index in range(len(self.shards))] + [THRESHOLDS]:
            (self.path / name).unlink(missing_ok=True)
        return self.path


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _shard_ranges(windows: int, each: int) -> list[tuple[int, int]]:
    return [(first, min(first + each, windows)) for first in range(0, windows, each)]


@contextmanager
def collecting(folder: Path, info: PatternInfo):
    """Holds the lock on one store while it is collected. Raises UserError if another process holds it."""
    if not distributed.is_main():
        yield
        return
    with _locked(folder, store_key(info.identity)):
        yield


@contextmanager
def _locked(folder: Path, key: str):
    path = folder / f"{key}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115, closed by the `with` below
    except OSError as error:
        raise UserError(
            f"{path}: can't be written ({error.strerror}); choose another folder with collect.dir=FOLDER"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{path}: another process is collecting these patterns; wait for it, then run this again"
            ) from error
        yield


def repair(path: Path) -> str:
    """What to do about a damaged store."""
    return f"`apc cache repair {path.name} --dir {path.parent}`, and the same train.py command collects what is damaged again"


def reopen(path: Path) -> tuple[list[int], int]:
    """Makes a damaged store a partial one, without its damaged shards: collecting goes on with those. (Their numbers, how many there are in all.)

    A store whose manifest is damaged is deleted: nothing says what it holds. Raises UserError if the store is not there, is of another format, can't be
    read, or is being collected.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such store; `apc cache` lists them")
    with _locked(path.parent, path.name.rpartition("-")[0]):
        try:
            shards = read_manifest(path)["shards"]
        except Damaged:
            shutil.rmtree(path)
            return [], 0
        damaged = [
            index
            for index, shard in enumerate(shards)
            if any(file_problem(path / name, entry, True) for name, entry in shard["files"].items())
        ]
        for index, shard in enumerate(shards):
            entry = path / f"{index:05d}.json"
            if index in damaged:
                entry.unlink(missing_ok=True)
            else:
                write_atomic(entry, json.dumps(shard).encode())
        partial = path.with_name(path.name + PARTIAL)
        replace_durably(path, partial)
        (partial / "manifest.json").unlink()
        return damaged, len(shards)


class _HashingFile:
    """Writes through to a file and notes the sha256 and length of what passes."""

    def __init__(self, file):
        self._file, self.digest, self.length = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        self.digest.update(data)
        self.length += len(data)
        return self._file.write(data)


def _write_array(path: Path, value: Tensor) -> dict:
    """Writes a tensor as .npy, whole or not at all; returns what the manifest says of it."""
    value = value.detach().cpu().contiguous()
    array = (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        hashing = _HashingFile(file)
        np.lib.format.write_array(hashing, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return {
        "sha256": hashing.digest.hexdigest(),
        "bytes": hashing.length,
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class _Shard:
    first: int
    last: int
    files: dict


@dataclass(frozen=True)
class _Array:
    """Where an array lies in its .npy file. end: of its last byte."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @classmethod
    def of(cls, path: Path) -> "_Array":
        """Raises ValueError for what is no array of numbers, row by row."""
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f".npy version {version}")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(file)
            if dtype.hasobject or by_columns:
                raise ValueError("objects, or columns first")
            return cls(path, shape, dtype, file.tell())

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def mapped(self) -> np.ndarray:
        return (
            np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
            if math.prod(self.shape)
            else np.empty(self.shape, self.dtype)
        )


class PatternStore:
    """A collected store. Opening checks every file's presence, size and (unless verify=False) sha256, and names the one that is wrong."""

    resident = None

    def __init__(self, path: Path, verify: bool = True):
        self.path = path
        try:
            manifest = read_manifest(path)
        except Damaged as problem:
            raise UserError(f"{path / 'manifest.json'}: {problem}; {repair(path)}") from problem
        self._shards = [_Shard(*entry["windows"], entry["files"]) for entry in manifest["shards"]]
        self._arrays: dict[
            str, _Array
        ] = {}  # where they lie: a map held open for each would use up a process's open files
        for shard in self._shards:
            for name, entry in shard.files.items():
                problem = file_problem(path / name, entry, verify)
                if problem:
                    raise UserError(f"{path / name}: {problem}; {repair(path)}")
        rule = ActiveRule(
            manifest["active"], manifest["sparsity"], {s: torch.tensor(v) for s, v in manifest["thresholds"].items()}
        )
        activity_sums = {
            site: sum(
                torch.from_numpy(self._array(i, f"activity.{site}").mapped().copy()) for i in range(len(self._shards))
            )
            for site in manifest["widths"]
        }
        self.info = PatternInfo(
            manifest["layers"], manifest["hidden_size"], manifest["ffn_width"], manifest["windows"], manifest["seq_len"], manifest["widths"], rule,
            any(name.startswith("importance") for name in manifest["fields"]), "hidden" in manifest["fields"], manifest["identity"], activity_sums,
        )  # fmt: skip

    def _array(self, index: int, name: str) -> "_Array":
        file = f"{index:05d}-{name}.npy"
        if file not in self._arrays:
            entry = self._shards[index].files[file]
            try:
                array = _Array.of(self.path / file)
            except (ValueError, EOFError) as error:
                raise UserError(
                    f"{self.path / file}: damaged ({str(error).splitlines()[0]}); {repair(self.path)}"
                ) from error
            except OSError as error:
                raise UserError(
                    f"{self.path / file}: can't be read ({error.strerror}); check the disk, then run this again"
                ) from error
            if (
                list(array.shape) != entry["shape"]
                or array.dtype != DTYPES[entry["dtype"]]
                or array.end != entry["bytes"]
            ):
                raise UserError(
                    f"{self.path / file}: holds {array.dtype} {list(array.shape)}, not what the manifest says; {repair(self.path)}"
                )
            self._arrays[file] = array
        return self._arrays[file]

    def _tensor(self, index: int, name: str, array: np.ndarray) -> Tensor:
        value = torch.from_numpy(array)
        dtype = self._shards[index].files[f"{index:05d}-{name}.npy"]["dtype"]
        return value.view(torch.bfloat16) if dtype == "bfloat16" else value

    def _read_slice(self, index: int, name: str, begin: int, end: int) -> np.ndarray:
        """Tokens begin … end-1 of a shard's array. Read, not mapped: mapped pages are faulted in one by one and stay in this process."""
        array = self._array(index, name)
        result = np.empty((array.shape[0], end - begin, *array.shape[2:]), array.dtype)
        row_bytes = array.dtype.itemsize * math.prod(array.shape[2:])
        with open(array.path, "rb", buffering=0) as file:
            for layer in range(len(result) if end > begin else 0):
                file.seek(array.offset + (layer * array.shape[1] + begin) * row_bytes)
                wanted = memoryview(result[layer].reshape(-1).view(np.uint8))
                if file.readinto(wanted) != len(wanted):
                    raise UserError(f"{array.path}: truncated since it was opened; {repair(self.path)}")
        return result

    def host_fields(self, fields: list[str]) -> list[str]:
        return fields

    def block(self, first: int, last: int, fields: list[str]) -> Block:
        S = self.info.seq_len
        parts: dict[str, list[Tensor]] = {name: [] for name in fields}
        for index, shard in enumerate(self._shards):
            begin, end = max(first, shard.first), min(last, shard.last)
            if begin < end or (first == last and index == 0):
                rows = ((begin - shard.first) * S, (end - shard.first) * S) if begin < end else (0, 0)
                for name in fields:
                    parts[name].append(self._tensor(index, name, self._read_slice(index, name, *rows)))
        named = {name: values[0] if len(values) == 1 else torch.cat(values, dim=1) for name, values in parts.items()}
        return Block.of_windows(named, range(first, last), S)

    def rows(self, name: str, layers: Tensor, tokens: Tensor) -> Tensor:
        S = self.info.seq_len
        layers, tokens = layers.cpu(), tokens.cpu()
        result = None
        for index, shard in enumerate(self._shards):
            inside = ((tokens >= shard.first * S) & (tokens < shard.last * S)).nonzero().flatten()
            if result is not None and not len(inside):
                continue
            array = self._array(index, name).mapped()
            found = self._tensor(index, name, array[layers[inside].numpy(), (tokens[inside] - shard.first * S).numpy()])
            if result is None:
                result = torch.empty(len(tokens), *array.shape[2:], dtype=found.dtype)
            result[inside] = found
        return result


def store_folder(cfg: CollectConfig) -> Path:
    return Path(cfg.dir).expanduser() if cfg.dir else wheels.cache_dir() / "patterns"
