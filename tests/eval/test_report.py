"""eval/report.py: every kind of result becomes a page that stands by itself; what is unknown is one line."""

import json
import re
import sys
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import exits, perplexity, report, throughput
from eval.paper_study import COUNTED
from eval.report_page import frontier, shorten_all
from eval.svg import Axis, Series, bars, number, plot
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.conversion import convert
from rrt.model.config import RecursiveConfig
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer, training_texts


def run(command, *arguments):
    before = sys.argv
    sys.argv = [f"{command.__name__}.py", *map(str, arguments)]
    try:
        command.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A result of every kind; those that need no harness are made by their commands."""
    out = tmp_path_factory.mktemp("results")
    base, folded, data = out / "base", out / "folded", out / "data.jsonl"
    make_bpe_tokenizer(base, "llama")
    make_hf_model(base, "llama", num_layers=2, vocab_size=load_tokenizer(base).vocab_size)
    convert(base, folded, RecursiveConfig(num_loops=2, init="average"))
    records = [
        {"text": text[:90], "meta": {"redpajama_set_name": f"<set {i}>"}} for i, text in enumerate(training_texts())
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, checkpoint in (("base", base), ("folded", folded)):
        flags = ("--checkpoint", checkpoint, "--data", data, "--context", 32, "--json", out / f"{name}.json")
        run(perplexity, *flags)
    flags = ("--checkpoint", folded, "--data", data, "--context", 32, "--out", out / "recording")
    run(exits, *flags, "--json", out / "exits.json")
    run(throughput, "--checkpoint", base, "--settings", "4/4", "--samples", 9, "--max-batch", 2, "--seconds", 0,
        "--lora-rank", 0, "--json", out / "throughput.json")  # fmt: skip
    row = {"corpus": "PG19", "counted": COUNTED[0], "ours": {"static": 1.0, "csb": 2.0, "cdb": 3.0}}
    row |= {"paper": {"static": 1, "csb": 2, "cdb": 3}, "cdb_over_csb": 1.5, "paper_cdb_over_csb": 1.5}
    (out / "paper.json").write_text(json.dumps({"kind": "throughput-paper", "rows": [row]}))
    bigram = {"kind": "bigram", "data": str(data), "perplexity": 123.456, "tokens": 7}
    (out / "bigram.json").write_text(json.dumps(bigram))
    tasks = {"piqa": {"metrics": {"acc": 0.6, "acc_norm": 0.625}}, "winogrande": {"metrics": {"acc": 0.5}}}
    fewshot = {"kind": "fewshot", "checkpoint": str(folded), "exit_loop": 1, "num_loops": 2, "tasks": tasks}
    fewshot |= {"average": {"value": 0.5625}, "non_embedding_params": 1000}
    (out / "fewshot.json").write_text(json.dumps(fewshot))
    (out / "run").mkdir()
    steps = [{"step": i, "tokens": 100 * i, "loss": None if i == 3 else 5 / i} for i in range(1, 700)]
    (out / "run" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return out


def test_a_page_shows_every_result_and_needs_no_network(results, tmp_path):
    page = tmp_path / "page.html"
    run(report, *sorted(results.glob("*.json")), results / "run", "--out", page)
    text = page.read_text()
    for name in ("base", "folded"):
        for row in json.loads((results / f"{name}.json").read_text())["exits"]:
            assert f"{row['perplexity']:.3f}" in text
    found = json.loads((results / "exits.json").read_text())
    assert f"{found['oracle']['mean_loops']:.3f} of 2 loops" in text
    study = json.loads((results / "throughput.json").read_text())["settings"][0]["queues"][0]["rows"][-1]
    assert number(study["counted"]["prefill"]["tokens_per_second"]) in text
    for shown in ("123.456", "62.5", "56.2", "bigram model", "&lt;set 1&gt;", "3 (3)", "1.50 (1.50)", "Training loss"):
        assert shown in text
    assert "<set 1>" not in text
    assert not re.search(r"https?:|src=|href=|@import|url\(", text)
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(pictures) == 8
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_what_is_no_result_is_one_clear_line(results, tmp_path):
    unknown, half, empty = (tmp_path / f"{name}.json" for name in ("unknown", "half", "empty"))
    unknown.write_text('{"kind": "soup"}')
    half.write_text('{"kind": "exits", "checkpoint": "x"}')
    empty.write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"tokens": 1, "loss": 2}\n{"loss": 2}\n')
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "metrics.jsonl").touch()
    cases = [
        (unknown, "field 'kind': found 'soup'; expected a result of eval/"),
        (empty, "field 'kind': found None"),
        (half, "half.json: field 'static' is missing; expected a whole result of kind 'exits'"),
        (tmp_path / "absent.json", "no such file"),
        (tmp_path, "metrics.jsonl: no such file"),
        (tmp_path / "run", "metrics.jsonl:2: KeyError: 'tokens'"),
        (tmp_path / "none", "holds no step"),
    ]
    for path, message in cases:
        with pytest.raises(UserError) as error:
            run(report, results / "base.json", path, "--out", tmp_path / "page.html")
        assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()


def changed(source, path, *place_and_value):
    """A result with one value set, or taken out if that is ..."""
    result = json.loads(source.read_text())
    *place, name, value = place_and_value
    inner = result
    for key in place:
        inner = inner[key]
    if value is ...:
        del inner[name]
    else:
        inner[name] = value
    path.write_text(json.dumps(result))
    return path


def test_a_result_that_lacks_something_inside_is_one_clear_line(results, tmp_path):
    cases = [
        ("exits", ("samples", ...), "field 'samples' is missing"),
        ("exits", ("data", ...), "field 'data' is missing"),
        ("exits", ("num_loops", "<b>"), "ValueError: Unknown format code 'd'"),
        ("exits", ("oracle", "mean_loops", None), "TypeError"),
        ("exits", ("static", 0, "fewshot", ...), "field 'fewshot' is missing"),
        ("exits", ("oracle", "share", []), "ValueError: zip()"),
        ("throughput", ("settings", 0, "queues", 0, "rows", []), "IndexError"),
        ("throughput", ("settings", 0, "models", 0, "times", 0, "block", ...), "field 'block' is missing"),
        ("fewshot", ("tasks", "piqa", []), "AttributeError"),
        ("base", ("exits", 0, "perplexity", ...), "field 'perplexity' is missing"),
        ("bigram", ("perplexity", ...), "field 'perplexity' is missing"),
    ]
    for name, change, message in cases:
        path = changed(results / f"{name}.json", tmp_path / "changed.json", *change)
        with pytest.raises(UserError) as error:
            run(report, results / "base.json", path, "--out", tmp_path / "page.html")
        assert str(error.value).startswith(f"{path}: {message}") and str(error.value).endswith("make it again")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_values_that_are_markup_or_infinite_leave_the_page_whole(results, tmp_path):
    infinite = changed(results / "base.json", tmp_path / "a.json", "exits", 0, "perplexity", float("inf"))
    curve = changed(results / "exits.json", tmp_path / "b.json", "thresholds", 0, "perplexity", float("nan"))
    study = changed(results / "throughput.json", tmp_path / "c.json", "dtype", "<script>")
    study = changed(study, study, "settings", 0, "prefix", "<i>")
    run(report, infinite, results / "folded.json", curve, study, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<td>inf</td>" in text and "&lt;script&gt;, prompt &lt;i&gt;" in text
    assert "<script>" not in text and "<i>," not in text
    for picture in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        ElementTree.fromstring(picture)
        assert "nan" not in picture and "inf" not in picture


def test_a_bigram_model_is_shown_without_a_model_beside_it(results, tmp_path):
    run(report, results / "bigram.json", "--out", tmp_path / "page.html")
    assert "123.456" in (tmp_path / "page.html").read_text()


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12), st.booleans())
def test_the_frontier_is_what_no_smaller_model_beats(points, higher_is_better):
    def beats(a, b):
        return a[0] <= b[0] and (a[1] >= b[1] if higher_is_better else a[1] <= b[1]) and a != b

    kept = {point for point in points if not any(beats(other, point) for other in points)}
    assert frontier(points, higher_is_better) == sorted(kept)


@given(
    st.lists(st.integers(-(10**7), 10**7), min_size=1, max_size=5)
    | st.lists(st.integers(1, 10**15), min_size=1, max_size=5),
    st.booleans(),
)
def test_an_axis_holds_its_values_and_has_ticks_to_read_them_by(values, is_log):
    values = [value / 1000 for value in values]
    axis = Axis.around("x", values, is_log)
    assert all(0 <= axis.place(value) <= 1 for value in values)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 20 and all(-1e-6 <= axis.place(tick) <= 1 + 1e-6 for tick in ticks)


def test_a_plot_of_nothing_is_nothing_and_names_are_escaped():
    assert plot("t", [Series("a", [])], "x", "y") == "" and bars("t", [], ["a"], "s") == ""
    one = plot("a < b", [Series("c & d", [(1.0, 2.0)], labels=["<e>"])], "x", "y")
    ElementTree.fromstring(f"<div>{one}</div>")
    assert "&lt;e&gt;" in one and "a &lt; b" in one


def test_checkpoints_have_short_names_unless_two_would_be_alike():
    assert shorten_all(["runs/a/final", "runs/b"]) == {"runs/a/final": "a", "runs/b": "b"}
    assert shorten_all(["x/a/final", "y/a"]) == {"x/a/final": "x/a/final", "y/a": "y/a"}
