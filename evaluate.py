"""Evaluates what a run left: arms, tables, plots and results.json.

    python evaluate.py checkpoint=runs/x                          the same figures again
    python evaluate.py checkpoint=runs/x arms=[oracle,gate]       other arms
    python evaluate.py checkpoint=runs/x data.score=other.txt     other text

Every key of the run's own configuration can be overridden. Results go to runs/x/evaluations/NAME, where NAME is run.name, or
the date and time.
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dataclasses
from pathlib import Path

from apc import cli, distributed, report
from apc.callbacks import Stopwatch
from apc.config import Config, load_config, to_dict, to_yaml
from apc.errors import UserError
from apc.files import write_atomic
from apc.models import load_model, resolve_device
from apc.runs import RunFolder, load_run, new_name
from apc.scoring import score
from apc.text import load_windows
from apc.tracking import Tracking


def evaluate(cfg: Config) -> dict:
    """Evaluates the run `cfg.checkpoint` under cfg, and returns the results (see `apc.report`)."""
    device = resolve_device(cfg.model.device, distributed.local_rank())
    distributed.start(device)
    loaded = load_run(_checkpoint(cfg))
    if loaded.codebook is None:
        raise UserError(f"{loaded.folder.codebook}: no such file; run train.py stage=cluster run.name={loaded.folder.path.name} first")
    watch = Stopwatch()

    model, tokenizer = load_model(cfg.model, device)
    fit, scored = load_windows(cfg.data, tokenizer)
    fit, _ = fit.split(len(fit.tokens) - cfg.monitor.windows)
    batch_windows = cfg.trainer.batch_windows or (8 if device.type == "cuda" else 1)
    watch.lap("load")

    folder = loaded.folder.path / "evaluations" / (cfg.run.name or new_name())
    folder.mkdir(parents=True, exist_ok=True)
    with Tracking(cfg.tracking, folder, f"{loaded.folder.path.name}-{folder.name}", to_dict(cfg), enabled=distributed.is_main()) as tracking:
        if distributed.is_main():
            write_atomic(folder / "config.yaml", to_yaml(cfg).encode())
        results = score(cfg, model, loaded.codebook, loaded.predictor, fit, scored, loaded.folder, folder, tracking, device, batch_windows, watch)
        if distributed.is_main():
            print("\n" + report.arms_table(results) + "\n\n" + report.layer_table(results), flush=True)
            print(f"\nresults: {folder / 'results.json'}   figures: {RunFolder(folder).figures}", flush=True)
    return results


def _checkpoint(cfg: Config) -> Path:
    if cfg.checkpoint is None:
        raise UserError("checkpoint: not given; name a run folder that train.py left, e.g. checkpoint=runs/NAME")
    return Path(cfg.checkpoint)


def config_of_run(path: str | None, overrides: list[str]) -> Config:
    """The run's own configuration, with the overrides on top."""
    cfg = load_config(path, overrides)
    run = RunFolder(_checkpoint(cfg))
    if not run.config.is_file():
        load_run(run.path)  # says what is wrong
    merged = load_config(run.config, ["run.name=null", "stage=all", *overrides])
    return dataclasses.replace(merged, checkpoint=str(run.path))


if __name__ == "__main__":
    cli.main(__doc__, lambda cfg, overrides: evaluate(cfg), config_of_run)
