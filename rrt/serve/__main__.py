"""Serve a checkpoint over HTTP by OpenAI's protocol, with a page at / that shows depth.

    python -m rrt.serve --checkpoint models/smollm2-b2-r64 --port 8000

docs/SERVING.md has the paths, what is refused, and how several servers share the load.
"""

import argparse
import gc
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rrt.common.cli import CommandParser, human_bytes, keep_freed_memory, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.common.processes import pick_device
from rrt.errors import UserError
from rrt.serve.flags import add_exit_flags

_LEAST = {
    "chunk_size": 1,
    "max_running": 1,
    "max_queue": 0,
    "max_request_bytes": 1,
    "max_tokens_per_request": 1,
    "drain_seconds": 0,
    "port": 0,
}


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m rrt.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="one of our checkpoints, an HF directory or a .gguf file, with its tokenizer",
    )
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="what clients call the model (default: the checkpoint's own name)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at (default: 127.0.0.1, this machine)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0: any free one (default: 8000)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="have clients send this key; better as RRT_API_KEY in the environment, which other users do not see",
    )
    add_exit_flags(parser)
    parser.add_argument(
        "--cache-gib",
        type=float,
        metavar="N",
        help="memory for keys and values, GiB (default: half of what is free, at most 4)",
    )
    parser.add_argument(
        "--chunk-size", type=int, default=512, metavar="N", help="most prompt tokens in a pass (default: 512)"
    )
    parser.add_argument(
        "--max-running", type=int, default=256, metavar="N", help="most texts that are computed at once (default: 256)"
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="most texts that wait; a request beyond it is told to come again, by status 429 (default: 256)",
    )
    parser.add_argument(
        "--max-request-bytes", type=int, default=2**22, metavar="N", help="most bytes of a request (default: 4 MiB)"
    )
    parser.add_argument(
        "--max-tokens-per-request",
        type=int,
        default=65536,
        metavar="N",
        help="most tokens of a request: prompts and new tokens of all its texts (default: 65536)",
    )
    parser.add_argument(
        "--drain-seconds",
        type=int,
        default=30,
        metavar="N",
        help="at SIGTERM: go on with requests under way for so long at most (default: 30)",
    )
    parser.add_argument(
        "--bos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="begin each text prompt with BOS; auto: as the tokenizer does (default: auto)",
    )
    add_dtype_flag(parser, "dtype to compute in")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: CUDA if available (default: auto)"
    )
    arguments = parser.parse_args(argv)
    for name, least in _LEAST.items():
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')}: found {getattr(arguments, name)}; expected at least {least}")
    if arguments.port > 65535:
        raise UserError(f"--port: found {arguments.port}; expected at most 65535")
    if arguments.cache_gib is not None and not 0 < arguments.cache_gib < math.inf:
        raise UserError(f"--cache-gib: found {arguments.cache_gib}; expected more than 0")
    key = os.environ.get("RRT_API_KEY") if arguments.api_key is None else arguments.api_key
    # A file's last line end is none of a key.
    arguments.api_key = None if key is None else key.strip()
    if key is not None and not (key.isascii() and key.strip()):
        raise UserError("--api-key or RRT_API_KEY: found no ASCII characters, or others; expected a key, or no flag")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``python -m rrt.serve``; see the head of this file."""
    arguments = _parse_arguments(argv)
    missing = [
        name for name in ("starlette", "uvicorn", "pydantic", "prometheus_client") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise UserError(
            f"{missing[0]} is not installed; expected it: pip install 'relaxed-recursive-transformers[serve]'"
        )
    from rrt.serve.http.app import LOOPBACK
    from rrt.serve.http.server import Settings, address_of, listen, make_service, open_socket, run_server

    # First, for a port that is taken is found out before the weights are read.
    listener = open_socket(arguments.host, arguments.port)
    service = make_service(
        Settings(
            checkpoint=arguments.checkpoint,
            model_name=arguments.served_model_name or arguments.checkpoint.resolve().name,
            policy=arguments.exit_policy,
            skipped_kv=arguments.skipped_kv,
            api_key=arguments.api_key,
            cache_bytes=None if arguments.cache_gib is None else int(arguments.cache_gib * 2**30),
            chunk_size=arguments.chunk_size,
            max_running=arguments.max_running,
            max_queue=arguments.max_queue,
            max_request_bytes=arguments.max_request_bytes,
            max_tokens_per_request=arguments.max_tokens_per_request,
            bos=arguments.bos,
            dtype=chosen_dtype(arguments),
            device=pick_device(arguments.device),
        )
    )
    listen(listener)
    cache = service.worker.decoder.cache
    address = address_of(listener)
    if arguments.host not in LOOPBACK and arguments.api_key is None:
        print(f"notice: {address} is open to other machines without a key; --api-key asks for one", file=sys.stderr)
    print(
        f"serving {service.model_name} ({dtype_name(cache.k.dtype)} on {cache.k.device}, {cache.num_loops} loops, "
        f"key/value cache {human_bytes(cache.k.nbytes + cache.v.nbytes)}) at {address}",
        file=sys.stderr,
        flush=True,
    )
    keep_freed_memory()
    # What has been loaded stays: it need not be looked through again.
    gc.freeze()
    run_server(service, listener, arguments.drain_seconds)


if __name__ == "__main__":
    run_command(main)
