"""Continuous depth-wise batching: requests come and go between passes of the shared block, rows at any loops in each.

    engine = Engine(Decoder(model, cache), policy=Verify())
    engine.add([1, 2, 3], SamplingParams(max_new_tokens=32))
    while engine.has_work:
        for new in engine.step():
            print(new.request_id, new.token, new.exit_loop)

A pass costs one reading of the block's weights whatever the loops of its rows (arXiv 2410.20672, section 2.5). No token
leaves before it is final: a draft that is being verified is not.
"""

import time
from collections.abc import Sequence
from itertools import count
from math import isfinite
from typing import get_args

import torch
from torch import Tensor

from rrt.decode.decoder import Decoder
from rrt.decode.generation import check_prompt, token_ids
from rrt.decode.graphed_block import GraphedBlock
from rrt.decode.passes import send
from rrt.decode.sampling import TopTokens, draw, most_probable, not_finite, top_tokens
from rrt.errors import UserError
from rrt.serve.exits import Auto, ExitPolicy, Never
from rrt.serve.gate import Gate
from rrt.serve.pass_curve import measure_pass_curve
from rrt.serve.prefix_cache import PrefixCache
from rrt.serve.requests import NewToken, Request, RequestError, SamplingParams
from rrt.serve.scheduler import Scheduler, SkippedKV
from rrt.serve.sequences import Choice, Head, Pass

_MOST_MEASURED_ROWS = 128


class Engine:
    """Serves requests on a decoder's cache.

    Args:
        policy: of exits before the last loop; default none.
        chunk_size: most prompt tokens in a pass.
        max_running: most requests that are computed at once; the others wait.
        skipped_kv: where loops that a lossy exit skips have their keys and values from: "propagate", the state at the
            exit; "share", those of the loop of the exit; "defer", the loops themselves, which run later without logits.
        keeps_prefixes: keep pages of texts for requests that begin alike, until others need them. They stay the
            cache's until `forget_prefixes`.
        graphs: on CUDA, run passes of decode rows as graphs (`rrt.decode.graphed_block`).

    Raises:
        UserError: the policy does not fit the model: a loop that it has not, or early exits where rows of several loops
            cannot share a pass (sharing other than "cycle").
    """

    def __init__(
        self,
        decoder: Decoder,
        policy: ExitPolicy | None = None,
        *,
        chunk_size: int = 512,
        max_running: int = 256,
        skipped_kv: SkippedKV = "propagate",
        keeps_prefixes: bool = False,
        graphs: bool = True,
    ) -> None:
        self.decoder, self.policy = decoder, policy or Never()
        recursion, num_loops = decoder.model.recursion, decoder.cache.num_loops
        for name, value in (("chunk_size", chunk_size), ("max_running", max_running)):
            if value < 1:
                raise UserError(f"{name}: found {value}; expected at least 1")
        if skipped_kv not in get_args(SkippedKV):
            raise UserError(f"skipped_kv: found '{skipped_kv}'; expected {', '.join(get_args(SkippedKV))}")
        self.policy.check(recursion)
        self._block = GraphedBlock(decoder) if graphs and decoder.cache.k.is_cuda else decoder.block
        self._gate: Gate | None = None
        if isinstance(self.policy, Auto) and num_loops > 1:
            most_rows = min(max_running * num_loops, _MOST_MEASURED_ROWS)
            self._gate = Gate(self.policy.curve or measure_pass_curve(decoder, self._block, most_rows), num_loops)
        early = frozenset(loop for loop in range(num_loops - 1) if self.policy.looks_after(loop))
        self._scheduler = Scheduler(
            decoder.cache,
            chunk_size=chunk_size,
            max_running=max_running,
            early_loops=early,
            verifies=self.policy.is_exact,
            skipped_kv=skipped_kv,
            gate=self._gate,
            prefixes=PrefixCache(decoder.cache) if keeps_prefixes else None,
        )
        self._states = decoder.embed(torch.zeros(0, dtype=torch.int64, device=decoder.cache.k.device))
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.num_waiting + self._scheduler.num_running > 0

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    @property
    def num_reused(self) -> int:
        """Positions of prompts that were found computed."""
        return self._scheduler.num_reused

    def forget_prefixes(self) -> None:
        """Give back the pages of texts that are kept."""
        self._scheduler.forget_prefixes()

    def add(self, prompt: Sequence[int] | Tensor, params: SamplingParams | None = None) -> int:
        """Queue a prompt of token ids; returns the id of the request.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary, more positions than the decoder or the cache
                has. Other requests are not touched.
        """
        request = Request(self._next_id, tuple(token_ids("prompt", prompt)), params or SamplingParams())
        check_prompt(self.decoder, "prompt", request.prompt, request.params.max_new_tokens)
        self._scheduler.add(request)
        self._next_id += 1
        return request.id

    def cancel(self, request_id: int) -> bool:
        """Drop a request and give its pages back; False if it has ended or never was."""
        return self._scheduler.cancel(request_id)

    def step(self) -> list[NewToken]:
        """Run one pass; returns the tokens that are final after it.

        Raises:
            RequestError: logits of some requests are not finite, or a token could not be chosen. Those are dropped.
                After this, and any other error, the others begin again with the tokens that they have; those of an
                interrupted pass may then not have been returned.
        """
        try:
            began = time.perf_counter()
            work = self._scheduler.schedule()
            if work is None:
                return []
            copies = work.copies
            if copies.sequences:
                self.decoder.cache.copy_rows(copies.sequences, copies.positions, copies.from_loops, copies.to_loops)
            x = self._gather(work.sources)
            self._states = self._block(x, self.decoder.cache.plan(work.rows))
            new = self._scheduler.advance(work, self._choose(work))
            if self._gate is not None and not work.rows.chunks:
                self._gate.learn_seconds(len(work.sources), len(work.heads), time.perf_counter() - began)
            return new
        except BaseException as error:
            self._scheduler.restart()
            for request_id in error.request_ids if isinstance(error, RequestError) else ():
                self.cancel(request_id)
            raise

    def _gather(self, sources: list[int]) -> Tensor:
        """Collect the rows [M, D] of a pass: embedded tokens, and states ~slot of the last pass."""
        tokens, rows = [source for source in sources if source >= 0], self._states
        places = count(len(rows))
        indices = [next(places) if source >= 0 else ~source for source in sources]
        with torch.inference_mode():
            if tokens:
                embedded = self.decoder.embed(send(torch.tensor(tokens, dtype=torch.int64), rows.device))
                if len(tokens) == len(sources):
                    return embedded
                rows = torch.cat((rows, embedded))
            return rows[send(torch.tensor(indices, dtype=torch.int64), rows.device)]

    def _choose(self, work: Pass) -> list[Choice]:
        """Take the logits of rows that want them, and choose their tokens."""
        heads = work.heads
        if not heads:
            return []
        device = self._states.device
        slots = send(torch.tensor([head.slot for head in heads]), device)
        early, loops = self._early_rows(heads), None
        if early.stop > early.start:
            loops = send(torch.tensor([head.loop for head in heads], dtype=torch.int32), device)
        logits = self.decoder.logits(self._states[slots], loops)
        best, largest, scores = self._reduce(logits, early)
        # A draft that is no number is none; what counts is the last loop.
        last = self.decoder.cache.num_loops - 1
        counts = [head.loop == last or not self.policy.is_exact for head in heads]
        bad = {head.sequence.request.id for i, head in enumerate(heads) if counts[i] and not isfinite(largest[i])}
        if bad:
            message = f"request {', '.join(map(str, sorted(bad)))}: {not_finite(logits.dtype)}"
            raise RequestError(message, bad)
        choices: list[Choice] = []
        for i, head in enumerate(heads):
            if not isfinite(largest[i]):
                choices.append(Choice(exits=False))
                continue
            try:
                choices.append(self._choice(logits, i, head, best[i], scores[i]))
            except Exception as error:
                request_id = head.sequence.request.id
                raise RequestError(f"request {request_id}: {type(error).__name__}: {error}", [request_id]) from error
        return choices

    def _reduce(self, logits: Tensor, early: slice) -> tuple[list[int], list[float], list[float]]:
        """Find the most probable tokens, their logits, and scores of early rows: logits [M, V] -> [M] each.

        A device is waited for once.
        """
        found = list(most_probable(logits))
        scores = self.policy.scores(logits[early]) if early.stop > early.start else None
        if scores is not None:
            found.append(torch.zeros(len(logits), dtype=torch.float64, device=logits.device))
            found[2][early] = scores.double()
        if logits.is_cuda:
            found = list(torch.stack([each.double() for each in found]).cpu())
        tokens, largest, *rest = (each.tolist() for each in found)
        return [int(token) for token in tokens], largest, rest[0] if rest else [0.0] * len(tokens)

    def _choice(self, logits: Tensor, row: int, head: Head, best: int, score: float) -> Choice:
        """Decide about one row of logits [M, V], of which `_reduce` found `best` and `score`."""
        is_last, request = head.loop == self.decoder.cache.num_loops - 1, head.sequence.request
        if not is_last and not self.policy.exits(score, head.loop, request.id, head.step):
            return Choice(exits=False)
        params = request.params
        token = best if params.temperature == 0 else draw(logits[row], params, head.step)
        logprob: float | None = None
        top: TopTokens = ()
        if params.logprobs and (is_last or not self.policy.is_exact):
            logs = logits[row].float().log_softmax(-1)
            logprob, top = float(logs[token]), top_tokens(logs[None], params.top_logprobs)[0]
        return Choice(token, True, logprob, score, top)

    def _early_rows(self, heads: list[Head]) -> slice:
        """Return the place of rows before the last loop: they are next to each other, so that none is copied."""
        last = self.decoder.cache.num_loops - 1
        early = [i for i, head in enumerate(heads) if head.loop < last]
        assert not early or len(early) == early[-1] + 1 - early[0]
        return slice(early[0], early[-1] + 1) if early else slice(0, 0)
