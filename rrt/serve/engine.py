"""Continuous depth-wise batching: requests come and go between passes of the shared block, rows at any loops in each.

    engine = Engine(Decoder(model, cache), policy=Verify())
    engine.add([1, 2, 3], SamplingParams(max_new_tokens=32))
    while engine.has_work:
        for new in engine.step():
            print(new.request_id, new.token, new.exit_loop)

A pass costs one reading of the block's weights whatever the loops of its rows (arXiv 2410.20672, section 2.5). No token
leaves before it is final: a draft that is being verified is not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rrt.decode.decoder import Decoder
from rrt.decode.generation import check_prompt, token_ids
from rrt.decode.sampling import choose_tokens
from rrt.errors import UserError
from rrt.serve.exits import ExitPolicy, Never
from rrt.serve.requests import NewToken, Request, RequestError, SamplingParams
from rrt.serve.scheduler import Choice, Head, Pass, Scheduler


class Engine:
    """Serves requests on a decoder's cache.

    Args:
        policy: of exits before the last loop; default none.
        chunk_size: most prompt tokens in a pass.
        max_running: most requests that are computed at once; the others wait.

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
    ) -> None:
        self.decoder, self.policy = decoder, policy or Never()
        recursion, num_loops = decoder.model.recursion, decoder.cache.num_loops
        for name, value in (("chunk_size", chunk_size), ("max_running", max_running)):
            if value < 1:
                raise UserError(f"{name}: found {value}; expected at least 1")
        self.policy.check(recursion)
        early = frozenset(loop for loop in range(num_loops - 1) if self.policy.looks_after(loop))
        self._scheduler = Scheduler(
            decoder.cache,
            chunk_size=chunk_size,
            max_running=max_running,
            early_loops=early,
            verifies=self.policy.is_exact,
            mixes_loops=recursion.sharing == "cycle",
        )
        self._states = decoder.embed(torch.zeros(0, dtype=torch.int64, device=decoder.cache.k.device))
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.num_waiting + self._scheduler.num_running > 0

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

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
            RequestError: logits of some requests are not finite. Those are dropped. After this, and any other error,
                the others begin again with the tokens that they have.
        """
        try:
            work = self._scheduler.schedule()
            if work is None:
                return []
            x = self._gather(work.sources)
            self._states = self.decoder.block(x, self.decoder.cache.plan(work.rows))
            return self._scheduler.advance(work, self._choose(work))
        except BaseException as error:
            self._scheduler.restart()
            for request_id in error.request_ids if isinstance(error, RequestError) else ():
                self.cancel(request_id)
            raise

    def _gather(self, sources: list[int]) -> Tensor:
        """Collect the rows [M, D] of a pass: embedded tokens, and states ~slot of the last pass."""
        tokens = [source for source in sources if source >= 0]
        places = iter(range(len(self._states), len(self._states) + len(tokens)))
        indices = [next(places) if source >= 0 else ~source for source in sources]
        device = self._states.device
        embedded = self.decoder.embed(torch.tensor(tokens, dtype=torch.int64, device=device))
        with torch.inference_mode():
            return torch.cat((self._states, embedded))[torch.tensor(indices, device=device)]

    def _choose(self, work: Pass) -> list[Choice]:
        """Take the logits of rows that want them, and choose their tokens."""
        heads = work.heads
        if not heads:
            return []
        device, last = self._states.device, self.decoder.cache.num_loops - 1
        loops = torch.tensor([head.loop for head in heads], dtype=torch.int32, device=device)
        slots = torch.tensor([head.slot for head in heads], device=device)
        logits = self.decoder.logits(self._states[slots], loops)
        exits = self._exits(logits, loops, heads)
        choices = [Choice(exits=leaves) for leaves in exits]
        leaving = [i for i, leaves in enumerate(exits) if leaves]
        if leaving:
            rows = logits if len(leaving) == len(heads) else logits[leaving]
            for i, row, token in zip(leaving, rows, self._tokens(rows, [heads[i] for i in leaving]), strict=True):
                is_final = heads[i].loop == last or not self.policy.is_exact
                wants_logprob = is_final and heads[i].sequence.request.params.logprobs
                choices[i] = Choice(token, True, _logprob(row, token) if wants_logprob else None)
        return choices

    def _tokens(self, logits: Tensor, heads: list[Head]) -> list[int]:
        """Choose the tokens of rows: logits [M, V] -> [M]."""
        requests = [head.sequence.request for head in heads]
        try:
            return choose_tokens(logits, [request.params for request in requests], [head.step for head in heads])
        except UserError as error:
            finite = logits.float().amax(-1).isfinite().tolist()
            bad = [request.id for request, fine in zip(requests, finite, strict=True) if not fine]
            raise RequestError(f"request {', '.join(map(str, sorted({*bad})))}: {error}", bad) from None

    def _exits(self, logits: Tensor, loops: Tensor, heads: list[Head]) -> list[bool]:
        """Ask the policy about rows that are not at the last loop."""
        last = self.decoder.cache.num_loops - 1
        exits = [True] * len(heads)
        early = [] if self.policy.is_certain else [i for i, head in enumerate(heads) if head.loop < last]
        if early:
            requests = [heads[i].sequence.request.id for i in early]
            steps = [heads[i].step for i in early]
            for i, leaves in zip(early, self.policy.exits(logits[early], loops[early], requests, steps), strict=True):
                exits[i] = leaves
        return exits


def _logprob(logits: Tensor, token: int) -> float:
    return float(logits.float().log_softmax(-1)[token])
