"""The server as a process: a checkpoint made into a service, signals, and the end."""

import asyncio
import contextlib
import logging
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from rrt.checkpoint.source import load_model, open_source
from rrt.data.tokenizer import check_vocab, load_tokenizer
from rrt.errors import UserError
from rrt.serve.engine import Engine
from rrt.serve.exits import ExitPolicy, parse_policy
from rrt.serve.flags import default_cache_bytes
from rrt.serve.http.app import make_app
from rrt.serve.http.metrics import Metrics
from rrt.serve.http.protocol import Limits
from rrt.serve.http.service import Service
from rrt.serve.http.worker import CountingCache, CountingDecoder, Worker
from rrt.serve.scheduler import SkippedKV

_START_SECONDS = 600
_LAST_SECONDS = 5
_BACKLOG = 2048


@dataclass(frozen=True)
class Settings:
    """What the flags of ``python -m rrt.serve`` say; see its help.

    Attributes:
        cache_bytes: None: half of the memory that is free, at most 4 GiB.
        dtype: None: the checkpoint's.
    """

    checkpoint: Path
    model_name: str
    policy: str
    skipped_kv: SkippedKV
    api_key: str | None
    cache_bytes: int | None
    chunk_size: int
    max_running: int
    max_queue: int
    max_request_bytes: int
    max_tokens_per_request: int
    bos: str
    dtype: torch.dtype | None
    device: torch.device


def make_service(settings: Settings) -> Service:
    """Load a checkpoint and make all that serves it. Raises `UserError` from the loading."""
    # What can be wrong is found before the weights are read.
    policy = parse_policy(settings.policy, settings.checkpoint)
    source = open_source(settings.checkpoint)
    policy.check(source.recursion)
    tokenizer = load_tokenizer(settings.checkpoint).with_bos(settings.bos)
    check_vocab(tokenizer, source.model.vocab_size, settings.checkpoint)
    model = load_model(settings.checkpoint, settings.dtype, settings.device)
    cache_bytes = settings.cache_bytes
    if cache_bytes is None:
        cache_bytes = default_cache_bytes(settings.device)
    cache = CountingCache.from_budget(
        model.config, model.recursion, cache_bytes, dtype=model.embed.dtype, device=model.embed.device
    )
    decoder = CountingDecoder(model, cache)

    def make_engine(policy: ExitPolicy) -> Engine:
        return Engine(
            decoder,
            policy,
            chunk_size=settings.chunk_size,
            max_running=settings.max_running,
            skipped_kv=settings.skipped_kv,
            keeps_prefixes=True,
        )

    metrics = Metrics(cache.num_loops)
    return Service(
        worker=Worker(decoder, cache, make_engine, tokenizer, metrics, policy),
        tokenizer=tokenizer,
        metrics=metrics,
        limits=Limits(
            request_bytes=settings.max_request_bytes,
            tokens=settings.max_tokens_per_request,
            texts=settings.max_running + settings.max_queue,
        ),
        model_name=settings.model_name,
        policy_name=settings.policy,
        parse_policy=lambda text: parse_policy(text, settings.checkpoint),
        api_key=settings.api_key,
    )


class _Server(uvicorn.Server):
    """A server that SIGTERM or SIGINT ends in order: it drains, and the process exits with 0."""

    def __init__(self, config: uvicorn.Config, worker: Worker, drain_seconds: int) -> None:
        super().__init__(config)
        self._worker, self._drain_seconds = worker, drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end = asyncio.get_running_loop().call_later(self._drain_seconds, self._worker.give_up)
        await super().shutdown(sockets)
        end.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(_number: int, _frame: FrameType | None) -> None:
            # The second signal is from somebody who will not wait.
            self.force_exit = self.should_exit
            self.should_exit = True

        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _taking(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--host, --port: {host} port {port}: {reason}; expected an address that is free") from None


def open_socket(host: str, port: int) -> socket.socket:
    """Take an address; port 0 is any free one. Raises `UserError` if it cannot be had."""
    with _taking(host, port):
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    return listener


def listen(listener: socket.socket) -> None:
    """Let clients connect, who wait from then on. Raises `UserError` if another process listens there by now."""
    with _taking(*listener.getsockname()[:2]):
        listener.listen(_BACKLOG)


def address_of(listener: socket.socket) -> str:
    """Return the URL at which a socket listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(service: Service, drain_seconds: int) -> uvicorn.Server:
    """Make the server of a service. Its end waits `drain_seconds` at most for requests under way."""
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        log_level="warning",
        access_log=False,
        # A proxy's word for who the client is would open what is for this machine alone.
        proxy_headers=False,
        server_header=False,
        # It bounds the bytes of headers, which httptools does not.
        http="h11",
        # Enough to tell as many as are served to come again.
        limit_concurrency=2 * service.limits.texts + 64,
        # For clients that do not even take their failures.
        timeout_graceful_shutdown=drain_seconds + _LAST_SECONDS,
        ws="none",
    )
    return _Server(config, service.worker, drain_seconds)


def run_server(service: Service, listener: socket.socket, drain_seconds: int) -> None:
    """Serve until SIGTERM or SIGINT, and then end what is under way."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    make_server(service, drain_seconds).run(sockets=[listener])


@contextlib.contextmanager
def running_server(arguments: Sequence[str]) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Run ``python -m rrt.serve`` at a free port until the block ends; yields its URL, once it answers, and process.

    For benchmarks and tests. `arguments` are its flags, without ``--port``.

    Raises:
        RuntimeError: it ended, or did not answer within ten minutes.
    """
    command = [sys.executable, "-m", "rrt.serve", *arguments, "--port", "0"]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            yield _wait_for(process, Path(f"/proc/self/fd/{output.fileno()}")), process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(process: "subprocess.Popen[str]", output: Path) -> str:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"^serving .* at (http://\S+)$", output.read_text(encoding="utf-8"), re.M)
        if found:
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{found[1]}/health", timeout=10):
                return found[1]
        time.sleep(0.1)
    raise RuntimeError(f"the server does not answer: {output.read_text(encoding='utf-8').strip()[-2000:]}")
