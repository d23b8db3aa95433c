"""Benchmark cases of attention over the paged cache: decode rows and prefill chunks, against SDPA on gathered K and V.

Dimensions: M rows (S sequences of prefill), H query heads, H_kv key/value heads, D_h head width.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.linear_variants import DisagreementError, check_agreement, normal
from bench.timing import Rates, Timer, Variant, copies_beyond_cache, speedup, spread
from rrt import ops

BASELINES = {
    "sdpa": "scaled_dot_product_attention on keys and values that lie gathered, contiguous per head (not timed); on "
    "CUDA by the first of the backends flash, cuDNN, memory-efficient and math that takes the case, which records name",
    "sdpa grouped": "the same, the query heads of a key/value head as its queries; decode with H > H_kv only",
    "sdpa NAME, sdpa grouped NAME": "the same by a further backend; decode on CUDA only, by each that takes the case",
}


@dataclass(frozen=True)
class AttentionSpec:
    """The cases to measure: decode rows and prefill chunks, each at every context length."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    contexts: list[int]
    rows: list[int]
    """Decode rows per case, all of the same context."""
    sequences: list[int]
    """Sequences per prefill case."""
    chunk: int
    """New tokens per sequence of prefill, at the end of its context; at most the context."""
    page_size: int
    dtype: torch.dtype
    device: torch.device
    cache_bytes: int
    budget_bytes: int
    wrong: list[str] = field(default_factory=list)
    """What disagreed, a line each: those cases have no record."""

    def cases(self) -> tuple[list[tuple[str, int, int]], list[tuple[str, int, int]]]:
        """Return the cases to run and those that do not fit in memory, each as kind, rows or sequences, and context."""
        counts = [("decode", rows) for rows in self.rows] + [("prefill", count) for count in self.sequences]
        cases = [(kind, count, context) for kind, count in counts for context in self.contexts]
        # Two copies at least, each held twice: in pages and gathered.
        fits = [4 * self.kv_bytes(count, context) <= self.budget_bytes for _, count, context in cases]
        kept = [case for case, ok in zip(cases, fits, strict=True) if ok]
        return kept, [case for case, ok in zip(cases, fits, strict=True) if not ok]

    def kv_bytes(self, count: int, context: int) -> int:
        """Return the number of bytes of the keys and values of all contexts, at one shared layer."""
        return 2 * count * context * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def min_bytes(self, count: int, context: int, queries: int) -> int:
        """Return how many bytes any exact kernel moves: every key and value once, queries and result once."""
        ends = 2 * count * queries * self.num_heads * self.head_dim * self.dtype.itemsize
        return self.kv_bytes(count, context) + ends

    def flops(self, count: int, context: int, queries: int) -> int:
        """Count the operations of q k^T and p v over the positions that each query sees, without softmax."""
        seen = queries * context - queries * (queries - 1) // 2
        return 4 * count * self.num_heads * self.head_dim * seen


SDPA_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""Fastest first."""


def by_backends(call: Callable[[int], Tensor], device: torch.device) -> Iterator[tuple[str, Variant]]:
    """Yield those of SDPA's backends that take `call`, fastest first, and `call` by each; on a CPU its own choice.

    Left to itself, SDPA falls back to a slow backend without a word. Math counts only where no other takes the case.
    """
    if device.type == "cpu":
        yield "default", Variant(call)
        return
    found = False
    for backend in SDPA_BACKENDS:
        if backend is SDPBackend.MATH and found:
            return

        def run(i: int, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return call(i)

        try:
            with warnings.catch_warnings(action="ignore"):  # of the reasons against a backend
                run(0)
        except RuntimeError:  # no kernel of this backend for the case
            continue
        yield backend.name.removesuffix("_ATTENTION").lower(), Variant(run)
        found = True
    if not found:
        raise RuntimeError("no backend of scaled_dot_product_attention takes the case")


def run_attention(spec: AttentionSpec, timer: Timer, rates: Rates) -> Iterator[dict[str, Any]]:
    """Measure every case and yield its record, without floors."""
    for index, (kind, count, context) in enumerate(spec.cases()[0]):
        if index % 8 == 0:
            rates.probe()
        try:
            yield _run_case(spec, timer, kind, count, context)
        except DisagreementError as error:
            spec.wrong.append(str(error))


def _run_case(spec: AttentionSpec, timer: Timer, kind: str, count: int, context: int) -> dict[str, Any]:
    queries = 1 if kind == "decode" else min(spec.chunk, context)
    kv_bytes = spec.kv_bytes(count, context)
    copies = copies_beyond_cache(kv_bytes, 2 * kv_bytes, spec.cache_bytes, spec.budget_bytes)
    variants, backends = make_variants(spec, kind, count, context, queries, copies)
    check_agreement({name: v.call(0) for name, v in variants.items()}, "sdpa", f"{kind} of {count} at {context}")
    samples = timer.measure(variants, copies)
    return {
        "kind": kind,
        "count": count,
        "context": context,
        "queries": queries,
        "page_size": spec.page_size,
        "sdpa_backends": backends,
        "bytes": spec.min_bytes(count, context, queries),
        "flops": spec.flops(count, context, queries),
        "copies": copies,
        "rounds": len(samples["ours"]),
        "seconds": {name: spread(values) for name, values in samples.items()},
        "speedup": {name: speedup(samples, "ours", name) for name in samples if name != "ours"},
    }


def make_variants(
    spec: AttentionSpec, kind: str, count: int, context: int, queries: int, copies: int
) -> tuple[dict[str, Variant], dict[str, str]]:
    """Make `ours` on pages in random order, and SDPA on the same keys and values; results [count * queries, H, D_h].

    Beside them, the backend of each variant of SDPA.
    """
    heads, kv_heads, dim, device = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.device
    pages_per_row = -(-context // spec.page_size)
    num_pages = copies * count * pages_per_row
    cache_shape = (num_pages, spec.page_size, kv_heads, dim)
    k_cache, v_cache = (normal(cache_shape, 1, spec.dtype, device) for _ in range(2))
    tables = torch.randperm(num_pages).to(device, torch.int32).view(copies, count, pages_per_row).unbind()

    def gather(cache: Tensor) -> list[Tensor]:
        """Gather keys or values of each copy to [count, H_kv, context, D_h]."""
        rows = (cache[table.long()].flatten(1, 2)[:, :context] for table in tables)
        return [row.transpose(1, 2).contiguous() for row in rows]

    k, v = gather(k_cache), gather(v_cache)
    q = normal((count * queries, heads, dim), 1, spec.dtype, device)
    context_lens = torch.full((count,), context, dtype=torch.int32, device=device)
    scale = 1 / math.sqrt(dim)
    gqa = heads != kv_heads
    q_heads = q.view(count, queries, heads, dim).transpose(1, 2)

    baselines: dict[str, Callable[[int], Tensor]] = {}
    if kind == "decode":
        ours = Variant(lambda i: ops.loop_kv_attention(q, k_cache, v_cache, tables[i], context_lens, scale))
        baselines["sdpa"] = lambda i: F.scaled_dot_product_attention(
            q_heads, k[i], v[i], scale=scale, enable_gqa=gqa
        ).reshape_as(q)
        if gqa:
            grouped = q.view(count, kv_heads, heads // kv_heads, dim)
            baselines["sdpa grouped"] = lambda i: F.scaled_dot_product_attention(
                grouped, k[i], v[i], scale=scale
            ).reshape_as(q)
    else:
        starts = torch.arange(count + 1, dtype=torch.int32, device=device) * queries
        ours = Variant(lambda i: ops.loop_kv_prefill(q, k_cache, v_cache, tables[i], starts, context_lens, scale))
        # Not above, since it loads torch's compiler, which takes bench/tabulate.py for a package when Python ends.
        from torch.nn.attention.bias import causal_lower_right

        # A mask that is a tensor would keep the flash backend out; this one only says that it is causal.
        mask = causal_lower_right(queries, context)
        baselines["sdpa"] = lambda i: (
            F.scaled_dot_product_attention(q_heads, k[i], v[i], mask, scale=scale, enable_gqa=gqa)
            .transpose(1, 2)
            .reshape_as(q)
        )
    variants, names = {"ours": ours}, dict[str, str]()
    for name, call in baselines.items():
        for backend, variant in by_backends(call, device):
            key = name if name not in variants else f"{name} {backend}"
            variants[key], names[key] = variant, backend
            if kind != "decode":
                break
    return variants, names
