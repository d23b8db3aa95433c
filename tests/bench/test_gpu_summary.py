"""Tables of bench/gpu_summary.py from results as the steps write them, and from ones that were cut off."""

import json
from pathlib import Path

import pytest

from bench.gpu_summary import MAX_CHARACTERS, read_ncu, shortened, summary

NCU = """==PROF== Connected to process 7
==PROF== Profiling "row_kernel" - 0: 0%....50%....100% - 20 passes
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"smsp__inst_executed.sum","launch__shared_mem_config_size","l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
"","","","ns","%","inst","byte","","warp","warp"
"0","7","void rrt::loop_lora::<unnamed>::row_kernel<rrt::device::BFloat16, (int)8, (int)8>(DecodeArgs)",\
"38,528","81.50","1,234,567","233,472","0","0.9","4.25"
"1","7","cut off
"""


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def linear(projection: str, rows: int, ours: float, **changes: object) -> dict[str, object]:
    seconds = {"ours": {"median": ours}, "base": {"median": 2e-5}, "tuned": {"median": 1.5e-5}}
    speedup = {"base": 0.9, "unfused": 2.5, "concatenated": 1.5, "merged": 1.25}
    record = dict(projection=projection, rank=64, loops=min(2, rows), rows=rows, seconds=seconds, speedup=speedup)
    return {**record, "over_floor": {"ours": 1.31}, **changes}


@pytest.fixture
def results(tmp_path):
    write(tmp_path / "ncu" / "ncu.csv", NCU)
    lines = [
        ("a::test_one", "passed", ""),
        ("b::test_two", "started", ""),
        ("b::test_two", "sticky CUDA error", "illegal"),
    ]
    log = "".join(json.dumps({"test": f"tests/{t}", "event": e, "message": m}) + "\n" for t, e, m in lines)
    write(tmp_path / "tests-x" / "log.jsonl", log + '{"cut')
    write(tmp_path / "stress" / "stress.json", {"differences": ["operator 7 differs"]})
    write(tmp_path / "sanitize-racecheck" / "log.txt", "x\n========= RACECHECK SUMMARY: 0 hazards displayed\n")
    tilings = [{"outputs": 12, "inputs": 16, "rows": 1, "seconds": {"kColumns 1": 2e-5, "kRows 8": 1e-5}}]
    write(tmp_path / "tiles" / "tiles.json", {"tilings": tilings, "wrong": ["out, 8 rows: kRows 4 gives other bits"]})
    write(tmp_path / "smoke" / "log.txt", "running: write\nWRONG: write: differs by 1 of the norm\n")
    layer, single = linear("layer", 8, 1e-4), linear("down", 1, 3e-5)
    decode = {"kind": "decode", "count": 32, "context": 1024, "bytes": 3.2e7, "seconds": {"ours": {"median": 1e-5}}}
    speedup, backends = {"sdpa": 1.4, "sdpa cudnn": 1.1}, {"sdpa": "flash", "sdpa cudnn": "cudnn"}
    attention = [{**decode, "speedup": speedup, "sdpa_backends": backends}]
    rates = {"read_bandwidth": {"all": {"copy": 4.3e12}}}
    gemma = {"layer": [layer], "linear": [single], "attention": attention, "rates": rates}
    write(tmp_path / "kernels-gemma-2b" / "kernels.json", gemma)
    for value, turn, seconds, gap in (("0", 1, 1.2e-4, 1e-6), ("1", 1, 1e-4, -2e-6), ("0", 2, 1.4e-4, 3e-6)):
        one = {"one": {"median": 6e-6}, "two": {"median": 1e-5}, "gap": gap}
        gaps = [{"projection": "out", "rows": 8, "chained": True, **one}]
        result = {"layer": [linear("layer", 8, seconds)], "overhead": {"gaps": gaps}}
        write(tmp_path / f"switch-pdl-{value}-{turn}" / "kernels.json", result)
    for value, seconds in (("0", 12e-6), ("1", 10e-6)):
        record = {"kind": "decode", "count": 32, "context": 1024, "seconds": {"ours": {"median": seconds}}}
        write(tmp_path / f"switch-prefetch-{value}-1" / "kernels.json", {"attention": [record]})
    step = {"tokens": 8192, "seconds": {"ours": {"median": 0.02}}, "mfu": {"ours": 0.4}, "peak_bytes": {"ours": 2**31}}
    write(tmp_path / "training" / "training.json", {"step": [step]})
    record = {"tokens_per_second": 1e5, "mfu": 0.25, "memory_bytes": 2**32, "loss": 3.0}
    write(tmp_path / "uptrain" / "metrics.jsonl", json.dumps(record) + "\n")
    case = {"model": "m", "in_flight": 16, "variants": {"never": {"tokens_per_second": 9e3, "over_never": 1.0}}}
    write(tmp_path / "serving" / "serving.json", {"cases": [case]})
    return tmp_path


def test_every_result_has_its_line(results):
    text = summary(results, [], [])
    rows = [" ".join(line.split()) for line in text.splitlines()]
    for expected in (
        "Tests: 1 passed, 1 sticky CUDA error",
        "b::test_two sticky CUDA error illegal",
        "operator 7 differs",
        "sanitize-racecheck RACECHECK SUMMARY: 0 hazards displayed",
        "loop_lora::row_kernel<BFloat16, 8, 8> 38.5 81.5 1,234,567 0.0 233.5 long_scoreboard 4.2, barrier 0.9",
        "12x16 1 kRows 8 10.0 20.0",
        "gemma-2b 64 2 8 100.0 1.31 20.0 15.0 2.50x 1.50x 1.25x",
        "gemma-2b down 64 1 1 30.0 1.31 20.0 15.0 2.50x 1.50x 1.25x",
        "decode 32 1024 10.0 74% 1.10x sdpa cudnn (cudnn)",
        "out 8 yes 6.0 6.0 +2.0 -2.0 -4.0",
        "RRT_PDL 64 2 8 130.0 100.0 1.30x",
        "RRT_PREFETCH decode 32 1024 12.0 10.0 1.20x",
        "training step ours 409,600 tokens/s, MFU 40.0%, 2.0 GiB",
        "uptraining 1 records 100,000 tokens/s, MFU 25.0%, 4.0 GiB, loss 3.000 to 3.000",
        "smoke write: differs by 1 of the norm",
        "tiles out, 8 rows: kRows 4 gives other bits",
        "serving m, 16 in flight, never 9,000 tokens/s, 1.00x never",
    ):
        assert expected in rows, f"{expected}\n{text}"


def test_a_result_that_was_cut_off_costs_no_other_table(results):
    write(results / "tiles" / "tiles.json", {"tilings": [{"outputs": 12}]})
    write(results / "switch-pdl-1-1" / "kernels.json", '{"overhead')
    text = summary(results, [], [])
    assert "tiles_table: not shown, KeyError: 'seconds'" in text
    assert "Whole layer" in text and "Whole layer with switches" not in text


def test_no_results_are_no_tables_and_many_are_shortened(tmp_path, results):
    assert summary(tmp_path / "nothing", [], []).startswith("Steps")
    layers = [linear("layer", 8, 1e-4) for _ in range(500)]
    write(results / "kernels-gemma-2b" / "kernels.json", {"layer": layers})
    whole = summary(results, [], [])
    assert whole.count("gemma-2b    64") >= 500
    cut = shortened(whole)
    assert len(cut) < MAX_CHARACTERS + 100 and cut.endswith("(the rest is in tables.txt, in the archive)")
    assert shortened("short") == "short"


def test_ncu_without_a_kernel_has_no_rows():
    assert read_ncu("==ERROR== No kernels were profiled\n") == []
