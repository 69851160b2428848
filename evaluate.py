"""The launcher in a checkout. An installed package has `apc evaluate`; the steps are in apc/commands/evaluate.py."""

from apc.commands.evaluate import config_of_run, evaluate, main

__all__ = ["config_of_run", "evaluate", "main"]

if __name__ == "__main__":
    main()
