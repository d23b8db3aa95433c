"""Other ways to continue the requests of bench/serving.py, batch by batch: the next begins when all of one are done."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.generate import Tokens, Transformers
from bench.serving_variants import Requests
from rrt.decode.decoder import Decoder
from rrt.decode.generation import generate_steps
from rrt.errors import UserError

ContinuesBatch = Callable[[Requests], Tokens]
"""Continues every request of a batch; returns the tokens that each asked for."""


def in_batches(rival: ContinuesBatch, requests: Requests, size: int) -> Tokens:
    """Continue requests in batches of `size`, in their order."""
    return [tokens for batch in requests.batches(size) for tokens in rival(batch)]


def plain_generation(decoder: Decoder) -> ContinuesBatch:
    """Make the rival of rrt.decode.generation, whose rows leave a batch when they are done."""

    def rival(batch: Requests) -> Tokens:
        outputs: Tokens = [[] for _ in batch.prompts]

        def has_ended(index: int, token: int) -> bool:
            outputs[index].append(token)
            return len(outputs[index]) == batch.new_tokens[index]

        for _ in generate_steps(decoder, batch.prompts, max(batch.new_tokens), has_ended=has_ended):
            pass
        return outputs

    return rival


def transformers_generation(hf: Transformers) -> ContinuesBatch:
    """Make the rival of transformers, which pads, and computes until the longest is done."""

    def rival(batch: Requests) -> Tokens:
        made = hf.generate(batch.prompts, max(batch.new_tokens))
        return [tokens[:count] for tokens, count in zip(made, batch.new_tokens, strict=True)]

    return rival


class LlamaCpp:
    """llama.cpp on a GGUF file, greedy: a sequence for each request of a batch, which leaves when it is done.

    Args:
        length: most positions of a request.
        sequences: most requests of a batch.
    """

    def __init__(self, path: Path, length: int, sequences: int, threads: int) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)  # called as long as it lives
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise UserError(f"--llama-cpp: {path}: llama.cpp cannot read it; expected a .gguf of a model")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = -(-length // 256) * 256 * sequences, sequences
        params.n_batch = length * sequences
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(length * sequences, 0, 1)

    def __call__(self, batch: Requests) -> Tokens:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        outputs: Tokens = [[] for _ in batch.prompts]
        rows = [(i, prompt, 0) for i, prompt in enumerate(batch.prompts)]
        while rows:
            for (i, _, _), token in zip(rows, self._step(rows), strict=True):
                outputs[i].append(token)
            rows = [
                (i, outputs[i][-1:], start + len(tokens))
                for i, tokens, start in rows
                if len(outputs[i]) < batch.new_tokens[i]
            ]
        return outputs

    def _step(self, rows: list[tuple[int, list[int], int]]) -> list[int]:
        """Run (sequence, tokens, first position) of each sequence; returns the token after each."""
        fields, count, ends = self._batch, 0, []
        for sequence, tokens, start in rows:
            for offset, token in enumerate(tokens):
                fields.token[count], fields.pos[count] = token, start + offset
                fields.n_seq_id[count], fields.seq_id[count][0] = 1, sequence
                fields.logits[count] = offset == len(tokens) - 1
                count += 1
            ends.append(count - 1)
        fields.n_tokens = count
        if code := self._lib.llama_decode(self._context, fields):
            raise RuntimeError(f"llama.cpp: llama_decode failed with {code}")
        logits = (self._lib.llama_get_logits_ith(self._context, end) for end in ends)
        return [int(np.ctypeslib.as_array(each, (self._vocab_size,)).argmax()) for each in logits]


def check_llama_cpp(path: Path | None) -> None:
    """Refuse --llama-cpp where it cannot run."""
    if path is None:
        return
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError("--llama-cpp: llama_cpp is not installed; expected it: pip install llama-cpp-python")
    if not path.is_file():
        raise UserError(f"--llama-cpp: {path}: no such file; expected the .gguf of a model")
