"""eval/exits.py: recorded trajectories are the model's, thresholds do what they promise, and serving can read them."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import exits
from eval.calibration import choose_exits, evaluate_thresholds, fit_thresholds, reliability, threshold_curve
from eval.trajectories import Trajectories, read_trajectories
from rrt.checkpoint.exit_thresholds import load_exit_thresholds
from rrt.checkpoint.source import load_model
from rrt.common.provenance import fingerprint
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.conversion import convert
from rrt.model.config import RecursiveConfig
from tests.util.models import make_hf_model
from tests.util.processes import run_on_two
from tests.util.tokenizers import make_bpe_tokenizer, training_texts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama folded into three loops."""
    directory = tmp_path_factory.mktemp("checkpoint")
    make_bpe_tokenizer(directory / "base", "llama")
    make_hf_model(directory / "base", "llama", num_layers=3, vocab_size=load_tokenizer(directory / "base").vocab_size)
    convert(directory / "base", directory / "folded", RecursiveConfig(num_loops=3, init="average"))
    return directory / "folded"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    texts = [text[i : i + 20 + 7 * i] for i in range(5) for text in list(training_texts())[:3]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(checkpoint, data, out, *flags):
    before = sys.argv
    arguments = ("--checkpoint", checkpoint, "--data", data, "--out", out, "--context", 24, *flags)
    sys.argv = ["exits.py", *map(str, arguments)]
    try:
        exits.main()
    finally:
        sys.argv = before


@torch.no_grad()
def slowly(checkpoint, data, context=24):
    """Of each sample: loss, confidence, token [B, n] from one forward per exit."""
    model, tokenizer = load_model(checkpoint, torch.float64), load_tokenizer(checkpoint)
    for line in data.read_text().splitlines():
        ids = torch.tensor(tokenizer.encode_document(json.loads(line)["text"]))[: context + 1]
        rows = []
        for loop in range(3):
            probabilities = model(ids[None, :-1], exit_loop=loop)[0].softmax(-1)
            loss = F.nll_loss(probabilities.log(), ids[1:], reduction="none")
            rows.append((loss, *probabilities.max(-1)))
        yield [torch.stack(values).numpy() for values in zip(*rows, strict=True)]


def test_a_recording_holds_what_every_loop_says_at_every_token(checkpoint, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exits, "SAMPLES_PER_PART", 4)
    run(checkpoint, data, tmp_path / "out", "--dtype", "float64", "--json", tmp_path / "result.json")
    found, sums, _ = read_trajectories(tmp_path / "out")
    losses, confidences, tokens = zip(*slowly(checkpoint, data), strict=True)
    assert found.lengths.tolist() == [loss.shape[1] for loss in losses] and len(set(found.lengths)) > 3
    loss, confidence, token = (np.concatenate(values, axis=1) for values in (losses, confidences, tokens))
    np.testing.assert_allclose(found.loss, loss, rtol=1e-3)
    np.testing.assert_allclose(found.confidence, confidence[:2], rtol=1e-6)
    assert np.array_equal(found.top_tokens_agree, token == token[2])
    np.testing.assert_allclose(sums.loss, loss.sum(1), rtol=1e-12)
    assert np.array_equal(sums.pair_agreement, [[(a == b).sum() for b in token] for a in token])

    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["perplexity"] for row in result["static"]] == pytest.approx(np.exp(loss.mean(1)), rel=1e-9)
    assert [row["agreement"] for row in result["static"]] == pytest.approx((token == token[2]).mean(1))
    earliest = [next(loop for loop in range(3) if column[loop] == column[2]) for column in token.T]
    assert result["oracle"]["mean_loops"] == pytest.approx(np.mean(earliest) + 1)
    assert f"{result['static'][0]['perplexity']:.4f}" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_recording_goes_on_and_processes_share_it(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr(exits, "SAMPLES_PER_PART", 4)
    run(checkpoint, data, tmp_path / "whole")
    run(checkpoint, data, tmp_path / "cut")
    (tmp_path / "cut" / "part-00001.npz").unlink()
    (tmp_path / "cut" / "part-00003.npz").unlink()
    kept = (tmp_path / "cut" / "part-00002.npz").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"part-00001\.npz is missing"):
        read_trajectories(tmp_path / "cut")
    run(checkpoint, data, tmp_path / "cut")
    assert (tmp_path / "cut" / "part-00002.npz").stat().st_mtime_ns == kept
    run_on_two(run_in_process, str(checkpoint), str(data), str(tmp_path / "shared"))
    whole, sums, _ = read_trajectories(tmp_path / "whole")
    for name in ("cut", "shared"):
        again, again_sums, _ = read_trajectories(tmp_path / name)
        for field in ("lengths", "top_tokens_agree", "confidence", "loss"):
            assert np.array_equal(getattr(again, field), getattr(whole, field))
        assert np.array_equal(again_sums.loss, sums.loss)


def test_a_recording_goes_on_with_the_same_data_only(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr(exits, "SAMPLES_PER_PART", 4)
    mine, out, lines = tmp_path / "texts.jsonl", tmp_path / "out", data.read_text().splitlines()
    mine.write_text("\n".join(lines))
    run(checkpoint, mine, out)
    other = json.dumps({"text": "other words"})
    cases = [([*lines[:9], other, *lines[10:]], 2), (lines[:8], 2), (lines[:9], 2), ([*lines, other], 3)]
    for changed, part in cases:
        mine.write_text("\n".join(changed))
        with pytest.raises(
            UserError, match=rf"part-0000{part}\.npz: was recorded from other samples; expected the same"
        ):
            run(checkpoint, mine, out)
    mine.write_text("\n".join(lines))
    run(checkpoint, mine, out)
    (out / "part-00001.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"part-00001\.npz: damaged"):
        run(checkpoint, mine, out)


def run_in_process(*arguments):
    exits.SAMPLES_PER_PART = 4
    run(*arguments)


def test_thresholds_are_saved_beside_the_weights_and_refused_for_others(checkpoint, data, tmp_path):
    mine = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, mine)
    before = fingerprint(mine)
    run(mine, data, tmp_path / "out", "--calibrate", 0.5, 0.9, "--json", tmp_path / "result.json")
    assert fingerprint(mine) == before
    calibrations = json.loads((tmp_path / "result.json").read_text())["calibrations"]
    for row in calibrations:
        assert load_exit_thresholds(mine, row["agreement"]) == tuple(row["thresholds"])
    found, _, _ = read_trajectories(tmp_path / "out")
    held_back = evaluate_thresholds(found.samples(slice(1, None, 2)), calibrations[0]["thresholds"])
    assert calibrations[0]["measured_agreement"] == held_back["early_agreement"]
    with pytest.raises(UserError, match=r"agreement: found 0\.5, 0\.9; expected 0\.8"):
        load_exit_thresholds(mine, 0.8)
    path = mine / "exit_thresholds.json"
    saved = path.read_text()
    path.write_text(saved.replace('"num_loops": 3', '"num_loops": 2'))
    with pytest.raises(UserError, match="damaged"):
        load_exit_thresholds(mine, 0.5)
    path.write_text(saved)
    config = (mine / "config.json").read_text()
    (mine / "config.json").write_text(config + "\n")
    with pytest.raises(UserError, match="calibrated on other weights"):
        load_exit_thresholds(mine, 0.5)
    with pytest.raises(UserError, match="no such file"):
        load_exit_thresholds(checkpoint, 0.5)


def test_few_shot_accuracy_stands_beside_each_exit(checkpoint, data, tmp_path):
    paths = []
    for loop in (0, 2):
        paths.append(tmp_path / f"fewshot-{loop}.json")
        result = {
            "checkpoint_sha256": fingerprint(checkpoint),
            "exit_loop": loop,
            "average": {"value": 0.4 + loop / 10},
        }
        paths[-1].write_text(json.dumps(result))
    flags = ("--fewshot", *paths, "--json", tmp_path / "result.json", "--samples", 5)
    run(checkpoint, data, tmp_path / "out", *flags)
    static = json.loads((tmp_path / "result.json").read_text())["static"]
    assert [row["fewshot"] for row in static] == [0.4, None, pytest.approx(0.6)]
    paths[0].write_text(json.dumps({"checkpoint_sha256": "?", "exit_loop": 0, "average": {"value": 0.4}}))
    with pytest.raises(UserError, match="checkpoint_sha256"):
        run(checkpoint, data, tmp_path / "out", *flags)


def test_bad_input_is_one_clear_line(checkpoint, data, tmp_path):
    base = checkpoint.parent / "base"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    one = tmp_path / "one.txt"
    one.write_text("one document")
    run(checkpoint, data, tmp_path / "out", "--samples", 2)
    convert(base, tmp_path / "sequence", RecursiveConfig(num_loops=3, sharing="sequence"))
    cases = [
        ((base, data, tmp_path / "new"), "has 1 loop"),
        ((tmp_path / "sequence", data, tmp_path / "new"), "found a model with sharing 'sequence'"),
        ((checkpoint, data, tmp_path / "other"), "is no recording"),
        ((checkpoint, data, tmp_path / "out", "--samples", 3), "field 'samples': found 2; expected 3"),
        ((checkpoint, data, tmp_path / "new", "--samples", 0), "--samples: found 0"),
        ((checkpoint, data, tmp_path / "new", "--calibrate", 95), "--calibrate: found 95"),
        (
            (checkpoint, one, tmp_path / "one", "--calibrate", 0.9),
            "found 1 sample(s), one per document; expected at least 2",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError) as error:
            run(*arguments)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_one_sample_has_no_table_of_thresholds(checkpoint, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("one document")
    run(checkpoint, tmp_path / "one.txt", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "1 samples" in printed and "Thresholds" not in printed


def made_up(rng, num_loops, num_tokens, values=1000):
    """Trajectories in which confidence tells something about agreement; few `values` make ties."""
    confidence = rng.integers(0, values + 1, (num_loops - 1, num_tokens)).astype(np.float32) / values
    agree = np.ones((num_loops, num_tokens), dtype=bool)
    agree[:-1] = rng.random(confidence.shape) < confidence
    return Trajectories(np.array([num_tokens]), agree, confidence, rng.random((num_loops, num_tokens)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_loops=st.integers(2, 4),
    num_tokens=st.integers(1, 60),
    values=st.sampled_from([3, 1000]),
    wanted=st.sampled_from([0.3, 0.7, 0.9, 1.0]),
)
def test_fitted_thresholds_reach_the_wanted_agreement_and_none_lower_does(seed, num_loops, num_tokens, values, wanted):
    found = made_up(np.random.default_rng(seed), num_loops, num_tokens, values)
    thresholds = fit_thresholds(found, wanted)
    left = np.ones(num_tokens, dtype=bool)
    for loop, threshold in enumerate(thresholds):
        confidence, agree = found.confidence[loop][left], found.top_tokens_agree[loop][left]
        reaching = [t for t in confidence if agree[confidence >= t].mean() >= wanted]
        assert threshold == (float(min(reaching)) if reaching else None)
        if threshold is not None:
            left &= found.confidence[loop] < np.float32(threshold)
    measured = evaluate_thresholds(found, thresholds)
    assert measured["early_agreement"] is None or measured["early_agreement"] >= wanted - 1e-12


def test_exits_take_the_first_loop_that_is_confident():
    confidence = np.array([[0.9, 0.5, 0.5, 0.5], [0.9, 0.9, 0.1, 0.5]], dtype=np.float32)
    found = Trajectories(np.array([4]), np.ones((3, 4), dtype=bool), confidence, np.zeros((3, 4)))
    assert choose_exits(found, [0.9, 0.5]).tolist() == [0, 1, 2, 1]
    assert choose_exits(found, [None, 0.9]).tolist() == [1, 1, 2, 2]
    assert choose_exits(found, [None, None]).tolist() == [2, 2, 2, 2]


def test_curves_run_from_every_token_at_the_first_exit_to_none():
    found = made_up(np.random.default_rng(0), 3, 20_000)
    curve = threshold_curve(found, (0.0, 0.5, 1.1))
    assert [row["mean_loops"] for row in curve] == [1.0, pytest.approx(1.75, abs=0.03), 3.0]
    assert curve[0]["agreement"] == pytest.approx(found.top_tokens_agree[0].mean())
    assert (curve[2]["agreement"], curve[2]["early_agreement"]) == (1.0, None)
    for row in reliability(found, 1):  # agreement was drawn with the confidence as its chance
        assert row["agreement"] == pytest.approx(row["confidence"], abs=0.06)
