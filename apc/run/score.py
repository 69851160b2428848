"""The last stage: scores the policies and writes the table's figures to results.json, plots and W&B."""

from pathlib import Path

import torch
from torch import nn

from apc.cluster.codebook import Codebook
from apc.config.schema import Config
from apc.data.ffn import find_ffns
from apc.data.models import batch_windows, model_name, other_weights
from apc.data.quantise import FULL_BITS, mean_bits
from apc.data.text import Windows, adds_bos
from apc.evaluate import figures, tables
from apc.evaluate.evaluator import Evaluator
from apc.predict.predictor import CORRECTION, Predictor
from apc.report.page import run_page
from apc.run.again import command
from apc.run.context import RunContext
from apc.run.folder import commit, stage_records, write_json
from apc.run.tracking import Tracking
from apc.sparse.policies import calibrated_policies, chosen_policies, total_bytes, usable_policies
from apc.utils import distributed
from apc.utils.errors import UserError
from apc.utils.files import write_atomic
from apc.utils.wheels import log

REPORT = "report.html"
LAYER_FIGURES = ("density", "coverage", "precision", "captured_importance")
TABLE_FIGURES = ("perplexity", "ratio", *LAYER_FIGURES, "captured_energy", "bits", "bytes_share", "flops_share")
SUMMARY_FIGURES = ("perplexity", "ratio", "bytes_share")  # W&B's columns of runs; the table has all of them
SPEED_FIGURES = ("seconds_per_token", "times_dense", "perplexity", "perplexity_masked")


def check_speed(cfg: Config, model: nn.Module) -> None:
    """Raises UserError if `speed=true` can't be had with this model and configuration; call it before any training."""
    if cfg.speed == "true":
        from apc.evaluate import speed  # imports transformers' attention, which takes seconds

        speed.check(model, chosen_policies(cfg), cfg.data.seq_len)


def score(context: RunContext, codebook: Codebook, predictor: Predictor | None, scored: Windows, folder: Path) -> dict:
    """Scores the policies, writes results.json, figures/ and report.html to `folder`, and returns the results.

    docs/files.md describes the results.
    """
    cfg, device, watch = context.cfg, context.device, context.watch
    names, left_out = usable_policies(cfg, codebook, predictor)
    missing = [{"policy": name, "missing": reason} for name, reason in left_out.items()]
    batch = batch_windows(cfg, device)
    evaluator = Evaluator(context.model, codebook, predictor, scored.tokens, device, batch, cfg.seed)
    order = chosen_policies(cfg)
    other = other_weights(context.model, codebook.provenance)
    if distributed.is_main():
        if other is not None:
            print(f"{context.run.path}: {other.line}", flush=True)
        print(tables.ROW_HEADER, flush=True)
    measured = evaluator.policies(names, cfg.trainer.progress, _print_row)
    records = sorted(measured + missing, key=lambda record: order.index(record["policy"]))
    watch.lap("evaluate")
    results = {
        "conditions": conditions(context, codebook, predictor, scored) | {"weights": other and other.condition},
        "warnings": evaluator.warnings(),
        "policies": records,
        **stage_records(context.run),
        "seconds": watch.seconds,  # laps add to it
        "gpu_bytes": context.gpu_bytes(),
    }
    if distributed.is_main():
        write_json(folder / "results.json", results)
        _publish(results, folder, context.tracking)
        _write_page(results, folder, cfg)
        # Last, so that all other results are saved if it fails.
        if cfg.speed != "false":
            timed = _timed(context, codebook, predictor, measured)
            results["speed"] = _measure_speed(context, codebook, predictor, scored, timed, measured) if timed else None
            watch.lap("speed")
            results["gpu_bytes"] = context.gpu_bytes()
            write_json(folder / "results.json", results)
            if timed:
                _publish_speed(results, folder, context.tracking)
                _write_page(results, folder, cfg)
        context.tracking.artifact(f"report-{folder.name}", "report", folder / REPORT)
    distributed.barrier()
    return results


def _timed(
    context: RunContext, codebook: Codebook, predictor: Predictor | None, measured: list[dict]
) -> dict[str, float | None]:
    """The scored policies whose speed is measured, with the bytes that they read. `speed=best` may have none."""
    cfg, shares = context.cfg, {record["policy"]: record.get("bytes_share") for record in measured}
    if cfg.speed == "true":
        return shares
    from apc.evaluate import speed

    reason = None
    if context.device.type != "cpu":
        reason = "it is for CPUs; speed=true also measures on a GPU"
    elif list(cfg.sites) != ["neuron"]:
        reason = f"kernels need sites=[neuron], this run has sites={list(cfg.sites)}"
    elif cfg.model.ffn_bits or cfg.model.device_map:
        reason = "kernels need weights of 16 bits on one device"
    else:
        try:
            speed.check(context.model, list(shares), cfg.data.seq_len)
        except UserError as error:
            reason = str(error).removeprefix("speed=true: ")
    able = [] if reason else speed.with_kernels(context.model, codebook, predictor, list(shares), cfg.seed)
    if not able:
        log(f"speed=best: not measured ({reason or 'none of the policies has a kernel as it was calibrated'})")
        return {}
    best = min((record["perplexity"], record["policy"]) for record in measured if record["policy"] in able)[1]
    return {best: shares[best]}


def _measure_speed(
    context: RunContext,
    codebook: Codebook,
    predictor: Predictor | None,
    scored: Windows,
    timed: dict[str, float | None],
    measured: list[dict],
) -> dict:
    """The results' `speed` for policies with the bytes that they read. measured: the records of the scored policies."""
    from apc.evaluate import speed

    cfg = context.cfg
    parts = context.model, context.tokenizer, codebook, predictor
    known = None
    if cfg.speed == "best":
        known = {record["policy"]: record for record in measured}
        one = next(iter(timed))
        dense = {"policy": "dense", "perplexity": known[one]["perplexity"] / known[one]["ratio"]}
        known.setdefault("dense", dense | dict.fromkeys(("ratio", "ratio_low", "ratio_high"), 1.0))
    return speed.measure(*parts, scored.tokens, timed, cfg.seed, cfg.trainer.progress, known)


def _print_row(record: dict) -> None:
    """Prints a policy's row of the table as soon as the policy is done."""
    if distributed.is_main():
        print(tables.policy_row(record), flush=True)


def conditions(context: RunContext, codebook: Codebook, predictor: Predictor | None, scored: Windows) -> dict:
    """The conditions of the figures: model, texts, settings, hardware. Every table and plot states them."""
    cfg, device, model = context.cfg, context.device, context.model
    made = codebook.provenance
    tuned = made.get("tune")
    if tuned:
        policy = tuned.get("policy") or tuned["arm"]  # version 0.1 called it the arm
        adapted = f", weights adapted by a LoRA of rank {tuned['lora']}" if tuned.get("lora") else ""
        tuned = f"{policy}, {tuned['steps']:,} steps of {tuned['step_windows']} windows{adapted}"
    algorithm = made.get("cluster", {}).get("algorithm", "lloyd")
    algorithm += f" with penalty {codebook.penalty}" if codebook.penalty > 1 else ""
    stored_bits = mean_bits(find_ffns(model))
    return {
        "model": model_name(cfg.model),
        "ffn_bits": None if stored_bits == FULL_BITS else round(stored_bits, 3),
        "fit": made["fit"],
        "score": scored.source,
        "split": "in-sample" if cfg.data.in_sample else "held-out",
        "fit_tokens": made["fit_tokens"],
        "score_tokens": scored.tokens.numel(),
        "seq_len": cfg.data.seq_len,
        "bos": scored.bos,
        "tokenizer_adds_bos": adds_bos(context.tokenizer),
        "overlap": None if scored.overlap is None else round(scored.overlap, 4),
        "sites": list(codebook.sites),
        **{
            name: getattr(codebook, name)
            for name in ("sparsity", "active", "k", "density", "centroid_size", "weighting", "scope")
        },
        "bytes": total_bytes(cfg) if calibrated_policies(cfg) else None,
        "algorithm": None if algorithm == "lloyd" else algorithm,
        "forward": made.get("patterns", {}).get("forward"),
        "predictor": predictor and _described(predictor),
        "tuned": tuned,
        "experts": codebook.experts or None,
        **{name: getattr(codebook, name) for name in ("layers", "hidden_size", "ffn_width")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "commit": commit(),
    }


def _described(predictor: Predictor) -> str:
    E, H, lookahead = predictor.hidden_size, predictor.bottleneck, f", lookahead {predictor.lookahead}"
    if predictor.form == "low-bit":
        projections = "+".join(predictor.low_bit_projections)
        correction = f", correction {E}→{H}→{E}" if predictor.corrects else ""
        inputs = f", {predictor.header.inputs:.3g} of the inputs" if predictor.header.inputs < 1 else ""
        return f"low-bit {projections} at {predictor.bits} bit{inputs}{correction}{lookahead}"
    if predictor.form == CORRECTION:
        return f"none, correction {E}→{H}→{E}"
    return f"{predictor.form} {E}→{H}→{next(iter(predictor.outputs.values()))}{lookahead}"


def _publish(results: dict, folder: Path, tracking: Tracking) -> None:
    """Saves plots beside the results, and adds summary, tables and plots to the run's record."""
    measured = [record for record in results["policies"] if not record["missing"]]
    shown = [(record, name) for record in measured for name in SUMMARY_FIGURES if record[name] is not None]
    tracking.summary({f"eval/{record['policy']}/{name}": record[name] for record, name in shown})
    rows = [[record["policy"], *(record[name] for name in TABLE_FIGURES)] for record in measured]
    tracking.table("eval/policies", ["policy", *TABLE_FIGURES], rows)
    rows = [
        [record["policy"], layer, *(record["per_layer"][name][layer] for name in LAYER_FIGURES)]
        for record in measured
        for layer in range(len(record["per_layer"]["density"]))
    ]
    tracking.table("eval/layers", ["policy", "layer", *LAYER_FIGURES], rows)
    for key, path in figures.save_figures(results, folder / "figures").items():
        tracking.figure(f"figures/{key}", path)


def _write_page(results: dict, folder: Path, cfg: Config) -> None:
    """Writes the results as a page."""
    text = run_page(str(folder), results, command(folder, cfg), (folder / "figures").glob("*.png"))
    write_atomic(folder / REPORT, text.encode())


def _publish_speed(results: dict, folder: Path, tracking: Tracking) -> None:
    """Saves the plot of speeds, and adds it and the figures to the run's record."""
    shown = [(record, name) for record in results["speed"]["policies"] for name in SPEED_FIGURES]
    tracking.summary(
        {f"speed/{record['policy']}/{name}": record[name] for record, name in shown if record[name] is not None}
    )
    path = folder / "figures" / "speed.png"
    figures.speed_figure(results, path)
    tracking.figure("figures/speed", path)
