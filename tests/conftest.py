"""Without a GPU: Triton's interpreter, and no `gpu` tests. For every test: the same seed."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # Triton reads it when a kernel is decorated, so set it before importing apc.ops
    )

LONGEST = ["test_pipeline", "test_bundled", "test_killed", "test_tuning"]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")


def pytest_collection_modifyitems(items):
    # A file's tests run in one process. The longest files come first, so that none starts when the others are done.
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_collection_finish():
    gc.freeze()  # every training collects garbage; going through all imported modules each time takes longer than a fit


@pytest.fixture(autouse=True)
def seed():
    """A test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)
