"""Clustering: the objective never falls and empty clusters are re-seeded.

Neither a kill nor the number of ranks changes a bit of the codebook.
"""

import gc
from dataclasses import replace

import pytest
import torch
from pytorch_lightning import Callback, Trainer

import tiny
import train
from apc import ops
from apc.cluster.lloyd import ClusteringModule
from apc.collect.loader import BlockLoader, PatternDataModule
from apc.collect.memory import ResidentPatterns
from apc.collect.patterns import ActiveRule, Block, PatternInfo
from apc.collect.prefetch import BlockStream
from apc.config.load import load_config
from apc.config.schema import ClusterConfig
from apc.predict.module import PredictorModule
from apc.predict.predictor import Predictor
from apc.run import callbacks
from apc.run.callbacks import ResumePoint
from apc.run.folder import load_run
from apc.utils.errors import UserError

LAYERS, WINDOWS, SEQ_LEN, D = 2, 9, 16, 43


def make_source(seed=0, prototypes=12, windows=WINDOWS, empty_rows=3):
    """Random patterns around prototypes, with some empty rows."""
    generator = torch.Generator().manual_seed(seed)
    n = windows * SEQ_LEN
    base = torch.rand(LAYERS, prototypes, D, generator=generator).pow(4)
    chosen = base[:, torch.randint(prototypes, (n,), generator=generator)]
    values = (chosen * torch.rand(LAYERS, n, D, generator=generator) * 255).to(torch.uint8)
    values[:, :empty_rows] = 0
    active = values > 20
    info = PatternInfo(
        LAYERS,
        8,
        D,
        windows,
        SEQ_LEN,
        {"neuron": D},
        ActiveRule("top", 0.5),
        True,
        False,
        {},
        {"neuron": active.sum(1)},
    )
    source = ResidentPatterns(info, list(range(windows)), torch.device("cpu"))
    named = {"patterns.neuron": ops.pack(active), "importance.neuron": values, "scale.neuron": torch.ones(LAYERS, n)}
    source.add(Block.of_windows(named, range(windows), SEQ_LEN))
    return source


def quiet_trainer(**options):
    """A Lightning Trainer on the CPU that logs and saves nothing."""
    defaults = dict(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    return Trainer(**(defaults | options))


class Objective(Callback):
    def __init__(self):
        self.captured, self.ones = [], []

    def on_train_epoch_end(self, trainer, module):
        self.captured.append(module.get("captured", "neuron").clone())
        self.ones.append(ops.popcount(module.get("centroids", "neuron")))


def fit(source, block_windows=2, seed=0, **options):
    module = ClusteringModule(ClusterConfig(**(dict(k=7, max_epochs=12, tolerance=0.0) | options)), source.info, seed)
    watch = Objective()
    trainer = quiet_trainer(max_epochs=12, callbacks=[watch])
    trainer.fit(module, datamodule=PatternDataModule(source, BlockLoader(source, module.fields(), block_windows, seed)))
    return module, watch


@pytest.mark.parametrize("scope", ["layer", "pooled"])
@pytest.mark.parametrize("weighting", ["binary", "magnitude", "energy"])
@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_captured_never_falls_and_every_centroid_keeps_its_size(weighting, scope, init):
    module, watch = fit(make_source(), weighting=weighting, scope=scope, init=init)
    assert len(watch.captured) > 2
    for before, after in zip(watch.captured, watch.captured[1:], strict=False):
        assert (after >= before).all()
    assert all((ones == ops.mask_size(D, 0.5)).all() for ones in watch.ones)
    assert module.codebook({}).problem() is None


def test_block_size_and_order_do_not_change_a_bit():
    books = [fit(make_source(), block_windows=size)[0].get("centroids", "neuron") for size in (1, 2, 9)]
    assert torch.equal(books[0], books[1]) and torch.equal(books[0], books[2])


@pytest.mark.parametrize("weighting", ["binary", "energy"])
def test_row_totals_are_computed_once_for_all_passes(monkeypatch, weighting):
    counts, totals = [], ClusteringModule.totals
    monkeypatch.setattr(
        ClusteringModule, "totals", lambda self, rows: counts.append(rows.shape[1]) or totals(self, rows)
    )
    module, _ = fit(make_source(), weighting=weighting, block_windows=2, init="random")
    assert len(module.history) > 2 and sorted(counts) == [SEQ_LEN] + [2 * SEQ_LEN] * 4


def test_a_seed_gives_the_same_codebook_and_another_seed_another():
    one, again, other = (fit(make_source(), seed=seed)[0].get("centroids", "neuron") for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (2**31 - 1, dict(weighting="binary"), torch.int32),
        (2**31, dict(weighting="binary"), torch.int64),  # the sum of a neuron that is active in every row of a cluster
        (100, dict(weighting="binary", schedule="step"), torch.int64),
        (100, dict(weighting="energy"), torch.int64),
    ],
)
def test_sums_fit_their_type(rows, options, expected):
    info = replace(make_source().info, layers=1, windows=rows, seq_len=1)
    with torch.device("meta"):
        module = ClusteringModule(ClusterConfig(k=3, **options), info)
    assert module.get("sums", "neuron").dtype == expected


def test_training_stops_when_no_centroid_changes():
    module, watch = fit(make_source(prototypes=2), k=2)
    assert bool(module.converged) and len(watch.captured) < 12 and module.history[-1]["changed"] == 0


def test_empty_clusters_are_reseeded_with_the_rows_captured_worst():
    source = make_source(prototypes=3)
    module = ClusteringModule(ClusterConfig(k=5, weighting="binary"), source.info)
    module._trainer = type(
        "T", (), dict(datamodule=PatternDataModule(source, BlockLoader(source, module.fields(), 2, 0)))
    )()
    block = source.block(0, WINDOWS, module.fields())
    centroid = ops.cut_or_fill(ops.unpack(block.patterns["neuron"][:, 5], D), ops.mask_size(D, 0.5))
    # Five equal centroids: clusters 1 to 4 stay empty.
    module.get("centroids", "neuron").copy_(centroid.unsqueeze(1).expand(-1, 5, -1))
    module._begin_pass()
    module._add_rows("neuron", block)
    sizes = module.get("sizes", "neuron")
    assert (sizes[:, 1:] == 0).all()
    module._reseed("neuron", sizes == 0)
    for layer in range(LAYERS):
        active = ops.unpack(block.patterns["neuron"][layer], D)
        overlap, total = (active & ops.unpack(centroid[layer], D)).sum(1).tolist(), active.sum(1).tolist()
        keys = [((overlap[n] << 24) // total[n], n) for n in range(len(active)) if total[n]]
        order = [n for _, n in sorted(keys)]
        for cluster, row in zip(range(1, 5), order, strict=False):
            kept = ops.unpack(module.get("centroids", "neuron")[layer, cluster], D)
            inside = active[row]
            assert (kept & ~inside).sum() == 0 or (inside & ~kept).sum() == 0  # cut or filled, never both


def test_the_step_schedule_raises_the_objective_too():
    module, _ = fit(make_source(), schedule="step", k=12)
    assert module.history[-1]["captured"] > module.history[0]["captured"] > 0.3


@pytest.mark.parametrize("scope", ["layer", "pooled"])
@pytest.mark.parametrize("max_steps", [2, 5, 8])
def test_a_pass_cut_short_by_max_steps_counts_the_rows_it_saw(max_steps, scope):
    source = make_source()
    module = ClusteringModule(ClusterConfig(k=5, tolerance=0.0, scope=scope), source.info)
    loader = BlockLoader(source, module.fields(), 2, 0)
    trainer = quiet_trainer(max_steps=max_steps)
    trainer.fit(module, datamodule=PatternDataModule(source, loader))
    again = BlockLoader(source, module.fields(), 2, 0)
    passes = [list(again), list(again)]
    seen, last = passes[0][:max_steps], passes[(max_steps - 1) // 5][: (max_steps - 1) % 5 + 1]
    assert trainer.global_step == max_steps and len(module.history) == -(-max_steps // 5)
    assert module.get("sizes", "neuron").sum() == LAYERS * sum(block.tokens for block in last)
    energy = torch.cat([block.importance["neuron"] for block in seen], dim=1)
    expected = ops.accumulate_weighted(
        energy, torch.zeros(energy.shape[:2], dtype=torch.int64), ops.row_scales(energy, 2), 1, 2
    )[0]
    assert torch.equal(module.get("layer_sums", "neuron"), expected.squeeze(1))


def test_no_module_or_block_stream_outlives_a_run(workplace):
    def alive():
        return [thing for thing in gc.get_objects() if isinstance(thing, ClusteringModule | BlockStream)]

    gc.collect()
    before = {id(thing) for thing in alive()}
    train_tiny(workplace, **{"run.name": "freed", "stage": "cluster"})
    assert not [thing for thing in alive() if id(thing) not in before]


def test_more_clusters_than_patterns_is_an_error_and_empty_patterns_are_drawn_last(capsys):
    source = make_source(windows=1)
    with pytest.raises(UserError, match="cluster.k=17 is more than the 16 patterns"):
        fit(source, k=17)
    for k, notes in ((13, 0), (14, LAYERS)):
        assert fit(source, k=k)[0].get("sizes", "neuron").sum() == LAYERS * 16
        assert capsys.readouterr().out.count("13 of 16 patterns are not empty") == notes


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tiny.make_workplace(tmp_path_factory.mktemp("clustering"))


def train_tiny(workplace, **changes):
    return train.train(load_config(None, tiny.tiny_overrides(workplace, **changes)))


def same_tensors(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


PAPER = {"cluster.algorithm": "apc-paper", "cluster.weighting": "binary", "cluster.scope": "pooled"}


@pytest.mark.parametrize("options", [{}, {"cluster.schedule": "step"}, PAPER], ids=["epoch", "step", "paper"])
def test_a_killed_run_resumes_to_the_same_codebook_and_predictor(workplace, options):
    settings = {"trainer.checkpoint_every_n_steps": 1, "stage": "predict", **options}
    name = "-".join(options.values()) or "epoch"
    train_tiny(workplace, **{"run.name": f"whole-{name}", **settings})
    whole = load_run(workplace / "runs" / f"whole-{name}")
    for kill_at in (1, 5, 8):
        settings["run.name"] = f"killed-{name}-{kill_at}"
        for kind in (ClusteringModule, PredictorModule):
            with tiny.killed_after(kill_at, kind):
                train_tiny(workplace, **settings)
        train_tiny(workplace, **settings)
        again = load_run(workplace / "runs" / settings["run.name"])
        for name_of in ("centroids", "profiles", "sizes", "static"):
            assert torch.equal(
                getattr(again.codebook.sites["neuron"], name_of), getattr(whole.codebook.sites["neuron"], name_of)
            )
        assert same_tensors(again.predictor, whole.predictor)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {}),
        (
            3,
            {
                "collect.storage": "memory",
                "cluster.scope": "pooled",
                "cluster.weighting": "binary",
                "cluster.init": "k-means++",
            },
        ),
    ],
    ids=["two-ranks-layer-disk", "three-ranks-pooled-memory"],
)
def test_several_ranks_equal_one_bit_for_bit(workplace, ranks, options):
    name = f"ranks{ranks}"
    options = {"stage": "predict", **options}
    train_tiny(workplace, **{"run.name": f"{name}-alone", **options})
    words = tiny.tiny_overrides(workplace, **{"run.name": name, "collect.dir": workplace / f"stores-{name}", **options})
    tiny.run_ranks(ranks, words)
    alone, together = (load_run(workplace / "runs" / run).codebook.sites["neuron"] for run in (f"{name}-alone", name))
    for field in ("centroids", "sizes", "profiles", "static", "thresholds"):
        assert torch.equal(getattr(alone, field), getattr(together, field)), field
    assert isinstance(load_run(workplace / "runs" / name).predictor, Predictor)


def test_checkpoints_take_at_most_a_tenth_of_the_time(tmp_path, monkeypatch):
    now, saved = [100.0], []
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])

    class Slow:
        strategy = type("Strategy", (), {"broadcast": staticmethod(lambda value: value)})

        def save_checkpoint(self, path):
            path.write_bytes(b"whole")
            saved.append(now[0])
            now[0] += 2

    point = ResumePoint(tmp_path / "cluster.ckpt", 100)
    for moment in (100, 103, 119, 120, 130, 145):
        now[0] = max(now[0], moment)
        point.on_train_epoch_end(Slow(), None)
    assert saved == [100, 120, 145] and (tmp_path / "cluster.ckpt").read_bytes() == b"whole"
