"""Edge cases of whole runs: silent or constant layers, the shortest windows, K = N, repeated text, float16 overflow."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import apc
import tiny
import train
from apc.cluster import seeding
from apc.collect.patterns import ActiveRule, PatternInfo
from apc.config.load import load_config
from apc.config.schema import ClusterConfig
from apc.utils.errors import UserError

TUNED = {"tune.max_epochs": 1, "tune.batch_windows": 5, "monitor.windows": 1}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tiny.make_workplace(tmp_path_factory.mktemp("numbers"))


def run(workplace, name, **changes):
    results = train.train(load_config(None, tiny.tiny_overrides(workplace, **(dict({"run.name": name}) | changes))))
    assert all(policy["missing"] is None and math.isfinite(policy["perplexity"]) for policy in results["policies"]), (
        results["policies"]
    )
    return {policy["policy"]: policy for policy in results["policies"]}, apc.load_run(workplace / "runs" / name)


def with_weights(workplace, name, change, **options):
    """The path of a copy of the tiny model with some weights changed in place."""
    folder = tiny.save_model(workplace / name, **options)
    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"cluster.init": "k-means++"}, {"cluster.algorithm": "k-majority", "cluster.weighting": "binary"}, TUNED],
)
def test_a_layer_that_never_fires(workplace, settings, capsys):
    dead = with_weights(workplace, "dead", lambda weights: weights["model.layers.1.mlp.gate_proj.weight"].zero_())
    policies, finished = run(
        workplace,
        f"dead-{'-'.join(map(str, settings.values()))}",
        **({"model.path": dead, "policies": "[dense,exact,oracle,predicted,soft]"} | settings),
    )
    assert "layer 1: 0 of 640 patterns are not empty" in capsys.readouterr().out
    assert policies["exact"]["per_layer"]["density"][1] == 0
    assert finished.codebook.sites["neuron"].sizes[1].sum() == 640


def test_a_model_with_constant_output(workplace):
    def change(weights):
        weights["model.embed_tokens.weight"][:] = weights["model.embed_tokens.weight"][:1]

    policies, finished = run(
        workplace, "constant", **{"model.path": with_weights(workplace, "constant-model", change), "active": "top"}
    )
    assert (finished.codebook.sites["neuron"].sizes.max(1).values == 640).all()


def test_windows_with_one_token_to_predict(workplace):
    policies, _ = run(
        workplace,
        "shortest",
        **{"data.seq_len": 2, "data.fit_windows": 60, "data.score_windows": 20, "collect.batch_tokens": 16},
    )
    assert policies["dense"]["perplexity"] > 1


@pytest.mark.parametrize("weighting", ["binary", "energy"])
def test_as_many_clusters_as_patterns(workplace, weighting):
    count = 4 * 32
    settings = {"data.fit_windows": 5, "cluster.k": count, "cluster.weighting": weighting, "monitor.windows": 1}
    policies, finished = run(workplace, f"every-{weighting}", **settings)
    sizes = finished.codebook.sites["neuron"].sizes
    assert (sizes.sum(1) == count).all() and policies["oracle"]["perplexity"] > 1
    with pytest.raises(UserError, match=f"cluster.k={count + 1} is more than the {count} patterns to cluster"):
        run(workplace, f"more-{weighting}", **(settings | {"cluster.k": count + 1}))


@pytest.mark.parametrize("count", [2, 1000, 4096, 5003])
def test_rows_drawn_from_many_never_repeat(count, monkeypatch):
    monkeypatch.setattr(seeding, "_PERMUTED", 1)
    rows = seeding.random_rows(count, 20, torch.Generator().manual_seed(4))
    assert len(rows) == min(count, 16 * 20) == len(rows.unique())
    assert int(rows.min()) >= 0 and int(rows.max()) < count
    other = seeding.random_rows(count, 20, torch.Generator().manual_seed(5))
    assert count < 1000 or not torch.equal(other, rows)


def test_rare_usable_rows_are_found_beyond_the_sample(monkeypatch):
    """Only the last 3 of 2,000 rows are usable, and the sample of 16 rows for each wanted one has too few of them."""

    class Rows:
        site = "neuron"

        def read(self, name, group, row):
            return (row >= 1997).to(torch.uint8).unsqueeze(1)

    monkeypatch.setattr(seeding, "_PERMUTED", 1)
    info = PatternInfo(1, 8, 8, 20, 100, {"neuron": 8}, ActiveRule("top", 0.5), False, False, {})
    module = seeding.CentroidInit(ClusterConfig(k=3, weighting="binary"), info)
    order = seeding.random_rows(2000, 3, torch.Generator().manual_seed(0))
    assert sorted(module._draw(Rows(), 0, order, 3).tolist()) == [1997, 1998, 1999]


def test_repeated_text(workplace):
    text = (workplace / "fit.txt").read_text().split()[:31]
    (workplace / "repeated.txt").write_text(" ".join(text * 40))
    _, finished = run(
        workplace, "repeated", **{"data.fit": workplace / "repeated.txt", "cluster.k": 64, "data.fit_windows": 10}
    )
    assert (finished.codebook.sites["neuron"].sizes.sum(1) == 9 * 32).all()


def test_half_precision_that_overflows_is_named(workplace):
    def change(weights):
        weights["model.layers.2.mlp.up_proj.weight"] *= 3e4

    large = with_weights(workplace, "large", change)
    with pytest.raises(
        UserError,
        match=r"NaN or infinite activations in layer 2 \(model.layers.2.mlp\), site neuron, "
        r"window 0: try model.dtype=float32",
    ):
        run(workplace, "large", **{"model.path": large, "model.dtype": "float16"})
    assert run(workplace, "large-float32", **{"model.path": large})[0]["dense"]["perplexity"] > 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinite_weights_are_named(workplace, value):
    def change(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    with pytest.raises(
        UserError,
        match=r"NaN or infinite activations in layer 1 \(model.layers.1.mlp\), site neuron, "
        r"window 0: .*check the weights",
    ):
        run(workplace, f"broken-{value}", **{"model.path": with_weights(workplace, f"broken-{value}", change)})
