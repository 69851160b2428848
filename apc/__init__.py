"""Activation pattern clustering: predicts which FFN neurons of a language model a token needs, before they run."""

import importlib
from typing import Any

_MODULES = {  # the module of each public name
    "pack": "ops",
    "unpack": "ops",
    "assign": "ops",
    "assign_weighted": "ops",
    "accumulate": "ops",
    "binarize": "ops",
    "Codebook": "cluster.codebook",
    "Predictor": "predict.predictor",
    "load_run": "run.folder",
    "export": "share.result",
    "load": "share.result",
    "Result": "share.result",
    "dequantise": "data.dequantise",
    "quantise_ffns": "data.quantise",
    "own_steps": "sparse.own_steps",
    "round_weights": "sparse.rounded_model",
    "sparsify": "sparse.sparsify",
    "restore": "sparse.sparsify",
    "GreedyDecoder": "sparse.decode",
    "load_config": "config.load",
    "UserError": "utils.errors",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so that `import apc` stays fast."""
    if name not in _MODULES:
        raise AttributeError(f"module 'apc' has no attribute {name!r}")
    return getattr(importlib.import_module(f"apc.{_MODULES[name]}"), name)
