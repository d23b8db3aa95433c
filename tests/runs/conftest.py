"""A study's results, and the command that begins one of a tiny base."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runs.conversion_arms import MEASURES
from tests.util.models import make_hf_model
from tests.util.studies import write_fewshot, write_model, write_perplexity, write_study_file, write_training
from tests.util.tokenizers import make_bpe_tokenizer


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A study of which the base and the decisive pair are there, apart from the third seed and distillation."""
    out = tmp_path / "out"
    write_study_file(out)
    write_model(out, "base", 134_500_000, None)
    write_model(out, "average-svd-r64", 100_950_000, 33.3)
    write_model(out, "calibrated-r64", 100_950_000, 512.0)
    for measure in MEASURES:
        write_perplexity(out, "base", measure, 30.4)
        write_perplexity(out, "average-svd-r64", measure, 3_344_216.0)
        for draw, perplexity in enumerate((93.0, 94.0, 96.0)):
            write_perplexity(out, "calibrated-r64" + (f"-draw{draw}" if draw else ""), measure, perplexity)
    for arm, ends in {"average-svd-r64": (500.0, 75.0), "calibrated-r64": (60.0, 45.0)}.items():
        for tokens, end in zip((102_400, 204_800), ends, strict=True):
            for seed in (0, 1):
                write_perplexity(out, f"{arm}-{tokens}-plain-seed{seed}", "natural-512", end * 1.1**seed)
        write_training(out, f"{arm}-204800-plain-seed0")
    write_fewshot(out, "base", 0.5)
    write_fewshot(out, "calibrated-r64-204800-plain-seed0", 0.25)
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "tiny"
    make_hf_model(directory, "gpt_neox", num_layers=4, vocab_size=420, max_position_embeddings=2048)
    return make_bpe_tokenizer(directory, vocab_size=420)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} " * 400}) + "\n" for number in range(10)))
    return path


@pytest.fixture
def command(base: Path, text: Path, tmp_path: Path) -> Iterator[list[Any]]:
    yield ["--base", base, "--text", text, "--out", tmp_path / "out"]
