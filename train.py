"""The launcher in a checkout. An installed package has `apc train`; the stages are in apc/commands/train.py."""

from apc.commands.train import main, train

__all__ = ["main", "train"]

if __name__ == "__main__":
    main()
