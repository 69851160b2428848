"""Ends a process that is asked to (SIGTERM, which SLURM sends before it takes a machine back): a training after its step, all else at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from apc.utils.errors import Terminated

_state = {"training": False, "asked": False}


def terminate(signum: int, frame: object) -> None:
    """The handler of SIGTERM. A training ends after its step (see `apc.callbacks.EndTogether`), and then the process, undisturbed by another. Raises
    Terminated elsewhere."""
    if not (_state["training"] or _state["asked"]):
        raise Terminated
    _state["asked"] = True


def ask() -> None:
    """As if the training at hand were asked to end: another of its processes was."""
    _state["asked"] = True


def asked() -> bool:
    """Whether the training at hand was asked to end."""
    return _state["training"] and _state["asked"]


@contextmanager
def training() -> Iterator[None]:
    """Around a training. Raises Terminated after it where a SIGTERM came too late to end it."""
    _state.update(training=True, asked=False)
    try:
        yield
    finally:
        _state["training"] = False
    if _state["asked"]:
        raise Terminated
