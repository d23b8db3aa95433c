"""Command-line flags that describe a recursive model."""

import argparse
import typing

from rrt.errors import UserError
from rrt.model.config import LoraRanks, Sharing

_LINEARS_OF_GROUP = {"q": "query", "kv": "key and value", "out": "attention output", "ffn": "feed-forward"}


def add_lora_rank_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--lora-rank`` and its overrides per group of linears; read them with `lora_ranks`."""
    parser.add_argument(
        "--lora-rank",
        type=int,
        default=0,
        metavar="R",
        help="rank of the LoRA that each depth adds to every linear of attention and feed-forward; 0 is none; "
        "capped at min(in, out) of each linear (default: 0)",
    )
    for group, linears in _LINEARS_OF_GROUP.items():
        parser.add_argument(
            f"--lora-rank-{group}",
            type=int,
            metavar="R",
            help=f"rank of the {linears} projections instead of --lora-rank",
        )


def add_rank_budget_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--rank-budget``, which stands in the place of the flags of `add_lora_rank_flags`."""
    parser.add_argument(
        "--rank-budget",
        type=int,
        metavar="R",
        help="in place of --lora-rank: the LoRA parameters of rank R, distributed over the matrices by the error that "
        "each unit of rank saves; all depths that share a matrix have its rank",
    )


def lora_ranks(arguments: argparse.Namespace) -> LoraRanks:
    """Read the flags of `add_lora_rank_flags`, and of `add_rank_budget_flag` where there is one.

    Raises:
        UserError: a negative rank, a budget of none, or both a rank and a budget.
    """
    budget = getattr(arguments, "rank_budget", None)
    if budget is not None:
        for flag in ("lora_rank", *(f"lora_rank_{group}" for group in _LINEARS_OF_GROUP)):
            rank = getattr(arguments, flag)
            # Without a flag --lora-rank is 0, and a group has the rank of --lora-rank.
            if rank != (0 if flag == "lora_rank" else None):
                name = flag.replace("_", "-")
                raise UserError(f"--rank-budget: found {budget} beside --{name} {rank}; expected one of the two")
        if budget < 1:
            raise UserError(f"--rank-budget: found {budget}; expected at least 1, rank 1 for each matrix")
        return LoraRanks.uniform(budget, is_budget=True)
    ranks = {group: getattr(arguments, f"lora_rank_{group}") for group in _LINEARS_OF_GROUP}
    return LoraRanks(**{group: arguments.lora_rank if rank is None else rank for group, rank in ranks.items()})


def add_sharing_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sharing",
        choices=typing.get_args(Sharing),
        default="cycle",
        help="shared layer of depth l: l mod K (cycle, default), that with every second loop backwards (cycle-rev), or "
        "l // B (sequence: neighbours share, and there are no early exits)",
    )


def add_untie_norms_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--untie-norms",
        action="store_true",
        help="keep norms and biases per depth, exactly the base's; with it a LoRA of full rank "
        "reproduces the base model",
    )


def add_prefix_length_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prefix-length", type=int, default=0, metavar="P", help="trainable prefix vectors per depth (default: 0)"
    )
