"""The demo, shortened: every command of the README's main path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from runs import demo_report

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(900)
def test_demo_runs_every_step_and_refuses_to_compare_with_an_untrained_base(tmp_path, monkeypatch, capsys):
    settings = {
        "DEMO_OUT": str(tmp_path / "demo"),
        "DEMO_BASE_TOKENS": "12288",
        "DEMO_UPTRAIN_TOKENS": "8192",
        "DEMO_EXIT_TOKENS": "8192",
        "DEMO_EVAL_TOKENS": "2048",
        "DEMO_FEWSHOT_LIMIT": "2",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DEMO_")}
    done = subprocess.run(
        ["bash", str(ROOT / "runs" / "demo.sh")], env={**inherited, **settings}, capture_output=True, text=True
    )
    out = tmp_path / "demo"
    assert done.returncode == 2, done.stdout + done.stderr
    assert "raise DEMO_BASE_TOKENS" in done.stderr.splitlines()[-1]
    trained = (done.stdout + done.stderr).count("; 2 process(es) x 1 micro-batch(es) x 8 x 256; ")
    assert trained == len(demo_report.MODELS)

    report = json.loads((out / "report.json").read_text())
    names = ("base", "reduced", "recursive", "relaxed", "distilled", "exits")
    models = dict(zip(names, report["models"], strict=True))
    assert [row["tokens"] for row in models.values()] == [12288, 8192, 8192, 8192, 8192, 8192]
    assert models["base"]["non_embedding_params"] > models["relaxed"]["non_embedding_params"]
    assert models["relaxed"]["lora_params"] > 0 == models["recursive"]["lora_params"]
    assert models["distilled"]["non_embedding_params"] == models["relaxed"]["non_embedding_params"]
    assert models["exits"]["first_exit_perplexity"] < models["recursive"]["first_exit_perplexity"]
    for name in ("recursive", "relaxed", "distilled"):
        assert models[name]["perplexity"] < models[name]["perplexity_before"]
    table = (out / "report.md").read_text()
    assert all(f"{row['perplexity']:.2f}" in table for row in models.values())
    page = (out / "report.html").read_text()
    assert all(f"{row['perplexity']:.3f}" in page for row in models.values()) and "Early exits" in page
    shots = report["fewshot"]
    assert [row["model"].split()[0] for row in shots] == ["base", "recursive", "relaxed"]
    assert all(row["documents"] == 2 for row in shots)
    assert all(f"{100 * row['hellaswag'][0]:.1f} ±" in table for row in shots) and "no benchmark" in table
    assert "Few-shot accuracy" in page and "hellaswag.jsonl" in page
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    bigram = json.loads((out / "bigram.json").read_text())
    bigram["perplexity"] = 2.01 * models["base"]["perplexity"]
    (out / "bigram.json").write_text(json.dumps(bigram))
    monkeypatch.setattr(sys, "argv", ["demo_report.py", str(out)])
    demo_report.main()
    assert capsys.readouterr().out.strip() == (out / "report.md").read_text().strip()

    exported = transformers.AutoModelForCausalLM.from_pretrained(out / "relaxed-hf")
    assert exported.config.num_hidden_layers == 6
