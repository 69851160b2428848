"""From text to a table of arms: collects activation patterns, clusters them, trains a predictor, and evaluates.

python train.py                                   everything, on the bundled model and text
python train.py experiment=wikitext2              a configuration from configs/experiment/
python train.py my.yaml cluster.k=1024 run.name=a a file of your own, and overrides
python train.py experiment=paper --dry-run        what a run would take, estimated; nothing is loaded
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for gradients that are the same each time, before CUDA starts

from contextlib import ExitStack

from apc import cli, distributed, report, scoring
from apc.activations import Collector
from apc.config import Config, to_dict
from apc.models import load_model, model_name, resolve_device, weights_digest
from apc.runs import Stopwatch, open_run
from apc.text import cut_windows, read_texts
from apc.tracking import Tracking


def train(cfg: Config) -> dict:
    """Runs the stages that cfg asks for; what the run's folder already holds is taken up. Returns the results (see `apc.report`),
    or the folder and seconds so far if `stage` ends before the table."""
    from pytorch_lightning import seed_everything  # which takes seconds to import: what is wrong with the command line was said before

    from apc import collect, training

    cli.quiet_libraries()
    device = resolve_device(cfg.model.device, distributed.local_rank())
    distributed.start(device)
    seed_everything(cfg.seed, verbose=False)
    watch = Stopwatch()

    with distributed.main_first():  # which fetches and unpacks what is bundled
        texts = read_texts(cfg.data)
        model, tokenizer = load_model(cfg.model, device)
        windows = cut_windows(cfg.data, *texts, tokenizer)
    fit, monitored, scored = scoring.split_windows(cfg, *windows)
    collector = Collector(model, cfg.sites, device, scoring.batch_windows(cfg, device), thresholded=cfg.collect.forward == "thresholded")
    identity = collect.pattern_identity(weights_digest(model), fit.digest, cfg.sites, cfg.active, cfg.sparsity, cfg.collect)
    facts = {"model": model_name(cfg.model), "fit": fit.source, "fit_tokens": fit.tokens.numel(), "in_sample": cfg.data.in_sample}
    watch.lap("load")

    with ExitStack() as held:
        run = held.enter_context(open_run(cfg))
        if cfg.checkpoint is not None:
            training.take_codebook(cfg.checkpoint, run, identity)
        tracking = held.enter_context(Tracking(cfg.tracking, run.path, run.path.name, to_dict(cfg), enabled=distributed.is_main()))
        stored = cfg.with_predictor and cfg.collect.hidden == "stored"
        patterns = collect.collect(cfg.collect, collector, fit, cfg.active, cfg.sparsity, identity, with_hidden=stored)
        watch.lap("collect")
        if cfg.stage == "collect":
            return {"run": str(run.path), "seconds": watch.seconds}

        watched = training.Watched(monitored.tokens, collector, cfg.seed)
        codebook = training.train_codebook(cfg, patterns, run, tracking, watched, facts)
        watch.lap("cluster")
        if cfg.stage == "cluster":
            return {"run": str(run.path), "seconds": watch.seconds}

        predictor = None
        if cfg.with_predictor:
            inputs = patterns if stored else collect.StreamedHidden(patterns, collector, fit)
            rows = None
            if len(monitored.tokens):
                rows = collector.block(monitored.tokens, range(len(monitored.tokens)), patterns.info.rule, patterns.info.with_importance, with_hidden=True)
            predictor = training.train_predictor(cfg, inputs, codebook, fit.tokens, run, tracking, watched, rows)
            watch.lap("predict")
        if cfg.stage == "predict":
            return {"run": str(run.path), "seconds": watch.seconds}

        if cfg.tune.max_epochs:
            codebook, predictor = training.tune(cfg, codebook, predictor, fit.tokens, run, tracking, watched)
            watch.lap("tune")
        if cfg.stage == "tune":
            return {"run": str(run.path), "seconds": watch.seconds}

        results = scoring.score(cfg, model, codebook, predictor, scored, run, run.path, tracking, device, watch, tokenizer)
        if distributed.is_main():
            print("\n" + "\n\n".join([report.arms_table(results), *report.speed_tables(results)]), flush=True)
            print(f"\nrun: {run.path}   figures: {run.figures}   W&B: {tracking.wandb_mode}", flush=True)
        return results


def dry_run(cfg: Config) -> str:
    """What a run would take, estimated."""
    from apc import estimate_table

    return estimate_table.describe(cfg)


if __name__ == "__main__":
    cli.main(__doc__, train, dry_run=dry_run)
