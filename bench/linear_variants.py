"""The linears of one shared layer, and ways to compute them: ours and the baselines.

Dimensions: M rows, K in, N out, R rank, S segments (q, k, v or gate, up) with adapters of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import Variant
from rrt import ops
from rrt.common.files import read_json
from rrt.errors import UserError
from rrt.model.config import ModelConfig
from rrt.native import force_tiling

BASELINES = {
    "base": "F.linear on the plain weight, no LoRA at all",
    "unfused": "F.linear, then per loop group index_select, two small GEMMs, index_add",
    "concatenated": "F.linear, two GEMMs of all loops' LoRAs concatenated along the rank, other loops masked to 0",
    "merged": "per loop group index_select, one GEMM with a dense weight of its own, index_copy",
    "prefill": "rrt.ops.loop_lora_prefill; on CUDA, with one loop",
    "tuned": "ours with the tiling that bench/tile_sweep.py found fastest; on CUDA, with --tiles",
}
"""Baselines of `ours`, which is rrt.ops.loop_lora_linear. At rank 0 they are all `base` and only it is run.

The baselines get the rows of each loop and the mask for nothing; ours finds them in `loops`. With one loop no
baseline selects, masks or scatters.
"""

AGREEMENT = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference between variants, relative to the norm; beyond it they are not timed."""


@dataclass(frozen=True)
class Projection:
    """A matrix product of the layer as it is run: q, k, v and gate, up are fused."""

    name: str
    inputs: int
    segments: tuple[int, ...]
    """Outputs of each segment."""
    bias: bool = False

    @property
    def outputs(self) -> int:
        return sum(self.segments)

    def ranks(self, rank: int) -> tuple[int, ...]:
        """Return the rank of each segment, capped at min(in, out) as in the model."""
        return tuple(min(rank, self.inputs, out) for out in self.segments)

    def slices(self) -> list[slice]:
        """Return the slice of the outputs that each segment takes."""
        ends = [sum(self.segments[: s + 1]) for s in range(len(self.segments))]
        return [slice(end - out, end) for end, out in zip(ends, self.segments, strict=True)]

    def adapter_numbers(self, rank: int) -> int:
        """Count the parameters of one loop's adapters: per segment A [R, K] and B [N, R]."""
        ranks = zip(self.ranks(rank), self.segments, strict=True)
        return sum(r * (self.inputs + out) for r, out in ranks)

    def min_bytes(self, rows: int, rank: int, loops: int, itemsize: int) -> int:
        """Return how many bytes any exact kernel moves: W, bias, x and y once, A and B once for each loop present."""
        weight = self.inputs * self.outputs + self.outputs * self.bias
        ends = rows * (self.inputs + self.outputs)
        return itemsize * (weight + loops * self.adapter_numbers(rank) + ends)

    def flops(self, rows: int, rank: int) -> int:
        """Count the operations of W x, A x and B A x, unmerged: every row goes through one loop's adapters."""
        return 2 * rows * (self.inputs * self.outputs + self.adapter_numbers(rank))


def projections(config: ModelConfig) -> list[Projection]:
    """Return the projections of a layer: q,k,v fused, out, gate,up fused (or up), down."""
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    gated = config.gated_mlp
    return [
        Projection("q,k,v", hidden, (width, kv_width, kv_width), config.qkv_bias),
        Projection("out", width, (hidden,), config.out_bias),
        Projection("gate,up" if gated else "up", hidden, (inner, inner) if gated else (inner,), config.mlp_bias),
        Projection("down", inner, (hidden,), config.mlp_bias),
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
    """Compute F.linear, then the LoRA of each loop on its rows.

    Args:
        a: per loop [sum of R, K].
        b: per loop and segment [N of it, R of it].
        groups: rows of each loop.
        slices: outputs of each segment.
    """
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
    """Compute F.linear, then the LoRAs of all loops at once, other loops masked to 0.

    Args:
        a: [sum over segments and loops of R, K].
        b: per segment [N of it, loops * R of it].
        mask: of x's dtype and the shape of x a^T; None with one loop.
        slices: outputs of each segment.
    """
    y = F.linear(x, weight, bias)
    shrunk = F.linear(x, a)
    if mask is not None:
        shrunk *= mask
    for part, b_part, out in zip(shrunk.split([part.shape[1] for part in b], dim=1), b, slices, strict=True):
        y[:, out] += F.linear(part, b_part)
    return y


def merged(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, groups: Sequence[Tensor]) -> Tensor:
    """Multiply the rows of each loop by a dense weight of its own, weights[loop] [N, K]."""
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
        cls, projection: Projection, copies: int, dtype: torch.dtype, device: torch.device, should_pack: bool
    ) -> "Weights":
        shape = (projection.outputs, projection.inputs)
        plain = _clones(normal(shape, projection.inputs, dtype, device), copies)
        packed = [ops.pack_linear(weight) for weight in plain] if should_pack else plain
        bias = normal((projection.outputs,), 1, dtype, device) if projection.bias else None
        return cls(projection, plain, packed, bias)

    def read(self, index: int) -> Tensor:
        """Read a copy as fast as the machine can: sum it, 16-bit numbers in pairs as if each pair were one of fp32."""
        numbers = self.plain[index].flatten()
        if numbers.itemsize < 4:
            numbers = numbers[: len(numbers) // 2 * 2].view(torch.float32)
        return numbers.sum()


@dataclass(frozen=True)
class Adapters:
    """Copies of the adapters of a number of loops, in the form that each variant reads fastest."""

    ranks: tuple[int, ...]
    lora_a: list[Tensor]
    """[loops, sum of R, K], packed or not; read by ours."""
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
    def make(cls, weights: Weights, rank: int, loops: int, should_pack: bool) -> "Adapters":
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
        copy_of = ops.pack_linear if should_pack else torch.clone
        return cls(
            ranks,
            [copy_of(a) for _ in range(copies)],
            [copy_of(b) for _ in range(copies)],
            [list(copy) for copy in _clones(a, copies)],
            [[[part[loop].clone() for part in parts] for loop in range(loops)] for _ in range(copies)],
            _clones(a_cat, copies),
            [[part.clone() for part in b_cat] for _ in range(copies)],
        )


def normal(shape: tuple[int, ...], fan_in: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw normal numbers of variance 1/fan_in; large tensors repeat them at a prime period, as drawing takes long.

    Drawn on the CPU: a CUDA generator does not outlive a graph capture that failed.
    """
    count = math.prod(shape)
    numbers = torch.randn(min(count, 1048583)).div_(fan_in**0.5).to(device, dtype)
    return numbers.repeat(-(-count // max(1, len(numbers))))[:count].view(shape)


def _clones(tensor: Tensor, copies: int) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(copies - 1))]


def mixed_loops(rows: int, loops: int) -> Tensor:
    """Draw the loop of each row, int32 [rows]: every loop as often as the others, in random order."""
    return (torch.arange(rows, dtype=torch.int32) % loops)[torch.randperm(rows)]


TILE_ROWS = {"kColumns": 0, "kRows64": 64, "kRows": 128}
"""What `force_tiling` takes for each kernel of csrc/loop_lora/cuda_tiles.h."""


@dataclass(frozen=True)
class Tiles:
    """Fastest tilings of loop_lora_linear, by outputs and inputs: (most rows, kernel, slices), by rows."""

    lines: dict[tuple[int, int], list[tuple[int, str, int]]]

    @classmethod
    def read(cls, path: Path) -> "Tiles":
        """Read a result of bench/tile_sweep.py; raise `UserError` if it is another file."""
        lines: dict[tuple[int, int], list[tuple[int, str, int]]] = {}
        try:
            for record in read_json(path)["tilings"]:
                kernel, slices = min(record["seconds"], key=record["seconds"].get).split()
                line = (record["rows"], kernel, int(slices))
                lines.setdefault((record["outputs"], record["inputs"]), []).append(line)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"--tiles: found {path}; expected a result of bench/tile_sweep.py --json") from None
        return cls({shape: sorted(found) for shape, found in lines.items()})

    def apply(self, call: Variant, projection: Projection, rows: int) -> Variant:
        """Run `call` with the tiling for so many rows; for shapes that were not measured, as the operator chooses."""
        for most, kernel, slices in self.lines.get((projection.outputs, projection.inputs), []):
            if most >= rows:
                return with_tiling(call, kernel, slices)
        return call


def with_tiling(call: Variant, kernel: str, slices: int) -> Variant:
    """Run `call` with a tiling of loop_lora_linear: a kernel of TILE_ROWS, and slices. Restore its own choice."""

    def run(i: int) -> Tensor:
        force_tiling(TILE_ROWS[kernel], slices)
        result = call.call(i)
        force_tiling(0, 0)
        return result

    return Variant(run)


def make_variants(
    weights: Weights, adapters: Adapters, x: Tensor, loops: Tensor, tiles: Tiles | None = None
) -> dict[str, Variant]:
    """Make `ours` and its baselines on one input, at rank 0 only `base`. Every loop of the adapters is present."""
    projection, bias, ranks = weights.projection, weights.bias, adapters.ranks
    segments, slices, copies = projection.segments, projection.slices(), len(weights.plain)
    num_loops = len(adapters.a[0])
    groups = [(loops == loop).nonzero().squeeze(1) for loop in range(num_loops)]
    # Column (segment, loop, r) of x A^T, concatenated, is kept in the rows of that loop.
    loop_of_column = torch.cat([torch.arange(num_loops).repeat_interleave(r) for r in ranks]).to(x.device)
    mask = (loops[:, None] == loop_of_column).to(x.dtype) if num_loops > 1 else None

    def run_ours(i: int) -> Tensor:
        lora_a, lora_b = adapters.lora_a[i], adapters.lora_b[i]
        return ops.loop_lora_linear(x, weights.packed[i], bias, lora_a, lora_b, loops, segments, ranks)

    def run_prefill(i: int) -> Tensor:
        lora_a, lora_b = adapters.lora_a[i], adapters.lora_b[i]
        return ops.loop_lora_prefill(x, weights.plain[i], bias, lora_a, lora_b, 0, segments, ranks)

    def run_merged(i: int) -> Tensor:
        # Copies of W stand for W + B A: the values do not change the time, and the memory is there.
        return merged(x, [weights.plain[(i + loop) % copies] for loop in range(num_loops)], bias, groups)

    variants = {"ours": Variant(run_ours)}
    if tiles is not None:
        variants["tuned"] = tiles.apply(variants["ours"], projection, x.shape[0])
    variants["base"] = Variant(lambda i: base(x, weights.plain[i], bias))
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


class DisagreementError(RuntimeError):
    """A result that is not what it should be; unlike a CUDA error it costs no other case."""


def check_agreement(results: dict[str, Tensor], expected: str, where: str) -> None:
    """Raise `DisagreementError` unless all results agree with that of `expected` within rounding."""
    wanted = results[expected].double()
    for name, result in results.items():
        difference = float((result.double() - wanted).norm() / wanted.norm())
        limit = AGREEMENT[result.dtype]
        if not difference <= limit:
            raise DisagreementError(
                f"{where}: {name} differs from {expected} by {difference:.2g} of its norm; expected at most {limit:.0e}"
            )
