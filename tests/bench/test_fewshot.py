"""bench/fewshot.py end to end, on a small checkpoint of ours and made-up records."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.fewshot import tables
from rrt.data.tokenizer import load_tokenizer
from rrt.folding.conversion import convert
from rrt.model.config import RecursiveConfig
from tests.util.models import make_hf_model
from tests.util.tasks import write_task_files
from tests.util.tokenizers import make_bpe_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_command_measures_the_tasks_that_have_a_file_and_writes_json(tmp_path):
    pytest.importorskip("lm_eval")
    tokenizer = load_tokenizer(make_bpe_tokenizer(tmp_path / "tokenizer", "llama"))
    base = make_hf_model(
        tmp_path / "base", "llama", num_layers=4, vocab_size=tokenizer.vocab_size, bos_token_id=1, eos_token_id=2
    )
    for file in tokenizer.files:
        shutil.copy(file, base)
    convert(base, tmp_path / "ours", RecursiveConfig(num_loops=2))
    data, out = write_task_files(tmp_path / "data", documents=6), tmp_path / "out.json"
    for task in ("lambada_openai", "winogrande", "arc_easy", "arc_challenge"):
        (data / f"{task}.jsonl").unlink()
    flags = ["--checkpoint", tmp_path / "ours", "--data-dir", data, "--documents", 5, "--dtype", "fp32", "--rounds", 2]
    command = [sys.executable, ROOT / "bench" / "fewshot.py", *flags, "--hf-batch-sizes", 2, 3, "--json", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    (found,) = result["results"]
    assert [case["task"] for case in found["cases"]] == ["hellaswag", "piqa", "openbookqa"]
    for case in found["cases"]:
        assert case["documents"] == 5 and case["value"]["ours"] == case["value"]["hf"]
        assert case["max_difference"] <= 1e-4 and case["greedy_differences"] == 0
        assert case["tokens"]["read"] < case["tokens"]["one by one"]
        assert case["tokens"]["through the head"] < case["tokens"]["scored"]
        assert case["floor_seconds"] > 0 and case["hf_batch_size"] in (2, 3)
        assert {side: len(seconds) for side, seconds in case["seconds"].items()} == {"ours": 2, "hf": 2}
    (table,) = tables(result)
    assert len(table.rows) == 4 and f"{found['speedup']:.2f}x" in done.stdout.splitlines()[-2]
