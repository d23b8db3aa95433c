"""eval/throughput.py: measured times go through the simulation into tables, and bad input is one line."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval import throughput
from eval.pass_times import PassTimes, batch_sizes, cost_stages, measure_pass
from eval.simulate import Queue, depth_wise, time_of
from eval.throughput import Setting, largest_batch, resample, simulate
from eval.trajectories import Recording, Totals, Trajectories
from rrt.checkpoint.presets import preset
from rrt.errors import UserError
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.sizes import model_sizes
from tests.util.models import make_hf_model


def run(*arguments):
    before = sys.argv
    sys.argv = ["throughput.py", *map(str, arguments)]
    try:
        throughput.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_hf_model(tmp_path_factory.mktemp("model"), "llama", num_layers=4)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Two samples of 3 and 5 tokens of a model of two loops."""
    directory = tmp_path_factory.mktemp("recording") / "books"
    agree = np.array([[1, 0, 1, 1, 1, 0, 1, 1], [1] * 8], dtype=bool)
    samples = Trajectories(np.array([3, 5], dtype=np.int32), agree, np.zeros((1, 8), np.float32), np.zeros((2, 8)))
    Recording(directory, {"data": "books.jsonl", "num_loops": 2}).write(
        0, "", samples, Totals(np.zeros(2), np.zeros((2, 2)))
    )
    return directory


def test_a_study_measures_simulates_and_keeps_everything(checkpoint, recording, tmp_path, capsys):
    out = tmp_path / "result.json"
    run(
        "--checkpoint", checkpoint, "--settings", "8/4", "8/3@0.001", "--trajectories", recording, "--mean-loops", 1.5,
        "--lora-rank", 0, 4, "--samples", 30, "--max-batch", 3, "--seconds", 0, "--json", out,
    )  # fmt: skip
    result = json.loads(out.read_text())
    assert result["complete"] and result["kind"] == "throughput" and len(result["settings"]) == 2
    for entry, decode in zip(result["settings"], (4, 3), strict=True):
        assert [model["model"] for model in entry["models"]] == ["vanilla", "rank 0", "rank 4"]
        for model in entry["models"]:
            assert model["times"][-1]["rows"] == model["batch"] <= 3
            assert all(point["block"] > 0 and point["head"] > 0 and point["embed"] > 0 for point in model["times"])
            assert (model["times"][0]["mixed"] is None) == (model["model"] == "vanilla")
        drawn, recorded = entry["queues"]
        assert drawn["tokens"] == 30 * decode and drawn["mean_loops"] == pytest.approx(1.5, abs=0.2)
        assert recorded["name"] == "books (books.jsonl)" and 30 * 3 <= recorded["tokens"] <= 30 * decode
        assert {row["strategy"] for row in recorded["rows"]} == {"static", "CSB", "CDB, oracle"}
        assert all(len(row["counted"]) == 6 for row in recorded["rows"])
    printed = capsys.readouterr().out
    last = result["settings"][1]["queues"][1]["rows"][-1]
    rates = {stage: counted["tokens_per_second"] for stage, counted in last["counted"].items()}
    assert f"{rates['prefill']:,.0f} ({last['over_csb']['prefill']:.2f})" in printed
    ratios = [f"{last[over]['blocks only']:.2f}" for over in ("over_static", "over_csb")]
    row = next(line for line in reversed(printed.splitlines()) if "CDB, oracle" in line)
    assert row.split("oracle")[1].split()[3:6] == [f"{rates['blocks only']:,.0f}", *ratios]


def test_each_stage_counts_more_and_only_exits_pay_for_a_head_in_every_pass():
    times = [PassTimes(rows, embed=0.1, block=1.0, mixed=1.5, kv_only=0.01, head=0.5) for rows in (1, 4)]
    vanilla = [PassTimes(rows, embed=0.1, block=2.0, mixed=None, kv_only=None, head=0.5) for rows in (1, 4)]
    models = [
        {"model": "vanilla", "num_loops": 1, "batch": 4, "prefill": 3.0, "times": vanilla},
        {"model": "rank 8", "num_loops": 2, "batch": 4, "prefill": 3.0, "times": times},
    ]
    queue = Queue.draw(np.full(40, 50), 2, 1.4)
    rows = {(row["model"], row["strategy"]): row for row in simulate(models, queue)}
    seconds = {
        key: [sum(v for k, v in part.items() if k != "tokens_per_second") for part in row["counted"].values()]
        for key, row in rows.items()
    }
    passes = depth_wise(queue, 4)
    assert seconds["rank 8", "CDB, oracle"][0] == pytest.approx(len(passes.rows) * 1.0)
    for row in seconds.values():
        assert row == sorted(row)
    cdb, csb = seconds["rank 8", "CDB, oracle"], seconds["rank 8", "CSB"]
    # Mixed loops, skipped keys and values, the head in every pass: only depth-wise batching has them.
    assert cdb[1] < cdb[2] < cdb[3] < cdb[4] < cdb[5]
    assert csb[1] == csb[2] == csb[3] == csb[4] < csb[5]
    # equal lengths, two loops of half the time each: the same as the vanilla model
    assert rows["rank 8", "CSB"]["over_csb"]["blocks only"] == pytest.approx(1.0)
    assert rows["rank 8", "CDB, oracle"]["over_static"]["prefill"] == pytest.approx(
        seconds["vanilla", "static"][-1] / cdb[-1]
    )
    stages = dict(cost_stages(times, 2, 3.0))
    last = time_of(passes, stages["prefill"], 40)
    assert (last.prefill, last.kv_only > 0) == (120.0, True)


def test_recorded_samples_are_drawn_whole_and_cut_to_the_generated_length():
    lengths, exits = np.array([3, 5]), np.array([0, 1, 0, 1, 1, 1, 1, 0])
    queue = resample(lengths, exits, 2, samples=50, decode=4)
    found = {tuple(part) for part in np.split(queue.exits, np.cumsum(queue.lengths)[:-1])}
    assert found == {(0, 1, 0), (1, 1, 1, 1)}


def test_the_batch_is_what_memory_holds_beside_the_weights():
    config, recursion = preset("gemma-2b"), RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(64))
    sizes = model_sizes(config, recursion, torch.bfloat16)
    setting = Setting.parse("64/256@16")
    each = 2 * 18 * 256 * 2 * 320  # keys and values of 18 depths, one head of 256, in two bytes
    assert largest_batch(sizes, setting, setting.memory, 10**6) == (16 * 2**30 - sizes.bytes) // each
    assert largest_batch(sizes, setting, setting.memory, 7) == 7
    with pytest.raises(UserError, match="hold no sequence of 64/256"):
        largest_batch(sizes, setting, 2**30, 7)
    assert batch_sizes(43) == [1, 2, 4, 8, 16, 32, 43] and batch_sizes(1) == [1]


def test_a_pass_of_a_prefix_and_of_three_loops_can_be_measured():
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4}
    small = replace(preset("pythia-160m"), **sizes, head_dim=16, vocab_size=99)
    recursion = RecursiveConfig(num_loops=3, lora_rank=LoraRanks.uniform(2), prefix_length=3)
    model = throughput.dummy_model(small, recursion, torch.float32, torch.device("cpu"))
    point = measure_pass(model, rows=5, length=20, seconds=0)
    assert point.rows == 5 and min(point.embed, point.block, point.mixed, point.head) > 0 <= point.kv_only


def test_bad_input_is_one_clear_line(checkpoint, recording, tmp_path):
    cases = [
        (("--settings", "512-2048"), "--settings: found '512-2048'; expected PREFIX/DECODE"),
        (("--settings", "8/4@0.00001"), "hold no sequence of 8/4"),
        (("--mean-loops", 2.5), "--mean-loops: found 2.5; expected 1 to 2"),
        (("--num-loops", 1), "--num-loops: found 1"),
        (("--num-loops", 4, "--trajectories", recording), "field 'num_loops': found 2; expected 4"),
        (("--num-loops", 3, "--settings", "8/4"), "field 'num_loops': found 3, which does not divide"),
        (("--trajectories", tmp_path / "absent"), "no such file"),
        (("--samples", 0), "--samples: found 0"),
        (("--length-scale", 0), "--length-scale: found 0"),
        (("--length-scale", "nan"), "--length-scale: found nan"),
        (("--length-scale", 3, "--trajectories", recording), "expected --mean-loops"),
        (("--json", tmp_path / "absent" / "out.json"), "--json: found"),
    ]
    for flags, message in cases:
        with pytest.raises(UserError) as error:
            run("--checkpoint", checkpoint, "--max-batch", 1, "--seconds", 0, "--samples", 10, *flags)
        assert message in str(error.value) and "\n" not in str(error.value)
