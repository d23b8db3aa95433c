"""The configurations: strict reading from JSON, and the ranges of their fields."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest

from rrt.common.schema import from_mapping, to_mapping
from rrt.errors import UserError
from rrt.model.config import LoraRanks, ModelConfig, RecursiveConfig


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    count: int
    name: str = "x"
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    loops: tuple[int, ...] = ()
    inner: Inner = field(default_factory=Inner)
    ranks: Mapping[str, int] = field(default_factory=dict)


def test_every_kind_of_field_is_read():
    data = {
        "count": 3,
        "flag": True,
        "kind": "b",
        "limit": 4,
        "loops": [0, 1],
        "inner": {"rate": 2},
        "ranks": {"a.b": 3},
    }
    outer = from_mapping(Outer, data, "f.json")
    assert outer == Outer(3, "x", True, "b", 4, (0, 1), Inner(2.0), {"a.b": 3})
    assert isinstance(outer.inner.rate, float)
    assert from_mapping(Outer, json.loads(json.dumps(to_mapping(outer))), "f.json") == outer


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "f.json: missing field 'count'"),
        ({"count": "3"}, "f.json: field 'count': found '3'; expected int"),
        ({"count": 3.0}, "f.json: field 'count': found 3.0; expected int"),
        ({"count": True}, "f.json: field 'count': found True; expected int"),
        ({"count": None}, "f.json: field 'count': found None; expected int"),
        ({"count": 1, "flag": 1}, "f.json: field 'flag': found 1; expected bool"),
        ({"count": 1, "kind": "c"}, "f.json: field 'kind': found 'c'; expected one of 'a', 'b'"),
        ({"count": 1, "limit": "no"}, "f.json: field 'limit': found 'no'; expected int or null"),
        ({"count": 1, "loops": 2}, "f.json: field 'loops': found 2; expected a list of int"),
        ({"count": 1, "loops": [0, "1"]}, "f.json: field 'loops[1]': found '1'; expected int"),
        ({"count": 1, "inner": 2}, "f.json: field 'inner': found 2; expected Inner"),
        ({"count": 1, "inner": {"rate": "fast"}}, "f.json: field 'inner.rate': found 'fast'; expected float"),
        ({"count": 1, "inner": {"rte": 1}}, "f.json: unknown field 'inner.rte'; expected one of: rate"),
        ({"count": 1, "ranks": [3]}, "f.json: field 'ranks': found [3]; expected an object with values of type int"),
        ({"count": 1, "ranks": {"a.b": "3"}}, "f.json: field 'ranks.a.b': found '3'; expected int"),
        (
            {"count": 1, "new\nline": 0},
            r"f.json: unknown field 'new\nline'; expected one of: count, name, flag, kind, limit, loops, inner, ranks",
        ),
    ],
)
def test_wrong_fields_are_refused_by_name(data, message):
    with pytest.raises(UserError) as error:
        from_mapping(Outer, data, "f.json")
    assert str(error.value) == message


MODEL = ModelConfig(
    family="llama",
    vocab_size=100,
    hidden_size=32,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_position_embeddings=128,
    activation="silu",
    gated_mlp=True,
    norm_type="rmsnorm",
    norm_eps=1e-5,
    rope_theta=10000.0,
    rotary_fraction=1.0,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    parallel_residual=False,
    tie_embeddings=False,
    scale_embeddings=False,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "field 'vocab_size': found 0; expected a positive number"),
        ({"num_layers": -1}, "field 'num_layers': found -1; expected a positive number"),
        ({"norm_eps": math.nan}, "field 'norm_eps': found nan; expected a positive number"),
        ({"rope_theta": math.inf}, "field 'rope_theta': found inf; expected a positive number"),
        ({"num_kv_heads": 3}, "field 'num_kv_heads': found 3; expected a divisor of num_heads = 4"),
        ({"rotary_fraction": 1.5}, r"field 'rotary_fraction': found 1.5; expected a number in \(0, 1\]"),
        ({"rotary_fraction": 0.4}, "field 'rotary_fraction': 0.4 of head_dim 8 is 3 dimensions; expected an even"),
    ],
)
def test_model_sizes_out_of_range_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(MODEL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_loops": 0}, "field 'num_loops': found 0; expected a positive number"),
        ({"prefix_length": -1}, "field 'prefix_length': found -1; expected 0 or more"),
        ({"head_lora_rank": -2}, "field 'head_lora_rank': found -2; expected 0 or more"),
        ({"head_lora_rank": 2}, "field 'head_lora_rank': found 2; expected 0 for num_loops = 1"),
        ({"exit_translators": True}, "field 'exit_translators': found true; expected false for num_loops = 1"),
        ({"num_loops": 2, "exit_loops": (1,)}, r"field 'exit_loops': found 1; expected loops in \[0, 1\)"),
    ],
)
def test_recursion_out_of_range_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        RecursiveConfig(**change)


def test_negative_rank_is_refused_and_no_rank_is_false():
    with pytest.raises(UserError, match=r"field 'lora_rank\.kv': found -1"):
        LoraRanks(kv=-1)
    assert not LoraRanks() and LoraRanks(ffn=1)
    assert str(LoraRanks.uniform(8)) == "8" and str(LoraRanks(q=1)) == "q 1, kv 0, out 0, ffn 0"


def test_ranks_of_matrices_override_their_groups_and_survive_json():
    ranks = LoraRanks(q=4, kv=99, matrices={"layers.2.attn.q": 0, "layers.0.mlp.down": 7})
    found = [ranks.of(MODEL, *matrix) for matrix in ((2, "attn.q"), (1, "attn.q"), (0, "mlp.down"), (1, "attn.v"))]
    assert found == [0, 4, 7, 16]  # a group's rank is capped
    recursion = RecursiveConfig(num_loops=2, lora_rank=ranks)
    recursion.check_fits(MODEL)
    assert from_mapping(RecursiveConfig, json.loads(json.dumps(to_mapping(recursion))), "f.json") == recursion
    assert {recursion: 1}[dataclasses.replace(recursion)] == 1
    assert recursion != dataclasses.replace(recursion, lora_rank=LoraRanks(q=4, kv=99))
    assert LoraRanks(matrices={"layers.0.attn.q": 1}) and not LoraRanks(matrices={"layers.0.attn.q": 0})
    assert str(ranks) == "q 4, kv 99, out 0, ffn 0, 2 matrices 0 to 7"
    assert str(LoraRanks.uniform(8, is_budget=True)) == "budget 8"


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({"layers.0.attn.q": -1}, r"field 'lora_rank\.matrices\.layers\.0\.attn\.q': found -1; expected 0 \(no LoRA\)"),
        (
            {"layers.3.attn.q": 1},
            r"field 'lora_rank\.matrices': found 'layers\.3\.attn\.q'; expected layers\.K\.LINEAR with",
        ),
        (
            {"stack.layers.0.attn.q": 1},
            r"found 'stack\.layers\.0\.attn\.q'; .* K in \[0, 3\) and LINEAR one of attn\.q, ",
        ),
        (
            {"layers.0.attn.k": 17},
            r"'lora_rank\.matrices\.layers\.0\.attn\.k': found 17; expected at most 16, .* of 16 x 32",
        ),
    ],
)
def test_ranks_of_matrices_that_cannot_be_are_refused(matrices, message):
    with pytest.raises(UserError, match=message):
        RecursiveConfig(num_loops=2, lora_rank=LoraRanks(matrices=matrices)).check_fits(MODEL)


def test_only_what_differs_between_depths_relaxes():
    assert not RecursiveConfig(num_loops=2, untie_norms=True).is_relaxed
    assert RecursiveConfig(num_loops=2, lora_rank=LoraRanks(q=1)).is_relaxed
    assert RecursiveConfig(num_loops=2, prefix_length=1).is_relaxed


def test_depths_share_layers_in_a_cycle_in_sequence_or_back_and_forth():
    layers = {
        "cycle": [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)],
        "cycle-rev": [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0)],
        "sequence": [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)],
    }
    for sharing, places in layers.items():
        assert list(RecursiveConfig(num_loops=2, sharing=sharing).places(MODEL)) == places
        assert RecursiveConfig(sharing=sharing).places(MODEL) == tuple((0, layer) for layer in range(6))
    three = RecursiveConfig(num_loops=3, sharing="cycle-rev").places(MODEL)
    assert [layer for _, layer in three] == [0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("field", [dict(exit_loops=(0,)), dict(head_lora_rank=3), dict(exit_translators=True)])
def test_sharing_in_sequence_is_refused_with_exits(field):
    with pytest.raises(UserError, match=rf"field '{next(iter(field))}': found .* with sharing 'sequence'"):
        RecursiveConfig(num_loops=2, sharing="sequence", **field)
    RecursiveConfig(num_loops=2, sharing="cycle-rev", **field)


def test_loops_must_divide_the_depth():
    assert RecursiveConfig(num_loops=3).layers_per_loop(MODEL) == 2
    with pytest.raises(UserError, match="'num_loops': found 4, which does not divide the base's 6 layers; expected"):
        RecursiveConfig(num_loops=4).layers_per_loop(MODEL)
