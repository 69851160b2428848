"""The manifest of a pattern store: what it says, and what is wrong with one that says something else."""

import hashlib
import json
from pathlib import Path

import numpy as np

from apc.config.schema import SITES
from apc.utils.errors import UserError

FORMAT = 2
DTYPES = {"uint8": np.uint8, "int32": np.int32, "int64": np.int64, "float32": np.float32, "bfloat16": np.int16}


class Damaged(Exception):
    """What is wrong with a manifest."""


def read_manifest(path: Path) -> dict:
    """The manifest in a store's folder. Raises Damaged unless everything in it is what `StoreWriter.finish` writes; UserError if it can't be read, or is
    of another format."""
    try:
        held = json.loads((path / "manifest.json").read_bytes())
    except FileNotFoundError as error:
        raise Damaged("no such file; not a pattern store") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"damaged ({error})") from error
    except OSError as error:
        raise UserError(
            f"{path / 'manifest.json'}: can't be read ({error.strerror}); check the disk, then run this again"
        ) from error
    if (
        isinstance(held, dict)
        and held.get("format") == "apc-patterns"
        and isinstance(held.get("version"), int)
        and held["version"] != FORMAT
    ):
        raise UserError(
            f"{path}: a store of format {held['version']}, this program reads {FORMAT}; `apc cache prune {path.name}` deletes it"
        )
    if not isinstance(held, dict) or held.get("format") != "apc-patterns" or held.get("version") != FORMAT:
        raise Damaged(f"not a pattern store of format {FORMAT}")
    problem = _manifest_problem(held)
    if held.pop("checksum", None) != manifest_checksum(held):
        problem = problem or "its checksum says something else"
    if problem:
        raise Damaged(f"damaged ({problem})")
    return held


def manifest_checksum(held: dict) -> str:
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def _manifest_problem(held: dict) -> str | None:
    def count(value: object, least: int = 1) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 40

    for key in ("layers", "hidden_size", "ffn_width", "windows", "seq_len"):
        if not count(held.get(key)):
            return f"{key} is {held.get(key)!r}"
    widths, thresholds, fields, shards = (held.get(key) for key in ("widths", "thresholds", "fields", "shards"))
    if not isinstance(widths, dict) or not widths or not all(site in SITES and count(D) for site, D in widths.items()):
        return f"widths are {widths!r}"
    if (
        held.get("active") not in ("threshold", "top")
        or not isinstance(held.get("sparsity"), float)
        or not 0 < held["sparsity"] < 1
    ):
        return f"active is {held.get('active')!r}, sparsity {held.get('sparsity')!r}"
    if not isinstance(thresholds, dict) or not all(
        isinstance(values, list)
        and len(values) == held["layers"]
        and all(isinstance(value, (int, float)) for value in values)
        for values in thresholds.values()
    ):
        return "thresholds are not a number for each layer"
    if (
        not isinstance(held.get("identity"), dict)
        or not isinstance(fields, list)
        or not all(isinstance(name, str) for name in fields)
    ):
        return "identity or fields are of another kind"
    if not isinstance(shards, list) or not shards:
        return "no shards"
    at = 0
    for index, shard in enumerate(shards):
        windows, files = (shard.get("windows"), shard.get("files")) if isinstance(shard, dict) else (None, None)
        if (
            not isinstance(windows, list)
            or len(windows) != 2
            or windows[0] != at
            or not count(windows[1], at + 1)
            or not isinstance(files, dict)
        ):
            return f"shard {index} has windows {windows!r}"
        at = windows[1]
        wanted = {f"{index:05d}-{name}.npy" for name in [*fields, *(f"activity.{site}" for site in widths)]}
        if set(files) != wanted:
            return f"shard {index} names other files than its own"
        for name, entry in files.items():
            known = (
                isinstance(entry, dict)
                and isinstance(entry.get("sha256"), str)
                and count(entry.get("bytes"))
                and str(entry.get("dtype")) in DTYPES
            )
            if (
                not known
                or not isinstance(entry.get("shape"), list)
                or not all(count(size, 0) for size in entry["shape"])
            ):
                return f"the entry of {name} is of another kind"
    return None if at == held["windows"] else f"{held['windows']} windows, shards for {at}"


def file_problem(path: Path, entry: dict, verify: bool) -> str | None:
    """What is wrong with a shard's file; None if nothing is."""
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.stat().st_size} bytes, the manifest says {entry['bytes']}: truncated or foreign"
    if verify:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                return "its checksum is not the manifest's: damaged or of another run"
    return None
