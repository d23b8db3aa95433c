"""The text of one request as its tokens come."""

from collections.abc import Sequence

from rrt.decode.text_stream import Decodes, StopStrings, TextStream
from rrt.serve.requests import NewToken, SamplingParams

_TOKENS_BEFORE = 16
"""Of a prompt, that decide how the new text begins."""


class RequestText:
    """Turns new tokens into text: whole characters, up to a stop string or the token that ends the request.

    Args:
        params: of the request.
        prompt: tokens that the new text is to stand after, so that it has its leading space; none where it is a text by
            itself, as an answer in a chat.
    """

    def __init__(self, tokenizer: Decodes, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        self._stop_ids = params.stop_ids
        self._stream, self._stops = TextStream(tokenizer), StopStrings(params.stop)
        self._stream.push(prompt[-_TOKENS_BEFORE:])
        self.num_decoded = 0
        """Characters of the new text so far, with those that a stop string could still cut off."""

    @property
    def has_stopped(self) -> bool:
        """A stop string has ended the text, whatever the engine still computes."""
        return self._stops.has_stopped

    def show_prompt(self, tokens: list[int]) -> str:
        """Return the text of a prompt that is shown before the new text; it may hold stop strings."""
        return self._stream.push(tokens)

    def push(self, new: NewToken) -> str:
        """Add a token; returns the text that is certain by now and was not returned before."""
        # The token that ends a text is none of it, though it may have one.
        decoded = "" if new.token in self._stop_ids else self._stream.push([new.token])
        self.num_decoded += len(decoded)
        piece = self._stops.push(decoded)
        if new.finish_reason is not None:
            piece += self._stops.push(self._stream.finish()) + self._stops.finish()
        return piece
