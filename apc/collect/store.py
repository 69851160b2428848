"""Patterns on disk: shards of .npy files and a manifest, named by a hash of the settings that decide their content.

<folder>/<key>-<fields>/manifest.json                 shapes, settings, and size and sha256 of each file
<folder>/<key>-<fields>/00000-patterns.neuron.npy …   [L, tokens of the shard, …]
<folder>/<key>-<fields>.partial/                      unfinished; a later run collects the missing shards
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apc.collect.manifest import (
    COUNTS,
    DTYPES,
    FORMAT,
    OF_FFNS,
    Damaged,
    file_problem,
    manifest_checksum,
    read_manifest,
)
from apc.collect.patterns import ActiveRule, Block, PatternInfo, PatternSource, activity
from apc.config.schema import CollectConfig
from apc.utils import distributed, wheels
from apc.utils.errors import UserError, first_line
from apc.utils.files import FULL, exclusive_lock, replace_durably, sync_folder, write_atomic

PARTIAL = ".partial"
THRESHOLDS = "thresholds.json"  # file in a partial store
SHARD_BYTES = 256 << 20  # large enough for long sequential reads, small enough that an interruption loses seconds


def store_key(identity: dict) -> str:
    """16 hex digits of a hash of the settings that decide a store's content."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def find_store(folder: Path, info: PatternInfo) -> Path | None:
    """A complete store of these patterns with at least the fields of `info`; None if there is none."""
    for path in sorted(folder.glob(f"{store_key(info.identity)}-*")):
        complete = not path.name.endswith(PARTIAL) and (path / "manifest.json").is_file()
        if complete and set(_field_letters(info)) <= set(path.name.rpartition("-")[2]):
            return path
    return None


def _field_letters(info: PatternInfo) -> str:
    return "p" + "i" * info.with_importance + "h" * info.with_hidden  # patterns, importances, FFN inputs


def shard_windows(info: PatternInfo) -> int:
    """Windows in a shard."""
    return max(1, SHARD_BYTES // (info.bytes_per_token() * info.seq_len))


def store_bytes(info: PatternInfo) -> int:
    """Bytes of a store's arrays: the rows, and each shard's counts of active neurons. Excludes headers and manifest."""
    shards = len(_shard_ranges(info.windows, shard_windows(info)))
    counts = shards * info.layers * sum(info.widths.values()) * torch.int64.itemsize
    return info.bytes_per_token() * info.tokens + counts


class StoreWriter:
    """Writes shards into a partial folder, each whole or not at all, and renames the folder after the last one."""

    def __init__(self, folder: Path, info: PatternInfo):
        self.info = info
        self.path = folder / f"{store_key(info.identity)}-{_field_letters(info)}"
        self.partial = self.path.with_name(self.path.name + PARTIAL)
        self.shards = _shard_ranges(info.windows, shard_windows(info))
        self.entries = [self.partial / f"{index:05d}.json" for index in range(len(self.shards))]

    def prepare(self) -> None:
        """Creates the partial folder. Raises UserError unless the missing shards fit on the disk."""
        if self.path.exists():
            raise UserError(f"{self.path}: has no manifest; {repair(self.path)}")
        self.partial.mkdir(parents=True, exist_ok=True)
        missing = sum(last - first for first, last in self.missing()) * self.info.seq_len * self.info.bytes_per_token()
        free = shutil.disk_usage(self.partial).free
        if missing > free:
            raise UserError(
                f"{self.partial.parent}: the patterns need {_gib(missing)} and {_gib(free)} are free; "
                "make room, lower data.fit_windows, or choose collect.dir=FOLDER, collect.ffn_inputs=streamed "
                "or collect.storage=memory"
            )

    def thresholds(self, calibrate: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The thresholds that the earlier shards used; if none are saved, calibrates and saves them.

        Call on all ranks.
        """
        path = self.partial / THRESHOLDS
        saved = path.is_file()
        distributed.barrier()  # until all ranks have looked
        if saved:
            return {site: torch.tensor(values) for site, values in json.loads(path.read_text()).items()}
        thresholds = calibrate()
        if distributed.is_main():
            write_atomic(path, json.dumps({site: values.tolist() for site, values in thresholds.items()}).encode())
        return thresholds

    def missing(self) -> list[tuple[int, int]]:
        """Window ranges of the shards that are not written yet."""
        return [shard for shard, entry in zip(self.shards, self.entries, strict=True) if not entry.is_file()]

    def add(self, block: Block) -> None:
        """Writes `block` as one shard, and its entry last, so that a shard with an entry is complete.

        Raises UserError on a full disk.
        """
        index = next(i for i, (first, _) in enumerate(self.shards) if first == block.first_window)
        counts = {f"activity.{site}": value for site, value in activity(block, self.info).items()}
        named = {f"{index:05d}-{name}.npy": value for name, value in (block.tensors() | counts).items()}
        try:
            files = {name: _write_array(self.partial / name, value) for name, value in named.items()}
            sync_folder(self.partial)  # no entry without its arrays
            entry = {"windows": self.shards[index], "files": files}
            write_atomic(self.entries[index], json.dumps(entry).encode())
        except OSError as error:
            if error.errno not in FULL:
                raise
            for path in self.partial.glob(f"{index:05d}-*"):
                path.unlink()
            kept = len(self.shards) - len(self.missing())
            raise UserError(
                f"{self.partial}: the disk is full; {kept} of {len(self.shards)} shards are kept; make room, and the "
                "same command goes on from there (or choose collect.dir=FOLDER)"
            ) from error

    def finish(self, source: dict[str, str]) -> Path:
        """Writes the manifest and renames the store. source: names of model and text, for listings."""
        info = self.info
        manifest = {
            "format": "apc-patterns",
            "version": FORMAT,
            "identity": info.identity,
            "source": source,
            **{key: getattr(info, key) for key in (*COUNTS, *OF_FFNS, "widths")},
            "fields": info.fields(),
            "active": info.rule.kind,
            "sparsity": info.rule.sparsity,
            "thresholds": {site: values.tolist() for site, values in info.rule.thresholds.items()},
            "shards": [json.loads(entry.read_text()) for entry in self.entries],
        }
        manifest["checksum"] = manifest_checksum(manifest)
        write_atomic(self.partial / "manifest.json", json.dumps(manifest, indent=1).encode())
        replace_durably(self.partial, self.path)
        for entry in [*self.entries, self.partial / THRESHOLDS]:
            (self.path / entry.name).unlink(missing_ok=True)
        return self.path


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _shard_ranges(windows: int, each: int) -> list[tuple[int, int]]:
    return [(first, min(first + each, windows)) for first in range(0, windows, each)]


def collecting(folder: Path, info: PatternInfo) -> AbstractContextManager:
    """Locks one store while it is collected. Raises UserError if another process has the lock."""
    return _lock(folder, store_key(info.identity)) if distributed.is_main() else nullcontext()


def _lock(folder: Path, key: str) -> ExitStack:
    path, lock = folder / f"{key}.lock", ExitStack()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        busy = f"{path}: another process is collecting these patterns; wait for it, then run this again"
        lock.enter_context(exclusive_lock(path, busy))
    except OSError as error:
        raise UserError(
            f"{path}: can't be written ({error.strerror}); choose another folder with collect.dir=FOLDER"
        ) from error
    return lock


def repair(path: Path) -> str:
    """The end of an error message: what to do about a damaged store."""
    return (
        f"run `apc cache repair {path.name} --dir {path.parent}`; "
        "the same train.py command then collects the damaged shards again"
    )


def reopen(path: Path) -> tuple[list[int], int]:
    """Turns a damaged store into a partial one, so that collecting replaces its damaged shards.

    Returns the indices of the damaged shards, and the number of all shards. If the manifest is damaged, the
    content of the other files is unknown; the function then deletes the store and returns ([], 0). Raises UserError
    if the store does not exist, is of another format, can't be read, or is being collected.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such store; `apc cache` lists them")
    with _lock(path.parent, path.name.rpartition("-")[0]):
        try:
            shards = read_manifest(path)["shards"]
        except Damaged:
            shutil.rmtree(path)
            return [], 0
        damaged = []
        for index, shard in enumerate(shards):
            entry = path / f"{index:05d}.json"
            if any(file_problem(path / name, file, True) for name, file in shard["files"].items()):
                damaged.append(index)
                entry.unlink(missing_ok=True)
            else:
                write_atomic(entry, json.dumps(shard).encode())
        partial = path.with_name(path.name + PARTIAL)
        replace_durably(path, partial)
        (partial / "manifest.json").unlink()
        return damaged, len(shards)


def _write_array(path: Path, value: Tensor) -> dict:
    """Writes a tensor as .npy, whole or not at all. Returns its entry in the manifest."""
    value = value.detach().cpu().contiguous()
    array = (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    data = array.reshape(-1).view(np.uint8).data
    digest = hashlib.sha256(header.getvalue())
    digest.update(data)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(header.getvalue())
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return {
        "sha256": digest.hexdigest(),
        "bytes": header.tell() + array.nbytes,
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class _Array:
    """Where an array's data is in its .npy file. offset: position of the data's first byte."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @classmethod
    def of(cls, path: Path) -> "_Array":
        """Reads the file's header. Raises ValueError unless the file is an array of numbers in C order."""
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f".npy version {version}")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(file)
            if dtype.hasobject or fortran_order:
                raise ValueError("objects, or Fortran order")
            return cls(path, shape, dtype, file.tell())

    def mapped(self) -> np.ndarray:
        """The array, mapped into memory; an empty file can't be mapped."""
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def _tensor(name: str, array: np.ndarray) -> Tensor:
    value = torch.from_numpy(array)
    return value.view(torch.bfloat16) if name == "hidden" else value


class PatternStore(PatternSource):
    """A complete store.

    Opening it checks that every file exists and has the right size and, unless verify=False, the right sha256. Raises
    UserError, naming the file that is wrong.
    """

    def __init__(self, path: Path, verify: bool = True):
        self.path = path
        try:
            manifest = read_manifest(path)
        except Damaged as error:
            raise UserError(f"{path / 'manifest.json'}: {error}; {repair(path)}") from error
        self._shards: list[dict] = manifest["shards"]
        # Stores where arrays are instead of memory maps: a map per array would exceed the limit of open files.
        self._arrays: dict[str, _Array] = {}
        for shard in self._shards:
            for name, entry in shard["files"].items():
                if problem := file_problem(path / name, entry, verify):
                    raise UserError(f"{path / name}: {problem}; {repair(path)}")
        thresholds = {site: torch.tensor(values) for site, values in manifest["thresholds"].items()}
        self.info = PatternInfo(
            **{key: manifest[key] for key in (*COUNTS, "widths", "identity")},
            rule=ActiveRule(manifest["active"], manifest["sparsity"], thresholds),
            with_importance=any(name.startswith("importance") for name in manifest["fields"]),
            with_hidden="hidden" in manifest["fields"],
            **{key: manifest.get(key, value) for key, value in OF_FFNS.items()},
            activity={site: self._activity(site) for site in manifest["widths"]},
        )

    def _activity(self, site: str) -> Tensor:
        arrays = (self._array(index, f"activity.{site}").mapped() for index in range(len(self._shards)))
        return torch.from_numpy(sum(arrays))

    def _array(self, index: int, name: str) -> "_Array":
        """Where a shard's field `name` is. Raises UserError if its file is damaged or does not fit the manifest."""
        file = f"{index:05d}-{name}.npy"
        if file not in self._arrays:
            entry = self._shards[index]["files"][file]
            try:
                array = _Array.of(self.path / file)
            except (ValueError, EOFError) as error:
                raise UserError(f"{self.path / file}: damaged ({first_line(error)}); {repair(self.path)}") from error
            except OSError as error:
                raise UserError(
                    f"{self.path / file}: can't be read ({error.strerror}); check the disk, then run this again"
                ) from error
            end = array.offset + math.prod(array.shape) * array.dtype.itemsize
            if (list(array.shape), array.dtype, end) != (entry["shape"], DTYPES[entry["dtype"]], entry["bytes"]):
                raise UserError(
                    f"{self.path / file}: an array of {array.dtype} {list(array.shape)} in {end} bytes, "
                    f"the manifest says {entry['dtype']} {entry['shape']} in {entry['bytes']}; {repair(self.path)}"
                )
            self._arrays[file] = array
        return self._arrays[file]

    def _read_slice(self, index: int, name: str, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of a shard's array.

        It reads instead of memory-mapping, because mapped pages are loaded one by one and count as this process's
        memory.
        """
        array = self._array(index, name)
        result = np.empty((array.shape[0], end - begin, *array.shape[2:]), array.dtype)
        row_bytes = array.dtype.itemsize * math.prod(array.shape[2:])
        with open(array.path, "rb", buffering=0) as file:
            for layer in range(len(result) if end > begin else 0):
                file.seek(array.offset + (layer * array.shape[1] + begin) * row_bytes)
                target = result[layer].reshape(-1).view(np.uint8).data
                if file.readinto(target) != len(target):
                    raise UserError(f"{array.path}: truncated since it was opened; {repair(self.path)}")
        return result

    def block(self, first: int, last: int, fields: list[str]) -> Block:
        """See `PatternSource`."""
        S = self.info.seq_len
        parts: dict[str, list[Tensor]] = {name: [] for name in fields}
        for index, shard in enumerate(self._shards):
            shard_first, shard_last = shard["windows"]
            begin, end = max(first, shard_first), min(last, shard_last)
            if begin < end or (first == last and index == 0):
                rows = (begin - shard_first) * S, (max(begin, end) - shard_first) * S
                for name in fields:
                    parts[name].append(_tensor(name, self._read_slice(index, name, *rows)))
        named = {name: values[0] if len(values) == 1 else torch.cat(values, dim=1) for name, values in parts.items()}
        return Block.of_windows(named, range(first, last), S)

    def rows(self, name: str, layers: Tensor, tokens: Tensor) -> Tensor:
        """See `PatternSource`."""
        S = self.info.seq_len
        layers, tokens = layers.cpu(), tokens.cpu()
        (_, n, *row_shape), dtype = self.info.field(name, len(tokens))
        result = torch.empty(n, *row_shape, dtype=dtype)
        for index, shard in enumerate(self._shards):
            first, last = (window * S for window in shard["windows"])
            inside = ((tokens >= first) & (tokens < last)).nonzero().flatten()
            if len(inside):
                array = self._array(index, name).mapped()
                rows = array[layers[inside].numpy(), (tokens[inside] - first).numpy()]
                result[inside] = _tensor(name, rows)
        return result


def store_folder(cfg: CollectConfig) -> Path:
    """The folder of all stores: `collect.dir`, else `patterns` in the cache."""
    return Path(cfg.dir).expanduser() if cfg.dir else wheels.cache_dir() / "patterns"
