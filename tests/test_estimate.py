"""A dry run estimates the bytes that a run writes and allocates and the seconds of measured runs, without weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from test_assets import _write_gguf
from test_clustering import make_source

import tiny
import train
from apc.cluster import apc_paper, lloyd
from apc.cluster.algorithms import ALGORITHMS
from apc.collect import store
from apc.collect.loader import BlockLoader, PatternDataModule
from apc.collect.memory import block_bytes
from apc.collect.patterns import ActiveRule, PatternInfo
from apc.collect.sharding import block_ranges
from apc.collect.store import PatternStore
from apc.config.load import load_config
from apc.config.schema import ClusterConfig, ModelConfig
from apc.data import gguf
from apc.estimate import estimate, measured_rates, table
from apc.estimate.exchange import Exchange, Links, iteration_seconds
from apc.run import cli
from apc.sparse.policies import trains_predictor
from apc.utils import distributed
from apc.utils.errors import UserError

K, WIDTH = 150, 404  # large enough that file headers are a small part of the files


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def words_for(folder, **changes):
    options = {
        "cluster.k": K,
        "predictor.bottleneck": 128,
        "cluster.max_epochs": 2,
        "predictor.max_epochs": 1,
        "monitor.windows": 0,
        "run.name": "sized",
        "trainer.keep_checkpoints": "true",
    }
    return tiny.tiny_overrides(folder, **(options | changes))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(configuration, its estimate on one device) of a finished run."""
    folder = tiny.make_workplace(tmp_path_factory.mktemp("sized"))
    tiny.save_model(folder / "model", width=WIDTH, layers=2)
    cfg = load_config(None, words_for(folder, policies="[predicted]"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SHARD_BYTES", 200_000)
        train.train(cfg)
        return cfg, estimate.estimate(cfg, estimate.read_workload(cfg), 1)


def test_estimated_bytes_on_disk_are_those_that_a_run_writes(ran):
    cfg, estimated = ran
    folder = Path(cfg.run.dir) / cfg.run.name
    (patterns,) = [path for path in Path(cfg.collect.dir).iterdir() if path.is_dir()]
    arrays = list(patterns.glob("*.npy"))
    shards = len({path.name[:5] for path in arrays})
    assert shards > 2
    written = {
        f"patterns, {shards} shards": sum(path.stat().st_size for path in arrays),
        "checkpoint of the clustering": (folder / "checkpoints" / "cluster.ckpt").stat().st_size,
        "codebook": (folder / "codebook.safetensors").stat().st_size,
        "checkpoint of the predictor": (folder / "checkpoints" / "predictor.ckpt").stat().st_size,
        "predictor": (folder / "predictor.safetensors").stat().st_size,
    }
    assert estimated.disk.keys() == written.keys()
    for name, size in written.items():
        assert estimated.disk[name] == pytest.approx(size, rel=0.01 if name.startswith("patterns") else 0.03), (
            name
        )  # headers with JSON


def test_block_bytes_are_those_of_the_blocks_that_are_read(ran):
    cfg, _ = ran
    (folder,) = [path for path in Path(cfg.collect.dir).iterdir() if path.is_dir()]
    source = PatternStore(folder)
    for fields in (source.info.fields(), ["patterns.neuron"], ["hidden"]):
        read = sum(value.nbytes for value in source.block(0, 3, fields).tensors().values())
        assert block_bytes(source.info, fields, 3) == read


@pytest.mark.parametrize("algorithm", ["lloyd", "apc-paper"])
def test_buffers_are_those_of_a_real_module(algorithm):
    info = PatternInfo(3, 32, 52, 5, 16, {"gate": 52, "down": 32}, ActiveRule("top", 0.5), False, False, {})
    cfg = load_config(
        None,
        [
            "sites=[gate,down]",
            "cluster.weighting=binary",
            "cluster.scope=pooled",
            "cluster.k=7",
            f"cluster.algorithm={algorithm}",
        ],
    )
    real = {"lloyd": lloyd.ClusteringModule, "apc-paper": apc_paper.PaperClustering}[algorithm](cfg.cluster, info)
    on_meta = estimate.clustering_module(cfg, info)
    assert [(name, value.shape, value.dtype) for name, value in real.named_buffers()] == [
        (name, value.shape, value.dtype) for name, value in on_meta.named_buffers()
    ]
    assert all(value.is_meta for value in on_meta.buffers()) and on_meta.working_bytes() == real.working_bytes()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("algorithm", ["lloyd", "apc-paper", "brb-kmeans"])
def test_estimated_exchange_is_that_of_a_pass(monkeypatch, algorithm, ranks):
    """One process plays the first of equal ranks: the bytes that it passes to each exchange are counted.

    A sum over ranks returns the rank's own value; only scalar counts are multiplied by the number of ranks.
    """
    source, summed, scattered, gathered, begun = make_source(windows=12), [], [], [], []
    module_of = ALGORITHMS[algorithm]
    begin = module_of._begin_pass
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    monkeypatch.setattr(
        distributed, "all_sum", lambda value: summed.append(value.nbytes) or (value if value.dim() else value * ranks)
    )
    monkeypatch.setattr(distributed, "all_max", lambda value: summed.append(value.nbytes) or value)
    monkeypatch.setattr(distributed, "sum_own_rows", lambda value: scattered.append(value.nbytes))
    monkeypatch.setattr(distributed, "gather_rows", lambda value: gathered.append(value.nbytes))
    monkeypatch.setattr(distributed, "all_concat", lambda value, dim: value)
    monkeypatch.setattr(BlockLoader, "owned", lambda self, tokens: torch.ones(len(tokens), dtype=torch.bool))
    monkeypatch.setattr(module_of, "_begin_pass", lambda self: (begun.append(len(summed)), begin(self)))
    monkeypatch.setattr(module_of, "_reseed", lambda self, site, empties: 0)  # re-seeding is not estimated
    options = dict(k=5, weighting="binary", scope="pooled", density=0.6, max_epochs=1, algorithm=algorithm)
    module = module_of(ClusterConfig(**options), source.info, 1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(
        module, datamodule=PatternDataModule(source, BlockLoader(source, module.fields(), 2 * ranks, 0, in_order=True))
    )
    blocks = block_ranges(source.info.windows, 2 * ranks, ranks)
    counts = 8 * len(blocks) + 8 if algorithm == "apc-paper" else 0  # windows per block, and rows that moved
    parts = estimate.exchanged(module, blocks, ranks).values()
    assert sum(part.reduced for part in parts) + counts == sum(summed[begun[0] :])
    assert (sum(part.scattered for part in parts), sum(part.gathered for part in parts)) == (
        sum(scattered),
        sum(gathered),
    )
    sent = (sum(scattered) + sum(gathered) + 2 * sum(part.reduced for part in parts)) * (ranks - 1) / ranks
    assert sum(part.sent(ranks) for part in parts) == pytest.approx(sent)


def test_the_measured_run_gets_its_measured_seconds():
    cfg = load_config(None, ["experiment=wikitext2"])
    estimated = estimate.estimate(cfg, estimate.read_workload(cfg), 1).seconds
    for stage, seconds in estimate.known()["stages"]["seconds"].items():
        if stage in ("collect", "predict", "evaluate"):
            assert estimated[stage].low == pytest.approx(seconds) == estimated[stage].high
        elif stage == "cluster":
            assert estimated[stage].low < seconds and estimated[stage].high == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("k", "storage", "measured"),
    [(2048, "device", 0.0805), (2048, "memory", 0.373), (16384, "device", 0.457), (16384, "memory", 0.488)],
)
def test_measured_passes_are_estimated_within_a_third(k, storage, measured):
    """benchmarks/results.csv, Lloyd iteration: one projection of 14,336 neurons, all rows on the GPU or hardly any."""
    cfg = load_config(None, ["experiment=paper", "cluster.algorithm=lloyd", f"cluster.k={k}", "sites=[gate]"])
    info = estimate.pattern_info(cfg, estimate.read_shape(cfg.model, cfg.sites)[0], 163)
    seconds = estimate.pass_seconds(estimate.clustering_module(cfg, info), 1.0, 1 << 62 if storage == "device" else 0)
    assert seconds == pytest.approx(measured, rel=1 / 3)


@pytest.mark.parametrize("run", ["k256", "k2048", "k16384"])
def test_measured_clusterings_of_the_paper_are_estimated_within_a_half(run):
    """Runs in docs/runs, on H200s, which have the H100's processor. There is no rate for K 16,384 at D 1,536."""
    folder = Path(__file__).parents[1] / "docs" / "runs" / f"paper-small-apc-paper-{run}"
    measured = json.loads((folder / "results.json").read_text())["seconds"]["cluster"]
    cfg = load_config(
        None, ["experiment=paper-small", f"cluster.k={run[1:]}", "data.fit_windows=133", "data.score_windows=147"]
    )
    estimated = estimate.estimate(cfg, estimate.read_workload(cfg), 1).seconds["cluster"]
    assert estimated.low < measured < 1.5 * estimated.high
    assert estimated.high < 1.5 * estimated.low or run == "k16384"


def test_more_gpus_need_less_each_and_exchange_something():
    cfg = load_config(None, ["experiment=paper", "cluster.algorithm=lloyd"])
    work = estimate.read_workload(cfg)
    one, eight = (estimate.estimate(cfg, work, ranks) for ranks in (1, 8))
    widths = 14336 + 14336 + 4096
    assert not one.exchange and eight.exchange["sums, reduce-scattered"] == 2048 * widths * 4 * 7 // 8
    assert eight.exchange["centroids, all-gathered"] == 2048 * widths // 8 * 7 // 8
    for stage in one.seconds:
        assert eight.seconds[stage].low < one.seconds[stage].low / 5
    assert (
        eight.peak["clustering"] < one.peak["clustering"]
        and eight.host["model while it loads"] == 8 * one.host["model while it loads"]
    )


def test_rings_send_a_rank_less_than_all_bytes():
    """K 16,384, D 14,336: each of 8 GPUs sends seven eighths of 1.88 GB of sums; 64 are limited by adapters."""
    exchange = Exchange(scattered=8 * 16384 * 14336, gathered=16384 * 1792, reduced=8 * 16384)
    assert exchange.sent(1) == exchange.seconds(1) == 0
    assert exchange.sent(8) == 7 / 8 * (8 * 16384 * 14336 + 16384 * 1792 + 2 * 8 * 16384)
    assert exchange.seconds(8) == pytest.approx(exchange.sent(8) / 450e9) and exchange.seconds(64) == pytest.approx(
        exchange.sent(64) / 400e9
    )
    assert exchange.seconds(64, Links(within=100e9)) == pytest.approx(exchange.sent(64) / 100e9)
    assert iteration_seconds(0.46, exchange, 8) == pytest.approx(0.46 / 8 + exchange.seconds(8))


def test_rates_come_from_the_nearest_row_and_an_error_names_a_missing_one():
    assert measured_rates.rate("assign", "apc b1", 256, 1536) < measured_rates.rate("assign", "apc b1", 16384, 14336)
    with pytest.raises(UserError, match="has no row for assign, abacus on an H100"):
        measured_rates.rate("assign", "abacus", 256, 1536)


def test_the_papers_experiment_has_the_papers_settings():
    cfg = load_config(None, ["experiment=paper"])
    assert (cfg.model.path, cfg.sites, cfg.sparsity, cfg.active) == (
        "mistralai/Mistral-7B-v0.1",
        ["gate", "up", "down"],
        0.5,
        "threshold",
    )
    assert (
        cfg.data.fit == cfg.data.score == "Salesforce/wikitext:wikitext-2-raw-v1:test"
        and cfg.data.in_sample
        and cfg.data.seq_len == 2048
    )
    assert (cfg.cluster.algorithm, cfg.cluster.k, cfg.cluster.density, cfg.cluster.max_epochs) == (
        "apc-paper",
        2048,
        0.6,
        10,
    )
    assert (cfg.cluster.scope, cfg.cluster.weighting, cfg.collect.forward) == ("pooled", "binary", "thresholded")
    assert (
        cfg.policies == ["dense", "exact", "oracle", "thresholded-oracle"]
        and cfg.monitor.windows == 0
        and not trains_predictor(cfg)
    )
    work = estimate.read_workload(cfg)
    assert (work.fit_windows, work.score_windows) == (163, 163)
    assert work.shape.layers * 163 * 2048 == 10_682_368


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("bundled:gemma3-270m", 268_098_176),
    ],
)
def test_known_shapes_have_as_many_parameters_as_their_publishers_say(path, parameters, tmp_path, monkeypatch):
    monkeypatch.setenv("APC_CACHE", str(tmp_path))
    cfg = load_config(None, [f"model.path={path}"])
    shape, tokenizer = estimate.read_shape(cfg.model, cfg.sites)
    assert (
        shape.parameters == parameters
        and shape.body < parameters
        and "known beforehand" in shape.origin
        and "only the model's shape is known" in tokenizer
    )


def dry_run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry-run", *words])
    cli.main("", train.train, dry_run=table.describe)


def test_a_dry_run_prints_a_table_without_weights_and_writes_nothing(tmp_path, monkeypatch, capsys):
    folder = tiny.make_workplace(tmp_path)
    (folder / "model" / "model.safetensors").unlink()
    dry_run(monkeypatch, *words_for(folder, **{"trainer.devices": 2, "cluster.k": 20}))
    output = capsys.readouterr().out
    assert output.startswith("ESTIMATED, not measured") and max(map(len, output.splitlines())) <= 120
    assert (
        "21 windows × 32 = 672 tokens (counted)" in " ".join(output.split())
        and "1 GPU" in output
        and "2 GPUs" in output
        and "8 GPUs" in output
    )
    for row in (
        "codebook",
        "checkpoint of the predictor",
        "sums, reduce-scattered",
        "model while it loads",
        "evaluate",
    ):
        assert f"  {row} " in output, row
    assert not (folder / "runs").exists() and not (folder / "stores").exists()


def test_a_configuration_alone_is_enough_if_it_gives_the_windows(tmp_path, monkeypatch, capsys):
    folder = tiny.make_workplace(tmp_path)
    for path in [path for path in (folder / "model").iterdir() if path.name != "config.json"]:
        path.unlink()
    dry_run(monkeypatch, *words_for(folder))
    assert "(as data.fit_windows says)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        dry_run(monkeypatch, *words_for(folder, **{"data.score_windows": "null"}))
    output = capsys.readouterr().err
    assert "the model's tokenizer, which would count them, can't be loaded (" in output and output.endswith(
        "); set data.score_windows=N\n"
    )


def test_the_shape_of_a_gguf_file_is_read_without_its_weights(tmp_path, monkeypatch):
    _write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf, "load_gguf", None)
    monkeypatch.setattr(gguf, "load_gguf_tokenizer", lambda path: "none inside")
    shape, _ = estimate.read_shape(ModelConfig(path=str(tmp_path / "tiny.gguf")), ["neuron", "down"])
    assert (shape.layers, shape.hidden_size, shape.ffn_width, shape.vocabulary, shape.dtype) == (
        1,
        32,
        64,
        259,
        torch.float32,
    )
    assert shape.widths == {"neuron": 64, "down": 32} and shape.body == 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32


@pytest.mark.parametrize("model", ["bundled", "gemma3-270m"])
def test_a_bundled_model_is_not_fetched_for_an_estimate(tmp_path, monkeypatch, capsys, model):
    monkeypatch.setenv("APC_CACHE", str(tmp_path / "cache"))
    dry_run(monkeypatch, "experiment=demo", f"model={model}")
    output = capsys.readouterr().out
    assert "known beforehand" in output and "40 windows × 512" in output and not (tmp_path / "cache").exists()


def test_a_stage_that_is_not_run_is_not_estimated(monkeypatch, capsys):
    dry_run(monkeypatch, "experiment=paper", "stage=cluster")
    output = capsys.readouterr().out
    assert (
        "  cluster " in output and "  evaluate " not in output and "IN-SAMPLE" in output and "none is trained" in output
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.path=someone/unknown-7b"],
            "model.path=someone/unknown-7b: its shape is not known "
            "(neither the hub nor the local cache has its config.json); give a",
        ),
        (["model.path=./nowhere"], "model.path=./nowhere: no such folder"),
        (
            ["data.fit=someone/texts:all:train"],
            "data.fit=someone/texts:all:train: how many tokens it has is not known: it lies on the hub; "
            "set data.fit_windows=N",
        ),
        (["data=wikitext2"], "data.fit=Salesforce/wikitext:wikitext-2-raw-v1:validation: how many tokens"),
        (["cluster.k=70000"], "cluster.k=70000 is more than the 65536 patterns of a window"),
        (["trainer.devices=200"], "163 windows of text are too few for 200 processes"),
        (["data.fit_windows=2", "monitor.windows=2"], "monitor.windows=2 holds out all data.fit_windows=2"),
    ],
    ids=["shape", "folder", "hub-text", "split", "clusters", "devices", "windows"],
)
def test_an_error_about_an_unknown_number_is_one_line(monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        dry_run(monkeypatch, "experiment=paper", *words)
    output = capsys.readouterr()
    assert (
        end.value.code == 2
        and output.err.startswith(f"error: {message}")
        and output.err.count("\n") == 1
        and not output.out
    )


def test_tuning_is_scaled_from_the_measured_one():
    measured = estimate.known()["tuning"]
    words = ["experiment=cluster-k512", f"data.fit_windows={measured['tokens'] // 2048 + 1}", "data.score_windows=147"]
    output = estimate.estimate(cfg := load_config(None, words), estimate.read_workload(cfg), 1).seconds
    assert list(output) == ["collect", "cluster", "predict", "tune", "evaluate"] and output[
        "tune"
    ].low == pytest.approx(measured["seconds"])
    twice = load_config(None, [*words, "tune.max_epochs=16", "stage=tune"])
    again = estimate.estimate(twice, estimate.read_workload(twice), 1).seconds
    assert list(again)[-1] == "tune" and again["tune"].low == pytest.approx(2 * measured["seconds"])


def test_the_memory_of_tuning_is_counted():
    cfg = load_config(None, ["experiment=cluster-k512", "data.fit_windows=133", "data.score_windows=147"])
    estimated = estimate.estimate(cfg, estimate.read_workload(cfg), 1)
    L, E, D, K, H = 30, 576, 1536, 512, 78
    parameters = L * (
        K * (D + E) + (E + 1) * H + (H + 1) * K + (H + 1) * E
    )  # scores, offsets, and the predictor with its correction
    assert estimated.gpu["tuned parameters, gradients, Adam's moments"] == 16 * parameters
    assert (
        estimated.disk["checkpoint of the tuning"] == 12 * parameters
        and estimated.peak["tuning, without activations"] > 16 * parameters
    )
