"""Tokens per second of the engine by requests in flight and exit policy, against itself without exits and transformers.

    python bench/serving.py --checkpoint models/smollm2-b2-r64 --in-flight 1 4 16 --agreement 0.5 0.8 1 --json

All requests begin at once and get as many greedy tokens, in alternating order, after a warm-up. `never` is continuous
batching of the same model without exits. A model whose exits are not trained agrees with itself by chance only, so
agreement is forced: of so many tokens, drawn by a fixed seed, the first loop's draft is made the right one (`verify`),
or the token exits there (`lossy`); all other ones take all loops. `generate` is rrt.decode.generation, and
`transformers` its own generation with the same weights, for --transformers.

The bound of a policy is what it would gain if a pass cost what one costs here, the block and the head timed by
themselves in the middle of the texts: (B block + head) over passes (block + head), for passes = B - (B - 1) agreement a
token. Run nothing else beside it.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Without this folder: its tabulate.py would take the place of a library that torch imports.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from bench.generate import Tokens, Transformers, hf_directory, make_prompts
from bench.output import add_json_flag, check_json_flag, save_result
from bench.timing import RATIOS_NOTE, Timer, Variant, speedup, spread
from eval.tables import Table, format_spread, print_tables
from rrt.checkpoint.source import load_model
from rrt.common.cli import CommandParser, keep_freed_memory, run_command
from rrt.common.dtypes import parse_dtype
from rrt.decode.decoder import Decoder
from rrt.decode.generation import generate
from rrt.decode.kv_cache import PagedCache
from rrt.decode.passes import PassRows
from rrt.errors import UserError
from rrt.serve.engine import Engine
from rrt.serve.exits import ExitPolicy, Never, Oracle, Verify
from rrt.serve.requests import SamplingParams
from rrt.serve.sequences import Choice, Pass

KIND = "serving-speed"
_PAGE_SIZE = 16


class ForcedDrafts(Engine):
    """Verifies drafts of which a given part is right, whatever the early loops' logits say.

    Args:
        expected: the greedy tokens of each request, in the order in which they are added.
        agrees: [requests, tokens], whether the drafts of a token are right.
    """

    def __init__(self, decoder: Decoder, expected: Tokens, agrees: Tensor) -> None:
        super().__init__(decoder, Verify())
        self._expected, self._agrees = expected, agrees.tolist()
        self._vocab_size = decoder.model.config.vocab_size

    def _choose(self, work: Pass) -> list[Choice]:
        choices = super()._choose(work)
        last = self.decoder.cache.num_loops - 1
        for i, head in enumerate(work.heads):
            request = head.sequence.request.id
            if head.loop < last and head.step < len(self._expected[request]):
                right = self._expected[request][head.step]
                token = right if self._agrees[request][head.step] else (right + 1) % self._vocab_size
                choices[i] = replace(choices[i], token=token)
        return choices


def drawn_agreement(requests: int, tokens: int, agreement: float) -> Tensor:
    """Draw which tokens agree: bool [requests, tokens]."""
    return torch.rand(requests, tokens, generator=torch.Generator().manual_seed(0)) < agreement


def serve(engine: Engine, prompts: Tokens, new_tokens: int) -> tuple[Tokens, int]:
    """Serve all prompts from now on; returns their tokens, and how many passes it took."""
    params, passes = SamplingParams(max_new_tokens=new_tokens), 0
    found: dict[int, list[int]] = {engine.add(prompt, params): [] for prompt in prompts}
    while engine.has_work:
        for new in engine.step():
            found[new.request_id].append(new.token)
        passes += 1
    return list(found.values()), passes


def lossy_policy(agrees: Tensor) -> ExitPolicy:
    """Make the policy by which tokens that agree exit after the first loop."""
    return Oracle({(request, step): 0 for request, step in agrees.nonzero().tolist()})


def measure_case(
    decoder: Decoder, prompts: Tokens, hf: Transformers | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Time all variants for these prompts."""
    new_tokens = arguments.new_tokens
    expected, _ = serve(Engine(decoder), prompts, new_tokens)
    engines: dict[str, Callable[[], Engine]] = {"never": lambda: Engine(decoder, Never())}
    if decoder.cache.num_loops > 1:
        for agreement in arguments.agreement:
            agrees = drawn_agreement(len(prompts), new_tokens, agreement)
            policy = lossy_policy(agrees)
            engines[f"lossy {agreement:g}"] = lambda policy=policy: Engine(decoder, policy)  # type: ignore[misc]
            engines[f"verify {agreement:g}"] = lambda agrees=agrees: ForcedDrafts(decoder, expected, agrees)  # type: ignore[misc]
    passes, variants = {}, {}
    for name, make in engines.items():
        tokens, passes[name] = serve(make(), prompts, new_tokens)
        if not name.startswith("lossy") and tokens != expected:
            raise RuntimeError(f"{name}: other tokens than without exits")
        variants[name] = Variant(lambda _, make=make: torch.tensor(serve(make(), prompts, new_tokens)[0]))  # type: ignore[misc]
    variants["generate"] = Variant(lambda _: torch.tensor(generate(decoder, prompts, new_tokens)))
    if hf is not None:
        variants["transformers"] = Variant(lambda _: torch.tensor(hf.generate(prompts, new_tokens)))
    for name in ("generate", "transformers"):
        if name in variants:
            variants[name].call(0)
    samples = Timer(torch.device("cpu"), 0.0, arguments.rounds).measure(variants, copies=1)
    block, head = pass_seconds(decoder, prompts, new_tokens, arguments.rounds)
    return {
        "in_flight": len(prompts),
        "rounds": arguments.rounds,
        "block_seconds": block,
        "head_seconds": head,
        "variants": {
            name: {
                "tokens_per_second": len(prompts) * new_tokens / statistics.median(seconds),
                "seconds": spread(seconds),
                "over_never": speedup(samples, name, "never"),
                "bound": bound(name, decoder.cache.num_loops, block, head),
                "passes": passes.get(name),
            }
            for name, seconds in samples.items()
        },
    }


def bound(variant: str, num_loops: int, block: float, head: float) -> float | None:
    """Return the most that a policy gains over `never`, if a pass takes `block` and `head` seconds."""
    policy, _, agreement = variant.partition(" ")
    if policy not in ("lossy", "verify"):
        return None
    passes = num_loops - (num_loops - 1) * float(agreement)
    return (num_loops * block + head) / (passes * (block + head))


def pass_seconds(decoder: Decoder, prompts: Tokens, new_tokens: int, rounds: int) -> tuple[float, float]:
    """Time a pass of the block, and the head, over a row of each prompt in the middle of its text; medians."""
    cache, middle = decoder.cache, len(prompts[0]) + new_tokens // 2
    sequences = [cache.allocate() for _ in prompts]
    try:
        for sequence in sequences:
            cache.append(sequence, middle)
        loops = [i % cache.num_loops for i in range(len(prompts))] if decoder.model.recursion.sharing == "cycle" else []
        rows = PassRows(sequences, loops or [0] * len(prompts), [middle - 1] * len(prompts))
        x = decoder.embed(torch.tensor([prompt[-1] for prompt in prompts]))
        variants = {
            "block": Variant(lambda _: decoder.block(x, cache.plan(rows))),
            "head": Variant(lambda _: decoder.logits(x)),
        }
        for variant in variants.values():
            variant.call(0)
        samples = Timer(torch.device("cpu"), 0.0, max(20, rounds)).measure(variants, copies=1)
    finally:
        for sequence in sequences:
            cache.free(sequence)
    return statistics.median(samples["block"]), statistics.median(samples["head"])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases and return the result."""
    torch.set_num_threads(arguments.threads)
    prompts = make_prompts(arguments.checkpoint, max(arguments.in_flight), arguments.prompt_tokens)
    cases: list[dict[str, Any]] = []
    with hf_directory(arguments.checkpoint) as directory:
        for name in arguments.dtype:
            dtype = parse_dtype(name)
            model = load_model(arguments.checkpoint, dtype, torch.device("cpu"))
            length = arguments.prompt_tokens + arguments.new_tokens + model.recursion.prefix_length
            pages = model.recursion.num_loops * -(-length // _PAGE_SIZE) * (len(prompts) + 1)
            decoder = Decoder(model, PagedCache(model.config, model.recursion, pages, _PAGE_SIZE, dtype))
            hf = Transformers(directory, dtype) if arguments.transformers else None
            keep_freed_memory()
            for count in arguments.in_flight:
                case = {"dtype": name, **measure_case(decoder, prompts[:count], hf, arguments)}
                cases.append(case)
                print(f"\n{rates_table([case]).text()}", flush=True)
    return {
        "checkpoint": arguments.checkpoint.name,
        "num_loops": model.recursion.num_loops,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "torch_threads": arguments.threads,
        "cases": cases,
    }


def rates_table(cases: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> Table:
    """Make the table of rates, with a row per case and variant."""
    rows = [
        [
            case["dtype"],
            str(case["in_flight"]),
            name,
            f"{found['tokens_per_second']:.1f}",
            format_spread(found["seconds"]),
            f"{found['over_never']:.2f}x",
            "" if found["bound"] is None else f"{found['bound']:.2f}x",
            "" if found["passes"] is None else str(found["passes"]),
        ]
        for case in cases
        for name, found in case["variants"].items()
    ]
    header = ["dtype", "in flight", "variant", "tokens/s", "+-", "over never", "bound", "passes"]
    return Table("New tokens per second", header, rows, (0, 2), gap_after=2, notes=list(notes))


def tables(result: dict[str, Any]) -> list[Table]:
    """Make the table of all cases."""
    note = (
        f"{result['checkpoint']}, {result['num_loops']} loops: {result['prompt_tokens']} tokens of prompt, "
        f"{result['new_tokens']} new ones; agreement is forced. {RATIOS_NOTE}"
    )
    return [rates_table(result["cases"], [note])]


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="HF directory, or one of our checkpoints"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="default float32"
    )
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="default 1 4 16")
    parser.add_argument(
        "--agreement", type=float, nargs="+", default=[0.5, 0.8, 1.0], metavar="P",
        help="parts of tokens that may exit after the first loop (default 0.5 0.8 1)",
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="of each prompt (default 32)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="for each prompt (default 64)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="torch threads (default 2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of a case (default 5)")
    parser.add_argument("--transformers", action="store_true", help="time transformers' generation too")
    add_json_flag(parser, "serving")
    arguments = parser.parse_args()
    for flag in ("prompt_tokens", "new_tokens", "rounds", "threads"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: found {getattr(arguments, flag)}; expected 1 or more")
    if min(arguments.in_flight) < 1:
        raise UserError(f"--in-flight: found {min(arguments.in_flight)}; expected 1 or more")
    if not all(0 <= agreement <= 1 for agreement in arguments.agreement):
        raise UserError(f"--agreement: found {arguments.agreement}; expected numbers from 0 to 1")
    check_json_flag(arguments.json)
    result = run(arguments)
    save_result(arguments.json, KIND, result)
    print_tables(tables(result))


if __name__ == "__main__":
    run_command(main)
