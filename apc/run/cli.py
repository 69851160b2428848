"""What `train.py` and `evaluate.py` share: words of the command line, ranks, and how errors end a run."""

import argparse
import ctypes
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Callable

from apc.config.load import describe, load_config, to_yaml
from apc.config.schema import Config
from apc.utils import signals
from apc.utils.errors import UserError
from apc.utils.exits import GO_ON, nobody_reads, one_line_errors

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def main(
    description: str,
    run: Callable[[Config], dict],
    defaults: Callable[[str | None, list[str]], Config] = load_config,
    dry_run: Callable[[Config], str] | None = None,
) -> None:
    """Reads the command line, starts the ranks where there are several, and calls `run(config)`.

    dry_run: what `--dry-run` prints instead; None: there is no such flag. Errors end as in `one_line_errors`.
    """
    with one_line_errors(GO_ON):
        options = _parse(description, dry_run is not None)
        words = options.words
        path = words.pop(0) if words and "=" not in words[0] and words[0].endswith((".yaml", ".yml")) else None
        cfg = defaults(path, words)
        if options.print_config:
            print(to_yaml(cfg), end="")
            return
        if dry_run is not None and options.dry_run:
            quiet_libraries()
            print(dry_run(cfg))
            return
        from apc.run.folder import new_name
        from apc.run.launch import check_launched, launch

        quiet_libraries()
        _keep_freed_memory()
        signal.signal(signal.SIGTERM, signals.terminate)
        if cfg.model.device_map and int(os.environ.get("WORLD_SIZE", cfg.trainer.devices * cfg.trainer.num_nodes)) > 1:
            raise UserError(
                f"model.device_map={cfg.model.device_map}: spreads one process over all GPUs; set trainer.devices=1, or leave it out"
            )
        if "WORLD_SIZE" in os.environ:
            check_launched(cfg)
        elif cfg.trainer.devices * cfg.trainer.num_nodes > 1:
            sys.exit(launch(cfg))
        if cfg.run.name is None:
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise UserError("run.name: not given; several processes need the same one, write run.name=NAME")
            cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, name=new_name()))
        try:
            run(cfg)
        except BrokenPipeError:
            if nobody_reads():
                print(f"stdout: what read it has gone; {GO_ON}", file=sys.stderr)
            raise


def _parse(description: str, with_dry_run: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=describe()
    )
    parser.add_argument(
        "words", nargs="*", metavar="file.yaml | key=value | group=name", help="a YAML file first, then overrides"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    if with_dry_run:
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="print what the run would take (disk, memory, seconds, estimated) and stop",
        )
    return parser.parse_intermixed_args()


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks: each step allocates the same large tensors anew, and fresh pages cost a tenth of a CPU run."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def quiet_libraries() -> None:
    """Leaves warnings and errors of the libraries, not their greetings. Lightning's import takes that back."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "datasets", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
