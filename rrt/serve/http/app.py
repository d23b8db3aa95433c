"""The web application: paths, limits, and the way of a request from its body to its answer."""

import asyncio
import hmac
import importlib.resources
import logging
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rrt.data.tokenizer import Tokenizer
from rrt.decode.generation import check_prompt
from rrt.errors import UserError
from rrt.serve.exits import ExitPolicy
from rrt.serve.http.answers import DONE, ChatChoice, CompletionChoice, TokenNames, server_sent, to_json, usage
from rrt.serve.http.metrics import Metrics
from rrt.serve.http.protocol import ApiError, ChatRequest, CompletionRequest, Limits, PolicyRequest, Prompt, parse
from rrt.serve.http.scores import PromptScores
from rrt.serve.http.worker import Call, Delta, Failure, Text, Worker

log = logging.getLogger(__name__)

_CLIENT_HAS_GONE = 499
_RETRY_SECONDS = 1
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Service:
    """What the application serves.

    Attributes:
        model_name: by which clients name the model.
        policy_name: of the exit policy at the start, as the flag has it.
        parse_policy: makes the policy of a name.
        api_key: that clients must send; None: none.
    """

    worker: Worker
    tokenizer: Tokenizer
    metrics: Metrics
    limits: Limits
    model_name: str
    policy_name: str
    parse_policy: Callable[[str], ExitPolicy]
    api_key: str | None


def make_app(service: Service) -> Starlette:
    """Make the application; its start starts the engine's thread, and its end ends it."""
    return _App(service).starlette


class _App:
    def __init__(self, service: Service) -> None:
        self._service, self._worker = service, service.worker
        self._names = TokenNames(service.tokenizer)
        self._policy_name = service.policy_name
        self._created = int(time.time())
        page = importlib.resources.files(__package__) / "page"
        self._page = {path: ((page / name).read_bytes(), kind) for path, (name, kind) in _PAGE_FILES.items()}
        self._add_gauges()
        routes = [
            *(self._route(path, self._show_page, is_public=True) for path in _PAGE_FILES),
            self._route("/health", self._health, is_public=True),
            self._route("/metrics", self._show_metrics),
            self._route("/v1/models", self._models),
            self._route("/v1/models/{name:path}", self._model),
            self._route("/v1/completions", self._complete, "POST"),
            self._route("/v1/chat/completions", self._chat, "POST"),
            self._route("/rrt/stats", self._stats),
            self._route("/rrt/policy", self._switch_policy, "POST"),
        ]
        self.starlette = Starlette(
            routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: self._refuse_path}
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._worker.start()
        try:
            yield
        finally:
            self._worker.close()

    def _add_gauges(self) -> None:
        add, worker = self._service.metrics.add_gauge, self._worker
        cache = worker.decoder.cache
        add("rrt_pages_used", "Pages of the key/value cache in use", lambda: cache.num_used_pages)
        add("rrt_pages_free", "Pages of the key/value cache that are free", lambda: cache.num_free_pages)
        add("rrt_texts_open", "Texts that are computed or wait", lambda: worker.num_open)
        add("rrt_texts_in_engine", "Texts that the engine has", lambda: worker.num_in_engine)

    # Every request

    def _route(self, path: str, handler: Handler, method: str = "GET", *, is_public: bool = False) -> Route:
        label = path.partition("{")[0]

        async def answer(request: Request) -> Response:
            try:
                if not is_public:
                    self._check_key(request)
                response = await handler(request)
            except ApiError as error:
                response = _error_response(error)
            except ClientDisconnect:
                response = Response(status_code=_CLIENT_HAS_GONE)
            except Exception:
                log.exception("%s: a request has failed", path)
                response = _error_response(ApiError(500, "the server failed at this request; its log says why"))
            if not isinstance(response, EventStream):
                self._count(label, response.status_code)
            return response

        return Route(path, answer, methods=[method])

    def _count(self, label: str, status: int) -> None:
        self._service.metrics.responses.labels(label, str(status)).inc()

    def _check_key(self, request: Request) -> None:
        key = self._service.api_key
        if key is None:
            return
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode(), key.encode()):
            raise ApiError(
                401,
                "API key: found none, or another; expected the server's: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _refuse_path(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self._count("other", error.status_code)
        expected = "POST, or GET" if error.status_code == 405 else "a path of docs/SERVING.md"
        message = f"{request.method} {request.url.path[:100]}: {error.detail}; expected {expected}"
        return _error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    async def _read(self, request: Request) -> bytes:
        """Read the body, up to the limit."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Which also keeps other sites' pages from sending requests without being asked.
            found = request.headers.get("content-type", "none")[:80]
            raise ApiError(415, f"Content-Type: found {found}; expected application/json")
        limit = self._service.limits.request_bytes
        too_large = ApiError(413, f"body: found more than {limit} bytes; expected at most that (--max-request-bytes)")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_large
        return bytes(body)

    # Small answers

    async def _show_page(self, request: Request) -> Response:
        content, kind = self._page[request.url.path]
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    async def _health(self, request: Request) -> Response:
        if not self._worker.is_alive:
            raise ApiError(503, "the engine's thread has ended")
        return _json_response({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _model_card(self) -> dict[str, Any]:
        card = {"id": self._service.model_name, "object": "model", "created": self._created, "owned_by": "rrt"}
        return {**card, "max_model_len": self._worker.decoder.max_positions}

    async def _models(self, request: Request) -> Response:
        return _json_response({"object": "list", "data": [self._model_card()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return _json_response(self._model_card())

    async def _stats(self, request: Request) -> Response:
        rate, exits, agreed = self._service.metrics.recent.read()
        cache = self._worker.decoder.cache
        return _json_response(
            {
                "model": self._service.model_name,
                "has_chat": self._service.tokenizer.chat_template is not None,
                "policy": self._policy_name,
                "num_loops": cache.num_loops,
                "tokens_per_second": rate,
                "exits": exits,
                "agreed": agreed,
                "texts_open": self._worker.num_open,
                "pages_used": cache.num_used_pages,
                "pages_total": cache.num_used_pages + cache.num_free_pages,
            }
        )

    async def _switch_policy(self, request: Request) -> Response:
        self._check_is_local(request)
        wanted = parse(PolicyRequest, await self._read(request)).policy
        try:
            await self._worker.switch_policy(self._service.parse_policy(wanted))
        except UserError as error:
            raise ApiError(400, str(error).replace("--exit-policy", "policy"), param="policy") from None
        self._policy_name = wanted
        return _json_response({"policy": wanted})

    def _check_is_local(self, request: Request) -> None:
        """Refuse a client of another machine, and one that comes through a proxy, unless a key was checked."""
        if self._service.api_key is not None:
            return
        client = request.client.host if request.client is not None else ""
        forwarded = {"x-forwarded-for", "forwarded", "via"} & set(request.headers.keys())
        if client not in _LOOPBACK or request.url.hostname not in _LOOPBACK or forwarded:
            raise ApiError(403, "policy: found a client of another machine; expected one of this, or --api-key")

    # Text

    def _check_model(self, name: str | None) -> None:
        ours = self._service.model_name
        if name is not None and name != ours:
            message = f"model: found {name[:100]!r}; expected {ours!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _encode(self, prompts: Sequence[Prompt], **options: Any) -> list[list[int]]:
        """Encode texts, in another thread: a long one would keep the event loop from all others."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(await asyncio.to_thread(self._service.tokenizer.encode_batch, texts, **options) if texts else ())
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _check_lengths(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, num_choices: int) -> None:
        for place, prompt in enumerate(prompts):
            name = "prompt" if len(prompts) == 1 else f"prompt[{place}]"
            try:
                check_prompt(self._worker.decoder, name, prompt, max_new_tokens)
            except UserError as error:
                raise ApiError(400, str(error), param="prompt") from None
        found = num_choices * sum(len(prompt) + max_new_tokens for prompt in prompts)
        if found > self._service.limits.tokens:
            raise ApiError(
                400,
                f"request: found {found} tokens, prompts and new ones of all choices; expected at most "
                f"{self._service.limits.tokens} (--max-tokens-per-request)",
                param="max_tokens",
            )

    def _submit(self, texts: Sequence[Text], *, streams: bool) -> Call:
        """Submit texts, if so many more may wait."""
        most, busy = self._service.limits.texts, self._worker.num_open
        if len(texts) > most:
            raise ApiError(
                400,
                f"request: found {len(texts)} texts, prompts times n; expected at most {most}, which the server takes "
                "at once (--max-running and --max-queue)",
                param="prompt",
            )
        if busy + len(texts) > most:
            raise ApiError(
                429,
                f"server: found {busy} texts running and waiting; expected at most {most} with yours: try again later",
                code="too_many_requests",
                headers={"retry-after": str(_RETRY_SECONDS)},
            )
        call = Call(texts, streams=streams)
        self._worker.submit(call)
        return call

    async def _complete(self, request: Request) -> Response:
        spec = parse(CompletionRequest, await self._read(request))
        spec.check()
        self._check_model(spec.model)
        prompts = await self._encode(spec.prompt)
        num_top = spec.num_top_of_prompt
        self._check_lengths(prompts, spec.max_new_tokens, spec.num_choices)
        seed = random.getrandbits(63) if spec.seed is None else spec.seed
        params = [
            spec.params(
                max(spec.max_new_tokens, 1),
                self._service.tokenizer.stop_ids,
                _nth_seed(seed, choice),
                spec.logprobs,
            )
            for choice in range(spec.num_choices)
        ]
        texts = [Text(prompt, each if spec.max_new_tokens else None, num_top) for prompt in prompts for each in params]
        shown: list[str | None] = [None] * len(prompts)
        if spec.echo:
            decode = self._service.tokenizer.decode
            shown = [given if isinstance(given, str) else decode(given) for given in spec.prompt]
        choices = [
            CompletionChoice(self._names, text, index, shown[index // spec.num_choices], spec.logprobs)
            for index, text in enumerate(texts)
        ]
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", **self._head()}
        call = self._submit(texts, streams=spec.streams)

        def take(index: int, event: PromptScores | Delta) -> dict[str, Any] | None:
            if isinstance(event, PromptScores):
                choices[index].add_scores(event)
                return None
            return choices[index].part(event)

        return await self._answer(request, call, head, take, spec.num_choices, spec.includes_usage)

    async def _chat(self, request: Request) -> Response:
        spec = parse(ChatRequest, await self._read(request))
        spec.check()
        self._check_model(spec.model)
        if self._service.tokenizer.chat_template is None:
            raise ApiError(400, f"model: {self._service.model_name} has no chat template; expected /v1/completions")
        messages = [message.model_dump(exclude_none=True) for message in spec.messages]
        try:
            text = await asyncio.to_thread(self._service.tokenizer.apply_chat_template, messages)
        except UserError as error:
            reason = str(error).removeprefix(f"{self._service.tokenizer.place}").lstrip("/")
            raise ApiError(400, f"messages: {reason}", param="messages") from None
        (prompt,) = await self._encode([text], bos=False, parse_special=True)
        max_new_tokens = spec.max_new_tokens
        if max_new_tokens is None:
            # As much as there is room for. The last new token is never read.
            room = self._worker.decoder.max_positions + 1 - len(prompt)
            share = self._service.limits.tokens // spec.num_choices - len(prompt)
            max_new_tokens = max(min(room, share, self._room_in_cache(len(prompt))), 1)
        self._check_lengths([prompt], max_new_tokens, spec.num_choices)
        seed = random.getrandbits(63) if spec.seed is None else spec.seed
        stop_ids = self._service.tokenizer.stop_ids
        num_top = (spec.top_logprobs or 0) if spec.logprobs else None
        texts = [
            Text(prompt, spec.params(max_new_tokens, stop_ids, _nth_seed(seed, choice), num_top))
            for choice in range(spec.num_choices)
        ]
        choices = [ChatChoice(self._names, index, bool(spec.logprobs)) for index in range(len(texts))]
        kind = "chat.completion.chunk" if spec.streams else "chat.completion"
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, **self._head()}
        call = self._submit(texts, streams=spec.streams)

        def take(index: int, event: PromptScores | Delta) -> dict[str, Any] | None:
            assert isinstance(event, Delta)
            return choices[index].part(event) if spec.streams else choices[index].message(event)

        return await self._answer(request, call, head, take, spec.num_choices, spec.includes_usage)

    def _room_in_cache(self, num_prompt_tokens: int) -> int:
        """Return the most new tokens after a prompt that the cache could hold, were it alone."""
        cache = self._worker.decoder.cache
        total = cache.num_used_pages + cache.num_free_pages
        low, high = 0, self._worker.decoder.max_positions + 1
        while low < high:
            middle = (low + high + 1) // 2
            fits = cache.pages_for(num_prompt_tokens + middle - 1) <= total
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _head(self) -> dict[str, Any]:
        return {"created": int(time.time()), "model": self._service.model_name}

    async def _answer(
        self,
        request: Request,
        call: Call,
        head: Mapping[str, Any],
        take: Callable[[int, PromptScores | Delta], dict[str, Any] | None],
        num_choices: int,
        includes_usage: bool,
    ) -> Response:
        """Answer with a stream if the call streams, once it has begun, and else with the whole.

        Args:
            head: fields of the answer, or of every chunk of it.
            take: turns an event of a choice into its JSON; None: there is nothing to tell yet.
        """
        label = request.url.path
        parts = self._parts(call, take)
        try:
            # What the engine refuses, and what fails at once, still has a status.
            first = await _unless_gone(request.receive, anext(parts, None))
            if call.streams:

                def end(status: int) -> None:
                    self._worker.cancel(call)
                    self._count(label, status)

                return EventStream(self._stream(call, parts, first, head, num_choices, includes_usage), end)
            found = [first] if first is not None else []

            async def collect() -> None:
                async for part in parts:
                    found.append(part)

            await _unless_gone(request.receive, collect())
        except BaseException:
            self._worker.cancel(call)
            raise
        found.sort(key=lambda part: part[0]["index"])
        num_new = sum(count for _, count in found)
        answer = {**head, "choices": [choice for choice, _ in found], "usage": usage(call.texts, num_choices, num_new)}
        return _json_response(answer)

    async def _parts(
        self, call: Call, take: Callable[[int, PromptScores | Delta], dict[str, Any] | None]
    ) -> AsyncGenerator[tuple[dict[str, Any], int], None]:
        """Yield the JSON of choices as it comes, with the number of its tokens. Raises `ApiError` at a failure."""
        left = len(call.texts)
        while left:
            index, event = await call.events.get()
            if isinstance(event, Failure):
                raise ApiError(400 if event.is_refusal else 500, event.message)
            part = take(index, event)
            if part is not None:
                assert isinstance(event, Delta)
                left -= event.finish_reason is not None
                yield part, len(event.tokens)

    async def _stream(
        self,
        call: Call,
        parts: AsyncGenerator[tuple[dict[str, Any], int], None],
        first: tuple[dict[str, Any], int] | None,
        head: Mapping[str, Any],
        num_choices: int,
        includes_usage: bool,
    ) -> AsyncGenerator[bytes, None]:
        empty_usage = {"usage": None} if includes_usage else {}
        num_new = 0
        try:
            if first is not None:
                num_new += first[1]
                yield server_sent({**head, "choices": [first[0]], **empty_usage})
            async for choice, count in parts:
                num_new += count
                yield server_sent({**head, "choices": [choice], **empty_usage})
            if includes_usage:
                yield server_sent({**head, "choices": [], "usage": usage(call.texts, num_choices, num_new)})
            yield DONE
        except ApiError as error:
            yield server_sent(error.body())


class EventStream(Response):
    """A response that is sent as it is made, and ends with its client.

    Args:
        end: called at the end, however it comes, with the status: 200, or 499 if the client has gone before.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], end: Callable[[int], None]) -> None:
        # The second is for nginx, which would collect the events.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._events, self._end = events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = _CLIENT_HAS_GONE

        async def send_all() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            with suppress(ClientDisconnect, OSError):
                await _unless_gone(receive, send_all())
                status = 200
        finally:
            await self._events.aclose()
            self._end(status)


async def _unless_gone(receive: Receive, work: Awaitable[Any]) -> Any:
    """Await `work`; if the client goes before, cancel it and raise `ClientDisconnect`."""

    async def wait_for_end() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_end())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _nth_seed(seed: int, choice: int) -> int:
    """Return the seed of a choice: the first one's is the request's. A bad seed stays one, to be refused."""
    return (seed + choice) % 2**64 if 0 <= seed < 2**64 else seed


def _json_response(value: object) -> Response:
    return Response(to_json(value), media_type="application/json")


def _error_response(error: ApiError) -> Response:
    return Response(to_json(error.body()), error.status, error.headers, "application/json")
