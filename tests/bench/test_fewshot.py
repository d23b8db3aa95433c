"""bench/fewshot.py: the forms of its requests, and the command end to end."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench.fewshot import FORMS, make_requests, make_shapes

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"w{n}" for n in range(500)]


def test_the_mix_has_every_task_in_proportion_to_its_requests():
    assert sum(form.documents * form.choices for form in FORMS.values()) == 67_723
    made = make_shapes(5, 600, WORDS)
    assert len(made["hellaswag"]) == 20
    assert len(made["mix"]) == pytest.approx(600, rel=0.05)


def test_requests_have_the_lengths_of_their_form_and_choices_share_their_context():
    rng = random.Random(0)
    for form in FORMS.values():
        for context, continuation in make_requests(form, 20, WORDS, rng):
            extra = 2 if form.option_in_context else 0
            assert form.context[0] <= len(context.split()) <= form.context[1] + extra
            assert form.choice[0] <= len(continuation.split()) <= form.choice[1] and continuation[0] == " "
    hellaswag = make_requests(FORMS["hellaswag"], 1, WORDS, rng)
    assert len({context for context, _ in hellaswag}) == 1
    winogrande = make_requests(FORMS["winogrande"], 1, WORDS, rng)
    assert len({continuation for _, continuation in winogrande}) == 1


@pytest.mark.slow
def test_command_measures_both_shapes_and_writes_json(tmp_path):
    pytest.importorskip("lm_eval")
    out = tmp_path / "out.json"
    flags = (
        "--documents 2 --mix 20 --layers 2 --hidden-size 128 --vocab-size 1000 --rounds 1 --hf-batch-sizes 2".split()
    )
    command = [sys.executable, str(ROOT / "bench" / "fewshot.py"), *flags, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [case["shape"] for case in result["cases"]] == ["hellaswag", "mix"]
    assert isinstance(result["packing_seconds"], float)
    for case in result["cases"]:
        assert case["same_greedy"] and case["max_difference"] <= 1e-4
        assert case["tokens"]["shared"] < case["tokens"]["one by one"]
        assert case["tokens"]["through the head"] < case["tokens"]["scored"]
        assert set(case["seconds"]) == {"ours", "nothing shared", "hf, batch 2"} and case["over_floor"] > 0
        assert f"{case['speedup']:.2f}x" in done.stdout
