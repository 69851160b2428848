"""Activation pattern clustering: which FFN neurons a token needs, known before they are computed."""

import importlib

_HOMES = {
    "pack": "ops", "unpack": "ops", "assign": "ops", "assign_weighted": "ops", "accumulate": "ops", "binarize": "ops",
    "Codebook": "codebook", "Predictor": "predictor", "load_run": "runs", "sparsify": "sparse_model", "restore": "sparse_model",
    "load_config": "config", "UserError": "errors",
}  # fmt: skip
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Imports a public name when it is first used, so that `import apc` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'apc' has no attribute {name!r}")
    return getattr(importlib.import_module(f"apc.{_HOMES[name]}"), name)
