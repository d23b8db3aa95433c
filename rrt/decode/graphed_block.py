"""Passes of decode rows as CUDA graphs, recorded once for every bucket of sizes and then replayed.

A narrow layer's kernels take less time than their launches, and a pass has some ten for each layer. A recorded pass has
fixed sizes and addresses: decode rows are copied into a bucket of 1, 2, 4, ... rows, kv-only ones into one of 0, 1, 4,
16, ..., their block tables into 8, 16, ... pages, and the rest is padding, which writes nothing and attends to nothing.
Nothing here has run on a GPU yet: the tests replay on the CPU, without a graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rrt.decode.decoder import Decoder
from rrt.decode.passes import DecodePlan, PassPlan

_NO_SLOT = -1
_LEAST_PAGES = 8


@dataclass(frozen=True)
class Bucket:
    """Sizes of a recorded pass.

    Attributes:
        loop: of all rows, where a model's loops run different layers.
    """

    num_kv_only: int
    num_decoding: int
    num_pages: int
    loop: int | None


@dataclass(frozen=True)
class _Recording:
    """A pass's tensors at fixed addresses.

    Attributes:
        x: [N, D], before the pass.
        out: the same, after `replay`.
    """

    x: Tensor
    plan: DecodePlan
    out: Tensor
    replay: Callable[[], None]


class GraphedBlock:
    """Runs passes as `Decoder.block` does, those of decode rows alone by graphs.

    Args:
        decoder: on a GPU, or on the CPU for tests.
        max_rows: of a pass that is recorded; larger ones, and those with prefill chunks, go through the decoder.
        max_recordings: that are kept; then the one that was not used for longest goes.
    """

    def __init__(self, decoder: Decoder, max_rows: int = 256, max_recordings: int = 128) -> None:
        self._decoder, self._max_rows, self._max_recordings = decoder, max_rows, max_recordings
        self._mixes_loops = decoder.model.recursion.sharing == "cycle"
        self._recordings: dict[Bucket, _Recording] = {}
        """In the order in which they were last used."""
        self._pool: Any = None

    @property
    def num_recordings(self) -> int:
        return len(self._recordings)

    @torch.inference_mode()
    def __call__(self, x: Tensor, plan: PassPlan) -> Tensor:
        """Run one pass: see `Decoder.block`."""
        rows = plan.decode
        if plan.prefills or not 0 < len(x) <= self._max_rows:
            return self._decoder.block(x, plan)
        kept, decoding = rows.num_kv_only, len(x) - rows.num_kv_only
        bucket = Bucket(
            _round_up(kept, 4),
            _round_up(decoding, 2),
            max(_LEAST_PAGES, _round_up(rows.block_tables.shape[1], 2)),
            None if self._mixes_loops else rows.loop,
        )
        recording = self._recordings.pop(bucket, None)
        if recording is None:
            if len(self._recordings) == self._max_recordings:
                del self._recordings[next(iter(self._recordings))]
            recording = self._record(bucket)
        self._recordings[bucket] = recording
        places = torch.arange(len(x), device=x.device)
        places[kept:] += bucket.num_kv_only - kept
        _fill(recording, x, rows, places)
        recording.replay()
        return recording.out[places]

    def _record(self, bucket: Bucket) -> _Recording:
        weight, rows = self._decoder.model.embed, bucket.num_kv_only + bucket.num_decoding
        device = weight.device

        def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        plan = DecodePlan(
            numbers(rows).fill_(bucket.loop or 0),
            bucket.loop,
            numbers(rows),
            numbers(rows, dtype=torch.int64).fill_(_NO_SLOT),
            bucket.num_kv_only,
            numbers(bucket.num_decoding, bucket.num_pages),
            numbers(bucket.num_decoding),
        )
        x = weight.new_zeros(rows, weight.shape[1])
        out = torch.empty_like(x)

        def run() -> None:
            out.copy_(self._decoder.block(x, PassPlan(plan, ())))

        return _Recording(x, plan, out, self._capture(run) if device.type == "cuda" else run)

    def _capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` launches; padding alone, which leaves the cache as it is."""
        device = self._decoder.model.embed.device
        with torch.cuda.device(device):
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                # What is allocated or loaded at a first call must not be in the graph.
                run()
                run()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                run()
        # Passes follow one another, so that all graphs share the memory in between.
        self._pool = self._pool or graph.pool()

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        return replay


def _fill(recording: _Recording, x: Tensor, rows: DecodePlan, places: Tensor) -> None:
    """Put rows at their `places` [N] of a recording, and padding everywhere else."""
    plan = recording.plan
    decoding = slice(0, len(rows.context_lens))
    recording.x[places] = x
    plan.loops[places] = rows.loops
    plan.positions[places] = rows.positions
    plan.slot_mapping.fill_(_NO_SLOT)
    plan.slot_mapping[places] = rows.slot_mapping
    plan.context_lens.zero_()
    plan.context_lens[decoding] = rows.context_lens
    plan.block_tables[decoding, : rows.block_tables.shape[1]] = rows.block_tables


def _round_up(count: int, base: int) -> int:
    """Return the next power of `base`, or 0."""
    power = 1
    while power < count:
        power *= base
    return power if count else 0
