"""Greedy continuations of many prompts up to stop strings, in batches as large as the key/value cache holds."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from eval.response_cache import ResponseCache
from rrt.data.tokenizer import Tokenizer
from rrt.decode.decoder import Decoder
from rrt.decode.generation import generate
from rrt.decode.kv_cache import PagedCache, page_bytes
from rrt.model.transformer import RecursiveTransformer

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
    """Continue each prompt greedily up to its first stop string. Finished ones go to `cache` batch by batch."""
    waiting = list({prompt.key: prompt for prompt in prompts if prompt.key not in cache}.values())
    if waiting:
        kv_cache = _make_kv_cache(model, waiting)
        decoder = Decoder(model, kv_cache)
        with tqdm(total=len(waiting), unit="req", desc="generating", disable=None if progress else True) as bar:
            for batch in _batches(waiting, kv_cache):
                texts = _continue(decoder, tokenizer, batch)
                cache.add({prompt.key: text for prompt, text in zip(batch, texts, strict=True)})
                bar.update(len(batch))
    return [cache[prompt.key] for prompt in prompts]


def _continue(decoder: Decoder, tokenizer: Tokenizer, batch: list[Prompt]) -> list[str]:
    until = batch[0].until
    # Called after every token, so a stop string ends within the last ones: each of them has a byte of it, apart from
    # tokens that decode to nothing, or differently at the beginning of a text.
    longest = max((len(stop.encode()) for stop in until), default=0) + 16

    def has_stopped(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens[-longest:])
        return any(stop in text for stop in until)

    outputs = generate(
        decoder,
        [prompt.tokens for prompt in batch],
        batch[0].max_new_tokens,
        stop_ids=tokenizer.stop_ids,
        should_stop=has_stopped,
    )
    # The token that ends a text is none of it, though it may have one.
    stops = set(tokenizer.stop_ids)
    texts = [tokenizer.decode(tokens[:-1] if not stops.isdisjoint(tokens[-1:]) else tokens) for tokens in outputs]
    for stop in until:
        texts = [text.split(stop)[0] for text in texts]
    return texts


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


def _batches(prompts: list[Prompt], cache: PagedCache) -> Iterator[list[Prompt]]:
    """Yield batches of prompts with the same stops, longest first, as many as the cache holds."""
    groups: dict[tuple[tuple[str, ...], int], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.until, prompt.max_new_tokens].append(prompt)
    for group in groups.values():
        batch: list[Prompt] = []
        pages = 0
        for prompt in sorted(group, key=lambda prompt: prompt.positions, reverse=True):
            needed = cache.pages_for(prompt.positions)
            if batch and (len(batch) == MAX_SEQUENCES or pages + needed > cache.num_free_pages):
                yield batch
                batch, pages = [], 0
            batch.append(prompt)
            pages += needed
        yield batch
