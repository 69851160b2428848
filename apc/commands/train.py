"""Runs every stage, from text to a table of mask policies.

python train.py                             all stages, bundled model and text
python train.py experiment=wikitext2        a file from configs/experiment/
python train.py my.yaml run.name=a seed=1   a file of your own, and overrides
python train.py experiment=paper --dry-run  an estimate; loads nothing
"""

import os
from contextlib import ExitStack

from apc.config.schema import Config
from apc.config.values import as_word
from apc.run import cli
from apc.utils.errors import UserError

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
    from apc.evaluate import tables
    from apc.predict.low_bit import check_projections
    from apc.run import stages
    from apc.run.context import HeldOutMonitor, RunContext, load_inputs
    from apc.run.folder import Stopwatch, open_run
    from apc.run.score import check_speed, score
    from apc.run.tracking import Tracking
    from apc.sparse.policies import check_policies, trains_predictor
    from apc.utils import distributed

    check_policies(cfg)
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
    if trains_predictor(cfg) and cfg.predictor.form == "low-bit":
        check_projections(collector.ffns, cfg.predictor.low_bit_projections)
    check_gate(cfg, collector.ffns)
    if collector.experts:
        check_for_experts(cfg)
    identity = collect.pattern_identity(
        weights_digest(model), fit.digest, cfg.sites, cfg.active, cfg.sparsity, cfg.collect
    )
    facts = {"model": name, "fit": fit.source, "fit_tokens": fit.tokens.numel(), "bos": fit.bos}
    facts |= {"in_sample": cfg.data.in_sample, "weights_sample": weights_sample(model)}
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
        idle = sum(not counts.any() for counts in patterns.info.activity["neuron"]) if collector.experts else 0
        if idle and distributed.is_main():
            problem = f"{idle} of {len(collector.ffns)} experts got no token of the fit text"
            print(f"{problem}: their masks keep arbitrary neurons; give more text", flush=True)
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

        results = score(context, codebook, predictor, scored, run.path)
        if distributed.is_main():
            shown = [tables.policies_table(results, wide=wide), *tables.speed_tables(results, wide=wide)]
            print("\n" + "\n\n".join(shown), flush=True)
            print(f"\nrun: {run.path}   figures: {run.figures}   W&B: {tracking.wandb_mode}", flush=True)
            print(f"\n{tables.next_steps(run.path, results)}", flush=True)
        return results


def check_gate(cfg: Config, ffns: list) -> None:
    """Raises UserError if a policy that was asked for reads a gate that the model's FFNs do not have."""
    from apc.data.ffn import has_experts
    from apc.sparse.policies import POLICIES

    for name in cfg.policies or ():
        if POLICIES[name].reads_gate and (has_experts(ffns) or not ffns[0].gated):
            raise UserError(f"policies: {name} needs FFNs with a gate, outside a mixture of experts; leave it out")


def check_for_experts(cfg: Config) -> None:
    """Raises UserError for settings that a mixture of experts does not support."""
    needed = {
        "sites": (cfg.sites, ["neuron"]),
        "cluster.algorithm": (cfg.cluster.algorithm, "lloyd"),
        "collect.ffn_inputs": (cfg.collect.ffn_inputs, "stored"),
        "predictor.lookahead": (cfg.predictor.lookahead, 0),
        "tune.max_epochs": (cfg.tune.max_epochs, 0),
    }
    for key, (value, only) in needed.items():
        if value != only:
            raise UserError(f"{key}={as_word(value)}: the model is a mixture of experts; set {key}={as_word(only)}")


def dry_run(cfg: Config) -> str:
    """The estimated disk space, memory and seconds of a run, as a table."""
    from apc.estimate import table
    from apc.sparse.policies import check_policies

    check_policies(cfg)
    return table.describe(cfg)


def main() -> None:
    """The command `apc train`."""
    cli.main(__doc__ or "", train, dry_run=dry_run)
