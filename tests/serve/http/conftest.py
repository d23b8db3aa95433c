"""The small model that all tests of the server share."""

import pytest

from tests.util.servers import make_checkpoint, serving


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(checkpoint):
    with serving(checkpoint) as served:
        yield served
        served.wait_until_idle()
