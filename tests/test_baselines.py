"""The baselines equal a plain implementation in loops.

Their objective never rises, and neither a kill nor a second rank changes a bit.
"""

import pytest
import torch
from pytorch_lightning import Callback
from test_clustering import LAYERS, SEQ_LEN, WINDOWS, D, make_source, quiet_trainer

import tiny
import train
from apc import ops
from apc.cluster import hamming
from apc.cluster.algorithms import ALGORITHMS
from apc.cluster.codebook import KIND, VERSION, Codebook
from apc.cluster.lloyd import ClusteringModule
from apc.collect.loader import BlockLoader, PatternDataModule
from apc.config.load import load_config
from apc.config.schema import ClusterConfig
from apc.ops import reference
from apc.predict.module import nearest_clusters
from apc.run.folder import load_run
from apc.sparse.policies import Oracle
from apc.utils.errors import UserError
from apc.utils.tensor_files import load_tensors, save_tensors

FIELDS = ("centroids", "sizes", "profiles", "static", "thresholds")
KINDS = {"k-majority": {}, "penalised": {"penalty": 3}, "brb-kmeans": {}}
T = WINDOWS * SEQ_LEN


def options_of(kind, **options):
    return (
        dict(algorithm="brb-kmeans" if kind == "brb-kmeans" else "k-majority", weighting="binary")
        | KINDS[kind]
        | options
    )


def with_extremes(source):
    """The source with some rows of only ones and some of only zeros."""
    rows = source.block(0, WINDOWS, ["patterns.neuron"]).patterns["neuron"]
    rows[:, 5:9] = ops.pack(torch.ones(D, dtype=torch.bool))
    rows[:, 20:24] = 0
    return source


class Watch(Callback):
    """Records the centroids before each pass, and the objective."""

    def __init__(self):
        self.starts, self.captured = [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 0:
            self.starts.append(module.get("centroids", "neuron").clone())

    def on_train_epoch_end(self, trainer, module):
        self.captured.append(module.get("captured", "neuron").clone())


def fit(source, kind, block_windows=2, passes=12, **options):
    cfg = ClusterConfig(**(dict(k=7, max_epochs=passes, tolerance=0.0) | options_of(kind, **options)))
    module, watch = ALGORITHMS[cfg.algorithm](cfg, source.info, 1), Watch()
    trainer = quiet_trainer(max_epochs=passes, callbacks=[watch])
    trainer.fit(module, datamodule=PatternDataModule(source, BlockLoader(source, module.fields(), block_windows, 0)))
    return module, watch


def groups_of(source, scope):
    """The patterns of each group as lists of 0 and 1, in the order of their row numbers."""
    rows = ops.unpack(source.block(0, WINDOWS, ["patterns.neuron"]).patterns["neuron"], D).int()
    return [rows.transpose(0, 1).flatten(0, 1).tolist()] if scope == "pooled" else rows.tolist()


def literal(rows, start, passes, penalty=1, grid=None):
    """K-means in loops, by penalised Hamming distance, or by squared distance to means that are multiples of 1 / grid.

    Returns the masks, the sum of distances of each pass (squared ones in units of 1 / grid²), the clusters' sizes in
    the last, and how many were empty.
    """
    unit = grid or 1
    greatest = [sum(penalty if bit else 1 for bit in row) if grid is None else D * unit**2 for row in rows]
    centroids, masks, sums, empties = [[bit * unit for bit in c] for c in start], [list(c) for c in start], [], 0

    def cost(row, centroid):
        if grid is None:
            return sum(penalty if x and not c else int(c and not x) for x, c in zip(row, centroid, strict=True))
        return sum((x * unit - c) ** 2 for x, c in zip(row, centroid, strict=True))

    for _ in range(passes):
        members, distances = [[] for _ in centroids], []
        for row in rows:
            costs = [cost(row, centroid) for centroid in centroids]
            distances.append(min(costs))
            members[costs.index(min(costs))].append(row)
        sums.append(sum(distances))
        before = [list(c) for c in centroids]
        for k, own in enumerate(members):
            if own:
                ones = [sum(column) for column in zip(*own, strict=True)]
                masks[k] = [int(penalty * s > len(own) - s) for s in ones]
                means = [(2 * s * unit + len(own)) // (2 * len(own)) for s in ones]
                centroids[k] = masks[k] if grid is None else means
        shares = [(greatest[n] - distances[n]) * 2**24 // greatest[n] for n in range(len(rows))]
        worst = sorted(range(len(rows)), key=lambda n: (shares[n], n))  # noqa: B023
        empty = [k for k, own in enumerate(members) if not own]
        for k, n in zip(empty, worst, strict=False):
            centroids[k], masks[k] = [bit * unit for bit in rows[n]], list(rows[n])
        empties += len(empty)
        if centroids == before:
            break
    return masks, sums, [len(own) for own in members], empties


def check_literal(source, kind, k, scope, passes):
    module, watch = fit(source, kind, k=k, scope=scope, passes=passes)
    b = module._fraction_bits(D) if kind == "brb-kmeans" else 0
    first = ops.unpack(watch.starts[0], D).int().tolist()
    expected = [
        literal(rows, first[group], passes, module.cfg.penalty, 2**b if b else None)
        for group, rows in enumerate(groups_of(source, scope))
    ]
    for group, (masks, sums, sizes, _) in enumerate(expected):
        assert ops.unpack(module.get("centroids", "neuron")[group], D).int().tolist() == masks
        assert module.get("sizes", "neuron")[group].tolist() == sizes
        totals = [int(module.get("weight", "neuron")[group] - captured[group]) for captured in watch.captured]
        padded = sums + [sums[-1]] * (len(totals) - len(sums))  # a group may converge before another
        assert totals == padded
    assert module.codebook({}).problem() is None
    return module, expected


@pytest.mark.parametrize("scope", ["layer", "pooled"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_algorithm(kind, scope):
    module, _ = check_literal(with_extremes(make_source()), kind, 7, scope, 6)
    ones = ops.popcount(module.get("centroids", "neuron"))
    assert len(ones.unique()) > 3  # the size of centroids is free
    if kind == "brb-kmeans":
        means = module.get("means", "neuron").double() / 2 ** module._fraction_bits(D)
        assert ((means > 0) & (means < 1)).double().mean() > 0.3 and ops.row_bytes(D) * 8 != D


@pytest.mark.parametrize("kind", KINDS)
def test_one_cluster_is_the_majority_of_all_patterns(kind):
    module, _ = check_literal(with_extremes(make_source()), kind, 1, "layer", 3)
    assert module.get("sizes", "neuron").tolist() == [[T]] * LAYERS


@pytest.mark.parametrize("kind", KINDS)
def test_empty_clusters_are_reseeded_with_the_rows_that_agree_least(kind):
    source = with_extremes(make_source(prototypes=2))
    rows = source.block(0, WINDOWS, ["patterns.neuron"]).patterns["neuron"]
    rows[:, 30:110] = rows[:, 29:30]  # many first centroids are equal, and only one of those gets members
    _, expected = check_literal(source, kind, 30, "layer", 4)
    assert sum(empties for *_, empties in expected) > 0


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_never_rises(kind, init):
    module, watch = fit(with_extremes(make_source(seed=3)), kind, k=9, init=init)
    assert len(watch.captured) > 2 and (watch.captured[-1] > watch.captured[0]).all()
    for before, after in zip(watch.captured, watch.captured[1:], strict=False):
        assert (after >= before).all()
    assert 0 < module.history[-1]["captured"] <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_schedule_raises_the_objective_and_block_size_changes_no_bit(kind, monkeypatch):
    module, _ = fit(make_source(), kind, schedule="step")
    assert module.history[-1]["captured"] > module.history[0]["captured"]
    monkeypatch.setattr(hamming, "_TILE", 500)
    books = [fit(make_source(), kind, block_windows=size)[0] for size in (1, 4, 9)]
    monkeypatch.undo()
    books.append(fit(make_source(), kind)[0])
    for name in ("centroids", "sizes", "sums"):
        assert all(torch.equal(books[0].get(name, "neuron"), book.get(name, "neuron")) for book in books[1:])


def test_a_penalty_on_missing_ones_buys_coverage_with_density():
    source, figures = make_source(), []
    rows = source.block(0, WINDOWS, ["patterns.neuron"]).patterns["neuron"]
    for penalty in (1, 3, 9):
        module, _ = fit(source, "k-majority", penalty=penalty)
        book = module.codebook({})
        centroids = book.sites["neuron"].centroids
        masks = torch.stack([c[ids] for c, ids in zip(centroids, book.nearest(rows, centroids), strict=True)])
        figures.append((int(ops.popcount(masks).sum()), int(ops.popcount(masks & rows).sum())))
    assert figures == sorted(figures) and len({density for density, _ in figures}) == 3


def test_patterns_that_share_no_neuron_give_an_empty_mask_that_can_be_saved(tmp_path):
    source = make_source()
    rows = source.block(0, WINDOWS, ["patterns.neuron"]).patterns["neuron"]
    rows.copy_(ops.pack(torch.eye(D, dtype=torch.bool)[torch.arange(T) % D]))
    module, _ = fit(source, "k-majority", k=1)
    assert ops.popcount(module.get("centroids", "neuron")).tolist() == [[0]] * LAYERS
    path = tmp_path / "codebook.safetensors"
    module.codebook({}).save(path)
    book = Codebook.load(path)
    assert (book.centroid_size, book.penalty) == ("free", 1) and bool(book.sites["neuron"].profiles.isfinite().all())
    assert (ops.popcount(book.sites["neuron"].static) == ops.mask_size(D, 0.5)).all()


def test_codebooks_store_centroid_size_and_older_headers_load(tmp_path):
    path = tmp_path / "codebook.safetensors"
    fixed = trained_lloyd().codebook({})
    fixed.save(path)
    header, tensors = load_tensors(path, KIND, (VERSION,))
    assert header.pop("centroid_size") == "fixed" and header.pop("penalty") == 1
    save_tensors(path, KIND, VERSION, header, tensors)
    assert Codebook.load(path).centroid_size == "fixed"
    for change, problem in (
        ({"centroid_size": "some"}, "centroid size some, penalty 1 and weighting energy do not go together"),
        ({"centroid_size": "free"}, "centroid size free, penalty 1 and weighting energy do not go together"),
        ({"penalty": 0}, "centroid size fixed, penalty 0"),
    ):
        save_tensors(path, KIND, VERSION, header | change, tensors)
        with pytest.raises(UserError, match=problem):
            Codebook.load(path)
    free = fit(make_source(), "k-majority")[0].codebook({})
    free.centroid_size = "fixed"
    assert "does not have 22 ones in 43 neurons" in free.problem()
    free.centroid_size = "free"
    free.sites["neuron"].static[0] = 0
    assert "a mask in static of site neuron does not have 22 ones" in free.problem()
    free.sites["neuron"].centroids[0, 0, -1] = 1
    assert "a mask in centroids of site neuron has ones beyond its 43 neurons" in free.problem()


def trained_lloyd():
    source = make_source()
    module = ClusteringModule(ClusterConfig(k=3, max_epochs=1), source.info)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=PatternDataModule(source, BlockLoader(source, module.fields(), 2, 0)))
    return module


@pytest.mark.parametrize("scope", ["layer", "pooled"])
def test_oracle_and_labels_use_the_algorithms_own_distance(scope):
    source = make_source()
    book = fit(source, "penalised", scope=scope)[0].codebook({})
    block = source.block(0, WINDOWS, ["patterns.neuron"])
    labels = nearest_clusters(book, block)["neuron"]
    masked = 0
    for layer in range(LAYERS):
        rows, centroids = block.patterns["neuron"][layer], book.sites["neuron"].centroids[book.group(layer)]
        own = reference.assign_hamming(rows, centroids, 3)[0]
        assert torch.equal(labels[layer], own)
        masked += int((ops.assign(rows, centroids)[0] != own).sum())
        active = ops.unpack(rows, D)
        tokens = type("T", (), dict(layer=layer, site="neuron", active=active, values=active))
        assert torch.equal(Oracle(book, None, 0).decide(tokens).mask, ops.unpack(centroids[own], D))
    assert masked > 0  # the masked distance would give other clusters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "kmeans"}, "cluster.algorithm=kmeans: choose lloyd, apc-paper, brb-kmeans or k-majority"),
        ({"penalty": 0}, "cluster.penalty must be at least 1, got 0"),
        (
            {"weighting": "energy"},
            "cluster.algorithm=k-majority clusters binary patterns; set cluster.weighting=binary in place of energy",
        ),
        (
            {"algorithm": "brb-kmeans", "weighting": "magnitude"},
            "cluster.algorithm=brb-kmeans clusters binary patterns; .* in place of magnitude",
        ),
        (
            {"algorithm": "lloyd", "penalty": 3},
            "cluster.penalty=3 belongs to cluster.algorithm=k-majority; leave it out with lloyd",
        ),
        (
            {"algorithm": "brb-kmeans", "penalty": 2},
            "cluster.penalty=2 belongs to cluster.algorithm=k-majority; leave it out with brb-kmeans",
        ),
        ({"penalty": 2**40}, "cluster.penalty=1099511627776: distances of 144 patterns do not fit 63 bits; lower it"),
        ({"k": 145}, "cluster.k=145 is more than the 144 patterns to cluster"),
    ],
)
def test_unsupported_options_are_errors_of_one_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        fit(make_source(), "k-majority", **options)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tiny.make_workplace(tmp_path_factory.mktemp("baselines"))


def words(kind, **changes):
    return {f"cluster.{key}": value for key, value in options_of(kind).items()} | changes


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_fills_the_table_and_a_killed_one_gives_the_same_codebook(workplace, kind):
    settings = words(
        kind, **{"trainer.checkpoint_every_n_steps": 1, "cluster.scope": "layer" if kind == "penalised" else "pooled"}
    )
    results = train.train(
        load_config(None, tiny.tiny_overrides(workplace, **settings, **{"run.name": f"whole-{kind}"}))
    )
    policies = {record["policy"]: record for record in results["policies"]}
    assert not any(record["missing"] for record in policies.values())
    assert (
        policies["oracle"]["density"] != policies["soft"]["density"]
        and results["conditions"]["centroid_size"] == "free"
    )
    whole = load_run(workplace / "runs" / f"whole-{kind}").codebook
    for kill_at in (4, 7):
        name = f"killed-{kind}-{kill_at}"
        run = load_config(None, tiny.tiny_overrides(workplace, **settings, **{"run.name": name, "stage": "cluster"}))
        with tiny.killed_after(kill_at, ClusteringModule):
            train.train(run)
        train.train(run)
        again = load_run(workplace / "runs" / name).codebook
        for field in FIELDS:
            assert torch.equal(getattr(again.sites["neuron"], field), getattr(whole.sites["neuron"], field)), field


@pytest.mark.parametrize("kind", ["penalised", "brb-kmeans"])
def test_two_ranks_equal_one_bit_for_bit(workplace, kind):
    settings = words(
        kind, stage="cluster", **{"cluster.k": 20, "cluster.scope": "pooled" if kind == "penalised" else "layer"}
    )
    train.train(load_config(None, tiny.tiny_overrides(workplace, **settings, **{"run.name": f"one-{kind}"})))
    tiny.run_ranks(2, tiny.tiny_overrides(workplace, **settings, **{"run.name": f"two-{kind}"}))
    one, other = (load_run(workplace / "runs" / f"{name}-{kind}").codebook.sites["neuron"] for name in ("one", "two"))
    for field in FIELDS:
        assert torch.equal(getattr(one, field), getattr(other, field)), field
