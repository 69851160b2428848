"""Decoding speed beside quality: perplexities are those of masked models, and policies without kernels are named."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaMLP

import apc
import evaluate
import tiny
import train
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.models import load_model
from apc.data.text import load_windows
from apc.evaluate import speed, tables
from apc.sparse.decode import GreedyDecoder, cache_keyword
from apc.sparse.sparsify import handle_of
from apc.utils.errors import UserError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("speed"))
    train.train(load_config(None, tiny.tiny_overrides(folder)))
    return folder


def evaluated(folder, *words):
    return evaluate.evaluate(
        evaluate.config_of_run(None, [f"checkpoint={folder / 'runs' / 'run'}", "speed=true", *words])
    )


@pytest.mark.report
@pytest.mark.parametrize("device", DEVICES)
def test_perplexities_equal_those_of_masks_after_a_dense_prompt(workplace, device, capsys):
    results = evaluated(
        workplace, "policies=[dense,exact,predicted,soft]", f"model.device={device}", f"run.name=on-{device}"
    )
    records = {record["policy"]: record for record in results["speed"]["policies"]}
    assert list(records) == ["dense", "predicted", "soft"] and results["speed"]["left_out"] == ["exact"]
    dense, predicted = records["dense"], records["predicted"]
    assert dense["times_dense"] == dense["ratio"] == 1 and dense["divergence"] is None

    run = apc.load_run(workplace / "runs" / "run")
    model, tokenizer = load_model(ModelConfig(path=str(workplace / "model"), device=device), torch.device(device))
    windows = load_windows(run.config.data, tokenizer, "llama")[1].tokens.to(device)
    half, losses = windows.shape[1] // 2, {"after": [], "masked": []}
    for window in windows[:, None]:
        cache = {cache_keyword(model): DynamicCache(config=model.config)}
        apc.restore(model)(input_ids=window[:, :half], use_cache=True, **cache)
        sparse = apc.sparsify(model, run.codebook, run.predictor, "predicted")
        for name, logits in (
            ("after", sparse(window[:, half:], use_cache=True, **cache).logits[0]),
            ("masked", sparse(window).logits[0, half:]),
        ):
            losses[name].append(F.cross_entropy(logits[:-1], window[0, half + 1 :]))
    for name, key in (("after", "perplexity"), ("masked", "perplexity_masked")):
        assert predicted[key] == pytest.approx(torch.stack(losses[name]).mean().exp().item(), rel=1e-4)
    assert predicted["divergence"] > 0 and 0 < predicted["agreement"] < 1
    assert 0 <= predicted["agrees_for"] < speed.NEW_TOKENS
    assert len(results["speed"]["prompts"]) == speed.CONTINUED
    for record in records.values():
        assert len(record["continued"]) == len(record["text"]) == speed.CONTINUED

    said, notes = capsys.readouterr()
    assert "tokens/s" in said and "– exact: no kernel on this device" in said and "  predicted: w" in said
    assert "runs dense" not in notes
    folder = workplace / "runs" / "run" / "evaluations" / f"on-{device}"
    assert (folder / "figures" / "speed.png").is_file() and json.loads((folder / "results.json").read_text())["speed"][
        "windows"
    ] == 4
    table, texts = tables.speed_tables(results, markdown=True)
    assert table.count("| predicted |") == 1 and texts.startswith("    … ")
    assert tables.speed_tables({"policies": []}) == []


class Machine:
    """A clock that only decoding steps advance: by 1 s dense, 0.8 s sparse, times the machine's slowness then."""

    def __init__(self, slowness):
        self.now, self.slowness = 0.0, slowness

    def put_into(self, monkeypatch):
        step = GreedyDecoder.step

        def timed_step(decoder):
            self.now += (1.0 if handle_of(decoder.model) is None else 0.8) * self.slowness(self.now)
            return step(decoder)

        monkeypatch.setattr(GreedyDecoder, "step", timed_step)
        monkeypatch.setattr(speed, "NEW_TOKENS", 20)
        monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.mark.parametrize(
    "slowness",
    [lambda now: 1 + now / 80, lambda now: 5 if 200 < now < 215 else 1, lambda now: 8 if now < 600 else 1],
    ids=["drift", "short-spell", "busy-at-first"],
)
def test_drift_and_a_short_busy_spell_do_not_change_the_speed_up(workplace, monkeypatch, slowness):
    """The drift slows the machine to half its speed while the dense model alone is scored and continued."""
    Machine(slowness).put_into(monkeypatch)
    results = evaluated(workplace, "policies=[dense,predicted,soft]", "run.name=fake")
    dense, *sparse = results["speed"]["policies"]
    assert [record["times_dense"] for record in sparse] == pytest.approx([1.25, 1.25], rel=0.01)
    assert dense["times_dense"] == dense["times_low"] == dense["times_high"] == 1
    assert all(1.2 < record["times_low"] <= record["times_dense"] <= record["times_high"] < 1.3 for record in sparse)
    assert all(record["seconds_low"] <= record["seconds_per_token"] <= record["seconds_high"] for record in sparse)


def test_a_busy_machine_gives_no_speed_up(workplace, monkeypatch, capsys):
    """In every third interval of 7 s, other work makes it 8 times slower."""
    Machine(lambda now: 8 if int(now / 7) % 3 == 0 else 1).put_into(monkeypatch)
    results = evaluated(workplace, "policies=[dense,predicted]", "run.name=busy")
    record = results["speed"]["policies"][1]
    assert record["times_dense"] is None and record["times_low"] < 1 < record["times_high"]
    assert record["unclear"].startswith("no difference from dense beyond the noise: rounds gave 0.")
    said = capsys.readouterr().out
    assert "\n– predicted: no difference from dense beyond the noise" in said


@pytest.mark.parametrize(
    ("ratios", "bytes_share", "speed_up", "unclear"),
    [
        ([1.25, 1.24, 1.26, 1.25, 1.25, 1.27, 1.23, 0.3], 0.5, 1.25, None),
        ([1.3, 1.2, 1.1, 1.0, 1.0, 0.9, 0.9, 0.8], 0.5, None, "no difference from dense .* 0.90 to 1.20 ×"),
        ([0.6, 0.7], 0.5, 0.65, None),
        ([0.9, 1.1], 0.5, None, "no difference from dense"),
        (
            [7.4, 7.8] * 4,
            0.53,
            None,
            "rounds gave 7.40 to 7.80 × the dense speed, but the bytes read allow at most 1.89 ×",
        ),
        ([1.8, 2.1] * 4, 0.5, 1.95, None),
        ([7.4, 7.8] * 4, None, 7.6, None),
    ],
    ids=["outlier", "noise", "slower", "two-rounds", "impossible", "within-noise-of-possible", "unknown-bytes"],
)
def test_a_speed_up_is_a_median_or_unclear(ratios, bytes_share, speed_up, unclear):
    found = speed.speed_up(ratios, bytes_share)
    assert found["times_dense"] == (None if speed_up is None else pytest.approx(speed_up))
    assert re.match(unclear, found["unclear"]) if unclear else found["unclear"] is None


def best_of(workplace, name, policies):
    words = [f"checkpoint={workplace / 'runs' / 'run'}", "speed=best", f"policies=[{policies}]", f"run.name={name}"]
    return evaluate.evaluate(evaluate.config_of_run(None, words))


@pytest.mark.report
def test_best_times_one_policy_and_scores_nothing_again(workplace, capsys):
    results = best_of(workplace, "best", "dense,exact,static,predicted")
    scored, said = (
        {record["policy"]: record for record in results["policies"]},
        " ".join(capsys.readouterr().out.split()),
    )
    best = min(("static", "predicted"), key=lambda name: scored[name]["perplexity"])
    assert [record["policy"] for record in results["speed"]["policies"]] == ["dense", best]
    for record in results["speed"]["policies"]:
        assert record["perplexity"] == scored[record["policy"]]["perplexity"] and record["divergence"] is None
    assert results["speed"]["windows"] == 0 and len(results["speed"]["prompts"]) == 1
    assert "Perplexity: of the table above." in said and "divergence" not in said.partition("tokens/s")[2]
    assert (workplace / "runs" / "run" / "evaluations" / "best" / "figures" / "speed.png").is_file()


def test_best_needs_no_dense_policy(workplace):
    dense, static = best_of(workplace, "without-dense", "static")["speed"]["policies"]
    assert [dense["policy"], static["policy"]] == ["dense", "static"] and dense["ratio"] == 1
    assert static["perplexity"] == pytest.approx(static["ratio"] * dense["perplexity"])


def test_best_of_none_is_said_and_not_an_error(workplace, capsys):
    assert best_of(workplace, "none", "dense,exact")["speed"] is None
    assert "speed=best: not measured (no kernel on this device runs any of policies" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sites": "[gate,up,down]", "policies": "[dense,static]"}, "kernels need sites=[neuron]"),
        ({"model.ffn_bits": 4, "policies": "[dense,static]"}, "kernels need weights of 16 bits on one device"),
        (
            {"predictor.form": "low-bit", "predictor.inputs": 0.5, "policies": "[dense,neuron-threshold]"},
            "none of the policies has a kernel as it was calibrated",
        ),
    ],
)
def test_best_says_why_it_can_not_be_had(tmp_path, capsys, settings, reason):
    folder = tiny.make_workplace(tmp_path)
    results = train.train(load_config(None, tiny.tiny_overrides(folder, speed="best", **settings)))
    assert results["speed"] is None and f"speed=best: not measured ({reason}" in capsys.readouterr().err


@pytest.mark.report
def test_results_are_saved_before_speed_is_measured(workplace, monkeypatch):
    def fails(*given):
        raise UserError("no kernel after all")

    monkeypatch.setattr(speed, "measure", fails)
    with pytest.raises(UserError, match="no kernel after all"):
        evaluated(workplace, "policies=[dense,predicted]", "run.name=failed")
    folder = workplace / "runs" / "run" / "evaluations" / "failed"
    results = json.loads((folder / "results.json").read_text())
    assert [record["policy"] for record in results["policies"]] == ["dense", "predicted"] and "speed" not in results
    assert (folder / "figures" / "perplexity.png").is_file()


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (
            {"mlp_bias": True},
            {},
            r"speed=true: .*: its projections have biases, .*; leave out speed=true for this model",
        ),
        (
            {"hidden_act": "relu2"},
            {},
            r"speed=true: .*: its activation ReLUSquared.* has no kernel .*; leave out speed=",
        ),
        (
            {},
            {"policies": "[dense,oracle]"},
            r"speed=true: no kernel on this device runs any of policies=\[dense,oracle\]",
        ),
        ({}, {"data.seq_len": 3, "data.fit_windows": 40}, "speed=true: windows of 3 tokens are too short"),
    ],
    ids=["biases", "activation", "policies", "windows"],
)
def test_speed_that_can_not_be_had_is_refused_before_training(workplace, tmp_path, options, changes, message):
    if options:
        changes = changes | {"model.path": tiny.save_model(tmp_path / "model", **options)}
    with pytest.raises(UserError, match=message):
        train.train(
            load_config(None, tiny.tiny_overrides(workplace, speed="true", **{"run.name": "refused"} | changes))
        )
    assert not (workplace / "runs" / "refused").exists()


def test_an_ffn_that_kernels_compute_otherwise_is_refused_before_training(workplace, monkeypatch):
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 2 * forward(self, x))
    with pytest.raises(
        UserError, match=r"speed=true: .* it computes more than .*; leave out speed=true for this model"
    ):
        train.train(load_config(None, tiny.tiny_overrides(workplace, speed="true", **{"run.name": "refused"})))
    assert not (workplace / "runs" / "refused").exists()


@pytest.mark.parametrize("policy", ["dense", "predicted"])
@pytest.mark.parametrize("dense_prefill", [True, False])
def test_steps_score_as_one_forward_pass(workplace, policy, dense_prefill):
    """Steps are how a GPU scores; here the decoder has no graph."""
    run = apc.load_run(workplace / "runs" / "run")
    model, _ = load_model(ModelConfig(path=str(workplace / "model"), device="cpu"), torch.device("cpu"))
    ffns = None
    if policy != "dense":
        ffns = handle_of(apc.sparsify(model, run.codebook, run.predictor, policy, kernel="torch", max_sparse_tokens=1))
    windows = torch.arange(24).view(2, 12) % 13
    scorer, decoder = speed._Scorer(model, windows, 6, None), speed._recorded(model, windows, 6)
    for window in windows[:, None]:
        assert torch.allclose(
            scorer._steps(decoder, window, ffns, dense_prefill), scorer._at_once(window, ffns, dense_prefill), atol=1e-4
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["policies=[dense,oracle]"], r"speed=true: no kernel on this device runs any of policies=\[dense,oracle\]"),
        (["policies=[dense,predicted]", "speed=perhaps"], "speed"),
    ],
)
def test_errors_say_what_can_not_be_timed(workplace, words, message):
    with pytest.raises(UserError, match=message):
        evaluated(workplace, *words)


def test_speed_needs_the_site_neuron():
    with pytest.raises(UserError, match=r"speed=true needs sites=\[neuron\]"):
        load_config(None, ["speed=true", "sites=[gate,up,down]"])
