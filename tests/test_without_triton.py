"""A run loads and a model runs sparse on the CPU where Triton, or what the extra `train` brings, is not installed."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import apc
import tiny
from apc import ops
from apc.utils.errors import UserError

TESTS = Path(__file__).resolve().parent
RUN = TESTS / "data" / "v0.1" / "tuned"
EXTRAS = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TRAIN = [re.match(r"[\w-]+", requirement).group().replace("-", "_") for requirement in EXTRAS["train"]]
CALL = "import sys; sys.modules.update(dict.fromkeys({missing})); import test_without_triton as test; test.{call}"


def use_run(path: str) -> None:
    """Writes to a file what a run's codebook and predictor make of a tiny model, and what operations return."""
    torch.manual_seed(0)
    run, model = apc.load_run(RUN), tiny.make_model()
    tokens = torch.randint(tiny.VOCABULARY, (2, 9))
    results = {}
    with torch.no_grad():
        for kernel in (None, "torch"):
            apc.sparsify(model, run.codebook, run.predictor, "predicted", kernel=kernel)
            results[f"logits, predicted, kernel {kernel}"] = model(tokens).logits
        apc.sparsify(model, run.codebook, policy="oracle")
        results["logits, oracle"] = model(tokens).logits
    rows = apc.pack(torch.rand(300, 130) < 0.5)
    results["ids"], results["overlaps"] = apc.assign(rows, rows[:7])
    results["sums"], results["sizes"] = apc.accumulate(rows, results["ids"], 7, 130)
    torch.save(results, path)


def launch_kernel() -> None:
    """Fails unless the launch of a kernel names Triton and says what to do."""
    with pytest.raises(UserError, match="Triton is not installed.*pip install triton"):
        ops.pack_triton(torch.rand(3, 130) < 0.5)


def call_without(missing: list[str], call: str) -> None:
    """Calls a function of this file in a process where these packages can't be imported. Fails if the call does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(tiny.ROOT)])}
    command = [sys.executable, "-c", CALL.format(missing=missing, call=call)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, torch.Tensor]:
    path = tmp_path_factory.mktemp("with") / "results.pt"
    use_run(str(path))
    return torch.load(path)


@pytest.mark.parametrize("missing", [["triton"], TRAIN], ids=["triton", "the-extra-train"])
def test_a_run_gives_the_same_logits_without_these_packages(tmp_path, missing, expected):
    kernel = "; test.launch_kernel()" if missing == ["triton"] else ""
    call_without(missing, f"use_run({str(tmp_path / 'results.pt')!r}){kernel}")
    results = torch.load(tmp_path / "results.pt")
    assert results.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(results[name], values), name
