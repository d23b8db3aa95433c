"""Native operators against PyTorch and against the machine's limits: python bench/kernels.py --preset gemma-2b

Measures the linears of one shared layer with rows of several loops mixed, on a CPU the head (hidden size to vocabulary)
too, attention over the paged cache, and the overhead of a call. Baselines run in the same rounds, in alternating order,
on weights that are not in the cache. A case's floor is the time of its bytes at the best read bandwidth of the run, or
of its FLOPs at the best matmul rate, whichever is longer; bytes are those of W, of A and B of the loops present, of x
and y, each once. On a CPU each linear is also compared with reading as many bytes in the same rounds (time/reading),
since memory's speed changes in a run.

    python bench/kernels.py --preset tinyllama-1.1b --dtype fp32 --json out.json --plot out.png
    python bench/kernels.py --quick --only overhead

On a GPU everything is timed under CUDA graphs. About 10 minutes on a CPU with the defaults, in proportion to
--seconds-per-case; --quick: about a minute. Run nothing else beside it: on a busy machine threads wait for each other.
"""

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

# Without this folder: its tabulate.py would take the place of a library that torch imports.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from bench import attention_cases, linear_variants
from bench.attention_cases import AttentionSpec, run_attention
from bench.kernel_report import Record, cpu_goals, cuda_goals, tables
from bench.linear_cases import LinearSpec, add_floors, layer_records, run_layers, run_linear
from bench.linear_variants import Projection, Tiles, projections
from bench.output import ResultFile, add_json_flag, check_device_flag, check_json_flag
from bench.overhead_cases import measure_call, measure_gaps, measure_planning
from bench.timing import Rates, Timer, last_level_cache_bytes
from eval.flags import check_output_file
from eval.tables import print_tables
from rrt import ops
from rrt.checkpoint.hf_config import model_config_from_hf
from rrt.checkpoint.presets import PRESETS, preset, preset_dtype
from rrt.common.cli import CommandParser, human_bytes, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.common.files import read_json
from rrt.common.machine import free_memory_bytes
from rrt.errors import UserError
from rrt.model.config import ModelConfig

SECTIONS = ("linear", "layer", "head", "attention", "overhead")
MAX_LOOPS = 8

# Defaults of the flags: (full, --quick).
DEFAULTS: dict[str, tuple[list[int], list[int]]] = {
    "rows": ([1, 2, 4, 8, 16, 32, 64, 128], [1, 8]),
    "ranks": ([0, 64, 128, 256, 512], [0, 64]),
    "loops": ([1, 2, 3], [2]),
    "contexts": ([128, 512, 2048, 8192, 32768], [128, 1024]),
    "attention_rows": ([1, 8, 32], [8]),
    "sequences": ([1, 4], [1]),
}
SECONDS_PER_CASE, QUICK_SECONDS_PER_CASE = 0.8, 0.05
CUDA_ROWS = [8192]  # of the full run, besides: minutes per case on a CPU
CHUNK = 256
MAX_HEAD_ROWS = 128


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(flag: str, purpose: str) -> None:
        full, quick = (" ".join(map(str, values)) for values in DEFAULTS[flag[2:].replace("-", "_")])
        text = f"{purpose} (default {full}; with --quick {quick})"
        parser.add_argument(flag, type=int, nargs="+", metavar="N", help=text)

    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--preset", choices=PRESETS, default="gemma-2b", help="whose shapes (default gemma-2b)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="shapes of a HF config.json instead of a preset's")
    add_dtype_flag(parser, "dtype of weights and inputs (with --config auto is float32)")
    add_json_flag(parser, "kernels")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="also plot time over floor of the linears")
    numbers("--rows", "rows M of the linears; 8192 too on cuda")
    numbers("--ranks", "LoRA ranks, capped at min(in, out) of each adapter")
    numbers("--loops", "how many loops the rows are mixed of")
    numbers("--contexts", "context lengths of attention")
    numbers("--attention-rows", "decode rows of attention")
    numbers("--sequences", f"sequences of a prefill, each with a chunk of {CHUNK} tokens at the end of its context")
    parser.add_argument("--page-size", type=int, default=32, metavar="N", help="positions per page (default 32)")
    parser.add_argument(
        "--only",
        choices=SECTIONS,
        nargs="+",
        default=SECTIONS,
        help="only these sections (default: all); layer: the linears as one call, on cuda; on a CPU linear adds up",
    )
    parser.add_argument(
        "--tiles",
        type=Path,
        metavar="FILE",
        help="result of bench/tile_sweep.py: time loop_lora_linear with the tilings that it found fastest too (cuda)",
    )
    parser.add_argument("--quick", action="store_true", help="few cases, briefly: shows that it runs, not how fast")
    parser.add_argument(
        "--seconds-per-case",
        type=float,
        metavar="S",
        help="time to spend on the repetitions of one case, at least three rounds of all its variants "
        f"(default {SECONDS_PER_CASE}; with --quick {QUICK_SECONDS_PER_CASE} and two rounds)",
    )
    parser.add_argument(
        "--unpacked", action="store_true", help="weights as checkpoints have them, not pack_linear's (on cuda always)"
    )
    parser.add_argument(
        "--memory-gib",
        type=float,
        metavar="G",
        help="memory for copies of the weights (default: half of the free)",
    )
    parser.add_argument(
        "--cache-mib", type=float, metavar="M", help="size of the last-level cache (default: as the system reports)"
    )
    arguments = parser.parse_args()
    for name, (full, quick) in DEFAULTS.items():
        if getattr(arguments, name) is None:
            cuda_rows = CUDA_ROWS if name == "rows" and arguments.device == "cuda" else []
            setattr(arguments, name, quick if arguments.quick else [*full, *cuda_rows])
    if arguments.seconds_per_case is None:
        arguments.seconds_per_case = QUICK_SECONDS_PER_CASE if arguments.quick else SECONDS_PER_CASE
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    for name, least, most in (
        ("rows", 1, 2**20),
        ("ranks", 0, 2**20),
        ("loops", 1, MAX_LOOPS),
        ("contexts", 1, 2**24),
        ("attention_rows", 1, 2**20),
        ("sequences", 1, 2**20),
    ):
        values = sorted(set(getattr(arguments, name)))
        setattr(arguments, name, values)
        for value in values:
            if not least <= value <= most:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag}: found {value}; expected a number in [{least}, {most}]")
    if min(arguments.loops) > max(arguments.rows):
        raise UserError(
            f"--loops: found {arguments.loops} with --rows {arguments.rows}; expected at least as many rows as loops"
        )
    if arguments.page_size < 1:
        raise UserError(f"--page-size: found {arguments.page_size}; expected a positive number")
    for name in ("seconds_per_case", "memory_gib", "cache_mib"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')}: found {value}; expected 0 or more")
    check_device_flag(arguments.device)
    for section, device, instead in (("head", "cpu", ""), ("layer", "cuda", "; linear sums the layer up on a CPU")):
        if arguments.device != device and set(arguments.only) == {section}:
            raise UserError(
                f"--only: found {section} with --device {arguments.device}; expected --device {device}{instead}"
            )
    if arguments.tiles is not None and (arguments.device != "cuda" or not arguments.tiles.is_file()):
        raise UserError(
            f"--tiles: found {arguments.tiles} with --device {arguments.device}; expected a file, and --device cuda"
        )
    check_json_flag(arguments.json)
    check_output_file("--plot", arguments.plot)
    if arguments.plot is not None:
        if "linear" not in arguments.only:
            found = " ".join(arguments.only)
            raise UserError(f"--plot: found with --only {found}; expected linear among the sections")
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError(
                "--plot: matplotlib is not installed; expected it: pip install 'relaxed-recursive-transformers[plot]'"
            )


def read_shapes(arguments: argparse.Namespace) -> tuple[str, ModelConfig, torch.dtype]:
    """Return the name, shapes and dtype that the flags choose."""
    if arguments.config is None:
        return arguments.preset, preset(arguments.preset), chosen_dtype(arguments) or preset_dtype(arguments.preset)
    config = model_config_from_hf(read_json(arguments.config), str(arguments.config))
    return arguments.config.name, config, chosen_dtype(arguments) or torch.float32


def native_facts() -> dict[str, Any]:
    """Describe the build and instruction set of the native code, without its path."""
    facts = asdict(ops.build_info())
    facts["plan"] = facts["plan"] is not None
    return {"loaded": facts.pop("library") is not None, **{name: facts[name] for name in facts if name != "rebuild"}}


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the result, which is written after each record too."""
    name, config, dtype = read_shapes(arguments)
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    cache_bytes, cache_known = last_level_cache_bytes(device)
    if arguments.cache_mib is not None:
        cache_bytes, cache_known = int(arguments.cache_mib * 2**20), True
    budget = free_memory_bytes(device) // 2 if arguments.memory_gib is None else int(arguments.memory_gib * 2**30)

    wrong: list[str] = []
    linear = LinearSpec(
        projections=projections(config),
        rows=arguments.rows,
        ranks=arguments.ranks,
        loops=arguments.loops,
        dtype=dtype,
        device=device,
        should_pack=device.type == "cpu" and not arguments.unpacked,
        cache_bytes=cache_bytes,
        budget_bytes=budget,
        tiles=Tiles.read(arguments.tiles) if arguments.tiles is not None else None,
        wrong=wrong,
    )
    head = replace(
        linear,
        projections=[Projection("head", config.hidden_size, (config.vocab_size,))],
        # As many as there are sequences in decoding.
        rows=[rows for rows in arguments.rows if rows <= MAX_HEAD_ROWS] or arguments.rows[:1],
        ranks=[0],
        loops=[1],
    )
    attention = AttentionSpec(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        contexts=arguments.contexts,
        rows=arguments.attention_rows,
        sequences=arguments.sequences,
        chunk=CHUNK,
        page_size=arguments.page_size,
        dtype=dtype,
        device=device,
        cache_bytes=cache_bytes,
        budget_bytes=budget,
        wrong=wrong,
    )
    sections = set(arguments.only)
    # Of all sections, one that does not fit is left out.
    if arguments.device != "cpu" or (len(sections) > 1 and not head.fits()):
        sections.discard("head")
    attention_cases_to_run, left_out = attention.cases()
    # On CUDA the whole layer is one more case; on a CPU, where nothing overlaps, it is the sum of the others.
    measures_layer = "layer" in sections and device.type == "cuda"
    num_cases = linear.num_cases() * ("linear" in sections) + len(attention_cases_to_run) * ("attention" in sections)
    num_cases += linear.num_cases() // len(linear.projections) * measures_layer
    num_cases += head.num_cases() * ("head" in sections)
    native = native_facts()
    # On CUDA a quick run needs as large a buffer: at 64 MiB a launch would count for much.
    probe_bytes = max(4 * cache_bytes, 2**30 if device.type == "cuda" else 2**26)

    print(f"{name} in {dtype_name(dtype)} on {device.type}, {torch.get_num_threads()} torch threads")
    print(f"last-level cache {human_bytes(cache_bytes)}{'' if cache_known else ' (assumed: the system does not tell)'}")
    if "linear" in sections:
        copies = ", ".join(f"{p.name} {linear.copies(p)}" for p in linear.projections)
        print(f"weights take up to {human_bytes(linear.needed_bytes())}; copies rotated: {copies}")
        if warm := [p.name for p in linear.projections if not linear.is_cold(p)]:
            print(f"NOTE: too little memory to rotate {', '.join(warm)} beyond the cache; see --memory-gib")
    if "head" in sections:
        print(f"the head takes {human_bytes(head.needed_bytes())}; copies rotated: {head.copies(head.projections[0])}")
    elif "head" in arguments.only and device.type == "cpu":
        print("the head is left out for want of memory")
    if native["loaded"]:
        print(f"native operators: {native['cpu_isa']}{', STALE: rebuild them' if native['stale'] else ''}")
    else:
        print(f"native operators: none, ours is the PyTorch reference ({native['reason']})")
    if "attention" in sections and not attention_cases_to_run:
        raise UserError(f"--memory-gib: found {budget / 2**30:.2f}; no attention case fits: expected more")
    if "attention" in sections and left_out:
        cases = ", ".join(f"{kind} of {count} at {context}" for kind, count, context in left_out)
        print(f"attention cases left out for want of memory: {cases}")
    seconds = arguments.seconds_per_case
    # Half a second more for tensors, warm-up and the least number of rounds.
    minutes = num_cases * (seconds + 0.5) / 60
    print(f"{num_cases} cases of {seconds} s or more: about {math.ceil(minutes)} min on an idle machine")

    began = time.perf_counter()
    min_rounds = 2 if arguments.quick else 3
    timer = Timer(device, seconds, min_rounds)
    rates = Rates(Timer(device, seconds, min_rounds), dtype, probe_bytes, is_quick=arguments.quick)
    result: dict[str, Any] = {
        "shapes": name,
        "dtype": dtype_name(dtype),
        "packed": linear.should_pack,
        "cache_bytes": cache_bytes,
        "cache_known": cache_known,
        "native": native,
        "seconds_per_case": seconds,
        "wrong": wrong,
    }
    file = ResultFile(arguments.json, "kernels", device)

    def records(section: str, measured: Iterator[Record]) -> Iterator[Record]:
        """Keep, and write, every record of a section as soon as it is measured."""
        result[section] = []
        for record in measured:
            result[section].append(record)
            summarise(result, linear, rates, timer)
            result["elapsed_seconds"] = time.perf_counter() - began
            file.update(result)
            yield record
        rates.probe()

    if sections & {"linear", "layer"}:
        result["linear_variants"] = linear_variants.BASELINES
    with tqdm(total=num_cases, unit="case", desc="kernels", disable=None, smoothing=0.05) as bar:
        if "linear" in sections:
            for record in records("linear", run_linear(linear, timer, rates)):
                case = f"M={record['rows']} r={record['rank']} loops={record['loops']}"
                bar.set_postfix_str(f"{record['projection']} {case}")
                bar.update()
        if measures_layer:
            rates.probe()
            for record in records("layer", run_layers(linear, timer)):
                bar.set_postfix_str(f"layer M={record['rows']} r={record['rank']} loops={record['loops']}")
                bar.update()
        if "head" in sections:
            for record in records("head", run_linear(head, timer, rates)):
                bar.set_postfix_str(f"head M={record['rows']}")
                bar.update()
        if "attention" in sections:
            result |= {"attention_variants": attention_cases.BASELINES, "attention_left_out": left_out}
            for record in records("attention", run_attention(attention, timer, rates)):
                bar.set_postfix_str(f"{record['kind']} of {record['count']} at {record['context']}")
                bar.update()
    if "overhead" in sections:
        samples = 10 if arguments.quick else 200
        result["overhead"] = {
            "call": measure_call(device, linear.should_pack, samples),
            "plan": measure_planning(samples),
        }
        if device.type == "cuda":
            result["overhead"]["gaps"] = measure_gaps(device, dtype, linear.projections, samples)
    summarise(result, linear, rates, timer)
    result["elapsed_seconds"] = time.perf_counter() - began
    # Written before anything is printed: a closed pipe must not cost the run.
    file.finish(result)
    return result


def summarise(result: dict[str, Any], linear: LinearSpec, rates: Rates, timer: Timer) -> None:
    """Bring floors, rates and goals of the records so far up to date, in place."""
    is_cpu = linear.device.type == "cpu"
    # On a CPU the layer is not measured, but made of the others.
    kinds = ("linear", "head", "attention") if is_cpu else ("linear", "layer", "attention")
    if measured := [record for kind in kinds for record in result.get(kind, [])]:
        add_floors(measured, rates)
        result |= {"rates": rates.summary(), "timing": timer.method, "host_time_hidden": timer.hidden}
        if is_cpu and "linear" in result:
            result["layer"] = layer_records(result["linear"], len(linear.projections))
    result["goals"] = cpu_goals(result) if is_cpu else cuda_goals(result)


def main() -> None:
    arguments = parse_arguments()
    result = run(arguments)
    if arguments.plot is not None:
        from bench.plot_kernels import plot

        plot(result, arguments.plot)
    print_tables(tables(result))
    for line in result["wrong"]:
        print(f"WRONG: {line}")
    if result["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
