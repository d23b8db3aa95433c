"""Text in, text out: a checkpoint with its tokenizer on an engine.

    llm = rrt.LLM("models/smollm2-b2-r64", policy=Verify())
    for completion in llm.generate(["def main(", "import "], SamplingParams(max_new_tokens=32)):
        print(completion.text)

All prompts of a call are computed together, as far as the cache holds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from rrt.checkpoint.source import load_model
from rrt.common.processes import pick_device
from rrt.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from rrt.decode.decoder import Decoder
from rrt.decode.kv_cache import PagedCache
from rrt.decode.sampling import TopTokens
from rrt.errors import UserError
from rrt.serve.engine import Engine
from rrt.serve.exits import ExitPolicy
from rrt.serve.flags import default_cache_bytes
from rrt.serve.requests import FinishReason, NewToken, SamplingParams
from rrt.serve.scheduler import SkippedKV
from rrt.serve.text import RequestText


@dataclass
class Completion:
    """The continuation of one prompt.

    Attributes:
        text: new text as it stands after the prompt, up to a stop string or the token that ended it.
        tokens: all new tokens, that one included.
        exit_loops, agreed_loops: of each token, as `NewToken` has them.
        logprobs: of the tokens, if asked for.
        top_logprobs: of each token's most probable rivals, if asked for.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    exit_loops: list[int] = field(default_factory=list)
    agreed_loops: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopTokens] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class LLM:
    """A model that continues prompts, many at once.

    Args:
        checkpoint: one of our checkpoints, an HF directory or a .gguf file, with its tokenizer.
        dtype: to compute in; default the checkpoint's.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is CUDA where available.
        policy: of exits before the last loop; default none.
        cache_bytes: of keys and values; default half of the memory that is free, at most 4 GiB.
        chunk_size: most prompt tokens in a pass.
        max_running: most prompts that are computed at once; the others wait.
        skipped_kv: of lossy exits, as `Engine` has it.
        keeps_prefixes: prompts that begin as earlier ones did find those computed, as long as there is room.

    Raises:
        UserError: from the loading of checkpoint and tokenizer, and from the engine.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str = "auto",
        policy: ExitPolicy | None = None,
        cache_bytes: int | None = None,
        chunk_size: int = 512,
        max_running: int = 256,
        skipped_kv: SkippedKV = "propagate",
        keeps_prefixes: bool = True,
    ) -> None:
        place = pick_device(device)
        self.tokenizer: Tokenizer = load_tokenizer(checkpoint)
        model = load_model(checkpoint, dtype, place)
        check_vocab(self.tokenizer, model.config.vocab_size, Path(checkpoint))
        if cache_bytes is None:
            cache_bytes = default_cache_bytes(place)
        cache = PagedCache.from_budget(
            model.config, model.recursion, cache_bytes, dtype=model.embed.dtype, device=model.embed.device
        )
        self.engine = Engine(
            Decoder(model, cache),
            policy,
            chunk_size=chunk_size,
            max_running=max_running,
            skipped_kv=skipped_kv,
            keeps_prefixes=keeps_prefixes,
        )

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continue each prompt.

        Args:
            prompts: texts, which are encoded as the tokenizer does by default, or token ids.
            params: of all prompts, or of each. A token of the tokenizer's `stop_ids` ends a text too. A prompt that is
                given many times has the same text each time, by its seed; `n` makes different ones.

        Returns:
            A completion of each prompt; where `n` asks for more, they follow one another.

        Raises:
            UserError: a prompt that the engine refuses; then none is computed.
            UserError: the engine has requests of others, whose tokens would be lost.
            RequestError: logits of a prompt are not finite; the others are lost with it. `Engine` goes on with them.
        """
        if isinstance(prompts, str):
            raise UserError("prompts: found a text; expected a list of them")
        if self.engine.has_work:
            raise UserError("engine: found requests that were added to it; expected none: end or cancel them first")
        chosen = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(chosen) != len(prompts):
            raise UserError(f"params: found {len(chosen)}; expected {len(prompts)}, one for each prompt")
        completions: dict[int, Completion] = {}
        texts: dict[int, RequestText] = {}
        try:
            for prompt, each in zip(prompts, chosen, strict=True):
                tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
                stop_ids = each.stop_ids | frozenset(self.tokenizer.stop_ids)
                for seed in range(each.seed, each.seed + each.n):
                    one = replace(each, seed=seed, n=1, stop_ids=stop_ids)
                    request_id = self.engine.add(tokens, one)
                    completions[request_id], texts[request_id] = Completion(), RequestText(self.tokenizer, one, tokens)
            while any(completion.finish_reason is None for completion in completions.values()):
                for new in self.engine.step():
                    if completions[new.request_id].finish_reason is None:
                        self._add(new, completions[new.request_id], texts[new.request_id])
        finally:
            for request_id in completions:
                self.engine.cancel(request_id)
        return list(completions.values())

    def _add(self, new: NewToken, completion: Completion, text: RequestText) -> None:
        completion.tokens.append(new.token)
        completion.exit_loops.append(new.exit_loop)
        completion.agreed_loops.append(new.agreed_loop)
        if new.logprob is not None:
            completion.logprobs.append(new.logprob)
        if new.top_logprobs:
            completion.top_logprobs.append(new.top_logprobs)
        completion.text += text.push(new)
        completion.finish_reason = "stop" if text.has_stopped else new.finish_reason
        if text.has_stopped:
            self.engine.cancel(new.request_id)
