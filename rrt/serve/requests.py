"""What is asked of the engine, and what it answers."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from rrt.decode.sampling import Sampling, TopTokens, is_whole
from rrt.errors import UserError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams(Sampling):
    """How a request's tokens are chosen, and when it ends.

    Raises:
        UserError: a value out of its range.
    """

    max_new_tokens: int = 64
    stop_ids: frozenset[int] = frozenset()
    """A request ends with one of these tokens."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these strings; the engine, which has no text, leaves them to `rrt.LLM`."""
    n: int = 1
    """Completions of the prompt, with seeds counting up from `seed`; `rrt.LLM` makes a request of each."""
    logprobs: bool = False
    """Report the log-probability of each token under the model, temperature 1, nothing cut."""
    top_logprobs: int = 0
    """With `logprobs`, report so many of the most probable tokens in the place of each, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "n"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise UserError(f"{name}: found {value}; expected a whole number, 1 or more")
        if not isinstance(self.stop_ids, frozenset | set) or not all(map(is_whole, self.stop_ids)):
            raise UserError(f"stop_ids: found {self.stop_ids!r}; expected a set of token ids")
        if self.top_logprobs < 0:
            raise UserError(f"top_logprobs: found {self.top_logprobs}; expected 0 or more")
        if not isinstance(self.stop, tuple) or "" in self.stop:
            raise UserError(f"stop: found {self.stop!r}; expected a tuple of texts that are not empty")


@dataclass(frozen=True)
class Request:
    """A prompt [T >= 1] of token ids, and how it is continued. `id` is of the engine."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)

    @property
    def max_length(self) -> int:
        """Positions that the request may take: its last new token is never an input."""
        return len(self.prompt) + self.params.max_new_tokens - 1


@dataclass(frozen=True)
class NewToken:
    """One token that is final, in the order of the request's text.

    Attributes:
        exit_loop: after which its logits were taken.
        agreed_loop: from which on every loop's logits gave this token; `exit_loop` unless the policy verifies, and for
            a token that follows a prompt, or a text that was prefilled again. Loops whose logits nobody took count as
            if they gave another one.
        logprob: if the request asked for it.
        finish_reason: of the last token; None for the others.
        top_logprobs: as many as the request asked for.
    """

    request_id: int
    token: int
    exit_loop: int
    agreed_loop: int
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    top_logprobs: TopTokens = ()


class RequestError(UserError):
    """Requests that cannot go on, and have been dropped. All others go on with the next step."""

    def __init__(self, message: str, request_ids: Collection[int]) -> None:
        super().__init__(message)
        self.request_ids = frozenset(request_ids)
