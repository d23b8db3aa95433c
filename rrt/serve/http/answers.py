"""Answers as OpenAI's API has them, whole or in the pieces of a stream.

Beside OpenAI's fields each choice has `rrt`: of its new tokens their ids, the loop that gave each (`exit_loops`), and
the loop from which on all loops gave it (`agreed_loops`).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rrt.decode.sampling import TopTokens
from rrt.decode.text_stream import Decodes, TextStream
from rrt.serve.http.scores import PromptScores
from rrt.serve.http.worker import Delta, Text
from rrt.serve.requests import NewToken

_LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON has not."""
_CACHED_NAMES = 2**16


def to_json(value: object) -> bytes:
    """Write JSON in ASCII, which no encoding of the client's can break."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def server_sent(value: object) -> bytes:
    """Write an event of a stream."""
    return b"data: " + to_json(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


class TokenNames:
    """The texts by which answers name tokens. One that is no text by itself is named by its number."""

    def __init__(self, tokenizer: Decodes) -> None:
        self.tokenizer = tokenizer
        self.name = lru_cache(_CACHED_NAMES)(self._name)

    def _name(self, token: int) -> str:
        text = self.tokenizer.decode([token])
        return f"token_id:{token}" if not text or "\ufffd" in text else text

    def top(self, tokens: Iterable[tuple[int, float]]) -> dict[str, float]:
        """Name tokens with their log-probabilities; of those with one text, apart by a space, the first has it."""
        named: dict[str, float] = {}
        for token, logprob in tokens:
            name = self.name(token)
            named[f"token_id:{token}" if name in named else name] = _finite(logprob)
        return named


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def _depth(delta: Delta) -> dict[str, list[int]]:
    return {
        "tokens": [new.token for new in delta.tokens],
        "exit_loops": [new.exit_loop for new in delta.tokens],
        "agreed_loops": [new.agreed_loop for new in delta.tokens],
    }


def usage(texts: Sequence[Text], num_choices: int, new_tokens: int) -> dict[str, int]:
    """Count the tokens of a request, each prompt once."""
    prompt = sum(len(text.prompt) for text in texts[::num_choices])
    return {"prompt_tokens": prompt, "completion_tokens": new_tokens, "total_tokens": prompt + new_tokens}


@dataclass
class Logprobs:
    """The four lists of a completion's `logprobs`."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


class CompletionChoice:
    """Makes the parts of one choice of a completion.

    Args:
        echo: the prompt's text, if it is to be shown.
        num_top: asked for in `logprobs`; None: no log-probabilities.
    """

    def __init__(self, names: TokenNames, text: Text, index: int, echo: str | None, num_top: int | None) -> None:
        self._names, self._text, self._index, self._num_top = names, text, index, num_top
        self._echo, self._length = echo, 0
        self._prompt = Logprobs()

    def part(self, delta: Delta) -> dict[str, Any]:
        """Return the choice's JSON of a piece; the first one has the prompt's, if it is shown."""
        logprobs = None
        if self._num_top is not None:
            logprobs, self._prompt = self._prompt, Logprobs()
        text, self._echo = self._echo or "", None
        start = self._length + len(text)
        text += delta.text
        if logprobs is not None:
            self._add_new(logprobs, delta, start)
        self._length += len(text)
        return {
            "index": self._index,
            "text": text,
            "logprobs": None if logprobs is None else logprobs.as_json(),
            "finish_reason": delta.finish_reason,
            "rrt": _depth(delta),
        }

    def add_scores(self, scores: PromptScores) -> None:
        """Take the prompt's log-probabilities, which the first part has; of a long prompt this takes long."""
        logprobs, tokens = self._prompt, self._text.prompt
        logprobs.tokens += [self._names.name(token) for token in tokens]
        # Nothing predicts the first token.
        logprobs.token_logprobs += [None, *map(_finite, scores.logprobs)]
        logprobs.top_logprobs.append(None)
        for token, logprob, top in zip(tokens[1:], scores.logprobs, scores.top, strict=True):
            logprobs.top_logprobs.append(self._top(token, logprob, top))
        offset, stream = 0, TextStream(self._names.tokenizer)
        for token in tokens:
            logprobs.text_offset.append(offset)
            offset += len(stream.push([token]))

    def _add_new(self, logprobs: Logprobs, delta: Delta, start: int) -> None:
        for new, offset in zip(delta.tokens, delta.offsets, strict=True):
            assert new.logprob is not None
            logprobs.tokens.append(self._names.name(new.token))
            logprobs.token_logprobs.append(_finite(new.logprob))
            logprobs.top_logprobs.append(self._top(new.token, new.logprob, new.top_logprobs))
            logprobs.text_offset.append(start + offset)

    def _top(self, token: int, logprob: float, top: TopTokens) -> dict[str, float] | None:
        """Name the token that is there, and the most probable ones."""
        if not self._num_top:
            return None
        return self._names.top([(token, logprob), *(pair for pair in top if pair[0] != token)])


class ChatChoice:
    """Makes the parts of one choice of a chat.

    Args:
        has_logprobs: whether they are asked for.
    """

    def __init__(self, names: TokenNames, index: int, has_logprobs: bool) -> None:
        self._names, self._index, self._has_logprobs = names, index, has_logprobs
        self._has_begun = False

    def message(self, delta: Delta) -> dict[str, Any]:
        """Return the choice's JSON of a whole answer."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": self._index, "message": message, **self._rest(delta)}

    def part(self, delta: Delta) -> dict[str, Any]:
        """Return the choice's JSON of a piece; the first one has the role."""
        content: dict[str, Any] = {"content": delta.text}
        if not self._has_begun:
            self._has_begun, content = True, {"role": "assistant", **content}
        return {"index": self._index, "delta": content, **self._rest(delta)}

    def _rest(self, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if self._has_logprobs:
            logprobs = {"content": [self._with_top(new) for new in delta.tokens], "refusal": None}
        return {"logprobs": logprobs, "finish_reason": delta.finish_reason, "rrt": _depth(delta)}

    def _with_top(self, new: NewToken) -> dict[str, Any]:
        assert new.logprob is not None
        top = [self._entry(token, logprob) for token, logprob in new.top_logprobs]
        return {**self._entry(new.token, new.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._names.name(token)
        known = None if name.startswith("token_id:") else list(name.encode("utf-8", "replace"))
        return {"token": name, "logprob": _finite(logprob), "bytes": known}
