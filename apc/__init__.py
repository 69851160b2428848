"""Activation pattern clustering: which FFN neurons a token needs, known before they are computed."""

import importlib

_HOMES = {
    "pack": "ops",
    "unpack": "ops",
    "assign": "ops",
    "assign_weighted": "ops",
    "accumulate": "ops",
    "binarize": "ops",
    "Codebook": "cluster.codebook",
    "Predictor": "predict.predictor",
    "load_run": "run.folder",
    "sparsify": "sparse.sparsify",
    "restore": "sparse.sparsify",
    "load_config": "config.load",
    "UserError": "utils.errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Imports a public name when it is first used, so that `import apc` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'apc' has no attribute {name!r}")
    return getattr(importlib.import_module(f"apc.{_HOMES[name]}"), name)
