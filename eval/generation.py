"""Greedy continuations of many prompts up to stop strings, all in one stream of the engine's passes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from eval.response_cache import ResponseCache
from rrt.data.tokenizer import Tokenizer
from rrt.decode.decoder import Decoder
from rrt.decode.kv_cache import PagedCache, page_bytes
from rrt.model.transformer import RecursiveTransformer
from rrt.serve.engine import Engine
from rrt.serve.requests import SamplingParams

CACHE_BYTES = 2 << 30
"""Memory for keys and values, unless a single sequence takes more."""
PAGE_SIZE = 16
MAX_SEQUENCES = 64


@dataclass(frozen=True)
class Prompt:
    """A prompt: token ids, the strings that stop its continuation (and are cut off), most new tokens."""

    tokens: tuple[int, ...]
    until: tuple[str, ...]
    max_new_tokens: int

    @property
    def key(self) -> str:
        return hashlib.sha256(
            json.dumps(["generate", self.tokens, self.until, self.max_new_tokens]).encode()
        ).hexdigest()

    @property
    def positions(self) -> int:
        """Positions in the cache; the last new token is never read."""
        return len(self.tokens) + self.max_new_tokens - 1


def generate_texts(
    model: RecursiveTransformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    cache: ResponseCache,
    *,
    progress: bool = False,
) -> list[str]:
    """Continue each prompt greedily up to its first stop string. Each goes to `cache` as soon as it is finished."""
    waiting = list({prompt.key: prompt for prompt in prompts if prompt.key not in cache}.values())
    if waiting:
        engine = Engine(Decoder(model, _make_kv_cache(model, waiting)), max_running=MAX_SEQUENCES, keeps_prefixes=True)
        stop_ids = frozenset(tokenizer.stop_ids)
        running: dict[int, tuple[Prompt, list[int]]] = {}
        for prompt in waiting:
            params = SamplingParams(max_new_tokens=prompt.max_new_tokens, stop_ids=stop_ids)
            running[engine.add(prompt.tokens, params)] = prompt, []
        with tqdm(total=len(waiting), unit="req", desc="generating", disable=None if progress else True) as bar:
            while engine.has_work:
                for new in engine.step():
                    prompt, tokens = running[new.request_id]
                    # The token that ends a text is none of it, though it may have one.
                    tokens += [] if new.token in stop_ids else [new.token]
                    if new.finish_reason is not None or _has_stopped(tokenizer, tokens, prompt.until):
                        engine.cancel(new.request_id)
                        cache.add({prompt.key: _cut(tokenizer.decode(tokens), prompt.until)})
                        bar.update()
    return [cache[prompt.key] for prompt in prompts]


def _has_stopped(tokenizer: Tokenizer, tokens: list[int], until: tuple[str, ...]) -> bool:
    # Asked after every token, so a stop string ends within the last ones: each of them has a byte of it, apart from
    # tokens that decode to nothing, or differently at the beginning of a text. A `TextStream` would tell a token
    # later where a newline is a byte of its own.
    longest = max((len(stop.encode()) for stop in until), default=0) + 16
    text = tokenizer.decode(tokens[-longest:])
    return any(stop in text for stop in until)


def _cut(text: str, until: tuple[str, ...]) -> str:
    for stop in until:
        text = text.split(stop)[0]
    return text


def _make_kv_cache(model: RecursiveTransformer, prompts: list[Prompt]) -> PagedCache:
    """Make a cache for all prompts, or for as many as fit in `CACHE_BYTES`, but at least for the longest."""
    config, recursion, weight = model.config, model.recursion, model.embed
    needed = sorted(
        (recursion.num_loops * -(-(recursion.prefix_length + prompt.positions) // PAGE_SIZE) for prompt in prompts),
        reverse=True,
    )
    budget = CACHE_BYTES // page_bytes(config, recursion, PAGE_SIZE, weight.dtype)
    prefix_pages = recursion.num_loops * -(-recursion.prefix_length // PAGE_SIZE)
    num_pages = max(needed[0], min(budget, sum(needed[:MAX_SEQUENCES]))) + prefix_pages
    return PagedCache(config, recursion, num_pages, PAGE_SIZE, weight.dtype, weight.device)
