"""What a run would take, before anything is loaded: patterns, bytes on disk, GPU and host, bytes that GPUs exchange, seconds of each stage.

Bytes come from the very classes that will hold them, made on torch's meta device, which stores nothing. Seconds are rough: clustering is what its
kernels read and compute over rates that `benchmarks/results.csv` has for an H100; the other stages are scaled from one measured run
(`apc/estimate.yaml`), once by FLOPs and once by what they read, and the two are the ends of a range. Nothing here is a measurement.

Shape letters as in `apc.patterns` and `apc.clustering`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import yaml

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
from apc.data import bundled, gguf
from apc.data.ffn import check_config, find_ffns
from apc.data.models import find_model
from apc.data.text import count_windows, on_hub
from apc.estimate.exchange import Exchange
from apc.estimate.measured_rates import rate, rates
from apc.predict.module import PredictorModule
from apc.sparse.policies import default_policies, trains_predictor, tuned_forms
from apc.tune.module import TuningModule
from apc.utils import wheels
from apc.utils.errors import UserError

KNOWN = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights. parameters: all; body: those of the layers, without embeddings and head; origin: where this is known from."""

    layers: int
    hidden_size: int
    ffn_width: int
    vocabulary: int
    parameters: int
    body: int
    dtype: torch.dtype
    widths: dict[str, int]  # neurons at each of the run's sites
    origin: str


@dataclass(frozen=True)
class Workload:
    """A run's model and how many windows it fits and scores; counted: how each of the two numbers is known."""

    shape: ModelShape
    fit_windows: int
    score_windows: int
    counted: dict[str, str]


@dataclass(frozen=True)
class Seconds:
    """Seconds from `low` to `high`, and how they came about."""

    low: float
    high: float
    basis: str


@dataclass(frozen=True)
class Estimate:
    """What a run on `ranks` GPUs would take. Bytes by what they are for: on `disk`; on each GPU (`gpu`); on the host, of all processes (`host`);
    that each GPU sends to others in one pass of clustering (`exchange`). `peak`: the most of a GPU that a stage takes, by stage."""

    ranks: int
    disk: dict[str, int]
    gpu: dict[str, int]
    peak: dict[str, int]
    host: dict[str, int]
    exchange: dict[str, int]
    seconds: dict[str, Seconds]


# ---- what is known without the weights


@cache
def known() -> dict:
    return yaml.safe_load(KNOWN.read_text())


def read_shape(cfg: ModelConfig, sites: list[str]) -> tuple[ModelShape, object | str]:
    """The model's shape from its configuration, without its weights, and its tokenizer, or why there is none.

    Raises UserError where neither the configuration can be read nor the shape is known.
    """
    from transformers import AutoConfig, AutoTokenizer

    if Path(cfg.path).suffix == ".gguf":
        path = Path(cfg.path).expanduser()
        return _shape(
            gguf.load_gguf_config(path), cfg, sites, "the .gguf file", torch.float32
        ), gguf.load_gguf_tokenizer(path)
    folder = wheels.cache_dir() / bundled.MODEL_FOLDER
    source, local_only = find_model(cfg.path) if cfg.path != "bundled" else (str(folder), True)
    options = dict(revision=cfg.revision, trust_remote_code=cfg.trust_remote_code, local_files_only=local_only)
    try:
        shape = _shape(AutoConfig.from_pretrained(source, **options), cfg, sites, "its config.json")
    except (OSError, ValueError, ImportError, KeyError) as error:
        if cfg.path in known()["shapes"]:
            return _known_shape(cfg, sites), "only the model's shape is known here"
        reason = (
            "neither the hub nor the local cache has its config.json"
            if local_only and source == cfg.path
            else _first_line(error)
        )
        raise UserError(
            f"model.path={cfg.path}: its shape is not known ({reason}); give a folder with its config.json and tokenizer: model.path=FOLDER"
        ) from error
    try:
        return shape, AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:  # said where windows have to be counted
        return shape, _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _known_shape(cfg: ModelConfig, sites: list[str]) -> ModelShape:
    from transformers import AutoConfig

    return _shape(AutoConfig.for_model(**known()["shapes"][cfg.path]), cfg, sites, f"known beforehand, {KNOWN.name}")


def _shape(config, cfg: ModelConfig, sites: list[str], origin: str, stored: torch.dtype | None = None) -> ModelShape:
    """stored: the type that dtype=auto means, where the configuration does not say it."""
    from transformers import AutoModelForCausalLM

    check_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code)
    ffns = find_ffns(model)
    inner = config.get_text_config()
    own = stored or (getattr(torch, inner.dtype) if isinstance(inner.dtype, str) else inner.dtype) or torch.float32
    embeddings = {
        id(layer.weight): layer.weight.numel()
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if layer is not None
    }
    parameters = sum(value.numel() for value in model.parameters())
    return ModelShape(
        len(ffns), ffns[0].hidden_size, ffns[0].width, inner.vocab_size, parameters, parameters - sum(embeddings.values()),
        own if cfg.dtype == "auto" else getattr(torch, cfg.dtype), {site: ffns[0].site_width(site) for site in sites}, origin,
    )  # fmt: skip


def read_workload(cfg: Config) -> Workload:
    """The run's model and windows. Raises UserError where one of them can't be known without the weights or the hub."""
    shape, tokenizer = read_shape(cfg.model, cfg.sites)
    found = {role: _windows(cfg, role, tokenizer) for role in ("fit", "score")}
    fit = found["fit"][0] - cfg.monitor.windows
    if fit < 1:
        raise UserError(
            f"data.fit: {found['fit'][0]} windows, and monitor.windows={cfg.monitor.windows} leaves none to fit; give more text"
        )
    return Workload(shape, fit, found["score"][0], {role: how for role, (_, how) in found.items()})


def _windows(cfg: Config, role: str, tokenizer: object | str) -> tuple[int, str]:
    """(how many, how that is known)"""
    asked, source = getattr(cfg.data, f"{role}_windows"), getattr(cfg.data, role)
    if not on_hub(cfg.data, role) and not isinstance(tokenizer, str):
        return count_windows(cfg.data, role, tokenizer), "counted"
    if asked is not None:
        return asked, f"as data.{role}_windows says"
    text = known()["texts"].get(source, {}).get(cfg.model.path)
    if text is None:
        missing = (
            "it lies on the hub"
            if on_hub(cfg.data, role)
            else f"the model's tokenizer, which would count them, can't be loaded ({tokenizer})"
        )
        raise UserError(
            f"data.{role}={source}: how many tokens it has is not known: {missing}; set data.{role}_windows=N"
        )
    return text["tokens"] // cfg.data.seq_len, text["from"]


# ---- what the run will hold


def pattern_info(cfg: Config, shape: ModelShape, windows: int) -> PatternInfo:
    """What the run's patterns will be, as `collect` will describe them."""
    stored = trains_predictor(cfg) and cfg.collect.ffn_inputs == "stored"
    rule = ActiveRule(cfg.active, cfg.sparsity)
    return PatternInfo(
        shape.layers,
        shape.hidden_size,
        shape.ffn_width,
        windows,
        cfg.data.seq_len,
        shape.widths,
        rule,
        cfg.collect.importance,
        stored,
        identity={},
    )


def clustering_module(cfg: Config, info: PatternInfo) -> ClusteringModule:
    """The module that the run will train, without memory for its buffers. Raises UserError as the module itself does."""
    with torch.device("meta"):
        return ALGORITHMS[cfg.cluster.algorithm](cfg.cluster, info, cfg.seed)


def empty_codebook(cfg: Config, info: PatternInfo) -> Codebook:
    """The codebook that the run will leave, without memory for its tensors."""
    K, L = cfg.cluster.k, info.layers
    G = 1 if cfg.cluster.scope == "pooled" else L
    with torch.device("meta"):
        sites = {
            site: SiteCodebook(
                torch.empty(G, K, ops.row_bytes(D), dtype=torch.uint8), torch.empty(G, K, D, dtype=torch.float16), torch.empty(G, K, dtype=torch.int64),
                torch.empty(L, ops.row_bytes(D), dtype=torch.uint8), torch.empty(L),
            )
            for site, D in info.widths.items()
        }  # fmt: skip
    return Codebook(
        sites,
        dict(info.widths),
        L,
        info.hidden_size,
        info.ffn_width,
        cfg.cluster.scope,
        cfg.cluster.weighting,
        cfg.cluster.density,
        cfg.active,
        cfg.sparsity,
    )


def predictor_module(cfg: Config, info: PatternInfo) -> PredictorModule:
    """The module that trains the run's predictor, without memory for its weights."""
    with torch.device("meta"):
        return PredictorModule(cfg.predictor, empty_codebook(cfg, info), info, None, cfg.seed)


def tuning_module(cfg: Config, info: PatternInfo) -> TuningModule:
    """The module that tunes the run's codebook and predictor, without memory for their weights, and without a model."""
    predictor = predictor_module(cfg, info).predictor if tuned_forms(cfg) else None
    with torch.device("meta"):
        return TuningModule(cfg.tune, None, None, empty_codebook(cfg, info), predictor, None, cfg.seed)


def _nbytes(tensors: Iterable[object]) -> int:
    return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


def exchanged(module: ClusteringModule, blocks: list[tuple[int, int]], ranks: int) -> dict[str, Exchange]:
    """What a pass exchanges, by what it is; the first pass, which also counts each layer. Not in it: re-seeding, and the sums of a checkpoint."""
    sites = module.info.sites

    def held(*names: str) -> int:
        return sum(module.get(name, site).nbytes for name in names for site in sites)

    small = held("captured", "weight")
    if module.cfg.schedule == "step":
        at_end = small + (held("layer_sums") if module._layers_apart else 0)
        return {
            "sums and sizes, each step": Exchange(reduced=len(blocks) * held("sums", "sizes")),
            "at a pass's end": Exchange(reduced=at_end),
        }
    found = {"sums, reduce-scattered": Exchange(scattered=held("sums"))}
    small += held("sizes", "layer_sums")
    if module.cfg.algorithm == "apc-paper":
        chunks = sum(math.ceil((last - first) / ranks) for first, last in blocks)
        found["centroids' votes, a window of each GPU at a time"] = Exchange(
            reduced=chunks * sum(module.get("sums", site).numel() * 8 for site in sites)
        )
        small += held("cluster_of")
    else:
        found["centroids, all-gathered"] = Exchange(
            gathered=held("centroids", *(["means"] if module.cfg.algorithm == "brb-kmeans" else []))
        )
    return found | {"sizes and the like, all-reduced": Exchange(reduced=small)}


# ---- the estimate


def estimate(cfg: Config, work: Workload, ranks: int) -> Estimate:
    """What the run would take on so many GPUs, one process each. Raises UserError where the run itself would end on the same numbers."""
    info = pattern_info(cfg, work.shape, work.fit_windows)
    module, book = clustering_module(cfg, info), empty_codebook(cfg, info)
    blocks = block_ranges(info.windows, windows_in_block(cfg.collect, info), ranks)
    trainer = predictor_module(cfg, info) if trains_predictor(cfg) else None
    weights = work.shape.parameters * work.shape.dtype.itemsize
    rows = info.bytes_per_token() * info.tokens
    book_bytes = _nbytes(value for site in book.sites.values() for value in vars(site).values())
    buffers = _nbytes(module.buffers())

    clustering = {"buffers of the clustering": buffers, "its work, about": module.working_bytes()}
    largest = max(last - first for first, last in blocks)
    in_flight = BLOCKS_IN_FLIGHT * block_bytes(info, module.fields(), math.ceil(largest / ranks))
    own_rows = math.ceil(rows / ranks)
    if cfg.collect.storage == "device":
        kept = own_rows
        clustering["patterns"] = kept
    else:
        readable = math.ceil(block_bytes(info, module.fields(), info.windows) / ranks)
        total = int(known()["data_sheet"]["gpu_bytes"])
        room = room_for_blocks(
            info,
            module.fields(),
            math.ceil(windows_in_block(cfg.collect, info) / ranks),
            total - weights - buffers,
            total,
            module.working_bytes(),
        )
        kept = min(room, readable)
        clustering |= {"patterns on their way": in_flight, "patterns kept, as far as they fit": kept}
    training = {} if trainer is None else {"training of the predictor, about": trainer.working_bytes()}
    tuned = (
        _nbytes(value for value in tuning_module(cfg, info).parameters() if value.requires_grad)
        if cfg.tune.max_epochs
        else 0
    )
    tuning = {"what is tuned, gradients, Adam's moments": 4 * tuned} if tuned else {}
    batch = cfg.trainer.batch_windows or 8
    logits = batch * cfg.data.seq_len * work.shape.vocabulary * work.shape.dtype.itemsize
    scoring = {"logits of a forward pass": logits, "codebook": book_bytes}
    gpu = {"model": weights, **clustering, **training, **tuning, **scoring}
    stored = kept if cfg.collect.storage == "device" else 0
    peak = {"clustering": weights + sum(clustering.values()), "scoring": weights + sum(scoring.values()) + stored}
    peak |= {"predictor": weights + sum(training.values()) + stored} if trainer is not None else {}
    peak |= {"tuning, without activations": weights + sum(tuning.values()) + stored} if tuned else {}

    disk = (
        {f"patterns, {math.ceil(info.windows / shard_windows(info))} shards": store_bytes(info)}
        if cfg.collect.storage == "disk"
        else {}
    )
    disk |= {"checkpoint of the clustering": _nbytes(module.state_dict().values()), "codebook": book_bytes}
    if trainer is not None:
        parameters = _nbytes(trainer.parameters())
        disk |= {
            "checkpoint of the predictor": 3 * parameters,
            "predictor": parameters,
        }  # beside the weights Adam's two moments
    disk |= {"checkpoint of the tuning": 3 * tuned} if tuned else {}

    host = {"model while it loads": ranks * weights}
    if cfg.collect.storage == "memory":
        host["patterns"] = rows
    elif cfg.collect.storage == "disk":
        host["patterns read ahead"] = (
            ranks * BLOCKS_READ * block_bytes(info, module.fields(), math.ceil(largest / ranks))
        )
    host["codebook"] = ranks * book_bytes
    exchange = exchanged(module, blocks, ranks) if ranks > 1 else {}
    sent = {name: round(part.sent(ranks)) for name, part in exchange.items()}
    return Estimate(
        ranks,
        disk,
        gpu,
        peak,
        host,
        sent,
        _seconds(cfg, work, module, ranks, kept, sum(part.seconds(ranks) for part in exchange.values())),
    )


# ---- seconds


def stage_work(cfg: Config, work: Workload) -> dict[str, dict[str, float]]:
    """For each stage but clustering, what its seconds could go by: `FLOPs`, and the values that it `reads` of activations (predictor: inputs)."""
    shape, S = work.shape, cfg.data.seq_len
    fit, score = work.fit_windows * S, work.score_windows * S
    calibrated = min(cfg.collect.calibration_windows, work.fit_windows) * S if cfg.active == "threshold" else 0
    neurons = shape.layers * sum(shape.widths.values())
    masked = sum(policy != "dense" for policy in cfg.policies or default_policies())
    found = {
        "collect": {"FLOPs": 2 * shape.body * (fit + calibrated), "reads": neurons * (fit + calibrated)},
        "evaluate": {"FLOPs": 2 * shape.parameters * score * (1 + masked), "reads": neurons * score * (1 + 2 * masked)},
    }
    if trains_predictor(cfg):
        module = predictor_module(cfg, pattern_info(cfg, shape, work.fit_windows))
        epochs, again = cfg.predictor.max_epochs, 2 * shape.body if cfg.collect.ffn_inputs == "streamed" else 0
        parameters = sum(value.numel() for value in module.parameters())
        found["predict"] = {
            "FLOPs": (6 * parameters + again) * fit * epochs,
            "reads": shape.layers * shape.hidden_size * fit * epochs,
        }
    return found


@cache
def _reference() -> tuple[Config, Workload]:
    """The run whose stages were measured."""
    cfg = load_config(None, known()["stages"]["overrides"])
    shape = _known_shape(cfg.model, cfg.sites)
    return cfg, Workload(shape, cfg.data.fit_windows - cfg.monitor.windows, cfg.data.score_windows, {})


def pass_seconds(module: ClusteringModule, share: float, kept: int, slow: bool = False) -> float:
    """Seconds of one pass of `module` on one GPU over its `share` of the rows, of which `kept` bytes stay there, after the first pass.

    slow: by the slower of two measured rates, where clusters are filled in order and no rate is of their size.
    """
    info, K, power = module.info, module.cfg.k, module.power
    rows = share * info.layers * info.tokens
    compute = 0.0
    for D in info.widths.values():
        pairs, packed = rows * K * D, rows * ops.row_bytes(D)
        if module.cfg.algorithm == "apc-paper":
            cut = share * info.windows * module.groups * K * D * 8  # bytes of sums, after each window
            fill = rates("assign_with_capacity", "apc", K, D)[0 if slow else 1]
            compute += (
                pairs / fill
                + packed / rate("accumulate, random ids", "apc", K, D)
                + cut / rate("binarize", "apc", K, D)
            )
        elif power == 0:
            compute += pairs / rate("assign", "apc b1", K, D) + packed / rate("accumulate, random ids", "apc", K, D)
        else:
            read = rows * D / rate("accumulate_weighted, power 2, random ids", "apc", K, D)
            compute += pairs / rate(f"assign_weighted, power {power}", "apc", K, D) + read
    streamed = max(0.0, share * block_bytes(info, module.fields(), info.windows) - kept)
    return max(compute, streamed / rate("rows over the link", "copy", 0, max(info.widths.values())))


def _seconds(
    cfg: Config, work: Workload, module: ClusteringModule, ranks: int, kept: int, exchange: float
) -> dict[str, Seconds]:
    """exchange: seconds of it in a pass of clustering."""
    reference_cfg, reference = _reference()
    measured, reference_work = known()["stages"]["seconds"], stage_work(reference_cfg, reference)
    found = {}
    for stage, amounts in stage_work(cfg, work).items():
        windows = work.score_windows if stage == "evaluate" else work.fit_windows
        share = _collected(cfg, windows, ranks) if stage == "collect" else math.ceil(windows / ranks) / windows
        ends = sorted(
            measured[stage] * amount / reference_work[stage][unit] * share for unit, amount in amounts.items()
        )
        found[stage] = Seconds(*ends, "scaled from a measured run, by FLOPs and by what is read")
    found["cluster"] = _cluster_seconds(cfg, module, ranks, kept, exchange)
    if cfg.tune.max_epochs:
        found["tune"] = _tune_seconds(cfg, work, ranks)
    order = ["collect", "cluster", "predict", "tune", "evaluate"]
    last = {"all": "evaluate"}.get(cfg.stage, cfg.stage)
    return {stage: found[stage] for stage in order[: order.index(last) + 1] if stage in found}


def _collected(cfg: Config, windows: int, ranks: int) -> float:
    """What each of several ranks runs of the windows that are collected and calibrated on, over what one would: short passes are filled (on disk those of
    the calibration alone)."""
    batch = cfg.trainer.batch_windows or 8
    calibrated = min(cfg.collect.calibration_windows, windows) if cfg.active == "threshold" else 0

    def run(count: int, filled: bool, ranks: int) -> int:
        each = math.ceil(count / ranks)
        return math.ceil(each / batch) * batch if filled else each

    one, each = (run(windows, cfg.collect.storage != "disk", n) + run(calibrated, True, n) for n in (1, ranks))
    return each / one


def _cluster_seconds(cfg: Config, module: ClusteringModule, ranks: int, kept: int, exchange: float) -> Seconds:
    """From what the kernels take to that and what the measured run's clustering took besides them."""
    share = math.ceil(module.info.windows / ranks) / module.info.windows
    passes = cfg.cluster.max_epochs
    kernels = passes * (pass_seconds(module, share, kept) + exchange)
    slow = passes * (pass_seconds(module, share, kept, slow=True) + exchange)
    basis = "kernels at measured rates; at most what else the measured run took"
    if cfg.cluster.algorithm == "apc-paper":
        basis += ". Clusters filled in order: at the rates of the shapes nearest in clusters and in neurons"
    reference_cfg, reference = _reference()
    own = clustering_module(reference_cfg, pattern_info(reference_cfg, reference.shape, reference.fit_windows))
    beside = known()["stages"]["seconds"]["cluster"] - reference_cfg.cluster.max_epochs * pass_seconds(
        own, 1.0, 1 << 62
    )
    return Seconds(kernels, slow + max(0.0, beside), basis)


def _tune_seconds(cfg: Config, work: Workload, ranks: int) -> Seconds:
    """A measured tuning's seconds times the parameters and the tokens of all passes over its own."""
    measured = known()["tuning"]
    share = math.ceil(work.fit_windows / ranks) / work.fit_windows
    amount = work.shape.parameters * work.fit_windows * cfg.data.seq_len * cfg.tune.max_epochs
    own = _known_shape(ModelConfig(), ["neuron"]).parameters * measured["tokens"] * measured["passes"]
    seconds = measured["seconds"] * amount / own * share
    return Seconds(seconds, seconds, f"scaled from a measured tuning ({measured['from']}), by parameters and tokens")
