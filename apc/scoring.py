"""The last stage: arms on scored text, written and logged as table, figures and results.json."""

from pathlib import Path

import torch
from torch import nn

from apc import distributed, figures
from apc.codebook import Codebook
from apc.config import DEFAULT_ARMS, Config
from apc.errors import UserError
from apc.evaluation import Evaluator, choose_arms
from apc.models import model_name
from apc.predictor import Predictor
from apc.runs import RunFolder, Stopwatch, commit, stage_records, write_json
from apc.text import Windows
from apc.tracking import Tracking

SHOWN = ("perplexity", "ratio", "density", "coverage", "precision", "captured_importance", "captured_energy", "bits", "bytes_share", "flops_share")


def batch_windows(cfg: Config, device: torch.device) -> int:
    """Windows in one forward pass."""
    return cfg.trainer.batch_windows or (8 if device.type == "cuda" else 1)


def split_windows(cfg: Config, fit: Windows, scored: Windows) -> tuple[Windows, Windows, Windows]:
    """(fitted, monitored, scored) windows: the monitored ones are the last of the fit text. Raises UserError if none is left to fit."""
    count = len(fit.tokens) - cfg.monitor.windows
    if count < 1:
        raise UserError(f"data.fit: {fit.source} has {len(fit.tokens)} windows and monitor.windows={cfg.monitor.windows} leaves none to fit; give more text")
    return *fit.split(count), scored


def conditions(cfg: Config, codebook: Codebook, predictor: Predictor | None, scored: Windows, model: nn.Module, device: torch.device) -> dict:
    """What the figures hold for: they never go without it."""
    described = None
    if predictor is not None:
        outputs = next(iter(predictor.outputs.values()))
        described = f"{predictor.form} {predictor.hidden_size}→{predictor.hidden}→{outputs}, lookahead {predictor.lookahead}"
        if predictor.form == "low-bit":
            correction = f", correction {predictor.hidden_size}→{predictor.hidden}→{predictor.hidden_size}" * predictor.corrects
            described = f"low-bit {'+'.join(predictor.reads)} at {predictor.bits} bit{correction}, lookahead {predictor.lookahead}"
    made = codebook.provenance
    tuned = made.get("tune")
    algorithm = made.get("cluster", {}).get("algorithm", "lloyd") + (f" with penalty {codebook.penalty}" if codebook.penalty > 1 else "")
    return {
        "model": model_name(cfg.model), "fit": made["fit"], "score": scored.source, "split": "in-sample" if cfg.data.in_sample else "held-out",
        "fit_tokens": made["fit_tokens"], "score_tokens": scored.tokens.numel(), "seq_len": cfg.data.seq_len,
        "sites": list(codebook.sites), "sparsity": codebook.sparsity, "active": codebook.active, "k": codebook.k, "density": codebook.density,
        "ones": codebook.ones, "weighting": codebook.weighting, "scope": codebook.scope, "algorithm": None if algorithm == "lloyd" else algorithm,
        "forward": made.get("patterns", {}).get("forward"), "predictor": described,
        "tuned": tuned and f"{tuned['arm']}, {tuned['steps']:,} steps of {tuned['step_windows']} windows",
        "layers": codebook.layers, "hidden_size": codebook.hidden_size, "ffn_width": codebook.ffn_width,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "commit": commit(),
    }  # fmt: skip


def score(
    cfg: Config, model: nn.Module, codebook: Codebook, predictor: Predictor | None, scored: Windows,
    run: RunFolder, folder: Path, tracking: Tracking, device: torch.device, watch: Stopwatch, tokenizer=None,
) -> dict:  # fmt: skip
    """Evaluates the arms and writes `folder`/results.json and figures/; returns the results as `apc.report` describes them.

    run: the folder whose trainings the results tell of; tokenizer: for the texts of cfg.speed.
    """
    names, missing = choose_arms(cfg.arms, DEFAULT_ARMS, codebook, predictor)
    evaluator = Evaluator(model, codebook, predictor, scored.tokens, device, batch_windows(cfg, device), cfg.seed)
    order = list(cfg.arms or DEFAULT_ARMS)
    arms = sorted(evaluator.arms(names) + missing, key=lambda record: order.index(record["arm"]))
    watch.lap("evaluate")
    results = {"conditions": conditions(cfg, codebook, predictor, scored, model, device), "arms": arms, **stage_records(run), "seconds": watch.seconds}
    if cfg.speed and distributed.is_main():
        from apc import speed  # and with it what transformers has of attention

        results["speed"] = speed.measure(model, tokenizer, codebook, predictor, scored.tokens, names, cfg.seed, cfg.trainer.progress)
        watch.lap("speed")
        results["seconds"] = watch.seconds
    if distributed.is_main():
        write_json(folder / "results.json", results)
        _publish(results, folder, tracking)
    distributed.barrier()
    return results


def _publish(results: dict, folder: Path, tracking: Tracking) -> None:
    """Figures beside the results, and everything to the run's record."""
    ran = [record for record in results["arms"] if not record["missing"]]
    tracking.summary({f"eval/{record['arm']}/{name}": record[name] for record in ran for name in SHOWN if record[name] is not None})
    for record in (results.get("speed") or {}).get("arms", []):
        tracking.summary({f"speed/{record['arm']}/{name}": record[name] for name in ("seconds_per_token", "times_dense", "perplexity", "perplexity_masked")})
    columns = ["arm", *SHOWN]
    tracking.table("eval/arms", columns, [[record["arm"], *(record[name] for name in SHOWN)] for record in ran])
    layer_rows = [
        [record["arm"], layer, *(record["per_layer"][name][layer] for name in ("density", "coverage", "precision", "captured_importance"))]
        for record in ran
        for layer in range(len(record["per_layer"]["density"]))
    ]
    tracking.table("eval/layers", ["arm", "layer", "density", "coverage", "precision", "captured_importance"], layer_rows)
    for key, path in figures.save_figures(results, folder / "figures").items():
        tracking.figure(f"figures/{key}", path)
