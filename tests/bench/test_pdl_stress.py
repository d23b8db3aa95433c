"""bench/pdl_stress.py on a CPU: its chains, what counts as a difference, and that poison would show."""

import json
import sys

import pytest
import torch

from bench import pdl_stress
from bench.pdl_stress import compare, compare_workers, make_chains, poison, run_chain
from rrt.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Shapes small enough for a CPU."""
    small = dict(ROWS={1: 2, 3: 2}, PREFILL_ROWS=5, PREFILL_HEADS=2, CONTEXTS=(20, 7, 0), _RANK=8, WIDTH=32, WIDE=64)
    for name, value in small.items():
        monkeypatch.setattr(pdl_stress, name, value)


def test_every_operator_reads_what_the_one_before_wrote_and_its_numbers_stay_in_range(small):
    chains = list(make_chains(40, CPU))
    assert [name for name, _, _ in chains] == ["decode, 1 rows", "decode, 3 rows", "prefill, 5 rows"]
    for _, x, operators in chains:
        outputs, _ = run_chain(x, operators, [0] * 40)
        widths = [output.shape[1] for output in outputs]
        decode = [64, 64, 32, 32, 64, 32, 32, 32, 32]
        assert widths[:9] == (decode if len(set(operators)) == 9 else [64, 64, 32, 64, 32] * 2)[:9]
        for previous, operator, output in zip([x, *outputs], operators, outputs, strict=False):
            assert torch.equal(operator(previous), output)
        size = outputs[-1].float().abs().mean()
        assert 1e-2 < size < 1e2


def test_attention_reads_what_the_write_before_it_left(small):
    """A chain whose writes do nothing has other bits, in the first turn too once the cache holds a later one's."""
    for name, x, operators in make_chains(12, CPU):
        expected = [output.clone() for output in run_chain(x, operators, [0] * 12)[0]]
        again = run_chain(x, operators, [0] * 12)[0]
        assert compare(again, expected, "again", 0) == []
        skipping = [operator if i != 1 else (lambda qkv: qkv) for i, operator in enumerate(operators)]
        found = run_chain(x, skipping, [0] * 12)[0]
        assert compare(found, expected, "skipped", 0) == [{"way": "skipped", "round": 0, "operator": 2}], name


def test_poison_is_nan_in_16_and_32_bits():
    outputs, blocks = [torch.zeros(4, dtype=torch.bfloat16)], [torch.zeros(8, dtype=torch.uint8)]
    poison(outputs, blocks)
    assert outputs[0].isnan().all() and blocks[0].view(torch.float32).isnan().all()
    assert blocks[0].view(torch.bfloat16).isnan().all()


def test_the_first_operator_with_other_bits_is_named():
    expected = [torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)]
    assert compare([tensor.clone() for tensor in expected], expected, "eager", 0) == []
    negative_zero = [expected[0], -expected[1]]
    assert compare(negative_zero, expected, "graph", 4) == [{"way": "graph", "round": 4, "operator": 1}]
    nan = [expected[0] * float("nan"), expected[1]]
    assert compare(nan, expected, "graph", 4)[0]["operator"] == 0


def test_processes_with_and_without_dependent_launch_are_compared():
    off = [{"chain": "decode, 8 rows", "digests": ["a", "b", "c"], "differences": []}]
    assert compare_workers({"0": off, "1": off}) == []
    found = {"way": "graph", "round": 2, "operator": 7}
    on = [{"chain": "decode, 8 rows", "digests": ["a", "x", "y"], "differences": [found]}]
    assert compare_workers({"0": off, "1": on}) == [
        "RRT_PDL=1, decode, 8 rows, graph, round 2: operator 7 differs from the first run",
        "decode, 8 rows: operator 1 differs between RRT_PDL=0 and RRT_PDL=1",
    ]


def run_main(monkeypatch, tmp_path, workers):
    monkeypatch.setattr(pdl_stress, "start_worker", lambda switch, _: workers[switch])
    monkeypatch.setattr(sys, "argv", ["pdl_stress.py", "--device", "cpu", "--json", str(tmp_path / "stress.json")])
    with pytest.raises(SystemExit) as ended:
        pdl_stress.main()
    return ended.value.code, json.loads((tmp_path / "stress.json").read_text())


def test_the_command_fails_if_bits_differ_and_writes_what_did(small, monkeypatch, tmp_path, capsys):
    pdl_stress.run_worker(CPU, 5, 1, tmp_path / "records.json")
    same = json.loads((tmp_path / "records.json").read_text())
    assert run_main(monkeypatch, tmp_path, {"0": (same, 0), "1": (same, 0)})[0] == 0
    assert "3 chains of 200 operators, 15 rounds in each way: the same bits" in capsys.readouterr().out
    other = [same[0], {**same[1], "digests": ["0"] * 5}, same[2]]
    code, result = run_main(monkeypatch, tmp_path, {"0": (same, 0), "1": (other, 0)})
    line = "decode, 3 rows: operator 0 differs between RRT_PDL=0 and RRT_PDL=1"
    assert code == 1 and result["differences"] == [line]
    code, result = run_main(monkeypatch, tmp_path, {"0": (same, 0), "1": (other[:2], 134)})
    ended = "RRT_PDL=1: the process ended with exit status 134 after 2 chains; see above"
    assert code == 1 and result["differences"] == [line, ended]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pdl_stress.py"])
    with pytest.raises(UserError, match="--device: found cuda; no GPU is visible"):
        pdl_stress.main()
