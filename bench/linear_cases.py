"""The linears of one shared layer as cases: what they cost at least, and ways to compute them.

Dimensions: M rows, K in, N out, R rank, S segments (q, k, v or gate, up) with adapters of their own.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import Rates, Timer, Variant, copies_beyond_cache, speedup, spread
from rrt import ops
from rrt.errors import UserError
from rrt.model.config import ModelConfig

BASELINES = {
    "base": "F.linear on the plain weight, no LoRA at all",
    "unfused": "F.linear, then per loop group index_select, two small GEMMs, index_add",
    "concatenated": "F.linear, two GEMMs of all loops' LoRAs concatenated along the rank, other loops masked to 0",
    "merged": "per loop group index_select, one GEMM with a dense weight of its own, index_copy",
    "prefill": "rrt.ops.loop_lora_prefill; on CUDA, with one loop",
}
"""What `ours`, rrt.ops.loop_lora_linear, is compared with. At rank 0 they are all `base` and only it is run.

The baselines get the rows of each loop and the mask for nothing; ours finds them in `loops`. With one loop no
baseline selects, masks or scatters.
"""

READING = "reading"
"""On a CPU: going through a copy of W in the same rounds. What memory gives there changes within a run."""

AGREEMENT = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference between variants before the bench refuses to time them, relative to the norm."""


@dataclass(frozen=True)
class Projection:
    """One matrix product of the layer as it is run: fused where the inputs are the same."""

    name: str
    inputs: int
    segments: tuple[int, ...]
    """Outputs of each part with an adapter of its own."""
    bias: bool = False

    @property
    def outputs(self) -> int:
        return sum(self.segments)

    def ranks(self, rank: int) -> tuple[int, ...]:
        """Rank of each segment, capped at min(in, out) as the model does."""
        return tuple(min(rank, self.inputs, out) for out in self.segments)

    def slices(self) -> list[slice]:
        """The outputs of each segment."""
        ends = [sum(self.segments[: s + 1]) for s in range(len(self.segments))]
        return [slice(end - out, end) for end, out in zip(ends, self.segments, strict=True)]

    def adapter_numbers(self, rank: int) -> int:
        """Parameters of one loop's adapters: per segment A [R, K] and B [N, R]."""
        ranks = zip(self.ranks(rank), self.segments, strict=True)
        return sum(r * (self.inputs + out) for r, out in ranks)

    def min_bytes(self, rows: int, rank: int, loops: int, itemsize: int) -> int:
        """Bytes that any exact kernel moves: W and bias once, A and B once per loop present, x and y once."""
        weight = self.inputs * self.outputs + self.outputs * self.bias
        ends = rows * (self.inputs + self.outputs)
        return itemsize * (weight + loops * self.adapter_numbers(rank) + ends)

    def flops(self, rows: int, rank: int) -> int:
        """Multiplications and additions of W x, A x and B A x, unmerged: every row goes through one loop's adapters."""
        return 2 * rows * (self.inputs * self.outputs + self.adapter_numbers(rank))


def projections(config: ModelConfig) -> list[Projection]:
    """q,k,v fused, out, gate,up fused (or up), down."""
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.use_bias
    gated = config.gated_mlp
    return [
        Projection("q,k,v", hidden, (width, kv_width, kv_width), bias),
        Projection("out", width, (hidden,), bias),
        Projection("gate,up" if gated else "up", hidden, (inner, inner) if gated else (inner,), bias),
        Projection("down", inner, (hidden,), bias),
    ]


def base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def unfused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Sequence[Tensor]],
    groups: Sequence[Tensor],
    slices: Sequence[slice],
) -> Tensor:
    """a[loop] [sum of R, K], b[loop][segment] [N of it, R of it], groups[loop]: its rows."""
    y = F.linear(x, weight, bias)
    for a_of_loop, b_of_loop, rows in zip(a, b, groups, strict=True):
        alone = len(groups) == 1
        shrunk = F.linear(x if alone else x.index_select(0, rows), a_of_loop)
        parts = shrunk.split([part.shape[1] for part in b_of_loop], dim=1)
        for part, b_part, out in zip(parts, b_of_loop, slices, strict=True):
            if alone:
                y[:, out] += F.linear(part, b_part)
            else:
                y[:, out].index_add_(0, rows, F.linear(part, b_part))
    return y


def concatenated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Sequence[Tensor],
    mask: Tensor | None,
    slices: Sequence[slice],
) -> Tensor:
    """a [sum over segments and loops of R, K], b[segment] [N of it, loops * R of it], mask of x's dtype, as x a^T."""
    y = F.linear(x, weight, bias)
    shrunk = F.linear(x, a)
    if mask is not None:
        shrunk *= mask
    for part, b_part, out in zip(shrunk.split([part.shape[1] for part in b], dim=1), b, slices, strict=True):
        y[:, out] += F.linear(part, b_part)
    return y


def merged(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, groups: Sequence[Tensor]) -> Tensor:
    """weights[loop] [N, K]."""
    if len(groups) == 1:
        return F.linear(x, weights[0], bias)
    y = x.new_empty(x.shape[0], weights[0].shape[0])
    for weight, rows in zip(weights, groups, strict=True):
        y.index_copy_(0, rows, F.linear(x.index_select(0, rows), weight, bias))
    return y


@dataclass(frozen=True)
class Weights:
    """Copies of a projection's base weight, all of the same values."""

    projection: Projection
    plain: list[Tensor]
    packed: list[Tensor]
    bias: Tensor | None

    @classmethod
    def make(
        cls, projection: Projection, copies: int, dtype: torch.dtype, device: torch.device, pack: bool
    ) -> "Weights":
        shape = (projection.outputs, projection.inputs)
        plain = _clones(normal(shape, projection.inputs, dtype, device), copies)
        packed = [ops.pack_linear(weight) for weight in plain] if pack else plain
        bias = normal((projection.outputs,), 1, dtype, device) if projection.bias else None
        return cls(projection, plain, packed, bias)

    def read(self, index: int) -> Tensor:
        """Reads a copy as fast as this machine can: sums it, narrow numbers in pairs as if they were of fp32."""
        numbers = self.plain[index].flatten()
        if numbers.itemsize < 4:
            numbers = numbers[: len(numbers) // 2 * 2].view(torch.float32)
        return numbers.sum()


@dataclass(frozen=True)
class Adapters:
    """Copies of the adapters of a number of loops, in the form that each variant reads fastest."""

    ranks: tuple[int, ...]
    lora_a: list[Tensor]
    """[loops, sum of R, K], packed or not: what ours reads."""
    lora_b: list[Tensor]
    """[loops, N, largest R], packed or not."""
    a: list[list[Tensor]]
    """Per loop [sum of R, K]."""
    b: list[list[list[Tensor]]]
    """Per loop and segment [N of it, R of it]."""
    a_concatenated: list[Tensor]
    """[sum over segments and loops of R, K], segment after segment."""
    b_concatenated: list[list[Tensor]]
    """Per segment [N of it, loops * R of it]."""

    @classmethod
    def make(cls, weights: Weights, rank: int, loops: int, pack: bool) -> "Adapters":
        projection, like = weights.projection, weights.plain[0]
        ranks, copies = projection.ranks(rank), len(weights.plain)
        a = normal((loops, sum(ranks), projection.inputs), projection.inputs, like.dtype, like.device)
        parts = [
            normal((loops, out, r), max(1, r), like.dtype, like.device)
            for out, r in zip(projection.segments, ranks, strict=True)
        ]
        b = torch.cat([F.pad(part, (0, max(ranks) - part.shape[2])) for part in parts], dim=1)
        a_parts = a.split(ranks, dim=1)
        a_cat = torch.cat([part.flatten(0, 1) for part in a_parts])
        b_cat = [part.transpose(0, 1).flatten(1).contiguous() for part in parts]
        form = ops.pack_linear if pack else torch.clone
        return cls(
            ranks,
            [form(a) for _ in range(copies)],
            [form(b) for _ in range(copies)],
            [list(copy) for copy in _clones(a, copies)],
            [[[part[loop].clone() for part in parts] for loop in range(loops)] for _ in range(copies)],
            _clones(a_cat, copies),
            [[part.clone() for part in b_cat] for _ in range(copies)],
        )


def normal(shape: tuple[int, ...], fan_in: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers of variance 1/fan_in. Large tensors repeat them, at a prime period: drawing takes long.

    Drawn on the CPU: a CUDA generator does not outlive a graph capture that failed.
    """
    count = math.prod(shape)
    numbers = torch.randn(min(count, 1048583)).div_(fan_in**0.5).to(device, dtype)
    return numbers.repeat(-(-count // max(1, len(numbers))))[:count].view(shape)


def _clones(tensor: Tensor, copies: int) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(copies - 1))]


def mixed_loops(rows: int, loops: int) -> Tensor:
    """int32 [rows]: every loop as often as the others, in random order."""
    return (torch.arange(rows, dtype=torch.int32) % loops)[torch.randperm(rows)]


def make_variants(weights: Weights, adapters: Adapters, x: Tensor, loops: Tensor) -> dict[str, Variant]:
    """`ours` and the baselines on one input; at rank 0 `ours` and `base`. Every loop of the adapters is present."""
    projection, bias, ranks = weights.projection, weights.bias, adapters.ranks
    segments, slices, copies = projection.segments, projection.slices(), len(weights.plain)
    num_loops = len(adapters.a[0])
    groups = [(loops == loop).nonzero().squeeze(1) for loop in range(num_loops)]
    # Column (segment, loop, r) of the concatenated A x is kept in the rows of that loop.
    owner = torch.cat([torch.arange(num_loops).repeat_interleave(r) for r in ranks]).to(x.device)
    mask = (loops[:, None] == owner).to(x.dtype) if num_loops > 1 else None

    def run_ours(i: int) -> Tensor:
        lora_a, lora_b = adapters.lora_a[i], adapters.lora_b[i]
        return ops.loop_lora_linear(x, weights.packed[i], bias, lora_a, lora_b, loops, segments, ranks)

    def run_prefill(i: int) -> Tensor:
        lora_a, lora_b = adapters.lora_a[i], adapters.lora_b[i]
        return ops.loop_lora_prefill(x, weights.plain[i], bias, lora_a, lora_b, 0, segments, ranks)

    def run_merged(i: int) -> Tensor:
        # Copies of W stand for W + B A: the values do not change the time, and the memory is there.
        return merged(x, [weights.plain[(i + loop) % copies] for loop in range(num_loops)], bias, groups)

    variants = {"ours": Variant(run_ours), "base": Variant(lambda i: base(x, weights.plain[i], bias))}
    if any(ranks):
        variants["unfused"] = Variant(
            lambda i: unfused(x, weights.plain[i], bias, adapters.a[i], adapters.b[i], groups, slices)
        )
        variants["concatenated"] = Variant(
            lambda i: concatenated(
                x, weights.plain[i], bias, adapters.a_concatenated[i], adapters.b_concatenated[i], mask, slices
            )
        )
        variants["merged"] = Variant(run_merged, copies_read=num_loops)
    if any(ranks) and num_loops == 1 and x.is_cuda:
        variants["prefill"] = Variant(run_prefill)
    return variants


def check_agreement(results: dict[str, Tensor], expected: str, where: str) -> None:
    """Raises RuntimeError if any result is not, to rounding, that of `expected`."""
    wanted = results[expected].double()
    for name, result in results.items():
        difference = float((result.double() - wanted).norm() / wanted.norm())
        limit = AGREEMENT[result.dtype]
        if not difference <= limit:
            raise RuntimeError(
                f"{where}: {name} differs from {expected} by {difference:.2g} of its norm; expected at most {limit:.0e}"
            )


@dataclass(frozen=True)
class LinearPlan:
    """What is to be measured of the linears."""

    projections: list[Projection]
    rows: list[int]
    ranks: list[int]
    loops: list[int]
    dtype: torch.dtype
    device: torch.device
    pack: bool
    cache_bytes: int
    budget_bytes: int

    def groups(self) -> list[tuple[int, int, list[int]]]:
        """Per projection: rank, loops mixed, and the numbers of rows in which so many loops can be."""
        pairs = [(rank, loops) for rank in self.ranks for loops in self.loops]
        groups = [(rank, loops, [rows for rows in self.rows if rows >= loops]) for rank, loops in pairs]
        return [group for group in groups if group[2]]

    def num_cases(self) -> int:
        return len(self.projections) * sum(len(rows) for _, _, rows in self.groups())

    def held_bytes(self, projection: Projection) -> int:
        """What a copy of the projection's weights takes, with the largest adapters, in all forms."""
        forms = 3  # ours, unfused, concatenated
        adapters = forms * max(self.loops) * projection.adapter_numbers(max(self.ranks))
        return self.dtype.itemsize * (2 * projection.inputs * projection.outputs + adapters)

    def copies(self, projection: Projection) -> int:
        weight_bytes = self.dtype.itemsize * projection.inputs * projection.outputs
        return copies_beyond_cache(weight_bytes, self.held_bytes(projection), self.cache_bytes, self.budget_bytes)

    def is_cold(self, projection: Projection) -> bool:
        """Whether the budget allows copies enough that none is in the cache when its turn comes."""
        weight_bytes = self.dtype.itemsize * projection.inputs * projection.outputs
        return (self.copies(projection) - 1) * weight_bytes >= 4 * self.cache_bytes

    def needed_bytes(self) -> int:
        """The most memory that any projection needs. Raises `UserError` if it exceeds the budget."""
        needed = max(self.copies(projection) * self.held_bytes(projection) for projection in self.projections)
        if needed > self.budget_bytes:
            raise UserError(
                f"--memory-gib: found {self.budget_bytes / 2**30:.2f}; the weights take {needed / 2**30:.2f} GiB: "
                "expected more, or fewer --ranks or --loops"
            )
        return needed


def run_linear(plan: LinearPlan, timer: Timer, rates: Rates) -> Iterator[dict[str, Any]]:
    """Measure every case; yields a record each, without floors: the rates are final only at the end."""
    for projection in plan.projections:
        rates.probe()
        weights = Weights.make(projection, plan.copies(projection), plan.dtype, plan.device, plan.pack)
        for rank, loops, all_rows in plan.groups():
            yield from _run_group(weights, rank, loops, all_rows, plan.pack, timer)
        del weights  # before the next ones are made


def _run_group(
    weights: Weights, rank: int, loops: int, all_rows: list[int], pack: bool, timer: Timer
) -> Iterator[dict[str, Any]]:
    projection, like = weights.projection, weights.plain[0]
    adapters = Adapters.make(weights, rank, loops, pack)
    for rows in all_rows:
        x = normal((rows, projection.inputs), 1, like.dtype, like.device)
        variants = make_variants(weights, adapters, x, mixed_loops(rows, loops).to(like.device))
        warm_up = {name: variant.call(0) for name, variant in variants.items()}
        # With a LoRA, base computes something else, and merged reads copies of the base weight.
        same = [name for name in warm_up if rank == 0 or name not in ("base", "merged")]
        where = f"{projection.name}, {rows} rows, rank {rank}, {loops} loops"
        check_agreement({name: warm_up[name] for name in same}, same[-1], where)
        del warm_up
        if like.device.type == "cpu":
            variants[READING] = Variant(weights.read)
        samples = timer.measure(variants, len(weights.plain))
        num_bytes = projection.min_bytes(rows, rank, loops, like.itemsize)
        reading = samples.pop(READING, None)
        yield {
            "projection": projection.name,
            "inputs": projection.inputs,
            "segments": projection.segments,
            "rows": rows,
            "rank": rank,
            "segment_ranks": adapters.ranks,
            "loops": loops,
            "bytes": num_bytes,
            "flops": projection.flops(rows, rank),
            "copies": len(weights.plain),
            "rounds": len(samples["ours"]),
            "seconds": {name: spread(values) for name, values in samples.items()},
            "speedup": {name: speedup(samples, "ours", name) for name in samples if name != "ours"},
            **({} if reading is None else _over_reading(samples["ours"], reading, num_bytes / like.nbytes)),
        }


def _over_reading(ours: list[float], reading: list[float], size: float) -> dict[str, Any]:
    """Ours against reading as many bytes, `size` times those of `reading`, in the same rounds."""
    ratios = [a / (size * b) for a, b in zip(ours, reading, strict=True)]
    return {"reading": spread([size * seconds for seconds in reading]), "over_reading": statistics.median(ratios)}


def run_layers(plan: LinearPlan, timer: Timer) -> Iterator[dict[str, Any]]:
    """Measure the projections of a layer one after the other as one call; yields records as `run_linear` does.

    Less than the sum of their times where a launch hides behind the one before. All weights are held at once.
    """
    weight_bytes = sum(p.inputs * p.outputs for p in plan.projections) * plan.dtype.itemsize
    held_bytes = sum(plan.held_bytes(p) for p in plan.projections)
    copies = copies_beyond_cache(weight_bytes, held_bytes, plan.cache_bytes, plan.budget_bytes)
    weights = [Weights.make(p, copies, plan.dtype, plan.device, plan.pack) for p in plan.projections]
    for rank, loops, all_rows in plan.groups():
        adapters = [Adapters.make(of_projection, rank, loops, plan.pack) for of_projection in weights]
        for rows in all_rows:
            loop_of_row = mixed_loops(rows, loops).to(plan.device)
            inputs = [normal((rows, p.inputs), 1, plan.dtype, plan.device) for p in plan.projections]
            parts = [make_variants(*each, loop_of_row) for each in zip(weights, adapters, inputs, strict=True)]
            variants = {name: _one_after_the_other([part[name] for part in parts]) for name in parts[0]}
            for variant in variants.values():
                variant.call(0)
            samples = timer.measure(variants, copies)
            yield {
                "projection": "layer",
                "rows": rows,
                "rank": rank,
                "loops": loops,
                "parts": [
                    {
                        "bytes": p.min_bytes(rows, rank, loops, plan.dtype.itemsize),
                        "flops": p.flops(rows, rank),
                    }
                    for p in plan.projections
                ],
                "bytes": sum(p.min_bytes(rows, rank, loops, plan.dtype.itemsize) for p in plan.projections),
                "flops": sum(p.flops(rows, rank) for p in plan.projections),
                "copies": copies,
                "rounds": len(samples["ours"]),
                "seconds": {name: spread(values) for name, values in samples.items()},
                "speedup": {name: speedup(samples, "ours", name) for name in samples if name != "ours"},
            }


def _one_after_the_other(parts: list[Variant]) -> Variant:
    def run(i: int) -> Tensor:
        for part in parts:
            result = part.call(i)
        return result

    return Variant(run, copies_read=parts[0].copies_read)


def add_floors(records: list[dict[str, Any]], rates: Rates) -> None:
    """Add to each record `floor_seconds`, what sets it (`bound`), and every variant's `over_floor`.

    A record with parts has the sum of their floors.

    Where ours multiplies faster than any F.linear of the run, its rate is the best matmul rate.
    """
    for record in records:
        rate = record["flops"] / record["seconds"]["ours"]["median"]
        rates.matmul["ours"] = max(rates.matmul.get("ours", 0.0), rate)
    for record in records:
        floors = [rates.floor(part["bytes"], part["flops"]) for part in record.get("parts", [record])]
        record["floor_seconds"] = sum(seconds for seconds, _ in floors)
        record["bound"] = "bytes" if all(bound == "bytes" for _, bound in floors) else "flops"
        _add_over_floor(record)


def layer_records(records: list[dict[str, Any]], num_projections: int) -> list[dict[str, Any]]:
    """The whole layer: its projections one after the other, as the sums of their medians and of their floors."""
    groups: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["rank"], record["loops"], record["rows"]), []).append(record)
    layers = []
    for (rank, loops, rows), group in groups.items():
        if len(group) != num_projections:
            continue
        medians = {name: sum(record["seconds"][name]["median"] for record in group) for name in group[0]["seconds"]}
        layer: dict[str, Any] = {
            "projection": "layer",
            "rows": rows,
            "rank": rank,
            "loops": loops,
            **{key: sum(record[key] for record in group) for key in ("bytes", "flops", "floor_seconds")},
            "bound": "bytes" if all(record["bound"] == "bytes" for record in group) else "flops",
            "seconds": {name: {"median": median} for name, median in medians.items()},
            "speedup": {name: medians[name] / medians["ours"] for name in medians if name != "ours"},
        }
        _add_over_floor(layer)
        layers.append(layer)
    return layers


def _add_over_floor(record: dict[str, Any]) -> None:
    floor = record["floor_seconds"]
    record["over_floor"] = {name: seconds["median"] / floor for name, seconds in record["seconds"].items()}
