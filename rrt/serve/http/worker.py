"""The engine in a thread of its own, which alone touches it: requests come from an event loop, and events go back.

    worker = Worker(decoder, cache, make_engine, tokenizer, metrics, policy)
    worker.start()
    call = Call([Text(tokens, params)], streams=True)
    worker.submit(call)
    index, event = await call.events.get()

An error of one request ends that request. Any other one ends those in flight, and the engine goes on with the next.
"""

import asyncio
import logging
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rrt.decode.decoder import Decoder
from rrt.decode.kv_cache import PagedCache
from rrt.decode.passes import PassPlan, PassRows
from rrt.decode.sampling import choose_tokens
from rrt.decode.text_stream import Decodes
from rrt.errors import UserError
from rrt.serve.engine import Engine
from rrt.serve.exits import ExitPolicy
from rrt.serve.http.metrics import Metrics
from rrt.serve.http.scores import PromptScores, score_prompt
from rrt.serve.requests import FinishReason, NewToken, RequestError, SamplingParams
from rrt.serve.text import RequestText

log = logging.getLogger(__name__)

ENDED = "the server ends: send the request to another one"
_MOST_FAILED_PASSES = 3
"""Passes that fail one after the other, whatever their requests, before the thread ends."""


class CountingCache(PagedCache):
    """A cache that counts the rows of the passes over it."""

    num_rows = 0

    def plan(self, rows: PassRows) -> PassPlan:
        plan = super().plan(rows)
        self.num_rows += len(plan.decode.loops) + sum(len(prefill.positions) for prefill in plan.prefills)
        return plan


class CountingDecoder(Decoder):
    """A decoder that counts the rows of its head."""

    num_head_rows = 0

    def logits(self, x: Tensor, loops: Tensor | None = None) -> Tensor:
        self.num_head_rows += len(x)
        return super().logits(x, loops)


@dataclass(frozen=True)
class Delta:
    """New text of a request, the tokens since the last delta, and where each one's text begins in the new text."""

    text: str
    tokens: tuple[NewToken, ...]
    offsets: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Failure:
    """The end of a text that could not be computed, with the HTTP status that tells why."""

    message: str
    status: int


Event = PromptScores | Delta | Failure


@dataclass(eq=False)
class Text:
    """One text that a call asks for.

    Attributes:
        prompt: token ids.
        params: None: nothing is generated.
        num_top: report the prompt's own log-probabilities, with so many of the most probable tokens; None: do not.
        is_answer: the new text is one by itself; else it goes on from the prompt's.
    """

    prompt: Sequence[int]
    params: SamplingParams | None
    num_top: int | None = None
    is_answer: bool = False
    is_open: bool = field(default=True, init=False)


class Call:
    """What one HTTP request asks for: texts, whose events come with the index of their text.

    Args:
        streams: a delta for each piece of text; else one for the whole text.
    """

    def __init__(self, texts: Sequence[Text], *, streams: bool) -> None:
        self.texts, self.streams = tuple(texts), streams
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.began = time.monotonic()

    @property
    def num_open(self) -> int:
        return sum(text.is_open for text in self.texts)


@dataclass(eq=False)
class _Progress:
    """A text in the engine's thread."""

    call: Call
    index: int
    stream: RequestText
    first_token: float = 0.0
    num_tokens: int = 0
    num_sent: int = 0
    """Characters of the text that earlier deltas have."""
    text: str = ""
    tokens: list[NewToken] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


class Worker:
    """The thread, and its ends in the event loop, of which every public method is.

    Args:
        cache: of `decoder`.
        make_engine: makes an engine for `decoder` with a policy; called again for another policy.
    """

    def __init__(
        self,
        decoder: CountingDecoder,
        cache: CountingCache,
        make_engine: Callable[[ExitPolicy], Engine],
        tokenizer: Decodes,
        metrics: Metrics,
        policy: ExitPolicy,
    ) -> None:
        self.decoder = decoder
        self.num_open = 0
        """Texts that were submitted and have not ended."""
        self.has_ended = False
        """No call is taken any more."""
        self.most_positions = (
            bisect_right(range(decoder.max_positions + 1), cache.num_free_pages, key=cache.pages_for) - 1
        )
        """Positions of the longest text that the decoder and the empty cache have room for."""
        self._make_engine, self._tokenizer, self._metrics = make_engine, tokenizer, metrics
        self._cache, self._engine = cache, make_engine(policy)
        self._open_calls: set[Call] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Between the threads, under the condition.
        self._condition = threading.Condition()
        self._submitted: list[Call] = []
        self._cancelled: list[Call] = []
        self._next_policy: tuple[ExitPolicy, asyncio.Future[None]] | None = None
        self._is_closing = False
        # The engine's thread alone.
        self._held: deque[tuple[Call, int]] = deque()
        self._running: dict[int, _Progress] = {}
        self._to_score: deque[tuple[Call, list[int]]] = deque()
        self._outbox: list[tuple[Call, int, Event]] = []
        self._counted = 0, 0
        self._failed_passes = 0
        """In a row."""

    # The event loop's side

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while calls are taken; after that the thread may still be ending."""
        return self._thread.is_alive() and not self.has_ended

    @property
    def num_in_engine(self) -> int:
        return len(self._running)

    def submit(self, call: Call) -> None:
        """Have a call computed; its events come to `call.events`, of each text until a failure or a finish reason."""
        self.num_open += call.num_open
        self._open_calls.add(call)
        with self._condition:
            self._submitted.append(call)
            self._condition.notify()

    def cancel(self, call: Call) -> None:
        """Drop what is not done of a call; it gets no event from now on."""
        if call.num_open == 0:
            return
        for text in call.texts:
            self._close(call, text)
        with self._condition:
            self._cancelled.append(call)
            self._condition.notify()

    def give_up(self) -> None:
        """End all calls with a failure, and take no others: the server ends, and will not wait longer."""
        self.has_ended = True
        for call in tuple(self._open_calls):
            failures = [(index, Failure(ENDED, 503)) for index, text in enumerate(call.texts) if text.is_open]
            self.cancel(call)
            for failure in failures:
                call.events.put_nowait(failure)
        with self._condition:
            switch, self._next_policy = self._next_policy, None
        if switch is not None:
            self._switched(switch[1], UserError(ENDED))

    async def switch_policy(self, policy: ExitPolicy) -> None:
        """Take another policy once all that runs has ended; what comes meanwhile waits for it.

        Raises:
            UserError: the policy does not fit the model, or another switch is under way.
        """
        policy.check(self.decoder.model.recursion)
        if self.has_ended:
            raise UserError(ENDED)
        future = asyncio.get_running_loop().create_future()
        with self._condition:
            if self._next_policy is not None:
                raise UserError("policy: found another switch under way; expected none: try again later")
            self._next_policy = policy, future
            self._condition.notify()
        await future

    def close(self) -> None:
        """End the thread, and what it computes."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        self._thread.join()

    def _close(self, call: Call, text: Text) -> None:
        if text.is_open:
            text.is_open = False
            self.num_open -= 1
        if call.num_open == 0:
            self._open_calls.discard(call)

    def _deliver(self, outbox: list[tuple[Call, int, Event]]) -> None:
        for call, index, event in outbox:
            text = call.texts[index]
            if not text.is_open:
                continue
            if isinstance(event, Failure) or (isinstance(event, Delta) and event.finish_reason is not None):
                self._close(call, text)
            call.events.put_nowait((index, event))

    def _switched(self, future: "asyncio.Future[None]", error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    # The thread's side

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._take():
                self._score_one()
                if self._engine.has_work:
                    self._step()
                self._send()
        except Exception:
            log.exception("the engine's thread has ended")
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self.give_up)

    def _take(self) -> bool:
        """Wait for something to do, and take what has come; False at the end."""
        with self._condition:
            while not (
                self._submitted
                or self._cancelled
                or self._next_policy
                or self._to_score
                or self._engine.has_work
                or self._is_closing
            ):
                self._condition.wait()
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
            switch = self._next_policy
            if self._is_closing:
                return False
        self._held += [(call, index) for call in submitted for index in range(len(call.texts))]
        for call in cancelled:
            self._drop(call)
        if switch is not None:
            if self._running:
                return True
            self._switch(*switch)
        held, self._held = self._held, deque()
        self._begin(held)
        return True

    def _switch(self, policy: ExitPolicy, future: "asyncio.Future[None]") -> None:
        failure: Exception | None = None
        try:
            # Computed by another policy: a lossy one's keys and values are not those of full depth.
            self._engine.forget_prefixes()
            self._engine, self._counted = self._make_engine(policy), (0, 0)
        except Exception as error:
            log.exception("the policy could not be changed")
            failure = error
        with self._condition:
            self._next_policy = None
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._switched, future, failure)

    def _drop(self, call: Call) -> None:
        for request_id, progress in list(self._running.items()):
            if progress.call is call:
                self._engine.cancel(request_id)
                del self._running[request_id]
        self._held = deque(entry for entry in self._held if entry[0] is not call)
        self._to_score = deque(entry for entry in self._to_score if entry[0] is not call)

    def _begin(self, texts: deque[tuple[Call, int]]) -> None:
        for call, index in texts:
            text = call.texts[index]
            self._metrics.prompt_tokens.inc(len(text.prompt))
            if text.num_top is None:
                self._add(call, index)
                continue
            # Texts that share a prompt share its scores.
            last = self._to_score[-1] if self._to_score else None
            if last is not None and last[0] is call and _are_scored_alike(call.texts[last[1][0]], text):
                last[1].append(index)
            else:
                self._to_score.append((call, [index]))

    def _add(self, call: Call, index: int) -> None:
        text = call.texts[index]
        if text.params is None:
            self._outbox.append((call, index, Delta("", (), (), "length")))
            return
        try:
            progress = _Progress(call, index, self._text_of(text, text.params))
            self._running[self._engine.add(text.prompt, text.params)] = progress
        except UserError as error:
            self._outbox.append((call, index, Failure(str(error), 400)))
        except Exception as error:
            self._fail(call, index, error)

    def _score_one(self) -> None:
        """Score one prompt, so that the engine's requests wait for one at most."""
        if not self._to_score:
            return
        call, indices = self._to_score.popleft()
        text = call.texts[indices[0]]
        assert text.num_top is not None
        try:
            scores = score_prompt(self.decoder.model, text.prompt, text.num_top)
        except Exception as error:
            for index in indices:
                self._fail(call, index, error)
            return
        for index in indices:
            self._outbox.append((call, index, scores))
            params = call.texts[index].params
            if params is None or params.max_new_tokens > 1:
                self._add(call, index)
                continue
            try:
                self._choose_after(call, index, scores, params)
            except Exception as error:
                self._fail(call, index, error)

    def _choose_after(self, call: Call, index: int, scores: PromptScores, params: SamplingParams) -> None:
        """Take the one new token from the logits of the prompt's scoring: no other pass is needed."""
        logits = scores.next_logits
        token = choose_tokens(logits[None], [params], [0])[0]
        logprob = float(logits.float().log_softmax(-1)[token]) if params.logprobs else None
        last = self.decoder.cache.num_loops - 1
        reason: FinishReason = "stop" if token in params.stop_ids else "length"
        new = NewToken(-1, token, last, last, logprob, reason, scores.next_top[: params.top_logprobs])
        self._count([new])
        self._advance(_Progress(call, index, self._text_of(call.texts[index], params)), new)

    def _text_of(self, text: Text, params: SamplingParams) -> RequestText:
        return RequestText(self._tokenizer, params, () if text.is_answer else text.prompt)

    def _step(self) -> None:
        rows, head_rows = self._cache.num_rows, self.decoder.num_head_rows
        try:
            new_tokens = self._engine.step()
        except RequestError as error:
            for request_id in error.request_ids:
                progress = self._running.pop(request_id, None)
                if progress is not None:
                    self._fail(progress.call, progress.index, error)
            return
        except Exception:
            log.exception("a pass has failed: the requests in flight are given up")
            for request_id, progress in self._running.items():
                self._engine.cancel(request_id)
                self._fail(progress.call, progress.index)
            self._running.clear()
            self._failed_passes += 1
            if self._failed_passes == _MOST_FAILED_PASSES:
                raise  # nothing works any more, as after some errors of a GPU: others are to have the requests
            return
        finally:
            self._metrics.passes.inc()
            self._metrics.rows.inc(self._cache.num_rows - rows)
            self._metrics.head_rows.inc(self.decoder.num_head_rows - head_rows)
            counted, self._counted = self._counted, (self._engine.num_preemptions, self._engine.num_reused)
            self._metrics.preemptions.inc(self._counted[0] - counted[0])
            self._metrics.reused_tokens.inc(self._counted[1] - counted[1])
        self._failed_passes = 0
        self._count(new_tokens)
        for new in new_tokens:
            progress = self._running.get(new.request_id)
            if progress is None:
                continue
            try:
                has_ended = self._advance(progress, new)
            except Exception as error:
                self._fail(progress.call, progress.index, error)
                has_ended = True
            if has_ended:
                del self._running[new.request_id]
                self._engine.cancel(new.request_id)

    def _count(self, new_tokens: Sequence[NewToken]) -> None:
        if not new_tokens:
            return
        metrics, num_loops = self._metrics, self.decoder.cache.num_loops
        exits, agreed = [0] * num_loops, [0] * num_loops
        for new in new_tokens:
            exits[new.exit_loop] += 1
            agreed[new.agreed_loop] += 1
        metrics.new_tokens.inc(len(new_tokens))
        for loop in range(num_loops):
            metrics.exits[loop].inc(exits[loop])
            metrics.agreed[loop].inc(agreed[loop])
        metrics.recent.add(exits, agreed)

    def _advance(self, progress: _Progress, new: NewToken) -> bool:
        """Add a token to its text, and send what is to be sent; returns whether the text has ended."""
        now = time.monotonic()
        if progress.num_tokens == 0:
            progress.first_token = now
            self._metrics.time_to_first_token.observe(now - progress.call.began)
        progress.num_tokens += 1
        progress.offsets.append(progress.stream.num_decoded - progress.num_sent)
        progress.text += progress.stream.push(new)
        progress.tokens.append(new)
        reason: FinishReason | None = "stop" if progress.stream.has_stopped else new.finish_reason
        if reason is not None and progress.num_tokens > 1:
            self._metrics.time_per_token.observe((now - progress.first_token) / (progress.num_tokens - 1))
        if reason is not None or (progress.call.streams and progress.text):
            if reason is not None:
                # What a stop string cuts off has no place of its own.
                progress.offsets = [min(offset, len(progress.text)) for offset in progress.offsets]
            delta = Delta(progress.text, tuple(progress.tokens), tuple(progress.offsets), reason)
            self._outbox.append((progress.call, progress.index, delta))
            progress.num_sent += len(progress.text)
            progress.text, progress.tokens, progress.offsets = "", [], []
        return reason is not None

    def _fail(self, call: Call, index: int, error: Exception | None = None) -> None:
        """End a text with an error: the client is told of a `UserError`, and of others that there was one."""
        self._metrics.failures.inc()
        # One with a cause stands for an error that is ours.
        if isinstance(error, UserError) and error.__cause__ is None:
            log.error("%s", error)
            message = str(error)
        else:
            if error is not None:
                log.error("a request has failed", exc_info=error)
            message = "the server failed at this request; its log says why"
        self._outbox.append((call, index, Failure(message, 500)))

    def _send(self) -> None:
        """Hand all events to the event loop at once: each hand-over wakes it."""
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._deliver, outbox)


def _are_scored_alike(a: Text, b: Text) -> bool:
    return a.prompt is b.prompt and a.num_top == b.num_top
