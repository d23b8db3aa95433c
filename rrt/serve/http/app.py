"""The web application: paths, keys, the limits of a body, and errors."""

import asyncio
import hmac
import importlib.resources
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from rrt.errors import UserError
from rrt.serve.http.answers import to_json
from rrt.serve.http.protocol import ApiError, PolicyRequest, parse
from rrt.serve.http.service import Service
from rrt.serve.http.streams import CLIENT_HAS_GONE, EventStream
from rrt.serve.http.texts import TextPaths, json_response

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_BODY_SECONDS = 60
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


def make_app(service: Service) -> Starlette:
    """Make the application; its start starts the engine's thread, and its end ends it."""
    return _App(service).starlette


class _App:
    def __init__(self, service: Service) -> None:
        self._service, self._worker = service, service.worker
        self._texts = TextPaths(service, self._count)
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
                self._check_host(request)
                if not is_public:
                    self._check_key(request)
                response = await handler(request)
            except ApiError as error:
                response = _error_response(error)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_HAS_GONE)
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

    def _check_host(self, request: Request) -> None:
        """Refuse what a browser sends for a foreign page whose name it was told is this machine, if there is no key."""
        host = re.sub(r":\d*$", "", request.headers.get("host", "localhost")).strip("[]").lower()
        if self._service.api_key is None and request.scope["server"][0] in LOOPBACK and host not in LOOPBACK:
            raise ApiError(403, f"Host: found {host[:80]}; expected localhost, or --api-key")

    async def _refuse_path(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self._count("other", error.status_code)
        expected = "POST, or GET" if error.status_code == 405 else "a path of docs/SERVING.md"
        message = f"{request.method} {request.scope['path'][:100]}: {error.detail}; expected {expected}"
        return _error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    async def _read(self, request: Request) -> bytes:
        """Read the body, up to the limits."""
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
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            message = f"body: found {len(body)} bytes in {_BODY_SECONDS} seconds; expected all of it"
            raise ApiError(408, message, headers={"connection": "close"}) from None
        return bytes(body)

    # Answers

    async def _complete(self, request: Request) -> Response:
        return await self._texts.complete(request, await self._read(request))

    async def _chat(self, request: Request) -> Response:
        return await self._texts.chat(request, await self._read(request))

    async def _show_page(self, request: Request) -> Response:
        content, kind = self._page[request.scope["path"]]
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    async def _health(self, request: Request) -> Response:
        if not self._worker.is_alive:
            raise ApiError(503, "the engine's thread has ended")
        return json_response({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _model_card(self) -> dict[str, Any]:
        card = {"id": self._service.model_name, "object": "model", "created": self._created, "owned_by": "rrt"}
        return {**card, "max_model_len": min(self._worker.most_positions, self._service.limits.tokens)}

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_card()]})

    async def _model(self, request: Request) -> Response:
        self._texts.check_model(request.path_params["name"])
        return json_response(self._model_card())

    async def _stats(self, request: Request) -> Response:
        rate, exits, agreed = self._service.metrics.recent.read()
        cache = self._worker.decoder.cache
        return json_response(
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
                "pages_total": cache.num_pages,
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
        return json_response({"policy": wanted})

    def _check_is_local(self, request: Request) -> None:
        """Refuse a client of another machine, and one whose proxy says that it is one, unless a key was checked."""
        if self._service.api_key is not None:
            return
        client = request.client.host if request.client is not None else ""
        forwarded = {"x-forwarded-for", "forwarded", "via"} & set(request.headers.keys())
        if client not in LOOPBACK or forwarded:
            raise ApiError(403, "policy: found a client of another machine; expected one of this, or --api-key")


def _error_response(error: ApiError) -> Response:
    return Response(to_json(error.body()), error.status, error.headers, "application/json")
