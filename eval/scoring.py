"""Log-likelihoods of continuations; shared beginnings are computed once, and the head runs on scored tokens only.

Requests that begin with the same tokens (a question and its choices, a sentence and its two options) share one row: the
common beginning, then a branch for the rest of each. A token sees the beginning and its own branch, at its position in
its own text, so a row gives the scores of its texts alone. Rows are sorted by length and batched by tokens.

Shapes as in `rrt.model.transformer`, M states that predict tokens, and P tokens that are scored.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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

MIN_SAVED_TOKENS = 8
"""A text joins a row if that saves at least this many tokens more; longer rows cost attention."""
MAX_BRANCH_TOKENS = 2048
"""Most tokens of a row after its common beginning; attention costs the square of a row's length."""
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


@dataclass
class Row:
    """Texts that begin with the same `shared` tokens."""

    shared: int
    texts: list[Text] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.shared + sum(len(text.inputs) - self.shared for text in self.texts)

    @property
    def has_branches(self) -> bool:
        """Return True if causal attention alone would let a text see another."""
        return self.length > max(len(text.inputs) for text in self.texts)

    def layout(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Return the row's tokens, positions, branch ids (0: shared), and the places in it whose logits are scored."""
        tokens = self.texts[0].inputs[: self.shared]
        positions, branch_ids, scored = list(range(self.shared)), [0] * self.shared, []
        for branch, text in enumerate(self.texts, start=1):
            shift = len(tokens) - self.shared
            first = len(text.inputs) - len(text.targets)
            scored += [p if p < self.shared else p + shift for p in range(first, len(text.inputs))]
            tokens += text.inputs[self.shared :]
            positions += range(self.shared, len(text.inputs))
            branch_ids += [branch] * (len(text.inputs) - self.shared)
        return tokens, positions, branch_ids, scored


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
    ) -> None:
        """
        Args:
            max_length: longest input in tokens; longer ones lose their beginning, BOS first.
            batch_tokens: most tokens in a batch, padding included, unless a single row has more: smaller batches have
                less padding and stay in a CPU's caches, larger ones fill a GPU.
            packed_bytes: memory for packed copies of the weights.
        """
        self.model = model
        self.packed_bytes = packed_bytes
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.cache = ResponseCache() if cache is None else cache

    def pack(self) -> None:
        """Make the packed copies now instead of with the first batch."""
        _ = self._packed_head, self._packed_layers

    @cached_property
    def _packed_head(self) -> Tensor | None:
        """The head packed for `logit_statistics`, where that is faster than the model's own (`bench/fewshot.py`)."""
        weight = self.model.head_weight.detach()
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
        rows = share_beginnings(list(waiting.values()))
        total = sum(row.length for row in rows)
        with tqdm(total=total, unit="tok", unit_scale=True, desc="scoring", disable=None if progress else True) as bar:
            for batch in batches(rows, self.batch_tokens):
                self.cache.add(self._score_rows(batch))
                bar.update(sum(row.length for row in batch))
        return [(float(value), bool(greedy)) for value, greedy in (self.cache[text.key] for text in texts)]

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
        tokens, positions, branch_ids = np.zeros((3, len(rows), width), dtype=np.int64)
        scored: list[int] = []
        for index, (row_tokens, row_positions, row_branches, row_scored) in enumerate(layouts):
            end = len(row_tokens)
            tokens[index, :end], positions[index, :end], branch_ids[index, :end] = (
                row_tokens,
                row_positions,
                row_branches,
            )
            branch_ids[index, end:] = -1  # padding sees the beginning and itself
            scored += [index * width + place for place in row_scored]
        layout = {}
        if any(row.has_branches for row in rows):
            layout = {
                "branch_ids": torch.from_numpy(branch_ids).to(device),
                "positions": torch.from_numpy(positions).to(device),
            }
        texts = [text for row in rows for text in row.texts]
        targets = np.array([target for text in texts for target in text.targets])
        # A state that several texts share goes through the head once, for the target of each.
        places, sources = np.unique(scored, return_inverse=True)
        # Without branches a row is one text: under causal attention the padding after it changes nothing.
        selected_tokens = torch.from_numpy(places).to(device)
        with self._packed_layers.in_use():
            input_ids = torch.from_numpy(tokens).to(device)
            hidden = self.model.hidden_states(input_ids, selected_tokens=selected_tokens, **layout)[-1]
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
        hidden = self.model.norm(hidden)
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
            logits = self.model.logits(h)
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


def share_beginnings(texts: list[Text]) -> list[Row]:
    """Pack texts that begin alike into rows.

    Sorted by their tokens, neighbours share most. A row of n texts that share s tokens saves (n - 1) * s; the next text
    joins if the saving grows.
    """
    rows: list[Row] = []
    for text in sorted(texts, key=lambda text: text.inputs):
        if rows:
            row = rows[-1]
            count = len(row.texts)
            shared = _common_prefix_length(row.texts[-1].inputs[: row.shared], text.inputs)
            grown = row.length + (count - 1) * (row.shared - shared) + len(text.inputs) - shared
            gain = count * shared - (count - 1) * row.shared
            if gain >= MIN_SAVED_TOKENS and grown - shared <= MAX_BRANCH_TOKENS:
                row.shared = shared
                row.texts.append(text)
                continue
        rows.append(Row(len(text.inputs), [text]))
    return rows


def batches(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Yield batches of rows of similar length, longest first, so that memory runs out at once or not at all.

    All rows of a batch have branches or none has.
    """
    rows = sorted(rows, key=lambda row: (row.has_branches, row.length), reverse=True)
    batch: list[Row] = []
    for row in rows:
        if batch and ((len(batch) + 1) * batch[0].length > batch_tokens or batch[0].has_branches != row.has_branches):
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
