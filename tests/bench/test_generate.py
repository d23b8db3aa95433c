"""bench/generate.py: what a step reads, how texts are compared, and the command end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.generate import compare, tables, weight_bytes
from rrt.folding.conversion import convert
from rrt.model.config import LoraRanks, RecursiveConfig
from tests.util.decoding import make_model
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def test_a_step_reads_shared_weights_at_each_loop_and_loras_once():
    vanilla, relaxed = (make_model("llama", looped, torch.float32) for looped in ("vanilla", "relaxed-2"))
    head = relaxed.head_weight.nbytes
    loras = sum(p.nbytes for name, p in relaxed.named_parameters() if "lora" in name)
    assert loras > 0
    assert weight_bytes(vanilla) == head + sum(p.nbytes for p in vanilla.stack.parameters())
    assert weight_bytes(relaxed) - loras == weight_bytes(vanilla)


class Margins:
    """Stands for transformers: every token's logit is the token itself."""

    def margin(self, prompt, own, other):
        assert prompt[-1] == 7
        return own - other


def test_texts_are_compared_up_to_their_first_difference():
    prompts = [[1], [2], [7]]
    same = compare([[4, 5], [6, 7], [1, 2]], [[4, 5], [6, 7], [1, 2]], prompts, Margins())
    assert same == {"same_texts": 3, "largest_margin": None}
    other = compare([[4, 5], [7, 3], [1, 2]], [[4, 5], [7, 9], [4, 2]], prompts, Margins())
    assert other == {"same_texts": 1, "largest_margin": {"prompt": 1, "token": 1, "margin": 6}}


@pytest.mark.slow
def test_command_measures_a_relaxed_checkpoint_and_writes_json(tmp_path):
    base, relaxed, out = tmp_path / "base", tmp_path / "relaxed", tmp_path / "out.json"
    make_hf_model(base, "llama", num_layers=4, vocab_size=420)
    make_bpe_tokenizer(base, "llama")
    convert(base, relaxed, RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(5)))
    flags = "--dtype float32 --prompts 1 3 --prompt-tokens 5 --new-tokens 6 --threads 1 --rounds 2".split()
    command = [sys.executable, str(ROOT / "bench" / "generate.py"), "--checkpoint", str(relaxed), *flags]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [case["prompts"] for case in result["cases"]] == [1, 3]
    for case in result["cases"]:
        assert case["same_texts"] == case["prompts"] and case["largest_margin"] is None
        assert case["rounds"] >= 2 and case["over_floor"] > 0
        assert f"{case['speedup']:.2f}x" in done.stdout
    assert len(tables(result)) == 2
