"""Greedy decoding of a batch of prompts, every token through all loops: the baseline for other ways of serving."""

import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from rrt.common.dtypes import dtype_name
from rrt.decode.decoder import Decoder
from rrt.decode.passes import Chunk, PassRows
from rrt.errors import UserError


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | Tensor] | Tensor,
    max_new_tokens: int,
    *,
    eos_token_id: int | None = None,
    should_stop: Callable[[list[int]], bool] = lambda new_tokens: False,
    chunk_size: int = 512,
) -> list[list[int]]:
    """Continue each prompt by its most probable next token, again and again.

    Args:
        prompts: token ids, BOS included where the model expects one; each has at least one token. Sequences of ints
            or integer tensors [T]; a tensor [batch, T] is prompts of one length.
        max_new_tokens: most tokens to add to each prompt.
        eos_token_id: a sequence ends with this token.
        should_stop: called after each new token with all new tokens of its prompt; true ends the sequence.
        chunk_size: most prompt tokens in one pass.

    Returns:
        The new tokens of each prompt, the end token included.

    Raises:
        UserError: an empty prompt or one that is no row of integers, a token outside the vocabulary, a sequence beyond
            `decoder.max_positions`, or more sequences than the cache's free pages hold. The cache is left as it was
            before.
    """
    token_ids = [_token_ids(i, prompt) for i, prompt in enumerate(prompts)]
    _check_arguments(decoder, token_ids, max_new_tokens, chunk_size)
    outputs: list[list[int]] = [[] for _ in token_ids]
    if max_new_tokens == 0:
        return outputs
    sequences = [decoder.cache.allocate() for _ in token_ids]
    try:
        for output, token in zip(outputs, _prefill(decoder, token_ids, sequences, chunk_size), strict=True):
            output.append(token)
        active = list(range(len(token_ids)))

        def goes_on(output: list[int]) -> bool:
            return len(output) < max_new_tokens and output[-1] != eos_token_id and not should_stop(output)

        while active := [i for i in active if goes_on(outputs[i])]:
            positions = [len(token_ids[i]) + len(outputs[i]) - 1 for i in active]
            tokens = _decode(decoder, [outputs[i][-1] for i in active], [sequences[i] for i in active], positions)
            for i, token in zip(active, tokens, strict=True):
                outputs[i].append(token)
    finally:
        for sequence in sequences:
            decoder.cache.free(sequence)
    return outputs


def _prefill(decoder: Decoder, prompts: Sequence[Sequence[int]], sequences: list[int], chunk_size: int) -> list[int]:
    """Run the prompts through all loops; returns the token after each."""
    following = [0] * len(prompts)
    for pieces in _pieces([len(prompt) for prompt in prompts], chunk_size):
        for i, begin, end in pieces:
            decoder.cache.append(sequences[i], end - begin)
        tokens = [token for i, begin, end in pieces for token in prompts[i][begin:end]]
        x = _all_loops(
            decoder,
            tokens,
            [
                PassRows(chunks=[Chunk(sequences[i], loop, begin, end - begin) for i, begin, end in pieces])
                for loop in range(decoder.cache.num_loops)
            ],
        )
        ends = accumulate(end - begin for _, begin, end in pieces)
        last_rows = {i: row - 1 for (i, _, end), row in zip(pieces, ends, strict=True) if end == len(prompts[i])}
        for i, token in zip(last_rows, _best(decoder, x[list(last_rows.values())]), strict=True):
            following[i] = token
    return following


def _decode(decoder: Decoder, tokens: list[int], sequences: list[int], positions: list[int]) -> list[int]:
    for sequence in sequences:
        decoder.cache.append(sequence, 1)
    loops = range(decoder.cache.num_loops)
    x = _all_loops(decoder, tokens, [PassRows(sequences, [loop] * len(sequences), positions) for loop in loops])
    return _best(decoder, x)


def _all_loops(decoder: Decoder, tokens: list[int], rows_of_loops: list[PassRows]) -> Tensor:
    x = decoder.embed(torch.tensor(tokens, device=decoder.cache.k.device))
    for rows in rows_of_loops:
        x = decoder.block(x, decoder.cache.plan(rows))
    return x


def _best(decoder: Decoder, x: Tensor) -> list[int]:
    best: list[int] = decoder.logits(x).argmax(-1).tolist()
    return best


def _pieces(lengths: list[int], chunk_size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Split prompts of these lengths into passes of (prompt, begin, end), at most `chunk_size` tokens each."""
    pieces, room = [], chunk_size
    for i, length in enumerate(lengths):
        begin = 0
        while begin < length:
            end = min(length, begin + room)
            pieces.append((i, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield pieces
                pieces, room = [], chunk_size
    if pieces:
        yield pieces


def _token_ids(index: int, prompt: Sequence[int] | Tensor) -> list[int]:
    if not isinstance(prompt, Tensor):
        try:
            return [operator.index(token) for token in prompt]
        except TypeError as error:
            raise UserError(f"prompts[{index}]: found {type(prompt).__name__} ({error}); expected token ids") from None
    if prompt.dim() != 1 or prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
        raise UserError(
            f"prompts[{index}]: found a tensor {list(prompt.shape)} of {dtype_name(prompt.dtype)}; expected token ids: "
            "one dimension of an integer dtype"
        )
    ids: list[int] = prompt.tolist()
    return ids


def _check_arguments(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk_size: int) -> None:
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("chunk_size", chunk_size, 1)):
        if value < least:
            raise UserError(f"{name}: found {value}; expected at least {least}")
    vocab_size = decoder.model.config.vocab_size
    needed = 0
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompts[{i}]: found no token; expected at least one, such as the begin-of-sequence token")
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise UserError(f"prompts[{i}]: found token {token}; expected tokens in [0, {vocab_size})")
        # The last new token is never an input.
        length = len(prompt) + max(max_new_tokens - 1, 0)
        if length > decoder.max_positions:
            raise UserError(
                f"prompts[{i}]: {len(prompt)} tokens and {max_new_tokens} new ones need {length} positions; "
                f"expected at most max_positions = {decoder.max_positions}"
            )
        needed += decoder.cache.pages_for(length)
    if needed > decoder.cache.num_free_pages:
        raise UserError(
            f"cache: found {decoder.cache.num_free_pages} free pages; expected {needed} for {len(prompts)} prompts: "
            "give fewer at once, or a larger cache"
        )
