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
    config.addinivalue_line("markers", "report: its runs draw their plots and write their page")


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


@pytest.fixture(scope="module", autouse=True)
def report_of_module(request):
    """Runs write no report in files that import `tiny`, unless marked `report`. Fixtures of a module come after it."""
    if (tiny := getattr(request.module, "tiny", None)) is None:
        yield
    else:
        with tiny.reports(request.node.get_closest_marker("report") is not None):
            yield


@pytest.fixture(autouse=True)
def report_of_test(request):
    """A test marked `report` has its runs' plots and pages."""
    if request.node.get_closest_marker("report"):
        with request.module.tiny.reports(written=True):
            yield
    else:
        yield
