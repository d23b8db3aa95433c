"""bench/serving.py: forced agreement, the bound, and the command end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.serving import ForcedDrafts, bound, drawn_agreement, lossy_policy, pass_seconds, serve, tables
from rrt.folding.conversion import convert
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.serve.engine import Engine
from tests.util.decoding import make_decoder, make_model
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("looped", ["recursive-2", "relaxed-3-untied"])
def test_forced_agreement_takes_the_passes_that_it_should(looped):
    decoder = make_decoder(make_model("llama", looped, torch.float32), num_pages=200)
    num_loops = decoder.cache.num_loops
    expected, passes = serve(Engine(decoder), PROMPTS, 12)
    assert passes == 12 * num_loops
    agrees = drawn_agreement(2, 12, 0.6)
    assert 0 < agrees.sum() < 24
    # The requests run beside each other, and the slower one decides. The first token ends the prompt.
    each = torch.where(agrees[:, 1:], 1, num_loops)
    tokens, passes = serve(ForcedDrafts(decoder, expected, agrees), PROMPTS, 12)
    assert tokens == expected
    # The last token is not begun before it is certain, and ends with its last loop.
    assert passes == num_loops + int((each[:, :-1].sum(1)).max()) + num_loops
    _, passes = serve(Engine(decoder, lossy_policy(agrees)), PROMPTS, 12)
    assert passes == num_loops + int(each.sum(1).max())


def test_the_bound_counts_passes_of_block_and_head():
    assert bound("never", 2, 1.0, 0.5) is None and bound("generate", 2, 1.0, 0.5) is None
    assert bound("lossy 1", 2, 1.0, 0.0) == 2.0 and bound("verify 0", 3, 1.0, 0.0) == 1.0
    assert bound("verify 0.8", 2, 2.0, 1.0) == pytest.approx(5.0 / (1.2 * 3.0))
    decoder = make_decoder(make_model("llama", "recursive-2", torch.float32), num_pages=200)
    assert all(seconds > 0 for seconds in pass_seconds(decoder, PROMPTS, 6, 2))
    assert decoder.cache.num_used_pages == 0


@pytest.mark.slow
def test_command_measures_a_relaxed_checkpoint_and_writes_json(tmp_path):
    base, relaxed, out = tmp_path / "base", tmp_path / "relaxed", tmp_path / "out.json"
    make_hf_model(base, "llama", num_layers=4, vocab_size=420)
    make_bpe_tokenizer(base, "llama")
    convert(base, relaxed, RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(5)))
    flags = "--in-flight 1 3 --agreement 0.5 --prompt-tokens 5 --new-tokens 6 --threads 1 --rounds 2 --transformers"
    command = [sys.executable, str(ROOT / "bench" / "serving.py"), "--checkpoint", str(relaxed), *flags.split()]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [case["in_flight"] for case in result["cases"]] == [1, 3]
    for case in result["cases"]:
        assert list(case["variants"]) == ["never", "lossy 0.5", "verify 0.5", "generate", "transformers"]
        assert all(found["tokens_per_second"] > 0 for found in case["variants"].values())
    assert "verify 0.5" in tables(result)[0].markdown()
