"""What the server counts: Prometheus metrics, and the last seconds for the page."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call] # a series beside each other one, which nobody reads

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_RECENT_SECONDS = 10.0


class Metrics:
    """Metrics of one server. The engine's thread counts, any thread reads.

    Args:
        num_loops: of the model; each loop has a series.
    """

    def __init__(self, num_loops: int) -> None:
        self.registry = CollectorRegistry()
        counter, histogram = self._counter, self._histogram
        self.responses = Counter(
            "rrt_http_responses",
            "HTTP responses by path and status; 499: the client has gone",
            ("path", "status"),
            registry=self.registry,
        )
        self.prompt_tokens = counter("rrt_prompt_tokens", "Tokens of accepted prompts, of each choice")
        self.reused_tokens = counter("rrt_reused_tokens", "Prompt tokens that were found computed")
        self.new_tokens = counter("rrt_new_tokens", "Tokens generated")
        self.passes = counter("rrt_passes", "Passes of the shared block")
        self.rows = counter("rrt_rows", "Rows of all passes: tokens times loops, of prompts too, and dropped drafts")
        self.head_rows = counter("rrt_head_rows", "Rows that went through the head")
        self.preemptions = counter("rrt_preemptions", "Requests that began again for want of pages")
        self.failures = counter("rrt_request_failures", "Texts that ended in an error of the model or the engine")
        self.time_to_first_token = histogram("rrt_time_to_first_token_seconds", "From acceptance to the first token")
        self.time_per_token = histogram("rrt_time_per_output_token_seconds", "Mean of a text's tokens after its first")
        exits = Counter("rrt_exits", "Tokens by the loop that gave them", ("loop",), registry=self.registry)
        agreed = Counter(
            "rrt_agreed", "Tokens by the loop from which on all loops gave them", ("loop",), registry=self.registry
        )
        self.exits = [exits.labels(str(loop)) for loop in range(num_loops)]
        self.agreed = [agreed.labels(str(loop)) for loop in range(num_loops)]
        self.recent = Recent(num_loops)

    def add_gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Export a number that is read at each scrape."""
        Gauge(name, help_text, registry=self.registry).set_function(read)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, registry=self.registry)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, buckets=_SECONDS, registry=self.registry)


class Recent:
    """Tokens of the last ten seconds by loop.

    Args:
        now: the clock, in seconds.
    """

    def __init__(self, num_loops: int, now: Callable[[], float] = time.monotonic) -> None:
        self._num_loops, self._now = num_loops, now
        self._steps: deque[tuple[float, Sequence[int], Sequence[int]]] = deque()

    def add(self, exits: Sequence[int], agreed: Sequence[int]) -> None:
        """Add the tokens of a step, counted by loop."""
        now = self._now()
        self._steps.append((now, exits, agreed))
        while self._steps and self._steps[0][0] < now - _RECENT_SECONDS:
            self._steps.popleft()

    def read(self) -> tuple[float, list[int], list[int]]:
        """Return tokens per second, and the counts of exits and agreed loops, of the last ten seconds.

        The rate is over the time since the first of these tokens, at least one second.
        """
        now = self._now()
        steps = [step for step in self._steps.copy() if step[0] >= now - _RECENT_SECONDS]
        exits, agreed = [0] * self._num_loops, [0] * self._num_loops
        for _, step_exits, step_agreed in steps:
            for loop in range(self._num_loops):
                exits[loop] += step_exits[loop]
                agreed[loop] += step_agreed[loop]
        seconds = max(now - steps[0][0], 1.0) if steps else 1.0
        return sum(exits) / seconds, exits, agreed
