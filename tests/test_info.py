"""python -m rrt.info: versions, native library and devices, as JSON and as text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rrt.info
from rrt.ops import build_info
from rrt.version import __version__


def run_info(*arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "rrt.info", *arguments],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def test_json_tells_versions_library_and_devices() -> None:
    info = json.loads(run_info("--json"))
    assert info["versions"]["rrt"] == __version__
    assert info["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "safetensors", "tokenizers", "sentencepiece"} <= info["versions"].keys()
    assert info["native"]["library"] == build_info().library
    assert info["cpu"]["model"] and info["cpu"]["usable_cores"] <= info["cpu"]["cores"]
    assert len(info["gpus"]) == torch.cuda.device_count()


def test_text_without_a_library_says_why_and_how_to_build_it() -> None:
    text = run_info(RRT_NATIVE="0")
    assert "the PyTorch reference runs (switched off by RRT_NATIVE=0)" in text
    assert f"to build them: {build_info().rebuild}" in text


def test_text_names_the_library_and_the_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    info = build_info()
    if info.library is None:
        pytest.skip(f"no native library: {info.reason}")
    rrt.info._print_text(rrt.info.collect_info())
    text = capsys.readouterr().out
    assert info.library in text and f"{info.cpu_isa} in use" in text


@pytest.mark.gpu
def test_the_gpu_runs_an_image_of_this_build() -> None:
    assert build_info().cuda, "built without CUDA: use RRT_WITH_CUDA=1"
    versions = rrt.info.cuda_versions()
    assert versions is not None and versions[1] >= 12000
    for gpu in rrt.info.collect_info()["gpus"]:
        assert gpu["runs_image"] is not None and gpu["runs_image"].split("_")[1][0] == gpu["capability"][0]
