"""Prox: its copy, scores and thresholds equal a plain implementation; what it reads is counted and keeps to `bytes`."""

import json

import pytest
import torch
import torch.nn.functional as F

import apc
import evaluate
import tiny
import train
from apc import ops
from apc.cluster.codebook import Codebook
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.ffn import find_ffns
from apc.data.models import load_model
from apc.estimate import estimate
from apc.sparse.policies.copies import SHARES, Prox
from apc.tune.calibrate import SamplePass
from apc.utils.errors import UserError

BYTES, D, E = 0.6, 52, 32
DENSE = 3 * D * E


def overrides(folder, **changes):
    values = {"policies": "[dense,prox]", "bytes": BYTES, "monitor.windows": 0}
    return tiny.tiny_overrides(folder, **(values | changes))


def run_train(folder, **changes):
    return train.train(load_config(None, overrides(folder, **changes)))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("prox"))
    run_train(folder)
    return folder


@pytest.fixture
def codebook(workplace):
    return apc.load_run(workplace / "runs" / "run").codebook


def model_of(folder):
    return load_model(ModelConfig(path=str(folder / "model"), device="cpu"), torch.device("cpu"))[0]


def test_a_copied_weight_is_the_nearest_of_16_levels(workplace, codebook):
    prox, ffns = Prox(codebook, None, 0), find_ffns(model_of(workplace))
    for layer, ffn in enumerate(ffns):
        rows = torch.stack([ffn.projection("gate"), ffn.projection("up")])
        spacing = codebook.calibrated["prox"]["spacings"][layer].float()  # one group: there are fewer than 64 neurons
        assert spacing.shape == (2, E, 1)
        torch.testing.assert_close(spacing[..., 0], rows.abs().amax(1) / 7.5, rtol=4e-3, atol=0)
        copied = prox.weights(layer)
        levels = copied / spacing
        assert torch.allclose(levels, levels.round(decimals=1)) and set((levels + 7.5).round().unique().tolist()) <= {
            *range(16)
        }
        assert ((copied - rows.transpose(1, 2)).abs() <= spacing * 0.535).all()  # spacings are rounded to 16 bits


class Plain:
    """The rule written out, run by replaced forwards: `inputs` of each layer and a top share or threshold of scores."""

    def __init__(self, model, codebook, inputs=None, top=None, scores=None, dense=False):
        self.layers, self.codebook = [block.mlp for block in model.model.layers], codebook
        self.inputs, self.top, self.thresholds, self.dense = inputs, top, scores, dense
        self.sizes, self.scores, self.masks, self.captured = ([[] for _ in self.layers] for _ in range(4))
        self.copies = [Prox(codebook, None, 0).weights(layer) for layer in range(len(self.layers))]
        for layer, mlp in enumerate(self.layers):
            mlp.forward = self.forward(layer, mlp)

    def forward(self, layer, mlp):
        norm = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).square().view(2, D, E).sum(1).sum(0).sqrt()
        norm = norm.bfloat16().float()

        def run(hidden):
            values = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
            sizes = hidden.abs() * norm
            self.sizes[layer].append(sizes.flatten())
            if self.inputs is None:
                return mlp.down_proj(values)
            gate, up = (torch.where(sizes >= self.inputs[layer], hidden, 0) @ copy for copy in self.copies[layer])
            norms = mlp.down_proj.weight.norm(dim=0)
            scores = (F.silu(gate) * up).abs() * norms
            mask = scores >= self.thresholds[layer] if self.top is None else ops.top_mask(scores, self.top)
            importance = (values * norms).abs()
            self.scores[layer].append(scores.flatten())
            self.masks[layer].append(mask.float().mean())
            self.captured[layer].append(((importance * mask).sum(-1) / importance.sum(-1)).flatten())
            return mlp.down_proj(values if self.dense else values * mask)

        return run

    @torch.no_grad()
    def over(self, model, windows):
        for window in windows:
            model(window[None])
        return self


def least_of_share(values, share):
    """The least value that at most the share of the values reaches, each layer's."""
    found = []
    for layer in values:
        falling = torch.cat(layer).sort(descending=True).values
        found.append(falling[round(share * len(falling)) - 1])
    return torch.stack(found)


@pytest.mark.parametrize("share", [0.3, BYTES, 0.97])
def test_calibration_equals_a_plain_implementation(workplace, codebook, share):
    model, windows = model_of(workplace), torch.randint(100, (5, 24), generator=torch.Generator().manual_seed(2))
    found = Prox.calibrate(SamplePass(model, find_ffns(model), codebook, None, windows), share)
    codebook = codebook.with_calibrated("prox", found, {})
    dense = Plain(model, codebook).over(model, windows)
    best, captured = None, -1.0
    for part in SHARES:
        left = share - (2 * E * part * (D * 4 / 16 + 1) + E + D) / DENSE
        inputs = least_of_share(dense.sizes, part)
        trial = Plain(model, codebook, inputs, ops.mask_size(D, left), dense=True).over(model, windows)
        mean = torch.cat([torch.cat(layer) for layer in trial.captured]).mean()
        best, captured = ((part, left, inputs), mean) if mean > captured + 1e-6 else (best, captured)
    part, left, inputs = best
    assert found["shares"].tolist() == [part] * 3
    trial = Plain(model, codebook, inputs, ops.mask_size(D, left)).over(model, windows)
    for name, every, of in (("inputs", trial.sizes, part), ("scores", trial.scores, left)):
        for values, threshold in zip(map(torch.cat, every), found[name], strict=True):
            # Additions in another order change the last bits, and with them a mask here and there.
            assert abs(int((values >= threshold).sum()) - round(of * len(values))) <= 0.002 * len(values)


def test_the_masked_model_and_its_costs_follow_the_rule(workplace, codebook):
    made, model = codebook.calibrated["prox"], model_of(workplace)
    run, windows = apc.load_run(workplace / "runs" / "run"), torch.randint(100, (2, 24))
    with torch.no_grad():
        masked = apc.sparsify(model, codebook, policy="prox")(windows).logits
        skipped = apc.sparsify(model, codebook, policy="prox", kernel="torch", scoring=True)(windows).logits
    apc.restore(model)
    Plain(model, codebook, made["inputs"], scores=made["scores"])
    with torch.no_grad():
        torch.testing.assert_close(masked, model(windows).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(skipped, masked, rtol=1e-4, atol=1e-4)
    dense, prox = run.results["policies"]
    read, density = prox["masked"]["read"], prox["masked"]["density"]
    assert read["gate"] == read["up"] == read["down"] == pytest.approx(density) and "copy" not in dense["read"]
    copy, small = 2 * E * read["copy"], E + D  # the copy's groups: one for each input and projection
    assert prox["bytes_share"] == pytest.approx(density + (copy * (D * 4 / 16 + 1) + small) / DENSE)
    assert prox["flops_share"] == pytest.approx(density + (copy * (D + 1) + small + D) / DENSE)
    assert prox["bytes_share"] == pytest.approx(BYTES, abs=0.06)
    policy = Prox(codebook, None, 0)
    assert policy.parameters_read("neuron") == policy.parameters_read("neuron", float(made["shares"][0]))


def test_the_codebook_keeps_the_copy_and_evaluation_needs_no_fit_text(workplace, codebook):
    assert codebook.calibration == {"prox": {"bytes": BYTES}}
    made = codebook.calibrated["prox"]
    assert {name: tuple(value.shape) for name, value in made.items()} == {
        "planes": (3, 4, 2, E, 16),
        "spacings": (3, 2, E, 1),
        "norms": (3, E),
        **dict.fromkeys(("inputs", "scores", "shares"), (3,)),
    }
    words = [f"checkpoint={workplace / 'runs' / 'run'}", "policies=[prox]", "run.name=again"]
    again = evaluate.evaluate(evaluate.config_of_run(None, words))
    results = json.loads((workplace / "runs" / "run" / "results.json").read_text())
    assert again["policies"][0]["perplexity"] == results["policies"][1]["perplexity"]
    with pytest.raises(UserError, match=r"^policy prox: the codebook has no thresholds for it; run train\.py with"):
        apc.sparsify(model_of(workplace), codebook.without_calibrated(), policy="prox")


def test_a_predictor_that_looks_ahead_is_left_alone(workplace):
    changes = {"policies": "[dense,predicted,prox]", "predictor.lookahead": 1, "run.name": "ahead"}
    results = run_train(workplace, **changes)
    plain = json.loads((workplace / "runs" / "run" / "results.json").read_text())
    assert results["policies"][2]["perplexity"] == plain["policies"][1]["perplexity"]
    run, model, tokens = apc.load_run(workplace / "runs" / "ahead"), model_of(workplace), torch.arange(9)[None]
    apc.sparsify(model, run.codebook, run.predictor, policy="prox", kernel="torch", scoring=True)(tokens)


def test_rows_are_counted_in_stored_bits(workplace):
    dense, prox = run_train(workplace, **{"run.name": "stored", "model.ffn_bits": 8, "bytes": 0.4})["policies"]
    copy = 2 * E * prox["masked"]["read"]["copy"] * (D * 4 / 16 + 1) + E + D
    rows = sum(prox["masked"]["bits_read"].values()) / 3 / 16
    assert 0.5 < dense["bytes_share"] < 0.8 and rows < 0.9 * prox["masked"]["density"]
    assert prox["bytes_share"] == pytest.approx(rows + copy / DENSE)
    assert prox["bytes_share"] == pytest.approx(0.4, abs=0.06)


def test_the_estimate_includes_the_copy(workplace):
    cfg = load_config(None, overrides(workplace))
    estimated = estimate.estimate(cfg, estimate.read_workload(cfg), 1).disk["codebook"]
    path = workplace / "runs" / "run" / "codebook.safetensors"
    copy = sum(value.nbytes for value in Codebook.load(path).calibrated["prox"].values())
    assert estimated < path.stat().st_size < estimated + 8000 and estimated > copy > 0.99 * Prox.calibrated_bytes(
        Codebook.load(path)
    )


def test_too_few_bytes_are_one_line(workplace, codebook):
    line = r"^policies: prox: its copy takes 6\.\d% of the FFN's bytes .*, and it may read 6\.0% in all; raise bytes$"
    with pytest.raises(UserError, match=line):
        run_train(workplace, bytes=0.06)
    model = model_of(workplace)
    fit = SamplePass(model, find_ffns(model), codebook, None, torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(UserError, match=line):
        Prox.calibrate(fit, 0.06)


@pytest.mark.parametrize(("family", "line"), [("gpt2", "needs FFNs with a gate"), ("mixtral", "does not support")])
def test_ffns_without_a_rule_are_named(tmp_path, family, line):
    with pytest.raises(UserError, match=f"^policies: prox {line}.*; leave it out$"):
        run_train(tiny.make_workplace(tmp_path, family))


def test_neurons_that_are_not_its_formula_are_named(workplace, codebook):
    model = model_of(workplace)
    ffns = find_ffns(model)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda hidden: mlp.down_proj((mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)).clamp(-1, 1))
    fit = SamplePass(model, ffns, codebook, None, torch.arange(16).view(2, 8))
    line = r"^model\.layers\.1\.mlp \(LlamaMLP\): its neurons are not act\(gate\) \* up, which prox copies"
    with pytest.raises(UserError, match=line):
        Prox.calibrate(fit, BYTES)
