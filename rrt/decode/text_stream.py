"""Text as it is generated, token by token: whole characters, and nothing of what a stop string may cut off."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

_REPLACEMENT = "\ufffd"
# A window is cut to its last tokens when it is longer.
_LONGEST_WINDOW, _KEPT_TOKENS = 16, 4
# Byte tokens come first in a vocabulary, after special tokens and reserved ones.
_SEARCHED_IDS = 4096


class Decodes(Protocol):
    """What is needed of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def __hash__(self) -> int: ...


@lru_cache(8)
def find_broken_byte(tokenizer: Decodes) -> int | None:
    """Find a token that is no valid text by itself, but a byte from within a character; None if there is none."""
    return next((i for i in range(min(tokenizer.vocab_size, _SEARCHED_IDS)) if tokenizer.decode([i]) == "\ufffd"), None)


class TextStream:
    """The text of tokens that come one after the other.

        stream = TextStream(tokenizer)
        for token in tokens:
            print(stream.push([token]), end="")
        print(stream.finish())

    All pieces together are `tokenizer.decode(tokens)`. Text is held back while later tokens could change it: within
    a character; and, of tokenizers that decode a run of bytes as a whole, within such a run. Only the last tokens
    are decoded again at each step: a text by itself may lose its leading space, which is then missing before and
    after the new token alike.
    """

    def __init__(self, tokenizer: Decodes) -> None:
        self._tokenizer = tokenizer
        self._broken_byte = find_broken_byte(tokenizer)
        self._window: list[int] = []
        self._returned = ""  # of the window's text

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; returns the text that is certain by now and was not returned before."""
        self._window += tokens
        text = certain = self._tokenizer.decode(self._window)
        if self._broken_byte is not None:
            broken = self._tokenizer.decode([*self._window, self._broken_byte])
            certain = _common_prefix(text, broken)
        certain = certain.rstrip(_REPLACEMENT)
        if not certain.startswith(self._returned):
            if len(self._window) <= _LONGEST_WINDOW:
                return ""
            # The decoder has changed text that was returned, as one that cleans up spaces may: go on by length.
            self._returned = certain[: len(self._returned)]
        piece = certain[len(self._returned) :]
        self._returned = certain
        if certain == text and len(self._window) > _LONGEST_WINDOW:
            self._cut_window(text, len(tokens))
        return piece

    def finish(self) -> str:
        """Return the rest, which no token can change any more; the stream is then empty."""
        text = self._tokenizer.decode(self._window)
        rest = text[len(_common_prefix(text, self._returned)) :]
        self._window, self._returned = [], ""
        return rest

    def _cut_window(self, text: str, num_new: int) -> None:
        kept = self._window[-_KEPT_TOKENS:]
        kept_text = self._tokenizer.decode(kept)
        # Empty, it would be a text's beginning, where later tokens may lose a space.
        if kept_text and text.endswith(kept_text):
            self._window, self._returned = kept, kept_text
        elif not kept_text and self._tokenizer.decode(self._window[:-num_new]) == text:
            # Special tokens have no text: of many in a row, the window keeps the first ones.
            del self._window[-num_new:]


def _common_prefix(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


class StopStrings:
    """A text's end before the first of some strings, found in a text that comes in pieces.

    What may be the beginning of a stop string is held back until it is not.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.has_stopped = False
        """A stop string was found; what came after its beginning is dropped."""

    def push(self, piece: str) -> str:
        """Add a piece; returns the text that no stop string can cut off any more."""
        if self.has_stopped:
            return ""
        text = self._held + piece
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self.has_stopped, self._held = True, ""
            return text[: min(found)]
        self._held = text[len(text) - self._beginning(text) :]
        return text[: len(text) - len(self._held)]

    def finish(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Return the length of the longest end of `text` with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
