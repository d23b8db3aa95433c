"""Which rows run in the next pass, and what follows from their tokens. No tensors here.

A sequence is prefilled in chunks, one loop a pass, and then has at most one decode row at each loop. Without early
exits it is one row that moves from loop to loop. A row that exits leaves its state to the loops that it skips, for
their keys and values, or goes on for those alone. Under a policy that verifies, rows form a pipeline: while the row of
position t is at loop 1, that of t + 1 runs loop 0 on the token that t's exit drafted. When t's last loop says another
token, the younger rows are dropped and their positions truncated. For three and more loops a deeper draft replaces the
one before in the same way.

A request that lost its pages begins again with its prompt. Its new tokens follow as rows that exit where they did
before, if exits are lossy; else they are computed as a prompt is.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from rrt.decode.kv_cache import PagedCache
from rrt.decode.page_table import OutOfPages
from rrt.decode.passes import Chunk, PassRows
from rrt.errors import UserError
from rrt.serve.gate import Gate
from rrt.serve.prefix_cache import PrefixCache
from rrt.serve.requests import FinishReason, NewToken, Request
from rrt.serve.sequences import NO_TOKEN, Choice, Copies, Draft, Head, KeptRow, Pass, Prefill, Row, Sequence

SkippedKV = Literal["propagate", "share", "defer"]
"""Where the loops that a lossy exit skips have their keys and values from: the state at the exit, by their own
projections; the keys and values of the loop of the exit; or the loops themselves, which run later for these alone."""


@dataclass(frozen=True)
class _Candidate:
    """A draft with which the row of `position` could begin."""

    sequence: Sequence
    position: int
    token: int

    @property
    def still_stands(self) -> bool:
        """The sequence has not been dropped since."""
        rows = self.sequence.rows
        return bool(rows) and rows[-1].position == self.position - 1


class Scheduler:
    """Waiting and running requests.

    Args:
        chunk_size: most prompt tokens in a pass.
        max_running: most requests that hold pages at once.
        early_loops: after which of the loops before the last a row's logits are wanted.
        verifies: whether tokens of early loops are drafts.
        skipped_kv: for exits that are lossy.
        gate: decides which drafts begin; without, all do.
        prefixes: keeps the pages of texts for requests that begin alike; without, none are kept.
    """

    def __init__(
        self,
        cache: PagedCache,
        *,
        chunk_size: int,
        max_running: int,
        early_loops: frozenset[int],
        verifies: bool,
        skipped_kv: SkippedKV = "propagate",
        gate: Gate | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self._cache, self._chunk_size, self._max_running = cache, chunk_size, max_running
        self._early_loops, self._verifies = early_loops, verifies
        self._skipped_kv, self._gate, self._prefixes = skipped_kv, gate, prefixes
        self._is_exact = verifies or not early_loops
        self._last_loop = cache.num_loops - 1
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._num_pages = cache.num_free_pages
        self._cuts: dict[int, int] = {}
        """Lengths to which sequences of the cache are cut after a pass."""
        self._candidates: list[_Candidate] = []
        self.num_preemptions = 0
        self.num_reused = 0
        """Positions that requests found computed."""

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            UserError: all pages together would not hold it.
        """
        needed = self._cache.pages_for(request.max_length)
        if needed > self._num_pages:
            raise UserError(
                f"request: {len(request.prompt)} tokens and {request.params.max_new_tokens} new ones need {needed} "
                f"pages; expected at most {self._num_pages}, the cache's: ask for fewer, or give the cache more memory"
            )
        sequence = Sequence(request, list(request.prompt))
        self._find_keys(sequence)
        self._waiting.append(sequence)

    def cancel(self, request_id: int) -> bool:
        """Drop a request and its pages; False if it is not there."""
        for sequence in self._running:
            if sequence.request.id == request_id:
                self._drop(sequence)
                return True
        for sequence in self._waiting:
            if sequence.request.id == request_id:
                self._waiting.remove(sequence)
                return True
        return False

    def schedule(self) -> Pass | None:
        """Choose the rows of the next pass and make room for them; None if there is nothing to do."""
        self._admit()
        self._begin_drafts()
        while self._running:
            self._start_chunks()
            sequences = self._ready()
            if self._append(sequences):
                return self._plan(sequences)
            if self._evict():
                continue
            if len(self._running) == 1:
                raise RuntimeError("cache: found too few free pages for a request alone; expected no other owner")
            self._preempt()
            self.num_preemptions += 1
        return None

    def restart(self) -> None:
        """Have all running requests begin again, as after a pass that failed."""
        while self._running:
            self._preempt()

    def forget_prefixes(self) -> None:
        """Give back the pages of kept texts."""
        while self._evict():
            pass

    def advance(self, done: Pass, choices: list[Choice]) -> list[NewToken]:
        """Move all rows of a pass on, by what the head says of its `heads`; return the tokens that are final now."""
        chosen = {head.slot: choice for head, choice in zip(done.heads, choices, strict=True)}
        new: list[NewToken] = []
        for sequence in done.sequences:
            sequence.kept.clear()
            if sequence.prefill is not None:
                new += self._advance_prefill(sequence, chosen)
            else:
                new += self._advance_rows(sequence, chosen)
        self._cache.truncate_rows(list(self._cuts), list(self._cuts.values()))
        self._cuts.clear()
        return new

    # The next pass

    def _admit(self) -> None:
        if not self._waiting or len(self._running) == self._max_running:
            return
        # Any that runs may begin a page at every loop before another one is prefilled.
        reserved = sum(self._missing_pages(sequence) + self._cache.num_loops for sequence in self._running)
        for sequence in tuple(self._waiting):
            if len(self._running) == self._max_running:
                break
            if self._awaits_prefix(sequence):
                continue
            self._begin(sequence)
            needed = self._missing_pages(sequence)
            self._make_room(needed + reserved, sequence)
            if self._running and needed + reserved > self._cache.num_free_pages:
                self._give_back(sequence)
                break
            self._waiting.remove(sequence)
            self._running.append(sequence)
            self.num_reused += 0 if sequence.prefill is None else sequence.prefill.start
            reserved += needed + self._cache.num_loops

    def _make_room(self, needed: int, sequence: Sequence) -> None:
        """Give back texts that are kept until so many pages are free, if that can be had without one that begins."""
        cache = self._cache
        if self._prefixes is None or needed <= cache.num_free_pages:
            return
        in_use = cache.num_pages_of([sequence.cached, *(other.cached for other in self._running)])
        if needed <= cache.num_pages - in_use:
            while needed > cache.num_free_pages and self._prefixes.evict():
                pass

    def _awaits_prefix(self, sequence: Sequence) -> bool:
        """Tell whether another request is computing a beginning of this one's prompt that is not kept yet."""
        if self._prefixes is None or not sequence.keys:
            return False
        kept = self._prefixes.num_kept(sequence.keys)
        computing = (other.keys for other in self._running if other.prefill is not None)
        return any(_num_common(keys, sequence.keys) > kept for keys in computing)

    def _begin(self, sequence: Sequence) -> None:
        """Give a sequence its place in the cache, with what is kept of its prompt."""
        start = 0
        if self._prefixes is None:
            sequence.cached = self._cache.allocate()
        else:
            tokens = sequence.tokens[: self._prefill_end(sequence)]
            sequence.cached, start = self._prefixes.fork(tokens, sequence.keys)
        sequence.prefill = Prefill(start)

    def _preempt(self) -> None:
        """By recompute: the request that came last begins again with the tokens that it has."""
        latest = self._running[-1]
        self._drop(latest)
        self._find_keys(latest)
        self._waiting.appendleft(latest)

    def _find_keys(self, sequence: Sequence) -> None:
        if self._prefixes is not None:
            sequence.keys = self._prefixes.keys(sequence.tokens[: self._prefill_end(sequence)])

    def _prefill_end(self, sequence: Sequence) -> int:
        """Return how many tokens are computed as a prompt; those after them exit as they did before."""
        return len(sequence.tokens) if self._is_exact else len(sequence.request.prompt)

    def _begin_drafts(self) -> None:
        """Have drafts of the last pass begin, and tell the gate of the next one."""
        for candidate in self._candidates:
            if candidate.still_stands:
                self._continue_with(candidate.sequence, candidate.position, candidate.token)
        self._candidates.clear()
        if self._gate is not None:
            self._gate.begin_pass(sum(1 for sequence in self._running if sequence.rows))

    def _start_chunks(self) -> None:
        """Give sequences that are between chunks their next one, as long as the pass has room for it."""
        room = self._chunk_size - sum(s.prefill.length for s in self._running if s.prefill is not None)
        for sequence in self._running:
            prefill = sequence.prefill
            if prefill is not None and prefill.length == 0 and room > 0:
                prefill.length = min(self._prefill_end(sequence) - prefill.start, room)
                room -= prefill.length

    def _ready(self) -> list[Sequence]:
        """Return the sequences that have rows in the next pass."""
        decoding = [s for s in self._running if s.rows or s.kept]
        if not self._mixes_loops:
            begun = [s for s in decoding if s.rows[0].loop > 0]
            decoding = begun or decoding
        return decoding + [s for s in self._running if s.prefill is not None and s.prefill.length]

    @property
    def _mixes_loops(self) -> bool:
        """Whether decode rows of a pass may be at several loops.

        Where none leaves early, that would only have every pass read the LoRA of all loops, and the head: new rows wait
        until the others have ended their loops, and then go in step.
        """
        return bool(self._early_loops) and (self._gate is None or self._gate.drafts)

    def _append(self, ready: list[Sequence]) -> bool:
        """Make room in the cache for all rows that run next; False, and nothing done, if pages are lacking."""
        entries = [(sequence.cached, loop, count) for sequence in ready for loop, count in self._appended(sequence)]
        sequences, loops, counts = ([entry[i] for entry in entries] for i in range(3))
        try:
            self._cache.append_rows(sequences, loops, counts)
        except OutOfPages:
            return False
        return True

    def _appended(self, sequence: Sequence) -> Iterator[tuple[int, int]]:
        """Yield the loops at which a sequence grows in the next pass, and by how many positions."""
        if sequence.prefill is not None and sequence.prefill.length:
            yield sequence.prefill.loop, sequence.prefill.length
        for kept in sequence.kept:
            yield kept.loop, 1
        for row in sequence.rows:
            yield row.loop, 1

    def _plan(self, ready: list[Sequence]) -> Pass:
        kept = [(sequence, row) for sequence in ready for row in sequence.kept]
        copies = Copies()
        if self._skipped_kv == "share":
            for sequence, state in kept:
                copies.add(sequence.cached, state.position, state.exit_loop, state.loop)
            kept = []
        rows = [(sequence, row) for sequence in ready for row in sequence.rows]
        # The deepest loops first: rows of one loop read the same LoRA.
        rows.sort(key=lambda each: -each[1].loop)
        chunks = [(s, s.prefill) for s in ready if s.prefill is not None]
        chunks.sort(key=lambda each: each[1].loop)
        sources = [~row.slot for _, row in kept]
        heads = []
        for sequence, row in rows:
            slot = len(sources)
            sources.append(row.token if row.slot is None else ~row.slot)
            if self._wants_head(row):
                step = row.position + 1 - len(sequence.request.prompt)
                heads.append(Head(sequence, slot, row.loop, step))
            row.slot = slot
        for sequence, chunk in chunks:
            first, end = len(sources), chunk.start + chunk.length
            if chunk.slot is None:
                sources += sequence.tokens[chunk.start : end]
            else:
                sources += [~slot for slot in range(chunk.slot, chunk.slot + chunk.length)]
            # After a prompt whose new tokens are known, those begin.
            if chunk.loop == self._last_loop and end == len(sequence.tokens):
                heads.append(Head(sequence, len(sources) - 1, chunk.loop, sequence.num_new))
            chunk.slot = first
        decode = [(s.cached, row.loop, row.position) for s, row in kept]
        decode += [(s.cached, row.loop, row.position) for s, row in rows]
        pass_rows = PassRows(
            [sequence for sequence, _, _ in decode],
            [loop for _, loop, _ in decode],
            [position for _, _, position in decode],
            num_kv_only=len(kept),
            chunks=[Chunk(s.cached, chunk.loop, chunk.start, chunk.length) for s, chunk in chunks],
        )
        return Pass(pass_rows, sources, heads, ready, copies)

    def _wants_head(self, row: Row) -> bool:
        """Tell whether logits are wanted of a row that runs next."""
        if row.exit_loop is not None or row.loop == self._last_loop:
            return row.exit_loop is None
        return row.loop in self._early_loops and (self._gate is None or self._gate.looks)

    # After a pass

    def _advance_prefill(self, sequence: Sequence, chosen: dict[int, Choice]) -> Iterator[NewToken]:
        prefill = sequence.prefill
        assert prefill is not None and prefill.slot is not None
        if prefill.loop < self._last_loop:
            prefill.loop += 1
            return
        end = prefill.start + prefill.length
        if end < self._prefill_end(sequence):
            sequence.prefill = Prefill(end)
            return
        sequence.prefill = None
        if self._prefixes is not None:
            self._prefixes.keep(self._cache.fork(sequence.cached), sequence.tokens[:end])
        if end < len(sequence.tokens):
            self._continue_with(sequence, end, sequence.tokens[end])
        else:
            yield self._commit(sequence, chosen[prefill.slot + prefill.length - 1], self._last_loop)

    def _advance_rows(self, sequence: Sequence, chosen: dict[int, Choice]) -> Iterator[NewToken]:
        for row in list(sequence.rows):
            if row not in sequence.rows:
                break  # an older row has dropped it, and all that follow
            assert row.slot is not None
            loop, choice = row.loop, chosen.get(row.slot, Choice(exits=False))
            row.loop += 1
            if row.exit_loop is not None:
                # No sooner, though its token is known: a loop that is skipped takes the positions in their order.
                if loop == row.exit_loop and row.position + 1 < len(sequence.tokens):
                    self._continue_with(sequence, row.position + 1, sequence.tokens[row.position + 1])
            elif loop == self._last_loop or (choice.exits and not self._verifies):
                row.exit_loop = loop
                yield self._commit(sequence, choice, loop, row.drafts)
            elif self._verifies:
                self._take_draft(sequence, row, choice)
            if row in sequence.rows and row.exit_loop is not None:
                self._leave(sequence, row, loop)

    def _leave(self, sequence: Sequence, row: Row, loop: int) -> None:
        """Let a row whose token is final end after `loop`, if it has nothing left to do."""
        assert row.exit_loop is not None and row.slot is not None
        if loop == self._last_loop:
            sequence.rows.remove(row)
        elif loop == row.exit_loop and self._skipped_kv != "defer":
            sequence.rows.remove(row)
            deeper = range(row.loop, self._last_loop + 1)
            sequence.kept += [KeptRow(row.position, each, row.slot, loop) for each in deeper]

    def _commit(self, sequence: Sequence, choice: Choice, loop: int, drafts: list[Draft] | None = None) -> NewToken:
        """Make a token final. The row of its position goes on if it has begun with this token, and else begins."""
        sequence.tokens.append(choice.token)
        sequence.exits.append(loop)
        params = sequence.request.params
        reason: FinishReason | None = None
        if choice.token in params.stop_ids:
            reason = "stop"
        elif sequence.num_new == params.max_new_tokens:
            reason = "length"
        if reason is not None:
            self._finish(sequence)
        else:
            self._continue_with(sequence, len(sequence.tokens) - 1, choice.token)
        agreed, drafts = loop, drafts or []
        if self._gate is not None:
            for early, draft in enumerate(drafts):
                if draft.token != NO_TOKEN:
                    self._gate.learn(early, draft.confidence, draft.token == choice.token)
        while agreed > loop - len(drafts) and drafts[agreed - 1].token == choice.token:
            agreed -= 1
        return NewToken(sequence.request.id, choice.token, loop, agreed, choice.logprob, reason, choice.top_logprobs)

    def _take_draft(self, sequence: Sequence, row: Row, choice: Choice) -> None:
        """Note a draft. The row of its position goes on if it has begun with this token; else it could begin."""
        draft = Draft(choice.token, choice.confidence) if choice.exits else Draft()
        row.drafts.append(draft)
        position, token = row.position + 1, draft.token
        if token == NO_TOKEN:
            return
        self._cut(sequence, position, token)
        # A draft that would end the text begins nothing.
        ends = token in sequence.request.params.stop_ids or position >= sequence.request.max_length
        is_worth_it = self._gate is None or self._gate.begins(len(row.drafts) - 1, draft.confidence)
        if sequence.rows[-1] is row and is_worth_it and not ends:
            self._candidates.append(_Candidate(sequence, position, token))

    def _continue_with(self, sequence: Sequence, position: int, token: int) -> None:
        """Have `token` at `position`: what runs there on another token, and beyond, is dropped."""
        self._cut(sequence, position, token)
        if not sequence.rows or sequence.rows[-1].position < position:
            sequence.rows.append(Row(position, token, exit_loop=sequence.exit_at(position)))

    def _cut(self, sequence: Sequence, position: int, token: int) -> None:
        """Drop the row of `position` and those beyond unless it has `token`."""
        index = next((i for i, row in enumerate(sequence.rows) if row.position == position), len(sequence.rows))
        if index < len(sequence.rows) and sequence.rows[index].token != token:
            del sequence.rows[index:]
            self._cuts[sequence.cached] = min(position, self._cuts.get(sequence.cached, position))

    def _finish(self, sequence: Sequence) -> None:
        """End a request, and keep its text where every position of it was computed exactly."""
        if self._prefixes is not None and self._is_exact:
            self._prefixes.keep(self._cache.fork(sequence.cached), sequence.tokens[:-1])
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._cuts.pop(sequence.cached, None)
        self._give_back(sequence)
        sequence.rows.clear()
        sequence.kept.clear()

    def _give_back(self, sequence: Sequence) -> None:
        self._cache.free(sequence.cached)
        sequence.cached, sequence.prefill = -1, None

    def _evict(self) -> bool:
        """Give back the pages of a text that is kept; False if there is none."""
        return self._prefixes is not None and self._prefixes.evict()

    def _missing_pages(self, sequence: Sequence) -> int:
        """Count the pages that a sequence still needs for its prompt."""
        prefill, loops = sequence.prefill, self._cache.num_loops
        if prefill is None:
            return 0
        held = prefill.loop * self._cache.pages_for(prefill.start + prefill.length)
        held += (loops - prefill.loop) * self._cache.pages_for(prefill.start)
        return self._cache.pages_for(len(sequence.tokens)) - held // loops


def _num_common(first: list[int], second: list[int]) -> int:
    """Count the equal entries at the beginning of two lists."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
