"""What bench/serving.py compares: requests, models, and engines that count their rows, with exits forced or not."""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.generate import Tokens, make_prompts
from bench.timing import Timer, Variant
from eval.pass_times import dummy_model
from rrt.checkpoint.presets import preset
from rrt.checkpoint.source import load_model, open_source
from rrt.decode.decoder import Decoder
from rrt.decode.graphed_block import GraphedBlock
from rrt.decode.kv_cache import PagedCache
from rrt.decode.passes import PassPlan, PassRows
from rrt.errors import UserError
from rrt.model.config import LoraRanks, ModelConfig, RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from rrt.serve.engine import Engine
from rrt.serve.exits import Auto, ExitPolicy, Never, Oracle, Verify, parse_policy
from rrt.serve.pass_curve import measure_pass_curve
from rrt.serve.requests import NewToken, SamplingParams
from rrt.serve.sequences import Choice, Pass

FORCED = ("lossy", "verify", "auto")
"""Policies whose exits can be forced."""
_PAGE_SIZE = 16
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Requests:
    """Prompts, and how many tokens each is continued by."""

    prompts: Tokens
    new_tokens: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(self.new_tokens)

    def batches(self, size: int) -> "list[Requests]":
        """Split into batches of at most `size`, in order."""
        starts = range(0, len(self.prompts), size)
        return [Requests(self.prompts[i : i + size], self.new_tokens[i : i + size]) for i in starts]


def mixed_lengths(prompts: Tokens, prompt_tokens: Sequence[int], new_tokens: Sequence[int]) -> Requests:
    """Cut prompts to lengths drawn from the range `prompt_tokens`, and draw new tokens; always the same ones."""
    draw = random.Random(0)
    cut = [prompt[: draw.randint(*prompt_tokens)] for prompt in prompts]
    return Requests(cut, [draw.randint(*new_tokens) for _ in prompts])


@dataclass(frozen=True)
class Subject:
    """A model to measure: its name in tables, and how it is loaded in a dtype."""

    name: str
    config: ModelConfig
    recursion: RecursiveConfig
    load: Callable[[torch.dtype], RecursiveTransformer]


def make_subjects(arguments: argparse.Namespace) -> list[Subject]:
    """List the models that the flags name: a checkpoint, or a preset's shapes with random weights, looped in many ways.

    Raises:
        UserError: a combination that does not exist, or a policy that does not fit, before anything is loaded.
    """
    if arguments.checkpoint is not None:
        source = open_source(arguments.checkpoint)
        load = partial(load_model, arguments.checkpoint, device=torch.device(arguments.device))
        subjects = [Subject(arguments.checkpoint.name, source.model, source.recursion, load)]
    else:
        config, subjects = preset(arguments.preset), []
        for loops in arguments.num_loops or [2]:
            for rank in (arguments.lora_rank or [64]) if loops > 1 else [0]:
                recursion = RecursiveConfig(num_loops=loops, lora_rank=LoraRanks.uniform(rank))
                recursion.check_fits(config)
                name = f"{arguments.preset}, {loops} loops, rank {rank}" if loops > 1 else f"{arguments.preset}, 1 loop"
                load = partial(dummy_model, config, recursion, device=torch.device(arguments.device))
                subjects.append(Subject(name, config, recursion, load))
    for subject in subjects:
        for text in arguments.policies:
            named_policy(text, arguments).check(subject.recursion)
    return subjects


def named_policy(text: str, arguments: argparse.Namespace) -> ExitPolicy:
    """Make the policy that --policies names."""
    if text.startswith("calibrated") and arguments.checkpoint is None:
        raise UserError(f"--policies: found '{text}' with --preset; expected --checkpoint, which has thresholds")
    try:
        return parse_policy(text, arguments.checkpoint)
    except UserError as error:
        raise UserError(f"--policies{str(error).removeprefix('--exit-policy')}") from None


def cut_prompts(arguments: argparse.Namespace, subject: Subject, count: int) -> Tokens:
    """Make `count` prompts of the most --prompt-tokens: of --prompts, of random weights random tokens."""
    length = arguments.prompt_tokens[1]
    if arguments.checkpoint is not None:
        return make_prompts(arguments.checkpoint, count, length, arguments.prompts)
    generator = torch.Generator().manual_seed(0)
    tokens: Tokens = torch.randint(subject.config.vocab_size, (count, length), generator=generator).tolist()
    return tokens


def make_decoder(subject: Subject, dtype: torch.dtype, length: int, sequences: int) -> Decoder:
    """Load a model, with a cache for as many sequences of `length` tokens."""
    model = subject.load(dtype)
    config, recursion = model.config, model.recursion
    pages = recursion.num_loops * -(-(length + recursion.prefix_length) // _PAGE_SIZE) * (sequences + 1)
    device = model.head_weight.device
    return Decoder(model, PagedCache(config, recursion, pages, _PAGE_SIZE, dtype, device))


class CountingEngine(Engine):
    """Counts passes, their rows but those of prompts, and the rows of the head; and times the steady state.

    Steady are passes in which as many requests as may run do, and none is at its prompt.
    """

    def __init__(
        self, decoder: Decoder, policy: ExitPolicy | None = None, *, max_running: int = 256, **options: Any
    ) -> None:
        super().__init__(decoder, policy, max_running=max_running, **options)
        self._max_running, self._is_steady = max_running, False
        self.reset_counts()

    def reset_counts(self) -> None:
        self.passes = self.decode_rows = self.head_rows = 0
        self.steady_tokens, self.steady_seconds = 0, 0.0

    def step(self) -> list[NewToken]:
        began, self._is_steady = time.perf_counter(), False
        news = super().step()
        if self._is_steady:
            self.steady_tokens += len(news)
            self.steady_seconds += time.perf_counter() - began
        return news

    def _choose(self, work: Pass) -> list[Choice]:
        self.passes += 1
        self.decode_rows += len(work.rows.sequences)  # type: ignore[arg-type]
        self.head_rows += len(work.heads)
        self._is_steady = not work.rows.chunks and len(work.sequences) == self._max_running
        return super()._choose(work)


class ForcedDrafts(CountingEngine):
    """Verifies drafts of which a given part is right, whatever the early loops' logits say.

    Args:
        policy: that verifies.
        expected: the greedy tokens of each request, in the order in which they are added, again and again.
        agrees: [requests, tokens], whether the drafts of a token are right.
        options: of the engine.
    """

    def __init__(self, decoder: Decoder, policy: ExitPolicy, expected: Tokens, agrees: Tensor, **options: Any) -> None:
        super().__init__(decoder, policy, **options)
        self._expected, self._agrees = expected, agrees.tolist()
        self._vocab_size = decoder.model.config.vocab_size

    def _choose(self, work: Pass) -> list[Choice]:
        choices = super()._choose(work)
        last = self.decoder.cache.num_loops - 1
        for i, head in enumerate(work.heads):
            request = head.sequence.request.id % len(self._expected)
            if head.loop < last and head.step < len(self._expected[request]):
                right = self._expected[request][head.step]
                token = right if self._agrees[request][head.step] else (right + 1) % self._vocab_size
                choices[i] = replace(choices[i], token=token)
        return choices


@dataclass(frozen=True)
class ForcedExits(Oracle):
    """Replays exits of requests that are added again and again, `num_requests` each time. Lossy."""

    num_requests: int

    def exits(self, score: float, loop: int, request: int, step: int) -> bool:
        return super().exits(score, loop, request % self.num_requests, step)


def drawn_agreement(requests: int, tokens: int, agreement: float) -> Tensor:
    """Draw which tokens agree: bool [requests, tokens]."""
    return torch.rand(requests, tokens, generator=torch.Generator().manual_seed(0)) < agreement


def lossy_policy(agrees: Tensor) -> ExitPolicy:
    """Make the policy by which tokens that agree exit after the first loop."""
    return ForcedExits({(request, step): 0 for request, step in agrees.nonzero().tolist()}, len(agrees))


def make_engines(
    decoder: Decoder, expected: Tokens, arguments: argparse.Namespace, max_running: int
) -> dict[str, Callable[[], CountingEngine]]:
    """List how the engine of each policy is made: `never` first, those of forced agreement, then --policies.

    Args:
        expected: the tokens of all requests without exits, which are added in this order.
    """
    options: dict[str, Any] = {"max_running": max_running, "skipped_kv": arguments.skipped_kv}
    engines: dict[str, Callable[[], CountingEngine]] = {"never": partial(CountingEngine, decoder, Never(), **options)}
    if decoder.cache.num_loops == 1:
        return engines
    named, auto = {text: named_policy(text, arguments) for text in arguments.policies}, Auto()
    if (arguments.agreement and "auto" in arguments.forced) or Auto() in named.values():
        # Measured once, and not while the clock runs.
        auto = Auto(measure_pass_curve(decoder, engine_block(decoder), max_running * decoder.cache.num_loops))
        named = {text: auto if policy == Auto() else policy for text, policy in named.items()}
    for agreement in arguments.agreement:
        agrees = drawn_agreement(len(expected), max(map(len, expected)), agreement)
        forced: dict[str, Callable[[], CountingEngine]] = {
            "lossy": partial(CountingEngine, decoder, lossy_policy(agrees), **options),
            "verify": partial(ForcedDrafts, decoder, Verify(), expected, agrees, **options),
            "auto": partial(ForcedDrafts, decoder, auto, expected, agrees, **options),
        }
        engines |= {f"{name} {agreement:g}": forced[name] for name in FORCED if name in arguments.forced}
    for text, policy in named.items():
        engines.setdefault(text, partial(CountingEngine, decoder, policy, **options))
    return engines


def serve(engine: Engine, requests: Requests) -> list[list[NewToken]]:
    """Serve all requests from now on; returns what each got."""
    found: dict[int, list[NewToken]] = {
        engine.add(prompt, SamplingParams(max_new_tokens=count)): []
        for prompt, count in zip(requests.prompts, requests.new_tokens, strict=True)
    }
    while engine.has_work:
        for new in engine.step():
            found[new.request_id].append(new)
    return list(found.values())


def token_ids(served: list[list[NewToken]]) -> Tokens:
    return [[new.token for new in news] for news in served]


def share_of_same(found: Tokens, expected: Tokens) -> float:
    """Return the part of tokens that are those of `expected` at their place."""
    pairs = [pair for a, b in zip(found, expected, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def count_work(engine: CountingEngine, served: list[list[NewToken]]) -> dict[str, Any]:
    """Return passes, rows and head rows a token, and what the early loops were worth.

    The first token of each request ends its prompt, and is left out but of `passes`.
    """
    later = [new for news in served for new in news[1:]]
    counted: dict[str, Any] = {"passes": engine.passes}
    if later:
        counted["rows_per_token"] = engine.decode_rows / len(later)
        counted["head_rows_per_token"] = (engine.head_rows - len(served)) / len(later)
        if not isinstance(engine.policy, Never):
            counted["agreed"] = sum(new.agreed_loop == 0 for new in later) / len(later)
            counted["loops_per_token"] = statistics.fmean(new.agreed_loop + 1 for new in later)
    return counted


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of the parts of a pass over a row of each request: medians.

    Attributes:
        block: rows at one loop.
        mixed: rows at all loops in turn, whose LoRAs are all read.
        drafted: the same with a row at each loop, if there are fewer requests than loops: a draft that is verified.
        skipped: `mixed` with a kv-only row at each other loop then: a loop that a lossy exit skipped.
        head: final norm and logits.
    """

    block: float
    mixed: float
    drafted: float
    skipped: float
    head: float

    def bound(
        self, num_loops: int, loops_per_token: float, rows_per_token: float, *, is_exact: bool, in_step: bool
    ) -> float:
        """Return the most that a policy gains over `never`, whose rows are `in_step` where all requests are alike.

        Args:
            loops_per_token: passes that a token takes.
            rows_per_token: decode and kv-only rows; those beyond one a pass are at the loops of no request's row.
            is_exact: the policy verifies.
        """
        plain = num_loops * (self.block if in_step else self.mixed) + self.head
        further = (rows_per_token / loops_per_token - 1) / (num_loops - 1)
        all_loops = self.drafted if is_exact else self.skipped
        block = self.mixed + min(max(further, 0.0), 1.0) * (all_loops - self.mixed)
        return plain / (loops_per_token * (block + self.head))


def engine_block(decoder: Decoder) -> Callable[[Tensor, PassPlan], Tensor]:
    """Return the block as the engine runs it: on CUDA as graphs."""
    return GraphedBlock(decoder) if decoder.cache.k.is_cuda else decoder.block


def pass_seconds(decoder: Decoder, requests: Requests, samples: int = 8) -> PassSeconds:
    """Time the parts of a pass in the middle of the texts, so many times each."""
    cache = decoder.cache
    middles = [len(prompt) + count // 2 for prompt, count in zip(requests.prompts, requests.new_tokens, strict=True)]
    sequences = [cache.allocate() for _ in middles]
    try:
        for sequence, middle in zip(sequences, middles, strict=True):
            cache.append(sequence, middle)
        mixes = decoder.model.recursion.sharing == "cycle"
        positions = [middle - 1 for middle in middles]
        loops = [i % cache.num_loops if mixes else 0 for i in range(len(middles))]
        device, block = cache.k.device, engine_block(decoder)
        x = decoder.embed(torch.tensor([prompt[-1] for prompt in requests.prompts], device=device))
        one_loop = PassRows(sequences, [0] * len(loops), positions)
        mixed = PassRows(sequences, loops, positions)
        others = list(range(len(loops), cache.num_loops)) if mixes else []
        count = len(others)
        further = [sequences[0]] * count + sequences, others + loops, [positions[0]] * count + positions
        x_further = torch.cat((x[:1].expand(count, -1), x))

        def until_done(call: Callable[[], Tensor]) -> Variant:
            def run(_: int) -> Tensor:
                result = call()
                if result.is_cuda:
                    torch.cuda.synchronize(device)
                return result

            return Variant(run)

        variants = {
            "block": until_done(lambda: block(x, cache.plan(one_loop))),
            "mixed": until_done(lambda: block(x, cache.plan(mixed))),
            "drafted": until_done(lambda: block(x_further, cache.plan(PassRows(*further)))),
            "skipped": until_done(lambda: block(x_further, cache.plan(PassRows(*further, num_kv_only=len(others))))),
            "head": until_done(lambda: decoder.logits(x)),
        }
        for variant in variants.values():
            variant.call(0)
        seconds = Timer(_CPU, 0.0, samples).measure(variants, copies=1)
    finally:
        for sequence in sequences:
            cache.free(sequence)
    return PassSeconds(*(statistics.median(seconds[name]) for name in variants))
