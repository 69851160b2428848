"""Whether the Hugging Face hub can be reached."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


# ---- the Hugging Face hub


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face hub answers within `timeout` seconds; False at once when HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT, timeout)


@cache
def _answers(endpoint: str, timeout: float) -> bool:
    """Asks once a run: model and text together must not wait twice."""
    from huggingface_hub import get_session

    answers = []

    def ask() -> None:
        # Any failure means no: the session's exceptions differ between versions of the hub client, which changed its HTTP library.
        try:
            answers.append(get_session().head(endpoint, timeout=timeout).status_code < 500)
        except Exception:
            answers.append(False)

    # In a thread, because the timeout of a socket does not bound the look-up of the host's name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers and answers[0])


@contextmanager
def hub_offline(offline: bool) -> Iterator[None]:
    """With `offline`, `datasets` looks in its cache only; otherwise it would retry an unreachable hub for 23 s."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if offline:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
