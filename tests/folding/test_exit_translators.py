"""Fit of exit translators: the regression, the checkpoint that it writes, its figures, and errors of one line."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rrt.checkpoint.exit_thresholds import Calibration, save_exit_thresholds
from rrt.checkpoint.format import CheckpointConfig, write_checkpoint
from rrt.checkpoint.source import load_model, open_source
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.fit_exits import main
from rrt.folding import exit_translators
from rrt.folding.calibration_text import CalibrationText, calibration_rows
from rrt.folding.exit_translators import HELD_OUT, RIDGE, AffineRegression, fit_exits
from rrt.folding.unroll import prepare_export, run_export
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.meta import parameter_shapes
from rrt.model.transformer import RecursiveTransformer
from tests.util.commands import run_main
from tests.util.decoding import make_model
from tests.util.tokenizers import make_bpe_tokenizer, training_texts

VOCABULARY = 420
TEXT = dict(num_tokens=1300, context=16)  # the last batch is not full

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with a tokenizer and a text."""
    root = tmp_path_factory.mktemp("fit")
    make_bpe_tokenizer(root / "tokenizer", "gpt_neox", VOCABULARY)
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in training_texts()))
    return root


def make_checkpoint(files, out, family="llama", recursion=None, change=None, dtype=torch.float64):
    recursion = recursion or RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(2))
    config = make_model(family, "vanilla", vocab_size=VOCABULARY).config
    model = RecursiveTransformer(config, recursion).to(dtype)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    with write_checkpoint(out, CheckpointConfig(config, recursion, dtype), {}) as writer:
        for name, parameter in model.named_parameters():
            value = parameter.detach() + 0.2 * torch.randn(parameter.shape, generator=generator)
            writer.add(name, value if change is None else change(name, value))
        if files is not None:
            load_tokenizer(files / "tokenizer").save(writer.directory)
    return out


def text_of(files, **chosen):
    return CalibrationText((str(files / "text.jsonl"),), **{**TEXT, **chosen})


def rows_of(files):
    """Rows that are fitted, and those held out."""
    rows = calibration_rows(text_of(files), load_tokenizer(files / "tokenizer"), 64)
    held_out = torch.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
    return rows[~held_out], rows[held_out]


@torch.no_grad()
def normed_states(model, rows):
    return [model.norm(state).flatten(0, 1) for state in model.hidden_states(rows[:, :-1])]


def test_the_regression_is_that_of_lstsq_whether_streamed_or_at_once():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2, 12) + 5
    y = x @ torch.randn(12, 12, generator=generator, dtype=torch.float64) + torch.randn(200, 12, generator=generator)
    expected = torch.linalg.lstsq(torch.cat((x, torch.ones(200, 1)), 1), y).solution
    once, streamed = AffineRegression(12), AffineRegression(12)
    once.add(x, y)
    for part_x, part_y in zip(x.split([1, 90, 109]), y.split([1, 90, 109]), strict=True):
        streamed.add(part_x, part_y)
    for regression in (once, streamed):
        weight, bias = regression.solve(ridge=0.0)
        torch.testing.assert_close(weight, expected[:-1].T, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(bias, expected[-1], rtol=1e-7, atol=1e-7)


def test_the_ridge_shrinks_the_map_but_not_the_mean():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double() + 3
    regression = AffineRegression(4)
    regression.add(x, 2 * x)
    weight, bias = regression.solve(ridge=1e6)
    assert weight.abs().max() < 1e-5
    torch.testing.assert_close(bias, 2 * x.mean(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "constant", [torch.full((5,), 3.3), torch.randn(5, generator=torch.Generator().manual_seed(1))]
)
def test_states_that_never_change_are_predicted_by_their_mean(constant):
    x = constant.double().expand(300, 5)
    y = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)).double()
    regression = AffineRegression(5)
    for part_x, part_y in zip(x.split(130), y.split(130), strict=True):
        regression.add(part_x, part_y)
    weight, bias = regression.solve()
    assert weight.abs().max() == 0
    torch.testing.assert_close(bias, y.mean(0))


def test_small_changes_far_from_zero_are_told_from_rounding():
    noise = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)).double()
    noise[0] = 0
    regression = AffineRegression(5)
    regression.add(10 + 1e-8 * noise, noise)
    weight, bias = regression.solve(ridge=0.0)
    torch.testing.assert_close(1e-8 * weight, torch.eye(5).double(), rtol=0, atol=1e-5)
    # 10 + 1e-8 noise is rounded: to 1.8e-15, a few 1e-7 of the noise.
    torch.testing.assert_close(weight @ (10 + 1e-8 * noise[1]) + bias, noise[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_loops", [2, 3])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt_neox"])
def test_the_fitted_maps_are_the_ridge_regression_of_the_last_loops_normed_state(
    files, family, num_loops, tmp_path, monkeypatch
):
    monkeypatch.setattr(exit_translators, "_BATCH_TOKENS", 100)
    recursion = RecursiveConfig(num_loops=num_loops, lora_rank=LoraRanks.uniform(2), prefix_length=2)
    start = make_checkpoint(files, tmp_path / "start", family, recursion)
    report = fit_exits(start, tmp_path / "out", text_of(files))
    before, after = load_model(start), load_model(tmp_path / "out")
    assert after.recursion == replace(recursion, exit_translators=True, exit_loops=tuple(range(num_loops - 1)))
    for name, parameter in before.named_parameters():
        assert torch.equal(after.get_parameter(name), parameter), name
    fitted, held_out = rows_of(files)
    assert (report.num_tokens, report.num_held_out) == (fitted[:, 1:].numel(), held_out[:, 1:].numel())
    *early, y = normed_states(before, fitted)
    *early_held_out, y_held_out = normed_states(before, held_out)
    for loop, x in enumerate(early):
        centred = x - x.mean(0)
        ridge = (RIDGE * len(x) * centred.square().mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
        wanted = torch.cat((y - y.mean(0), torch.zeros_like(ridge)))
        expected = torch.linalg.lstsq(torch.cat((centred, ridge)), wanted).solution.T
        weight, bias = after.exit_translator_weight[loop], after.exit_translator_bias[loop]
        torch.testing.assert_close(weight, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(bias, y.mean(0) - expected @ x.mean(0), rtol=1e-8, atol=1e-8)
        for states, last in ((x, y), (early_held_out[loop], y_held_out)):
            assert F.mse_loss(states @ weight.T + bias, last) < 0.8 * F.mse_loss(states, last)


@torch.no_grad()
def test_the_figures_are_of_the_rows_that_were_not_fitted(files, tmp_path):
    start = make_checkpoint(files, tmp_path / "start", recursion=RecursiveConfig(num_loops=3))
    report = fit_exits(start, tmp_path / "out", text_of(files))
    _, held_out = rows_of(files)
    inputs, targets = held_out[:, :-1], held_out[:, 1:].flatten()
    for directory, exits in ((start, report.before), (tmp_path / "out", report.after)):
        model = load_model(directory)
        logits = [model(inputs, exit_loop=loop).flatten(0, 1) for loop in range(3)]
        for loop, figures in enumerate([*exits, report.last]):
            assert figures.agreement == (logits[loop].argmax(-1) == logits[2].argmax(-1)).double().mean().item()
            assert figures.loss == pytest.approx(F.cross_entropy(logits[loop], targets).item(), rel=1e-9)
    assert all(new.agreement > old.agreement for new, old in zip(report.after, report.before, strict=True))
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["stage"] == "fit-exits" and provenance["parent"]["path"] == str(start)
    assert provenance["after"][1]["agreement"] == report.after[1].agreement


def test_a_second_fit_replaces_the_first_and_thresholds_are_left_out(files, tmp_path):
    start = make_checkpoint(files, tmp_path / "start")
    save_exit_thresholds(start, 2, [Calibration(0.9, (0.5,), 0.9, 1.5)])
    first = fit_exits(start, tmp_path / "first", text_of(files, num_tokens=400))
    assert first.notices == [
        "exit_thresholds.json is left out, as it is of the exits before: run eval/exits.py --calibrate"
    ]
    assert not (tmp_path / "first" / "exit_thresholds.json").exists()
    again = fit_exits(tmp_path / "first", tmp_path / "again", text_of(files))
    direct = fit_exits(start, tmp_path / "direct", text_of(files))
    assert again.notices == [] and again.after == direct.after and again.before != direct.before
    for name in parameter_shapes(*(getattr(open_source(tmp_path / "again"), part) for part in ("model", "recursion"))):
        found, expected = (open_source(tmp_path / which).get(name) for which in ("again", "direct"))
        assert torch.equal(found, expected), name


def test_a_checkpoint_keeps_its_dtype_whatever_is_computed_in(files, tmp_path):
    start = make_checkpoint(files, tmp_path / "start", dtype=torch.bfloat16)
    report = fit_exits(start, tmp_path / "out", text_of(files), dtype=torch.float32)
    before, after = open_source(start), open_source(tmp_path / "out")
    assert after.dtype == torch.bfloat16
    for name in parameter_shapes(before.model, before.recursion):
        assert torch.equal(before.get(name), after.get(name))
    _, held_out = rows_of(files)
    with torch.no_grad():
        model = load_model(tmp_path / "out", torch.float32)
        exits = [model(held_out[:, :-1], exit_loop=loop).argmax(-1) for loop in range(2)]
    assert report.after[0].agreement == pytest.approx((exits[0] == exits[1]).double().mean().item())


@torch.no_grad()
def test_an_export_leaves_translators_out_and_computes_the_last_loop(files, tmp_path):
    recursion = RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(2), exit_translators=True)
    start = make_checkpoint(files, tmp_path / "start", recursion=recursion)
    prepared = prepare_export(start, tmp_path / "hf")
    assert prepared.notices == ("exit translators are left out: only exits before the last loop use them",)
    run_export(prepared)
    rows, model, exported = rows_of(files)[1][:, :-1], load_model(start), load_model(tmp_path / "hf")
    assert exported.recursion == RecursiveConfig()
    # The merged weights are rounded from float32 sums.
    torch.testing.assert_close(exported(rows), model(rows), rtol=0, atol=1e-4)
    assert (exported(rows) - model(rows, exit_loop=0)).abs().max() > 0.1


def test_the_command_prints_the_figures(files, tmp_path, capsys, monkeypatch):
    start = make_checkpoint(files, tmp_path / "start", recursion=RecursiveConfig(num_loops=3))
    argv = ["--checkpoint", start, "--calibration", files / "text.jsonl", "--out", tmp_path / "out"]
    argv += ["--calibration-tokens", 1300, "--calibration-context", 16, "--device", "cpu"]
    code, stdout, _ = run_main(main, argv, capsys, monkeypatch)
    assert code == 0 and f"wrote {tmp_path / 'out'} in " in stdout
    lines = stdout.splitlines()
    assert lines[0] == "128 tokens that were not fitted, of 1,312"
    assert [line.split()[0] for line in lines[1:-1]] == ["exit", "loop", "loop", "last"]
    assert lines[1].split("  ")[-4:] == ["agreement before", "agreement after", "perplexity before", "perplexity after"]
    assert lines[2].split()[1] == "0" and lines[2].count("%") == 2
    code, _, stderr = run_main(main, argv, capsys, monkeypatch)
    assert code == 2 and "exists" in stderr and stderr.count("\n") == 1
    assert run_main(main, [*argv, "--overwrite"], capsys, monkeypatch).code == 0


LOOPED = RecursiveConfig(num_loops=2)


@pytest.mark.parametrize(
    ("recursion", "chosen", "message"),
    [
        (RecursiveConfig(), {}, "start: has 1 loop and no exit before its end; expected a looped checkpoint"),
        (replace(LOOPED, sharing="sequence"), {}, "start: found a model with sharing 'sequence', which has no state"),
        (replace(LOOPED, head_lora_rank=2), {}, "start: field 'recursive.head_lora_rank': found 2; expected 0"),
        (LOOPED, dict(num_tokens=159), "--calibration-tokens: found 159; expected at least 192, for 10 rows of 16"),
        (LOOPED, dict(num_tokens=300, context=32), "--calibration-tokens: found 300; expected at least 320"),
        (LOOPED, dict(num_tokens=10**6), "tokens; expected at least 1,000,001: give more text"),
        (LOOPED, dict(context=65), "--calibration-context: found 65; expected at most 64, the model's"),
        # Of both errors the context's is told, as the other one depends on it.
        (LOOPED, dict(context=2048), "--calibration-context: found 2048; expected at most 64"),
    ],
)
def test_what_cannot_be_fitted_is_refused(files, recursion, chosen, message, tmp_path):
    start = make_checkpoint(files, tmp_path / "start", recursion=recursion)
    with pytest.raises(UserError) as caught:
        fit_exits(start, tmp_path / "out", text_of(files, **chosen))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_text_without_a_tokenizer_is_refused(files, tmp_path):
    start = make_checkpoint(None, tmp_path / "start")
    with pytest.raises(UserError, match="the model has no tokenizer; expected token shards"):
        fit_exits(start, tmp_path / "out", text_of(files))


def test_states_that_are_not_finite_are_refused(files, tmp_path):
    def enlarge(name, value):
        return value * 1e20 if name.endswith(("up.weight", "down.weight")) else value

    start = make_checkpoint(files, tmp_path / "start", change=enlarge, dtype=torch.float32)
    with pytest.raises(UserError, match=r"start: states after loop 0 or the last are not finite in float32; expected"):
        fit_exits(start, tmp_path / "out", text_of(files))
    assert not (tmp_path / "out").exists()


def test_translators_beyond_the_checkpoints_dtype_are_refused(files, tmp_path, monkeypatch):
    start = make_checkpoint(files, tmp_path / "start", recursion=RecursiveConfig(num_loops=3), dtype=torch.float16)
    solve, solved = AffineRegression.solve, []

    def enlarged(regression):
        solved.append(regression)
        weight, bias = solve(regression)
        return weight, bias + 1e5 * (len(solved) == 2)

    monkeypatch.setattr(AffineRegression, "solve", enlarged)
    message = (
        r"start: the translator of the exit after loop 1 is not finite in the checkpoint's dtype, float16; expected"
    )
    with pytest.raises(UserError, match=message):
        fit_exits(start, tmp_path / "out", text_of(files), dtype=torch.float32)
    assert not (tmp_path / "out").exists()


def test_figures_take_the_logits_of_the_last_loop_once(files, tmp_path, monkeypatch):
    start = make_checkpoint(files, tmp_path / "start", recursion=RecursiveConfig(num_loops=3))
    exits = []
    logits = RecursiveTransformer.logits
    monkeypatch.setattr(
        RecursiveTransformer, "logits", lambda model, h, loop=None: exits.append(loop) or logits(model, h, loop)
    )
    fit_exits(start, tmp_path / "out", text_of(files))
    assert exits == [None, 0, 1]
