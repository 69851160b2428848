"""With the core dependencies alone, commands name the missing packages, and `import apc` is instant."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TRAIN_ONLY = ("pytorch_lightning", "wandb", "datasets", "matplotlib", "rich", "scipy", "gguf", "mwparserfromhell")


def run_without(blocked, program):
    """A Python program in a process to which the modules `blocked` seem not installed."""
    code = f"import sys\nsys.modules.update(dict.fromkeys({tuple(blocked)!r}))\n{program}"
    return subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True, timeout=200)


# As importlib.metadata answers where the extra `train` is not installed.
WITHOUT_EXTRA = """
import importlib.metadata as metadata
version = metadata.version
def missing(name):
    if name in ("wandb", "rich"):
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.requires = lambda name: ["torch>=2", "wandb>=0.31; extra == 'train'", "rich>=13; extra == 'train'"]
metadata.version = missing
from apc.__main__ import main
"""


def test_the_doctor_names_the_missing_packages(tmp_path):
    program = f"{WITHOUT_EXTRA}sys.argv = ['apc', 'doctor', 'run.dir={tmp_path}', 'collect.dir={tmp_path}']\nmain()\n"
    done = run_without(TRAIN_ONLY, program)
    assert done.returncode == 0, done.stderr
    assert "note  wandb, rich not installed; apc train, evaluate and sweep need them" in done.stdout
    assert "loading a run does not: pip install 'apc-llm[train]'\n" in done.stdout


@pytest.mark.parametrize("command", ["train", "evaluate", "sweep"])
def test_a_command_names_the_missing_packages_in_one_line(command):
    run = TESTS / "data" / "v0.1" / "tuned"
    words = [command, "configs/sweep/demo.yaml" if command == "sweep" else f"checkpoint={run}"]
    blocked = TRAIN_ONLY if command == "sweep" else (*TRAIN_ONLY, "torch")  # the message does not wait for torch
    done = run_without(blocked, f"{WITHOUT_EXTRA}sys.argv = ['apc', *{words!r}]\nmain()\n")
    assert done.returncode == 2
    assert done.stderr == "error: wandb, rich: not installed; run pip install 'apc-llm[train]'\n"


def test_importing_apc_imports_nothing_heavy():
    done = run_without(TRAIN_ONLY, "import apc\nprint(any(name in sys.modules for name in ('torch', 'transformers')))")
    assert done.stdout.strip() == "False", done.stderr
