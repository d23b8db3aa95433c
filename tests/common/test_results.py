"""rrt/common/results.py: results as JSON, with their origin."""

import json

import torch

from rrt.common import machine
from rrt.common.results import write_result
from rrt.version import __version__


def test_results_name_the_machine_and_the_code(tmp_path):
    write_result(tmp_path / "result.json", {"loss": 1.5})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["loss"] == 1.5 and result["torch"] == torch.__version__
    assert result["device"] == f"cpu: {machine.cpu_info()['model']}" and result["cores"] >= 1
    assert result["code_version"].startswith(__version__)
