"""Writes what is needed to use a run's result to one folder, for apc.load.

apc export runs/x folder                     the policy of lowest perplexity
apc export runs/x folder --policy predicted  another policy of the run
apc export runs/x folder --push me/name      also puts it on the Hugging Face
                                             hub, after `hf auth login`
"""

import argparse
from pathlib import Path

from apc.data.loading import library_errors


def main() -> None:
    """The command `apc export`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("folder", type=Path, help="the folder to write")
    parser.add_argument("--policy", help="a policy of the run; default: the one with the lowest perplexity")
    parser.add_argument("--base-model", metavar="ID", help="hub id of the base model, if the run had it in a folder")
    parser.add_argument("--license", metavar="ID", help="licence of codebook and predictor, e.g. apache-2.0")
    parser.add_argument("--push", metavar="ID", help="hub repository to put it into")
    parser.add_argument("--private", action="store_true", help="make that repository private")
    options = parser.parse_args()
    from apc.share.result import Result, export  # imports torch

    folder = export(options.run, options.folder, options.policy, options.base_model, options.license)
    result = Result.from_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {result.policy} for {result.facts['base_model']['name']}, {size / 1e6:.1f} MB")
    model = "" if result.facts["base_model"]["path"] else ", MODEL"
    kernel = "" if len(result.facts["kernels"]) == 2 else ", kernel=None"
    print(f"use it:  apc.load({str(folder)!r}{model}{kernel})")
    if options.push:
        with library_errors(f"--push {options.push}: can't be put on the hub"):
            print(result.push_to_hub(options.push, private=options.private or None))
