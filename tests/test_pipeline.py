"""Whole runs on tiny models: each form of model, every stage, every kind of setting, and errors about bad input."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import apc
import evaluate
import tiny
import train
from apc import ops
from apc.cluster.lloyd import ClusteringModule
from apc.compare import finished
from apc.compare import tables as compare_tables
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data import overlap, text
from apc.data.models import load_model
from apc.evaluate import evaluator
from apc.evaluate.tables import policies_table
from apc.predict.module import PredictorModule
from apc.run import context, launch, stages
from apc.run.tracking import read_metrics
from apc.tune.module import TuningModule
from apc.utils import exits
from apc.utils.errors import UserError
from apc.utils.tensor_files import digest_of

ROOT = Path(__file__).resolve().parent.parent


def run_train(folder, **changes):
    return train.train(load_config(None, tiny.tiny_overrides(folder, **changes)))


def run_evaluate(folder, *words, run="run"):
    words = [f"checkpoint={folder / 'runs' / run}", "tracking.wandb=disabled", *words]
    return evaluate.evaluate(evaluate.config_of_run(None, words))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model, texts, a finished run and one with its checkpoints."""
    folder = tiny.make_workplace(tmp_path_factory.mktemp("pipeline"))
    with tiny.reports(written=True):
        run_train(folder)
    run_train(folder, **{"run.name": "kept", "stage": "predict", "trainer.keep_checkpoints": "true"})
    return folder


@pytest.mark.parametrize(
    "family",
    [
        *["gemma3", "phi3", "gpt2", "bloom", "apertus", "deepseek_v3", "gpt_oss"],
        pytest.param("mixtral", marks=pytest.mark.report),
    ],
)
def test_a_model_of_each_form_goes_from_text_to_generation(tmp_path, family):
    tiny.make_workplace(tmp_path, family)
    results = run_train(tmp_path)
    policies = {record["policy"]: record for record in results["policies"]}
    assert list(policies) == ["dense", "exact", "static", "oracle", "predicted", "soft"]
    assert policies["dense"]["perplexity"] > 1 and policies["dense"]["ratio"] == 1.0
    assert all(abs(policies[name]["density"] - 0.5) < 0.1 for name in policies if name != "dense")
    assert (
        policies["exact"]["coverage"] == 1.0
        and policies["oracle"]["captured_energy"] > policies["static"]["captured_energy"]
    )
    run = apc.load_run(tmp_path / "runs" / "run")
    model, _ = load_model(ModelConfig(path=str(tmp_path / "model"), device="cpu"), torch.device("cpu"))
    for policy in ("predicted", "soft"):
        apc.sparsify(model, run.codebook, run.predictor, policy)
        assert model.generate(torch.arange(6)[None], max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (
            1,
            10,
        )


def test_experts_have_masks_of_their_own(tmp_path):
    """Sizes count routed tokens, storage does not matter, and a masked score is that of weights with zeros."""
    tiny.make_workplace(tmp_path, "mixtral")
    settings = {"policies": "[dense,static,predicted]", "monitor.windows": 1}
    results = run_train(tmp_path, **settings)
    run_train(tmp_path, **settings, **{"run.name": "memory", "collect.storage": "memory", "stage": "cluster"})
    book, same = (apc.load_run(tmp_path / "runs" / name).codebook for name in ("run", "memory"))
    site = book.sites["neuron"]
    for name, value in site.tensors().items():
        assert torch.equal(value, same.sites["neuron"].tensors()[name]), name
    assert book.experts == 4 and site.centroids.shape[:2] == (12, 6)
    assert site.sizes.view(3, -1).sum(1).tolist() == [20 * 32 * 2] * 3  # 20 windows, two experts a token
    assert "routed experts only, 4 per layer" in policies_table(results) and "per expert" in policies_table(results)
    model, tokenizer = load_model(ModelConfig(path=str(tmp_path / "model"), device="cpu"), torch.device("cpu"))
    for index, mask in enumerate(ops.unpack(site.static, 52)):
        model.model.layers[index // 4].mlp.experts.down_proj[index % 4].mul_(mask)
    ids = torch.tensor(tokenizer((tmp_path / "score.txt").read_text(), add_special_tokens=False)["input_ids"])
    windows = ids[: 4 * 32].view(4, 32)
    logits = model(windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert results["policies"][1]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    for word, line in {
        "tune.max_epochs=1": "tune.max_epochs=1: the model is a mixture of experts; set tune.max_epochs=0",
        "predictor.lookahead=1": "predictor.lookahead=1: the model is a mixture of experts; set predictor.lookahead=0",
        "speed=true": "it is one of several experts, which no kernel supports",
    }.items():
        with pytest.raises(UserError, match=line):
            run_train(tmp_path, **{"run.name": "other", "policies": "[predicted]"}, **dict([word.split("=")]))


@pytest.mark.report
def test_a_relu_model_reports_its_exact_zeros(tmp_path):
    tiny.make_workplace(tmp_path, "opt")
    results = run_train(tmp_path, policies="[dense,static]", **{"data.score_windows": 2})
    model, tokenizer = load_model(ModelConfig(path=str(tmp_path / "model"), device="cpu"), torch.device("cpu"))
    shares = []
    for layer in model.model.decoder.layers:
        layer.fc2.register_forward_pre_hook(lambda _module, inputs: shares.append((inputs[0] == 0).double().mean()))
    ids = torch.tensor(tokenizer((tmp_path / "score.txt").read_text(), add_special_tokens=False)["input_ids"])
    model(ids[:64].view(2, 32))
    expected = float(sum(shares) / len(shares))
    assert [record["zeros"] for record in results["policies"]] == pytest.approx([expected] * 2) and expected > 0.2
    assert f"exact zeros: {100 * expected:.1f} % of the dense model's activations" in policies_table(results, wide=True)


def test_an_ffn_without_a_gate_has_two_projections_in_its_costs(tmp_path):
    tiny.make_workplace(tmp_path, "opt")
    low_bit = {"predictor.form": "low-bit", "policies": "[dense,static,neuron-predictor]"}
    with pytest.raises(
        UserError, match=r"predictor.low_bit_projections=\['gate', 'up'\]: the model's FFNs have no gate"
    ):
        run_train(tmp_path, **low_bit)
    results = run_train(tmp_path, **low_bit, **{"predictor.low_bit_projections": "[up]"})
    _, static, predicted = results["policies"]
    assert static["bytes_share"] == static["density"] == 0.5
    E, D = 32, 52
    copy = D * (E / 16 + 3) + D  # one bit a weight, and four 16-bit numbers a neuron
    assert predicted["bytes_share"] == pytest.approx(0.5 + copy / (2 * E * D))
    assert apc.load_run(tmp_path / "runs" / "run").codebook.projections == 2
    with pytest.raises(
        UserError, match="policies: cats needs FFNs with a gate, outside a mixture of experts; leave it"
    ):
        run_train(tmp_path, policies="[dense,cats]", **{"run.name": "gated"})
    assert not (tmp_path / "runs" / "gated").exists()
    with pytest.raises(UserError, match="policy cats: needs FFNs with a gate, outside a mixture of experts"):
        run_evaluate(tmp_path, "policies=[cats]")
    run = apc.load_run(tmp_path / "runs" / "run")
    model, _ = load_model(ModelConfig(path=str(tmp_path / "model"), device="cpu"), torch.device("cpu"))
    with pytest.raises(UserError, match="model.decoder.layers.0: it has no gate, which kernels need; use kernel=None"):
        apc.sparsify(model, run.codebook, run.predictor, kernel="torch")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"sites": "[gate,up,down]", "cluster.weighting": "binary", "cluster.scope": "pooled", "active": "top"},
            marks=pytest.mark.report,
        ),
        {
            "collect.storage": "memory",
            "collect.ffn_inputs": "streamed",
            "predictor.lookahead": "1",
            "predictor.loss": "mix",
        },
        {
            "collect.importance": "false",
            "cluster.weighting": "binary",
            "monitor.windows": "0",
            "cluster.schedule": "step",
        },
        {"predictor.form": "neuron", "predictor.loss": "listwise", "policies": "[dense,oracle,cats,neuron-predictor]"},
        pytest.param(
            {
                "predictor.form": "neuron",
                "cluster.init": "k-means++",
                "cluster.weighting": "magnitude",
                "data.score_windows": "1",
            },
            marks=pytest.mark.report,
        ),
        {
            "predictor.form": "low-bit",
            "predictor.bits": "2",
            "predictor.low_bit_projections": "[gate]",
            "predictor.lookahead": "1",
            "policies": "[dense,neuron-predictor]",
        },
    ],
    ids=["papers-form", "streamed-mix", "no-importance-step", "neuron-listwise", "neuron-defaults", "low-bit"],
)
def test_other_settings_of_the_pipeline(workplace, changes):
    results = run_train(
        workplace, **{"run.name": "way", "run.dir": workplace / f"ways-{abs(hash(str(changes)))}", **changes}
    )
    measured = [record for record in results["policies"] if not record["missing"]]
    assert all(record["perplexity"] > 1 for record in measured)
    if changes.get("predictor.form") == "neuron" and "policies" not in changes:
        reasons = {record["policy"]: record["missing"] for record in results["policies"] if record["missing"]}
        assert set(reasons) == {"predicted", "soft"} and "form cluster" in reasons["soft"]
    assert "dense" in policies_table(results)


def test_a_predictor_is_trained_only_if_a_policy_or_the_stage_needs_it(workplace):
    results = run_train(
        workplace, **{"run.name": "bare", "policies": "[dense,thresholded-oracle]", "collect.forward": "thresholded"}
    )
    folder = workplace / "runs" / "bare"
    assert (
        "predict" not in results["seconds"]
        and not (folder / "predictor.safetensors").exists()
        and not (folder / "checkpoints" / "predictor.ckpt").exists()
    )
    run_train(
        workplace,
        **{
            "run.name": "bare",
            "policies": "[dense,thresholded-oracle]",
            "collect.forward": "thresholded",
            "stage": "predict",
        },
    )
    assert (folder / "predictor.safetensors").is_file()


def test_a_run_keeps_everything_in_its_folder(workplace):
    folder = workplace / "runs" / "run"
    for name in (
        "config.yaml",
        "provenance.json",
        "metrics.jsonl",
        "codebook.safetensors",
        "predictor.safetensors",
        "results.json",
    ):
        assert (folder / name).stat().st_size > 0
    assert {path.name for path in (folder / "figures").glob("*.png")} >= {
        "perplexity.png",
        "captured_importance.png",
        "cluster_usage.png",
        "convergence.png",
    }
    assert {path.name for path in (folder / "checkpoints").iterdir()} == set()
    names = {name for record in read_metrics(folder) for name in record}
    assert names >= {
        "cluster/captured",
        "cluster/monitor_oracle_perplexity",
        "cluster/monitor_oracle_coverage",
        "cluster_layers/captured_neuron",
        "cluster_layers/monitor_oracle_precision",
        "predictor/loss",
        "predictor/monitor_soft_perplexity",
        "predictor/top1_neuron",
        "predictor/captured_energy_soft_neuron",
        "predictor_layers/top5_neuron",
    }
    assert not list(folder.rglob("*.tmp"))


def figures_of(results):
    dropped = ("seconds",)
    return json.loads(json.dumps({key: value for key, value in results.items() if key not in dropped}))


def test_evaluate_repeats_the_figures_of_training(workplace):
    trained = json.loads((workplace / "runs" / "run" / "results.json").read_text())
    again = run_evaluate(workplace, "run.name=again")
    assert figures_of(again) == figures_of(trained)
    written = json.loads((workplace / "runs" / "run" / "evaluations" / "again" / "results.json").read_text())
    assert figures_of(written) == figures_of(trained)
    assert json.loads((workplace / "runs" / "run" / "results.json").read_text()) == trained


def test_evaluate_needs_the_fit_text_only_where_the_run_has_no_sample_of_it(workplace, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    for name in ("new", "old"):
        shutil.copytree(workplace / "runs" / "run", tmp_path / "runs" / name)
        config = tmp_path / "runs" / name / "config.yaml"
        config.write_text(config.read_text().replace(f"{workplace}/fit.txt", f"{tmp_path}/gone.txt"))
    results = apc.load_run(workplace / "runs" / "run").results
    before = [record["perplexity"] for record in results["policies"]]
    assert results["conditions"]["overlap"] == 0

    read, tokenised = [], []
    read_role, cut = text._read_role, text.cut_windows
    monkeypatch.setattr(text, "_read_role", lambda cfg, role: read.append(role) or read_role(cfg, role))
    monkeypatch.setattr(
        context, "cut_windows", lambda cfg, text, *more: tokenised.append(text.key) or cut(cfg, text, *more)
    )
    again = run_evaluate(tmp_path, run="new")
    assert [record["perplexity"] for record in again["policies"]] == before
    assert again["conditions"]["overlap"] == 0 and (read, tokenised) == (["score"], ["data.score"])

    words = (workplace / "fit.txt").read_text().split()
    (tmp_path / "piece.txt").write_text("\n".join(" ".join(words[i : i + 9]) for i in range(900, 1800, 9)))
    with pytest.raises(UserError, match=r"data.score .piece.txt. shares 100% of its sequences .* data.fit .fit.txt."):
        run_evaluate(tmp_path, f"data.score={tmp_path / 'piece.txt'}", run="new")
    seen = run_evaluate(tmp_path, f"data.score={tmp_path / 'piece.txt'}", "data.in_sample=true", run="new")
    assert seen["conditions"]["overlap"] == pytest.approx(1) and seen["conditions"]["split"] == "in-sample"
    moved = f"data.fit={workplace / 'fit.txt'}"
    with pytest.raises(
        UserError, match="data.fit: the run was fitted with .*gone.txt, evaluate.py .* leave data.fit out"
    ):
        run_evaluate(tmp_path, moved, run="new")

    sample = tmp_path / "runs" / "old" / "fit-sequences.safetensors"
    overlap.save(sample, overlap.sample("another text"), "0" * 64)
    with pytest.raises(UserError, match="fit-sequences.safetensors: belongs to another fit text than the codebook"):
        run_evaluate(tmp_path, run="old")
    sample.write_bytes(sample.read_bytes()[:-1])
    with pytest.raises(UserError, match="fit-sequences.safetensors: damaged"):
        run_evaluate(tmp_path, run="old")
    sample.unlink()  # as in a run of an older version
    with pytest.raises(UserError, match="data.fit: file .*gone.txt does not exist: give an existing file"):
        run_evaluate(tmp_path, run="old")
    assert [record["perplexity"] for record in run_evaluate(tmp_path, moved, run="old")["policies"]] == before
    with pytest.raises(UserError, match="data.fit=.*piece.txt: not the text that the run was fitted on .fit.txt."):
        (tmp_path / "piece.txt").write_text(" ".join(["w0", *words[1:]]))
        run_evaluate(tmp_path, f"data.fit={tmp_path / 'piece.txt'}", run="old")


def test_a_tokenizer_larger_than_the_embedding_is_an_error(workplace, tmp_path):
    tiny.make_model(vocab_size=100, bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="model.path=.*: its tokenizer gives token id 119, its embedding has 100 rows; "
    ):
        run_train(workplace, **{"model.path": tmp_path, "run.name": "bad"})


def test_evaluate_accepts_other_policies_and_text(workplace):
    tiny.make_text(workplace / "other.txt", words=400, seed=9)
    results = run_evaluate(
        workplace,
        "policies=[oracle,exact]",
        f"data.score={workplace / 'other.txt'}",
        "data.score_windows=3",
        "run.name=other",
    )
    assert [record["policy"] for record in results["policies"]] == ["oracle", "exact"]
    assert results["conditions"]["score"] == "other.txt" and results["conditions"]["score_tokens"] == 96


def test_stages_one_by_one_equal_one_run(workplace):
    for stage in ("collect", "cluster", "predict", "all"):
        results = run_train(workplace, **{"run.name": "staged", "stage": stage})
    whole = json.loads((workplace / "runs" / "run" / "results.json").read_text())
    assert [record.get("perplexity") for record in results["policies"]] == [
        record.get("perplexity") for record in whole["policies"]
    ]


def test_a_codebook_can_be_copied_from_another_run(workplace):
    run_train(
        workplace,
        **{
            "run.name": "copied",
            "checkpoint": workplace / "runs" / "run",
            "predictor.bottleneck": 8,
            "stage": "predict",
        },
    )
    copied = apc.load_run(workplace / "runs" / "copied")
    assert (
        copied.predictor.bottleneck == 8
        and copied.codebook.provenance == apc.load_run(workplace / "runs" / "run").codebook.provenance
    )
    with pytest.raises(UserError, match=r"made from other patterns \(sites differ\)"):
        run_train(workplace, **{"run.name": "bad", "checkpoint": workplace / "runs" / "run", "sites": "[up]"})
    assert not (workplace / "runs" / "copied" / "checkpoints" / "cluster.ckpt").exists()


def test_a_codebook_of_thresholded_activations_is_not_taken_for_dense_ones(workplace):
    run = apc.load_run(workplace / "runs" / "run")
    identity = run.codebook.provenance["patterns"]
    stages.check_patterns(run.folder.codebook, run.codebook, identity)
    run.codebook.provenance["patterns"] = identity | {"forward": "thresholded"}
    with pytest.raises(UserError, match=r"codebook.safetensors: made from other patterns \(forward differ\)"):
        stages.check_patterns(run.folder.codebook, run.codebook, identity)


def test_in_sample_figures_say_so(workplace):
    changes = {"data.score": workplace / "fit.txt", "run.name": "in-sample"}
    with pytest.raises(UserError, match="data.in_sample=true"):
        run_train(workplace, **changes)
    results = run_train(workplace, **{**changes, "data.in_sample": "true"})
    assert results["conditions"]["split"] == "in-sample" and "IN-SAMPLE" in policies_table(results)


BAD = {
    "too-many-clusters": ({"cluster.k": 5000, "run.name": "bad"}, r"cluster\.k=5000 is more than the 640 patterns"),
    "long-windows": (
        {"data.seq_len": 257, "run.name": "bad"},
        r"data\.seq_len=257: the model has 256 positions \(max_position_embeddings\); set data\.seq_len=256 or less",
    ),
    "too-many-windows": (
        {"data.fit_windows": 999, "run.name": "bad"},
        r"data\.fit_windows=999, but fit\.txt has 93 windows",
    ),
    "missing-text": ({"data.fit": "none.txt", "run.name": "bad"}, r"none\.txt"),
    "missing-model": ({"model.path": "./none", "run.name": "bad"}, r"model\.path=\./none: no such folder"),
    "no-gpu": (
        {"model.device": "cuda:7", "run.name": "bad"},
        r"model\.device=cuda:7: this machine has \d CUDA devices",
    ),
    "missing-checkpoint": ({"checkpoint": "runs/none", "run.name": "bad"}, r"runs/none: not a run folder"),
    "another-run": (
        {"cluster.k": 5},
        r"holds a run with cluster\.k=6, this one has cluster\.k=5; choose another run\.name",
    ),
    "policy-without-inputs": (
        {"policies": "[neuron-predictor]"},
        r"policies: neuron-predictor needs predictor\.form=neuron or low-bit, this run has predictor\.form=cluster",
    ),
    "weights-without-importance": (
        {"collect.importance": "false", "run.name": "bad"},
        r"cluster\.weighting=energy needs importances",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_no_result(workplace, case, monkeypatch):
    monkeypatch.chdir(workplace)
    changes, line = BAD[case]
    with pytest.raises(UserError, match=line) as caught:
        run_train(workplace, **changes)
    assert "\n" not in str(caught.value)
    bad = workplace / "runs" / "bad"
    assert not list(bad.glob("*.safetensors")) and not (bad / "results.json").exists()


@pytest.mark.parametrize("name", ["codebook.safetensors", "predictor.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "header"])
def test_an_error_names_the_damaged_file_of_a_run(workplace, tmp_path, name, damage):
    run = tmp_path / "runs" / "run"
    shutil.copytree(workplace / "runs" / "run", run)
    path = run / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        shutil.copy(workplace / "model" / "model.safetensors", path)
    else:
        path.write_bytes(path.read_bytes().replace(b'\\"layers\\": 3', b'\\"layers\\": 4'))
    with pytest.raises(UserError, match=name):
        run_evaluate(tmp_path)


def test_errors_name_a_missing_codebook_and_a_damaged_checkpoint(workplace, tmp_path):
    shutil.copytree(workplace / "runs" / "run", tmp_path / "runs" / "run")
    (tmp_path / "runs" / "run" / "codebook.safetensors").unlink()
    with pytest.raises(UserError, match=r"codebook\.safetensors: no such file"):
        run_evaluate(tmp_path)
    checkpoint = workplace / "runs" / "cut" / "checkpoints" / "cluster.ckpt"
    checkpoint.parent.mkdir(parents=True)
    for content in (b"not a checkpoint", (workplace / "runs/kept/checkpoints/cluster.ckpt").read_bytes()[:2000]):
        checkpoint.write_bytes(content)
        with pytest.raises(UserError, match=r"cluster\.ckpt: .*delete it to train from the start"):
            run_train(workplace, **{"run.name": "cut"})


def test_a_codebook_of_another_model_is_refused(workplace, tmp_path):
    tiny.save_model(tmp_path / "narrow", width=40)
    with pytest.raises(UserError, match="the codebook belongs to another model: it has 52 neurons"):
        run_evaluate(workplace, f"model.path={tmp_path / 'narrow'}")


def test_tables_say_that_a_model_has_other_weights_than_fitted(workplace, tmp_path, capsys):
    tiny.save_model(tmp_path / "fine-tuned", initializer_range=0.03)
    words = ["policies=[dense,static]", f"model.path={tmp_path / 'fine-tuned'}", "run.name=fine-tuned"]
    results = run_evaluate(workplace, *words)
    output = capsys.readouterr().out
    said = f"{workplace}/runs/run: weights other than fitted: the codebook was fitted with model (weights "
    assert said in output and output.count("weights other than fitted") == 1 + 3  # and in each table
    assert results["conditions"]["weights"] == "other than fitted"
    as_fitted = run_evaluate(workplace, *words[:1], "run.name=as-fitted")
    assert as_fitted["conditions"]["weights"] is None and "weights other" not in capsys.readouterr().out
    evaluations = workplace / "runs" / "run" / "evaluations"
    runs, _ = finished.find_runs(f"[{evaluations / 'fine-tuned'},{evaluations / 'as-fitted'}]")
    assert len({run.comparison_key for run in runs}) == 2
    assert "weights: other than fitted" in compare_tables.table(runs)
    assert sorted(row["weights"] for row in csv.DictReader(io.StringIO(compare_tables.table_csv(runs)))) == [
        *["", ""],
        *["other than fitted", "other than fitted"],
    ]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("cluster.k=7", r"cluster\.k: the run was fitted with 6, "),
        ("data.fit=score.txt", r"data\.fit: the run was fitted with"),
        ("sparsity=0.3", "sparsity: the run was fitted with 0.5"),
    ],
)
def test_evaluate_refuses_keys_that_the_run_was_fitted_with(workplace, word, line):
    with pytest.raises(UserError, match=line):
        run_evaluate(workplace, word)


def test_a_neuron_predictor_has_a_policy_of_its_own(workplace):
    run_train(workplace, **{"run.name": "neuron", "predictor.form": "neuron", "stage": "predict"})
    results = run_evaluate(workplace, "policies=[neuron-predictor]", "run.name=own", run="neuron")
    assert results["policies"][0]["policy"] == "neuron-predictor" and results["policies"][0]["bytes_share"] > 0.5


def test_a_predictor_of_another_codebook_is_refused(workplace, tmp_path):
    run_train(workplace, **{"run.name": "seed1", "seed": 1, "stage": "predict"})
    other = apc.load_run(workplace / "runs" / "seed1").predictor
    with pytest.raises(UserError, match="the predictor belongs to another codebook"):
        apc.sparsify(tiny.make_model(), apc.load_run(workplace / "runs" / "run").codebook, other, "predicted")


def test_a_run_whose_text_has_changed_is_not_resumed(workplace, tmp_path):
    tiny.make_workplace(tmp_path)
    run_train(tmp_path, stage="cluster")
    tiny.make_text(tmp_path / "fit.txt", seed=8)
    with pytest.raises(
        UserError, match=r"codebook\.safetensors: made from other patterns \(fit text or windows differ\)"
    ):
        run_train(tmp_path, stage="cluster")


SMALL = {
    "collect.storage": "memory",
    "monitor.windows": 0,
    "trainer.checkpoint_every_n_steps": 1,
    "cluster.max_epochs": 2,
}
SMALL |= {"data.fit_windows": 12, "tune.max_epochs": 1, "predictor.max_epochs": 1, "tune.batch_windows": 2}
TRAININGS = {"cluster": ClusteringModule, "predict": PredictorModule, "tune": TuningModule}


def run_killed(folder, stage):
    """A run of small settings that dies within the training of `stage`; returns what resumes it."""
    for before in list(TRAININGS)[: list(TRAININGS).index(stage)]:
        run_train(folder, **SMALL, stage=before)
    with tiny.killed_after(2, TRAININGS[stage]):
        run_train(folder, **SMALL, stage=stage)
    return lambda: run_train(folder, **SMALL, stage=stage)


@pytest.mark.parametrize("what", ["fit text or windows", "model weights"])
def test_a_clustering_is_not_resumed_on_another_text_or_model(tmp_path, what):
    resume = run_killed(tiny.make_workplace(tmp_path), "cluster")
    if what == "model weights":
        tiny.save_model(tmp_path / "model", initializer_range=0.03)
    else:
        tiny.make_text(tmp_path / "fit.txt", seed=8)
    line = rf"cluster\.ckpt: made from other input \({what} differ\); choose another run.name, .* or delete it to train"
    with pytest.raises(UserError, match=line):
        resume()
    (tmp_path / "runs" / "run" / "checkpoints" / "cluster.ckpt").unlink()
    resume()


@pytest.mark.parametrize(("stage", "names"), [("predict", "codebook"), ("tune", "codebook, predictor")])
def test_a_training_is_not_resumed_with_another_codebook(tmp_path, stage, names):
    resume, run = run_killed(tiny.make_workplace(tmp_path), stage), tmp_path / "runs" / "run"
    tiny.make_text(tmp_path / "fit.txt", seed=8)
    for made in run.glob("*.safetensors"):
        made.unlink()
    checkpoint = {"predict": "predictor", "tune": "tune"}[stage]
    with pytest.raises(UserError, match=rf"{checkpoint}\.ckpt: made from other input \({names} differ\); choose"):
        resume()


def test_finished_files_of_another_codebook_are_not_used(tmp_path):
    run, changes = tmp_path / "runs" / "run", {**SMALL, "stage": "tune"}
    run_train(tiny.make_workplace(tmp_path), **changes)
    old = {path.name: path.read_bytes() for path in run.glob("*[or].safetensors")} | {
        path.name: path.read_bytes() for path in run.glob("*codebook.safetensors")
    }
    assert set(old) == {f"{tuned}{name}.safetensors" for tuned in ("", "tuned-") for name in ("codebook", "predictor")}
    tiny.make_text(tmp_path / "fit.txt", seed=8)
    (run / "codebook.safetensors").unlink()
    for name in ("predictor", "tuned-codebook"):
        line = rf"run/{name}\.safetensors: made from another codebook; delete it to make it again, or choose another"
        with pytest.raises(UserError, match=line):
            run_train(tmp_path, **changes)
        (run / f"{name}.safetensors").unlink()
    run_train(tmp_path, **changes)
    (run / "tuned-predictor.safetensors").write_bytes(old["tuned-predictor.safetensors"])
    with pytest.raises(UserError, match=r"run/tuned-predictor\.safetensors: made from another codebook; delete it"):
        run_train(tmp_path, **changes)


def test_a_checkpoint_that_does_not_say_what_it_is_of_is_an_error(tmp_path):
    resume = run_killed(tiny.make_workplace(tmp_path), "cluster")
    path = tmp_path / "runs" / "run" / "checkpoints" / "cluster.ckpt"
    saved = torch.load(path, weights_only=True)
    content = {key: value for key, value in saved.items() if key not in ("made_from", "sha256")}
    torch.save(content | {"sha256": digest_of(content)}, path)
    with pytest.raises(
        UserError, match=r"cluster\.ckpt: does not say which model and text it was made from; delete it to train"
    ):
        resume()


def test_an_error_names_truncated_weights(tmp_path):
    tiny.make_workplace(tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"model\.path={tmp_path}/model: its weights can't be loaded: SafetensorError"):
        run_train(tmp_path)


def test_an_error_names_a_checkpoint_of_another_training(workplace):
    checkpoints = workplace / "runs" / "swapped" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(workplace / "runs" / "kept" / "checkpoints" / "predictor.ckpt", checkpoints / "cluster.ckpt")
    with pytest.raises(UserError, match=r"cluster\.ckpt: not a checkpoint of this training; delete it"):
        run_train(workplace, **{"run.name": "swapped"})


@pytest.mark.report
def test_a_policy_with_an_infinite_loss_has_a_reason_in_the_table(workplace, monkeypatch):
    original = evaluator.window_losses

    def breaking(model, windows):
        losses = original(model, windows)
        return losses * torch.nan if calls.append(1) is None and len(calls) == 6 else losses

    calls = []
    monkeypatch.setattr(evaluator, "window_losses", breaking)
    results = run_evaluate(workplace, "policies=[dense,random,static]", "run.name=broken")
    assert [record["missing"] for record in results["policies"]] == [
        None,
        "the loss of score window 1 is not finite",
        None,
    ]
    assert "the loss of score window 1 is not finite" in policies_table(results)


def test_the_exit_code_of_several_ranks_is_that_of_the_failed_one(workplace, tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text("import os, sys, time\ntime.sleep(60 if os.environ['RANK'] == '0' else 0)\nsys.exit(2)")
    monkeypatch.setattr(sys, "argv", [str(program)])
    words = tiny.tiny_overrides(workplace, **{"trainer.devices": 2})
    assert launch.launch(load_config(None, words)) == 2  # the other rank is ended by a signal


def test_the_command_line_exits_with_2_and_prints_one_line(workplace):
    words = tiny.tiny_overrides(workplace, **{"cluster.k": 5000, "run.name": "exit"})
    done = tiny.command("train.py", *words)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        "error: cluster.k=5000 is more than the 640 patterns to cluster; lower it or raise data.fit_windows"
    ]
    assert "Traceback" not in done.stderr


def test_a_command_whose_reader_is_gone_ends_silently():
    """As in `… | head`. A broken pipe other than stdout is an error like any other."""
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "train.py", "--print-config"],
        cwd=ROOT,
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
    )
    os.close(writes)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "Broken" not in done.stderr
    with pytest.raises(BrokenPipeError), exits.one_line_errors(""):
        raise BrokenPipeError


def test_the_command_line_trains_and_evaluates(workplace):
    words = tiny.tiny_overrides(workplace, **{"run.name": "command"})
    done = tiny.command("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout and "predicted" in done.stdout and "held-out" in done.stdout
    assert not any(
        greeting in done.stdout + done.stderr
        for greeting in ("GPU available", "Tip:", "`Trainer.fit` stopped", "weights_only")
    )
    again = tiny.command(
        "evaluate.py", f"checkpoint={workplace / 'runs' / 'command'}", "policies=[dense,static]", "run.name=cli"
    )
    assert again.returncode == 0, again.stderr
    assert "static" in again.stdout and (workplace / "runs/command/evaluations/cli/results.json").is_file()
