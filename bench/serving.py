"""The engine by exit policy: tokens per second of many requests, or with --online the latencies of those that arrive.

    python bench/serving.py --checkpoint models/smollm2-b2-r64 --in-flight 1 4 16 --agreement 0.5 0.8 1 --mixed --json
    python bench/serving.py --checkpoint models/smollm2-b2-r64 --policies verify confidence:0.9 --transformers
    python bench/serving.py --preset smollm2-135m --num-loops 1 2 3 --lora-rank 0 64 256 --in-flight 16
    python bench/serving.py --checkpoint models/smollm2-b2-r64 --online --load 0.5 0.9 --agreement 0.8 --plot load.svg
    python bench/serving.py --checkpoint models/smollm2-135m --http --in-flight 64

Offline, all requests begin at once and get as many greedy tokens, in alternating order, after a warm-up. `never` is
continuous batching of the same model without exits. A model whose exits are not trained agrees with itself by chance
only, so agreement is forced: of so many tokens, drawn by a fixed seed, the first loop's draft is made the right one
(`verify`, and `auto`, which begins a draft where it is predicted to pay), or the token exits there (`lossy`); all other
ones take all loops. --policies run as they are. With --mixed
there are cases of other lengths too: three times as many requests as in flight. The rivals take them batch by batch;
`transformers` pads, and computes until the longest is done; only tokens that were asked for count. `generate` is
rrt.decode.generation, `transformers` has the same weights, `llama.cpp` those of a GGUF file.

`steady` leaves out passes with prompts, and those in which fewer requests than in flight are left. The bound of a
policy is what it would gain there if a pass cost what one costs here, the block and the head timed by themselves in
every round, in the middle of the texts: (B block + head) over passes (block + head), passes being the loops that a
token needs. Where all requests are alike, those of `never` are at one loop in every pass, and a pass reads the LoRA of
that one alone; the bound counts that. With fewer requests than loops, it counts the rows of drafts and of skipped loops
that a policy adds.

Online, requests arrive as a Poisson process at parts of what `never` completes when all are there at once. Run nothing
else beside it.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

# Without this folder: its tabulate.py would take the place of a library that torch imports.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from bench import serving_http, serving_online
from bench.generate import Transformers, hf_directory
from bench.output import ResultFile, add_device_flag, add_json_flag, check_device_flag, check_json_flag
from bench.serving_rivals import (
    ContinuesBatch,
    LlamaCpp,
    check_llama_cpp,
    in_batches,
    plain_generation,
    transformers_generation,
)
from bench.serving_variants import (
    FORCED,
    PassSeconds,
    Requests,
    count_work,
    cut_prompts,
    make_decoder,
    make_engines,
    make_subjects,
    mixed_lengths,
    named_policy,
    pass_seconds,
    serve,
    share_of_same,
    token_ids,
)
from bench.timing import RATIOS_NOTE, Samples, Timer, Variant, median_interval, round_ratios, speedup, spread
from eval.flags import check_least, check_output_file
from eval.tables import Table, format_spread, print_tables
from rrt.checkpoint.presets import PRESETS
from rrt.common.cli import CommandParser, keep_freed_memory, run_command
from rrt.common.dtypes import parse_dtype
from rrt.data.corpus import INPUT_HELP
from rrt.decode.decoder import Decoder
from rrt.errors import UserError
from rrt.serve.engine import Engine
from rrt.serve.requests import NewToken
from rrt.serve.scheduler import SkippedKV

KIND = "serving-speed"
WAVES = 3
"""Requests of mixed lengths for each in flight."""
_CPU = torch.device("cpu")
_PARTS = "parts of a pass"


def measure_case(
    decoder: Decoder,
    requests: Requests,
    lengths: str,
    in_flight: int,
    rivals: dict[str, ContinuesBatch],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Time all variants on these requests."""
    num_loops = decoder.cache.num_loops
    expected = token_ids(serve(Engine(decoder, max_running=in_flight), requests))
    engines = {name: make() for name, make in make_engines(decoder, expected, arguments, in_flight).items()}
    served: dict[str, list[list[NewToken]]] = {}
    steady: Samples = {name: [] for name in engines}
    """Seconds a token in the steady state, round by round, but for rounds that had none."""

    def serve_again(name: str) -> None:
        engine = engines[name]
        engine.reset_counts()
        served[name] = serve(engine, requests)
        if engine.steady_tokens:
            steady[name].append(engine.steady_seconds / engine.steady_tokens)

    # An engine serves all rounds: what its policy has learned, it would know in a server too.
    variants = {name: _variant(partial(serve_again, name)) for name in engines}
    counted: dict[str, dict[str, Any]] = {}
    for variant in variants.values():
        variant.call(0)
    for times in steady.values():
        times.clear()
    for name, rival in {"generate": plain_generation(decoder), **rivals}.items():
        counted[name] = {"same": share_of_same(in_batches(rival, requests, in_flight), expected)}
        variants[name] = _variant(partial(in_batches, rival, requests, in_flight))
    # In every round, so that a machine that slows down slows the bound too.
    parts: list[PassSeconds] = []
    batch = requests.batches(in_flight)[0]
    variants[_PARTS] = _variant(lambda: parts.append(pass_seconds(decoder, batch)))
    samples = Timer(_CPU, 0.0, arguments.rounds).measure(variants, copies=1)
    del samples[_PARTS]
    for name, engine in engines.items():
        same = share_of_same(token_ids(served[name]), expected)
        counted[name] = {**count_work(engine, served[name]), "same": same}
        if len(steady[name]) == len(steady["never"]) > 0:
            counted[name]["steady_tokens_per_second"] = 1 / statistics.median(steady[name])
            counted[name]["steady_over_never"] = speedup(steady, name, "never")
    for name, values in counted.items():
        if "loops_per_token" in values:
            counts = values["loops_per_token"], values["rows_per_token"]
            how = {"is_exact": engines[name].policy.is_exact, "in_step": lengths == "equal"}
            bounds = [each.bound(num_loops, *counts, **how) for each in parts]
            values |= compare_with_bound(bounds, steady, name)
    return {
        "in_flight": in_flight,
        "requests": len(requests.prompts),
        "tokens": requests.num_tokens,
        "rounds": arguments.rounds,
        "pass_seconds": {part: statistics.median(getattr(each, part) for each in parts) for part in asdict(parts[0])},
        "variants": {
            name: {
                "tokens_per_second": requests.num_tokens / statistics.median(seconds),
                "seconds": spread(seconds),
                "over_never": speedup(samples, name, "never"),
                "over_never_interval": median_interval(round_ratios(samples, name, "never")),
                **counted[name],
            }
            for name, seconds in samples.items()
        },
    }


def compare_with_bound(bounds: Sequence[float], steady: Samples, name: str) -> dict[str, float]:
    """Take the bounds of the rounds, and what part of them the gain is in the steady state, if all rounds had one."""
    compared = {"bound": statistics.median(bounds)}
    if len(steady[name]) == len(steady["never"]) == len(bounds):
        gains = round_ratios(steady, name, "never")
        compared["of_bound"] = statistics.median(gain / bound for gain, bound in zip(gains, bounds, strict=True))
    return compared


def _variant(work: Callable[[], object]) -> Variant:
    def call(_: int) -> torch.Tensor:
        work()
        return torch.empty(0)

    return Variant(call)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases and return the result, which is written after each case."""
    torch.set_num_threads(arguments.threads)
    file = ResultFile(arguments.json, KIND, arguments.device)
    subjects = make_subjects(arguments)
    length = arguments.prompt_tokens[1] + arguments.new_tokens[1]
    most, waves = max(arguments.in_flight), max(arguments.waves, WAVES if arguments.mixed else 1)
    cases: list[dict[str, Any]] = []
    with ExitStack() as stack:
        directory = stack.enter_context(hf_directory(arguments.checkpoint)) if arguments.transformers else None
        rivals: dict[str, ContinuesBatch] = {}
        if arguments.llama_cpp is not None:
            rivals["llama.cpp"] = LlamaCpp(arguments.llama_cpp, length, most, arguments.threads)
        for subject in subjects:
            prompts = cut_prompts(arguments, subject, waves * most)
            for name in arguments.dtype:
                dtype = parse_dtype(name)
                decoder = make_decoder(subject, dtype, length, most)
                if directory is not None:
                    rivals["transformers"] = transformers_generation(
                        Transformers(directory, dtype, torch.device(arguments.device))
                    )
                keep_freed_memory()
                for count in arguments.in_flight:
                    some = prompts[: arguments.waves * count]
                    kinds = {"equal": Requests(some, [arguments.new_tokens[1]] * len(some))}
                    if arguments.mixed:
                        some = prompts[: WAVES * count]
                        kinds["mixed"] = mixed_lengths(some, arguments.prompt_tokens, arguments.new_tokens)
                    for lengths, requests in kinds.items():
                        case = {"model": subject.name, "dtype": name, "lengths": lengths}
                        cases.append(case | measure_case(decoder, requests, lengths, count, rivals, arguments))
                        file.update({**settings(arguments), "cases": cases})
                        print(f"\n{rates_table(cases[-1:]).text()}", flush=True)
    result = {**settings(arguments), "cases": cases}
    file.finish(result)
    return result


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the conditions that all cases share."""
    gguf = arguments.llama_cpp
    return {
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "torch_threads": arguments.threads,
        "skipped_kv": arguments.skipped_kv,
        "prompts": arguments.prompts,
        "waves": arguments.waves,
        "gguf": None if gguf is None else gguf.name,
    }


def rates_table(cases: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> Table:
    """Make the table of rates, with a row per case and variant."""
    rows = [
        [
            case["model"],
            case["dtype"],
            case["lengths"],
            str(case["in_flight"]),
            name,
            f"{found['tokens_per_second']:.1f}",
            format_spread(found["seconds"]),
            f"{found['over_never']:.2f}x",
            _format_interval(found["over_never_interval"]),
            *(
                f"{found[field]:{form}}" if field in found else ""
                for field, form in (
                    ("steady_tokens_per_second", ".1f"),
                    ("steady_over_never", ".2f"),
                    ("bound", ".2f"),
                    ("of_bound", ".2f"),
                    ("passes", "d"),
                    ("rows_per_token", ".2f"),
                    ("head_rows_per_token", ".2f"),
                    ("agreed", ".0%"),
                    ("same", ".0%"),
                )
            ),
        ]
        for case in cases
        for name, found in case["variants"].items()
    ]
    header = ["model", "dtype", "lengths", "in flight", "variant", "tokens/s", "+-", "over never", "95 %"]
    header += ["steady", "over never", "bound", "of it", "passes"]
    header += ["rows/token", "head/token", "agreed", "same"]
    return Table("New tokens per second", header, rows, (0, 1, 2, 4), gap_after=4, notes=notes)


def _format_interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}"


def tables(result: dict[str, Any]) -> list[Table]:
    (least_prompt, prompt), (least_new, new) = result["prompt_tokens"], result["new_tokens"]
    note = f"Equal lengths: {prompt} tokens of prompt, {new} new ones"
    note += f", {result['waves']} requests for each in flight" if result["waves"] > 1 else ""
    if any(case["lengths"] == "mixed" for case in result["cases"]):
        note += f"; mixed: {least_prompt} to {prompt} and {least_new} to {new}, {WAVES} requests for each in flight"
    gguf = "" if result["gguf"] is None else f" llama.cpp: {result['gguf']}."
    notes = [
        f"{note}. 95 %: interval of the ratio, by ranks of the rounds, of six at least. steady: tokens/s while as many "
        "requests as in flight decode, and none is at its prompt; bound: of its ratio; of it: what part is reached, "
        "the median over rounds. Agreement behind a policy's name is forced. agreed: tokens that loop 0 had; same: "
        f"tokens that are those of never at their place.{gguf} {RATIOS_NOTE}"
    ]
    return [rates_table(result["cases"], notes)]


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, metavar="DIR", help="HF directory, or one of our checkpoints")
    model.add_argument("--preset", choices=tuple(PRESETS), help="shapes of a base model, with random weights")
    parser.add_argument("--num-loops", type=int, nargs="+", metavar="B", help="of --preset (default 2)")
    parser.add_argument("--lora-rank", type=int, nargs="+", metavar="R", help="of --preset (default 64)")
    add_device_flag(parser)
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="default float32"
    )
    parser.add_argument(
        "--agreement", type=float, nargs="+", metavar="P",
        help="parts of tokens that may exit after the first loop (default 0.5 0.8 1, none with --policies)",
    )  # fmt: skip
    parser.add_argument(
        "--forced", nargs="+", choices=FORCED, default=list(FORCED), help="policies of --agreement (default all three)"
    )
    parser.add_argument(
        "--policies", nargs="+", default=[], metavar="NAME", help="policies as rrt.generate's --exit-policy, not forced"
    )
    parser.add_argument(
        "--skipped-kv", choices=get_args(SkippedKV), default="propagate",
        help="keys and values of loops that lossy exits skip (default propagate)",
    )  # fmt: skip
    for flag, default in (("--prompt-tokens", 32), ("--new-tokens", 64)):
        parser.add_argument(
            flag, type=int, nargs="+", default=[default], metavar="N",
            help=f"of each request (default {default}); mixed and online from a quarter on, or two: from, to",
        )  # fmt: skip
    parser.add_argument(
        "--prompts", nargs="+", default=["python-stdlib"], metavar="FILE",
        help=f"of --checkpoint: {INPUT_HELP} (the default, of which it takes what is held out)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="torch threads (default 2)")
    offline = parser.add_argument_group("offline")
    offline.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="default 1 4 16")
    offline.add_argument(
        "--waves", type=int, default=1, metavar="N", help="requests of equal lengths for each in flight (default 1)"
    )
    offline.add_argument("--mixed", action="store_true", help="requests of mixed lengths too")
    offline.add_argument("--rounds", type=int, default=5, metavar="N", help="of a case (default 5)")
    offline.add_argument("--transformers", action="store_true", help="time transformers' generation too")
    offline.add_argument("--llama-cpp", type=Path, metavar="GGUF", help="time llama.cpp too (needs llama-cpp-python)")
    serving_online.add_flags(parser)
    serving_http.add_flags(parser)
    add_json_flag(parser, "serving")
    arguments = parser.parse_args()
    if arguments.agreement is None:
        arguments.agreement = [] if arguments.policies else [0.5, 0.8, 1.0]
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be measured; make ranges of the lengths."""
    for flag in ("rounds", "threads", "waves"):
        check_least(f"--{flag}", getattr(arguments, flag))
    check_least("--in-flight", min(arguments.in_flight))
    for flag in ("prompt_tokens", "new_tokens"):
        found = getattr(arguments, flag)
        low, high = found if len(found) == 2 else (max(1, found[0] // 4), found[0])
        if len(found) > 2 or not 1 <= low <= high:
            raise UserError(f"--{flag.replace('_', '-')}: found {found}; expected a number, or the least and the most")
        setattr(arguments, flag, [low, high])
    if not all(0 <= agreement <= 1 for agreement in arguments.agreement):
        raise UserError(f"--agreement: found {arguments.agreement}; expected numbers from 0 to 1")
    for text in arguments.policies:
        named_policy(text, arguments)
    for flag in ("num_loops", "lora_rank"):
        if arguments.checkpoint is not None and getattr(arguments, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')}: found with --checkpoint, which has them; expected --preset")
    for flag in ("transformers", "llama_cpp"):
        if getattr(arguments, flag) and (arguments.checkpoint is None or arguments.online):
            raise UserError(f"--{flag.replace('_', '-')}: expected with --checkpoint, and not with --online")
    if arguments.transformers and importlib.util.find_spec("transformers") is None:
        raise UserError(
            "transformers is not installed; expected it: pip install 'relaxed-recursive-transformers[test]'"
        )
    check_device_flag(arguments.device)
    check_llama_cpp(arguments.llama_cpp)
    serving_online.check_flags(arguments)
    serving_http.check_flags(arguments)
    check_output_file("--plot", arguments.plot)
    check_json_flag(arguments.json)


def main() -> None:
    arguments = parse_arguments()
    if arguments.online or arguments.http:
        (serving_online if arguments.online else serving_http).run(arguments)
        return
    result = run(arguments)
    print_tables(tables(result))


if __name__ == "__main__":
    run_command(main)
