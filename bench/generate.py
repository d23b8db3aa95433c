"""Tokens per second of greedy generation against transformers' `generate` with the same weights.

    python bench/generate.py --checkpoint models/smollm2-135m --dtype float32 bfloat16 --prompts 1 16 --threads 2 --json

Both continue the same prompts, in alternating order, after a warm-up: windows of the standard library's held-out text,
no end token, tokenisation left out. Ours reads the checkpoint; transformers reads the HF directory, or of a checkpoint
of this package its export, which is unrolled. Their texts are compared: where they first differ, the margin is by how
much transformers prefers its own token to ours, in logits. The floor is the time to read the weights that a step needs
once per step at the best read bandwidth of the run. Run nothing else beside it.
"""

import argparse
import importlib.util
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# Without this folder: its tabulate.py would take the place of a library that torch imports.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from bench.output import add_device_flag, add_json_flag, check_device_flag, check_json_flag, save_result
from bench.timing import RATIOS_NOTE, Rates, Timer, Variant, speedup, spread
from eval.tables import Table, format_seconds, format_spread, print_tables
from rrt.checkpoint.source import HFSource, load_model, open_source
from rrt.common.cli import CommandParser, human_bytes, keep_freed_memory, run_command
from rrt.common.dtypes import parse_dtype
from rrt.data.corpus import documents
from rrt.data.tokenizer import load_tokenizer
from rrt.decode.decoder import Decoder
from rrt.decode.generation import generate
from rrt.decode.kv_cache import PagedCache
from rrt.errors import UserError
from rrt.folding.unroll import export
from rrt.model.transformer import RecursiveTransformer

KIND = "generation-speed"
GOALS = {1: 1.3, 16: 1.5}
"""Speedups over transformers to reach, by the number of prompts."""
_PAGE_SIZE = 16

Tokens = list[list[int]]


def make_prompts(directory: Path, count: int, length: int, texts: Sequence[str] = ("python-stdlib",)) -> Tokens:
    """Cut `count` distinct windows of `length` tokens from `texts`: the first of each document, then others.

    Of Python's library, only what is held out of training.
    """
    encoded = load_tokenizer(directory).encode_batch(list(documents(texts, split="heldout")))
    windows = {
        tuple(ids[start : start + length]): None
        for start in range(0, max(map(len, encoded)), length)
        for ids in encoded
        if len(ids) >= start + length
    }
    if len(windows) < count:
        raise UserError(f"prompts: found {len(windows)} of {length} tokens in the text; expected {count}")
    return [list(window) for window in itertools.islice(windows, count)]


@contextmanager
def hf_directory(checkpoint: Path) -> Iterator[Path]:
    """Yield an HF directory of the same weights."""
    if isinstance(open_source(checkpoint), HFSource):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as directory:
        exported = Path(directory) / "export"
        export(checkpoint, exported)
        yield exported


def weight_bytes(model: RecursiveTransformer) -> int:
    """Count the bytes of weights that a step reads: shared ones at each loop, LoRA once, and the head."""
    shared = sum(p.nbytes for name, p in model.stack.named_parameters() if "lora" not in name and name != "prefix")
    own = sum(p.nbytes for name, p in model.stack.named_parameters() if "lora" in name)
    return shared * model.recursion.num_loops + own + model.head_weight.nbytes


class Ours:
    """Generation through the paged decoder, with a cache for as many sequences as any case has."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype, sequences: int, length: int, device: torch.device) -> None:
        self.model = load_model(checkpoint, dtype, device)
        config, recursion = self.model.config, self.model.recursion
        pages = -(-(length + recursion.prefix_length) // _PAGE_SIZE)
        num_pages = recursion.num_loops * pages * (sequences + 1)
        self.decoder = Decoder(self.model, PagedCache(config, recursion, num_pages, _PAGE_SIZE, dtype, device))

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        return generate(self.decoder, prompts, new_tokens)


class Transformers:
    """transformers' generation, without an end token."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    @torch.inference_mode()
    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        # Padded on the left, as its batches of other lengths are.
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        ones = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        mask = torch.tensor(ones, device=self.device)
        out = self.model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens)
        tokens: Tokens = out[:, ids.shape[1] :].tolist()
        return tokens

    @torch.inference_mode()
    def margin(self, prompt: list[int], own: int, other: int) -> float:
        """Return by how much the logit of `own` exceeds that of `other` after the prompt."""
        logits = self.model(torch.tensor([prompt], device=self.device)).logits[0, -1].float()
        return float(logits[own] - logits[other])


def compare(ours: Tokens, theirs: Tokens, prompts: Tokens, hf: Transformers) -> dict[str, Any]:
    """Count equal texts; of the others, return the first difference with the largest margin."""
    differences = []
    for index, (a, b, prompt) in enumerate(zip(ours, theirs, prompts, strict=True)):
        if a == b:
            continue
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True)))
        margin = hf.margin(prompt + b[:same], b[same], a[same])
        differences.append({"prompt": index, "token": same, "margin": margin})
    worst = max(differences, key=lambda difference: difference["margin"], default=None)
    return {"same_texts": len(prompts) - len(differences), "largest_margin": worst}


def measure_case(
    ours: Ours, hf: Transformers, prompts: Tokens, rates: Rates, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Time both on these prompts, and compare their texts."""
    new_tokens = arguments.new_tokens
    variants = {
        "ours": Variant(lambda _: torch.tensor(ours.generate(prompts, new_tokens))),
        "transformers": Variant(lambda _: torch.tensor(hf.generate(prompts, new_tokens))),
    }
    texts = [variant.call(0).tolist() for variant in variants.values()]
    samples = Timer(torch.device("cpu"), arguments.seconds_per_case, arguments.rounds).measure(variants, copies=1)
    rates.probe()
    return {
        "prompts": len(prompts),
        "rounds": len(samples["ours"]),
        "seconds": {variant: spread(values) for variant, values in samples.items()},
        "tokens_per_second": {
            variant: len(prompts) * new_tokens / statistics.median(values) for variant, values in samples.items()
        },
        "speedup": speedup(samples, "ours", "transformers"),
        "floor_bytes": weight_bytes(ours.model) * new_tokens,
        **compare(*texts, prompts, hf),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases and return the result."""
    prompts = make_prompts(arguments.checkpoint, max(arguments.prompts), arguments.prompt_tokens)
    length = arguments.prompt_tokens + arguments.new_tokens
    device, cases = torch.device(arguments.device), list[dict[str, Any]]()
    with hf_directory(arguments.checkpoint) as directory:
        for name in arguments.dtype:
            dtype = parse_dtype(name)
            ours = Ours(arguments.checkpoint, dtype, len(prompts), length, device)
            hf = Transformers(directory, dtype, device)
            keep_freed_memory()
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                rates, made = Rates(Timer(device, 1.0), dtype, 2**28), []
                for count in arguments.prompts:
                    case = measure_case(ours, hf, prompts[:count], rates, arguments)
                    made.append({"dtype": name, "threads": threads, **case})
                    print(f"\n{rates_table(made[-1:]).text()}", flush=True)
                for case in made:
                    case["read_bandwidth"] = rates.best_read()[1]
                    case["floor_seconds"] = case["floor_bytes"] / case["read_bandwidth"]
                    case["over_floor"] = case["seconds"]["ours"]["median"] / case["floor_seconds"]
                cases += made
    return {
        "checkpoint": arguments.checkpoint.name,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "cases": cases,
        "goals": {str(count): goal for count, goal in GOALS.items()},
    }


def rates_table(cases: list[dict[str, Any]]) -> Table:
    """Make the table of rates, with a row per case and variant."""
    rows = [
        [
            case["dtype"],
            str(case["threads"]),
            str(case["prompts"]),
            name,
            format_seconds(seconds["median"]),
            format_spread(seconds),
            f"{case['tokens_per_second'][name]:.1f}",
        ]
        for case in cases
        for name, seconds in case["seconds"].items()
    ]
    header = ["dtype", "threads", "prompts", "variant", "time", "+-", "tokens/s"]
    return Table("New tokens per second", header, rows, (0, 3), gap_after=3)


def goals_table(result: dict[str, Any]) -> Table:
    """Make the table of speedups, beside the goals, the floor and the comparison of texts."""
    rows = []
    for case in result["cases"]:
        goal, worst = result["goals"].get(str(case["prompts"])), case["largest_margin"]
        rows.append(
            [
                case["dtype"],
                str(case["threads"]),
                str(case["prompts"]),
                f"{case['speedup']:.2f}x",
                "" if goal is None else f"{goal}x",
                f"{case['over_floor']:.2f}",
                f"{case['same_texts']}/{case['prompts']}",
                "" if worst is None else f"token {worst['token']}, by {worst['margin']:.3g}",
            ]
        )
    header = ["dtype", "threads", "prompts", "ours is as fast", "goal", "time/floor", "same texts", "first difference"]
    bandwidth = max(case["read_bandwidth"] for case in result["cases"])
    step = human_bytes(max(case["floor_bytes"] for case in result["cases"]) / result["new_tokens"])
    notes = [
        f"{result['checkpoint']}: {result['prompt_tokens']} tokens of prompt, {result['new_tokens']} new ones; up to "
        f"{step} of weights a step, read at up to {bandwidth / 1e9:.1f} GB/s. {RATIOS_NOTE}"
    ]
    return Table("Ours against transformers' generate", header, rows, (0, 7), notes=notes)


def tables(result: dict[str, Any]) -> list[Table]:
    return [goals_table(result), rates_table(result["cases"])]


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="HF directory, or one of our checkpoints"
    )
    add_device_flag(parser)
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"], help="default both"
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16], metavar="N", help="at once (default 1 16)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="of each prompt (default 32)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="for each prompt (default 64)")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], metavar="N", help="torch threads (default 2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="least rounds of a case (default 5)")
    parser.add_argument(
        "--seconds-per-case", type=float, default=0.0, metavar="S", help="more rounds until S have passed (default 0)"
    )
    add_json_flag(parser, "generate")
    arguments = parser.parse_args()
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            "transformers is not installed; expected it: pip install 'relaxed-recursive-transformers[test]'"
        )
    for flag in ("prompt_tokens", "new_tokens", "rounds"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: found {getattr(arguments, flag)}; expected 1 or more")
    if min(*arguments.prompts, *arguments.threads) < 1:
        raise UserError("--prompts and --threads: expected numbers of 1 or more")
    check_device_flag(arguments.device)
    check_json_flag(arguments.json)
    result = run(arguments)
    save_result(arguments.json, KIND, result, arguments.device)
    print_tables(tables(result)[:1])


if __name__ == "__main__":
    run_command(main)
