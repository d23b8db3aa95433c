"""Log-likelihoods of continuations; beginnings that texts share are computed once, the head runs on scored tokens only.

Texts are sorted by their tokens and packed into rows one after the other, each without what it shares with the one
before: a question is there once for its choices, `Question:` once for all questions of a row. A token sees those of its
own text alone, at its position in that text, so a row gives the scores that its texts have alone. On a CPU a batch is
one row, so there is no padding.

Shapes as in `rrt.model.transformer`, M states that predict tokens, and P tokens that are scored.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.response_cache import ResponseCache
from rrt import ops
from rrt.common.dtypes import dtype_name
from rrt.decode.packed_weights import PackedLinears, should_pack_for_batches
from rrt.errors import UserError
from rrt.model.transformer import RecursiveTransformer

Request = tuple[list[int], list[int]]
"""Context and continuation, token ids; both have at least one."""
Score = tuple[float, bool]
"""Log-likelihood (nats) of the continuation, and whether each of its tokens is the most probable one."""

MIN_SHARED_TOKENS = 4
"""A shorter beginning is computed again: it would cost more in the attention of all that share it."""
MASKED_ROW_TOKENS = 512
"""Tokens of a row where attention computes every pair of them and masks; elsewhere a row has a batch's tokens."""
LOGITS_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
"""Logits held at once, 8 and 256 MiB in fp32; the former fits in a CPU's cache."""
PACKED_BYTES = 2**32
"""Memory for packed copies of the head and the layers on CPUs; the rest stays unpacked."""
MIN_LOGITS_ROWS = 64
"""Fewest rows per call of the head, however large the vocabulary: each call reads the whole head."""


@dataclass(frozen=True)
class Text:
    """A request as the model's input: the last token of the continuation is predicted, never read."""

    key: str
    inputs: list[int]
    targets: list[int]


@dataclass(frozen=True)
class Row:
    """Texts sorted by their tokens, and how many tokens of each are those that the text before it begins with."""

    texts: list[Text]
    shared: list[int]

    @property
    def length(self) -> int:
        return sum(len(text.inputs) for text in self.texts) - sum(self.shared)

    @property
    def is_causal(self) -> bool:
        """Return True if causal attention alone would let each text see itself alone."""
        return self.length == len(self.texts[-1].inputs)

    def layout(self) -> tuple[list[int], list[int], np.ndarray, list[int]]:
        """Return the row's tokens, their positions and `seen_until` (of the model), and the places that are scored."""
        tokens: list[int] = []
        positions: list[int] = []
        path: list[int] = []  # where the tokens of the text at hand are
        scored: list[int] = []
        seen_until = np.full(self.length, self.length, dtype=np.int32)
        for text, shared in zip(self.texts, self.shared, strict=True):
            seen_until[path[shared:]] = len(tokens)
            del path[shared:]
            path += range(len(tokens), len(tokens) + len(text.inputs) - shared)
            tokens += text.inputs[shared:]
            positions += range(shared, len(text.inputs))
            scored += path[len(text.inputs) - len(text.targets) :]
        return tokens, positions, seen_until, scored


class Scorer:
    """Scorer of requests with a model; finished scores go to the cache batch by batch.

    The model must not change while a scorer exists: on a CPU it keeps packed copies of the head and of the layers.
    """

    def __init__(
        self,
        model: RecursiveTransformer,
        max_length: int,
        batch_tokens: int,
        cache: ResponseCache | None = None,
        packed_bytes: int = PACKED_BYTES,
        exit_loop: int | None = None,
    ) -> None:
        """
        Args:
            max_length: longest input in tokens; longer ones lose their beginning, BOS first.
            batch_tokens: most tokens in a batch, padding included, unless a single text has more: smaller batches stay
                in a CPU's caches, larger ones share more and fill a GPU.
            packed_bytes: memory for packed copies of the weights.
            exit_loop: score the exit after this loop; default the last. `cache` must be of this exit alone.
        """
        self.model = model
        self.packed_bytes = packed_bytes
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.cache = ResponseCache() if cache is None else cache
        self.exit_loop = exit_loop

    def pack(self) -> None:
        """Make the packed copies now instead of with the first batch."""
        _ = self._packed_head, self._packed_layers

    @cached_property
    def _packed_head(self) -> Tensor | None:
        """The head packed for `logit_statistics`, where that is faster than the model's own (`bench/fewshot.py`).

        There is none for an exit with a LoRA on the head.
        """
        weight, last = self.model.head_weight.detach(), self.model.recursion.num_loops - 1
        if self.model.head_lora_a is not None and self.exit_loop not in (None, last):
            return None
        if not should_pack_for_batches(weight) or ops.pack_linear(weight.to("meta")).nbytes > self.packed_bytes:
            return None
        return ops.pack_linear(weight)

    @cached_property
    def _packed_layers(self) -> PackedLinears:
        head = 0 if self._packed_head is None else self._packed_head.nbytes
        return PackedLinears(self.model.stack, self.packed_bytes - head)

    def score(self, requests: Sequence[Request], *, progress: bool = False) -> list[Score]:
        """Score each request. `progress` shows a bar over the tokens that the model reads.

        Raises:
            UserError: a continuation is longer than `max_length`, or a log-likelihood is not finite.
        """
        texts = [self.make_text(context, continuation) for context, continuation in requests]
        waiting = {text.key: text for text in texts if text.key not in self.cache}
        rows = list(pack_rows(list(waiting.values()), self.row_tokens)) if waiting else []
        total = sum(row.length for row in rows)
        with tqdm(total=total, unit="tok", unit_scale=True, desc="scoring", disable=None if progress else True) as bar:
            for batch in batches(rows, self.batch_tokens):
                self.cache.add(self._score_rows(batch))
                bar.update(sum(row.length for row in batch))
        return [(float(value), bool(greedy)) for value, greedy in (self.cache[text.key] for text in texts)]

    @property
    def row_tokens(self) -> int:
        """Most tokens of a row: all of a batch if attention skips what a row's tokens do not see."""
        skips = ops.has_native_kernels(self.model.embed) and self.model.recursion.prefix_length == 0
        return self.batch_tokens if skips else min(self.batch_tokens, MASKED_ROW_TOKENS)

    def make_text(self, context: list[int], continuation: list[int]) -> Text:
        """Cut a request to `max_length` inputs; raise `UserError` if its continuation alone is longer."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"request: found a continuation of {len(continuation)} tokens; expected at most {self.max_length}, "
                "the longest input of the model"
            )
        tokens = [*context, *continuation][-(self.max_length + 1) :]
        digest = hashlib.sha256(json.dumps([tokens, len(continuation)]).encode()).hexdigest()
        return Text(digest, tokens[:-1], continuation)

    @torch.inference_mode()
    def _score_rows(self, rows: list[Row]) -> dict[str, Score]:
        device = self.model.embed.device
        layouts = [row.layout() for row in rows]
        width = max(len(tokens) for tokens, *_ in layouts)
        tokens, positions = np.zeros((2, len(rows), width), dtype=np.int64)
        seen_until = np.zeros((len(rows), width), dtype=np.int32)  # padding is seen by itself
        scored: list[int] = []
        for index, (row_tokens, row_positions, row_seen, row_scored) in enumerate(layouts):
            end = len(row_tokens)
            tokens[index, :end], positions[index, :end], seen_until[index, :end] = row_tokens, row_positions, row_seen
            scored += [index * width + place for place in row_scored]
        layout = {}
        if not all(row.is_causal for row in rows):
            layout = {
                "seen_until": torch.from_numpy(seen_until).to(device),
                "positions": torch.from_numpy(positions).to(device),
            }
        texts = [text for row in rows for text in row.texts]
        targets = np.array([target for text in texts for target in text.targets])
        # A state that several texts share goes through the head once, for the target of each.
        places, sources = np.unique(scored, return_inverse=True)
        # Under causal attention the padding after a row changes nothing.
        selected_tokens = torch.from_numpy(places).to(device)
        with self._packed_layers.in_use():
            input_ids = torch.from_numpy(tokens).to(device)
            num_loops = None if self.exit_loop is None else self.exit_loop + 1
            hidden = self.model.hidden_states(
                input_ids, num_loops=num_loops, selected_tokens=selected_tokens, **layout
            )[-1]
        values, hits = self._token_scores(hidden, sources, targets)
        ends = np.cumsum([len(text.targets) for text in texts])[:-1]
        if not np.isfinite(values).all():
            raise UserError(
                f"the log-likelihood of a token is {values[~np.isfinite(values)][0]} in "
                f"{dtype_name(self.model.embed.dtype)}; expected a finite number: try --dtype float32 or bfloat16"
            )
        parts = zip(texts, np.split(values, ends), np.split(hits, ends), strict=True)
        return {text.key: (float(value.sum()), bool(hit.all())) for text, value, hit in parts}

    def _token_scores(self, hidden: Tensor, sources: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-likelihoods of tokens, fp64 [P], and which of them are the argmax, bool [P].

        Args:
            hidden: [M, D].
            sources, targets: int64 [P]; token `targets[i]` after state `sources[i]`.
        """
        if self._packed_head is None:
            return self._scores_of_logits(hidden, sources, targets)
        hidden = self.model.head_input(hidden, self.exit_loop)
        log_sum_exp, best = ops.logit_statistics(hidden, self._packed_head, self.model.config.vocab_size)
        states, tokens = torch.from_numpy(sources), torch.from_numpy(targets)
        wide = log_sum_exp.dtype
        logits = (hidden[states].to(wide) * self.model.head_weight[tokens].to(wide)).sum(1)
        # The two sums round differently: a token of probability 1 has exactly 0.
        values = (logits - log_sum_exp[states]).clamp_(max=0)
        return values.double().numpy(), (best[states] == tokens).numpy()

    def _scores_of_logits(
        self, hidden: Tensor, sources: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute `_token_scores` with the model's own head, a few rows at a time."""
        device = hidden.device
        elements = LOGITS_ELEMENTS.get(device.type, LOGITS_ELEMENTS["cuda"])
        rows = max(MIN_LOGITS_ROWS, elements // self.model.config.vocab_size)
        order = np.argsort(sources, kind="stable")
        counts = np.bincount(sources // rows).tolist()
        places, wanted = (torch.from_numpy(numbers[order]).to(device) for numbers in (sources % rows, targets))
        values, hits = [], []
        for h, row, target in zip(hidden.split(rows), places.split(counts), wanted.split(counts), strict=True):
            logits = self.model.logits(h, self.exit_loop)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            # Of equal logits the argmax is the first. It costs more than the maximum, so only rows with hits need it.
            hit = logits[row, target] == logits.amax(1)[row]
            hit_rows, back = row[hit].unique(return_inverse=True)
            hit[hit.clone()] = logits[hit_rows].argmax(1)[back] == target[hit]
            hits.append(hit)
            torch.log_softmax(logits, 1, out=logits)
            values.append(logits[row, target].double())
        inverse = np.argsort(order)
        return torch.cat(values).cpu().numpy()[inverse], torch.cat(hits).cpu().numpy()[inverse]


def pack_rows(texts: list[Text], row_tokens: int) -> Iterator[Row]:
    """Pack texts into rows of at most `row_tokens` tokens; a longer text has a row of its own.

    A row ends where the next text shares least with it, within its last quarter: what two rows share is computed twice.
    """
    texts = sorted(texts, key=lambda text: text.inputs)
    shared = [0, *(_common_prefix_length(a.inputs, b.inputs) for a, b in pairwise(texts))]
    shared = [count if count >= MIN_SHARED_TOKENS else 0 for count in shared]
    first = 0
    while first < len(texts):
        lengths = [len(texts[first].inputs)]
        for index in range(first + 1, len(texts)):
            length = lengths[-1] + len(texts[index].inputs) - shared[index]
            if length > row_tokens:
                break
            lengths.append(length)
        end = first + len(lengths)
        if end < len(texts):
            ends = [end for end, length in enumerate(lengths, start=first + 1) if 4 * length >= 3 * lengths[-1]]
            end = min(reversed(ends), key=lambda end: shared[end])
        yield Row(texts[first:end], [0, *shared[first + 1 : end]])
        first = end


def batches(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Yield batches of rows of similar length, longest first, so that memory runs out at once or not at all.

    Causal attention is enough for all rows of a batch or for none.
    """
    rows = sorted(rows, key=lambda row: (not row.is_causal, row.length), reverse=True)
    batch: list[Row] = []
    for row in rows:
        if batch and ((len(batch) + 1) * batch[0].length > batch_tokens or batch[0].is_causal != row.is_causal):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _common_prefix_length(a: list[int], b: list[int]) -> int:
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return min(len(a), len(b))
