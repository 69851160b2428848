"""Staged masks: each stage keeps some of the one before, all read what the budget says, and tuning moves thresholds."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import apc
import tiny
import train
from apc import ops
from apc.config.load import load_config
from apc.config.schema import ModelConfig, StagesConfig, TuneConfig
from apc.data.ffn import find_ffns
from apc.data.models import load_model
from apc.ops.staged_ffn import log_energy
from apc.predict.predictor import at_16_bits
from apc.run import stages
from apc.sparse import sparse_ffn as sparse_ffns
from apc.sparse.policies import POLICIES, MaskInputs, make_policy
from apc.sparse.policies.staged import STAGES, best_clusters, least_kept
from apc.sparse.sparsify import handle_of
from apc.tune.calibrate import SamplePass
from apc.tune.module import TuningModule, _TuningForward
from apc.tune.steps import refine, step
from apc.utils.errors import UserError

CLUSTERS = ["staged-static", "staged-oracle", "staged-predicted"]
FORMS = [("cluster", CLUSTERS), ("low-bit", ["staged-neuron", "staged-prox"]), ("neuron", ["staged-neuron"])]
BYTES = 0.95  # the predictors of a model this small read much


def run(folder, name, **changes):
    values = {"bytes": BYTES, "run.name": name, "predictor.bottleneck": 8, "monitor.windows": 0}
    return train.train(load_config(None, tiny.tiny_overrides(folder, **(values | changes))))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("staged"))
    for form, policies in FORMS:
        run(folder, form, **{"predictor.form": form, "policies": f"[dense,{','.join(policies)}]"})
    return folder


def loaded(folder, name):
    """A finished run, its model, and some tokens that it was not fitted on, int64 [2, 24]."""
    model, _ = load_model(ModelConfig(path=str(folder / "model"), device="cpu"), torch.device("cpu"))
    tokens = torch.randint(100, (2, 24), generator=torch.Generator().manual_seed(3))
    return apc.load_run(folder / "runs" / name), model, tokens


def sample_pass(left, model, windows, **stages):
    return SamplePass(model, find_ffns(model), left.codebook, left.predictor, windows, stages=StagesConfig(**stages))


class Reads:
    """A meter that keeps each decision's masks."""

    def __init__(self):
        self.read = []

    def add(self, inputs, decision):
        self.read.append([decision.read[stage].expand(len(inputs.values), -1) for stage in STAGES])
        assert torch.equal(decision.mask.expand_as(self.read[-1][2]), self.read[-1][2])

    def share(self):
        return torch.stack([mask.float().mean() for layer in self.read for mask in layer]).mean().item()


@pytest.mark.parametrize(("form", "policies"), FORMS)
@torch.no_grad()
def test_the_masked_forward_reads_only_what_each_stage_keeps(workplace, form, policies):
    """An FFN that computes only the rows it may read gives the same logits."""
    left, model, tokens = loaded(workplace, form)
    for name in policies:
        reads = Reads()
        fit = sample_pass(left, model, tokens)
        fit.run(make_policy(name, left.codebook, left.predictor), reads, whole=True)
        logits = apc.sparsify(model, left.codebook, left.predictor, policy=name)(tokens).logits
        apc.restore(model)
        policy = make_policy(name, left.codebook, left.predictor)
        inputs = {}

        def forward(layer, mlp, reads=reads, policy=policy, inputs=inputs):
            def run(hidden):
                inputs[layer] = hidden.flatten(0, 1)
                rows_gate, rows_up, rows_down = reads.read[layer]
                gate = (mlp.gate_proj(hidden).flatten(0, 1) * rows_gate).view(*hidden.shape[:2], -1)
                up = (mlp.up_proj(hidden).flatten(0, 1) * rows_up).view_as(gate)
                values = (mlp.act_fn(gate) * up).flatten(0, 1)
                output = mlp.down_proj((values * rows_down).view_as(gate))
                if not policy.changes_output:
                    return output
                delta = policy.nominate(_inputs(policy, layer, inputs, values)).output_delta
                return output if delta is None else output + delta.view_as(output)

            return run

        for layer, block in enumerate(model.model.layers):
            block.mlp.forward = forward(layer, block.mlp)
        assert torch.allclose(model(tokens).logits, logits, atol=2e-5)
        for block in model.model.layers:
            del block.mlp.forward


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_clusters_run_in_stages_by_a_kernel(workplace, device):
    left, model, tokens = loaded(workplace, "cluster")
    model, tokens, given = model.to(device), tokens.to(device), (left.codebook, left.predictor, "staged-predicted")
    logits = apc.sparsify(model, *given)(tokens).logits
    kernel = "torch" if device == "cpu" else "triton"
    assert torch.allclose(apc.sparsify(model, *given, kernel=kernel, scoring=True)(tokens).logits, logits, atol=2e-5)
    dense = apc.restore(model)(tokens).logits
    assert (dense - logits).abs().max() > 1e-3
    if device == "cpu":
        with pytest.raises(UserError, match="staged-predicted: no kernel runs it on the CPU yet; use kernel=torch"):
            apc.sparsify(model, *given, kernel="numba")


def _inputs(policy, layer, hidden, values):
    return MaskInputs(layer, "neuron", values, hidden, policy.codebook, lambda *_: values.abs(), None, values)


@pytest.mark.parametrize("K", [5, 30], ids=["all-are-candidates", "eight-are-candidates"])
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("staged", [False, True])
def test_the_best_cluster_has_the_least_error_of_those_that_capture_most(K, tuned, staged):
    n, D, E = 20, 24, 10
    down, h = torch.randn(E, D), torch.randn(n, D)
    masks = torch.rand(K, D) < torch.rand(K, 1)
    offsets, correction = (torch.randn(K, E), torch.randn(n, E)) if tuned else (None, None)
    importance = h.abs() * down.norm(dim=0)
    ffn = SimpleNamespace(down_matrix=down)
    inputs = MaskInputs(0, "neuron", h, {}, None, lambda *_: importance, ffn)
    later = torch.rand(n, D) < 0.7 if staged else torch.ones(n, D, dtype=torch.bool)
    chosen = best_clusters(inputs, masks, later if staged else None, offsets, correction).tolist()
    for token, choice in enumerate(chosen):
        energy, captured, errors = importance[token].square(), [], []
        for k, nominated in enumerate(masks):
            price, mask = 0.05 * nominated.float().mean(), nominated & later[token]
            captured.append((energy[mask].sum() / energy.sum() - price).item())
            lost = down[:, ~mask] @ h[token, ~mask]
            lost = lost - offsets[k] - correction[token] if tuned else lost
            errors.append((lost.square().sum() / energy.sum() + price).item())
        candidates = sorted(range(K), key=lambda k: -captured[k])[:8]
        assert captured[choice] >= captured[candidates[-1]] - 1e-6
        assert errors[choice] == pytest.approx(min(errors[k] for k in candidates), abs=1e-6)


@pytest.mark.parametrize("rule", ["threshold", "top"])
@pytest.mark.parametrize(("form", "policies"), FORMS)
def test_stages_nest_and_read_the_budget_on_the_calibration_text(workplace, form, policies, rule):
    left, model, tokens = loaded(workplace, form)
    for name in policies:
        fit = sample_pass(left, model, tokens, rule=rule)
        tensors = POLICIES[name].calibrate(fit, BYTES)
        codebook = left.codebook.with_calibrated(name, tensors, {})
        reads = Reads()
        fit.run(make_policy(name, codebook, left.predictor), reads, whole=True)
        for gate, up, down in reads.read:
            assert not (down & ~up).any() and not (up & ~gate).any()
            if rule == "top":
                assert all(len(mask.sum(-1).unique()) == 1 for mask in (gate, up, down))
        rows = POLICIES[name].rows_share(fit, BYTES)
        assert rows < BYTES or name == "staged-static"
        # A static mask has a whole number of neurons for all tokens, and shares of a fixed size are rounded.
        assert reads.share() == pytest.approx(rows, abs=0.03 if rule == "top" or name in CLUSTERS else 0.002)


def test_bytes_are_the_rows_that_stages_read_and_the_predictor(workplace):
    for form, policies in FORMS:
        results = json.loads((workplace / "runs" / form / "results.json").read_text())
        codebook, predictor = (
            getattr(apc.load_run(workplace / "runs" / form), part) for part in ("codebook", "predictor")
        )
        for record in results["policies"][1:]:
            read = dict(record["masked"]["read"])
            copy = {"copy": read.pop("copy")} if "copy" in read else {}
            assert read["gate"] >= read["up"] >= read["down"] == pytest.approx(record["masked"]["density"])
            policy = make_policy(record["policy"], codebook, predictor)
            added = policy.parameters_read("neuron", **copy) / (3 * codebook.hidden_size * codebook.ffn_width)
            assert record["bytes_share"] == pytest.approx(sum(read.values()) / 3 + added)
            assert record["policy"] in policies


def test_given_shares_are_kept(workplace):
    left, model, tokens = loaded(workplace, "low-bit")
    fit = sample_pass(left, model, tokens, shares=[0.7, 0.5, 0.25])
    codebook = left.codebook.with_calibrated("staged-neuron", POLICIES["staged-neuron"].calibrate(fit, 1.0), {})
    reads = Reads()
    fit.run(make_policy("staged-neuron", codebook, left.predictor), reads, whole=True)
    for layer in reads.read:
        assert [mask.float().mean().item() for mask in layer] == pytest.approx([0.7, 0.5, 0.25], abs=1e-3)


def test_the_least_kept_score_keeps_the_share():
    scores = torch.randn(40, 50, generator=torch.Generator().manual_seed(2))
    among = torch.rand(40, 50, generator=torch.Generator().manual_seed(3)) < 0.6
    assert (scores >= least_kept(scores, 0.3)).sum() == 600
    assert ((scores >= least_kept(scores, 0.3, among)) & among).sum() == 600
    assert least_kept(scores, 0.9, among) == -torch.inf


def _plain_refine(nominated, counted, up_scores, down_scores, thresholds, temperature):
    up, down = step(up_scores, thresholds[0], temperature), step(down_scores, thresholds[1], temperature)
    free_up = step(up_scores.detach(), thresholds[0], temperature)
    read = counted, counted * free_up, counted * free_up * down
    return nominated * up * down, torch.stack([each.mean() for each in read])


def test_refined_masks_have_the_gradients_of_three_steps():
    def gradients(function):
        generator = torch.Generator().manual_seed(5)
        first, up, down = (torch.randn(30, 17, generator=generator).bfloat16().float() for _ in range(3))
        first.requires_grad_(True), up.requires_grad_(True)
        thresholds = torch.tensor([-0.25, 0.125, -0.5], requires_grad=True)
        nominated, counted = step(first, thresholds[0], 0.5), step(first.detach(), thresholds[0], 0.5)
        mask, shares = function(nominated, counted, up, down, thresholds[1:], 0.5)
        ((mask * torch.randn(30, 17, generator=generator)).sum() + shares @ torch.tensor([3.0, 5.0, 7.0])).backward()
        return mask.detach(), shares.detach(), first.grad, up.grad, thresholds.grad

    for fused, plain in zip(gradients(refine), gradients(_plain_refine), strict=True):
        assert torch.allclose(fused, plain, atol=1e-5), (fused - plain).abs().max()
        assert fused.abs().max() > 0


@pytest.mark.parametrize(
    ("policy", "form"), [("staged-oracle", "cluster"), ("staged-predicted", "cluster"), ("staged-neuron", "low-bit")]
)
def test_tuning_lowers_the_divergence_and_keeps_the_budget(workplace, policy, form):
    left, model, tokens = loaded(workplace, form)
    rows = POLICIES[policy].rows_share(sample_pass(left, model, tokens), BYTES)
    budget = BYTES - rows + 0.45
    changes = {"tune.max_epochs": 25, "tune.policy": policy, "tune.batch_windows": 18, "predictor.form": form}
    results = run(workplace, f"tuned-{policy}", policies=f"[dense,{policy}]", **changes, bytes=budget)
    left, model, tokens = loaded(workplace, f"tuned-{policy}")
    history = json.loads((left.folder.path / "tune.json").read_text())["history"]
    divergences = [entry["divergence"] for entry in history]
    assert sum(divergences[-10:]) / 10 < (1.0 if policy == "staged-oracle" else 0.93) * sum(divergences[:3]) / 3
    assert all(0.2 < entry["rows_read"] < 0.8 for entry in history)
    assert left.codebook.calibration[policy]["bytes"] == budget
    fit = sample_pass(left, model, torch.cat([tokens, tokens.flip(1)]))
    again = POLICIES[policy].calibrate(fit, budget)
    reads = Reads()
    fit.run(make_policy(policy, left.codebook.with_calibrated(policy, again, {}), left.predictor), reads, whole=True)
    assert reads.share() == pytest.approx(POLICIES[policy].rows_share(fit, budget), abs=0.01)
    if "masks" in again:
        assert torch.equal(again["masks"], left.codebook.calibrated[policy]["masks"]), "nominations stay as tuned"
    assert results["policies"][1]["bytes_share"] == pytest.approx(budget, abs=0.05)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize(
    ("policy", "form"),
    [("staged-oracle", "cluster"), ("staged-predicted", "cluster"), ("staged-neuron", "low-bit")],
)
def test_the_forward_pass_of_tuning_equals_the_policys(workplace, policy, form, lora):
    left, model, tokens = loaded(workplace, form)
    cfg = TuneConfig(max_epochs=1, policy=policy, lora=lora)
    predictor = left.predictor
    if policy == "staged-oracle":
        predictor = stages.untrained_correction(load_config(None, tiny.tiny_overrides(workplace)), left.codebook)
    module = TuningModule(cfg, model, find_ffns(model), left.codebook, predictor, tokens, share=BYTES)
    module.on_fit_start()
    with torch.no_grad():
        learned = [module.offsets, *(value for name, value in module.lora.items() if name.endswith("_b"))]
        learned += [module.predictor.correct, module.predictor.correct_bias]
        for value in learned:
            value.normal_(std=0.3)
        for value in (module.offsets, *module.lora.values()):
            value.copy_(at_16_bits(value))
        module.predictor.rounded()
        hooks = _TuningForward(module).hook()
        tuning = model(input_ids=tokens).logits
        hooks.remove()
        codebook, predictor = module.tuned({})
        expected = apc.sparsify(model, codebook, predictor, policy)(input_ids=tokens).logits
        apc.restore(model)
        dense = model(input_ids=tokens).logits
    assert (tuning - expected).abs().max() < 1e-4 * (expected - dense).abs().max()
    assert make_policy(policy, codebook, predictor).adapts_weights == bool(lora)


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("lora", [0, 2])
def test_kernels_give_the_masked_models_logits(workplace, kernel, lora):
    left, model, tokens = loaded(workplace, "low-bit")
    cfg = TuneConfig(max_epochs=1, policy="staged-neuron", lora=lora)
    module = TuningModule(cfg, model, find_ffns(model), left.codebook, left.predictor, tokens, share=BYTES)
    module.on_fit_start()
    with torch.no_grad():
        for value in (*(each for name, each in module.lora.items() if name[-1] == "b"), module.predictor.correct):
            value.normal_(std=0.3)
        parts = module.tuned({})
        expected = apc.sparsify(model, *parts, policy="staged-neuron")(input_ids=tokens).logits
        dense = apc.restore(model)(input_ids=tokens).logits
        logits = apc.sparsify(model, *parts, policy="staged-neuron", kernel=kernel, scoring=True)(tokens).logits
        apc.sparsify(model, *parts, policy="staged-neuron", kernel=kernel, max_sparse_tokens=1)
        one_token = model(input_ids=tokens[:1, :1]).logits
    with pytest.raises(RuntimeError, match="no autograd formula"):
        model(inputs_embeds=torch.randn(1, 1, left.codebook.hidden_size, requires_grad=True)).logits.sum().backward()
    apc.restore(model)
    tolerance = 1e-4 * (expected - dense).abs().max()
    assert (logits - expected).abs().max() < tolerance
    assert (one_token - expected[:1, :1]).abs().max() < tolerance


@pytest.mark.parametrize("kernel", ["numba", "torch"])
def test_kernels_run_an_untrained_copy_in_stages(workplace, kernel):
    left, model, tokens = loaded(workplace, "low-bit")
    with torch.no_grad():
        expected = apc.sparsify(model, left.codebook, policy="staged-prox")(input_ids=tokens).logits
        dense = apc.restore(model)(input_ids=tokens).logits
        logits = apc.sparsify(model, left.codebook, policy="staged-prox", kernel=kernel, scoring=True)(tokens).logits
        apc.sparsify(model, left.codebook, policy="staged-prox", kernel=kernel, max_sparse_tokens=1)
        one_token = model(input_ids=tokens[:1, :1]).logits
    apc.restore(model)
    tolerance = 1e-4 * (expected - dense).abs().max()
    assert (logits - expected).abs().max() < tolerance
    assert (one_token - expected[:1, :1]).abs().max() < tolerance


@pytest.mark.parametrize("policy", ["staged-neuron", "staged-prox"])
@pytest.mark.parametrize("inputs", [0.5, 1])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_gpus_kernels_give_the_masked_models_logits(workplace, monkeypatch, device, inputs, policy):
    """A copy of several bits, whose planes lie apart, and a correction, for all layers; by the interpreter on a CPU."""
    if device == "cpu":
        monkeypatch.setattr(sparse_ffns, "KERNEL_ON", {"cpu": "triton"})
    name = f"bits-{inputs}"
    changes = {"predictor.form": "low-bit", "predictor.bits": 3, "predictor.inputs": inputs}
    if not (workplace / "runs" / name).exists():
        run(workplace, name, policies="[dense,staged-neuron,staged-prox]", **changes)
    left, model, tokens = loaded(workplace, name)
    module = TuningModule(
        TuneConfig(max_epochs=1, policy="staged-neuron"),
        *(model, find_ffns(model), left.codebook, left.predictor, tokens),
        share=BYTES,
    )
    module.on_fit_start()
    with torch.no_grad():
        module.predictor.correct.normal_(std=0.3)
        module.predictor.rounded()
        parts = module.tuned({}) if policy == "staged-neuron" else (left.codebook, None)
        assert policy == "staged-prox" or parts[1].corrects
        model, tokens = model.to(device), tokens[:1, :3].to(device)
        dense = model(input_ids=tokens).logits
        expected = apc.sparsify(model, *parts, policy=policy)(input_ids=tokens).logits
        kernels = apc.sparsify(model, *parts, policy=policy, kernel="triton")
        assert handle_of(model).kernel == "triton"
        logits = kernels(input_ids=tokens).logits
    apc.restore(model)
    assert (logits - expected).abs().max() < 1e-3 * (expected - dense).abs().max()


def test_the_crossover_is_measured_while_as_many_rows_are_read_as_calibrated(workplace):
    left, model, _ = loaded(workplace, "low-bit")
    hidden = torch.randn(64, left.codebook.hidden_size)
    reads = lambda ffn, scale: ops.staged_reads(scale * hidden, ffn.weights, ffn.stages)

    def sparse_ffn(codebook):
        apc.sparsify(model, codebook, left.predictor, policy="staged-neuron", kernel="numba")
        return apc.sparse.sparsify.handle_of(model)._sparse[0]

    found = make_policy("staged-neuron", left.codebook, left.predictor).parameters_read("neuron")
    dense = 3 * left.codebook.hidden_size * left.codebook.ffn_width
    usual = reads(sparse_ffn(left.codebook), 0.5)
    tensors = left.codebook.calibrated["staged-neuron"]
    ffn = sparse_ffn(left.codebook.with_calibrated("staged-neuron", tensors, {"bytes": usual + found / dense}))
    assert reads(ffn, ffn._usual_scale) == pytest.approx(usual, abs=0.08) != reads(ffn, 0.01)
    apc.restore(model)


@torch.no_grad()
def test_low_rank_updates_are_sums_of_weights(workplace):
    """A policy that keeps all neurons, with updates, equals the dense model whose weights have the updates."""
    left, model, tokens = loaded(workplace, "cluster")
    L, E, D = left.codebook.layers, left.codebook.hidden_size, left.codebook.ffn_width
    shapes = {"gate": (E, D), "up": (E, D), "down": (D, E)}
    tensors = {f"lora_{name}_a": torch.randn(L, 2, inputs) for name, (inputs, _) in shapes.items()}
    tensors |= {f"lora_{name}_b": torch.randn(L, outputs, 2) / 10 for name, (_, outputs) in shapes.items()}
    masks = ops.pack(torch.ones(L, left.codebook.k, D, dtype=torch.bool))
    tensors |= {"thresholds": torch.full((L, 3), -torch.inf), "masks": masks}
    codebook = left.codebook.with_calibrated("staged-oracle", tensors, {})
    updated = apc.sparsify(model, codebook, policy="staged-oracle")(input_ids=tokens).logits
    apc.restore(model)
    for layer, block in enumerate(model.model.layers):
        for name in shapes:
            weight = getattr(block.mlp, f"{name}_proj").weight
            weight += tensors[f"lora_{name}_b"][layer] @ tensors[f"lora_{name}_a"][layer]
    assert torch.allclose(model(input_ids=tokens).logits, updated, atol=1e-4)
    at_four_bits = replace(codebook, provenance=codebook.provenance | {"ffn_bits": 4.7})
    merged, apart = (make_policy("staged-oracle", each, None) for each in (codebook, at_four_bits))
    assert apart.parameters_read("neuron") == merged.parameters_read("neuron") + 3 * 2 * (E + D)


def test_a_lora_is_tuned_and_said(workplace):
    changes = {"tune.max_epochs": 2, "tune.policy": "staged-predicted", "tune.batch_windows": 18, "tune.lora": 2}
    results = run(workplace, "lora", policies="[dense,staged-predicted]", **changes)
    assert results["conditions"]["tuned"].endswith("weights adapted by a LoRA of rank 2")
    left, model, _ = loaded(workplace, "lora")
    tensors = left.codebook.calibrated["staged-predicted"]
    with pytest.raises(
        UserError, match=r"staged-predicted: no kernel .* adapted weights \(tune.lora\); use kernel=None"
    ):
        apc.sparsify(model, left.codebook, left.predictor, "staged-predicted", kernel="torch")
    assert tensors["lora_up_b"].abs().max() > 0 and tensors["lora_up_b"].dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"tune\.lora=2 needs a staged tune\.policy: staged-oracle, staged-predicted"):
        run(workplace, "flat", **{**changes, "tune.policy": "predicted"})


def test_the_model_at_16_bits_teaches_one_at_few_bits(workplace, monkeypatch):
    """The first step's divergence is from the model whose FFNs are not rounded."""
    seen = []

    class Seen(TuningModule):
        def training_step(self, windows, batch_index):
            reader = _TuningForward(self)
            with torch.no_grad():
                masked = self._logits(windows, reader)
                teacher = load_model(ModelConfig(path=str(workplace / "model"), device="cpu"), windows.device)[0]
                expected = [
                    ops.divergence(masked, model(input_ids=windows).logits.flatten(0, 1)).mean()
                    for model in (teacher, self._model[0])
                ]
            seen.append((self.history, *expected))
            return super().training_step(windows, batch_index)

    monkeypatch.setattr(stages, "TuningModule", Seen)
    changes = {"tune.max_epochs": 1, "tune.policy": "staged-predicted", "tune.batch_windows": 18, "model.ffn_bits": 2}
    run(workplace, "bits", policies="[staged-predicted]", **changes, bytes=0.4)
    history, from_16_bits, from_2_bits = seen[0]
    assert history[0]["divergence"] == pytest.approx(float(from_16_bits), rel=1e-4)
    assert from_16_bits > 1.01 * from_2_bits


def test_a_killed_staged_tuning_resumes_to_the_same_end(workplace):
    changes = {"tune.max_epochs": 2, "tune.policy": "staged-predicted", "tune.batch_windows": 3, "stage": "tune"}
    changes["trainer.checkpoint_every_n_steps"] = 1
    run(workplace, "whole", **changes)
    with tiny.killed_after(3, TuningModule):
        run(workplace, "killed", **changes)
    run(workplace, "killed", **changes)
    one, other = (apc.load_run(workplace / "runs" / name) for name in ("whole", "killed"))
    for name, value in one.codebook.calibrated["staged-predicted"].items():
        assert torch.equal(value, other.codebook.calibrated["staged-predicted"][name])
    for name, value in one.predictor.state_dict().items():
        assert torch.equal(value, other.predictor.state_dict()[name])


def test_two_ranks_tune_staged_masks(workplace):
    changes = {"run.name": "two", "tune.max_epochs": 1, "tune.policy": "staged-predicted", "tune.batch_windows": 2}
    changes |= {"policies": "[staged-predicted]", "bytes": BYTES, "predictor.bottleneck": 8, "monitor.windows": 0}
    tiny.run_ranks(2, tiny.tiny_overrides(workplace, **changes))
    assert apc.load_run(workplace / "runs" / "two").codebook.calibration["staged-predicted"]["bytes"] == BYTES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stages.shares=[0.5,0.6,0.4]"], "some of the neurons that the one before read"),
        (["stages.shares=[0.5,0.4]"], "give three shares above 0 and at most 1"),
        (["stages.shares=[0.5,0.4,0]"], "give three shares above 0 and at most 1"),
        (["stages.shares=[1.5,0.4,0.2]"], "give three shares above 0 and at most 1"),
        (["stages.shares=[0.9,0.8,0.7]", "bytes=0.5"], r"add up to 0\.800 of the FFN, more than bytes=0\.5"),
        (["stages.rule=most"], "stages.rule=most: choose threshold or top"),
    ],
)
def test_bad_stages_say_what_to_do(workplace, words, message):
    with pytest.raises(UserError, match=message):
        load_config(None, [*tiny.tiny_overrides(workplace), *words])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages.rule": "top"}, "stages: no policy of this run has stages; add one to policies .staged-static, "),
        ({"stages.shares": "[0.6,0.5,0.4]", "bytes": 0.6}, "stages: no policy of this run has stages"),
        ({"bytes": 0.6}, r"bytes=0\.6: no policy of this run keeps to a share of bytes; add a staged policy or a peer"),
    ],
)
def test_keys_that_no_policy_heeds_are_refused(workplace, changes, message):
    values = {"policies": "[dense,static]", "run.name": "unheeded"} | changes
    with pytest.raises(UserError, match=message):
        train.train(load_config(None, tiny.tiny_overrides(workplace, **values)))
    assert not (workplace / "runs" / "unheeded").exists()


def test_a_budget_below_the_predictors_bytes_is_refused(workplace):
    with pytest.raises(
        UserError, match=r"staged-predicted needs .* of the FFN's bytes to find its masks; raise bytes=0\.01"
    ):
        run(workplace, "small", bytes=0.01, policies="[staged-predicted]")


def test_stages_need_a_gate_and_the_site_neuron(workplace, tmp_path):
    with pytest.raises(UserError, match="staged-oracle needs sites=.neuron."):
        run(workplace, "sites", sites="[gate,up,down]", policies="[staged-oracle]")
    folder = tiny.make_workplace(tmp_path, "opt")
    with pytest.raises(UserError, match="staged-oracle needs FFNs with a gate"):
        run(folder, "opt", policies="[staged-oracle]")
    left, model, _ = loaded(workplace, "cluster")
    with pytest.raises(UserError, match="staged-oracle"):
        apc.sparsify(model, left.codebook, left.predictor, policy="staged-oracle", kernel="torch")


def test_log_energies_order_like_importances():
    values = torch.tensor([0.0, torch.nan, 1e-30, 1e-3, 2.0])
    energies = log_energy(values)
    assert energies.isfinite().all() and (energies.diff() >= 0).all() and energies[0] == energies[1]
