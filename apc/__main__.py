"""The command `apc`."""

import importlib
import sys
from contextlib import nullcontext
from importlib.metadata import version

from apc.utils.exits import one_line_errors

USAGE = """usage: apc COMMAND …

  train      from text to a table of mask policies
  evaluate   score a finished run with other policies or text; compare runs
  export     write a run's result to a folder that apc.load and the hub take
  lm-eval    lm-evaluation-harness with runs and shared results as models
  sweep      run every combination of a W&B sweep file, without a server
  cache      list, prune and repair collected patterns
  doctor     check this machine

apc COMMAND --help explains each; apc --version prints the version."""
COMMANDS = {  # what repeating an interrupted command does; None: the command prints this itself
    "train": None,
    "evaluate": None,
    "export": "starts again",
    "lm-eval": "starts again",
    "sweep": "goes on from here",
    "cache": "goes on from here",
    "doctor": "starts again",
}


def main() -> None:
    """Runs the command that the first argument names."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("--help", "-h"):
        print(USAGE)
    elif command == "--version":
        print(f"apc {version('apc-llm')}")
    elif command in COMMANDS:
        sys.argv = [f"apc {command}", *sys.argv[2:]]
        effect = COMMANDS[command]
        with nullcontext() if effect is None else one_line_errors(f"the same command {effect}"):
            importlib.import_module(f"apc.commands.{command.replace('-', '_')}").main()
    else:
        print(f"error: {command}: no such command; choose {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
