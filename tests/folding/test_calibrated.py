"""The calibrated conversion from the command line: every kind, resumed runs, reports, and errors of one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rrt.checkpoint.source import load_model, open_source
from rrt.common.files import locked_directory
from rrt.convert import main
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding import calibrated, calibration, conversion, neurons
from rrt.folding.conversion import CalibrationOptions, convert, prepare_conversion
from rrt.folding.workspace import Workspace
from rrt.model.config import LoraRanks, RecursiveConfig
from tests.util.commands import run_main
from tests.util.models import ALL_FAMILIES, make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer, make_sentencepiece_tokenizer, training_texts


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in training_texts()))
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A six-layer fp32 base of each family, with a tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    made = {}
    for family in ALL_FAMILIES:
        sentencepiece = family in ("gemma", "llama", "mistral")
        kind = "gemma" if family == "gemma" else "llama"
        tokenizer = make_sentencepiece_tokenizer if sentencepiece else make_bpe_tokenizer
        made[family] = tokenizer(root / family, kind if sentencepiece else "gpt_neox", vocab_size=420)
        make_hf_model(root / family, family, vocab_size=420)
    return made


def calibrate(
    base, out, text, *, num_loops=2, rank=4, options=None, dtype=None, lora_init="calibrated", seed=0, **recursion
):
    ranks = rank if isinstance(rank, LoraRanks) else LoraRanks.uniform(rank)
    chosen = {"num_tokens": 192, "context": 24, "device": "cpu", **(options or {})}
    return convert(
        base,
        out,
        RecursiveConfig(num_loops=num_loops, init="average", lora_rank=ranks, lora_init=lora_init, **recursion),
        dtype=dtype,
        seed=seed,
        calibration=CalibrationOptions((str(text),), **chosen),
    )


def others(base, out, lora_init, *, num_loops=2, rank=4, **recursion):
    ranks = LoraRanks.uniform(rank)
    return convert(
        base,
        out,
        RecursiveConfig(num_loops=num_loops, init="average", lora_rank=ranks, lora_init=lora_init, **recursion),
    )


def divergence(base: Path, converted: Path) -> float:
    """Mean KL divergence, in nats, of the base's next tokens from the converted model's, on the end of the text."""
    tokens = torch.tensor(load_tokenizer(base).encode(training_texts()[-1])[-200:]).view(8, 25)
    with torch.no_grad():
        expected, found = (load_model(path, torch.float64)(tokens).log_softmax(-1) for path in (base, converted))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "num_loops"),
    [("gemma", 2), ("llama", 3), ("mistral", 2), ("qwen2", 3), ("qwen3", 2), ("gpt_neox", 2), ("gpt_neox", 3)],
)
def test_calibrated_starts_nearer_to_the_base_than_joint_and_refitted_nearest(bases, family, num_loops, text, tmp_path):
    options = {"num_tokens": 1536}
    for name, refit in (("refitted", True), ("plain", False)):
        calibrate(bases[family], tmp_path / name, text, num_loops=num_loops, options=options | {"refit": refit})
    untie_norms = open_source(tmp_path / "plain").recursion.untie_norms
    others(bases[family], tmp_path / "joint", "joint", num_loops=num_loops, untie_norms=untie_norms)
    refitted, plain, joint = (divergence(bases[family], tmp_path / name) for name in ("refitted", "plain", "joint"))
    assert refitted < plain < joint
    reports = [
        json.loads((tmp_path / name / "provenance.json").read_text())["calibration"] for name in ("refitted", "plain")
    ]
    assert reports[0]["stream_error"][-1] < reports[1]["stream_error"][-1]
    for found, without in zip(reports[0]["linears"], reports[1]["linears"], strict=True):
        assert found["metric_loss"] == without["metric_loss"] and found["output_loss"] != without["output_loss"]


@pytest.mark.parametrize("sharing", ["sequence", "cycle-rev"])
def test_calibration_follows_the_order_of_sharing(bases, sharing, text, tmp_path):
    calibrate(bases["llama"], tmp_path / "full", text, rank=999, sharing=sharing, options={"refit": False})
    assert divergence(bases["llama"], tmp_path / "full") < 1e-8
    calibrate(bases["llama"], tmp_path / "refitted", text, sharing=sharing, options={"num_tokens": 1536})
    others(bases["llama"], tmp_path / "joint", "joint", sharing=sharing)
    refitted, joint = (divergence(bases["llama"], tmp_path / name) for name in ("refitted", "joint"))
    assert refitted < joint


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_baseline_that_shares_nothing_is_calibrated_alike(bases, family, text, tmp_path):
    errors = {}
    for refit in (True, False):
        options = {"num_tokens": 1536, "refit": refit}
        report = calibrate(bases[family], tmp_path / f"refit-{refit}", text, lora_init="low-rank-only", options=options)
        errors[refit] = report.calibration.stream_error[-1]
    assert errors[True] < errors[False]
    others(bases[family], tmp_path / "uncalibrated", "low-rank-only")
    found, uncalibrated = (divergence(bases[family], tmp_path / name) for name in ("refit-True", "uncalibrated"))
    assert found < uncalibrated
    assert open_source(tmp_path / "refit-True").recursion == open_source(tmp_path / "uncalibrated").recursion


@pytest.mark.parametrize("metric", ["both", "inputs", "activations"])
def test_a_budget_is_distributed_by_the_calibrated_metric(bases, metric, text, tmp_path):
    budget = LoraRanks.uniform(4, is_budget=True)
    report = calibrate(bases["llama"], tmp_path / "out", text, rank=budget, options={"metric": metric})
    uniform = calibrate(bases["llama"], tmp_path / "uniform", text, options={"metric": metric})
    assert report.after.lora_params == uniform.after.lora_params
    ranks = {matrix.name.removeprefix("stack."): matrix.rank for matrix in report.matrices}
    assert len(set(ranks.values())) > 1
    assert open_source(tmp_path / "out").recursion.lora_rank.matrices == ranks
    joint = convert(
        bases["llama"],
        tmp_path / "joint",
        RecursiveConfig(num_loops=2, init="average", lora_rank=budget, lora_init="joint"),
    )
    assert ranks != {matrix.name.removeprefix("stack."): matrix.rank for matrix in joint.matrices}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_full_rank_reproduces_the_base_with_biases_per_depth(bases, family, text, tmp_path):
    calibrate(bases[family], tmp_path / "out", text, rank=999, options={"refit": False})
    assert divergence(bases[family], tmp_path / "out") < 1e-8
    recursion = open_source(tmp_path / "out").recursion
    assert recursion.lora_init == "calibrated"
    assert recursion.untie_norms == (family in ("gpt_neox", "qwen2", "qwen3"))


def test_ranks_of_groups_and_capped_ranks(bases, text, tmp_path):
    report = calibrate(bases["llama"], tmp_path / "out", text, rank=LoraRanks(q=5, kv=20, out=0, ffn=7))
    ranks = {linear.name.removeprefix("stack.layers.0."): linear.rank for linear in report.calibration.linears[:7]}
    assert ranks == {"attn.q": 5, "attn.k": 16, "attn.v": 16, "attn.out": 0, "mlp.gate": 7, "mlp.up": 7, "mlp.down": 7}
    assert torch.isfinite(load_model(tmp_path / "out")(torch.arange(9)[None])).all()


def test_tensors_have_the_dtype_that_was_asked_for(bases, text, tmp_path):
    calibrate(bases["llama"], tmp_path / "out", text, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    calibrate(bases["llama"], tmp_path / "wide", text)
    assert divergence(tmp_path / "wide", tmp_path / "out") < 0.01


def test_values_beyond_a_narrow_dtype_are_named_before_the_refit(tmp_path, bases, text):
    shutil.copytree(bases["llama"], tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"mlp.down.*: found .*e\+0\d; expected at most 6.55e\+04 for float16"):
        calibrate(tmp_path / "base", tmp_path / "out", text, dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("metric", ["both", "inputs", "activations"])
def test_statistics_that_are_not_kept_give_the_same(bases, metric, text, tmp_path):
    for name, memory in (("kept", None), ("again", 0)):
        calibrate(bases["llama"], tmp_path / name, text, options={"metric": metric, "memory": memory})
    kept, again = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "again"))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


class Interrupted(BaseException):
    """As Ctrl-C is, no `Exception`."""


@pytest.fixture(scope="module")
def whole(bases, text, tmp_path_factory):
    """The tensors of a conversion that nothing interrupted, whose statistics were kept or computed again."""
    root, tensors = tmp_path_factory.mktemp("whole"), {}
    for memory in (None, 0):
        calibrate(bases["qwen3"], root / str(memory), text, options={"memory": memory})
        tensors[memory] = load_file(root / str(memory) / "model.safetensors")
    return tensors


# Kept: 7 states, 7 gradients and 6 statistics, 3 orders and fits, and 2 for each of 6 depths. Without statistics 6
# fewer.
@pytest.mark.parametrize(("saves", "memory"), [(2, None), (12, None), (23, None), (32, None), (10, 0), (30, 0)])
def test_an_interrupted_conversion_goes_on_and_ends_the_same(bases, saves, memory, whole, text, tmp_path, monkeypatch):
    names: list[str] = []
    save = Workspace.save

    def interrupted(workspace, name, tensors):
        if len(names) == saves:
            raise Interrupted
        names.append(name)
        save(workspace, name, tensors)

    monkeypatch.setattr(Workspace, "save", interrupted)
    with pytest.raises(Interrupted):
        calibrate(bases["qwen3"], tmp_path / "out", text, options={"memory": memory})
    assert not (tmp_path / "out").exists() and (tmp_path / "out.calibration").is_dir()
    saves = None
    calibrate(bases["qwen3"], tmp_path / "out", text, options={"memory": memory})
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole[memory].items())
    assert len(names) == len(set(names)) == (38 if memory is None else 32)
    assert not (tmp_path / "out.calibration").exists()


def test_steps_of_another_text_are_not_taken(bases, text, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrated.SideBySide, "advance", lambda *_: (_ for _ in ()).throw(Interrupted()))
    with pytest.raises(Interrupted):
        calibrate(bases["llama"], tmp_path / "out", text)
    monkeypatch.undo()
    calibrate(bases["llama"], tmp_path / "out", text, options={"context": 32})
    calibrate(bases["llama"], tmp_path / "fresh", text, options={"context": 32})
    found, fresh = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "fresh"))
    assert all(torch.equal(found[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize("metric", ["both", "activations"])
def test_statistics_are_shared_by_conversions_of_other_ranks_and_loops(bases, metric, text, tmp_path, monkeypatch):
    shared, passes = tmp_path / "statistics", []
    kinds = {"r4": {}, "r2": {"rank": 2}, "b3": {"num_loops": 3}, "low": {"lora_init": "low-rank-only", "rank": 8}}
    for name, kind in kinds.items():
        calibrate(bases["qwen2"], tmp_path / f"{name}-alone", text, options={"metric": metric}, **kind)
    load_layer = calibration.load_layer
    monkeypatch.setattr(calibration, "load_layer", lambda *args: passes.append(args[1]) or load_layer(*args))
    for name, kind in kinds.items():
        calibrate(bases["qwen2"], tmp_path / name, text, options={"metric": metric, "statistics": shared}, **kind)
        alone, found = (load_file(tmp_path / each / "model.safetensors") for each in (f"{name}-alone", name))
        assert all(torch.equal(tensor, found[key]) for key, tensor in alone.items()), name
        assert not (tmp_path / f"{name}.calibration").exists()
    # The base's passes over the text, and nothing after them that is not of the conversions themselves.
    assert passes == [*range(6), *(reversed(range(6)) if metric == "both" else (0, 3, 1, 4, 2, 5))]
    kept = {path.stem.rpartition("-")[0] for path in shared.glob("*.safetensors")}
    assert kept == ({"statistics"} if metric == "both" else {"statistics", "state"})


def test_statistics_that_were_kept_are_not_computed_again_where_memory_is_short_now(bases, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(calibrated.SideBySide, "advance", lambda *_: (_ for _ in ()).throw(Interrupted()))
        with pytest.raises(Interrupted):
            calibrate(bases["llama"], tmp_path / "out", text)
    monkeypatch.setattr(calibration, "load_layer", lambda *_: pytest.fail("the base runs again"))
    calibrate(bases["llama"], tmp_path / "out", text, options={"memory": 0})


def test_a_refused_folder_of_statistics_leaves_the_steps_of_an_interrupted_conversion(
    bases, text, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(calibrated.SideBySide, "advance", lambda *_: (_ for _ in ()).throw(Interrupted()))
        with pytest.raises(Interrupted):
            calibrate(bases["llama"], tmp_path / "out", text)
    steps = {path.name for path in (tmp_path / "out.calibration").iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(UserError, match=r"mine: is not of a conversion"):
        calibrate(bases["llama"], tmp_path / "out", text, options={"statistics": tmp_path / "mine"})
    assert {path.name for path in (tmp_path / "out.calibration").iterdir()} == steps


@pytest.mark.parametrize("place", ["out", "out/statistics", "out.calibration", "base/config.json"])
def test_statistics_in_the_output_or_a_file_are_refused_at_once(bases, place, text, tmp_path):
    statistics = bases["llama"] / "config.json" if place.startswith("base") else tmp_path / place
    with pytest.raises(UserError, match=r"--calibration-statistics: found .*; expected a directory"):
        calibrate(bases["llama"], tmp_path / "out", text, options={"statistics": statistics})
    assert not list(tmp_path.iterdir())


def test_interrupted_statistics_go_on_in_another_conversion(bases, text, tmp_path, monkeypatch):
    options, passes = {"statistics": tmp_path / "statistics"}, []
    with monkeypatch.context() as patch:
        patch.setattr(calibrated.TextPass, "loss_gradient", lambda *_: (_ for _ in ()).throw(Interrupted()))
        with pytest.raises(Interrupted):
            calibrate(bases["llama"], tmp_path / "out", text, options=options)
    load_layer = calibration.load_layer
    monkeypatch.setattr(calibration, "load_layer", lambda *args: passes.append(args[1]) or load_layer(*args))
    calibrate(bases["llama"], tmp_path / "other", text, rank=2, options=options)
    assert passes == [5, 4, 3, 2, 1, 0]


def test_the_seed_decides_which_of_many_neurons_are_compared(bases, text, tmp_path, monkeypatch):
    monkeypatch.setattr(neurons, "_GROUP", 8)
    options = {"statistics": tmp_path / "statistics", "refit": False}
    found = []
    for out, seed in (("first", 0), ("second", 1), ("again", 1)):
        calibrate(bases["llama"], tmp_path / out, text, options=options, seed=seed)
        found.append(load_file(tmp_path / out / "model.safetensors"))
    name = "stack.layers.0.mlp.up.weight"
    assert torch.equal(found[1][name], found[2][name]) and not torch.equal(found[0][name], found[1][name])


def test_statistics_of_another_text_and_another_folder_are_refused_and_kept(bases, text, tmp_path):
    options = {"statistics": tmp_path / "statistics"}
    calibrate(bases["llama"], tmp_path / "out", text, options=options)
    before = {path: path.read_bytes() for path in (tmp_path / "statistics").iterdir()}
    with pytest.raises(UserError, match="holds statistics of another base, text, metric, kind of device or version"):
        calibrate(bases["llama"], tmp_path / "other", text, options={**options, "context": 32})
    assert {path: path.read_bytes() for path in (tmp_path / "statistics").iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(UserError, match=r"mine: is not of a conversion"):
        calibrate(bases["llama"], tmp_path / "other", text, options={"statistics": tmp_path / "mine"})
    with (
        locked_directory(tmp_path / "statistics"),
        pytest.raises(UserError, match=r"statistics: another process writes here"),
    ):
        calibrate(bases["llama"], tmp_path / "other", text, options=options)
    assert {path.name for path in tmp_path.iterdir()} == {"statistics", "mine", "out"}


def test_statistics_of_changed_code_are_refused(bases, text, tmp_path, monkeypatch):
    options = {"statistics": tmp_path / "statistics"}
    calibrate(bases["llama"], tmp_path / "out", text, options=options)
    monkeypatch.setattr(conversion, "code_fingerprint", lambda: "after an edit")
    with pytest.raises(UserError, match="holds statistics of another base, text, metric, kind of device or version"):
        calibrate(bases["llama"], tmp_path / "other", text, options=options)


def test_a_second_conversion_to_the_same_place_is_refused(bases, text, tmp_path):
    with (
        locked_directory(tmp_path / "out.calibration"),
        pytest.raises(UserError, match=r"out\.calibration: another process writes here"),
    ):
        calibrate(bases["llama"], tmp_path / "out", text)
    calibrate(bases["llama"], tmp_path / "out", text)


def command(base, out, *flags):
    return ["--base", base, "--out", out, "--num-loops", 2, "--lora-rank", 4, *flags]


def test_the_command_prints_and_stores_a_report(bases, text, tmp_path, capsys, monkeypatch):
    flags = ["--calibration", text, "--calibration-tokens", 192, "--calibration-context", 24]
    code, output, _ = run_main(main, command(bases["gpt_neox"], tmp_path / "out", *flags), capsys, monkeypatch)
    assert code == 0
    assert "(calibrated)" in output and "192 tokens in rows of 24" in output and "biases per depth" in output
    assert "residual stream" in output and "the joint fit loses" in output
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    report = provenance["calibration"]
    assert report["num_tokens"] == 192 and len(report["stream_error"]) == 6 and len(report["linears"]) == 3 * 6
    for linear in report["linears"]:
        assert len(linear["metric_loss"]) == len(linear["output_loss"]) == len(linear["first_token_loss"]) == 2
        assert all(0 < loss < 1 for loss in linear["metric_loss"])
    assert len(provenance["matrices"]) == 3 * 6


def test_a_text_with_fewer_than_two_tokens_for_an_input_is_noticed(bases, text, tmp_path):
    recursion = RecursiveConfig(
        num_loops=2, init="average", lora_rank=LoraRanks.uniform(4), lora_init="calibrated", norm_init="folded"
    )

    def notices(num_tokens):
        options = CalibrationOptions((str(text),), num_tokens, 16, device="cpu")
        prepared = prepare_conversion(bases["llama"], tmp_path / "out", recursion, calibration=options)
        assert prepared.source.model.intermediate_size == 80
        return [notice for notice in prepared.notices if "tokens" in notice]

    assert notices(160) == []
    assert notices(144) == [
        "144 calibration tokens are few for linears of 80 inputs; expected 160 or more (--calibration-tokens)"
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-init", "calibrated"], "--calibration: missing; expected text or token shards"),
        (["--calibration", "TEXT", "--lora-init", "svd"], "'svd' beside a calibration text; expected 'calibrated'"),
        (["--calibration", "TEXT", "--calibration-tokens", "9999999"], "tokens; expected at least 10,000,385"),
        (["--calibration", "TEXT", "--calibration-tokens", "0"], "--calibration-tokens: found 0; expected 1 or more"),
        (["--calibration", "TEXT", "--calibration-context", "4096"], "found 4096; expected at most 512"),
        (["--calibration", "missing.jsonl"], "missing.jsonl: no file matches"),
        (["--calibration", "TEXT", "--lora-rank", "0"], "'calibrated' without LoRA; expected a rank"),
        (["--calibration", "TEXT", "--init", "stepwise"], "field 'init': found 'stepwise'; expected 'average'"),
        (["--calibration", "TEXT", "--prefix-length", "2"], "field 'prefix_length': found 2; expected 0"),
        (["--calibration", "TEXT", "--norm-init", "zero"], "field 'norm_init': found zero; expected folded"),
        (["--calibration", "TEXT", "--num-loops", "1"], "field 'num_loops': found 1; expected 2 or more"),
        (["--calibration", "TEXT", "--device", "nowhere"], "--device: found 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(bases, flags, message, text, tmp_path, capsys, monkeypatch):
    argv = command(bases["llama"], tmp_path / "out", *(str(text) if flag == "TEXT" else flag for flag in flags))
    code, _, output = run_main(main, argv, capsys, monkeypatch)
    assert code == 2 and message in output and output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_leave_nothing(bases, text, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrated.TextPass, "loss_gradient", lambda self, states: torch.full_like(states, torch.nan))
    with pytest.raises(UserError, match=r"layer 5, attn.q: found NaN or infinity in its gradient"):
        calibrate(bases["llama"], tmp_path / "out", text)
    assert list(tmp_path.iterdir()) == []
