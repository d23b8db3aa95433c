"""Inputs of loop_lora_linear and loop_lora_prefill, right and wrong, and their float64 oracle."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rrt.ops import pack_linear
from tests.util.rounding import sum_error, unit_roundoff


@dataclass(frozen=True)
class Case:
    m: int
    k: int
    n: int
    rank: int
    num_loops: int = 2
    bias: bool | str = False  # or "loops": one per loop
    segment_out: tuple[int, ...] = ()
    segment_rank: tuple[int, ...] = ()


CASES = [
    Case(1, 16, 8, 4),
    Case(5, 33, 19, 7, num_loops=3, bias=True),
    Case(13, 64, 40, 16, num_loops=3),
    Case(4, 20, 6, 0, bias=True),
    Case(0, 16, 8, 4),
    Case(3, 1, 1, 1),
    Case(9, 48, 24, 0, bias=True, segment_out=(16, 4, 4), segment_rank=(5, 4, 4)),
    Case(6, 31, 23, 0, num_loops=3, segment_out=(9, 7, 7), segment_rank=(3, 0, 18)),
    Case(2, 300, 130, 33, num_loops=1),
    Case(8, 130, 70, 12, num_loops=8, bias="loops"),
    Case(14, 129, 33, 128, bias=True),
    Case(25, 65, 96, 300, num_loops=2, bias="loops"),
    Case(3, 40, 36, 1024, num_loops=3),
    Case(7, 257, 100, 0, num_loops=2, segment_out=(64, 4, 32), segment_rank=(32, 8, 64)),
    Case(401, 37, 45, 0, 3, bias=True, segment_out=(40, 5), segment_rank=(6, 3)),
]


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    a_rank = sum(case.segment_rank) or case.rank
    b_rank = max(case.segment_rank, default=case.rank)
    return {
        "x": normal(case.m, case.k),
        "weight": normal(case.n, case.k),
        "bias": normal(*[case.num_loops] * (case.bias == "loops"), case.n) if case.bias else None,
        "lora_a": normal(case.num_loops, a_rank, case.k),
        "lora_b": normal(case.num_loops, case.n, b_rank),
        "loops": torch.randint(case.num_loops, (case.m,), generator=generator, dtype=torch.int32),
        "segment_out": case.segment_out,
        "segment_rank": case.segment_rank,
    }


def oracle(inputs: dict[str, Any]) -> Tensor:
    """Compute the definition row by row, in float64."""
    x, weight, a, b = (inputs[name].double() for name in ("x", "weight", "lora_a", "lora_b"))
    outs = inputs["segment_out"] or (weight.shape[0],)
    ranks = inputs["segment_rank"] or (a.shape[1],)
    rows = []
    for row, loop in zip(x, inputs["loops"].tolist(), strict=True):
        y = weight @ row
        if inputs["bias"] is not None:
            y += (inputs["bias"] if inputs["bias"].dim() == 1 else inputs["bias"][loop]).double()
        out_begin = rank_begin = 0
        for out, rank in zip(outs, ranks, strict=True):
            b_part = b[loop, out_begin : out_begin + out, :rank]
            y[out_begin : out_begin + out] += b_part @ (a[loop, rank_begin : rank_begin + rank] @ row)
            out_begin += out
            rank_begin += rank
        rows.append(y)
    return torch.stack(rows) if rows else torch.empty(0, weight.shape[0], dtype=torch.float64)


def assert_matches_oracle(actual: Tensor, inputs: dict[str, Any]) -> None:
    """Compare with the oracle, up to rounding errors in proportion to the sums of the terms' magnitudes."""
    expected = oracle(inputs)
    magnitudes = {
        name: value.abs() if isinstance(value, Tensor) and name != "loops" else value for name, value in inputs.items()
    }
    dtype = inputs["x"].dtype
    assert actual.dtype == dtype and actual.shape == expected.shape and actual.is_contiguous()
    # The reference rounds W x, A x, B (A x) and the sums of them and the bias; products over K and R are summed wide.
    tolerance = 5 * unit_roundoff(dtype) + sum_error(dtype, inputs["x"].shape[1] + inputs["lora_b"].shape[-1])
    assert (actual.double() - expected).norm() <= tolerance * oracle(magnitudes).norm()


def pack_arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    weight, lora_a, lora_b = (inputs[name] for name in ("weight", "lora_a", "lora_b"))
    return {
        **inputs,
        "weight": pack_linear(weight),
        "lora_a": pack_linear(lora_a),
        "lora_b": pack_linear(lora_b),
        "segment_out": inputs["segment_out"] or (weight.shape[0],),
        "segment_rank": inputs["segment_rank"] or (lora_a.shape[1],),
    }


def of_one_loop(inputs: dict[str, Any], loop: int) -> dict[str, Any]:
    """Turn arguments of loop_lora_linear into those of loop_lora_prefill, in the order of the schema."""
    return {("loop" if name == "loops" else name): loop if name == "loops" else x for name, x in inputs.items()}


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    return [x.requires_grad_() for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]


GRAD_CASES = [
    Case(5, 4, 3, 2, 2, bias=True),
    Case(4, 3, 5, 0, 3, segment_out=(3, 2), segment_rank=(1, 2)),
    Case(4, 3, 2, 1, 3, bias="loops"),
]
MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"x": torch.zeros(4, 8, dtype=torch.int32)},
        "x: found dtype int32; expected float32, float64, bfloat16 or float16",
    ),
    ({"weight": torch.zeros(6, 8, dtype=torch.half)}, "weight: found dtype float16; expected float32"),
    ({"bias": torch.zeros(6, dtype=torch.bfloat16)}, "bias: found dtype bfloat16; expected float32"),
    ({"loops": torch.zeros(4, dtype=torch.int64)}, "loops: found dtype int64; expected int32"),
    ({"loops": torch.zeros(4, dtype=torch.int16)}, "loops: found dtype int16; expected int32"),
    ({"loops": torch.zeros(4, dtype=torch.bool)}, "loops: found dtype bool; expected int32"),
    (
        {"segment_out": [2**63 - 1, 2**63 - 1, 8], "segment_rank": [1, 1, 1]},
        "segment_out: found [9223372036854775807, 9223372036854775807, 8]; expected no entry above 2147483647",
    ),
    ({"segment_out": [1] * 9, "segment_rank": [0] * 9}, "segment_out: found 9 entries; expected at most 8"),
    ({"x": torch.zeros(4, 2, 8)}, "x: found shape [4, 2, 8]; expected [M, K]"),
    ({"weight": torch.zeros(6, 9)}, "weight: found shape [6, 9]; expected [N, 8]"),
    ({"bias": torch.zeros(5)}, "bias: found shape [5]; expected [6]"),
    ({"bias": torch.zeros(3, 6)}, "bias: found shape [3, 6]; expected [2, 6]"),
    ({"lora_a": torch.zeros(2, 3, 7)}, "lora_a: found shape [2, 3, 7]; expected [loops, R, 8]"),
    ({"lora_b": torch.zeros(1, 6, 3)}, "lora_b: found shape [1, 6, 3]; expected [2, 6, R]"),
    ({"lora_b": torch.zeros(2, 6, 4)}, "lora_b: found rank 4; expected 3 as in lora_a"),
    ({"loops": torch.zeros(3, dtype=torch.int32)}, "loops: found shape [3]; expected [4]"),
    ({"loops": torch.tensor([0, 1, 2, 0]).int()}, "loops[2]: found 2; expected a loop in [0, 2)"),
    ({"loops": torch.tensor([0, -1, 9, 0]).int()}, "loops[1]: found -1; expected a loop in [0, 2)"),
    (
        {"weight": torch.zeros(8, 6).T},
        "weight: found strides [1, 6]; expected a contiguous tensor (call .contiguous() once, when loading)",
    ),
    ({"segment_out": [6]}, "segment_rank: found 0 entries; expected 1 as in segment_out"),
    (
        {"segment_out": [4, 1], "segment_rank": [1, 2]},
        "segment_out: found [4, 1]; expected a sum of 6, the weight's rows",
    ),
    ({"segment_out": [7, -1], "segment_rank": [1, 2]}, "segment_out: found [7, -1]; expected no negative entry"),
    ({"segment_out": [5, 1], "segment_rank": [4, -1]}, "segment_rank: found [4, -1]; expected no negative entry"),
    ({"segment_out": [5, 1], "segment_rank": [1, 1]}, "lora_a: found rank 3; expected 2, the sum of segment_rank"),
    (
        {"segment_out": [5, 1], "segment_rank": [1, 2]},
        "lora_b: found rank 3; expected 2, the largest of segment_rank",
    ),
]
