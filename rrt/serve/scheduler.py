"""Which rows run in the next pass, and what follows from their tokens. No tensors here.

A sequence is prefilled in chunks, one loop a pass, and then has at most one decode row at each loop. Without early
exits it is one row that moves from loop to loop. A row that exits leaves kv-only rows for the loops it skips. Under a
policy that verifies, rows form a pipeline: while the row of position t is at loop 1, that of t + 1 runs loop 0 on the
token that t's exit drafted. When t's last loop says another token, the younger rows are dropped and their positions
truncated. For three and more loops a deeper draft replaces the one before in the same way.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from rrt.decode.kv_cache import PagedCache
from rrt.decode.page_table import OutOfPages
from rrt.decode.passes import Chunk, PassRows
from rrt.errors import UserError
from rrt.serve.requests import FinishReason, NewToken, Request

_NO_TOKEN = -1


@dataclass(eq=False)
class Row:
    """A decode row: a token at a position, and the loop that it runs next.

    Attributes:
        slot: where its state lies in the last pass's output; None before loop 0.
        drafts: the next token as each loop so far had it, under a policy that verifies.
    """

    position: int
    token: int
    loop: int = 0
    slot: int | None = None
    drafts: list[int] = field(default_factory=list)


@dataclass(eq=False)
class KeptRow:
    """A kv-only row: the state of an exit, whose keys and values a skipped loop takes."""

    position: int
    loop: int
    slot: int


@dataclass(eq=False)
class Prefill:
    """The chunk of a prompt that is under way: `length` positions from `start`, and the loop that it runs next."""

    start: int
    length: int
    loop: int = 0
    slot: int | None = None


@dataclass(eq=False)
class Sequence:
    """A request that holds pages.

    Attributes:
        tokens: the prompt, and the new tokens that are final.
        cached: of the cache.
        rows: the oldest first; their loops fall.
    """

    request: Request
    tokens: list[int]
    cached: int
    prefill: Prefill | None = None
    rows: list[Row] = field(default_factory=list)
    kept: list[KeptRow] = field(default_factory=list)

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True)
class Head:
    """A row whose logits are wanted after a pass.

    Attributes:
        slot: of the row in the pass's output.
        loop: the one that it has just run.
        step: number of the new token that the logits give.
    """

    sequence: Sequence
    slot: int
    loop: int
    step: int


@dataclass(frozen=True)
class Pass:
    """The rows of a pass.

    Attributes:
        sources: [M] of each row: the token that it embeds, or ~slot of its state in the last pass's output.
        heads: rows that need logits after it.
        sequences: that have rows in it.
    """

    rows: PassRows
    sources: list[int]
    heads: list[Head]
    sequences: list[Sequence]


@dataclass(frozen=True)
class Choice:
    """What the head says of a row: its token, whether it exits before the last loop, and the log-probability.

    The token of a row that goes on is not chosen.
    """

    token: int = _NO_TOKEN
    exits: bool = True
    logprob: float | None = None


class Scheduler:
    """Waiting and running requests.

    Args:
        chunk_size: most prompt tokens in a pass.
        max_running: most requests that hold pages at once.
        early_loops: after which of the loops before the last a row's logits are wanted.
        verifies: whether tokens of early loops are drafts.
        mixes_loops: whether decode rows of a pass may be at several loops; else new ones wait until the others have
            ended theirs. Without early exits alone.
    """

    def __init__(
        self,
        cache: PagedCache,
        *,
        chunk_size: int,
        max_running: int,
        early_loops: frozenset[int],
        verifies: bool,
        mixes_loops: bool,
    ) -> None:
        assert mixes_loops or not early_loops
        self._cache, self._chunk_size, self._max_running = cache, chunk_size, max_running
        self._early_loops, self._verifies, self._mixes_loops = early_loops, verifies, mixes_loops
        self._last_loop = cache.num_loops - 1
        self._waiting: deque[tuple[Request, list[int]]] = deque()
        self._running: list[Sequence] = []
        self._num_pages = cache.num_free_pages
        self._cuts: dict[int, int] = {}
        """Lengths to which sequences of the cache are cut after a pass."""
        self.num_preemptions = 0

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
        self._waiting.append((request, list(request.prompt)))

    def cancel(self, request_id: int) -> bool:
        """Drop a request and its pages; False if it is not there."""
        for sequence in self._running:
            if sequence.request.id == request_id:
                self._drop(sequence)
                return True
        for waiting in self._waiting:
            if waiting[0].id == request_id:
                self._waiting.remove(waiting)
                return True
        return False

    def schedule(self) -> Pass | None:
        """Choose the rows of the next pass and make room for them; None if there is nothing to do."""
        self._admit()
        while self._running:
            self._start_chunks()
            sequences = self._ready()
            if self._append(sequences):
                return self._plan(sequences)
            if len(self._running) == 1:
                raise RuntimeError("cache: found too few free pages for a request alone; expected no other owner")
            self._preempt()
        return None

    def restart(self) -> None:
        """Have all running requests begin again, as after a pass that failed."""
        while self._running:
            self._preempt()

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
        # Any that runs may begin a page at every loop before another one is prefilled.
        reserved = sum(self._missing_pages(sequence) + self._cache.num_loops for sequence in self._running)
        while self._waiting and len(self._running) < self._max_running:
            request, tokens = self._waiting[0]
            needed = self._cache.pages_for(len(tokens))
            if self._running and needed + reserved > self._cache.num_free_pages:
                break
            self._waiting.popleft()
            self._running.append(Sequence(request, tokens, self._cache.allocate(), Prefill(0, 0)))
            reserved += needed + self._cache.num_loops

    def _preempt(self) -> None:
        """By recompute: the request that came last begins again, its tokens as a prompt."""
        latest = self._running[-1]
        self._drop(latest)
        self._waiting.appendleft((latest.request, latest.tokens))
        self.num_preemptions += 1

    def _start_chunks(self) -> None:
        """Give sequences that are between chunks their next one, as long as the pass has room for it."""
        room = self._chunk_size - sum(s.prefill.length for s in self._running if s.prefill is not None)
        for sequence in self._running:
            prefill = sequence.prefill
            if prefill is not None and prefill.length == 0 and room > 0:
                prefill.length = min(len(sequence.tokens) - prefill.start, room)
                room -= prefill.length

    def _ready(self) -> list[Sequence]:
        """Return the sequences that have rows in the next pass."""
        decoding = [s for s in self._running if s.rows or s.kept]
        if not self._mixes_loops:
            begun = [s for s in decoding if s.rows[0].loop > 0]
            decoding = begun or decoding
        return decoding + [s for s in self._running if s.prefill is not None and s.prefill.length]

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
            if row.loop == self._last_loop or row.loop in self._early_loops:
                step = row.position + 1 - len(sequence.request.prompt)
                heads.append(Head(sequence, slot, row.loop, step))
            row.slot = slot
        for sequence, chunk in chunks:
            first, end = len(sources), chunk.start + chunk.length
            if chunk.slot is None:
                sources += sequence.tokens[chunk.start : end]
            else:
                sources += [~slot for slot in range(chunk.slot, chunk.slot + chunk.length)]
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
        return Pass(pass_rows, sources, heads, ready)

    # After a pass

    def _advance_prefill(self, sequence: Sequence, chosen: dict[int, Choice]) -> Iterator[NewToken]:
        prefill = sequence.prefill
        assert prefill is not None and prefill.slot is not None
        if prefill.loop < self._last_loop:
            prefill.loop += 1
            return
        end = prefill.start + prefill.length
        if end < len(sequence.tokens):
            sequence.prefill = Prefill(end, 0)
            return
        sequence.prefill = None
        yield self._commit(sequence, chosen[prefill.slot + prefill.length - 1], self._last_loop)

    def _advance_rows(self, sequence: Sequence, chosen: dict[int, Choice]) -> Iterator[NewToken]:
        for row in list(sequence.rows):
            if row not in sequence.rows:
                break  # an older row has dropped it, and all that follow
            assert row.slot is not None
            loop, choice = row.loop, chosen.get(row.slot)
            row.loop += 1
            if loop == self._last_loop:
                assert choice is not None
                sequence.rows.remove(row)
                yield self._commit(sequence, choice, loop, row.drafts)
            elif self._verifies:
                row.drafts.append(choice.token if choice is not None and choice.exits else _NO_TOKEN)
                if row.drafts[-1] != _NO_TOKEN:
                    self._draft(sequence, row.position + 1, row.drafts[-1])
            elif choice is None or not choice.exits:
                continue
            else:
                sequence.rows.remove(row)
                sequence.kept += [
                    KeptRow(row.position, deeper, row.slot) for deeper in range(row.loop, self._last_loop + 1)
                ]
                yield self._commit(sequence, choice, loop)

    def _commit(self, sequence: Sequence, choice: Choice, loop: int, drafts: list[int] | None = None) -> NewToken:
        """Make a token final. The row of its position goes on if it has begun with this token, and else begins."""
        sequence.tokens.append(choice.token)
        params = sequence.request.params
        reason: FinishReason | None = None
        if choice.token in params.stop_ids:
            reason = "stop"
        elif sequence.num_new == params.max_new_tokens:
            reason = "length"
        if reason is not None:
            self._drop(sequence)
        else:
            self._continue_with(sequence, len(sequence.tokens) - 1, choice.token)
        agreed = loop
        while drafts and drafts[-1] == choice.token:
            drafts.pop()
            agreed -= 1
        return NewToken(sequence.request.id, choice.token, loop, agreed, choice.logprob, reason)

    def _draft(self, sequence: Sequence, position: int, token: int) -> None:
        """Have a position begin on a token that is not certain, unless the text would end before."""
        request = sequence.request
        if position < request.max_length and token not in request.params.stop_ids:
            self._continue_with(sequence, position, token)

    def _continue_with(self, sequence: Sequence, position: int, token: int) -> None:
        """Have `token` at `position`: what runs there on another token, and beyond, is dropped."""
        index = next((i for i, row in enumerate(sequence.rows) if row.position == position), len(sequence.rows))
        if index < len(sequence.rows):
            if sequence.rows[index].token == token:
                return
            del sequence.rows[index:]
            self._cuts[sequence.cached] = min(position, self._cuts.get(sequence.cached, position))
        sequence.rows.append(Row(position, token))

    def _drop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._cuts.pop(sequence.cached, None)
        self._cache.free(sequence.cached)
        sequence.rows.clear()
        sequence.kept.clear()

    def _missing_pages(self, sequence: Sequence) -> int:
        """Count the pages that a sequence still needs for its prompt."""
        prefill, loops = sequence.prefill, self._cache.num_loops
        if prefill is None:
            return 0
        held = prefill.loop * self._cache.pages_for(prefill.start + prefill.length)
        held += (loops - prefill.loop) * self._cache.pages_for(prefill.start)
        return self._cache.pages_for(len(sequence.tokens)) - held // loops
