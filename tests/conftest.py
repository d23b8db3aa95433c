"""Settings and fixtures for all tests."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

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
