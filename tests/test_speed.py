"""Decoding speed beside quality: perplexities are those of masked models, and policies without kernels are named."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import apc
import evaluate
import tiny
import train
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.models import load_model
from apc.data.text import cut_windows, read_texts
from apc.evaluate import speed, tables
from apc.sparse.decode import cache_keyword
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
    windows = cut_windows(run.config.data, *read_texts(run.config.data), tokenizer)[1].tokens.to(device)
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
    assert "tokens/s" in said and "– exact: known only after" in said and "  predicted: w" in said
    assert "runs dense" not in notes
    folder = workplace / "runs" / "run" / "evaluations" / f"on-{device}"
    assert (folder / "figures" / "speed.png").is_file() and json.loads((folder / "results.json").read_text())["speed"][
        "windows"
    ] == 4
    table, texts = tables.speed_tables(results, markdown=True)
    assert table.count("| predicted |") == 1 and texts.startswith("    … ")
    assert tables.speed_tables({"policies": []}) == []


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
        (["policies=[dense,oracle]"], r"speed=true: none of policies=\[dense,oracle\] knows its mask"),
        (["policies=[dense,predicted]", "speed=perhaps"], "speed"),
    ],
)
def test_errors_say_what_can_not_be_timed(workplace, words, message):
    with pytest.raises(UserError, match=message):
        evaluated(workplace, *words)


def test_speed_needs_the_site_neuron():
    with pytest.raises(UserError, match=r"speed=true needs sites=\[neuron\]"):
        load_config(None, ["speed=true", "sites=[gate,up,down]"])
