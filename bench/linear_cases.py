"""Benchmark cases of the linears of one shared layer: sizes, bytes and FLOPs, measured times and their floors."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.linear_variants import (
    Adapters,
    DisagreementError,
    Projection,
    Tiles,
    Weights,
    check_agreement,
    make_variants,
    mixed_loops,
    normal,
)
from bench.timing import Rates, Timer, Variant, copies_beyond_cache, speedup, spread
from rrt.errors import UserError

READING = "reading"
"""On a CPU: going through a copy of W in the same rounds, since the memory's speed changes within a run."""


@dataclass(frozen=True)
class LinearSpec:
    """The cases to measure: all combinations of projection, rows, rank and number of loops.

    Attributes:
        loops: numbers of loops that the rows are mixed of.
        should_pack: time ours on packed weights.
        cache_bytes: size of the last-level cache, beyond which copies of the weights are rotated.
        budget_bytes: memory for those copies.
        tiles: fastest tilings of loop_lora_linear on this GPU, which are timed beside its own choice.
        wrong: what disagreed, a line each: those cases have no record.
    """

    projections: list[Projection]
    rows: list[int]
    ranks: list[int]
    loops: list[int]
    dtype: torch.dtype
    device: torch.device
    should_pack: bool
    cache_bytes: int
    budget_bytes: int
    tiles: Tiles | None = None
    wrong: list[str] = field(default_factory=list)

    def groups(self) -> list[tuple[int, int, list[int]]]:
        """List rank, number of loops, and the numbers of rows that can hold as many loops, for every projection."""
        pairs = [(rank, loops) for rank in self.ranks for loops in self.loops]
        groups = [(rank, loops, [rows for rows in self.rows if rows >= loops]) for rank, loops in pairs]
        return [group for group in groups if group[2]]

    def num_cases(self) -> int:
        return len(self.projections) * sum(len(rows) for _, _, rows in self.groups())

    def held_bytes(self, projection: Projection) -> int:
        """Return the bytes of one copy of the projection's weights and largest adapters, in every form that is read."""
        forms = 3  # ours, unfused, concatenated
        adapters = forms * max(self.loops) * projection.adapter_numbers(max(self.ranks))
        return self.dtype.itemsize * (2 * projection.inputs * projection.outputs + adapters)

    def copies(self, projection: Projection) -> int:
        """Return the number of copies of the weights to rotate through."""
        weight_bytes = self.dtype.itemsize * projection.inputs * projection.outputs
        return copies_beyond_cache(weight_bytes, self.held_bytes(projection), self.cache_bytes, self.budget_bytes)

    def is_cold(self, projection: Projection) -> bool:
        """Return True if there are enough copies that none is still in the cache when its turn comes."""
        weight_bytes = self.dtype.itemsize * projection.inputs * projection.outputs
        return (self.copies(projection) - 1) * weight_bytes >= 4 * self.cache_bytes

    def fits(self) -> bool:
        return self._most_bytes() <= self.budget_bytes

    def _most_bytes(self) -> int:
        return max(self.copies(projection) * self.held_bytes(projection) for projection in self.projections)

    def needed_bytes(self) -> int:
        """Return the bytes of the projection that needs most; raise `UserError` if they exceed the budget."""
        needed = self._most_bytes()
        if not self.fits():
            raise UserError(
                f"--memory-gib: found {self.budget_bytes / 2**30:.2f}; the weights take {needed / 2**30:.2f} GiB: "
                "expected more, or fewer --ranks or --loops"
            )
        return needed


def run_linear(spec: LinearSpec, timer: Timer, rates: Rates) -> Iterator[dict[str, Any]]:
    """Measure every case and yield its record, without floors: the rates are final only at the end."""
    for projection in spec.projections:
        rates.probe()
        weights = Weights.make(projection, spec.copies(projection), spec.dtype, spec.device, spec.should_pack)
        for rank, loops, all_rows in spec.groups():
            yield from _run_group(weights, rank, loops, all_rows, spec, timer)
        del weights  # before the next ones are made


def _run_group(
    weights: Weights, rank: int, loops: int, all_rows: list[int], spec: LinearSpec, timer: Timer
) -> Iterator[dict[str, Any]]:
    projection, like = weights.projection, weights.plain[0]
    adapters = Adapters.make(weights, rank, loops, spec.should_pack)
    for rows in all_rows:
        x = normal((rows, projection.inputs), 1, like.dtype, like.device)
        variants = make_variants(weights, adapters, x, mixed_loops(rows, loops).to(like.device), spec.tiles)
        warm_up = {name: variant.call(0) for name, variant in variants.items()}
        # With a LoRA, base computes something else, and merged reads copies of the base weight.
        same = [name for name in warm_up if rank == 0 or name not in ("base", "merged")]
        where = f"{projection.name}, {rows} rows, rank {rank}, {loops} loops"
        try:
            check_agreement({name: warm_up[name] for name in same}, same[-1], where)
        except DisagreementError as error:
            spec.wrong.append(str(error))
            continue
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
    """Divide the time of ours by that of reading as many bytes, `size` times those of `reading`, in the same rounds."""
    ratios = [a / (size * b) for a, b in zip(ours, reading, strict=True)]
    return {"reading": spread([size * seconds for seconds in reading]), "over_reading": statistics.median(ratios)}


def run_layers(spec: LinearSpec, timer: Timer) -> Iterator[dict[str, Any]]:
    """Measure all projections of a layer as one call; yield records as `run_linear` does.

    That is less than the sum of their times where launches overlap. All weights are held at once.
    """
    weight_bytes = sum(p.inputs * p.outputs for p in spec.projections) * spec.dtype.itemsize
    held_bytes = sum(spec.held_bytes(p) for p in spec.projections)
    copies = copies_beyond_cache(weight_bytes, held_bytes, spec.cache_bytes, spec.budget_bytes)
    weights = [Weights.make(p, copies, spec.dtype, spec.device, spec.should_pack) for p in spec.projections]
    for rank, loops, all_rows in spec.groups():
        adapters = [Adapters.make(own, rank, loops, spec.should_pack) for own in weights]
        for rows in all_rows:
            loop_of_row = mixed_loops(rows, loops).to(spec.device)
            inputs = [normal((rows, p.inputs), 1, spec.dtype, spec.device) for p in spec.projections]
            parts = [
                make_variants(*each, loop_of_row, spec.tiles) for each in zip(weights, adapters, inputs, strict=True)
            ]
            variants = {name: _in_sequence([part[name] for part in parts]) for name in parts[0]}
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
                        "bytes": p.min_bytes(rows, rank, loops, spec.dtype.itemsize),
                        "flops": p.flops(rows, rank),
                    }
                    for p in spec.projections
                ],
                "bytes": sum(p.min_bytes(rows, rank, loops, spec.dtype.itemsize) for p in spec.projections),
                "flops": sum(p.flops(rows, rank) for p in spec.projections),
                "copies": copies,
                "rounds": len(samples["ours"]),
                "seconds": {name: spread(values) for name, values in samples.items()},
                "speedup": {name: speedup(samples, "ours", name) for name in samples if name != "ours"},
            }


def _in_sequence(parts: list[Variant]) -> Variant:
    def run(i: int) -> Tensor:
        for part in parts:
            result = part.call(i)
        return result

    return Variant(run, copies_read=parts[0].copies_read)


def add_floors(records: list[dict[str, Any]], rates: Rates) -> None:
    """Add to each record `floor_seconds`, its `bound` (bytes or flops), and every variant's `over_floor`.

    A record with parts has the sum of their floors. Where ours multiplies faster than any F.linear of the run, its
    rate is the best matmul rate.
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
    """Make records of the whole layer: sums of its projections' median times and floors, where all were measured."""
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
