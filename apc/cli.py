"""What `train.py` and `evaluate.py` share: words of the command line, ranks, and how errors end a run."""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable

from apc.config import Config, describe, load_config, to_yaml
from apc.errors import UserError
from apc.runs import new_name


def main(description: str, run: Callable[[Config, list[str]], dict], defaults: Callable[[str | None, list[str]], Config] = load_config) -> None:
    """Reads the command line, starts the ranks where there are several, and calls `run(config, overrides)`.

    A UserError becomes one line on stderr and exit code 2; Ctrl-C exits with 130.
    """
    try:
        path, overrides, print_config = _parse(description)
        cfg = defaults(path, overrides)
        if print_config:
            print(to_yaml(cfg), end="")
            return
        _quiet_libraries()
        if cfg.trainer.devices > 1 and "WORLD_SIZE" not in os.environ:
            _launch(cfg)
        if cfg.run.name is None:
            cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, name=new_name()))
        run(cfg, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command with this run.name goes on from here", file=sys.stderr)
        sys.exit(130)


def _parse(description: str) -> tuple[str | None, list[str], bool]:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=describe())
    parser.add_argument("words", nargs="*", metavar="file.yaml | key=value | group=name", help="a YAML file first, then overrides")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    options = parser.parse_intermixed_args()
    words = options.words
    path = words.pop(0) if words and "=" not in words[0] and words[0].endswith((".yaml", ".yml")) else None
    return path, words, options.print_config


def _launch(cfg: Config) -> None:
    """Becomes torchrun with this very command line, one process for each device."""
    if cfg.trainer.num_nodes > 1:
        raise UserError(f"trainer.num_nodes={cfg.trainer.num_nodes}: start this through torchrun or SLURM, which start the processes")
    name = [] if cfg.run.name else [f"run.name={new_name()}"]  # one folder for all ranks
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cfg.trainer.devices}", *sys.argv, *name]
    os.execv(sys.executable, command)


def _quiet_libraries() -> None:
    """Leaves warnings and errors of the libraries, not their greetings."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "datasets", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
