"""Training from and against a model in a GGUF file."""

import json
from pathlib import Path

import pytest

from rrt.common.provenance import fingerprint
from rrt.data.tokenizer import load_tokenizer
from rrt.folding.conversion import convert
from rrt.model.config import RecursiveConfig
from tests.util.gguf_files import sentencepiece_fields, write_gguf
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_sentencepiece_tokenizer
from tests.util.training import make_data, make_flags, train_here
from train.architecture import read_architecture


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    model = make_hf_model(root / "hf", "llama", num_layers=2, vocab_size=420)
    fields = sentencepiece_fields(make_sentencepiece_tokenizer(root / "tokenizer"))
    return write_gguf(root / "model.gguf", model, tokenizer=fields)


@pytest.fixture(scope="module")
def data(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), base)


def test_a_folded_model_is_trained_with_its_file_as_teacher(base: Path, data: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "folded", RecursiveConfig(num_loops=2))
    train_here(make_flags(tmp_path / "folded", data)(tmp_path / "run", 2, distill__teacher=base))
    provenance = json.loads((tmp_path / "run" / "final" / "provenance.json").read_text())
    assert provenance["teacher"] == {"path": str(base), "sha256": fingerprint(base)}


def test_a_file_is_trained_as_it_is(base: Path, data: Path, tmp_path: Path) -> None:
    assert read_architecture(str(base), "checkpoint.path")[0].num_layers == 2
    train_here(make_flags(base, data)(tmp_path / "run", 2))
    assert load_tokenizer(tmp_path / "run" / "final").sha256 == load_tokenizer(base).sha256
