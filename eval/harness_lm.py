"""Our models as a language model of the LM Evaluation Harness, without transformers and its tokenizers.

Text becomes tokens as in the harness's `hf` model: spaces that end the context go to the continuation, both are encoded
together, and what comes after as many tokens as the context alone has is scored after that context's own tokens. An
empty context is BOS (EOS where there is none), and long texts are cut at the beginning, BOS first. So scores are those
of that backend on the exported model; `eval/scoring.py` says why faster. Where they differ, on purpose:

- A BOS spelt out in a text (`<s>`) is text, and comes after the BOS that texts begin with.
- A continuation that leaves no token of its own, which stops that backend, is scored from where the encodings part.
- Documents that are scored whole (`loglikelihood_rolling`) are cut into windows, each token scored once. The prefix
  token begins the first window; with `bos`, BOS begins each, as in training, where that backend has it twice in the
  first, scores the second one, and has none in the others.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from eval.generation import Prompt, generate_texts
from eval.response_cache import ResponseCache
from eval.scoring import PACKED_BYTES, Request, Scorer
from rrt.data.tokenizer import Tokenizer
from rrt.errors import UserError
from rrt.model.transformer import RecursiveTransformer

ENCODE_AT_ONCE = 4096
"""Texts per call of the tokenizer, which spreads them over all cores."""


class HarnessLM(LM):
    """A model and its tokenizer, for `lm_eval.evaluate`.

    Args:
        bos: begin texts with BOS.
        batch_tokens: most tokens in a forward pass that scores.
        max_length: longest input in tokens (default: the longest that the base was trained on).
        cache: responses of earlier runs; those of this one are added.
        packed_bytes: memory for packed copies of the weights, on a CPU.
        exit_loop: score the exit after this loop, and generate nothing; default the last. `cache` must be of this exit
            alone.
        progress: show bars on stderr.
    """

    def __init__(
        self,
        model: RecursiveTransformer,
        tokenizer: Tokenizer,
        *,
        bos: bool,
        batch_tokens: int,
        max_length: int | None = None,
        cache: ResponseCache | None = None,
        packed_bytes: int = PACKED_BYTES,
        exit_loop: int | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.model_tokenizer = tokenizer
        self.bos = bos
        self.max_length = model.config.context_length if max_length is None else max_length
        self.progress = progress
        self.scorer = Scorer(model, self.max_length, batch_tokens, cache, packed_bytes, exit_loop)
        self._prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        self._device = model.embed.device

    def encode_pairs(self, requests: list[Instance]) -> list[Request]:
        """Encode context and continuation of each request; a continuation may be empty."""
        pairs = [_move_trailing_spaces(*request.args) for request in requests]
        contexts = self._encode((context for context, _ in pairs if context), self.bos)
        wholes = self._encode((context + continuation for context, continuation in pairs if context), self.bos)
        alone = self._encode((continuation for context, continuation in pairs if not context), False)
        split = []
        for context, continuation in pairs:
            if context:
                split.append(split_tokens(contexts[context], wholes[context + continuation]))
            else:
                # A text that begins with the prefix token has its context already.
                tokens = alone[continuation]
                split.append((tokens[:1], tokens[1:]) if tokens[:1] == [self._prefix] else ([self._prefix], tokens))
        return split

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = self.encode_pairs(requests)
        scores = iter(self.scorer.score([pair for pair in pairs if pair[1]], progress=self.progress))
        # An empty continuation is certain.
        return [next(scores) if continuation else (0.0, True) for _, continuation in pairs]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        texts = [request.args[0] for request in requests]
        # Without BOS: the first window gets the prefix token.
        encoded = self._encode(texts, False)
        windows = [self._windows(encoded[text]) for text in texts]
        scores = iter(self.scorer.score([pair for document in windows for pair in document], progress=self.progress))
        return [sum(next(scores)[0] for _ in document) for document in windows]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        if self.scorer.exit_loop is not None:
            # The engine takes the first token after a prompt from the last loop.
            raise UserError(
                f"task {requests[0].task_name}: generates text, which cannot exit early through a translator; expected "
                f"tasks that score texts with --exit-loop {self.scorer.exit_loop}"
            )
        arguments = [(request.args[0], _read_greedy_arguments(request), request.task_name) for request in requests]
        encoded = self._encode((context for context, *_ in arguments), self.bos)
        prompts = []
        for context, kwargs, task in arguments:
            max_new_tokens = kwargs["max_gen_toks"]
            if not 0 < max_new_tokens < self.max_length:
                raise UserError(
                    f"task {task}: found {max_new_tokens} tokens to generate; expected at least 1 and fewer than the "
                    f"{self.max_length} that the model reads"
                )
            tokens = (encoded[context] or [self._prefix])[-(self.max_length - max_new_tokens) :]
            until = tuple(stop for stop in kwargs["until"] if stop)
            prompts.append(Prompt(tuple(tokens), until, max_new_tokens))
        return generate_texts(self.model, self.model_tokenizer, prompts, self.scorer.cache, progress=self.progress)

    def _windows(self, tokens: list[int]) -> list[Request]:
        """Cut a document into windows that follow one another, each with the token before it as its context."""
        length = self.max_length - 1 if self.bos and len(tokens) > self.max_length else self.max_length
        windows = map(make_disjoint_window, get_rolling_token_windows(tokens, self._prefix, length, context_len=1))
        begin = [self._prefix] if self.bos else []
        return [([*(begin if place else []), *window[0]], window[1]) for place, window in enumerate(windows)]

    def _encode(self, texts: Iterable[str], bos: bool) -> dict[str, list[int]]:
        """Encode each distinct text once."""
        distinct = list(dict.fromkeys(texts))
        encoded: dict[str, list[int]] = {}
        starts = range(0, len(distinct), ENCODE_AT_ONCE)
        for start in tqdm(starts, desc="tokenizing", disable=None if self.progress and len(starts) > 1 else True):
            part = distinct[start : start + ENCODE_AT_ONCE]
            encoded |= zip(part, self.model_tokenizer.encode_batch(part, bos=bos), strict=True)
        return encoded


def split_tokens(context: Sequence[int], whole: Sequence[int]) -> Request:
    """Split the tokens of context and continuation together into the two.

    As in the harness, the continuation is what comes after as many tokens as the context alone has, and comes after
    the context's own tokens even if a token spans both. If that leaves it none, it begins where the two encodings part,
    and is empty only if the whole adds nothing.
    """
    if len(whole) > len(context) > 0:
        return list(context), list(whole[len(context) :])
    length = next((i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(whole))
    # Nothing predicts the first token.
    length = max(1, length)
    return list(whole[:length]), list(whole[length:])


def _move_trailing_spaces(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _read_greedy_arguments(request: Instance) -> dict[str, Any]:
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1]))
    if kwargs["do_sample"]:
        raise UserError(f"task {request.task_name}: asks for sampling; expected greedy generation")
    return kwargs
