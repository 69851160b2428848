"""Lists and prunes collected patterns.

apc cache                  what there is
apc cache prune NAME …     deletes stores by name
apc cache prune --partial  deletes what interrupted runs left
apc cache prune --all
apc cache repair NAME …    keeps the whole shards of damaged stores; train.py then collects only the others again
"""

import argparse
import contextlib
import json
import shutil
from datetime import datetime
from pathlib import Path

from apc.collect.store import reopen, store_folder
from apc.config.schema import CollectConfig
from apc.utils.errors import UserError


def stores(folder: Path) -> list[Path]:
    """Complete and partial stores in the folder, by name."""
    return sorted(path for path in folder.glob("*-p*") if path.is_dir())


def size(path: Path) -> int:
    """Bytes of all files in a store."""
    total = 0
    for file in path.iterdir():
        with contextlib.suppress(FileNotFoundError):  # of a process that is collecting
            total += file.stat().st_size
    return total


def line(path: Path) -> str:
    """What a listing says of one store."""
    used = f"{size(path) / 2**20:10.1f} MiB  {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
    manifest = path / "manifest.json"
    if path.suffix == ".partial" or not manifest.is_file():
        return f"{path.name:<32}{used}  interrupted; the same train.py command goes on from it"
    try:
        held = json.loads(manifest.read_text())
        tokens = held["windows"] * held["seq_len"]
        return f"{path.name:<32}{used}  {tokens:,} tokens × {held['layers']} layers, {', '.join(held['widths'])}"
    except (ValueError, KeyError, TypeError, OSError):
        return f"{path.name:<32}{used}  damaged, or of another format; prune it"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="apc cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=["list", "prune", "repair"], default="list")
    parser.add_argument("names", nargs="*", help="stores to delete or repair")
    parser.add_argument("--partial", action="store_true", help="delete what interrupted runs left")
    parser.add_argument("--all", action="store_true", help="delete everything")
    parser.add_argument("--dir", help="the folder, if not the user's cache (collect.dir)")
    options = parser.parse_args(words)
    folder = store_folder(CollectConfig(dir=options.dir))
    found = stores(folder)
    if options.action == "list":
        print("\n".join([f"{folder}: {len(found)} stores, {sum(map(size, found)) / 2**20:.1f} MiB", *map(line, found)]))
        return
    if options.action == "repair":
        whole = {path.name for path in found if path.suffix != ".partial"}
        if unknown := sorted(set(options.names) - whole) or ([] if options.names else ["repair"]):
            raise UserError(
                f"{', '.join(unknown)}: no such store in {folder}, or one that was interrupted; `apc cache` lists them"
            )
        for name in options.names:
            damaged, count = reopen(folder / name)
            said = (
                f"shards {', '.join(map(str, damaged))} of {count} are damaged"
                if damaged
                else "no shard is damaged"
                if count
                else "its manifest was"
            )
            print(
                f"{name}: {said}; {'the same train.py command collects them again' if count else 'deleted, train.py collects it again'}"
            )
        return
    chosen = [
        path
        for path in found
        if options.all or path.name in options.names or (options.partial and path.suffix == ".partial")
    ]
    unknown = set(options.names) - {path.name for path in found}
    if unknown or not (options.names or options.partial or options.all):
        raise UserError(f"{', '.join(sorted(unknown)) or 'prune'}: no such store in {folder}; `apc cache` lists them")
    for path in chosen:
        print(f"deleting {path.name} ({size(path) / 2**20:.1f} MiB)")
        shutil.rmtree(path)
