"""The paper's throughput study (arXiv 2410.20672: Gemma 2B, two loops, A100 40 GB, 512/2048) in our simulation.

The paper gives times per token at the largest batch and, per corpus, the throughput of static batching, continuous
sequence-wise batching (CSB) and continuous depth-wise batching (CDB). It gives neither its queues nor the loops per
token. Both are inferred here from its figures, so only CSB is an independent check:

- loops per token, from CDB: block time of a loop, times loops, is the time of a token
- sample lengths, from static batching alone: exponential, cut at 2048, with the scale that gives its static figure
- PG19 is the odd one: static and CSB are equal, so that all samples have one length, and 16 % below what the block's
  time allows, so that slots stand empty: a queue that fills only 108 of 129 places. Its 1.56 loops per token contain
  those empty places; without them a token takes 1.31
"""

from dataclasses import dataclass
from typing import Any

from eval.simulate import Costs, Curve, Passes, Queue, depth_wise, draw_lengths, sequence_wise, static, time_of
from eval.tables import Table

SLOTS = 43
NUM_LOOPS = 2
DECODE = 2048
SAMPLES = 20_000

# Seconds per token with 43 rows in a pass.
VANILLA_BLOCK = 0.616e-3
LOOP_BLOCK = 0.265e-3
EMBED = 0.002e-3
HEAD = 0.023e-3
# Of a pass with one row.
HEAD_OF_ONE = 0.80e-3
# A layer's key and value projections, as a share of its multiply-adds: 2 * 2048 * 256 of 110.1 M.
KV_SHARE = 0.0095


@dataclass(frozen=True)
class Corpus:
    """A corpus of the study: the inferred queue, and the paper's tokens per second."""

    name: str
    samples: int
    length_scale: float | None
    """Tokens; None where all samples have 2048."""
    mean_loops: float
    static: float
    csb: float
    cdb: float

    def queue(self) -> Queue:
        return Queue.draw(draw_lengths(self.samples, DECODE, self.length_scale), NUM_LOOPS, self.mean_loops)


CORPORA = (
    Corpus("SlimPajama", SAMPLES, 930.0, 1.19, static=655, csb=1622, cdb=3159),
    Corpus("RedPajama", SAMPLES, 3470.0, 1.24, static=1228, csb=1604, cdb=3050),
    Corpus("PG19", 108, None, 1.56 * 108 / 129, static=1357, csb=1357, cdb=2421),
)


def _pass_time(per_token: float) -> Curve:
    """Make the cost of a pass: the same however many slots are busy, as it reads all weights."""
    return Curve((SLOTS,), (SLOTS * per_token,))


def _make_costs(block: float, counted: str) -> Costs:
    costs = {"block": _pass_time(block)}
    if counted != "blocks only":
        costs["embed"] = _pass_time(EMBED)
        costs["head"] = Curve((1, SLOTS), (HEAD_OF_ONE, SLOTS * HEAD))
    if counted == "and K/V of skipped loops":
        costs["kv_only"] = Curve((0, SLOTS), (0.0, SLOTS * KV_SHARE * LOOP_BLOCK))
    return Costs(**costs)


COUNTED = ("blocks only", "and embedding, head", "and K/V of skipped loops")


def repeat_study() -> list[dict[str, Any]]:
    """Simulate each corpus, first as the paper counts, then with further costs, and set the paper's figures beside."""
    rows = []
    for corpus in CORPORA:
        queue = corpus.queue()
        whole = queue.without_exits(1)

        def rate(passes: Passes, costs: Costs, queue: Queue = queue) -> float:
            return queue.num_tokens / time_of(passes, costs, len(queue.lengths)).total

        runs = {"static": static(whole, SLOTS), "csb": sequence_wise(whole, SLOTS), "cdb": depth_wise(queue, SLOTS)}
        blocks = {"static": VANILLA_BLOCK, "csb": VANILLA_BLOCK, "cdb": LOOP_BLOCK}
        for counted in COUNTED:
            ours = {name: rate(passes, _make_costs(blocks[name], counted)) for name, passes in runs.items()}
            rows.append(
                {
                    "corpus": corpus.name,
                    "counted": counted,
                    "mean_loops": queue.mean_loops,
                    "ours": ours,
                    "paper": {name: getattr(corpus, name) for name in runs},
                    "cdb_over_csb": ours["cdb"] / ours["csb"],
                    "paper_cdb_over_csb": corpus.cdb / corpus.csb,
                }
            )
    return rows


def tables(result: dict[str, Any]) -> list[Table]:
    """Make the table of our tokens per second, with the paper's in parentheses where both count the same."""
    rows = []
    for row in result["rows"]:
        is_check = row["counted"] == COUNTED[0]
        cells = [
            f"{row['ours'][name]:.0f}" + (f" ({row['paper'][name]})" if is_check else "")
            for name in ("static", "csb", "cdb")
        ]
        ratio = f"{row['cdb_over_csb']:.2f}" + (f" ({row['paper_cdb_over_csb']:.2f})" if is_check else "")
        rows.append([row["corpus"], row["counted"], *cells, ratio])
    header = ["corpus", "counted", "static", "CSB", "CDB, oracle", "CDB / CSB"]
    return [Table("Gemma 2B, A100 40 GB, 512/2048, tokens/s: ours (the paper's)", header, rows, (0, 1), gap_after=1)]
