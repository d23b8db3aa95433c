"""The small bases that tests of folding share."""

from pathlib import Path

import pytest

from tests.util.models import ALL_FAMILIES, make_hf_model


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A six-layer fp32 base of each family."""
    root = tmp_path_factory.mktemp("bases")
    return {family: make_hf_model(root / family, family) for family in ALL_FAMILIES}
