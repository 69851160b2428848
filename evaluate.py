"""Evaluates what a run left: arms, tables, plots and results.json.

    python evaluate.py checkpoint=runs/x                          the same figures again
    python evaluate.py checkpoint=runs/x arms=[oracle,gate]       other arms
    python evaluate.py checkpoint=runs/x data.score=other.txt     other text
    python evaluate.py compare='runs/paper-*' [out=FOLDER]        finished runs side by side, also compare=[runs/x,runs/y]; loads no model

Keys that don't concern the fitting can be overridden. Results go to runs/x/evaluations/NAME, where NAME is run.name, or the
date and time.
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dataclasses
import sys
from pathlib import Path

from apc import cli, compare, distributed, report
from apc.config import Config, load_config, to_dict, to_yaml
from apc.errors import UserError
from apc.files import write_atomic
from apc.models import find_ffns, load_model, resolve_device
from apc.runs import RunFolder, Stopwatch, load_run, new_name
from apc.scoring import score, split_windows
from apc.sparse_model import check_fits
from apc.text import cut_windows, read_texts
from apc.tracking import Tracking

# What the run was fitted with: an evaluation can't change it.
FITTED = ("sites", "sparsity", "active", "collect", "cluster", "predictor", "tune", "monitor")
FITTED_DATA = ("fit", "fit_windows", "seq_len")


def evaluate(cfg: Config) -> dict:
    """Evaluates the run `cfg.checkpoint` under cfg, and returns the results (see `apc.report`)."""
    device = resolve_device(cfg.model.device, distributed.local_rank())
    distributed.start(device)
    run = load_run(cfg.checkpoint)
    if run.codebook is None:
        raise UserError(f"{run.folder.codebook}: no such file; run train.py stage=cluster run.name={run.folder.path.name} first")
    if cfg.tune.max_epochs and not run.folder.tuned("codebook").is_file() and distributed.is_main():
        print(f"{run.folder.path}: its tuning has not ended; these are its codebook and predictor before it", flush=True)
    watch = Stopwatch()

    with distributed.main_first():  # which fetches and unpacks what is bundled
        texts = read_texts(cfg.data)
        model, tokenizer = load_model(cfg.model, device)
        windows = cut_windows(cfg.data, *texts, tokenizer)
    _, _, scored = split_windows(cfg, *windows)
    check_fits(find_ffns(model), run.codebook, run.predictor)
    watch.lap("load")

    folder = run.folder.path / "evaluations" / (cfg.run.name or new_name())
    with Tracking(cfg.tracking, folder, f"{run.folder.path.name}-{folder.name}", to_dict(cfg), enabled=distributed.is_main()) as tracking:
        if distributed.is_main():
            write_atomic(folder / "config.yaml", to_yaml(cfg).encode())
        results = score(cfg, model, run.codebook, run.predictor, scored, run.folder, folder, tracking, device, watch, tokenizer)
        if distributed.is_main():
            tables = [report.arms_table(results), *report.speed_tables(results), report.detail_table(results), report.layer_table(results)]
            print("\n\n".join(["", *tables]), flush=True)
            print(f"\nresults: {folder / 'results.json'}   figures: {RunFolder(folder).figures}", flush=True)
    return results


def config_of_run(path: str | None, overrides: list[str]) -> Config:
    """The run's own configuration, with the overrides on top. Raises UserError for one that would change what was fitted."""
    if path is not None:
        raise UserError(f"{path}: evaluate.py takes the run's own configuration; write checkpoint=runs/NAME and key=value overrides")
    checkpoint = next((word.partition("=")[2] for word in overrides if word.startswith("checkpoint=")), None)
    if not checkpoint:
        raise UserError("checkpoint: not given; name a run folder that train.py left, e.g. checkpoint=runs/NAME")
    run = RunFolder(Path(checkpoint))
    if not run.config.is_file():
        raise UserError(f"{run.path}: not a run folder (no config.yaml); give one that train.py left, e.g. checkpoint=runs/NAME")
    fitted = load_config(run.config)
    cfg = load_config(run.config, ["run.name=null", "stage=all", *overrides])
    for owner, other, keys, prefix in ((fitted, cfg, FITTED, ""), (fitted.data, cfg.data, FITTED_DATA, "data.")):
        for key in keys:
            if getattr(owner, key) != getattr(other, key):
                raise UserError(f"{prefix}{key}: the run was fitted with {getattr(owner, key)}, evaluate.py can't change that; train another run")
    if cfg.model.trust_remote_code and "model.trust_remote_code=true" not in overrides:
        raise UserError(f"{run.config}: sets model.trust_remote_code, which runs code that comes with the model; say model.trust_remote_code=true yourself")
    return dataclasses.replace(cfg, checkpoint=str(run.path))


if __name__ == "__main__":
    if any(word.startswith("compare=") for word in sys.argv[1:]):
        with cli.one_line_errors("the same command starts again"):
            compare.main(sys.argv[1:])
    else:
        cli.main(__doc__, evaluate, config_of_run)
