"""python -m rrt.convert: its defaults, what it prints, what it refuses and what it leaves behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rrt import inspect
from rrt.checkpoint.source import load_model, open_source
from rrt.convert import main
from rrt.errors import UserError
from rrt.model.config import LoraRanks, RecursiveConfig
from tests.util.commands import run_main
from tests.util.folding import fold
from tests.util.models import make_hf_model


def test_command_says_what_it_does_and_what_it_did(bases, tmp_path, capsys, monkeypatch):
    out = tmp_path / "deep" / "out"
    argv = ["--base", bases["llama"], "--out", out, "--num-loops", 2, "--lora-rank", 20, "--lora-rank-ffn", 8]
    code, stdout, stderr = run_main(main, argv, capsys, monkeypatch)
    assert (code, stderr) == (0, "")
    assert "6 layers, 74.59 K parameters (64.93 K non-embedding), 291.38 KiB float32" in stdout
    assert (
        "2 loops x 3 layers" in stdout and "LoRA rank q 20, kv 16, out 20, ffn 8 (joint); norms folded into" in stdout
    )
    assert "notice: LoRA rank of group kv: 20 is capped at 16" in stdout
    assert "layer" in stdout and "all" in stdout and f"wrote {out}" in stdout
    assert open_source(out).recursion == RecursiveConfig(
        num_loops=2, init="average", lora_rank=LoraRanks(q=20, kv=16, out=20, ffn=8), lora_init="joint"
    )


def test_command_takes_the_sharing(bases, tmp_path, capsys, monkeypatch):
    argv = ["--base", bases["llama"], "--out", tmp_path / "out", "--num-loops", 2, "--sharing", "sequence"]
    code, stdout, _ = run_main(main, argv, capsys, monkeypatch)
    assert code == 0 and "2 loops x 3 layers (sequence), " in stdout
    assert open_source(tmp_path / "out").recursion.sharing == "sequence"
    code, stdout, _ = run_main(inspect.main, ["--checkpoint", tmp_path / "out"], capsys, monkeypatch)
    assert code == 0 and "6 = 2 loops x 3 layers (sequence)" in stdout
    with pytest.raises(UserError, match=r"num_loops: found 1; .*out has 2 with sharing 'sequence', which has no state"):
        load_model(tmp_path / "out", num_loops=1)


def test_default_init_is_stepwise_without_lora_and_average_with(bases, tmp_path, capsys, monkeypatch):
    for rank, init in ((0, "stepwise"), (2, "average")):
        argv = ["--base", bases["llama"], "--out", tmp_path / init, "--num-loops", 3, "--lora-rank", rank]
        assert run_main(main, argv, capsys, monkeypatch)[0] == 0
        assert open_source(tmp_path / init).recursion.init == init


def test_bad_input_ends_with_one_line_and_leaves_nothing(bases, tmp_path, capsys, monkeypatch):
    fold(bases["llama"], tmp_path / "recursive", rank=2, init="average")
    (tmp_path / "file").write_text("")
    base = make_hf_model(tmp_path / "base", "llama")
    (tmp_path / "broken").mkdir()
    before = sorted(tmp_path.rglob("*"))
    cases = {
        "'num_loops': found 4, which does not divide the base's 6 layers; expected one of 1, 2": [
            "--num-loops",
            4,
        ],
        "'num_loops': found 0; expected a positive number": ["--num-loops", 0],
        "'lora_rank.q': found -1; expected 0 (no LoRA) or more": ["--lora-rank", -1],
        "'lora_rank.ffn': found -7": ["--lora-rank-ffn", -7],
        "'init': found 'stepwise'; expected 'average'": ["--init=stepwise", "--lora-rank=2", "--lora-init=joint"],
        "'lora_init': found 'joint' without LoRA": ["--lora-init=joint"],
        "found a recursive or relaxed model (num_loops 2, LoRA rank 2); expected a vanilla base": [
            "--base",
            tmp_path / "recursive",
        ],
        "no such directory": ["--base", tmp_path / "absent"],
        "config.json: no such file": ["--base", tmp_path / "broken"],
        "already exists and is not empty": ["--out", tmp_path / "recursive"],
        "file: is a file": ["--out", tmp_path / "file"],
        "holds the checkpoint that is read": ["--out", base, "--overwrite"],
        "--no-refit: found without --calibration": ["--lora-rank", 2, "--no-refit"],
        "--calibration-tokens: found without --calibration": ["--lora-rank", 2, "--calibration-tokens", 64],
        "--device: found without --calibration": ["--lora-rank", 2, "--device", "cpu"],
        "--calibration-memory: found nan; expected 0 or more, in GiB": [
            *("--lora-rank", 2, "--calibration", base, "--calibration-memory", "nan")
        ],
        "--calibration-memory: found -1.0": ["--calibration", base, "--calibration-memory", -1],
        "--calibration-memory: found inf": ["--calibration", base, "--calibration-memory", "inf"],
    }
    for message, flags in cases.items():
        argv = ["--base", base, "--out", tmp_path / "out", "--num-loops", 2, *flags]
        code, _, stderr = run_main(main, argv, capsys, monkeypatch)
        assert code == 2 and message in stderr and stderr.count("\n") == 1, stderr
    code, _, stderr = run_main(main, ["--base", base, "--out", tmp_path, "--num-loops", 2], capsys, monkeypatch)
    assert code == 2 and "holds the checkpoint that is read" in stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_command_leaves_nothing_behind(tmp_path):
    base = make_hf_model(tmp_path / "base", "llama", num_layers=8, hidden_size=512, intermediate_size=1024)
    command = [sys.executable, "-m", "rrt.convert", "--base", base, "--out", tmp_path / "out", "--num-loops", "2"]
    process = subprocess.Popen(
        [*map(str, command), "--lora-rank", "256"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit none
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
