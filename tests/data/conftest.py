"""A tokenizer directory of every published kind, made once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rrt.data.bpe import train_bpe
from rrt.data.tokenizer import Tokenizer, load_tokenizer
from tests.util.tokenizers import KINDS, make_bpe_tokenizer, make_sentencepiece_tokenizer, training_texts


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for kind in KINDS:
        form, _, family = kind.partition("-")
        if form == "trained":
            made[kind] = root / kind
            made[kind].mkdir()
            train_bpe(training_texts(), 400, made[kind])
        else:
            make = make_sentencepiece_tokenizer if form == "sp" else make_bpe_tokenizer
            made[kind] = make(root / kind, family)
    return made


@pytest.fixture(scope="session")
def loaded(directories: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(directory) for kind, directory in directories.items()}


@pytest.fixture
def copy_of(directories: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A directory of a kind that the test may change."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(directories[kind], tmp_path / kind))

    return copy
