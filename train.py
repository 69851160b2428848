"""From text to a table of arms: collects activation patterns, clusters them, trains a predictor, and evaluates.

python train.py                                   everything, on the bundled model and text
python train.py experiment=wikitext2              a configuration from configs/experiment/
python train.py my.yaml cluster.k=1024 run.name=a a file of your own, and overrides
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pytorch_lightning import seed_everything

from apc import cli, collect, distributed, report
from apc.activations import Collector
from apc.callbacks import Stopwatch
from apc.config import Config, to_dict
from apc.models import load_model, resolve_device, weights_digest
from apc.runs import open_run
from apc.scoring import score
from apc.text import load_windows
from apc.tracking import Tracking
from apc.training import take_codebook, train_codebook, train_predictor


def train(cfg: Config) -> dict:
    """Runs the stages that cfg asks for; what the run's folder already holds is taken up. Returns the results (see `apc.report`),
    or what there is so far if `stage` ends before the table."""
    device = resolve_device(cfg.model.device, distributed.local_rank())
    distributed.start(device)
    seed_everything(cfg.seed, verbose=False)
    watch = Stopwatch()

    model, tokenizer = load_model(cfg.model, device)
    fit, scored = load_windows(cfg.data, tokenizer)
    fit, monitored = fit.split(len(fit.tokens) - cfg.monitor.windows)
    batch_windows = cfg.trainer.batch_windows or (8 if device.type == "cuda" else 1)
    collector = Collector(model, cfg.sites, device, batch_windows)
    weights = weights_digest(model)
    watch.lap("load")

    run = open_run(cfg)
    if cfg.checkpoint is not None:
        take_codebook(cfg.checkpoint, run, collector.ffns, cfg.sites)
    with Tracking(cfg.tracking, run.path, run.path.name, to_dict(cfg), enabled=distributed.is_main()) as tracking:
        with_hidden = cfg.collect.hidden == "stored"
        patterns = collect.collect(cfg.collect, collector, fit, cfg.active, cfg.sparsity, weights, with_hidden)
        watch.lap("collect")
        if cfg.stage == "collect":
            return {"run": str(run.path), "seconds": watch.seconds}

        codebook = train_codebook(cfg, patterns, run, tracking, collector, monitored.tokens)
        watch.lap("cluster")
        if cfg.stage == "cluster":
            return {"run": str(run.path), "seconds": watch.seconds}

        inputs = patterns if with_hidden else collect.StreamedHidden(patterns, collector, fit)
        monitor_block = None
        if len(monitored.tokens):
            monitor_block = collector.block(monitored.tokens, 0, patterns.info.rule, patterns.info.with_importance, with_hidden=True)
        predictor = train_predictor(cfg, inputs, codebook, run, tracking, device, monitor_block)
        watch.lap("predict")
        if cfg.stage == "predict":
            return {"run": str(run.path), "seconds": watch.seconds}

        results = score(cfg, model, codebook, predictor, fit, scored, run, run.path, tracking, device, batch_windows, watch)
        if distributed.is_main():
            print("\n" + report.arms_table(results), flush=True)
            print(f"\nrun: {run.path}   figures: {run.figures}   W&B: {tracking.wandb_mode}", flush=True)
        return results


if __name__ == "__main__":
    cli.main(__doc__, lambda cfg, overrides: train(cfg))
