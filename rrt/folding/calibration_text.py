"""Text that a conversion is calibrated on, or exits are fitted on: token shards, or text to be turned into tokens.

Documents follow each other, each with BOS and EOS as in training, and are cut into rows. Where texts begin with BOS, so
does every row, in place of the token before its first target, as in training and evaluation: heads rest on the first
token of a text, and a base that has never seen a text without BOS does otherwise there.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rrt.data.corpus import documents
from rrt.data.shards import TokenShards, document_bos, open_shards
from rrt.data.tokenizer import Tokenizer
from rrt.errors import UserError

_TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class CalibrationText:
    """What is read as calibration text.

    Attributes:
        paths: directories of token shards of the model's tokenizer, or text as :mod:`rrt.data.corpus` reads it.
        num_tokens: of the text, rounded up to whole rows.
        context: tokens of a row.
    """

    paths: tuple[str, ...]
    num_tokens: int = 32768
    context: int = 512

    def __post_init__(self) -> None:
        for flag, found, least in (
            ("--calibration-tokens", self.num_tokens, 1),
            ("--calibration-context", self.context, 2),
        ):
            if found < least:
                raise UserError(f"{flag}: found {found}; expected {least} or more")

    def check_context(self, longest: int) -> None:
        """Refuse rows longer than `longest`, the context that the model can read, in tokens."""
        if self.context > longest:
            raise UserError(f"--calibration-context: found {self.context}; expected at most {longest}, the model's")


def calibration_rows(text: CalibrationText, tokenizer: Tokenizer | None, longest: int) -> Tensor:
    """Read int64 [rows, context + 1] of the calibration text: inputs, and their next tokens as labels.

    Every path gives an equal share. Of token shards rows are taken at even intervals from their training split; of text
    the first documents.

    Args:
        tokenizer: the model's.
        longest: context that the model can read, in tokens.

    Raises:
        UserError: a path that cannot be read, shards of another tokenizer, text without a tokenizer, too little of it,
            or rows that are too long.
    """
    paths, num_tokens, context = text.paths, text.num_tokens, text.context
    text.check_context(longest)
    num_rows = -(-num_tokens // context)
    if num_rows < len(paths):
        raise UserError(
            f"--calibration-tokens: found {num_tokens}; expected at least {context} for each of {len(paths)} paths"
        )
    shares = [(num_rows + index) // len(paths) for index in reversed(range(len(paths)))]
    parts = [_rows_of(path, share, context, tokenizer) for path, share in zip(paths, shares, strict=True)]
    return torch.cat(parts)


def _rows_of(path: str, num_rows: int, context: int, tokenizer: Tokenizer | None) -> Tensor:
    if Path(path).is_dir():
        shards = open_shards(path, "train")
        if tokenizer is not None:
            shards.check_tokenizer(tokenizer)
        return _rows_of_shards(shards, num_rows, context)
    if tokenizer is None:
        raise UserError(f"--calibration: found text, {path}, but the model has no tokenizer; expected token shards")
    needed = num_rows * context + 1
    tokens = _first_tokens(_tokenised(path, tokenizer), needed)
    _check_enough(path, len(tokens), needed)
    return _cut(tokens, np.arange(num_rows) * context, context, document_bos(tokenizer))


def _rows_of_shards(shards: TokenShards, num_rows: int, context: int) -> Tensor:
    """Cut rows at even intervals from all shards, one of which holds a row whole."""
    places = [max(0, (len(shard.tokens) - 1) // context) for shard in shards.shards]
    ends = np.cumsum(places)
    _check_enough(str(shards.directory), sum(places) * context, num_rows * context)
    chosen = np.arange(num_rows) * sum(places) // num_rows
    rows = []
    for index in chosen:
        shard = int(np.searchsorted(ends, index, side="right"))
        start = (int(index) - int(ends[shard]) + places[shard]) * context
        rows.append(_cut(shards.shards[shard].tokens, np.array([start]), context, shards.bos_id))
    return torch.cat(rows)


def _tokenised(path: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield the tokens of each document of a file or glob."""
    texts = documents(path)
    while batch := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
        yield from tokenizer.encode_documents(batch)


def _first_tokens(encoded: Iterator[list[int]], needed: int) -> npt.NDArray[np.int64]:
    tokens: list[int] = []
    for document in encoded:
        tokens += document
        if len(tokens) >= needed:
            break
    return np.array(tokens[:needed], dtype=np.int64)


def _check_enough(path: str, found: int, needed: int) -> None:
    if found < needed:
        raise UserError(
            f"--calibration: {path}: found {found:,} tokens; expected at least {needed:,}: give more text, or "
            "a smaller --calibration-tokens"
        )


def _cut(tokens: npt.NDArray[np.integer], starts: npt.NDArray[np.int64], context: int, bos_id: int | None) -> Tensor:
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    if bos_id is not None:
        rows[:, 0] = bos_id
    return rows
