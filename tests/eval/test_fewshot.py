"""eval/fewshot.py as a command: table and result, resumption after a kill, and bad input told in one line."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval import fewshot
from rrt.checkpoint.format import CheckpointConfig, write_checkpoint
from rrt.checkpoint.source import open_source
from rrt.common.files import sha256_file
from rrt.common.provenance import fingerprint
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.conversion import convert
from rrt.model.config import RecursiveConfig
from rrt.model.meta import parameter_shapes
from tests.util.models import make_hf_model
from tests.util.tasks import write_task_files
from tests.util.tokenizers import make_bpe_tokenizer

needs_lm_eval = pytest.mark.skipif(
    fewshot.importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)
COMMAND = Path(fewshot.__file__)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tokenizer = load_tokenizer(make_bpe_tokenizer(tmp_path_factory.mktemp("tokenizer"), "llama"))
    make_hf_model(directory, "llama", num_layers=4, vocab_size=tokenizer.vocab_size, bos_token_id=1, eos_token_id=2)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="module")
def recursion(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("recursive") / "checkpoint"
    convert(base, out, RecursiveConfig(num_loops=2))
    return out


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_task_files(tmp_path_factory.mktemp("data"), documents=16)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The command in this process: its result, and what it printed."""

    def call(*arguments, cache=tmp_path / "cache"):
        out = tmp_path / "out.json"
        command = [str(COMMAND), "--cache", cache, "--json", out, *arguments]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in command])
        fewshot.main()
        return json.loads(out.read_text()), capsys.readouterr().out

    return call


@needs_lm_eval
def test_a_killed_run_goes_on_where_it_stopped_and_ends_with_the_same_table(base, data_dir, run, tmp_path):
    cache = tmp_path / "killed"
    flags = ["--checkpoint", base, "--data-dir", data_dir, "--batch-tokens", 1]
    process = subprocess.Popen(
        [sys.executable, *map(str, [COMMAND, *flags, "--cache", cache])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not any(file.read_bytes().count(b"\n") > 5 for file in cache.glob("*.jsonl")):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    errors = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, errors

    resumed, table = run(*flags, cache=cache)
    whole, whole_table = run(*flags)
    total = whole["computed"]
    assert 0 < resumed["computed"] < total - 5, errors
    assert resumed["requests"] == whole["requests"] >= total
    assert resumed["tasks"] == whole["tasks"] and table.splitlines()[3:] == whole_table.splitlines()[3:]
    again, _ = run(*flags)
    assert again["computed"] == 0 and again["tasks"] == whole["tasks"]

    tasks = whole["tasks"]
    metrics = [tasks[name]["metrics"][metric] for name, metric in fewshot.PAPER_METRICS.items()]
    assert whole["average"]["value"] == pytest.approx(sum(metrics) / 7) and 0 < sum(metrics) < 7
    errors = [tasks[name]["metrics"][f"{metric}_stderr"] for name, metric in fewshot.PAPER_METRICS.items()]
    assert whole["average"]["stderr"] == pytest.approx(math.sqrt(sum(error**2 for error in errors)) / 7)
    assert fewshot.PAPER_METRICS["lambada_openai"] == fewshot.PAPER_METRICS["winogrande"] == "acc"
    last = table.splitlines()[-1].split()
    assert last == ["average", "of", "seven", f"{whole['average']['value']:.4f}", f"{whole['average']['stderr']:.4f}"]
    for line, (name, metric) in zip(table.splitlines()[-8:-1], fewshot.PAPER_METRICS.items(), strict=True):
        assert line.split()[:5] == [name, "0", "16", metric, f"{tasks[name]['metrics'][metric]:.4f}"]

    assert whole["checkpoint_sha256"] == fingerprint(base) and whole["bos"] is True
    assert whole["data"]["piqa.jsonl"]["sha256"] == sha256_file(data_dir / "piqa.jsonl") and len(whole["data"]) == 7
    assert whole["versions"]["lm_eval"] and whole["torch"] and whole["code_version"]


@needs_lm_eval
def test_exits_bos_and_limit_change_what_is_measured_and_are_told(base, recursion, data_dir, run, capsys):
    flags = ["--data-dir", data_dir, "--tasks", "lambada_openai,hellaswag", "--limit", 4]
    perplexities = {}
    for name, checkpoint, *more in (
        ("last", recursion),
        ("exit 1", recursion, "--exit-loop", 1),
        ("exit 0", recursion, "--exit-loop", 0),
        ("no BOS", recursion, "--bos", "no"),
        ("vanilla", base),
    ):
        result, table = run("--checkpoint", checkpoint, *flags, *more)
        perplexities[name] = result["tasks"]["lambada_openai"]["metrics"]["perplexity"]
        assert result["tasks"]["hellaswag"]["documents"] == 4 and result["average"] is None
        assert result["bos"] == (name != "no BOS") and f"{'without' if name == 'no BOS' else 'with'} BOS" in table
        assert result["exit_loop"] == {"exit 0": 0, "vanilla": 0}.get(name, 1)
    assert perplexities["last"] == perplexities["exit 1"]
    assert len(set(perplexities.values())) == 4


@needs_lm_eval
def test_an_exit_with_a_translator_is_measured_through_it(recursion, data_dir, run, tmp_path):
    source = open_source(recursion)
    width = source.model.hidden_size
    turned = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q
    for name, weight in (("identity", torch.eye(width)), ("turned", turned)):
        translators = {"exit_translator_weight": weight[None], "exit_translator_bias": torch.zeros(1, width)}
        config = CheckpointConfig(source.model, replace(source.recursion, exit_translators=True), source.dtype)
        with write_checkpoint(tmp_path / name, config, {}) as writer:
            for parameter in parameter_shapes(config.model, config.recursion):
                writer.add(parameter, translators[parameter] if parameter in translators else source.get(parameter))
            load_tokenizer(recursion).save(writer.directory)
    flags = ["--data-dir", data_dir, "--tasks", "lambada_openai", "--limit", 4]
    perplexities = {}
    for checkpoint in (recursion, tmp_path / "identity", tmp_path / "turned"):
        for loop in (0, 1):
            result, _ = run("--checkpoint", checkpoint, *flags, "--exit-loop", loop)
            assert (result["exit_loop"], result["num_loops"]) == (loop, 2)
            perplexities[checkpoint.name, loop] = result["tasks"]["lambada_openai"]["metrics"]["perplexity"]
    plain = recursion.name
    assert perplexities["identity", 0] == pytest.approx(perplexities[plain, 0], rel=1e-5)
    assert abs(perplexities["turned", 0] / perplexities[plain, 0] - 1) > 0.01
    for name in ("identity", "turned"):
        assert perplexities[name, 1] == pytest.approx(perplexities[plain, 1], rel=1e-5)


@needs_lm_eval
def test_bad_input_is_one_clear_message(base, recursion, data_dir, run, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(data_dir, wrong)
    label = json.loads((wrong / "piqa.jsonl").read_text().splitlines()[0])["label"]
    (wrong / "piqa.jsonl").write_text(
        (wrong / "piqa.jsonl").read_text().replace(f'"label": {label}', f'"label": "{label}"')
    )
    (wrong / "winogrande.jsonl").unlink()
    other = tmp_path / "other"
    shutil.copytree(base, other)
    make_bpe_tokenizer(tmp_path / "large", "llama", vocab_size=500)
    shutil.copy(tmp_path / "large" / "tokenizer.json", other)
    headless = tmp_path / "no-tokenizer"
    shutil.copytree(base, headless, ignore=shutil.ignore_patterns("tokenizer*"))
    local = ("--data-dir", data_dir)
    for checkpoint, flags, message in (
        (
            base,
            ("--data-dir", wrong),
            f"piqa.jsonl: line 1: field 'label': found '{label}'; expected 0 or 1, an integer",
        ),
        (base, ("--data-dir", wrong, "--tasks", "winogrande"), "found none; expected winogrande.jsonl, winogrande.jso"),
        (base, (*local, "--tasks", "mmlu"), "--data-dir: found task 'mmlu'; expected one of lambada_openai"),
        (base, (*local, "--tasks", "piqa,piqa"), "--tasks: found 'piqa' twice"),
        (base, (*local, "--tasks", ","), "--tasks: found none"),
        (base, (*local, "--limit", "0"), "--limit: found 0; expected 1 or more"),
        (base, (*local, "--batch-tokens", "0"), "--batch-tokens: found 0"),
        (base, (*local, "--num-fewshot", "2"), "expected hellaswag.train.jsonl"),
        (base, (*local, "--exit-loop", "0"), "is not looped and has no exits"),
        (recursion, (*local, "--exit-loop", "2"), "has 2 loops: expected 0 to 1"),
        (other, local, "the tokenizer has 500 ids; expected at least as many embedding rows as ids"),
        (headless, local, "no tokenizer"),
        (tmp_path / "nowhere", local, "no such directory"),
        (base, (*local, "--device", "abacus"), "--device: found 'abacus'"),
    ):
        with pytest.raises(UserError) as error:
            run("--checkpoint", checkpoint, *flags)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out.json").exists()


def test_without_lm_eval_the_remedy_is_told(base, run, monkeypatch):
    monkeypatch.setattr(fewshot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm-eval is not installed.*relaxed-recursive-transformers\[eval\]"):
        run("--checkpoint", base)


@needs_lm_eval
@pytest.mark.slow
def test_an_unknown_task_names_those_that_are_near(base, run):
    with pytest.raises(UserError, match=r"--tasks: found 'arc_eazy', which lm-eval does not know; .*arc_easy"):
        run("--checkpoint", base, "--tasks", "arc_eazy")
