"""A small model behind the HTTP server, in this process, and requests to it."""

import contextlib
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from rrt.folding.conversion import convert
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.serve.http.server import Settings, address_of, make_server, make_service, open_socket
from rrt.serve.http.service import Service
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer

VOCABULARY = 420
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('role x') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)
SETTINGS = Settings(
    checkpoint=Path(),
    model_name="tiny",
    policy="verify",
    skipped_kv="propagate",
    api_key=None,
    cache_bytes=2**23,
    chunk_size=64,
    max_running=16,
    max_queue=64,
    max_request_bytes=2**16,
    max_tokens_per_request=4096,
    bos="auto",
    # Rounding then decides nothing, whatever runs beside a request.
    dtype=torch.float64,
    device=torch.device("cpu"),
)


def make_checkpoint(folder: Path, *, has_chat: bool = True) -> Path:
    """Make a relaxed model of two loops, with a tokenizer and a chat template."""
    base = make_hf_model(folder / "base", "gpt_neox", vocab_size=VOCABULARY)
    make_bpe_tokenizer(base, vocab_size=VOCABULARY)
    if has_chat:
        path = base / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT_TEMPLATE}))
    convert(base, folder / "relaxed", RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(2)))
    return folder / "relaxed"


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream; the last one is the end's mark."""
        assert self.headers["content-type"].startswith("text/event-stream")
        *events, end, rest = self.body.decode().split("\n\n")
        assert (end, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@dataclasses.dataclass(frozen=True)
class Served:
    """A server that runs, and what it serves."""

    url: str
    service: Service

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, content, {"Content-Type": "application/json", **headers})

    def complete(self, **body: Any) -> Answer:
        return self.post("/v1/completions", body)

    def wait_until_idle(self) -> None:
        """Wait until nothing is computed, and check that all pages are back."""
        worker = self.service.worker
        wait_until(lambda: worker.num_open == 0 and worker.num_in_engine == 0 and not worker._engine.has_work)
        worker._engine.forget_prefixes()
        cache = worker.decoder.cache
        cache.check()
        assert cache.num_used_pages == 0 and cache.num_sequences == 0


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextlib.contextmanager
def serving(checkpoint: Path, **changes: Any) -> Iterator[Served]:
    """Serve a checkpoint in a thread until the block ends."""
    service = make_service(dataclasses.replace(SETTINGS, checkpoint=checkpoint, **changes))
    listener = open_socket("127.0.0.1", 0)
    server = make_server(service, drain_seconds=10)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield Served(address_of(listener), service)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def held_engine(served: Served) -> Iterator[threading.Event]:
    """Let the engine run no pass until the event is set, or the block ends."""
    engine, gate = served.service.worker._engine, threading.Event()
    step = engine.step

    def wait() -> Any:
        assert gate.wait(60)
        return step()

    engine.step = wait  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        gate.set()
        engine.step = step  # type: ignore[method-assign]
