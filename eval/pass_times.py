"""Times of the parts of a pass, measured on the decoder with dummy weights.

The pass has M decode rows, each of a sequence of its own at the middle of its generation. Parts: embedding, block with
all rows at one loop, block with rows spread over the loops, keys and values of skipped loops, final norm and head.
Times include the launches.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.simulate import Costs, Curve
from rrt.decode.decoder import Decoder
from rrt.decode.kv_cache import PagedCache
from rrt.decode.passes import Chunk, PassRows
from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.meta import meta_model
from rrt.model.transformer import RecursiveTransformer

PAGE_SIZE = 16
MIN_ROUNDS = 3


@dataclass(frozen=True)
class PassTimes:
    """Median seconds of the parts of a pass of `rows` rows; None where a model has no such part.

    Attributes:
        block: all rows at one loop; `mixed`: rows spread over the loops.
        kv_only: extra time of a pass with `rows * (B - 1)` kv-only rows beside its own.
    """

    rows: int
    embed: float
    block: float
    mixed: float | None
    kv_only: float | None
    head: float


def dummy_model(
    config: ModelConfig, recursion: RecursiveConfig, dtype: torch.dtype, device: torch.device
) -> RecursiveTransformer:
    """Make a model with random weights."""
    model = meta_model(config, recursion).to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def batch_sizes(largest: int) -> list[int]:
    """List 1, 2, 4, ... and the largest."""
    return sorted({largest, *itertools.takewhile(lambda size: size < largest, (2**i for i in itertools.count()))})


def _with_context(model: RecursiveTransformer, num_sequences: int, length: int) -> tuple[Decoder, list[int]]:
    """Make a decoder whose cache holds `num_sequences` sequences of `length` positions at every loop; return both."""
    config, recursion, weight = model.config, model.recursion, model.embed
    pages = recursion.num_loops * -(-(recursion.prefix_length + length) // PAGE_SIZE) * (num_sequences + 1)
    cache = PagedCache(config, recursion, pages, PAGE_SIZE, weight.dtype, weight.device)
    for values in (cache.k, cache.v):  # new memory may hold subnormals, which are slow
        values.normal_()
    decoder = Decoder(model, cache, max(config.context_length, length))
    sequences = [cache.allocate() for _ in range(num_sequences)]
    for sequence in sequences:
        cache.append(sequence, length)
    return decoder, sequences


def measure_pass(model: RecursiveTransformer, rows: int, length: int, seconds: float) -> PassTimes:
    """Measure passes of `rows` rows at position `length - 1`, the parts in turn, for about `seconds`."""
    config, num_loops, device = model.config, model.recursion.num_loops, model.embed.device
    decoder, sequences = _with_context(model, rows, length)
    plan = decoder.cache.plan
    positions = [length - 1] * rows
    x = torch.randn(rows * num_loops, config.hidden_size, device=device, dtype=model.embed.dtype)
    tokens = torch.randint(config.vocab_size, (rows,), device=device)
    one_loop = plan(PassRows(sequences, [0] * rows, positions))
    calls: dict[str, Callable[[], Tensor]] = {
        "embed": lambda: decoder.embed(tokens),
        "block": lambda: decoder.block(x[:rows], one_loop),
        "head": lambda: decoder.logits(x[:rows]),
    }
    if num_loops > 1:
        spread = plan(PassRows(sequences, np.arange(rows, dtype=np.int32) % num_loops, positions))
        later = np.repeat(np.arange(num_loops - 1, -1, -1, dtype=np.int32), rows)
        with_kv_only = plan(PassRows(sequences * num_loops, later, positions * num_loops, rows * (num_loops - 1)))
        calls["mixed"] = lambda: decoder.block(x[:rows], spread)
        calls["with_kv_only"] = lambda: decoder.block(x, with_kv_only)
    median = _medians(calls, device, seconds)
    kv_only = max(0.0, median["with_kv_only"] - median["block"]) if num_loops > 1 else None
    return PassTimes(rows, median["embed"], median["block"], median.get("mixed"), kv_only, median["head"])


def measure_prefill(model: RecursiveTransformer, prefix: int, seconds: float) -> float:
    """Measure prefill of one prompt of `prefix` tokens through all loops; return the median in seconds."""
    decoder, (sequence,) = _with_context(model, 1, prefix)
    device = model.embed.device
    x = torch.randn(prefix, model.config.hidden_size, device=device, dtype=model.embed.dtype)
    plans = [
        decoder.cache.plan(PassRows(chunks=[Chunk(sequence, loop, 0, prefix)]))
        for loop in range(model.recursion.num_loops)
    ]

    def prefill() -> Tensor:
        y = x
        for plan in plans:
            y = decoder.block(y, plan)
        return y

    return _medians({"prefill": prefill}, device, seconds)["prefill"]


def _medians(calls: dict[str, Callable[[], Tensor]], device: torch.device, seconds: float) -> dict[str, float]:
    """Return each call's median in seconds; they take turns, so that disturbances of the machine hit all of them."""

    def timed(call: Callable[[], Tensor]) -> float:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for call in calls.values():
        timed(call)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for rounds in itertools.count(1):
        for name, call in calls.items():
            samples[name].append(timed(call))
        if rounds >= MIN_ROUNDS and time.perf_counter() - began >= seconds:
            return {name: statistics.median(values) for name, values in samples.items()}
    raise AssertionError("unreachable")


def cost_stages(times: list[PassTimes], num_loops: int, prefill: float) -> Iterator[tuple[str, Costs]]:
    """Yield name and costs of each stage of counting, from the paper's to everything; each adds to the one before.

    Args:
        times: of one model, by increasing rows.
    """
    rows = tuple(point.rows for point in times)

    def curve(name: str, scale: int = 1) -> Curve:
        return Curve(tuple(scale * count for count in rows), tuple(getattr(point, name) for point in times))

    block, ends = curve("block"), {"embed": curve("embed"), "head": curve("head")}
    mixed = {"mixed": curve("mixed")} if num_loops > 1 else {}
    loops = {**mixed, "kv_only": curve("kv_only", num_loops - 1)} if num_loops > 1 else {}
    yield "blocks only", Costs(block)
    yield "embedding, head", Costs(block, **ends)
    yield "LoRA of mixed loops", Costs(block, **ends, **mixed)
    yield "skipped K/V", Costs(block, **ends, **loops)
    yield "head in every pass", Costs(block, **ends, **loops, head_everywhere=True)
    yield "prefill", Costs(block, **ends, **loops, head_everywhere=True, prefill=prefill)
