"""Estimates a run before anything is loaded: patterns, bytes on disk, GPU and host, bytes exchanged, seconds per stage.

Bytes come from the run's own classes, created on torch's meta device, which allocates nothing. Seconds are rough. For
clustering they are the kernels' work divided by the rates of an H100 in `benchmarks/results.csv`. The other stages
are scaled from one measured run (`apc/estimate/estimate.yaml`) in two ways, by FLOPs and by the number of values
read; the two results bound the range. Nothing here is a measurement.

Shape letters: L layers, D neurons of a site, K clusters, G groups clustered apart (L, or 1), S tokens per window.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from apc import ops
from apc.cluster.algorithms import ALGORITHMS
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.cluster.lloyd import ClusteringModule
from apc.collect.memory import block_bytes, room_for_blocks, windows_in_block
from apc.collect.patterns import ActiveRule, PatternInfo
from apc.collect.prefetch import BLOCKS_IN_FLIGHT, BLOCKS_READ
from apc.collect.sharding import block_ranges
from apc.collect.store import shard_windows, store_bytes
from apc.config.load import load_config
from apc.config.schema import Config, ModelConfig
from apc.data import gguf
from apc.data.dequantise import check_readable
from apc.data.ffn import find_ffns, has_experts
from apc.data.loading import check_class, reason
from apc.data.models import find_model
from apc.data.text import check_positions, count_windows, on_hub
from apc.estimate.exchange import Exchange
from apc.estimate.measured_rates import rate, rates
from apc.predict.module import PredictorModule
from apc.predict.predictor import Predictor
from apc.sparse.policies import calibrated_policies, chosen_policies, facts, trains_predictor, tuned_forms
from apc.tune.module import TuningModule
from apc.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN = Path(__file__).with_suffix(".yaml")
DEFAULT_BATCH_WINDOWS = 8  # of a forward pass on a GPU
ALL_ROWS = 1 << 62  # more bytes than any set of patterns has


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights."""

    layers: int
    hidden_size: int
    ffn_width: int
    vocabulary: int
    parameters: int
    body: int  # parameters without embeddings and head
    dtype: torch.dtype
    widths: dict[str, int]  # neurons at each of the run's sites
    projections: int  # matrices in an FFN, 2 without a gate
    origin: str  # the source of these numbers, for the table
    config: Any  # the model's, from transformers


@dataclass(frozen=True)
class Workload:
    """A run's model, and its numbers of fit and score windows."""

    shape: ModelShape
    fit_windows: int
    score_windows: int
    counted: dict[str, str]  # the source of both numbers, by role


@dataclass(frozen=True)
class Seconds:
    """Seconds from `low` to `high`."""

    low: float
    high: float
    basis: str  # how they were estimated


@dataclass(frozen=True)
class Estimate:
    """The estimate for a run on `ranks` GPUs, one process each. Fields from `disk` to `exchange` are bytes by name."""

    ranks: int
    disk: dict[str, int]
    gpu: dict[str, int]  # on each
    peak: dict[str, int]  # the most on a GPU at once, by stage
    host: dict[str, int]  # of all processes
    exchange: dict[str, int]  # sent by each GPU in one pass of clustering
    seconds: dict[str, Seconds]  # by stage


@cache
def known() -> dict:
    """The content of `estimate.yaml`."""
    return yaml.safe_load(KNOWN.read_text())


def read_shape(cfg: ModelConfig, sites: list[str]) -> tuple[ModelShape, "PreTrainedTokenizerBase | str"]:
    """The model's shape from its configuration; and its tokenizer, or a string with the reason why there is none.

    Raises UserError if the configuration can't be read and `estimate.yaml` does not have the shape.
    """
    from transformers import AutoConfig, AutoTokenizer

    if Path(cfg.path).suffix == ".gguf":
        path = Path(cfg.path).expanduser()
        shape = _shape(gguf.load_gguf_config(path), cfg, sites, "the .gguf file", torch.float32)
        return shape, gguf.load_gguf_tokenizer(path)
    source, local_only = find_model(cfg.path)
    options = dict(revision=cfg.revision, trust_remote_code=cfg.trust_remote_code, local_files_only=local_only)
    try:
        shape = _shape(AutoConfig.from_pretrained(source, **options), cfg, sites, "its config.json")
    except UserError:
        raise
    except Exception as error:  # of any class, as in `library_errors`
        if cfg.path in known()["shapes"]:
            return _known_shape(cfg, sites), "only the model's shape is known here"
        not_cached = local_only and not Path(source).is_dir()
        problem = "neither the hub nor the local cache has its config.json" if not_cached else reason(error)
        raise UserError(
            f"model.path={cfg.path}: its shape is not known ({problem}); give a folder with its config.json and "
            "tokenizer: model.path=FOLDER"
        ) from error
    try:
        return shape, AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # an error only if windows have to be counted
        return shape, reason(error)


def _known_shape(cfg: ModelConfig, sites: list[str]) -> ModelShape:
    from transformers import AutoConfig

    return _shape(AutoConfig.for_model(**known()["shapes"][cfg.path]), cfg, sites, f"known beforehand, {KNOWN.name}")


def _shape(
    config: Any, cfg: ModelConfig, sites: list[str], origin: str, stored: torch.dtype | None = None
) -> ModelShape:
    """config: a transformers configuration; stored: the type for dtype=auto if the configuration names none."""
    from transformers import AutoModelForCausalLM

    check_readable(config)
    if hasattr(config, "quantization_config"):  # a run unpacks the weights
        del config.quantization_config
    check_class(config, f"model.path={cfg.path}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code)
    ffns = find_ffns(model)
    if has_experts(ffns):
        raise UserError("--dry-run: mixtures of experts can't be estimated; leave out --dry-run")
    inner = config.get_text_config()
    own = stored or (getattr(torch, inner.dtype) if isinstance(inner.dtype, str) else inner.dtype) or torch.float32
    parameters = sum(value.numel() for value in model.parameters())
    ends = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    embeddings = {id(layer.weight): layer.weight.numel() for layer in ends}  # one weight may be both
    return ModelShape(
        layers=len(ffns),
        hidden_size=ffns[0].hidden_size,
        ffn_width=ffns[0].width,
        vocabulary=inner.vocab_size,
        parameters=parameters,
        body=parameters - sum(embeddings.values()),
        dtype=own if cfg.dtype == "auto" else getattr(torch, cfg.dtype),
        widths={site: ffns[0].site_width(site) for site in sites},
        projections=2 + ffns[0].gated,
        origin=origin,
        config=config,
    )


def read_workload(cfg: Config) -> Workload:
    """The run's model and windows. Raises UserError if counting them needs the weights or the hub."""
    shape, tokenizer = read_shape(cfg.model, cfg.sites)
    check_positions(cfg.data, shape.config)
    (fit, fit_source), (score, score_source) = (
        _windows(cfg, role, tokenizer, shape.config.model_type) for role in ("fit", "score")
    )
    left = fit - cfg.monitor.windows
    if left < 1:
        raise UserError(
            f"data.fit: {fit} windows, and monitor.windows={cfg.monitor.windows} leaves none to fit; give more text"
        )
    return Workload(shape, left, score, {"fit": fit_source, "score": score_source})


def _windows(cfg: Config, role: str, tokenizer: "PreTrainedTokenizerBase | str", model_type: str) -> tuple[int, str]:
    """The number of windows of the `fit` or `score` text, and the source of this number."""
    wanted, source = getattr(cfg.data, f"{role}_windows"), getattr(cfg.data, role)
    if not on_hub(cfg.data, role) and not isinstance(tokenizer, str):
        return count_windows(cfg.data, role, tokenizer, model_type), "counted"
    if wanted is not None:
        return wanted, f"as data.{role}_windows says"
    text = known()["texts"].get(source, {}).get(cfg.model.path)
    if text is None:
        missing = f"the model's tokenizer, which would count them, can't be loaded ({tokenizer})"
        if on_hub(cfg.data, role):
            missing = "it lies on the hub"
        raise UserError(
            f"data.{role}={source}: how many tokens it has is not known: {missing}; set data.{role}_windows=N"
        )
    return text["tokens"] // (cfg.data.seq_len - (cfg.data.bos == "true")), text["from"]


def pattern_info(cfg: Config, shape: ModelShape, windows: int) -> PatternInfo:
    """The run's patterns, as `collect` will describe them."""
    return PatternInfo(
        layers=shape.layers,
        hidden_size=shape.hidden_size,
        ffn_width=shape.ffn_width,
        windows=windows,
        seq_len=cfg.data.seq_len,
        widths=shape.widths,
        rule=ActiveRule(cfg.active, cfg.sparsity),
        with_importance=cfg.collect.importance,
        with_hidden=trains_predictor(cfg) and cfg.collect.ffn_inputs == "stored",
        identity={},
        projections=shape.projections,
    )


def clustering_module(cfg: Config, info: PatternInfo) -> ClusteringModule:
    """The run's clustering module, without memory for its buffers. Raises UserError as the module does."""
    with torch.device("meta"):
        return ALGORITHMS[cfg.cluster.algorithm](cfg.cluster, info, cfg.seed)


def empty_codebook(cfg: Config, info: PatternInfo) -> Codebook:
    """A codebook with the shapes of the run's, without memory for its tensors."""
    K, L = cfg.cluster.k, info.layers
    G = 1 if cfg.cluster.scope == "pooled" else L
    with torch.device("meta"):
        sites = {
            site: SiteCodebook(
                centroids=torch.empty(G, K, ops.row_bytes(D), dtype=torch.uint8),
                profiles=torch.empty(G, K, D, dtype=torch.float16),
                sizes=torch.empty(G, K, dtype=torch.int64),
                static=torch.empty(L, ops.row_bytes(D), dtype=torch.uint8),
                thresholds=torch.empty(L),
            )
            for site, D in info.widths.items()
        }
    return Codebook(
        sites=sites,
        widths=dict(info.widths),
        layers=L,
        hidden_size=info.hidden_size,
        ffn_width=info.ffn_width,
        scope=cfg.cluster.scope,
        weighting=cfg.cluster.weighting,
        density=cfg.cluster.density,
        active=cfg.active,
        sparsity=cfg.sparsity,
        projections=info.projections,
    )


def predictor_module(cfg: Config, info: PatternInfo) -> PredictorModule:
    """The module that trains the run's predictor, without memory for its weights."""
    with torch.device("meta"):
        return PredictorModule(cfg.predictor, empty_codebook(cfg, info), info, None, cfg.seed)


def tuning_module(cfg: Config, info: PatternInfo) -> TuningModule:
    """The module that tunes the run's codebook and predictor, without a model and without memory for its weights."""
    predictor = predictor_module(cfg, info).predictor if tuned_forms(cfg) else None
    with torch.device("meta"):
        no_windows = torch.empty(0, cfg.data.seq_len, dtype=torch.int64)
        return TuningModule(cfg.tune, nn.Module(), [], empty_codebook(cfg, info), predictor, no_windows, cfg.seed)


def _nbytes(tensors: Iterable[object]) -> int:
    return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


def exchanged(module: ClusteringModule, blocks: list[tuple[int, int]], ranks: int) -> dict[str, Exchange]:
    """Bytes that ranks exchange in the first pass, by purpose. Later passes exchange no layer sums.

    Re-seeding and the sums of a checkpoint are not included. blocks: window ranges [first, last).
    """
    sites = module.info.sites

    def total(*names: str) -> int:
        return sum(module.get(name, site).nbytes for name in names for site in sites)

    if module.cfg.schedule == "step":
        at_end = total("captured", "weight", *(["layer_sums"] if module._layers_apart else []))
        steps = Exchange(reduced=len(blocks) * total("sums", "sizes"))
        return {"sums and sizes, each step": steps, "at a pass's end": Exchange(reduced=at_end)}
    parts = {"sums, reduce-scattered": Exchange(scattered=total("sums"))}
    if module.updates_per_window:
        windows = sum(math.ceil((last - first) / ranks) for first, last in blocks)
        votes = sum(module.get("sums", site).numel() * torch.int64.itemsize for site in sites)
        parts["votes for centroids, after a window on each GPU"] = Exchange(reduced=windows * votes)
    else:
        parts["centroids, all-gathered"] = Exchange(gathered=total(*module.gathered_buffers))
    return parts | {"sizes and the like, all-reduced": Exchange(reduced=total(*module.reduced_buffers))}


def estimate(cfg: Config, work: Workload, ranks: int) -> Estimate:
    """The estimate for `ranks` GPUs. Raises UserError where the run itself would, for the same numbers."""
    shape = work.shape
    info = pattern_info(cfg, shape, work.fit_windows)
    module = clustering_module(cfg, info)
    blocks = block_ranges(info.windows, windows_in_block(cfg.collect, info), ranks)
    predictor = predictor_module(cfg, info) if trains_predictor(cfg) else None
    book = empty_codebook(cfg, info)
    book_bytes = _nbytes(value for site in book.sites.values() for value in vars(site).values())
    book_bytes += sum(facts(name).calibrated_bytes(book) for name in calibrated_policies(cfg))
    weights = shape.parameters * shape.dtype.itemsize
    rank_windows = math.ceil(max(last - first for first, last in blocks) / ranks)

    clustering, kept = _clustering_bytes(cfg, module, ranks, rank_windows, weights)
    training = {} if predictor is None else {"training of the predictor, about": predictor.working_bytes()}
    learned = tuning_module(cfg, info).parameters() if cfg.tune.max_epochs else ()
    tuned = _nbytes(value for value in learned if value.requires_grad)
    tuning = {"tuned parameters, gradients, Adam's moments": 4 * tuned} if tuned else {}
    batch = cfg.trainer.batch_windows or DEFAULT_BATCH_WINDOWS
    logits = batch * cfg.data.seq_len * shape.vocabulary * shape.dtype.itemsize
    scoring = {"logits of a forward pass": logits, "codebook": book_bytes}
    stored = kept if cfg.collect.storage == "device" else 0
    others = {"scoring": scoring, "predictor": training, "tuning, without activations": tuning}
    peak = {"clustering": weights + sum(clustering.values())}
    peak |= {stage: weights + sum(parts.values()) + stored for stage, parts in others.items() if parts}

    disk = {}
    if cfg.collect.storage == "disk":
        disk[f"patterns, {math.ceil(info.windows / shard_windows(info))} shards"] = store_bytes(info)
    disk |= {"checkpoint of the clustering": _nbytes(module.state_dict().values()), "codebook": book_bytes}
    if predictor is not None:
        # A checkpoint has Adam's two moments besides the weights. The result has a low-bit copy's levels as bits.
        disk["checkpoint of the predictor"] = 3 * _nbytes(predictor.parameters())
        with torch.device("meta"):
            result = Predictor(replace(predictor.predictor.header, frozen=True))
        disk["predictor"] = _nbytes(result.state_dict().values())
    disk |= {"checkpoint of the tuning": 3 * tuned} if tuned else {}

    host = {"model while it loads": ranks * weights}
    if cfg.collect.storage == "memory":
        host["patterns"] = info.bytes_per_token() * info.tokens
    elif cfg.collect.storage == "disk":
        host["patterns read ahead"] = ranks * BLOCKS_READ * block_bytes(info, module.fields(), rank_windows)
    host["codebook"] = ranks * book_bytes
    exchange = exchanged(module, blocks, ranks) if ranks > 1 else {}
    seconds = _seconds(cfg, work, module, ranks, kept, sum(part.seconds(ranks) for part in exchange.values()))
    gpu = {"model": weights, **clustering, **training, **tuning, **scoring}
    sent = {name: round(part.sent(ranks)) for name, part in exchange.items()}
    return Estimate(ranks, disk, gpu, peak, host, sent, seconds)


def _clustering_bytes(
    cfg: Config, module: ClusteringModule, ranks: int, rank_windows: int, weights: int
) -> tuple[dict[str, int], int]:
    """A GPU's memory for clustering, by purpose, and the bytes of patterns that stay on it.

    rank_windows: the most windows of a block on one rank; weights: bytes of the model.
    """
    info = module.info
    buffers, fields = _nbytes(module.buffers()), module.fields()
    parts = {"buffers of the clustering": buffers, "workspace of the clustering, about": module.working_bytes()}
    if cfg.collect.storage == "device":
        kept = math.ceil(info.bytes_per_token() * info.tokens / ranks)
        return parts | {"patterns": kept}, kept
    readable = math.ceil(block_bytes(info, fields, info.windows) / ranks)
    total = int(known()["data_sheet"]["gpu_bytes"])
    own = math.ceil(windows_in_block(cfg.collect, info) / ranks)
    room = room_for_blocks(info, fields, own, total - weights - buffers, total, module.working_bytes())
    kept = min(room, readable)
    in_flight = BLOCKS_IN_FLIGHT * block_bytes(info, fields, rank_windows)
    return parts | {"patterns being copied": in_flight, "patterns kept, as far as they fit": kept}, kept


def stage_work(cfg: Config, work: Workload) -> dict[str, dict[str, float]]:
    """For each stage but clustering, two quantities that its seconds may be proportional to.

    They are `FLOPs` and `reads`, the number of activation values that the stage reads (for the predictor: values of its
    inputs).
    """
    shape, S = work.shape, cfg.data.seq_len
    fit, score = work.fit_windows * S, work.score_windows * S
    calibrated = min(cfg.collect.calibration_windows, work.fit_windows) * S if cfg.active == "threshold" else 0
    neurons = shape.layers * sum(shape.widths.values())
    masked = sum(policy != "dense" for policy in chosen_policies(cfg))
    amounts: dict[str, dict[str, float]] = {
        "collect": {"FLOPs": 2 * shape.body * (fit + calibrated), "reads": neurons * (fit + calibrated)},
        "evaluate": {"FLOPs": 2 * shape.parameters * score * (1 + masked), "reads": neurons * score * (1 + 2 * masked)},
    }
    if trains_predictor(cfg):
        module = predictor_module(cfg, pattern_info(cfg, shape, work.fit_windows))
        epochs, again = cfg.predictor.max_epochs, 2 * shape.body if cfg.collect.ffn_inputs == "streamed" else 0
        flops = 6 * sum(value.numel() for value in module.parameters()) + again
        reads = shape.layers * shape.hidden_size
        amounts["predict"] = {"FLOPs": flops * fit * epochs, "reads": reads * fit * epochs}
    return amounts


@cache
def _reference() -> tuple[Config, Workload]:
    """The run whose stages were measured."""
    cfg = load_config(None, known()["stages"]["overrides"])
    fit, score = cfg.data.fit_windows, cfg.data.score_windows
    if fit is None or score is None:
        raise ValueError(f"{KNOWN}: the overrides of the measured run must set data.fit_windows and data.score_windows")
    return cfg, Workload(_known_shape(cfg.model, cfg.sites), fit - cfg.monitor.windows, score, {})


def pass_seconds(module: ClusteringModule, share: float, kept: int, slow: bool = False) -> float:
    """Seconds of one pass after the first, on one GPU that has this share of the rows.

    kept: bytes of rows that stay on the GPU; slow: for clusters filled in order, whether to use the slower of the two
    nearest rates if none was measured at this size.
    """
    info, K, power = module.info, module.cfg.k, module.power
    rows = share * info.layers * info.tokens
    compute = 0.0
    for D in info.widths.values():
        pairs, packed = rows * K * D, rows * ops.row_bytes(D)
        accumulate = rate("accumulate, random ids", "apc", K, D)
        if module.updates_per_window:
            cut = share * info.windows * module.groups * K * D * 8  # bytes of sums that are cut after each window
            fill = rates("assign_with_capacity", "apc", K, D)[0 if slow else 1]
            compute += pairs / fill + packed / accumulate + cut / rate("binarize", "apc", K, D)
        elif power == 0:
            compute += pairs / rate("assign", "apc b1", K, D) + packed / accumulate
        else:
            read = rows * D / rate("accumulate_weighted, power 2, random ids", "apc", K, D)
            compute += pairs / rate(f"assign_weighted, power {power}", "apc", K, D) + read
    streamed = max(0.0, share * block_bytes(info, module.fields(), info.windows) - kept)
    return max(compute, streamed / rate("rows over the link", "copy", 0, max(info.widths.values())))


def _seconds(
    cfg: Config, work: Workload, module: ClusteringModule, ranks: int, kept: int, exchange: float
) -> dict[str, Seconds]:
    """Seconds by stage, in order. exchange: seconds of communication in one pass of clustering."""
    measured, reference = known()["stages"]["seconds"], stage_work(*_reference())
    seconds = {}
    for stage, amounts in stage_work(cfg, work).items():
        windows = work.score_windows if stage == "evaluate" else work.fit_windows
        share = _collect_share(cfg, windows, ranks) if stage == "collect" else math.ceil(windows / ranks) / windows
        scaled = [measured[stage] * amount / reference[stage][unit] * share for unit, amount in amounts.items()]
        seconds[stage] = Seconds(min(scaled), max(scaled), "scaled from a measured run, by FLOPs and by values read")
    seconds["cluster"] = _cluster_seconds(cfg, module, ranks, kept, exchange)
    if cfg.tune.max_epochs:
        tuned = known()["tuning"]
        share = math.ceil(work.fit_windows / ranks) / work.fit_windows
        amount = work.shape.parameters * work.fit_windows * cfg.data.seq_len * cfg.tune.max_epochs
        own = _known_shape(ModelConfig(), ["neuron"]).parameters * tuned["tokens"] * tuned["passes"]
        value = tuned["seconds"] * amount / own * share
        basis = f"scaled from a measured tuning ({tuned['from']}), by parameters and tokens"
        seconds["tune"] = Seconds(value, value, basis)
    order = ["collect", "cluster", "predict", "tune", "evaluate"]
    last = len(order) if cfg.stage == "all" else order.index(cfg.stage) + 1
    return {stage: seconds[stage] for stage in order[:last] if stage in seconds}


def _collect_share(cfg: Config, windows: int, ranks: int) -> float:
    """The windows that each rank runs to calibrate and collect, relative to the windows that a single rank would run.

    Short batches are padded (with patterns on disk, only those of the calibration).
    """
    batch = cfg.trainer.batch_windows or DEFAULT_BATCH_WINDOWS
    calibrated = min(cfg.collect.calibration_windows, windows) if cfg.active == "threshold" else 0

    def run(count: int, padded: bool, ranks: int) -> int:
        each = math.ceil(count / ranks)
        return math.ceil(each / batch) * batch if padded else each

    one, each = (run(windows, cfg.collect.storage != "disk", n) + run(calibrated, True, n) for n in (1, ranks))
    return each / one


def _cluster_seconds(cfg: Config, module: ClusteringModule, ranks: int, kept: int, exchange: float) -> Seconds:
    """Seconds of clustering as a range.

    Low: the kernels' seconds alone; high: these plus the seconds that the measured run spent outside its kernels.
    """
    share = math.ceil(module.info.windows / ranks) / module.info.windows
    passes = cfg.cluster.max_epochs
    kernels = passes * (pass_seconds(module, share, kept) + exchange)
    slow = passes * (pass_seconds(module, share, kept, slow=True) + exchange)
    basis = "kernels at measured rates; the upper bound adds the measured run's time outside kernels"
    if module.updates_per_window:
        basis += ". Filling clusters in order: rates of the nearest shapes, in clusters and in neurons"
    reference_cfg, reference = _reference()
    own = clustering_module(reference_cfg, pattern_info(reference_cfg, reference.shape, reference.fit_windows))
    in_kernels = reference_cfg.cluster.max_epochs * pass_seconds(own, 1.0, ALL_ROWS)
    return Seconds(kernels, slow + max(0.0, known()["stages"]["seconds"]["cluster"] - in_kernels), basis)
