"""The command line that `train` and `evaluate` share: arguments, ranks, and how errors end a run."""

import argparse
import ctypes
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Callable

from apc.config.load import describe, load_config, split_file
from apc.config.schema import Config
from apc.config.values import to_yaml
from apc.utils import signals
from apc.utils.errors import UserError
from apc.utils.exits import GO_ON, nobody_reads, one_line_errors
from apc.utils.packages import require_extra
from apc.utils.progress import hide_library_bars

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def main(
    description: str,
    run: Callable[[Config, bool], dict],
    defaults: Callable[[str | None, list[str]], Config] = load_config,
    dry_run: Callable[[Config], str] | None = None,
) -> None:
    """Reads the command line, starts the ranks if there are several, and calls `run(config, wide)`.

    description: the top of `--help`; wide: whether tables show all columns; defaults: makes the configuration from a
    file and overrides; dry_run: makes the text that `--dry-run` prints; with None, the flag does not exist. Errors end
    the process as in `one_line_errors`.
    """
    with one_line_errors(GO_ON):
        raw = argparse.RawDescriptionHelpFormatter
        parser = argparse.ArgumentParser(description=description, formatter_class=raw, epilog=describe())
        metavar, what = "file.yaml | key=value | group=name", "a YAML file first, then overrides"
        parser.add_argument("words", nargs="*", metavar=metavar, help=what)
        what = "print tables with all columns, in lines of any length"
        parser.add_argument("--wide", action="store_true", help=what)
        parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
        what = "estimate the run's disk space, memory and seconds, and stop"
        if dry_run is not None:
            parser.add_argument("--dry-run", action="store_true", help=what)
        options = parser.parse_intermixed_args()
        cfg = defaults(*split_file(options.words))
        if options.print_config:
            print(to_yaml(cfg), end="")
            return
        require_extra("train")
        quiet_libraries(cfg.trainer.progress)
        if dry_run is not None and options.dry_run:
            print(dry_run(cfg))
            return
        _keep_freed_memory()
        signal.signal(signal.SIGTERM, signals.terminate)
        cfg = _start_ranks(cfg)
        try:
            run(cfg, options.wide)
        except BrokenPipeError:
            if nobody_reads():
                print(f"stdout was closed by its reader; {GO_ON}", file=sys.stderr)
            raise


def _start_ranks(cfg: Config) -> Config:
    """Returns the configuration with the run's name; if several ranks must be started, starts them and exits."""
    from apc.run.folder import new_name
    from apc.run.launch import check_launched, launch

    ranks = int(os.environ.get("WORLD_SIZE", cfg.trainer.devices * cfg.trainer.num_nodes))
    if cfg.model.device_map and ranks > 1:
        raise UserError(
            f"model.device_map={cfg.model.device_map}: spreads one process over all GPUs; set trainer.devices=1, "
            "or leave it out"
        )
    if "WORLD_SIZE" in os.environ:
        check_launched(cfg)
    elif ranks > 1:
        sys.exit(launch(cfg))
    if cfg.run.name is not None:
        return cfg
    if ranks > 1:
        raise UserError("run.name: not given; several processes need the same one, write run.name=NAME")
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, name=new_name()))


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks.

    Each step allocates the same sizes again, and fresh pages take a tenth of a run's time on the CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def quiet_libraries(bars: bool = True) -> None:
    """Silences libraries' greetings but not warnings; hides bars unless `bars` is set and stderr is a terminal.

    Importing Lightning undoes the first part, so call this again afterwards.
    """
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "datasets", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not (bars and sys.stderr.isatty()):
        hide_library_bars()
