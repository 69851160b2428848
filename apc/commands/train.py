"""Runs every stage, from text to a table of mask policies.

python train.py                             all stages, bundled model and text
python train.py experiment=wikitext2        a file from configs/experiment/
python train.py my.yaml run.name=a seed=1   a file of your own, and overrides
python train.py experiment=paper --dry-run  an estimate; loads nothing
"""

import os
from contextlib import ExitStack

from apc.config.schema import Config
from apc.run import cli

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic gradients; read when CUDA starts


def train(cfg: Config, wide: bool = False) -> dict:
    """Runs the stages that cfg asks for, resuming each where it stopped, and returns the results.

    If `stage` ends before the table, the results are the run's folder and the seconds so far. wide: print tables with
    all columns.
    """
    # These imports take seconds. Mistakes on the command line are reported before them.
    from pytorch_lightning import seed_everything

    from apc.collect import collect
    from apc.collect.collector import Collector
    from apc.config.load import to_dict
    from apc.data import overlap
    from apc.data.models import batch_windows, model_name, resolve_device, weights_digest, weights_sample
    from apc.data.quantise import mean_bits
    from apc.evaluate import tables
    from apc.run import stages
    from apc.run.checks import check_model
    from apc.run.context import HeldOutMonitor, RunContext, load_inputs
    from apc.run.folder import Stopwatch, open_run
    from apc.run.score import REPORT, check_speed, score
    from apc.run.tracking import Tracking
    from apc.sparse.policies import calibrated_policies, check_policies, check_used, trains_predictor
    from apc.utils import distributed

    check_policies(cfg)
    check_used(cfg)
    cli.quiet_libraries(cfg.trainer.progress)  # again, after Lightning's import
    device = resolve_device(cfg.model.device, distributed.local_rank())
    distributed.start(device)
    seed_everything(cfg.seed, verbose=False)
    watch = Stopwatch()

    model, tokenizer, fit, monitored, scored = load_inputs(cfg, device)
    check_speed(cfg, model)
    thresholded = cfg.collect.forward == "thresholded"
    name, progress = model_name(cfg.model), cfg.trainer.progress
    collector = Collector(model, cfg.sites, device, batch_windows(cfg, device), thresholded, name, progress)
    check_model(cfg, collector.ffns)
    identity = collect.pattern_identity(
        weights_digest(model), fit.digest, cfg.sites, cfg.active, cfg.sparsity, cfg.collect
    )
    facts = {"model": name, "fit": fit.source, "fit_tokens": fit.tokens.numel(), "bos": fit.bos}
    facts |= {"in_sample": cfg.data.in_sample, "weights_sample": weights_sample(model)}
    facts |= {"ffn_bits": mean_bits(collector.ffns)}
    watch.lap("load")

    with ExitStack() as stack:
        run = stack.enter_context(open_run(cfg))
        if cfg.checkpoint is not None:
            stages.import_codebook(cfg.checkpoint, run, identity)
        tracking = stack.enter_context(
            Tracking(cfg.tracking, run.path, run.path.name, to_dict(cfg), enabled=distributed.is_main())
        )
        so_far = {"run": str(run.path), "seconds": watch.seconds}
        context = RunContext(cfg, model, tokenizer, device, run, tracking, watch)
        stored = trains_predictor(cfg) and cfg.collect.ffn_inputs == "stored"
        patterns = collect.collect(cfg.collect, collector, fit, cfg.active, cfg.sparsity, identity, with_hidden=stored)
        watch.lap("collect")
        if cfg.stage == "collect":
            return so_far

        monitor = HeldOutMonitor(monitored.tokens, collector, patterns.info, cfg.seed)
        codebook = stages.train_codebook(context, patterns, monitor, facts)
        if distributed.is_main():
            assert fit.sequences is not None  # `load_inputs` samples them
            overlap.save(run.fit_sequences, fit.sequences, fit.digest)
        watch.lap("cluster")
        if cfg.stage == "cluster":
            return so_far

        predictor = None
        if trains_predictor(cfg):
            inputs = patterns if stored else collect.StreamedHidden(patterns, collector, fit)
            predictor = stages.train_predictor(context, inputs, codebook, fit.tokens, monitor)
            watch.lap("predict")
        if cfg.stage == "predict":
            return so_far

        if cfg.tune.max_epochs:
            codebook, predictor = stages.tune(context, codebook, predictor, fit, monitor)
            watch.lap("tune")
        if cfg.stage == "tune":
            return so_far

        if calibrated_policies(cfg):
            codebook = stages.calibrate(context, codebook, predictor, fit.tokens, monitor)
            watch.lap("calibrate")
        results = score(context, codebook, predictor, scored, run.path)
        if distributed.is_main():
            shown = [tables.policies_table(results, wide=wide), *tables.speed_tables(results, wide=wide)]
            print("\n" + "\n\n".join(shown), flush=True)
            print(f"\nrun: {run.path}   page: {run.path / REPORT}   W&B: {tracking.wandb_mode}", flush=True)
            print(f"\n{tables.next_steps(run.path, results)}", flush=True)
        return results


def dry_run(cfg: Config) -> str:
    """The estimated disk space, memory and seconds of a run, as a table."""
    from apc.estimate import table
    from apc.sparse.policies import check_policies, check_used

    check_policies(cfg)
    check_used(cfg)
    return table.describe(cfg)


def main() -> None:
    """The command `apc train`."""
    cli.main(__doc__ or "", train, dry_run=dry_run)
