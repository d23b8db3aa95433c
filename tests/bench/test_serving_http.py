"""bench/serving.py --http: the same tokens by HTTP and by Python, and flags that do not go together."""

import contextlib
import json
import re
import sys
import urllib.request
from pathlib import Path

import pytest

from bench import serving, serving_http
from rrt.errors import UserError
from rrt.serve.http import server
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer


def test_all_ways_are_timed_on_the_same_tokens(tmp_path, monkeypatch, capsys):
    model, result = tmp_path / "model", tmp_path / "result.json"
    make_bpe_tokenizer(model)
    make_hf_model(model, "llama", vocab_size=512)
    flags = f"--checkpoint {model} --http --in-flight 1 3 --prompt-tokens 40 --new-tokens 5 --rounds 2 --threads 1"
    monkeypatch.setattr(sys, "argv", ["serving.py", *flags.split(), "--json", str(result)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    reused = []

    @contextlib.contextmanager
    def watched(arguments):
        with running(arguments) as (url, process):
            yield url, process
            with urllib.request.urlopen(f"{url}/metrics") as answer:
                reused.extend(re.findall(r"^rrt_reused_tokens_total (\S+)$", answer.read().decode(), re.M))

    running = server.running_server
    monkeypatch.setattr(server, "running_server", watched)
    serving.main()
    # No way has found prompts computed by another one; two of a batch may begin alike.
    assert len(reused) == 1 and float(reused[0]) < 40
    found = json.loads(Path(result).read_text())
    assert [case["in_flight"] for case in found["cases"]] == [1, 3]
    for case in found["cases"]:
        assert list(case["variants"]) == ["rrt.LLM", "HTTP", "HTTP, streamed"]
        assert all(way["tokens_per_second"] > 0 for way in case["variants"].values())
        assert case["variants"]["rrt.LLM"]["over_python"] == 1
    table = serving_http.tables(found)[0].text()
    assert "HTTP, streamed" in table and table in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--preset smollm2-135m --http", "--checkpoint x --online --http"])
def test_what_has_no_server_is_refused(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serving.py", *flags.split()])
    with pytest.raises(UserError, match="--http: expected with --checkpoint, and not with --online"):
        serving.main()
