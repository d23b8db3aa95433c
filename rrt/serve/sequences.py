"""What the scheduler knows of a request, and what a pass of many requests' rows is. No tensors here."""

from dataclasses import dataclass, field

from rrt.decode.passes import PassRows
from rrt.decode.sampling import TopTokens
from rrt.serve.requests import Request

NO_TOKEN = -1


@dataclass(frozen=True)
class Draft:
    """The next token as an early loop has it; `NO_TOKEN` where nobody asked for one."""

    token: int = NO_TOKEN
    confidence: float = 0.0


@dataclass(eq=False)
class Row:
    """A decode row: a token at a position, and the loop that it runs next.

    Attributes:
        slot: where its state lies in the last pass's output; None before loop 0.
        exit_loop: after which the token that follows it has left, where that is final already.
        drafts: of each loop so far, under a policy that verifies.
    """

    position: int
    token: int
    loop: int = 0
    slot: int | None = None
    exit_loop: int | None = None
    drafts: list[Draft] = field(default_factory=list)


@dataclass(eq=False)
class KeptRow:
    """The state of an exit, from which a loop that was skipped takes its keys and values.

    Attributes:
        slot: of the state in the last pass's output.
        exit_loop: whose keys and values are those at `position`.
    """

    position: int
    loop: int
    slot: int
    exit_loop: int


@dataclass(eq=False)
class Prefill:
    """The chunk of a prompt that is under way: `length` positions from `start`, and the loop that it runs next."""

    start: int
    length: int = 0
    loop: int = 0
    slot: int | None = None


@dataclass(eq=False)
class Sequence:
    """A request, waiting or with pages.

    Attributes:
        tokens: the prompt, and the new tokens that are final.
        exits: of each new token, the loop after which it left.
        keys: of a prefix cache, for the tokens that are prefilled.
        cached: of the cache, while it has pages.
        rows: the oldest first; their loops fall.
    """

    request: Request
    tokens: list[int]
    exits: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    cached: int = -1
    prefill: Prefill | None = None
    rows: list[Row] = field(default_factory=list)
    kept: list[KeptRow] = field(default_factory=list)

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def exit_at(self, position: int) -> int | None:
        """Return the loop after which the token that follows `position` has left; None if it is not there yet."""
        step = position + 1 - len(self.request.prompt)
        return self.exits[step] if step < len(self.exits) else None


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
class Copies:
    """Keys and values that loops share, one entry each: those of a position at a loop are copied to another loop."""

    sequences: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    from_loops: list[int] = field(default_factory=list)
    to_loops: list[int] = field(default_factory=list)

    def add(self, sequence: int, position: int, from_loop: int, to_loop: int) -> None:
        self.sequences.append(sequence)
        self.positions.append(position)
        self.from_loops.append(from_loop)
        self.to_loops.append(to_loop)


@dataclass(frozen=True)
class Pass:
    """The rows of a pass.

    Attributes:
        sources: [M] of each row: the token that it embeds, or ~slot of its state in the last pass's output.
        heads: rows that need logits after it.
        sequences: that have rows in it.
        copies: to make before it.
    """

    rows: PassRows
    sources: list[int]
    heads: list[Head]
    sequences: list[Sequence]
    copies: Copies


@dataclass(frozen=True)
class Choice:
    """What the head says of a row: its token, whether it exits before the last loop, and the log-probability.

    The token of a row that goes on is not chosen. `confidence` is the largest probability, of drafts alone.
    """

    token: int = NO_TOKEN
    exits: bool = True
    logprob: float | None = None
    confidence: float = 0.0
    top_logprobs: TopTokens = ()
