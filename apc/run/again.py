"""The command line that makes a run again."""

import shlex
from functools import cache
from pathlib import Path

from apc.config.load import CONFIGS, load_config, load_saved, overrides_between
from apc.config.schema import Config

_IRRELEVANT = ("run", "tracking", "collect.dir")  # parts of a configuration that change no number


def command(folder: Path, cfg: Config) -> str:
    """The shortest command line that makes the run (or evaluation) in a folder again, from one of the experiments."""
    name = f"run.name={folder.name}-again"
    if folder.resolve().parent.name == "evaluations":
        checkpoint = folder.parent.parent
        base = load_saved(checkpoint / "config.yaml", ["stage=all"])
        words = overrides_between(base, cfg, (*_IRRELEVANT, "checkpoint"))
        return shlex.join(["python", "evaluate.py", f"checkpoint={checkpoint}", *words, name])
    candidates = [[*chosen, *overrides_between(base, cfg, _IRRELEVANT)] for chosen, base in _experiments()]
    for words in sorted(candidates, key=len):
        if not overrides_between(load_config(None, words), cfg, _IRRELEVANT):
            return shlex.join(["python", "train.py", *words, name])
    return shlex.join(["python", "train.py", str(folder / "config.yaml"), name])


@cache
def _experiments() -> list[tuple[list[str], Config]]:
    """Configurations that a command can start from, each with the words of the command line that choose it.

    They are the defaults of the dataclasses, the configuration of an empty command line, and each experiment.
    """
    names = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
    chosen: list[list[str]] = [[], *([f"experiment={name}"] for name in names)]
    return [([], Config()), *((words, load_config(None, words)) for words in chosen)]
