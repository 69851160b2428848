"""A mask policy owns its facts: a class from outside the package runs, has its cost, its table row and its colour."""

import ast
import json
import math
from dataclasses import replace
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import torch

import apc
import tiny
import train
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.models import load_model
from apc.evaluate.figures import perplexity_figure
from apc.evaluate.tables import policies_table
from apc.sparse.policies import POLICIES, MaskPolicy, kernel_policies
from apc.sparse.policies.base import PEER_COLOR

PACKAGE = Path(apc.__file__).parent
FOLDERS = ("evaluate", "compare", "estimate")  # they read a policy's facts, and need no name but that of dense
ALLOWED: dict[tuple[str, str], str] = {}  # (file, name): the reason why the file names the policy


class Toy(MaskPolicy):
    """Keeps the even neurons."""

    name = "toy"
    color, marker = "#12AB34", "H"

    def mask(self, inputs):
        return torch.arange(inputs.values.shape[-1], device=inputs.values.device).unsqueeze(0) % 2 == 0

    def choice_bits(self, site, densities):
        return 2.5

    def parameters_read(self, site):
        return 7.0

    def multiplications(self, site):
        return 11.0


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files of a finished run under the toy policy."""
    folder = tiny.make_workplace(tmp_path_factory.mktemp("policies"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(POLICIES, "toy", Toy)
        train.train(
            load_config(None, tiny.tiny_overrides(folder, policies="[dense,exact,toy]", **{"data.score_windows": 8}))
        )
    return folder


@pytest.fixture
def results(workplace, monkeypatch):
    monkeypatch.setitem(POLICIES, "toy", Toy)
    return json.loads((workplace / "runs" / "run" / "results.json").read_text())


def test_figures_tell_all_policies_apart_and_peers_are_grey():
    looks = {(policy.color, policy.marker) for policy in POLICIES.values()}
    assert len(looks) == len(POLICIES)
    peers = {name for name, policy in POLICIES.items() if policy.is_peer}
    assert peers == {"cats", "teal", "wina", "r-sparse", "prox"}
    assert {name for name, policy in POLICIES.items() if policy.color == PEER_COLOR} == peers


def test_results_have_the_cost_that_the_policy_states(results):
    records = {record["policy"]: record for record in results["policies"]}
    assert list(records) == ["dense", "exact", "toy"]
    toy, dense_parameters = records["toy"], 3 * 32 * 52
    assert toy["density"] == toy["masked"]["density"] == 0.5 and toy["missing"] is None
    assert toy["bits"] == 2.5
    assert toy["bytes_share"] == pytest.approx(0.5 + 7 / dense_parameters)
    assert toy["flops_share"] == pytest.approx(0.5 + 11 / dense_parameters)
    assert math.isfinite(toy["perplexity"]) and toy["ratio_low"] < toy["ratio"] < toy["ratio_high"]


def test_results_and_tables_warn_of_a_model_that_hardly_predicts(results):
    """The tiny model has random weights."""
    (said,) = results["warnings"]
    dense = results["policies"][0]["perplexity"]
    assert said.startswith(f"the dense model hardly predicts this text: its perplexity is {dense:.1f}, ")
    assert f"\n\nWARNING: {said}\n\n" in policies_table(results, markdown=True)


def test_the_table_has_a_row_for_the_policy(results):
    for wide in (False, True):
        (row,) = (line for line in policies_table(results, wide=wide).splitlines() if line.startswith("toy "))
        assert row.split()[1] == "50.0" and "*" not in row and ("2.5" in row.split()) == wide


def test_the_figure_draws_the_policy_in_its_colour(results, tmp_path):
    assert perplexity_figure(results, tmp_path / "perplexity.png")
    pixels = (255 * matplotlib.image.imread(tmp_path / "perplexity.png")[..., :3]).round()
    colour = np.multiply(255, matplotlib.colors.to_rgb(Toy.color)).round()
    assert (pixels == colour).all(-1).sum() > 100


def test_a_loaded_run_names_its_best_policy_that_is_no_bound(workplace, results):
    run = apc.load_run(workplace / "runs" / "run")
    perplexities = {record["policy"]: record["perplexity"] for record in results["policies"]}
    assert run.best_policy == "toy" and perplexities["exact"] < perplexities["toy"]
    assert replace(run, results=None).best_policy is None


def test_kernels_run_the_policy(workplace, results):
    assert "toy" in kernel_policies("cpu") and "toy" in kernel_policies("cuda")
    codebook = apc.load_run(workplace / "runs" / "run").codebook
    model, _ = load_model(ModelConfig(path=str(workplace / "model"), device="cpu"), torch.device("cpu"))
    tokens = torch.arange(6)[None]
    masked = apc.sparsify(model, codebook, policy="toy")(tokens).logits
    skipped = apc.sparsify(model, codebook, policy="toy", kernel="torch", max_sparse_tokens=math.inf)(tokens).logits
    torch.testing.assert_close(skipped, masked, rtol=1e-4, atol=1e-4)


def test_no_other_folder_names_a_policy_but_dense():
    named = set()
    for folder in FOLDERS:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and node.value in set(POLICIES) - {"dense"}:
                    named.add((path.relative_to(PACKAGE).as_posix(), node.value))
    assert named == set(ALLOWED)
