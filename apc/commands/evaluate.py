"""Evaluates a finished run, or compares several: tables, figures, results.json.

  python evaluate.py checkpoint=runs/x                         the same figures
  python evaluate.py checkpoint=runs/x policies=[oracle,exact]  other policies
  python evaluate.py checkpoint=runs/x data.score=other.txt    another text
  python evaluate.py compare='runs/paper-*' [out=FOLDER]       runs side by side
  python evaluate.py compare=[runs/x,runs/y]                   a list of runs

Keys that the run was not fitted with can be overridden. Results go to
runs/x/evaluations/NAME, where NAME is run.name, or the date and time.
"""

import dataclasses
import os
import sys
from pathlib import Path

from apc.config.load import flat, load_saved, to_dict
from apc.config.schema import Config, check_names
from apc.config.values import as_word, to_yaml
from apc.run import cli
from apc.utils import exits
from apc.utils.errors import UserError
from apc.utils.files import write_atomic
from apc.utils.packages import require_extra

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The run was fitted with these keys, so an evaluation can't change them.
FITTED = ("sites", "sparsity", "active", "bytes", "collect", "cluster", "predictor", "tune", "monitor")
FITTED_DATA = ("data.fit_windows", "data.seq_len", "data.bos")


def evaluate(cfg: Config, wide: bool = False) -> dict:
    """Evaluates the run `cfg.checkpoint` under cfg, and returns the results. wide: print tables with all columns."""
    from apc.data.ffn import find_ffns
    from apc.data.models import resolve_device
    from apc.evaluate import tables
    from apc.run.context import RunContext, load_scored
    from apc.run.folder import Stopwatch, load_run, new_name
    from apc.run.score import REPORT, check_speed, score
    from apc.run.tracking import Tracking
    from apc.sparse.policies import check_policies
    from apc.sparse.sparsify import check_fits
    from apc.utils import distributed

    check_policies(cfg)
    device = resolve_device(cfg.model.device, distributed.local_rank())
    distributed.start(device)
    run = load_run(cfg.checkpoint or "")
    if run.codebook is None:
        raise UserError(
            f"{run.folder.codebook}: no such file; run train.py stage=cluster run.name={run.folder.path.name} first"
        )
    if cfg.tune.max_epochs and not run.folder.tuned("codebook").is_file() and distributed.is_main():
        print(f"{run.folder.path}: tuning has not finished; this evaluates the run before tuning", flush=True)
    watch = Stopwatch()

    model, tokenizer, scored = load_scored(cfg, device, run.folder, run.codebook)
    check_fits(find_ffns(model), run.codebook, run.predictor)
    check_speed(cfg, model)
    watch.lap("load")

    folder = run.folder.path / "evaluations" / (cfg.run.name or new_name())
    name = f"{run.folder.path.name}-{folder.name}"
    with Tracking(cfg.tracking, folder, name, to_dict(cfg), enabled=distributed.is_main()) as tracking:
        if distributed.is_main():
            write_atomic(folder / "config.yaml", to_yaml(cfg).encode())
        context = RunContext(cfg, model, tokenizer, device, run.folder, tracking, watch)
        results = score(context, run.codebook, run.predictor, scored, folder)
        if distributed.is_main():
            shown = [
                tables.policies_table(results, wide=wide),
                *tables.speed_tables(results, wide=wide),
                tables.detail_table(results, wide=wide),
                tables.layer_table(results, wide=wide),
            ]
            print("\n\n".join(["", *shown]), flush=True)
            print(f"\nresults: {folder / 'results.json'}   page: {folder / REPORT}", flush=True)
    return results


def config_of_run(path: str | None, overrides: list[str]) -> Config:
    """The run's own configuration with the overrides on top.

    Raises UserError for an override of a key that the run was fitted with.
    """
    if path is not None:
        raise UserError(
            f"{path}: evaluate.py uses the run's own configuration; write checkpoint=runs/NAME and key=value overrides"
        )
    checkpoint = next((word.partition("=")[2] for word in reversed(overrides) if word.startswith("checkpoint=")), None)
    if not checkpoint:
        raise UserError("checkpoint: not given; name a run folder of train.py, e.g. checkpoint=runs/NAME")
    folder = Path(checkpoint)
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(
            f"{folder}: not a run folder (no config.yaml); give one that train.py wrote, e.g. checkpoint=runs/NAME"
        )
    fitted = load_saved(config)
    cfg = load_saved(config, ["run.name=null", "stage=all", *overrides])
    check_names(cfg)
    given = flat(cfg)
    for key, value in flat(fitted).items():
        is_fitted = key.partition(".")[0] in FITTED or key in FITTED_DATA
        if is_fitted and value != given[key]:
            raise UserError(
                f"{key}: the run was fitted with {as_word(value)}, evaluate.py can't change that; train another run"
            )
    if cfg.model.trust_remote_code and "model.trust_remote_code=true" not in overrides:
        raise UserError(
            f"{config}: sets model.trust_remote_code, which runs code from the model's repository; "
            "give model.trust_remote_code=true on the command line to allow it"
        )
    return dataclasses.replace(cfg, checkpoint=str(folder))


def main() -> None:
    """The command `apc evaluate`."""
    if any(word.startswith("compare=") for word in sys.argv[1:]):
        with exits.one_line_errors("the same command starts again"):
            require_extra("train")
            from apc.compare.tables import main as compare

            compare(sys.argv[1:])
    else:
        cli.main(__doc__ or "", evaluate, config_of_run)
