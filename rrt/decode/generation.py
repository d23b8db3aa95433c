"""Generation for a batch of prompts, every token through all loops: the baseline for other ways of serving."""

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from rrt.common.dtypes import dtype_name
from rrt.decode.decoder import Decoder
from rrt.decode.passes import Chunk, PassRows
from rrt.decode.sampling import GREEDY, Sampling, choose_tokens
from rrt.errors import UserError


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | Tensor] | Tensor,
    max_new_tokens: int,
    *,
    samplings: Sequence[Sampling] | None = None,
    stop_ids: Collection[int] = (),
    should_stop: Callable[[list[int]], bool] = lambda new_tokens: False,
    chunk_size: int = 512,
) -> list[list[int]]:
    """Continue each prompt token by token.

    Args:
        prompts: token ids, BOS included where the model expects one; each has at least one token. Sequences of ints
            or integer tensors [T]; a tensor [batch, T] is prompts of one length.
        max_new_tokens: most tokens to add to each prompt.
        samplings: how the tokens of each prompt are chosen; default the most probable one, again and again.
        stop_ids: a sequence ends with one of these tokens.
        should_stop: called after each new token with all new tokens of its prompt; true ends the sequence.
        chunk_size: most prompt tokens in one pass.

    Returns:
        The new tokens of each prompt, the end token included.

    Raises:
        UserError: an empty prompt or one that is no row of integers, a token outside the vocabulary, a sequence beyond
            `decoder.max_positions`, or more sequences than the cache's free pages hold. The cache is left as it was
            before.
    """
    outputs: list[list[int]] = [[] for _ in prompts]

    def has_ended(index: int, token: int) -> bool:
        outputs[index].append(token)
        return should_stop(outputs[index])

    for _ in generate_steps(
        decoder,
        prompts,
        max_new_tokens,
        samplings=samplings,
        stop_ids=stop_ids,
        has_ended=has_ended,
        chunk_size=chunk_size,
    ):
        pass
    return outputs


def generate_steps(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | Tensor] | Tensor,
    max_new_tokens: int,
    *,
    samplings: Sequence[Sampling] | None = None,
    stop_ids: Collection[int] = (),
    has_ended: Callable[[int, int], bool] = lambda index, token: False,
    chunk_size: int = 512,
) -> Iterator[dict[int, int]]:
    """Yield the new tokens step by step, each with the index of its prompt.

    Args:
        has_ended: called with the index of a prompt and its new token, before the step is yielded; true ends the
            sequence.

    The other arguments, and the errors, are those of `generate`. Closing the iterator gives the cache's pages back.
    """
    ids = [token_ids(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]
    _check_arguments(decoder, ids, max_new_tokens, chunk_size)
    samplings = [GREEDY] * len(ids) if samplings is None else samplings
    if len(samplings) != len(ids):
        raise UserError(f"samplings: found {len(samplings)}; expected {len(ids)}, one for each prompt")
    return _generate(decoder, ids, max_new_tokens, samplings, frozenset(stop_ids), has_ended, chunk_size)


def _generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    samplings: Sequence[Sampling],
    stop_ids: frozenset[int],
    has_ended: Callable[[int, int], bool],
    chunk_size: int,
) -> Iterator[dict[int, int]]:
    if max_new_tokens == 0 or not prompts:
        return
    sequences = [decoder.cache.allocate() for _ in prompts]
    try:
        active = list(range(len(prompts)))
        rows = _prefill(decoder, prompts, sequences, chunk_size)
        for step in range(max_new_tokens):
            tokens = choose_tokens(decoder.logits(rows), [samplings[i] for i in active], [step] * len(active))
            chosen = dict(zip(active, tokens, strict=True))
            active = [i for i in active if not has_ended(i, chosen[i]) and chosen[i] not in stop_ids]
            yield chosen
            if not active or step == max_new_tokens - 1:
                return
            rows = _decode(
                decoder,
                [chosen[i] for i in active],
                [sequences[i] for i in active],
                [len(prompts[i]) + step for i in active],
            )
    finally:
        for sequence in sequences:
            decoder.cache.free(sequence)


def _prefill(decoder: Decoder, prompts: Sequence[Sequence[int]], sequences: list[int], chunk_size: int) -> Tensor:
    """Run the prompts through all loops; returns the state [M, D] of the last token of each."""
    last_states: list[Tensor] = []
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
        # Pieces are in the order of the prompts, so their ends are too.
        last_states += [x[end - 1] for end, (i, _, stop) in zip(ends, pieces, strict=True) if stop == len(prompts[i])]
    return torch.stack(last_states)


def _decode(decoder: Decoder, tokens: list[int], sequences: list[int], positions: list[int]) -> Tensor:
    """Run one token of each sequence through all loops; returns their states [M, D]."""
    loops = range(decoder.cache.num_loops)
    decoder.cache.append_rows(
        sequences * len(loops), [loop for loop in loops for _ in sequences], [1] * (len(loops) * len(sequences))
    )
    return _all_loops(decoder, tokens, [PassRows(sequences, [loop] * len(sequences), positions) for loop in loops])


def _all_loops(decoder: Decoder, tokens: list[int], rows_of_loops: list[PassRows]) -> Tensor:
    x = decoder.embed(torch.tensor(tokens, device=decoder.cache.k.device))
    for rows in rows_of_loops:
        x = decoder.block(x, decoder.cache.plan(rows))
    return x


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


def token_ids(name: str, prompt: Sequence[int] | Tensor) -> list[int]:
    """Return the tokens of a prompt, a sequence of ints or an integer tensor [T]; `name` is for errors."""
    if not isinstance(prompt, Tensor):
        try:
            return [operator.index(token) for token in prompt]
        except TypeError as error:
            raise UserError(f"{name}: found {type(prompt).__name__} ({error}); expected token ids") from None
    if prompt.dim() != 1 or prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
        raise UserError(
            f"{name}: found a tensor {list(prompt.shape)} of {dtype_name(prompt.dtype)}; expected token ids: "
            "one dimension of an integer dtype"
        )
    ids: list[int] = prompt.tolist()
    return ids


def check_prompt(decoder: Decoder, name: str, tokens: Sequence[int], max_new_tokens: int) -> int:
    """Return the positions that a prompt's continuation takes. Raises `UserError` if the decoder cannot compute it."""
    vocab_size = decoder.model.config.vocab_size
    if not tokens:
        raise UserError(f"{name}: found no token; expected at least one, such as the begin-of-sequence token")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise UserError(f"{name}: found token {token}; expected tokens in [0, {vocab_size})")
    # The last new token is never an input.
    length = len(tokens) + max(max_new_tokens - 1, 0)
    if length > decoder.max_positions:
        raise UserError(
            f"{name}: {len(tokens)} tokens and {max_new_tokens} new ones need {length} positions; "
            f"expected at most max_positions = {decoder.max_positions}"
        )
    return length


def _check_arguments(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk_size: int) -> None:
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("chunk_size", chunk_size, 1)):
        if value < least:
            raise UserError(f"{name}: found {value}; expected at least {least}")
    needed = 0
    for i, prompt in enumerate(prompts):
        needed += decoder.cache.pages_for(check_prompt(decoder, f"prompts[{i}]", prompt, max_new_tokens))
    if needed > decoder.cache.num_free_pages:
        raise UserError(
            f"cache: found {decoder.cache.num_free_pages} free pages; expected {needed} for {len(prompts)} prompts: "
            "give fewer at once, or a larger cache"
        )
