"""Requests as OpenAI's API has them, checked field by field, and errors in its form.

What a field would change and this server does not do is refused, and so is a field that it does not know, unless it
is null or an empty list: a request is never answered as if it had asked for something else.
"""

import re
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from rrt.errors import UserError
from rrt.serve.requests import SamplingParams

MOST_CHOICES, MOST_TOP_LOGPROBS, MOST_STOPS, MOST_MESSAGES = 128, 20, 16, 4096
Prompt = str | list[int]


class ApiError(Exception):
    """An answer other than success.

    Args:
        param: the field at fault.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _expected(text: str) -> PydanticCustomError:
    return PydanticCustomError("expected", "{expected}", {"expected": text})


def _prompts(value: object) -> list[Prompt]:
    """Return the prompts of any of the four forms."""
    expected = _expected("a text, a list of texts, a list of token ids, or a list of such lists, none of them empty")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise expected
    if all(isinstance(entry, str) for entry in value):
        return list(value)
    if _are_ids(value):
        return [value]
    if not all(isinstance(entry, list) and entry and _are_ids(entry) for entry in value):
        raise expected
    return list(value)


def _are_ids(value: list[Any]) -> bool:
    return all(type(entry) is int for entry in value)


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _expected(f"a text, or a list of up to {MOST_STOPS}, none of them empty")
    return tuple(stops)


def _content(value: object) -> str:
    """Join the parts of a message, of which only text is known."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _expected("a text, or a list of parts of type text")
    for part in value:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise _expected("parts of type text alone, with the fields type and text")
        if not isinstance(part["text"], str):
            raise _expected("a text in each part")
    return "".join(part["text"] for part in value)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown(cls, value: Any) -> Any:
        """Leave of the fields that are not known the first that asks for something, which is then refused.

        Clients send messages back as they came, nulls and empty lists included.
        """
        if not isinstance(value, dict):
            return value
        asking = (name for name, given in value.items() if name not in cls.model_fields and given not in (None, []))
        kept = {*cls.model_fields, next(asking, None)}
        return {name: given for name, given in value.items() if name in kept}


class StreamOptions(_Model):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Generation(_Model):
    """The fields that both kinds of request have."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    ignore_eos: bool | None = None
    # Taken, and of no effect here.
    user: str | None = None
    # Only the value that changes nothing.
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def params(self, max_new_tokens: int, stop_ids: Sequence[int], seed: int, num_top: int | None) -> SamplingParams:
        """Make the engine's parameters of a choice. Raises `ApiError` if a value is out of its range.

        Args:
            num_top: how many of the most probable tokens to report beside the chosen one; None: no log-probabilities.
        """
        try:
            return SamplingParams(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=0 if self.top_k is None else self.top_k,
                # 0 is the most probable token alone, as the smallest number is.
                top_p=1.0 if self.top_p is None else self.top_p or sys.float_info.min,
                seed=seed,
                max_new_tokens=max_new_tokens,
                stop_ids=frozenset(() if self.ignore_eos else stop_ids),
                stop=self.stop,
                logprobs=num_top is not None,
                top_logprobs=num_top or 0,
            )
        except UserError as error:
            name = str(error).partition(":")[0]
            raise ApiError(400, str(error), param="max_tokens" if name == "max_new_tokens" else name) from None


class CompletionRequest(_Generation):
    """A request to continue texts."""

    prompt: Annotated[list[Prompt], BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @property
    def max_new_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def num_top_of_prompt(self) -> int | None:
        """How many of the most probable tokens are asked for in place of each prompt token; None: no scores at all."""
        return self.logprobs if self.echo else None

    def check(self) -> None:
        """Raise `ApiError` if fields do not go together."""
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ApiError(400, f"best_of: found {self.best_of}; expected n, {self.num_choices}", param="best_of")
        if self.stream_options is not None and not self.streams:
            raise ApiError(400, "stream_options: found without stream; expected stream true", param="stream_options")


class ResponseFormat(_Model):
    """The form of an answer, of which only text is known."""

    type: Literal["text"]


class ChatMessage(_Model):
    """A message of a conversation."""

    role: str
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = None


class ChatRequest(_Generation):
    """A request to answer a conversation."""

    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    # Only what changes nothing.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    store: Literal[False] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        """Raise `ApiError` if fields do not go together."""
        if self.stream_options is not None and not self.streams:
            raise ApiError(400, "stream_options: found without stream; expected stream true", param="stream_options")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: found without logprobs; expected logprobs true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ApiError(400, "max_tokens: found beside max_completion_tokens; expected one", param="max_tokens")


class PolicyRequest(_Model):
    """A request to exit by another policy."""

    policy: str


@dataclass(frozen=True)
class Limits:
    """The most that a client may ask for.

    Attributes:
        request_bytes: of a request's body.
        tokens: of a request, its prompts and new tokens together, of all choices.
        texts: of all requests at once, running and waiting.
    """

    request_bytes: int
    tokens: int
    texts: int


_M = TypeVar("_M", bound=BaseModel)


def parse(model: type[_M], body: bytes) -> _M:
    """Read a request. Raises `ApiError` 400 that names the field, what was found, and what was expected."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    message, found = first["msg"], first["input"]
    if first["type"] == "json_invalid":
        raise ApiError(400, f"body: {message}; expected a JSON object")
    name = ".".join(str(part) for part in first["loc"][:4])[:100] or "body"
    if first["type"] == "missing":
        raise ApiError(400, f"{name}: missing; expected a value", param=name)
    if first["type"] == "extra_forbidden":
        raise ApiError(400, f"{name}: not known to this server; expected no such field", param=name)
    message = re.sub("^(Input|List|Dictionary) should (be|have) (a valid )?", "", message)
    raise ApiError(400, f"{name}: found {short(found)}; expected {message}", param=name)


def short(value: object) -> str:
    """Format a value for a message."""
    text = _brief.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Of a large value all of `repr` would take long.
_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxlist, _brief.maxdict = 3, 20, 20
_brief.maxstring = _brief.maxlong = _brief.maxother = 100
