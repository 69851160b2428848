"""Tuning uses the hard masks of inference, keeps the budget, lowers the divergence, and resumes to the same end."""

import json

import pytest
import torch
import torch.nn.functional as F

import apc
import tiny
import train
from apc import ops
from apc.collect.loader import WindowLoader
from apc.config.load import load_config
from apc.config.schema import ModelConfig, TuneConfig
from apc.data.ffn import find_ffns
from apc.data.models import load_model
from apc.predict.predictor import at_16_bits
from apc.tune import module
from apc.tune.module import TuningModule, _TuningForward, allocate_budget
from apc.utils.errors import UserError

POLICIES = [
    ("predicted", "cluster"),
    ("oracle", "cluster"),
    ("neuron-predictor", "neuron"),
    ("neuron-predictor", "low-bit"),
]
TUNED = {"tune.max_epochs": 3, "tune.batch_windows": 3, "predictor.bottleneck": 8}


def run(folder, *words, **changes):
    return train.train(load_config(None, [*tiny.tiny_overrides(folder, **(TUNED | changes)), *words]))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("tuning"))
    run(folder, stage="predict", **{"tune.max_epochs": 0, "run.name": "plain"})
    return folder


def test_an_error_names_costs_that_are_not_finite(workplace, monkeypatch):
    monkeypatch.setattr(TuningModule, "_costs", lambda self: torch.full((3, 52), torch.nan, dtype=torch.float64))
    with pytest.raises(UserError, match="the cost of neurons in layer 0 is not finite"):
        run(workplace, **{"run.name": "broken"})


@pytest.mark.parametrize(("policy", "form"), [POLICIES[0], POLICIES[-1]])
def test_two_ranks_tune_a_predictor_too(workplace, policy, form):
    changes = {"run.name": f"two-{form}", "tune.max_epochs": 1, "tune.policy": policy, "predictor.form": form}
    changes["stage"] = "tune"
    tiny.run_ranks(2, tiny.tiny_overrides(workplace, **(TUNED | changes)))
    assert apc.load_run(workplace / "runs" / f"two-{form}").predictor.corrects


def test_rows_of_a_table_have_the_gradient_of_indexing():
    table, ids = torch.randn(5, 7, requires_grad=True), torch.tensor([3, 0, 3, 3, 4])
    weights = torch.randn(5, 7)
    (module.rows_of(table, ids) * weights).sum().backward()
    gradient, table.grad = table.grad, None
    (table[ids] * weights).sum().backward()
    assert torch.allclose(gradient, table.grad) and not gradient[1].any()


def test_layers_keep_the_neurons_that_cost_most_to_drop():
    curves = torch.tensor([[9.0, 5.0, 1.0, 0.5], [8.0, 0.4, 0.3, 0.2], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    assert allocate_budget(curves, 6, 1) == [4, 1, 1]  # 9, 5, 1, 0.5 | 8 | the least that a layer keeps
    assert allocate_budget(curves, 12, 1) == [4, 4, 4] and allocate_budget(curves, 3, 1) == [1, 1, 1]
    assert allocate_budget(curves.flip(1), 6, 1) == [4, 1, 1]  # measured costs that rise with the rank are noise
    with pytest.raises(ValueError, match="13 neurons"):
        allocate_budget(curves, 13, 1)


def test_an_epoch_has_each_window_once_also_after_a_resume():
    windows = torch.arange(8 * 5).view(8, 5)
    loader, other = WindowLoader(windows, 3, seed=4), WindowLoader(windows, 3, seed=4)
    whole = [list(loader), list(loader)]
    for epoch in whole:
        tokens = torch.cat(epoch).flatten()
        assert len(epoch) == len(loader) == 2 and len(tokens.unique()) == 2 * 3 * 5  # 7 windows in threes
        assert all(torch.equal(row, row[0] + torch.arange(5)) for row in torch.cat(epoch))
    assert not torch.equal(torch.cat(whole[0]), torch.cat(whole[1]))
    iterator = iter(other)
    next(iterator)
    again = WindowLoader(windows, 3, seed=4)
    again.resume(other.progress())
    assert torch.equal(torch.cat([*again, *again]), torch.cat([whole[0][1], *whole[1]]))


def module_for(folder, cfg, codebook, predictor=None):
    model, _ = load_model(ModelConfig(path=str(folder / "model"), device="cpu"), torch.device("cpu"))
    windows = torch.randint(100, (3, 16), generator=torch.Generator().manual_seed(1))
    return TuningModule(cfg, model, find_ffns(model), codebook, predictor, windows), model, windows


def test_the_cost_of_a_neuron_is_its_share_of_the_divergence(workplace):
    """Scaling one neuron of one token by 1 − ε gives KL ≈ ε² · cost, averaged over tokens and many draws of labels."""
    left = apc.load_run(workplace / "runs" / "plain")
    module, model, windows = module_for(workplace, TuneConfig(max_epochs=1, policy="oracle"), left.codebook)
    D = left.codebook.widths["neuron"]
    fixed = torch.arange(D, 0, -1.0)
    module.ranking = lambda tokens: fixed.expand(len(tokens.values), D)  # rank r is neuron r
    draws = []
    for seed in range(40):
        module.seed = seed
        draws.append(module._costs())
    costs = torch.stack(draws).mean(0)
    layer, neuron = divmod(int(costs.argmax()), D)

    S, epsilon = windows.shape[1], 1e-2
    scale = torch.ones(S, S, D)
    scale[torch.arange(S), torch.arange(S), neuron] -= epsilon  # row s scales the neuron at position s

    def logits(window, scale):
        hook = find_ffns(model)[layer].down.register_forward_pre_hook(lambda _m, inputs: (inputs[0] * scale,))
        with torch.no_grad():
            logs = model(input_ids=window.expand(S, S)).logits.double().log_softmax(-1)
        hook.remove()
        return logs

    parts = [F.kl_div(logits(window, scale), logits(window, 1), log_target=True, reduction="sum") for window in windows]
    assert float(sum(parts)) / windows.numel() / epsilon**2 == pytest.approx(float(costs[layer, neuron]), rel=0.2)


@pytest.mark.parametrize(("policy", "form"), POLICIES)
def test_the_forward_pass_of_tuning_equals_the_policys(workplace, policy, form):
    run(workplace, stage="predict", **{"tune.max_epochs": 0, "predictor.form": form, "run.name": f"start-{form}"})
    left = apc.load_run(workplace / "runs" / f"start-{form}")
    module, model, windows = module_for(
        workplace, TuneConfig(max_epochs=1, policy=policy, correction=policy != "oracle"), left.codebook, left.predictor
    )
    with torch.no_grad():
        module.offsets.normal_(std=0.3)
        module.offsets.copy_(at_16_bits(module.offsets))  # as tuning rounds them
        if module.predictor is not None:
            module.predictor.correct.normal_(std=0.3)
            module.predictor.correct_bias.normal_(std=0.3)
            module.predictor.rounded()
    module.sizes.copy_(torch.tensor([20, 31, 26]))
    hooks = _TuningForward(module).hook()
    tuning = model(input_ids=windows).logits.detach()
    hooks.remove()
    codebook, predictor = module.tuned({})
    assert codebook.problem() is None and codebook.budget == [20, 31, 26]
    with torch.no_grad():
        expected = apc.sparsify(model, codebook, predictor, policy)(input_ids=windows).logits
    apc.restore(model)
    dense = model(input_ids=windows).logits.detach()
    assert (tuning - expected).abs().max() < 1e-4 * (expected - dense).abs().max()


@pytest.mark.parametrize(("policy", "form"), [pytest.param(*POLICIES[0], marks=pytest.mark.report), *POLICIES[1:]])
def test_the_divergence_falls_and_the_tuned_files_are_used(workplace, policy, form):
    name = f"after-{policy}-{form}"
    results = run(
        workplace,
        f"policies=[dense,exact,{policy}]",
        **{"tune.policy": policy, "tune.max_epochs": 15, "predictor.form": form, "run.name": name},
    )
    record = next(record for record in results["policies"] if record["policy"] == policy)
    history = json.loads((workplace / "runs" / name / "tune.json").read_text())
    divergences = [entry["divergence"] for entry in history["history"]]
    assert sum(divergences[-7:]) < 0.9 * sum(divergences[:7]) and sum(history["budget"]) == 3 * 26
    assert record["density"] == pytest.approx(0.5)
    assert record["bytes_share"] > 0.5 + 32 / (3 * 32 * 52)  # at least an offset is read
    left = apc.load_run(workplace / "runs" / name)
    assert left.codebook.budget == history["budget"] and (left.predictor is None) == (policy == "oracle")
    counts = ops.popcount(left.codebook.sites["neuron"].centroids)
    assert torch.equal(counts, torch.tensor(history["budget"], dtype=counts.dtype).unsqueeze(1).expand_as(counts))


@pytest.mark.parametrize("kill_at", [0, 6, 9])
def test_a_killed_run_resumes_to_the_same_end(workplace, kill_at):
    settings = {"stage": "tune", "trainer.checkpoint_every_n_steps": 1}
    run(workplace, **settings, **{"run.name": "whole"})
    settings["run.name"] = f"killed-{kill_at}"
    with tiny.killed_after(kill_at, TuningModule):
        run(workplace, **settings)
    run(workplace, **settings)
    whole, again = (apc.load_run(workplace / "runs" / name) for name in ("whole", settings["run.name"]))
    for name, value in whole.codebook.sites["neuron"].tensors().items():
        assert torch.equal(value, again.codebook.sites["neuron"].tensors()[name]), name
    assert whole.codebook.budget == again.codebook.budget
    assert all(
        torch.equal(value, again.predictor.state_dict()[name]) for name, value in whole.predictor.state_dict().items()
    )


def test_ranks_share_the_windows(workplace):
    same = {"tune.batch_windows": 3, "tune.policy": "oracle", "stage": "tune"}
    tiny.run_ranks(2, tiny.tiny_overrides(workplace, **(TUNED | same | {"run.name": "ranks"})))
    run(workplace, **same, **{"run.name": "alone"})
    together, alone = (apc.load_run(workplace / "runs" / name) for name in ("ranks", "alone"))
    assert together.codebook.budget == alone.codebook.budget
    offsets, expected = (run.codebook.sites["neuron"].offsets for run in (together, alone))
    assert (offsets - expected).norm() < 0.05 * expected.norm()  # the ranks' mean gradient is rounded differently


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune.policy": "soft"}, "tune.policy=soft: choose oracle, predicted, neuron-predictor"),
        ({"tune.batch_windows": 0}, "tune.batch_windows must be at least 1"),
        ({"tune.lr": 0}, "tune.lr must be above 0"),
        ({"tune.temperature": 1}, "tune.temperature: this key was removed"),
        ({"tune.precision": "64"}, "tune.precision=64"),
        ({"tune.policy": "neuron-predictor"}, "needs predictor.form=neuron"),
        (
            {"tune.batch_windows": 1, "trainer.devices": 2},
            "tune.batch_windows=1 is less than a window for each of 2 processes",
        ),
        ({"cluster.algorithm": "k-majority", "cluster.weighting": "binary"}, "tuning needs cluster.algorithm=lloyd"),
        ({"tune.policy": "neuron-predictor", "predictor.form": "neuron", "tune.lr": 1e30}, "not finite"),
        ({"cluster.scope": "pooled"}, "needs sites=.neuron. and cluster.scope=layer"),
        ({"tune.max_epochs": 0, "stage": "tune"}, "tunes nothing"),
    ],
)
def test_bad_settings_say_what_to_do(workplace, changes, message):
    with pytest.raises(UserError, match=message):
        run(workplace, **changes)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["predicted", "oracle"])
def test_the_same_seed_gives_the_same_codebook(workplace, policy):
    codebooks = []
    for name in ("once", "twice"):
        settings = {"model.device": "cuda", "run.name": f"{name}-{policy}", "tune.policy": policy}
        run(workplace, stage="tune", **settings)
        codebooks.append(apc.load_run(workplace / "runs" / settings["run.name"]).codebook.sites["neuron"].tensors())
    assert all(torch.equal(value, codebooks[1][name]) for name, value in codebooks[0].items())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("form", ["cluster", "neuron", "low-bit"])
def test_the_same_seed_gives_the_same_predictor(workplace, device, form):
    predictors = []
    for name in ("first", "second"):
        settings = {"model.device": device, "run.name": f"{name}-{form}-{device}", "predictor.form": form}
        settings["tune.max_epochs"] = 0
        run(workplace, stage="predict", **settings)
        predictors.append(apc.load_run(workplace / "runs" / settings["run.name"]).predictor.state_dict())
    assert all(torch.equal(value, predictors[1][name]) for name, value in predictors[0].items())
