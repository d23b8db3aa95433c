"""The scheduler on a model that only remembers: whatever comes and goes, every row reads what it should.

The model's next token is a hash of the tokens before. Keys and values are hashes too: of the tokens up to a position
and the loop, so that a row can check each entry that it reads.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rrt.checkpoint.presets import preset
from rrt.decode.kv_cache import PagedCache
from rrt.model.config import RecursiveConfig
from rrt.serve.gate import Gate, PassCurve
from rrt.serve.prefix_cache import PrefixCache
from rrt.serve.requests import Request, SamplingParams
from rrt.serve.scheduler import Scheduler
from rrt.serve.sequences import Choice

CONFIG = dataclasses.replace(
    preset("tinyllama-1.1b"), num_layers=12, num_heads=1, num_kv_heads=1, head_dim=2, hidden_size=2
)
VOCABULARY = 11


def entry(tokens, loop):
    """Keys and values after `tokens` at a loop: a number that float64 holds."""
    return float(hash((loop, *tokens)) % 2**52)


def next_token(tokens):
    return hash((-1, *tokens)) % VOCABULARY


class RememberingModel:
    """Runs passes of a scheduler.

    Args:
        is_right: of the tokens before and a loop, whether the draft there is the model's token.
        exit_loop: of the tokens before, the loop after which they leave.
    """

    def __init__(self, cache, is_right, exit_loop, verifies, skipped_kv):
        self.cache, self.is_right, self.exit_loop = cache, is_right, exit_loop
        self.verifies, self.skipped_kv = verifies, skipped_kv
        self.states = []

    def run(self, work):
        """Run a pass, check all that it reads, and return the choices."""
        if work.copies.sequences:
            copies = work.copies
            self.cache.copy_rows(copies.sequences, copies.positions, copies.from_loops, copies.to_loops)
        plan = self.cache.plan(work.rows)
        # The state of a row is the tokens up to its own. Those of a new row are what its sequence has before it.
        owners = {sequence.cached: sequence for sequence in work.sequences}
        spans = [
            (sequence, position, loop)
            for sequence, position, loop in zip(work.rows.sequences, work.rows.positions, work.rows.loops, strict=True)
        ]
        for chunk in work.rows.chunks:
            spans += [(chunk.sequence, chunk.start + i, chunk.loop) for i in range(chunk.length)]
        states = []
        for source, (owner, position, loop) in zip(work.sources, spans, strict=True):
            if source < 0:
                states.append(self.states[~source])
                continue
            before = list(owners[owner].tokens[:position])
            before += [row.token for row in owners[owner].rows if len(before) <= row.position < position]
            assert loop == 0 and len(before) == position
            states.append((*before, source))
        # A view, as NumPy's: reading one number of a tensor takes far longer.
        keys = self.cache.k[0].flatten(0, 1)[:, 0, 0].numpy()
        written = [plan.decode.slot_mapping, *(prefill.slot_mapping for prefill in plan.prefills)]
        for slot, state, (_, position, loop) in zip(torch.cat(written).tolist(), states, spans, strict=True):
            assert len(state) == position + 1
            keys[slot] = entry(state, loop)
        kept = work.rows.num_kv_only
        for row, state, (owner, position, loop) in zip(range(len(states)), states, spans, strict=True):
            if row >= kept:
                self.check_read(owners[owner], owner, state, position, loop, keys)
        self.states = states
        return [self.choose(states[head.slot], head) for head in work.heads]

    def check_read(self, sequence, owner, state, position, loop, keys):
        expected = []
        for place in range(position):
            held, step = loop, place + 1 - len(sequence.request.prompt)
            if self.skipped_kv == "share" and step > 0:
                held = min(loop, self.exit_loop(state[: place + 1]))
            expected.append(entry(state[: place + 1], held))
        assert keys[self.cache.slots_of(owner, loop, position)].tolist() == expected, (position, loop)

    def choose(self, state, head):
        right = next_token(state)
        if head.loop == self.cache.num_loops - 1:
            return Choice(right)
        if self.verifies:
            return Choice(right if self.is_right(state, head.loop) else (right + 1) % VOCABULARY, confidence=0.5)
        # A lossy exit has the token of the whole model here: what it reads is what counts.
        return Choice(right) if head.loop >= self.exit_loop(state) else Choice(exits=False)


def make_gate(row, num_loops):
    return Gate(PassCurve((1, 2), (1.0, 1.0 + row), (1.1, 1.1 + row), (0.1, 0.1)), num_loops)


class ReadableCache(PagedCache):
    def slots_of(self, sequence, loop, position):
        """Slots of the positions before `position`."""
        [pages] = self._table.block_tables([self._handle(sequence, loop)])
        places, size = np.arange(position), self.page_size
        return pages[places // size] * size + places % size


@pytest.mark.parametrize("kind", ["never", "verify", "auto", "lossy"])
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_schedule_reads_what_it_should_and_leaks_no_page(kind, data):
    num_loops = data.draw(st.integers(1 if kind == "never" else 2, 4), "loops")
    skipped_kv = data.draw(st.sampled_from(["propagate", "share", "defer"]), "skipped_kv")
    page_size = data.draw(st.integers(1, 5), "page size")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20), "seed"))

    def number(end):
        return int(torch.randint(0, end, (), generator=generator))

    shared = [number(VOCABULARY) for _ in range(12)]
    requests = []
    for index in range(14):
        prompt = shared[: number(13)] + [number(VOCABULARY) for _ in range(1 + number(5))]
        stop_ids = frozenset({number(VOCABULARY)}) if number(3) == 0 else frozenset()
        requests.append(Request(index, tuple(prompt), SamplingParams(max_new_tokens=1 + number(14), stop_ids=stop_ids)))
    recursion = RecursiveConfig(num_loops=num_loops)
    probe = ReadableCache(CONFIG, recursion, 4000, page_size, torch.float64)
    least = max(probe.pages_for(request.max_length) for request in requests)
    cache = ReadableCache(CONFIG, recursion, least + number(3 * least), page_size, torch.float64)
    good = number(4)
    model = RememberingModel(
        cache,
        is_right=lambda state, loop: hash((good, loop, *state)) % 4 <= good,
        exit_loop=lambda state: hash((good, *state)) % num_loops,
        verifies=kind in ("verify", "auto"),
        skipped_kv=skipped_kv if kind == "lossy" else "propagate",
    )
    scheduler = Scheduler(
        cache,
        chunk_size=1 + number(9),
        max_running=1 + number(8),
        early_loops=frozenset() if kind == "never" else frozenset(range(num_loops - 1)),
        verifies=model.verifies,
        skipped_kv=skipped_kv,
        gate=make_gate(0.2 * number(4), num_loops) if kind == "auto" else None,
        prefixes=PrefixCache(cache) if number(2) else None,
    )
    waiting, cancelled = list(requests), set()
    tokens = {request.id: [] for request in requests}
    for _ in range(3000):
        if waiting and number(2):
            scheduler.add(waiting.pop(0))
        if number(25) == 0:
            victim = number(len(requests))
            if scheduler.cancel(victim):
                cancelled.add(victim)
        if number(60) == 0:
            scheduler.restart()
        work = scheduler.schedule()
        if work is not None:
            for new in scheduler.advance(work, model.run(work)):
                assert new.request_id not in cancelled and 0 <= new.agreed_loop <= new.exit_loop < num_loops
                tokens[new.request_id].append(new.token)
        cache.check()
        if not waiting and scheduler.num_waiting + scheduler.num_running == 0:
            break
    assert not waiting and scheduler.num_waiting + scheduler.num_running == 0
    scheduler.forget_prefixes()
    assert cache.num_used_pages == 0 and cache.num_sequences == 0
    for request in requests:
        if request.id in cancelled:
            continue
        expected, params = list(request.prompt), request.params
        while len(expected) - len(request.prompt) < params.max_new_tokens:
            expected.append(next_token(expected))
            if expected[-1] in params.stop_ids:
                break
        assert tokens[request.id] == expected[len(request.prompt) :]


@pytest.mark.parametrize("beginning", [3, 4, 7, 8])
def test_a_prompt_finds_the_whole_pages_that_it_shares(beginning):
    cache = PagedCache(CONFIG, RecursiveConfig(num_loops=2), 100, 4)
    prefixes = PrefixCache(cache)
    first = list(range(10))
    kept = cache.allocate()
    cache.append(kept, 10)
    prefixes.keep(kept, first)
    assert len(prefixes) == 1 and cache.num_used_pages == 2 * 2
    second = [*first[:beginning], *range(50, 60)]
    keys = prefixes.keys(second)
    sequence, length = prefixes.fork(second, keys)
    assert length == beginning // 4 * 4 == 4 * prefixes.num_kept(keys)
    assert [cache.length(sequence, loop) for loop in range(2)] == [length, length]
    # The whole of a text is never found: its last token is left to compute.
    assert prefixes.fork(first[:8], prefixes.keys(first[:8]))[1] == 4
    cache.check()


def test_a_longer_text_takes_the_place_of_its_beginning_and_the_oldest_goes_first():
    cache = PagedCache(CONFIG, RecursiveConfig(num_loops=2), 100, 4)
    prefixes = PrefixCache(cache)

    def keep(tokens):
        sequence, length = prefixes.fork(tokens, prefixes.keys(tokens))
        cache.append(sequence, len(tokens) - length)
        prefixes.keep(sequence, tokens)

    keep(list(range(8)))
    keep(list(range(13)))
    assert len(prefixes) == 1 and cache.num_used_pages == 2 * 3
    keep(list(range(8)))  # kept already, as a beginning
    assert len(prefixes) == 1
    keep([*range(4), *range(20, 30)])
    keep(list(range(30, 40)))
    keep(list(range(13)))  # used again
    assert len(prefixes) == 3 and cache.num_used_pages == 2 * (3 + 2 + 2)
    for count in (2, 1):
        assert prefixes.evict() and len(prefixes) == count
    assert prefixes.fork(list(range(30)), prefixes.keys(list(range(30))))[1] == 12
    assert prefixes.evict() and not prefixes.evict() and len(prefixes) == 0
