"""A run's result in one folder: what it holds, what makes a sparse model of it, and what is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from local_hub import local_hub

import apc
import tiny
import train
from apc.commands import export as export_command
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.models import load_model
from apc.share.result import CODEBOOK, CONFIG, PREDICTOR
from apc.utils.errors import UserError

TOKENS = torch.randint(100, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("share"))
    policies = "[dense,oracle,predicted,soft,staged-predicted,staged-prox]"
    train.train(load_config(None, tiny.tiny_overrides(folder, bytes=0.95, policies=policies, **{"monitor.windows": 0})))
    return folder


def model_of(folder):
    return load_model(ModelConfig(path=str(folder / "model"), device="cpu"), torch.device("cpu"))[0]


@pytest.fixture
def shared(workplace, tmp_path):
    return apc.export(workplace / "runs" / "run", tmp_path / "shared", "staged-predicted")


@pytest.mark.parametrize("policy", ["predicted", "soft", "staged-predicted", "staged-prox"])
def test_a_shared_result_gives_the_runs_own_model(workplace, tmp_path, policy):
    run, folder = apc.load_run(workplace / "runs" / "run"), tmp_path / "shared"
    assert apc.export(run.folder.path, folder, policy) == folder
    expected = apc.sparsify(model_of(workplace), run.codebook, run.predictor, policy)(TOKENS).logits
    loaded = apc.load(folder, model_of(workplace), kernel=None)
    assert torch.equal(loaded(TOKENS).logits, expected)
    assert torch.equal(apc.load(folder, str(workplace / "model"), kernel=None)(TOKENS).logits, expected)
    scored = apc.load(folder, model_of(workplace), kernel="torch", scoring=True)(TOKENS).logits
    torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-4)
    assert (folder / PREDICTOR).exists() == (policy != "staged-prox")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".md"}


def test_it_holds_what_the_policy_needs_and_no_more(workplace, shared):
    whole, slim = (apc.Codebook.load(path) for path in (workplace / "runs/run" / CODEBOOK, shared / CODEBOOK))
    assert set(slim.calibrated) == {"staged-predicted"} and not slim.sites["neuron"].profiles.numel()
    assert (shared / CODEBOOK).stat().st_size < 0.5 * (workplace / "runs/run" / CODEBOOK).stat().st_size
    assert torch.equal(slim.sites["neuron"].centroids, whole.sites["neuron"].centroids)
    with pytest.raises(UserError, match="policy soft: the codebook was shared without profiles; use the run's own"):
        apc.sparsify(model_of(workplace), slim, apc.Predictor.load(shared / PREDICTOR), "soft")
    facts = json.loads((shared / CONFIG).read_text())
    run = apc.load_run(workplace / "runs" / "run")
    record = next(each for each in run.results["policies"] if each["policy"] == "staged-predicted")
    assert facts["sparse"]["perplexity"] == record["perplexity"]
    assert facts["dense"]["perplexity"] == pytest.approx(run.results["policies"][0]["perplexity"])
    assert facts["base_model"]["path"] is None and str(workplace) not in (shared / CONFIG).read_text()
    digest = facts["base_model"]["weights"]
    assert digest == run.codebook.provenance["weights_sample"]["float32"]


def test_the_card_says_how_to_load_it_and_what_it_costs(shared):
    card = (shared / "README.md").read_text()
    record = json.loads((shared / CONFIG).read_text())["sparse"]
    row = f"| staged-predicted | {100 * record['bytes_share']:.1f} | {record['perplexity']:.2f} | {record['ratio']:.3f}"
    assert row in card and "library_name: apc-llm" in card
    assert 'apc.load("FOLDER_OR_HUB_ID", model=MODEL, kernel=None)' in card and "kernels for GPUs; elsewhere" in card
    assert "Licence" in card and "Euro-Par 2025" in card and "held-out" in card


@pytest.mark.parametrize("policy", ["predicted", "staged-predicted", "staged-prox"])
def test_the_line_that_the_command_prints_works(workplace, tmp_path, capsys, monkeypatch, policy):
    monkeypatch.setattr(sys, "argv", ["apc", str(workplace / "runs/run"), str(tmp_path / "shared"), "--policy", policy])
    export_command.main()
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("use it:  apc.load(")
    model = eval(line.removeprefix("use it:"), {"apc": apc, "MODEL": model_of(workplace)})
    assert model(TOKENS).logits.isfinite().all()


def test_a_path_is_not_shared_even_if_it_is_gone(workplace, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(workplace / "runs" / "run", run)
    for path in ("/gone/models/tiny", "models/tiny", "tiny.gguf", "~/models/tiny"):
        config = (run / "config.yaml").read_text().splitlines()
        lines = [f"  path: {path}" if line.startswith("  path:") else line for line in config]
        (run / "config.yaml").write_text("\n".join(lines) + "\n")
        result = apc.Result.of_run(run, "predicted")
        assert result.facts["base_model"]["path"] is None
    bundled = [line.replace("~/models/tiny", "bundled") for line in lines]
    (run / "config.yaml").write_text("\n".join(bundled) + "\n")
    assert apc.Result.of_run(run, "predicted").facts["base_model"]["path"] == "bundled"


def test_without_a_policy_the_best_is_shared(workplace, tmp_path):
    run = apc.load_run(workplace / "runs" / "run")
    result = apc.Result.of_run(run.folder.path, base_model="me/tiny", license="mit")
    assert result.policy == run.best_policy and result.facts["base_model"]["path"] == "me/tiny"
    result.save_pretrained(tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "base_model: me/tiny" in card and "license: mit" in card


def test_another_models_weights_are_refused(workplace, shared, tmp_path):
    other = model_of(workplace)
    other.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    with pytest.raises(UserError, match="^weights other than fitted: .*; use the codebook made for this model"):
        apc.load(shared, other)
    with pytest.raises(UserError, match="the base model model was a folder; give it: model=FOLDER or a loaded model"):
        apc.load(shared)
    with pytest.raises(UserError, match="no such folder"):
        apc.load(shared, tmp_path / "nothing")
    with pytest.raises(UserError, match="Linear: not a Hugging Face model"):
        apc.load(shared, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("results.json", "[1]", r"results.json: damaged \(not the results of a run\); delete it and run again"),
        ("results.json", '{"policies": 3, "conditions": {}}', r"results.json: damaged \(not the results of a run\)"),
        ("results.json", "[" * 20000, "results.json: damaged .*recursion"),
        ("config.yaml", "later: 1", "config.yaml: later: unknown key; .*; another version of apc may have written it"),
        ("codebook.safetensors", "x", "codebook.safetensors: damaged"),
    ],
    ids=["list", "number", "deep", "config", "codebook"],
)
def test_a_damaged_run_is_one_line_and_nothing_is_written(workplace, tmp_path, file, text, problem):
    shutil.copytree(workplace / "runs" / "run", tmp_path / "run")
    (tmp_path / "run" / file).write_text(text)
    with pytest.raises(UserError, match=problem) as caught:
        apc.export(tmp_path / "run", tmp_path / "shared")
    assert "\n" not in str(caught.value) and not (tmp_path / "shared").exists()


def change_config(**changes):
    def change(folder):
        facts = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(facts | changes))

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / CONFIG).unlink(), r"no whole result \(it lacks config.json\); make one with apc exp"),
        (lambda folder: (folder / CONFIG).write_text("{"), r"config.json: damaged \(.*\); export the run again"),
        (change_config(format="x"), "config.json: not the config.json of a result that apc made"),
        (change_config(version=2), "config.json: version 2, this program reads 1; update apc-llm, or export again"),
        (change_config(policy="x"), r"config.json: damaged \(there is no policy x\)"),
        (change_config(seed="x"), r"config.json: damaged \(seed is 'x'\)"),
        (change_config(sparse={}), r"config.json: damaged \(the figures of sparse lack perplexity or ratio\)"),
        (lambda folder: (folder / CONFIG).write_text("[" * 20000), "config.json: damaged .*recursion"),
        (change_config(base_model={}), r"config.json: damaged \(its base model lacks path\)"),
        (change_config(files={"../x": ""}), r"config.json: damaged \(it names no codebook\)"),
        (change_config(files={CODEBOOK: "", "x.py": ""}), "codebook.safetensors: damaged .another checksum"),
        (lambda folder: (folder / PREDICTOR).unlink(), "predictor.safetensors: no such file, though config.json names"),
        (lambda folder: (folder / CODEBOOK).write_bytes(b"x"), "codebook.safetensors: damaged .another checksum than"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(shared, change, problem):
    change(shared)
    with pytest.raises(UserError, match=problem) as caught:
        apc.load(shared)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["nothing", "./no/folder", "/no/folder", "a/b/c"])
def test_what_is_no_folder_and_no_hub_id_is_refused(where):
    with pytest.raises(UserError, match=f"^{where}: no such folder, and not a hub id; make one with apc export"):
        apc.load(where)


def test_what_can_not_be_shared_is_refused(workplace, tmp_path):
    run = workplace / "runs" / "run"
    for policy, problem in (
        ("oracle", "policy oracle: nothing to share"),
        ("dense", "policy dense: nothing to share"),
        ("neuron-predictor", "policy neuron-predictor: needs a predictor of form"),
        ("x", "policy x: unknown; choose dense"),
    ):
        with pytest.raises(UserError, match=problem):
            apc.export(run, tmp_path / "shared", policy)
    assert not (tmp_path / "shared").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds other files .mine.txt.; choose another folder"):
        apc.export(run, tmp_path / "other", "predicted")
    with pytest.raises(UserError, match="below: can't be written .Not a directory.; choose another folder"):
        apc.export(run, tmp_path / "other" / "mine.txt" / "below", "predicted")
    with pytest.raises(UserError, match="mine.txt: a file; choose another folder"):
        apc.export(run, tmp_path / "other" / "mine.txt", "predicted")
    shutil.copytree(run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("results.json"))
    with pytest.raises(UserError, match="results.json: no such file; finish the run first: train.py run.name=unfinish"):
        apc.export(tmp_path / "unfinished", tmp_path / "shared")


def test_the_command(workplace, tmp_path):
    words = ["apc/__main__.py", "export", str(workplace / "runs" / "run"), str(tmp_path / "shared")]
    words += ["--policy", "predicted"]
    for _ in range(2):  # a second time over the first
        done = tiny.command(*words)
        assert done.returncode == 0 and "predicted for model" in done.stdout and "apc.load(" in done.stdout, done.stderr
    words[-1] = "oracle"
    done = tiny.command(*words)
    assert done.returncode == 2 and done.stderr.startswith("error: policy oracle: nothing to share")
    assert done.stderr.count("\n") == 1


USE_THE_HUB = """
import sys
import torch
import apc
result = apc.Result.from_pretrained(sys.argv[1])
print(result.push_to_hub("me/shared"))
model = apc.load("me/shared", sys.argv[2], kernel=None)
torch.save(model(torch.load(sys.argv[3])).logits, sys.argv[4])
"""


def test_through_a_stand_in_of_the_hub(workplace, shared, tmp_path):
    """No hub can be reached here: a server on this machine answers as the hub does."""
    torch.save(TOKENS, tmp_path / "tokens.pt")
    paths = [shared, workplace / "model", tmp_path / "tokens.pt", tmp_path / "logits.pt"]
    script = [sys.executable, "-c", USE_THE_HUB, *map(str, paths)]
    with local_hub() as (address, repositories):
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_TOKEN": "hf_x",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run(script, capture_output=True, text=True, cwd=tiny.ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        names = {path.name for path in shared.iterdir()}
        assert set(repositories["me/shared"]) - {".gitattributes"} == names
        assert repositories["me/shared"]["README.md"] == (shared / "README.md").read_bytes()
    expected = apc.load(shared, model_of(workplace), kernel=None)(TOKENS).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    # Afterwards, without the hub: from the cache; what it lacks is one line.
    code = "import sys, apc; apc.load(sys.argv[1], sys.argv[2], kernel=None)"
    for name, line in (("me/shared", None), ("me/other", "me/other: can't be loaded from the hub (the hub can't be")):
        words = [sys.executable, "-c", code, name, str(workplace / "model")]
        offline = environment | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, capture_output=True, text=True, cwd=tiny.ROOT, env=offline)
        assert (done.returncode == 0) == (line is None), done.stderr
        assert line is None or line in done.stderr.splitlines()[-1]
