"""What every test needs: Triton's interpreter where there is no GPU, fixed seeds, and `gpu` tests skipped without one."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before anything imports apc.ops

LONGEST = ["test_killed", "test_ops", "test_pipeline", "test_bundled", "test_baselines", "test_tuning"]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")


def pytest_collection_modifyitems(items):
    # Files are dealt out whole, so the longest come first: none of them shall begin when the other processes have nothing left.
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in a test whatever ran before it."""
    torch.manual_seed(0)
