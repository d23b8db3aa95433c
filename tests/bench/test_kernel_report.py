"""The report of bench/kernels.py: whole layers, goals and their worst cases."""

from typing import Any

import pytest
import torch

from bench.kernel_report import cpu_goals, cuda_goals, summary_tables
from bench.linear_cases import LinearSpec, _over_reading, add_floors, layer_records, run_layers
from bench.linear_variants import (
    projections,
)
from bench.timing import Rates, Timer
from rrt.checkpoint.hf_config import model_config_from_hf
from tests.util.configs import CONFIGS

CPU = torch.device("cpu")


def record(rows: int, rank: int, loops: int, speed: dict[str, float], seconds: float = 1.0) -> dict[str, Any]:
    return {
        "projection": "out",
        "inputs": 64,
        "segments": [64],
        "rows": rows,
        "rank": rank,
        "loops": loops,
        "bytes": 100,
        "flops": 50,
        "seconds": {"ours": {"median": seconds}},
        "speedup": speed,
        "over_reading": seconds,
    }


@pytest.mark.parametrize(
    "cases, rows, title",
    [
        ([(1, 1), (4, 1), (4, 2), (4, 3)], [(1, 1)], "Whole layer, 1 loop"),
        ([(1, 1), (2, 2), (4, 2), (4, 3)], [(1, 1), (4, 2)], "Whole layer, 1 loop or 2 loops mixed"),
        ([(4, 2), (4, 3)], [(4, 2)], "Whole layer, 2 loops mixed"),
        ([(4, 1), (4, 3)], [(4, 1), (4, 3)], "Whole layer, 1 loop or 3 loops mixed"),
        ([(8, 3)], [(8, 3)], "Whole layer, 3 loops mixed"),
    ],
)
def test_the_summary_of_the_layer_is_named_after_its_loops(cases, rows, title):
    floor = {"bound": "bytes", "over_floor": {"ours": 1.0}}
    made = [{**record(count, 0, loops, {"base": 1.0}), **floor} for count, loops in cases]
    _, _, layer = summary_tables({"goals": [], "linear": made, "layer": made})
    assert layer.title.startswith(f"{title}: time of ours")
    assert [(int(row[3]), int(row[2])) for row in layer.rows] == rows


def test_goals_are_computed_with_their_worst_case():
    slow = {"base": 1.0, "unfused": 1.6, "concatenated": 1.4}
    records = [
        record(1, 64, 1, {"base": 0.9, "unfused": 0.94, "concatenated": 1.0}),
        record(8, 0, 2, {"base": 1.5}),
        record(16, 64, 3, slow, seconds=1.31),
        record(32, 64, 3, {"base": 1.0, "unfused": 1.0, "concatenated": 1.0}, seconds=9.0),
    ]
    rates = {"matmul": {"flops_per_second": 45.0}}
    result = {"dtype": "float32", "linear": records, "rates": rates}
    rank_zero, every_rank, everywhere, reading, floor = cpu_goals(result)
    assert (rank_zero["holds"], rank_zero["cases"], rank_zero["worst"]) == (True, 1, 1.5)
    assert (every_rank["holds"], every_rank["cases"], every_rank["worst"]) == (False, 2, 1.4)
    assert every_rank["cases_that_hold"] == 1 and every_rank["worst_case"] == "out, M=16, rank 64, 3 loops"
    assert (everywhere["holds"], everywhere["cases"], everywhere["worst"]) == (False, 4, 0.94)
    assert (reading["holds"], reading["cases"], reading["worst"]) == (False, 2, 1.31)
    assert (floor["holds"], floor["cases"], floor["worst"]) == (True, 2, pytest.approx(1.31 * 45 / 50))

    wide, square, everywhere, reading, floor = cpu_goals({**result, "dtype": "bfloat16", "linear": records[:2]})
    assert wide["holds"] is None and square["holds"] is None
    assert everywhere["holds"] and reading["holds"] and floor["holds"]

    many = [record(64, rank, 2, {"base": 1.0, "unfused": speed}) for rank, speed in ((64, 0.96), (128, 1.0))]
    layer = [{**record(64, 64, 2, {"base": 1.0}), "projection": "layer", "over_floor": {"ours": 1.4}}]
    on_tiles = {"dtype": "bfloat16", "native": {"cpu_isa": "amx_bf16"}, "linear": many, "layer": layer, "rates": rates}
    anywhere, high_ranks, whole = cpu_goals(on_tiles)[3:6]
    assert (anywhere["holds"], anywhere["worst"]) == (True, 0.96)
    assert (high_ranks["holds"], high_ranks["cases"], high_ranks["worst"]) == (False, 1, 1.0)
    assert (whole["holds"], whole["worst"]) == (False, 1.4)
    assert len(cpu_goals({**on_tiles, "native": {"cpu_isa": "avx512_bf16"}})) == len(cpu_goals(on_tiles)) - 3

    plan = {"rows": 256, "native": False, "seconds": {"all": {"median": 1.0}}}
    call, planning = cpu_goals({"dtype": "float16", "overhead": {"call": {"added": 11e-6}, "plan": plan}})
    assert call["holds"] is False and planning["holds"] is None
    plan["native"] = True
    assert cpu_goals({"dtype": "float16", "overhead": {"call": {"added": 9e-6}, "plan": plan}})[1]["holds"] is False


def test_ours_is_compared_with_reading_as_many_bytes_in_the_same_round():
    compared = _over_reading(ours=[3.0, 8.0, 5.0], reading=[1.0, 2.0, 2.0], size=2.0)
    assert compared["over_reading"] == 1.5  # of 1.5, 2 and 1.25
    assert compared["reading"]["median"] == 4.0


def test_a_layer_lacks_cases_that_a_projection_lacks():
    full = {**record(1, 0, 1, {"base": 2.0}), "flops": 10, "floor_seconds": 0.5, "bound": "bytes"}
    full["seconds"]["base"] = {"median": 2.0}
    (layer,) = layer_records([full, full, {**full, "rows": 2}], num_projections=2)
    assert layer["rows"] == 1 and layer["bytes"] == 200 and layer["floor_seconds"] == 1.0
    assert layer["speedup"] == {"base": 2.0} and layer["over_floor"] == {"ours": 2.0, "base": 4.0}


def test_a_layer_measured_as_one_call_has_the_floors_of_its_projections():
    config = model_config_from_hf(CONFIGS["gemma"], "gemma")
    spec = LinearSpec(projections(config), [4], [0, 3], [2], torch.float32, CPU, False, 2**14, 2**30)
    timer = Timer(CPU, 0.0)
    rates = Rates(timer, torch.float32, 2**16)
    rates.probe()
    base, lora = records = list(run_layers(spec, timer))
    add_floors(records, rates)
    assert (base["rank"], set(base["seconds"])) == (0, {"ours", "base"})
    assert (lora["rank"], set(lora["seconds"])) == (3, {"ours", "base", "unfused", "concatenated", "merged"})
    assert lora["bytes"] == sum(p.min_bytes(4, 3, 2, 4) for p in spec.projections)
    floors = [rates.floor(part["bytes"], part["flops"])[0] for part in lora["parts"]]
    assert len(floors) == 4 and lora["floor_seconds"] == pytest.approx(sum(floors))
    assert lora["over_floor"]["ours"] == pytest.approx(lora["seconds"]["ours"]["median"] / lora["floor_seconds"])


def test_goals_on_cuda_are_of_the_layer_and_of_decode_attention():
    def layer(rows: int, rank: int, over_floor: float, unfused: float) -> dict[str, Any]:
        speed = {"base": 1.0, "unfused": unfused, "concatenated": 1.5}
        return {**record(rows, rank, 2, speed), "projection": "layer", "over_floor": {"ours": over_floor}}

    def decode(context: int, seconds: float) -> dict[str, Any]:
        return {
            "kind": "decode",
            "count": 32,
            "context": context,
            "bytes": 30,
            "seconds": {"ours": {"median": seconds}},
        }

    result = {
        "dtype": "bfloat16",
        "layer": [layer(8, 64, 1.2, 2.5), layer(64, 512, 1.3, 1.9), layer(128, 64, 9.0, 0.1), layer(8, 0, 9.0, 0.1)],
        "attention": [decode(512, 9.0), decode(1024, 1.0), decode(4096, 0.5)],
        "rates": {"read_bandwidth": {"all": {"copy": 50.0}}},
    }
    floor, unfused, concatenated, attention = cuda_goals(result)
    assert (floor["cases"], floor["holds"], floor["worst"]) == (2, False, 1.3)
    assert (unfused["cases_that_hold"], unfused["worst_case"]) == (1, "layer, M=64, rank 512, 2 loops")
    assert concatenated["holds"] is True
    assert (attention["cases"], attention["cases_that_hold"], attention["worst"]) == (2, 1, pytest.approx(0.6))
    assert cuda_goals({"dtype": "float32"}) == []
