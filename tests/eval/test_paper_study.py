"""eval/paper_study.py: fed with the paper's block times, the simulation lands on the paper's throughput."""

import json
import sys

import numpy as np
import pytest

from eval import throughput
from eval.paper_study import COUNTED, DECODE, LOOP_BLOCK, SAMPLES, SLOTS, repeat_study, tables
from eval.simulate import Costs, Curve, Queue, depth_wise, time_of


@pytest.fixture(scope="module")
def rows():
    return repeat_study()


@pytest.mark.parametrize("corpus", ["SlimPajama", "RedPajama", "PG19"])
def test_csb_and_cdb_land_within_three_percent_of_the_papers(rows, corpus):
    row = next(row for row in rows if row["corpus"] == corpus and row["counted"] == "blocks only")
    for strategy in ("csb", "cdb"):
        assert row["ours"][strategy] == pytest.approx(row["paper"][strategy], rel=0.03)
    ratio = {"SlimPajama": 1.95, "RedPajama": 1.90, "PG19": 1.78}[corpus]
    assert row["cdb_over_csb"] == pytest.approx(ratio, rel=0.03)
    (table,) = tables({"rows": rows})
    assert f"{row['ours']['cdb']:.0f} ({row['paper']['cdb']})" in table.text()


@pytest.mark.parametrize(("mean_loops", "paper"), [(1.19, 3159), (1.24, 3050), (1.56, 2421)])
def test_a_long_queue_gives_the_papers_cdb_from_its_effective_loops(mean_loops, paper):
    queue = Queue.draw(np.full(SAMPLES // 10, DECODE), 2, mean_loops)
    seconds = time_of(depth_wise(queue, SLOTS), Costs(Curve((SLOTS,), (SLOTS * LOOP_BLOCK,))), len(queue.lengths))
    # A queue of 20,000 samples would lose a tenth as much to slots that stand empty at its end.
    assert queue.num_tokens / seconds.total == pytest.approx(paper, rel=0.03)


def test_the_costs_that_the_paper_neglects_take_from_depth_wise_batching_most(rows):
    for corpus in ("SlimPajama", "RedPajama", "PG19"):
        own = {row["counted"]: row for row in rows if row["corpus"] == corpus}
        assert list(own) == list(COUNTED)
        ratios = [own[counted]["cdb_over_csb"] for counted in COUNTED]
        assert ratios[0] > ratios[1] > ratios[2]
        assert own[COUNTED[1]]["ours"]["csb"] < own[COUNTED[0]]["ours"]["csb"]


def test_the_command_tells_the_study_without_a_model(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "repeat_study", lambda: rows)
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--paper", "--json", str(tmp_path / "paper.json")])
    throughput.main()
    assert "SlimPajama" in capsys.readouterr().out
    written = json.loads((tmp_path / "paper.json").read_text())
    assert written["kind"] == "throughput-paper" and written["rows"] == rows
