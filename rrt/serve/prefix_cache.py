"""Pages of texts that were computed, kept for requests that begin alike.

A text is kept as a sequence of the cache, whose pages are shared by reference at every loop. It is found by its whole
pages: the n-th key of a text stands for the tokens of its first n pages. No text is the beginning of another one that
is kept, so that each holds a page of its own, and dropping it frees pages unless a running request reads them.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from rrt.decode.kv_cache import PagedCache


@dataclass(frozen=True)
class _Text:
    tokens: tuple[int, ...]
    keys: list[int]


class PrefixCache:
    """Kept texts of one cache; the one that was used longest ago goes first."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        # By their sequences, the last used at the end.
        self._texts: OrderedDict[int, _Text] = OrderedDict()
        self._sequence_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def keys(self, tokens: Sequence[int]) -> list[int]:
        """Return the keys of a text, one for each page that it fills."""
        keys, key, start = [], 0, 0
        for end in range(self._end_of(1), len(tokens) + 1, self._cache.page_size):
            key = hash((key, *tokens[start:end]))
            keys.append(key)
            start = end
        return keys

    def num_kept(self, keys: list[int]) -> int:
        """Count the pages at the beginning of a text that are kept."""
        return next((count for count in range(len(keys), 0, -1) if keys[count - 1] in self._sequence_of), 0)

    def fork(self, tokens: Sequence[int], keys: list[int]) -> tuple[int, int]:
        """Start a sequence on the longest kept beginning of a text.

        At least the last token is left to compute, for its logits.

        Returns:
            The cache's sequence, and its length; 0 if nothing fits.
        """
        most = len(keys) - (len(keys) > 0 and self._end_of(len(keys)) == len(tokens))
        for count in range(most, 0, -1):
            sequence, length = self._sequence_of.get(keys[count - 1]), self._end_of(count)
            # Keys of different texts may be equal, if hardly ever.
            if sequence is not None and self._texts[sequence].tokens[:length] == tuple(tokens[:length]):
                self._use(sequence)
                forked = self._cache.fork(sequence)
                self._cache.truncate(forked, length)
                return forked, length
        return self._cache.allocate(), 0

    def keep(self, sequence: int, tokens: Sequence[int]) -> None:
        """Take over a sequence of the cache that holds `tokens` at every loop, exactly computed, and maybe more."""
        keys = self.keys(tokens)
        length = self._end_of(len(keys)) if keys else 0
        if not keys or keys[-1] in self._sequence_of:
            if keys:
                self._use(self._sequence_of[keys[-1]])
            self._cache.free(sequence)
            return
        for count, key in enumerate(keys, 1):
            beginning = self._sequence_of.get(key)
            if beginning is not None and len(self._texts[beginning].keys) == count:
                self._drop(beginning)
        self._cache.truncate(sequence, length)
        self._texts[sequence] = _Text(tuple(tokens[:length]), keys)
        self._use(sequence)

    def evict(self) -> bool:
        """Drop the text that was used longest ago; False if there is none."""
        if not self._texts:
            return False
        self._drop(next(iter(self._texts)))
        return True

    def _use(self, sequence: int) -> None:
        self._texts.move_to_end(sequence)
        # Texts that share a beginning share its keys: they name the one that goes last.
        for key in self._texts[sequence].keys:
            self._sequence_of[key] = sequence

    def _drop(self, sequence: int) -> None:
        for key in self._texts.pop(sequence).keys:
            if self._sequence_of[key] == sequence:
                del self._sequence_of[key]
        self._cache.free(sequence)

    def _end_of(self, pages: int) -> int:
        """Count the positions of the first pages; prefix vectors of the model come before them."""
        return pages * self._cache.page_size - self._cache.prefix_length % self._cache.page_size
