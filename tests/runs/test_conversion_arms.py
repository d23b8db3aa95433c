"""Arms of the conversion study: their names and order, and the commands that convert them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rrt.convert
from rrt.checkpoint.source import open_source
from rrt.errors import UserError
from rrt.model.sizes import model_sizes
from runs.conversion_arms import DECISIVE, all_arms, choose_arms, trainings
from runs.conversion_study import study_steps as list_steps
from tests.util.commands import run_main
from tests.util.models import make_hf_model
from tests.util.studies import ARMS, make_study
from tests.util.tokenizers import make_bpe_tokenizer, training_texts


@pytest.mark.timeout(600)
def test_every_arm_is_converted_by_its_command_and_has_the_loops_that_are_measured(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_bpe_tokenizer(make_hf_model(tmp_path / "base", "llama", vocab_size=420), "gpt_neox", vocab_size=420)
    # Of so small a base low-rank-only has no rank that saves parameters.
    arms = choose_arms(all_arms(6), ["stepwise", "keep-3", "*-r64"])
    arms = tuple(arm for arm in arms if not arm.name.startswith("low-rank-only"))
    study = make_study(tmp_path / "out", base=base, arms=arms)
    study = replace(study, calibration_tokens=512, num_seeds=1, tokens=())
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in training_texts()))
    steps = {step.name: step for step in list_steps(study)}
    found = {}
    for arm in study.arms[1:]:
        step = steps[f"convert {arm.name}"]
        assert step.command[1:3] == ("-m", "rrt.convert")
        # Text in place of the shards that an earlier step would make.
        shards = str(study.data / "natural")
        argv = [str(text) if word == shards else word for word in step.command[3:]]
        done = run_main(rrt.convert.main, argv, capsys, monkeypatch)
        assert done.code == 0, (arm.name, done.err)
        source = open_source(step.makes)
        sizes = model_sizes(source.model, source.recursion, source.dtype)
        found[arm.name] = source.recursion.num_loops, sizes.total_params
        assert source.recursion.num_loops == arm.loops, arm.name
    assert found["stepwise"][1] == found["keep-3"][1]
    assert len({found[f"{method}-r64"][1] for method in ("average-svd", "joint", "calibrated", "no-refit")}) == 1


def test_arms_are_named_once_and_those_that_decide_come_first() -> None:
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names) == len({arm.title for arm in ARMS}) == 21
    assert names[:5] == ["base", "stepwise", "keep-15", *DECISIVE]
    assert {arm.name: arm.num_seeds for arm in ARMS if arm.num_seeds} == {
        "stepwise": 1,
        "keep-15": 1,
        "average-svd-r64": 3,
        "calibrated-r64": 3,
        "low-rank-only-r64": 1,
    }
    assert not any("b3" in arm.name for arm in all_arms(4))
    order = [training.name for training in trainings(ARMS, (8192, 4096), 3)]
    assert order[:5] == [
        *(f"{arm}-{tokens}-plain-seed0" for tokens in (4096, 8192) for arm in DECISIVE),
        "stepwise-4096-plain-seed0",
    ]
    seeds = [(name[-1], "distilled" in name) for name in order]
    assert list(dict.fromkeys(seeds)) == [
        ("0", False),
        ("0", True),
        ("1", False),
        ("2", False),
        ("1", True),
        ("2", True),
    ]
    assert len(set(order)) == len(order) == 2 * 2 * (5 + 2 + 2)


def test_arms_are_chosen_by_patterns_and_the_base_is_always_there() -> None:
    assert [arm.name for arm in choose_arms(ARMS, ["keep-*", "joint-r32"])] == ["base", "keep-15", "joint-r32"]
    assert choose_arms(ARMS, []) == ARMS
    with pytest.raises(UserError, match=r"--arms: found 'joint-r31'; expected names, or patterns: base, stepwise"):
        choose_arms(ARMS, ["stepwise", "joint-r31"])
