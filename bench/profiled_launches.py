"""One call of each operator for a profiler to look into: ncu --profile-from-start off python bench/profiled_launches.py

Each case runs once to warm up, then once between cudaProfilerStart and cudaProfilerStop, on Gemma 2B's shapes in bf16:
the row kernel for 8 and for 64 tokens on gate,up, the column kernel for 8 tokens on down, shrink for 64 tokens on down,
and decode attention with head dim 256.

    python bench/profiled_launches.py --device cpu   # the same calls, unprofiled
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

# Without this folder: its tabulate.py would take the place of a library that torch imports.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from bench.linear_variants import Adapters, Weights, make_variants, mixed_loops, normal, projections, with_tiling
from bench.output import check_device_flag
from bench.timing import Variant
from rrt import ops
from rrt.checkpoint.presets import PRESETS, preset
from rrt.common.cli import CommandParser, run_command
from rrt.model.config import ModelConfig

_RANK, _LOOPS = 64, 2
_ROWS, _CONTEXT, _PAGE = 32, 1024, 32


def linear_call(
    config: ModelConfig, name: str, rows: int, tiling: tuple[str, int] | None, device: torch.device
) -> Callable[[], Tensor]:
    projection = next(found for found in projections(config) if found.name == name)
    weights = Weights.make(projection, 1, torch.bfloat16, device, should_pack=False)
    adapters = Adapters.make(weights, _RANK, _LOOPS, should_pack=False)
    x = normal((rows, projection.inputs), 1, torch.bfloat16, device)
    call: Variant = make_variants(weights, adapters, x, mixed_loops(rows, _LOOPS).to(device))["ours"]
    if tiling is not None:
        call = with_tiling(call, *tiling)
    return lambda: call.call(0)


def attention_call(config: ModelConfig, device: torch.device) -> Callable[[], Tensor]:
    pages, dim = -(-_CONTEXT // _PAGE), config.head_dim
    shape = (_ROWS * pages, _PAGE, config.num_kv_heads, dim)
    k_cache, v_cache = (normal(shape, 1, torch.bfloat16, device) for _ in range(2))
    q = normal((_ROWS, config.num_heads, dim), 1, torch.bfloat16, device)
    tables = torch.randperm(_ROWS * pages).to(device, torch.int32).view(_ROWS, pages)
    lens = torch.full((_ROWS,), _CONTEXT, dtype=torch.int32, device=device)
    return lambda: ops.loop_kv_attention(q, k_cache, v_cache, tables, lens, dim**-0.5)


def make_calls(config: ModelConfig, device: torch.device) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield names and calls, each made only when its turn comes."""
    wide = "gate,up" if config.gated_mlp else "up"
    yield "row kernel, 8 tokens", linear_call(config, wide, 8, ("kRows", 1), device)
    yield "row kernel, 64 tokens", linear_call(config, wide, 64, ("kRows", 1), device)
    yield "column kernel, 8 tokens, down", linear_call(config, "down", 8, ("kColumns", 1), device)
    yield "shrink, 64 tokens, down", linear_call(config, "down", 64, None, device)
    yield "decode attention", attention_call(config, device)


@torch.inference_mode()
def run(config: ModelConfig, device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    for name, call in make_calls(config, device):
        call()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        call()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(f"ran: {name}", flush=True)


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default cuda")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="gemma-2b", help="whose shapes (default gemma-2b)")
    arguments = parser.parse_args()
    check_device_flag(arguments.device)
    run(preset(arguments.preset), torch.device(arguments.device))


if __name__ == "__main__":
    run_command(main)
