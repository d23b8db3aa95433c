"""Continue prompts by greedy decoding: checkpoint and text in, text out.

    python -m rrt.generate --checkpoint runs/out/relaxed --prompt "def main(" --max-new-tokens 32

Decoding runs all loops of every token through a paged key/value cache; the work is done by :mod:`rrt.decode.greedy`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rrt.checkpoint.source import load_model, open_source
from rrt.common.cli import human_bytes, human_count, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.common.processes import pick_device
from rrt.data.tokenizer import check_vocab, load_tokenizer
from rrt.decode.decoder import Decoder
from rrt.decode.greedy import generate
from rrt.decode.kv_cache import PagedCache
from rrt.errors import UserError
from rrt.model.transformer import RecursiveTransformer

_PAGE_SIZE = 16
_ADD_BOS = {"auto": None, "yes": True, "no": False}


def _make_cache(model: RecursiveTransformer, lengths: Sequence[int]) -> PagedCache:
    """Make a cache for sequences of these lengths and the model's prefix vectors."""
    prefix = model.recursion.prefix_length
    pages_per_loop = sum(-(-(prefix + length) // _PAGE_SIZE) for length in (0, *lengths))
    num_pages = model.recursion.num_loops * pages_per_loop
    return PagedCache(
        model.config, model.recursion, num_pages, _PAGE_SIZE, dtype=model.embed.dtype, device=model.embed.device
    )


def _check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_positions: int) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(f"--prompt number {number}: found no token; expected text, or --bos yes")
        if len(prompt) + max_new_tokens > max_positions:
            raise UserError(
                f"--prompt number {number}: found {len(prompt)} tokens with --max-new-tokens {max_new_tokens}; "
                f"expected at most {max_positions} together, the model's positions: shorten the prompt, or add fewer"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``python -m rrt.generate``; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m rrt.generate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="one of our checkpoints or an HF directory, with its tokenizer",
    )
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="text to continue; may be given repeatedly"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="most tokens to add to each prompt; the end-of-sequence token ends it earlier (default: 64)",
    )
    parser.add_argument(
        "--bos",
        choices=tuple(_ADD_BOS),
        default="auto",
        help="begin each prompt with BOS; auto: as the tokenizer does (default: auto)",
    )
    add_dtype_flag(parser, "dtype to compute in")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: CUDA if available (default: auto)"
    )
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: found {arguments.max_new_tokens}; expected 1 or more")
    device = pick_device(arguments.device)
    # Everything that can be wrong is found before the weights are read.
    config = open_source(arguments.checkpoint).model
    tokenizer = load_tokenizer(arguments.checkpoint)
    check_vocab(tokenizer, config.vocab_size, arguments.checkpoint)
    prompts = tokenizer.encode_batch(arguments.prompt, bos=_ADD_BOS[arguments.bos])
    _check_prompts(prompts, arguments.max_new_tokens, config.context_length)
    model = load_model(arguments.checkpoint, chosen_dtype(arguments), device)
    recursion = model.recursion
    cache = _make_cache(model, [len(prompt) + arguments.max_new_tokens for prompt in prompts])
    print(
        f"{arguments.checkpoint}: {config.family}, {recursion.num_loops} loops x {len(model.stack.layers)} layers, "
        f"{human_count(sum(parameter.numel() for parameter in model.parameters()))} parameters, "
        f"{dtype_name(model.embed.dtype)} on {device}, key/value cache {human_bytes(cache.num_bytes)}",
        file=sys.stderr,
    )
    decoder = Decoder(model, cache)
    outputs = generate(decoder, prompts, arguments.max_new_tokens, eos_token_id=tokenizer.eos_id)
    print("\n---\n".join(tokenizer.decode(prompt + new) for prompt, new in zip(prompts, outputs, strict=True)))


if __name__ == "__main__":
    run_command(main)
