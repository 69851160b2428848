"""Handles SIGTERM, which SLURM sends before it takes a machine back.

A training ends after its step, everything else at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from apc.utils.errors import Terminated

_state = {"training": False, "asked": False}


def terminate(signum: int, frame: object) -> None:
    """Handles SIGTERM: a training ends after its step (`EndTogether`); without one, raises Terminated."""
    if not (_state["training"] or _state["asked"]):
        raise Terminated
    _state["asked"] = True


def ask() -> None:
    """Asks the current training to end, because another of its ranks was asked to."""
    _state["asked"] = True


def asked() -> bool:
    """Whether the current training was asked to end."""
    return _state["training"] and _state["asked"]


@contextmanager
def training() -> Iterator[None]:
    """Marks the block as a training. Raises Terminated after it if a SIGTERM came too late to end the training."""
    _state.update(training=True, asked=False)
    try:
        yield
    finally:
        _state["training"] = False
    if _state["asked"]:
        raise Terminated
