"""Whether the Hugging Face hub can be reached."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face hub answers within `timeout` seconds; False at once if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT, timeout)


def is_cached(model: str, revision: str | None) -> bool:
    """Whether the local cache has the configuration of a model on the hub."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)


@cache
def _answers(endpoint: str, timeout: float) -> bool:
    """Asks once per run, so that model and text do not both wait."""
    from huggingface_hub import get_session

    answers = []

    def ask() -> None:
        # Any failure means no: the hub client changed its HTTP library, so the exceptions differ between versions.
        try:
            answers.append(get_session().head(endpoint, timeout=timeout).status_code < 500)
        except Exception:
            answers.append(False)

    # In a thread, because a socket's timeout does not cover looking up the host's name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers and answers[0])


@contextmanager
def hub_offline(offline: bool) -> Iterator[None]:
    """If `offline`, `datasets` uses only its cache within the block.

    Without this, it would retry an unreachable hub for 23 s.
    """
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if offline:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
