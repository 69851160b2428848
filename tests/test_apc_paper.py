"""The paper's algorithm equals a plain implementation on sets and fractions."""

from fractions import Fraction

import pytest
import torch
from test_clustering import LAYERS, SEQ_LEN, WINDOWS, D, make_source, quiet_trainer

import tiny
from apc import ops
from apc.cluster.apc_paper import PaperClustering
from apc.collect.loader import BlockLoader, PatternDataModule
from apc.config.schema import ClusterConfig
from apc.run.folder import load_run
from apc.utils.errors import UserError


def fit(source, block_windows=2, **options):
    cfg = ClusterConfig(
        **(dict(k=6, weighting="binary", scope="pooled", algorithm="apc-paper", density=0.6, max_epochs=4) | options)
    )
    module = PaperClustering(cfg, source.info, 1)
    trainer = quiet_trainer(max_epochs=cfg.max_epochs)
    starts = []
    begin = module._begin_pass
    module._begin_pass = lambda: (begin(), starts.append(module.get("centroids", "neuron").clone()))
    trainer.fit(
        module,
        datamodule=PatternDataModule(source, BlockLoader(source, module.fields(), block_windows, 0, in_order=True)),
    )
    return module, starts


def literal(chunks, centroids, density, passes):
    """The algorithm in loops. chunks: lists of patterns, each a set of active neurons; centroids: such sets.

    Returns the last centroids, and the number of passes until no row moved.
    """
    K, m, before, chunks_seen = len(centroids), int(density * D + 0.5), None, 0
    for passes_run in range(1, passes + 1):
        clusters = []
        for chunk in chunks:
            n = len(chunk) // K
            left, cluster_of, members = list(range(len(chunk))), [-1] * len(chunk), []
            for k in range(K):
                left.sort(key=lambda row: (len(chunk[row] - centroids[k]), row))  # noqa: B023
                members.append(left[:n])
                left = left[n:]
                for row in members[k]:
                    cluster_of[row] = k
            clusters.append(cluster_of)
            h, updated = n * chunks_seen, []
            for k in range(K):
                mean = [Fraction(sum(d in chunk[row] for row in members[k]), n) for d in range(D)]
                blend = [((d in centroids[k]) * h + mean[d] * n) / (h + n) for d in range(D)]
                updated.append(set(sorted(range(D), key=lambda d: (-blend[d], d))[:m]))  # noqa: B023
            centroids, chunks_seen = updated, chunks_seen + 1
        if clusters == before:
            return centroids, passes_run
        before = clusters
    return centroids, passes


def sets(packed):
    return [set(mask.nonzero().flatten().tolist()) for mask in ops.unpack(packed, D)]


@pytest.mark.parametrize("k", [4, 6, 11])  # 4 divides the patterns of a window, the others leave some over
@pytest.mark.parametrize("block_windows", [1, 2, WINDOWS])
def test_equals_the_plain_algorithm(k, block_windows, capsys):
    source = make_source()
    module, starts = fit(source, block_windows, k=k)
    rows = ops.unpack(source.block(0, WINDOWS, ["patterns.neuron"]).patterns["neuron"], D).unflatten(
        1, (WINDOWS, SEQ_LEN)
    )
    chunks = [
        [set(row.nonzero().flatten().tolist()) for layer in range(LAYERS) for row in rows[layer, window]]
        for window in range(WINDOWS)
    ]
    expected, passes = literal(chunks, sets(starts[0][0]), 0.6, 4)
    assert sets(module.get("centroids", "neuron")[0]) == expected and len(module.history) == passes
    n = LAYERS * SEQ_LEN
    assert (module.get("sizes", "neuron") == WINDOWS * (n // k)).all()
    notice = f"a window's {n} patterns fill {k} clusters with {n // k} each; the {n % k} left over stay out"
    assert (notice in capsys.readouterr().out) == (n % k > 0)
    assert module.codebook({}).problem() is None
    assert torch.equal(
        module.get("layer_sums", "neuron"),
        ops.unpack(source.block(0, WINDOWS, ["patterns.neuron"]).patterns["neuron"], D).sum(1),
    )


def test_without_ties_the_cut_is_at_the_quantile():
    """Values above the 0.4 quantile are the 60 % largest."""
    blend = torch.randperm(D).double()
    above = blend > blend.quantile(0.4)
    assert torch.equal(ops.unpack(ops.binarize(blend.long().unsqueeze(0), 0.6), D)[0].nonzero(), above.nonzero())


def test_first_centroids_are_patterns_that_are_not_too_large():
    source = make_source()
    _, starts = fit(source, k=5, max_epochs=1, init="k-means++")
    rows = {
        row
        for layer in source.block(0, WINDOWS, ["patterns.neuron"]).patterns["neuron"]
        for row in map(tuple, layer.tolist())
    }
    for centroid in starts[0][0]:
        assert tuple(centroid.tolist()) in rows and 0 < ops.popcount(centroid) <= ops.mask_size(D, 0.6)


def test_training_stops_when_no_row_moves():
    module, _ = fit(make_source(prototypes=2), k=2, max_epochs=30)
    moved = [record["moved"] for record in module.history]
    assert len(moved) < 30 and moved[0] == 1.0 and moved[-1] == 0.0 and all(moved[:-1])


@pytest.mark.parametrize("scope", ["pooled", "layer"])
def test_scope_decides_the_number_of_groups(scope):
    module, _ = fit(make_source(), k=5, scope=scope)
    assert module.get("centroids", "neuron").shape[0] == (1 if scope == "pooled" else LAYERS)
    assert (module.get("sizes", "neuron") == WINDOWS * (module.chunk // 5)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weighting": "energy"},
            "apc-paper clusters binary patterns; set cluster.weighting=binary in place of energy",
        ),
        ({"schedule": "step"}, "leave out cluster.schedule=step"),
        ({"k": 33}, "cluster.k=33 is more than the 32 patterns of a window"),
        ({"algorithm": "apc"}, "cluster.algorithm=apc: choose lloyd, apc-paper"),
        ({"density": 0.01, "k": 4}, "patterns with some ones and no more than a centroid has"),
    ],
)
def test_unsupported_options_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        fit(make_source(), **options)


def test_two_ranks_give_the_same_codebook_twice(tmp_path):
    folder = tiny.make_workplace(tmp_path)
    books = []
    for name in ("one", "two"):
        options = {"algorithm": "apc-paper", "weighting": "binary", "scope": "pooled", "init": "random"}
        settings = {f"cluster.{key}": value for key, value in options.items()}
        tiny.run_ranks(2, tiny.tiny_overrides(folder, stage="cluster", **settings, **{"run.name": name}))
        books.append(load_run(folder / "runs" / name).codebook)
    assert books[0].problem() is None
    for field in ("centroids", "sizes", "profiles", "static"):
        assert torch.equal(getattr(books[0].sites["neuron"], field), getattr(books[1].sites["neuron"], field))
