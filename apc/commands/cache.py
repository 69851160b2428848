"""Lists, prunes and repairs the stores of collected patterns.

apc cache                  lists all stores
apc cache prune NAME …     deletes stores by name
apc cache prune --partial  deletes what interrupted runs left
apc cache prune --all      deletes everything
apc cache repair NAME …    keeps the undamaged shards of stores; train.py then collects the others again
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
    """Complete and partial stores in the folder, sorted by name."""
    return sorted(path for path in folder.glob("*-p*") if path.is_dir())


def size(path: Path) -> int:
    """Bytes of all files in a store."""
    total = 0
    for file in path.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may be collecting
            total += file.stat().st_size
    return total


def line(path: Path) -> str:
    """One store in the listing: name, size, time, model, text, tokens and layers."""
    time = datetime.fromtimestamp(path.stat().st_mtime)
    start = f"{path.name:<24}{size(path) / 2**20:10.1f} MiB  {time:%Y-%m-%d %H:%M}"
    manifest_path = path / "manifest.json"
    if path.suffix == ".partial" or not manifest_path.is_file():
        return f"{start}  interrupted; the same train.py command resumes it"
    try:
        manifest = json.loads(manifest_path.read_text())
        source = manifest.get("source")  # stores of earlier versions have none
        names = f"{source['model']} on {source['text']}" if source else "–"
        tokens = manifest["windows"] * manifest["seq_len"]
        return f"{start}  {names}, {tokens:,} tokens × {manifest['layers']} layers, {', '.join(manifest['widths'])}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{start}  damaged, or of another format; prune it"


def main(words: list[str] | None = None) -> None:
    """The command `apc cache`. words: its arguments; None: those of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="apc cache", description=__doc__, formatter_class=raw)
    parser.add_argument("action", nargs="?", choices=["list", "prune", "repair"], default="list")
    parser.add_argument("names", nargs="*", help="stores to delete or repair")
    parser.add_argument("--partial", action="store_true", help="delete what interrupted runs left")
    parser.add_argument("--all", action="store_true", help="delete everything")
    parser.add_argument("--dir", help="the folder, if not the user's cache (collect.dir)")
    options = parser.parse_args(words)
    folder = store_folder(CollectConfig(dir=options.dir))
    paths = stores(folder)
    if options.action == "list":
        count = f"{len(paths)} store{'s' * (len(paths) != 1)}"
        print("\n".join([f"{folder}: {count}, {sum(map(size, paths)) / 2**20:.1f} MiB", *map(line, paths)]))
    elif options.action == "repair":
        _repair(folder, [path.name for path in paths if path.suffix != ".partial"], options.names)
    else:
        _prune(folder, paths, options)


def _repair(folder: Path, complete: list[str], names: list[str]) -> None:
    """Repairs the stores `names`, which must be among the complete ones."""
    if unknown := sorted(set(names) - set(complete)) or ([] if names else ["repair"]):
        which = f"no such store in {folder}, or an interrupted one"
        raise UserError(f"{', '.join(unknown)}: {which}; `apc cache` lists them")
    for name in names:
        damaged, count = reopen(folder / name)
        if not count:
            print(f"{name}: its manifest was damaged; deleted, train.py collects it again")
            continue
        state = f"shards {', '.join(map(str, damaged))} of {count} are damaged" if damaged else "no shard is damaged"
        print(f"{name}: {state}; the same train.py command completes the store")


def _prune(folder: Path, paths: list[Path], options: argparse.Namespace) -> None:
    """Deletes the stores that the options choose."""
    unknown = set(options.names) - {path.name for path in paths}
    if not (options.names or options.partial or options.all):
        raise UserError("apc cache prune: names no store; give NAME, --partial or --all (`apc cache` lists the names)")
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: no such store in {folder}; `apc cache` lists them")
    for path in paths:
        if options.all or path.name in options.names or (options.partial and path.suffix == ".partial"):
            print(f"deleting {path.name} ({size(path) / 2**20:.1f} MiB)")
            shutil.rmtree(path)
