"""Mixtures of experts in which some experts get no token."""

import pytest
import torch

import apc
import tiny
import train
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.models import load_model, weights_sample
from apc.utils.errors import UserError


def run_train(folder, **changes):
    return train.train(load_config(None, tiny.tiny_overrides(folder, **changes)))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("experts"), "gpt_oss")
    model = tiny.make_model("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[1] = -1e4
    model.save_pretrained(folder / "model")
    return folder


def make_model(folder):
    return load_model(ModelConfig(path=str(folder / "model"), device="cpu"), torch.device("cpu"))[0]


def test_a_mixtures_weights_are_compared_with_those_it_was_fitted_with(workplace):
    model = make_model(workplace)
    assert weights_sample(model)["dtype"] == "float32" and weights_sample(model.bfloat16())["dtype"] == "bfloat16"


def test_a_kernel_is_refused_by_name(workplace):
    run_train(workplace, stage="cluster", **{"run.name": "codebook"})
    codebook = apc.load_run(workplace / "runs" / "codebook").codebook
    for kernel in ("auto", "torch"):
        with pytest.raises(UserError, match="experts.0: it is one of several experts, which no kernel supports"):
            apc.sparsify(make_model(workplace), codebook, kernel=kernel)
