"""Continue prompts, or answer messages: checkpoint and text in, text out as it is generated.

    python -m rrt.generate --checkpoint runs/out/relaxed --prompt "def main(" --max-new-tokens 32

The work is done by :mod:`rrt.serve.engine`: all loops of every token, unless --exit-policy lets some leave earlier.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rrt.checkpoint.source import load_model, open_source
from rrt.common.cli import CommandParser, human_bytes, human_count, keep_freed_memory, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.common.processes import pick_device
from rrt.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from rrt.decode.decoder import Decoder
from rrt.decode.kv_cache import PagedCache
from rrt.errors import UserError
from rrt.model.transformer import RecursiveTransformer
from rrt.serve.engine import Engine
from rrt.serve.exits import parse_policy
from rrt.serve.flags import add_exit_flags
from rrt.serve.requests import NewToken, SamplingParams
from rrt.serve.text import RequestText

_PAGE_SIZE = 16
_SEPARATOR = "\n---\n"
_COLOURS = (32, 33, 31, 35, 36)
"""Of text whose tokens were certain after loop 0, 1, ...: green, yellow, red, magenta, cyan."""


@dataclass(frozen=True)
class _Prompt:
    """Tokens to continue, and those of them that are shown before the new text."""

    tokens: list[int]
    shown: list[int]


def _make_cache(model: RecursiveTransformer, lengths: Sequence[int]) -> PagedCache:
    """Make a cache for sequences of these lengths and the model's prefix vectors."""
    prefix = model.recursion.prefix_length
    pages_per_loop = sum(-(-(prefix + length) // _PAGE_SIZE) for length in (0, *lengths))
    num_pages = model.recursion.num_loops * pages_per_loop
    return PagedCache(
        model.config, model.recursion, num_pages, _PAGE_SIZE, dtype=model.embed.dtype, device=model.embed.device
    )


def _check_prompts(prompts: Sequence[_Prompt], max_new_tokens: int, max_positions: int) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not prompt.tokens:
            raise UserError(f"--prompt number {number}: found no token; expected text, or --bos yes")
        # The last new token is never read.
        if len(prompt.tokens) + max_new_tokens - 1 > max_positions:
            raise UserError(
                f"--prompt number {number}: found {len(prompt.tokens)} tokens with --max-new-tokens {max_new_tokens}; "
                f"expected at most {max_positions + 1} together, for the model's positions: shorten it, or add fewer"
            )


def _encode_prompts(tokenizer: Tokenizer, arguments: argparse.Namespace) -> list[_Prompt]:
    if not arguments.chat:
        batch = tokenizer.with_bos(arguments.bos).encode_batch(arguments.prompt, parse_special=arguments.parse_special)
        return [_Prompt(ids, ids) for ids in batch]
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    texts = [tokenizer.apply_chat_template([*system, {"role": "user", "content": text}]) for text in arguments.prompt]
    # The template has written BOS where the model wants it.
    return [_Prompt(ids, []) for ids in tokenizer.encode_batch(texts, bos=False, parse_special=True)]


class _Output:
    """What is printed of one prompt: what is shown of it, then the new text."""

    def __init__(self, tokenizer: Tokenizer, prompt: _Prompt, params: SamplingParams, show_depth: bool) -> None:
        self._text, self._show_depth = RequestText(tokenizer, params), show_depth
        self._untaken = self._text.show_prompt(prompt.shown)

    def add(self, new: NewToken) -> bool:
        """Add a new token; returns whether a stop string ends the text."""
        piece = self._text.push(new)
        if self._show_depth and piece:
            piece = f"\x1b[{_COLOURS[new.agreed_loop % len(_COLOURS)]}m{piece}\x1b[0m"
        self._untaken += piece
        return self._text.has_stopped

    def take(self) -> str:
        """Return the text since the last call."""
        text, self._untaken = self._untaken, ""
        return text


def _pieces(engine: Engine, outputs: dict[int, _Output]) -> Iterator[str]:
    """Yield the text as it can be printed: of one prompt step by step, of several one after the other at the end.

    Args:
        outputs: of each request, by its id, in the order of the prompts.
    """
    first, is_streamed = next(iter(outputs.values())), len(outputs) == 1
    if is_streamed:
        yield first.take()
    while engine.has_work:
        for new in engine.step():
            if outputs[new.request_id].add(new):
                engine.cancel(new.request_id)
        if is_streamed:
            yield first.take()
    if not is_streamed:
        yield _SEPARATOR.join(output.take() for output in outputs.values())


def _print_pieces(pieces: Iterator[str]) -> None:
    """Print text as it comes; an interrupted text ends its line."""
    try:
        for piece in pieces:
            print(piece, end="", flush=bool(piece))
    finally:
        print(flush=True)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m rrt.generate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="one of our checkpoints, an HF directory or a .gguf file, with its tokenizer",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="text to continue; given repeatedly, all are computed together and printed when they are done",
    )
    parser.add_argument(
        "--chat", action="store_true", help="answer the prompt as a user's message, by the chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message before the user's, with --chat")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="most tokens to add to each prompt; a token that ends the text ends it earlier (default: 64)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given repeatedly"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="draw tokens from the softmax of logits / T; 0: take the most probable one (default: 0)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="draw from the K most probable tokens; 0: from all (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the fewest tokens that have probability P together (default: 1)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="the same seed draws the same text; prompt i has N + i (default: 0)",
    )
    parser.add_argument(
        "--bos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="begin each prompt with BOS; auto: as the tokenizer does (default: auto)",
    )
    parser.add_argument(
        "--parse-special", action="store_true", help="text that spells a special token becomes it; --chat implies it"
    )
    add_exit_flags(parser)
    parser.add_argument(
        "--show-depth",
        action="store_true",
        help="colour text by the loop after which its tokens were certain: green 0, yellow 1, red 2",
    )
    add_dtype_flag(parser, "dtype to compute in")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: CUDA if available (default: auto)"
    )
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: found {arguments.max_new_tokens}; expected 1 or more")
    if "" in arguments.stop:
        raise UserError("--stop: found an empty text; expected at least one character")
    arguments.exit_policy = parse_policy(arguments.exit_policy, arguments.checkpoint)
    if arguments.system is not None and not arguments.chat:
        raise UserError("--system: expected with --chat alone")
    if arguments.chat and arguments.bos != "auto":
        raise UserError(f"--bos: found {arguments.bos} with --chat; expected auto, for the chat template decides")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``python -m rrt.generate``; see the head of this file."""
    arguments = _parse_arguments(argv)
    try:
        params = [
            SamplingParams(
                arguments.temperature,
                arguments.top_k,
                arguments.top_p,
                arguments.seed + index,
                max_new_tokens=arguments.max_new_tokens,
                stop=tuple(arguments.stop),
            )
            for index in range(len(arguments.prompt))
        ]
    except UserError as error:  # begins with the name of a field, which is a flag here
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None
    device = pick_device(arguments.device)
    # Everything that can be wrong is found before the weights are read.
    source = open_source(arguments.checkpoint)
    config, policy = source.model, arguments.exit_policy
    policy.check(source.recursion)
    tokenizer = load_tokenizer(arguments.checkpoint)
    check_vocab(tokenizer, config.vocab_size, arguments.checkpoint)
    prompts = _encode_prompts(tokenizer, arguments)
    _check_prompts(prompts, arguments.max_new_tokens, config.context_length)
    model = load_model(arguments.checkpoint, chosen_dtype(arguments), device)
    recursion = model.recursion
    cache = _make_cache(model, [len(prompt.tokens) + arguments.max_new_tokens for prompt in prompts])
    print(
        f"{arguments.checkpoint}: {config.family}, {recursion.num_loops} loops x {len(model.stack.layers)} layers, "
        f"{human_count(sum(parameter.numel() for parameter in model.parameters()))} parameters, "
        f"{dtype_name(model.embed.dtype)} on {device}, key/value cache {human_bytes(cache.num_bytes)}",
        file=sys.stderr,
    )
    engine = Engine(Decoder(model, cache), policy, skipped_kv=arguments.skipped_kv)
    keep_freed_memory()
    params = [replace(each, stop_ids=frozenset(tokenizer.stop_ids)) for each in params]
    outputs = {
        engine.add(prompt.tokens, each): _Output(tokenizer, prompt, each, arguments.show_depth)
        for prompt, each in zip(prompts, params, strict=True)
    }
    _print_pieces(_pieces(engine, outputs))


if __name__ == "__main__":
    run_command(main)
