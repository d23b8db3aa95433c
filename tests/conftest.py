"""Settings and fixtures for all tests."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.util.progress import end_on_sticky_error

# A deadline per example would be a timed assertion.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute with one thread, for the same bits as in processes that have one core each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_cuda_error_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Wait for the GPU after each test marked gpu; end the process if its CUDA context is lost.

    An illegal address is reported by whichever call comes next, so that without the wait it would be another test's
    fault; and every later call of the process would fail.
    """
    yield
    if request.node.get_closest_marker("gpu") is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            end_on_sticky_error(request.node.nodeid, error)
