"""Documents of a corpus as tokens: cut into windows, batched, and scored at every exit.

A token belongs to the group of its document (SlimPajama's subset, for instance), so that one pass over a corpus gives
figures of each group. Shapes: b rows, T positions, N targets (positions that have one), E exits, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rrt.data.corpus import TextFilter, find_files, grouped_documents, is_compressed
from rrt.data.shards import open_shards
from rrt.data.tokenizer import Tokenizer
from rrt.errors import UserError
from rrt.model.transformer import RecursiveTransformer

Window = npt.NDArray[np.int64]
"""[2, n + 1]: tokens, of which all but the first are targets, and the group of each."""

DEFAULT_GROUP_FIELD = "meta.redpajama_set_name"
PAD = -1
"""Marks positions without a target."""

_COMPRESSION = 3
"""Assumed bytes of text in a byte of a compressed file, to estimate the tokens left."""
_TEXTS_AT_ONCE = 64
_LOGITS_AT_ONCE = 2**26
"""Logits held at a time, 256 MiB in fp32; those of a whole batch might not fit with a large vocabulary."""


@dataclass(frozen=True)
class Document:
    """A document: tokens [n] with BOS and EOS as in training, bytes of its text in UTF-8, index of its group."""

    tokens: npt.NDArray[np.integer]
    text_bytes: int
    group: int = 0


class Corpus:
    """The documents of a token-shard directory, or of files that are tokenised on the way.

    Attributes:
        groups: names of the groups read so far; "" for documents without one.
        num_tokens: all tokens; of files an estimate, None until the first documents are read.
        text_filter: counts the records without text that were skipped.
    """

    def __init__(self, data: str, split: str, text_field: str, group_field: str | None, tokenizer: Tokenizer) -> None:
        self.groups: list[str] = []
        self.num_tokens: int | None = None
        self.text_filter = TextFilter()
        self._tokenizer = tokenizer
        self._text_field, self._group_field = text_field, group_field
        self._shards = open_shards(data, split) if Path(data).is_dir() else None
        if self._shards is None:
            self._files = find_files(data, split=split)
            return
        self._shards.check_tokenizer(tokenizer)
        self.num_tokens = self._shards.num_tokens
        if group_field is not None:
            raise UserError(f"--group-field: found {group_field!r} with token shards, which have none; expected files")

    def documents(self) -> Iterator[Document]:
        """Yield all documents in order. Shards know only the bytes of all documents, which the first document gets.

        Raises:
            UserError: a file or record that cannot be read, or no record has the `group_field` that was given.
        """
        if self._shards is None:
            yield from self._tokenised()
            return
        self.groups.append("")
        for shard in self._shards.shards:
            for index in range(len(shard.starts)):
                yield Document(shard.document(index), 0 if index else shard.text_bytes)

    def _tokenised(self) -> Iterator[Document]:
        size = sum(path.stat().st_size * (_COMPRESSION if is_compressed(path) else 1) for path in self._files)
        field = self._group_field or DEFAULT_GROUP_FIELD
        records = (
            record
            for path in self._files
            for record in grouped_documents(path, field, text_field=self._text_field, text_filter=self.text_filter)
        )
        while batch := list(itertools.islice(records, _TEXTS_AT_ONCE)):
            sizes = [len(text.encode("utf-8", "replace")) for text, _ in batch]
            encoded = self._tokenizer.encode_documents([text for text, _ in batch])
            if self.num_tokens is None:
                self.num_tokens = max(1, round(size * sum(map(len, encoded)) / sum(sizes)))
            for ids, text_bytes, (_, group) in zip(encoded, sizes, batch, strict=True):
                yield Document(np.asarray(ids), text_bytes, self._index(group or ""))
        if self._group_field is not None and self.groups == [""]:
            raise UserError(f"--group-field: no document has {self._group_field!r}; expected a field of the records")

    def _index(self, group: str) -> int:
        if group not in self.groups:
            self.groups.append(group)
        return self.groups.index(group)


def packed_windows(documents: Iterable[Document], context: int) -> Iterator[Window]:
    """Yield windows of `context` targets over the stream of all documents; the last may be shorter.

    Neighbours share a token: every token of the stream but the first is a target once.
    """
    held: Window = np.empty((2, 0), dtype=np.int64)
    for document in documents:
        piece = np.stack((document.tokens.astype(np.int64), np.full(len(document.tokens), document.group)))
        start = 0
        while start < piece.shape[1]:
            room = context + 1 - held.shape[1]
            held = np.concatenate((held, piece[:, start : start + room]), axis=1)
            start += room
            if held.shape[1] == context + 1:
                yield held
                held = held[:, -1:]
    if held.shape[1] > 1:
        yield held


def document_windows(documents: Iterable[Document], context: int, bos_id: int | None) -> Iterator[Window]:
    """Yield windows of at most `context` targets of each document by itself.

    With `bos_id` every token of the text is a target; without it the first is not, as nothing precedes it, unless the
    document has the BOS that training gives it.
    """
    for document in documents:
        tokens = document.tokens
        if bos_id is not None and tokens[0] != bos_id:
            tokens = np.concatenate(([bos_id], tokens))
        yield from packed_windows([Document(tokens, 0, document.group)], context)


@dataclass(frozen=True)
class Batch:
    """Windows padded to one length: inputs, targets and groups int64 [b, T]; targets are `PAD` where there is none."""

    inputs: Tensor
    targets: Tensor
    groups: Tensor

    @property
    def num_targets(self) -> int:
        return int((self.targets != PAD).sum())


def make_batch(windows: list[Window], bos_id: int | None) -> Batch:
    """Pad windows to a batch; `bos_id`, if any, takes the place of each window's first token."""
    shape = (len(windows), max(window.shape[1] for window in windows) - 1)
    inputs, targets, groups = (np.full(shape, fill, dtype=np.int64) for fill in (0, PAD, 0))
    for row, window in enumerate(windows):
        length = window.shape[1] - 1
        inputs[row, :length], targets[row, :length], groups[row, :length] = window[0, :-1], window[0, 1:], window[1, 1:]
    if bos_id is not None:
        inputs[:, 0] = bos_id
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(groups))


def batches(windows: Iterable[Window], context: int, batch_size: int) -> Iterator[list[Window]]:
    """Yield lists of windows of at most `batch_size * context` positions, padding included.

    Windows are sorted by length among those of 16 batches, so that there is little padding.
    """
    left = iter(windows)
    while pool := list(itertools.islice(left, 16 * batch_size)):
        pool.sort(key=lambda window: -window.shape[1])
        while pool:
            rows = max(1, batch_size * context // (pool[0].shape[1] - 1))
            yield pool[:rows]
            pool = pool[rows:]


@torch.inference_mode()
def score_exits(
    model: RecursiveTransformer, batch: Batch, loops: range, read: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Apply `read` to the logits of each exit at the positions that have a target.

    The head runs on a few positions at a time, so that logits never exist whole.

    Args:
        loops: exits to read; the loops after the last of them do not run.
        read: logits [n, V] in fp32 (fp64 for an fp64 model) and targets int64 [n] -> [n] or [n, ...].

    Returns:
        [E, N] or [E, N, ...], positions row by row.
    """
    device = model.embed.device
    targets = batch.targets.to(device)
    has_target = targets != PAD
    chosen = targets[has_target]
    wide = torch.promote_types(model.embed.dtype, torch.float32)
    rows = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    states = model.hidden_states(batch.inputs.to(device), num_loops=loops[-1] + 1)
    exits = []
    for loop in loops:
        parts = zip(states[loop][has_target].split(rows), chosen.split(rows), strict=True)
        exits.append(torch.cat([read(model.logits(part, loop).to(wide), wanted) for part, wanted in parts]))
    return torch.stack(exits)
