"""Log-likelihood requests per second of eval/fewshot.py against the LM Evaluation Harness's own `hf` model.

    python bench/fewshot.py --threads 1 2 --json out.json

Both score the same requests with the same weights in fp32, in alternating order, tokenisation included, through the
interface that the harness calls. Each has a process of its own and has scored the requests once before. Ours has packed
its weights, which is timed apart, and keeps freed memory, as eval/fewshot.py does. The baseline is hf at the faster of
its batch sizes; "nothing shared" is ours without shared beginnings, with the head on continuations only. The floor is
the time of the linears over all tokens that ours reads, and of the head over the states that it scores, at the best
matmul rate of the run.

Requests have the form of the seven tasks, with nominal lengths and the standard library's prose for words. The random
Llama has TinyLlama's vocabulary, so its head is half of its multiplications (of TinyLlama's 6 %, of Gemma 2B's 21 %);
with --hidden-size 512 --layers 8 --vocab-size 8192 it is 15 %. Run nothing else beside it.
"""

import argparse
import importlib.util
import multiprocessing
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.output import add_json_flag, check_json_flag, save_result
from bench.timing import Rates, Timer, Variant, speedup, spread
from eval import scoring
from eval.response_cache import ResponseCache
from eval.scoring import share_beginnings
from eval.tables import Table, format_seconds, format_spread, print_tables
from rrt.checkpoint.format import CheckpointConfig, write_checkpoint
from rrt.checkpoint.presets import preset
from rrt.checkpoint.source import load_model
from rrt.common.cli import CommandParser, human_count, keep_freed_memory, run_command
from rrt.common.provenance import make_provenance
from rrt.data.bpe import train_bpe
from rrt.data.corpus import documents
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.unroll import export
from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.meta import meta_model
from rrt.model.sizes import model_sizes

KIND = "fewshot-speed"
"""Of the result; "fewshot" is that of eval/fewshot.py."""
TOKENIZER_IDS = 8192
"""Vocabulary of the tokenizer that is trained on the spot; the embedding may have more rows."""
GOALS = {"hellaswag": 3.5, "mix": 2.0}
"""Speedups over the baseline to reach."""


@dataclass(frozen=True)
class Form:
    """Form of a task's requests: documents in its scored split, and ranges of lengths in words."""

    documents: int
    context: tuple[int, int]
    choices: int
    choice: tuple[int, int]
    option_in_context: bool = False


FORMS = {
    "lambada_openai": Form(5153, (50, 90), 1, (1, 1)),
    "hellaswag": Form(10042, (20, 80), 4, (10, 35)),
    "piqa": Form(1838, (5, 15), 2, (8, 30)),
    "winogrande": Form(1267, (6, 14), 2, (4, 9), option_in_context=True),
    "arc_easy": Form(2376, (10, 30), 4, (1, 8)),
    "arc_challenge": Form(1172, (12, 35), 4, (2, 12)),
    "openbookqa": Form(500, (6, 16), 4, (1, 6)),
}


def make_requests(form: Form, count: int, words: list[str], rng: random.Random) -> list[tuple[str, str]]:
    """Draw contexts and continuations of `count` documents."""

    def text(length: tuple[int, int]) -> str:
        size = rng.randint(*length)
        start = rng.randrange(len(words) - size)
        return " ".join(words[start : start + size])

    requests = []
    for _ in range(count):
        context, ending = text(form.context), text(form.choice)
        for _ in range(form.choices):
            if form.option_in_context:
                requests.append((f"{context} {text((1, 2))}", f" {ending}"))
            else:
                requests.append((context, f" {text(form.choice)}"))
    return requests


def make_shapes(hellaswag_documents: int, mix_requests: int, words: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Draw requests of HellaSwag's form, and a mix in which each task has its share."""
    rng = random.Random(0)
    all_requests = sum(form.documents * form.choices for form in FORMS.values())
    mix = []
    for form in FORMS.values():
        mix += make_requests(form, max(1, round(form.documents * mix_requests / all_requests)), words, rng)
    return {"hellaswag": make_requests(FORMS["hellaswag"], hellaswag_documents, words, rng), "mix": mix}


def make_models(directory: Path, config: ModelConfig, texts: list[str]) -> tuple[Path, Path]:
    """Write a random checkpoint with a tokenizer of its vocabulary, and its export for the `hf` model."""
    ours, exported, tokenizer_dir = (directory / name for name in ("ours", "hf", "tokenizer"))
    tokenizer_dir.mkdir()
    train_bpe(texts, min(config.vocab_size, TOKENIZER_IDS), tokenizer_dir)
    generator = torch.Generator().manual_seed(0)
    recursion = RecursiveConfig()
    with write_checkpoint(
        ours, CheckpointConfig(config, recursion, torch.float32), make_provenance("bench", None)
    ) as writer:
        for name, parameter in meta_model(config, recursion).named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * (0.0 if "norm" in name else 0.04)
            writer.add(name, noise + ("norm" in name))
        load_tokenizer(tokenizer_dir).save(writer.directory)
    export(ours, exported)
    return ours, exported


Requests = list[tuple[str, str]]
Scores = list[tuple[float, bool]]
lm: Any
"""The language model of this process, as the harness sees it."""


def load_ours(directory: Path, batch_tokens: int) -> None:
    global lm
    from eval.harness_lm import HarnessLM

    model = load_model(directory)
    keep_freed_memory()
    lm = HarnessLM(model, load_tokenizer(directory), bos=True, batch_tokens=batch_tokens)


def seconds_to_pack() -> float:
    began = time.perf_counter()
    lm.scorer.pack()
    return time.perf_counter() - began


def load_hf(directory: Path) -> None:
    global lm
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(str(directory), device="cpu", dtype="float32", add_bos_token=True)


def score_ours(requests: Requests, min_saved_tokens: int) -> Scores:
    lm.scorer.cache = ResponseCache()
    with mock.patch.object(scoring, "MIN_SAVED_TOKENS", min_saved_tokens):
        return list(lm.loglikelihood(make_instances(requests)))


def score_hf(requests: Requests, batch_size: int) -> Scores:
    lm.batch_size_per_gpu = batch_size
    return list(lm.loglikelihood(make_instances(requests), disable_tqdm=True))


def make_instances(requests: Requests) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, i, ("bench", i, 1)) for i, pair in enumerate(requests)]


def count_tokens(requests: Requests) -> dict[str, int]:
    """Count the tokens that ours reads with and without sharing, those scored, and the states that meet the head."""
    texts = [lm.scorer.make_text(*pair) for pair in lm.encode_pairs(make_instances(requests))]
    rows = share_beginnings(texts)
    return {
        "one by one": sum(len(text.inputs) for text in texts),
        "shared": sum(row.length for row in rows),
        "scored": sum(len(text.targets) for text in texts),
        "through the head": sum(len(set(row.layout()[-1])) for row in rows),
    }


@contextmanager
def process_with(load: Any, *arguments: Any) -> Iterator[Any]:
    """Start a process and call `load` in it; yield a function that calls others there and waits for their results."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as executor:
        executor.submit(load, *arguments).result()
        yield lambda function, *arguments: executor.submit(function, *arguments).result()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all variants and return the result."""
    config = replace(
        preset("tinyllama-1.1b"),
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.layers,
        num_heads=arguments.hidden_size // 64,
        num_kv_heads=arguments.hidden_size // 128,
        intermediate_size=arguments.hidden_size * 11 // 4,
        bos_token_id=0,  # as train_bpe numbers them
        eos_token_ids=(1,),
    )
    texts = list(documents("python-stdlib", split="heldout"))
    # Prose: words of docstrings and comments.
    words = [word for text in texts for word in re.findall(r"(?<= )[A-Za-z]+[,.]?(?= )", text)]
    sizes = model_sizes(config, RecursiveConfig(), torch.float32)
    print(f"a Llama of {human_count(sizes.total_params)} parameters in float32 on the CPU", flush=True)
    cases = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours_directory, exported = make_models(directory, config, texts)
        ours = stack.enter_context(process_with(load_ours, ours_directory, arguments.batch_tokens))
        hf = stack.enter_context(process_with(load_hf, exported))
        packing = ours(seconds_to_pack)
        print(f"packed in {packing:.2f} s", flush=True)
        device = torch.device("cpu")
        for threads in arguments.threads:
            for each in (ours, hf):
                each(torch.set_num_threads, threads)
            torch.set_num_threads(threads)
            rates = Rates(Timer(device, 1.0), torch.float32, 2**26)
            for shape, requests in make_shapes(arguments.documents, arguments.mix, words).items():
                variants = {
                    "ours": Variant(lambda _, x=requests: ours(score_ours, x, scoring.MIN_SAVED_TOKENS)),
                    "nothing shared": Variant(lambda _, x=requests: ours(score_ours, x, sys.maxsize)),
                } | {
                    f"hf, batch {size}": Variant(lambda _, x=requests, size=size: hf(score_hf, x, size))
                    for size in arguments.hf_batch_sizes
                }
                first = {name: variant.call(0) for name, variant in variants.items()}
                samples = Timer(device, arguments.seconds_per_case, arguments.rounds).measure(variants, copies=1)
                rates.probe()
                cases.append({"shape": shape, "threads": threads, "requests": len(requests)})
                hf_names = [name for name in variants if name.startswith("hf")]
                baseline = min(hf_names, key=lambda name: statistics.median(samples[name]))
                read = ours(count_tokens, requests)
                head = config.vocab_size * config.hidden_size
                flops = 2 * (read["shared"] * sizes.shared_params + read["through the head"] * head)
                cases[-1] |= {
                    "rounds": len(samples["ours"]),
                    "seconds": {name: spread(values) for name, values in samples.items()},
                    "requests_per_second": {
                        name: len(requests) / statistics.median(values) for name, values in samples.items()
                    },
                    "baseline": baseline,
                    "speedup": speedup(samples, "ours", baseline),
                    "tokens": read,
                    "floor_flops": flops,
                    "max_difference": max(
                        abs(a - b) for (a, _), (b, _) in zip(first["ours"], first[baseline], strict=True)
                    ),
                    "same_greedy": [g for _, g in first["ours"]] == [g for _, g in first[baseline]],
                }
                print(f"\n{rates_table(cases[-1:]).text()}", flush=True)
            for case in cases:
                if case["threads"] == threads:
                    case["floor_seconds"] = case["floor_flops"] / rates.best_matmul()[1]
                    case["over_floor"] = case["seconds"]["ours"]["median"] / case["floor_seconds"]
    return {
        "model": {"config": asdict(config), "parameters": sizes.total_params},
        "batch_tokens": arguments.batch_tokens,
        "packing_seconds": packing,
        "cases": cases,
        "goals": GOALS,
    }


def rates_table(cases: list[dict[str, Any]]) -> Table:
    """Make the table of rates, with a row per case and variant."""
    rows = [
        [
            case["shape"],
            str(case["threads"]),
            str(case["requests"]),
            name,
            format_seconds(seconds["median"]),
            format_spread(seconds),
            f"{case['requests_per_second'][name]:.1f}",
        ]
        for case in cases
        for name, seconds in case["seconds"].items()
    ]
    header = ["requests", "threads", "number", "variant", "time", "+-", "requests/s"]
    return Table("Requests per second", header, rows, (0, 3), gap_after=2)


def goals_table(cases: list[dict[str, Any]]) -> Table:
    """Make the table of speedups over the baseline, beside the goals and the largest difference between scores."""
    rows = [
        [
            case["shape"],
            str(case["threads"]),
            case["baseline"],
            f"{case['speedup']:.2f}x",
            f"{GOALS[case['shape']]}x",
            f"{case['over_floor']:.2f}" if "over_floor" in case else "",
            f"{case['max_difference']:.1e}",
        ]
        for case in cases
    ]
    header = ["requests", "threads", "baseline", "ours is as fast", "goal", "time/floor", "scores differ by"]
    return Table("Ours against the baseline", header, rows, (0, 2))


def tables(result: dict[str, Any]) -> list[Table]:
    size = human_count(result["model"]["parameters"])
    packing = (
        f"A Llama of {size} parameters; packing its weights takes {format_seconds(result['packing_seconds'])} once."
    )
    return [replace(goals_table(result["cases"]), notes=[packing]), rates_table(result["cases"])]


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N", help="torch threads (default 1)")
    parser.add_argument("--documents", type=int, default=16, metavar="N", help="HellaSwag's documents (default 16)")
    parser.add_argument("--mix", type=int, default=128, metavar="N", help="about as many requests of all (default 128)")
    parser.add_argument("--batch-tokens", type=int, default=1024, metavar="N", help="of ours (default 1024)")
    parser.add_argument(
        "--hf-batch-sizes", type=int, nargs="+", default=[4, 16], metavar="N", help="of the hf model (default 4 16)"
    )
    parser.add_argument("--hidden-size", type=int, default=384, metavar="D", help="a multiple of 128 (default 384)")
    parser.add_argument("--layers", type=int, default=6, metavar="L", help="default 6")
    parser.add_argument("--vocab-size", type=int, default=32000, metavar="V", help="default 32000")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="least rounds of a case (default 3)")
    parser.add_argument(
        "--seconds-per-case", type=float, default=0.0, metavar="S", help="more rounds until S have passed (default 0)"
    )
    add_json_flag(parser, "fewshot")
    arguments = parser.parse_args()
    for module in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"{module} is not installed; expected it: pip install 'relaxed-recursive-transformers[test]'"
            )
    for flag in ("documents", "mix", "batch_tokens", "layers", "vocab_size", "rounds"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: found {getattr(arguments, flag)}; expected 1 or more")
    if min(*arguments.threads, *arguments.hf_batch_sizes) < 1:
        raise UserError("--threads and --hf-batch-sizes: expected numbers of 1 or more")
    if arguments.hidden_size % 128 or arguments.hidden_size < 128:
        raise UserError(f"--hidden-size: found {arguments.hidden_size}; expected a multiple of 128")
    check_json_flag(arguments.json)
    result = run(arguments)
    save_result(arguments.json, KIND, result)
    print_tables(tables(result)[:1])


if __name__ == "__main__":
    run_command(main)
