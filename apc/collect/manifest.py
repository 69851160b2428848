"""The manifest of a pattern store: reading it, and checking that its entries and files are consistent."""

import hashlib
import json
from pathlib import Path

import numpy as np

from apc.config.schema import SITES
from apc.utils.errors import UserError, first_line

FORMAT = 2
COUNTS = "layers", "hidden_size", "ffn_width", "windows", "seq_len"  # entries that are whole numbers
OF_FFNS = {"projections": 3, "experts": 0, "slots": 0}  # whole numbers too, with defaults for stores that lack them
DTYPES = {
    "uint8": np.uint8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "float32": np.float32,
    "bfloat16": np.int16,
}


class Damaged(Exception):
    """A manifest that can't be used. The message says what is wrong with it."""


def read_manifest(path: Path) -> dict:
    """The manifest in a store's folder.

    Raises Damaged if anything in it differs from what `StoreWriter.finish` writes, and UserError if it can't be read
    from the disk or has another format.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except FileNotFoundError as error:
        raise Damaged("no such file; not a pattern store") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"damaged ({first_line(error)})") from error
    except OSError as error:
        raise UserError(
            f"{path / 'manifest.json'}: can't be read ({error.strerror}); check the disk, then run this again"
        ) from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or manifest.get("format") != "apc-patterns":
        raise Damaged(f"not a pattern store of format {FORMAT}")
    if version != FORMAT:
        raise UserError(
            f"{path}: a store of format {version}, this program reads {FORMAT}; "
            f"`apc cache prune {path.name}` deletes it"
        )
    problem = _manifest_problem(manifest)
    if manifest.pop("checksum", None) != manifest_checksum(manifest):
        problem = problem or "checksum mismatch"
    if problem:
        raise Damaged(f"damaged ({problem})")
    return manifest


def manifest_checksum(manifest: dict) -> str:
    """The sha256 of a manifest without its checksum entry."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 40


def _manifest_problem(manifest: dict) -> str | None:
    """The first entry that is missing or inconsistent; None if there is none."""
    for key in COUNTS:
        if not _is_count(manifest.get(key)):
            return f"{key} is {manifest.get(key)!r}"
    for key, value in OF_FFNS.items():
        if not _is_count(manifest.get(key, value), 0):
            return f"{key} is {manifest[key]!r}"
    widths, thresholds, fields, shards = (manifest.get(key) for key in ("widths", "thresholds", "fields", "shards"))
    active, sparsity = manifest.get("active"), manifest.get("sparsity")
    if not isinstance(widths, dict) or not widths or not all(s in SITES and _is_count(D) for s, D in widths.items()):
        return f"widths are {widths!r}"
    if active not in ("threshold", "top") or not isinstance(sparsity, float) or not 0 < sparsity < 1:
        return f"active is {active!r}, sparsity {sparsity!r}"
    if not isinstance(thresholds, dict) or not all(
        isinstance(values, list)
        and len(values) == manifest["layers"]
        and all(isinstance(value, int | float) for value in values)
        for values in thresholds.values()
    ):
        return "thresholds are not a number for each layer"
    if not isinstance(manifest.get("identity"), dict):
        return "identity is not a dictionary"
    if not isinstance(fields, list) or not all(isinstance(name, str) for name in fields):
        return "fields is not a list of names"
    return _shards_problem(shards, [*fields, *(f"activity.{site}" for site in widths)], manifest["windows"])


def _shards_problem(shards: object, names: list[str], windows: int) -> str | None:
    """What is wrong with the shards, whose files have these `names`; None if they cover all `windows` in order."""
    if not isinstance(shards, list) or not shards:
        return "no shards"
    begin = 0
    for index, shard in enumerate(shards):
        bounds, files = (shard.get("windows"), shard.get("files")) if isinstance(shard, dict) else (None, None)
        if (
            not (isinstance(bounds, list) and len(bounds) == 2 and isinstance(files, dict))
            or bounds[0] != begin
            or not _is_count(bounds[1], begin + 1)
        ):
            return f"shard {index} has windows {bounds!r}"
        begin = bounds[1]
        if set(files) != {f"{index:05d}-{name}.npy" for name in names}:
            return f"shard {index} does not list exactly its own files"
        for name, entry in files.items():
            if not _is_file_entry(entry):
                return f"the entry of {name} is {entry!r}"[:200]
    return None if begin == windows else f"{windows} windows, shards for {begin}"


def _is_file_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and _is_count(entry.get("bytes"))
        and str(entry.get("dtype")) in DTYPES
        and isinstance(entry.get("shape"), list)
        and all(_is_count(size, 0) for size in entry["shape"])
    )


def file_problem(path: Path, entry: dict, verify: bool) -> str | None:
    """What is wrong with a shard's file; None if nothing is. verify: whether to check its sha256 too."""
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.stat().st_size} bytes, the manifest says {entry['bytes']}: truncated, or from another run"
    if verify:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                return "its checksum differs from the manifest's: damaged, or from another run"
    return None
