"""Completions and chats: from a request's body to its answer."""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rrt.decode.generation import check_prompt
from rrt.errors import UserError
from rrt.serve.http.answers import DONE, ChatChoice, CompletionChoice, TokenNames, server_sent, to_json, usage
from rrt.serve.http.protocol import ApiError, ChatRequest, CompletionRequest, Prompt, parse
from rrt.serve.http.scores import PromptScores
from rrt.serve.http.service import Service
from rrt.serve.http.streams import EventStream, unless_gone
from rrt.serve.http.worker import ENDED, Call, Delta, Failure, Text

_RETRY_SECONDS = 1


def json_response(value: object) -> Response:
    return Response(to_json(value), media_type="application/json")


class TextPaths:
    """What answers with text.

    Args:
        count: called with the path and the status of an answer that was a stream, at its end.
    """

    def __init__(self, service: Service, count: Callable[[str, int], None]) -> None:
        self._service, self._worker, self._count = service, service.worker, count
        self._names = TokenNames(service.tokenizer)

    def check_model(self, name: str | None) -> None:
        """Refuse a model's name that is not the server's."""
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
            # Of scored prompts too, which the cache never has.
            if len(prompt) + max(max_new_tokens, 1) - 1 > (most := self._worker.most_positions):
                raise ApiError(
                    400,
                    f"{name}: found {len(prompt)} tokens and {max_new_tokens} new ones; expected at most {most + 1} "
                    "together, for which the cache has room (--cache-gib)",
                    param="prompt",
                )
        found = num_choices * sum(len(prompt) + max_new_tokens for prompt in prompts)
        if found > self._service.limits.tokens:
            raise ApiError(
                400,
                f"request: found {found} tokens, prompts and new ones of all choices; expected at most "
                f"{self._service.limits.tokens} (--max-tokens-per-request)",
                param="max_tokens",
            )

    def _check_room(self, num_texts: int) -> None:
        """Refuse texts if not so many more may wait."""
        most, busy = self._service.limits.texts, self._worker.num_open
        if self._worker.has_ended:
            raise ApiError(503, ENDED)
        if num_texts > most:
            raise ApiError(
                400,
                f"request: found {num_texts} texts, prompts times n; expected at most {most}, which the server takes "
                "at once (--max-running and --max-queue)",
                param="prompt",
            )
        if busy + num_texts > most:
            raise ApiError(
                429,
                f"server: found {busy} texts running and waiting; expected at most {most} with yours: try again later",
                code="too_many_requests",
                headers={"retry-after": str(_RETRY_SECONDS)},
            )

    def _submit(self, texts: Sequence[Text], *, streams: bool) -> Call:
        # Again, for others have come meanwhile.
        self._check_room(len(texts))
        call = Call(texts, streams=streams)
        self._worker.submit(call)
        return call

    async def complete(self, request: Request, body: bytes) -> Response:
        """Answer a request to continue texts."""
        spec = parse(CompletionRequest, body)
        spec.check()
        self.check_model(spec.model)
        self._check_room(len(spec.prompt) * spec.num_choices)
        prompts = await self._encode(spec.prompt)
        num_top = spec.num_top_of_prompt
        self._check_lengths(prompts, spec.max_new_tokens, spec.num_choices)
        texts: list[Text] = []
        for prompt in prompts:
            seed = random.getrandbits(63) if spec.seed is None else spec.seed
            for choice in range(spec.num_choices):
                params = spec.params(
                    max(spec.max_new_tokens, 1),
                    self._service.tokenizer.stop_ids,
                    _nth_seed(seed, choice),
                    spec.logprobs,
                )
                texts.append(Text(prompt, params if spec.max_new_tokens else None, num_top))
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

    async def chat(self, request: Request, body: bytes) -> Response:
        """Answer a request to answer a conversation."""
        spec = parse(ChatRequest, body)
        spec.check()
        self.check_model(spec.model)
        if self._service.tokenizer.chat_template is None:
            raise ApiError(400, f"model: {self._service.model_name} has no chat template; expected /v1/completions")
        self._check_room(spec.num_choices)
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
            most = min(self._worker.most_positions + 1, self._service.limits.tokens // spec.num_choices)
            max_new_tokens = max(most - len(prompt), 1)
        self._check_lengths([prompt], max_new_tokens, spec.num_choices)
        seed = random.getrandbits(63) if spec.seed is None else spec.seed
        stop_ids = self._service.tokenizer.stop_ids
        num_top = (spec.top_logprobs or 0) if spec.logprobs else None
        texts = [
            Text(prompt, spec.params(max_new_tokens, stop_ids, _nth_seed(seed, choice), num_top), is_answer=True)
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
        parts = self._parts(call, take)
        try:
            # What the engine refuses, and what fails at once, still has a status.
            first = await unless_gone(request.receive, anext(parts, None))
            if call.streams:

                def end(status: int) -> None:
                    self._worker.cancel(call)
                    self._count(request.scope["path"], status)

                return EventStream(self._stream(call, parts, first, head, num_choices, includes_usage), end)
            found = [first] if first is not None else []

            async def collect() -> None:
                async for part in parts:
                    found.append(part)

            await unless_gone(request.receive, collect())
        except BaseException:
            self._worker.cancel(call)
            raise
        found.sort(key=lambda part: part[0]["index"])
        num_new = sum(count for _, count in found)
        answer = {**head, "choices": [choice for choice, _ in found], "usage": usage(call.texts, num_choices, num_new)}
        return json_response(answer)

    async def _parts(
        self, call: Call, take: Callable[[int, PromptScores | Delta], dict[str, Any] | None]
    ) -> AsyncGenerator[tuple[dict[str, Any], int], None]:
        """Yield the JSON of choices as it comes, with the number of its tokens. Raises `ApiError` at a failure."""
        left = len(call.texts)
        while left:
            index, event = await call.events.get()
            if isinstance(event, Failure):
                raise ApiError(event.status, event.message)
            # A prompt's scores take long to write: in another thread, as the encoding.
            is_long = isinstance(event, PromptScores)
            part = await asyncio.to_thread(take, index, event) if is_long else take(index, event)
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


def _nth_seed(seed: int, choice: int) -> int:
    """Return the seed of a choice: the first one's is the request's. A bad seed stays one, to be refused.

    OpenAI's are of 64 bits with a sign, and the engine's without.
    """
    return (seed + choice) % 2**64 if -(2**63) <= seed < 2**64 else seed
