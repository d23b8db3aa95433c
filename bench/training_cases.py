"""What `bench/training.py` measures: a training step against transformers', relaxation, checkpointing, the trainer."""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.timing import Samples, Timer, Variant, speedup, spread
from bench.traffic import imagined_step
from rrt import ops
from rrt.checkpoint.presets import preset
from rrt.common.dtypes import dtype_name
from rrt.data.bpe import train_bpe
from rrt.data.shards import ShardWriter
from rrt.data.tokenizer import load_tokenizer
from rrt.model.config import LoraRanks, ModelConfig, RecursiveConfig
from rrt.model.transformer import ForwardContext, LoopedStack, RecursiveTransformer, rope_cos_sin
from train.architecture import InitialModel
from train.compile import compile_layers
from train.distributed import processes
from train.estimate import LiveMemory
from train.objective import NEXT_TOKEN
from train.optimizer import make_optimizer
from train.recipe import DataConfig, GuardConfig, OptimConfig, RunConfig
from train.trainer import StepResult, Trainer

SMALL_LLAMA = ModelConfig(
    family="llama",
    vocab_size=16000,
    hidden_size=384,
    num_layers=8,
    num_heads=6,
    num_kv_heads=6,
    head_dim=64,
    intermediate_size=1024,
    max_position_embeddings=512,
    activation="silu",
    gated_mlp=True,
    norm_type="rmsnorm",
    norm_eps=1e-6,
    rope_theta=10000.0,
    rotary_fraction=1.0,
    use_bias=False,
    parallel_residual=False,
    tie_embeddings=False,
    scale_embeddings=False,
)
"""26.4 M parameters."""
Losses = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Measured:
    """Samples of the variants of one case, the first of which is ours."""

    case: dict[str, Any]
    samples: Samples

    def record(self) -> dict[str, Any]:
        """As JSON: seconds, and how many times faster the first variant is than each other."""
        ours, *others = self.samples
        return {
            **self.case,
            "seconds": {name: spread(values) for name, values in self.samples.items()},
            "speedup": {name: speedup(self.samples, ours, name) for name in others},
            "rounds": len(self.samples[ours]),
        }


def tokens_of(vocab_size: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random inputs and targets [batch, length]."""
    ids = torch.randint(0, vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def our_losses(config: ModelConfig, dtype: torch.dtype) -> tuple[RecursiveTransformer, Losses]:
    model = RecursiveTransformer(config)
    model.init_weights()
    losses = NEXT_TOKEN.bind(model.to(dtype))
    return model, lambda inputs, targets: losses(inputs, targets)[0]


def transformers_losses(config: ModelConfig, dtype: torch.dtype) -> tuple[nn.Module, Losses]:
    """transformers' Llama of the same shape, with its own loss."""
    import transformers

    hf = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_embeddings,
        )
    ).to(dtype)

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = hf(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False).loss
        return loss

    return hf, losses


def optimizer_step(
    model: nn.Module, losses: Losses, batch: tuple[Tensor, Tensor], micro_batches: int = 1
) -> Callable[[int], Tensor]:
    """One step of fused AdamW on a batch, or so many times on the same one, gradients clipped."""
    optimizer = make_optimizer(model, OptimConfig(lr=1e-4))

    def step(_: int) -> Tensor:
        for _ in range(micro_batches):
            loss = losses(*batch) / micro_batches
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure_step(timer: Timer, vocab_size: int, dtype: torch.dtype) -> Measured:
    """One optimizer step over 4 x 512 tokens: ours, transformers', and ours with compiled layers."""
    config = replace(SMALL_LLAMA, vocab_size=vocab_size)
    batch = tokens_of(vocab_size, 4, 512)
    steps = {"ours": optimizer_step(*our_losses(config, dtype), batch)}
    steps["transformers"] = optimizer_step(*transformers_losses(config, dtype), batch)
    compiled, losses = our_losses(config, dtype)
    compile_layers(compiled.stack, torch.device("cpu"))
    steps["ours, compiled"] = optimizer_step(compiled, losses, batch)
    for step in steps.values():
        step(0)
    samples = timer.measure({name: Variant(step) for name, step in steps.items()}, copies=1)
    return Measured({"vocab_size": vocab_size, "dtype": dtype_name(dtype), "tokens": batch[0].numel()}, samples)


def measure_relaxation(
    timer: Timer, rows: int, rank: int, dtype: torch.dtype, forms: tuple[str, ...] = ("merged", "plain")
) -> Measured:
    """Forward and backward of a TinyLlama layer run twice: recursive, and relaxed in each form."""
    config = replace(preset("tinyllama-1.1b"), num_layers=2)
    length = min(rows, 512)
    rope = rope_cos_sin(config, torch.arange(length)[None], dtype)
    x = torch.randn(rows // length, length, config.hidden_size).to(dtype).requires_grad_()

    def run(form: str) -> Callable[[int], Tensor]:
        ranks = LoraRanks.uniform(0 if form == "recursive" else rank)
        stack = LoopedStack(config, RecursiveConfig(num_loops=2, lora_rank=ranks))
        for name, parameter in stack.named_parameters():
            nn.init.constant_(parameter, 1.0) if "norm" in name else nn.init.normal_(parameter, std=0.02)
        stack.to(dtype)
        for module in stack.modules():
            if hasattr(module, "merge"):
                module.merge = form == "merged"

        def step(_: int) -> Tensor:
            y: Tensor = stack(x, ForwardContext(rope))[-1]
            y.backward(x.detach())  # type: ignore[no-untyped-call]
            stack.zero_grad()
            x.grad = None
            return y.detach()

        return step

    runs = {form: run(form) for form in (*forms, "recursive")}
    for step in runs.values():
        step(0)
    samples = timer.measure({name: Variant(step) for name, step in runs.items()}, copies=1)
    return Measured({"rows": rows, "rank": rank, "dtype": dtype_name(dtype), "layer": "tinyllama-1.1b"}, samples)


def measure_attention(timer: Timer, name: str, length: int, dtype: torch.dtype) -> Measured:
    """Forward and backward of one layer's causal attention over 2048 tokens: ours and PyTorch's."""
    config = preset(name)
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    sizes = [(2048 // length, length, count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    *leaves, grad = (torch.randn(size).to(dtype) for size in sizes)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        return y.transpose(1, 2)

    def run(attention: Callable[..., Tensor]) -> Callable[[int], Tensor]:
        return lambda _: torch.autograd.grad(attention(*leaves), leaves, grad)[0]

    runs = {"ours": run(lambda q, k, v: ops.causal_attention(q, k, v, head_dim**-0.5)), "sdpa": run(sdpa)}
    for step in runs.values():
        step(0)
    samples = timer.measure({name: Variant(step) for name, step in runs.items()}, copies=1)
    return Measured({"heads_of": name, "length": length, "tokens": 2048, "dtype": dtype_name(dtype)}, samples)


def measure_elementwise(timer: Timer, name: str, dtype: torch.dtype) -> Measured:
    """Forward and backward of an operator over 2048 tokens of TinyLlama's widths: ours and PyTorch's functions."""
    config, tokens = preset("tinyllama-1.1b"), 2048
    widths = {
        "rotary_embedding": [(1, tokens, config.num_heads, config.head_dim)],
        "rms_norm": [(tokens, config.hidden_size), (config.hidden_size,)],
        "gated_activation": [(tokens, config.intermediate_size)] * 2,
    }[name]
    leaves = [torch.randn(width).to(dtype).requires_grad_() for width in widths]
    grad = torch.randn(widths[0]).to(dtype)
    cos_sin = rope_cos_sin(config, torch.arange(tokens)[None], dtype)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * F.rms_norm(wide, x.shape[-1:], eps=config.norm_eps).to(x.dtype)

    ours, pytorch = {
        "rotary_embedding": (
            lambda x: ops.rotary_embedding(x, *cos_sin),
            lambda x: ops.rotary_embedding_reference(x, *cos_sin),
        ),
        "rms_norm": (lambda x, weight: ops.rms_norm(x, weight, config.norm_eps), norm),
        "gated_activation": (
            lambda gate, up: ops.gated_activation(gate, up, "silu"),
            lambda gate, up: F.silu(gate) * up,
        ),
    }[name]

    def run(function: Callable[..., Tensor]) -> Callable[[int], Tensor]:
        return lambda _: torch.autograd.grad(function(*leaves), leaves, grad)[0]

    runs = {"ours": run(ours), "pytorch": run(pytorch)}
    for step in runs.values():
        step(0)
    samples = timer.measure({each: Variant(step) for each, step in runs.items()}, copies=1)
    # Everything once: inputs and result, then the result's gradient, what it needs of the inputs, and their gradients.
    inputs = sum(leaf.nbytes for leaf in leaves)
    floor = 2 * grad.nbytes + (2 if name == "rotary_embedding" else 3) * inputs
    return Measured({"operator": name, "tokens": tokens, "dtype": dtype_name(dtype), "floor_bytes": floor}, samples)


def measure_checkpointing(timer: Timer) -> Measured:
    """Forward and backward of a model of 8 layers in 2 loops; peak memory beside its weights."""
    model = RecursiveTransformer(SMALL_LLAMA, RecursiveConfig(num_loops=2))
    model.init_weights()
    losses, batch = NEXT_TOKEN.bind(model), tokens_of(SMALL_LLAMA.vocab_size, 4, 512)

    def run(unit: str) -> Callable[[int], Tensor]:
        def step(_: int) -> Tensor:
            model.stack.checkpointing = unit  # type: ignore[assignment]
            loss = losses(*batch)[0]
            loss.backward()  # type: ignore[no-untyped-call]
            model.zero_grad()
            return loss.detach()

        return step

    runs, peaks = {unit: run(unit) for unit in ("none", "layer", "loop")}, {}
    for unit, step in runs.items():
        with LiveMemory() as memory:
            step(0)
        peaks[unit] = memory.peak
    samples = timer.measure({unit: Variant(step) for unit, step in runs.items()}, copies=1)
    return Measured({"peak_bytes": peaks, "tokens": batch[0].numel()}, samples)


class _TimedTrainer(Trainer):
    """Between its steps, a step of the same model in a bare loop."""

    bare: Callable[[int], Tensor]

    def _train_step(self, rate: float) -> StepResult:
        now = time.perf_counter()
        if self.step == 0:
            self.timed: Samples = {"trainer": [], "bare loop": []}
        elif self.step > 1:  # the first is warm-up
            self.timed["trainer"].append(now - self._began)
        began = time.perf_counter()
        self.bare(0)
        if self.step > 0:
            self.timed["bare loop"].append(time.perf_counter() - began)
        self._began = time.perf_counter()
        return super()._train_step(rate)


def measure_trainer(steps: int, micro_batches: int) -> Measured:
    """The trainer's steps, with data, logging and metrics, against the model's in a bare loop: one process in fp32."""
    batch_tokens = micro_batches * 4 * 512
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        root = Path(directory)
        for name in ("tokenizer", "data"):
            (root / name).mkdir()
        train_bpe(_own_sources(), 1000, root / "tokenizer")
        tokenizer = load_tokenizer(root / "tokenizer")
        with ShardWriter(root / "data", tokenizer) as writer:
            for text in _own_sources():
                ids = tokenizer.encode_document(text)
                writer.append("train", ids, [len(ids)], [len(text.encode())])
            writer.finish({})
        start_model = RecursiveTransformer(SMALL_LLAMA)
        start_model.init_weights()
        start = InitialModel(
            "bench", SMALL_LLAMA, RecursiveConfig(), tokenizer, lambda: start_model.get_parameter, None
        )
        recipe = _Recipe(
            DataConfig(str(root / "data"), seq_len=512),
            OptimConfig(),
            RunConfig(
                str(root / "run"),
                tokens=steps * batch_tokens,
                batch_tokens=batch_tokens,
                micro_batch=4,
                dtype="fp32",
                log_every=1,
                save_every=0,
                device="cpu",
            ),
            GuardConfig(),
        )
        with processes("cpu") as group:
            trainer = _TimedTrainer(recipe, start, group)
            model, losses = our_losses(SMALL_LLAMA, torch.float32)
            trainer.bare = optimizer_step(model, losses, tokens_of(1000, 4, 512), micro_batches)
            trainer.run()
    pairs = min(map(len, trainer.timed.values()))
    return Measured(
        {"micro_batches": micro_batches, "tokens": batch_tokens, "dtype": "float32", "steps": steps},
        {name: values[:pairs] for name, values in trainer.timed.items()},
    )


@dataclass(frozen=True)
class _Recipe:
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    guard: GuardConfig


def _own_sources() -> Iterator[str]:
    root = Path(__file__).resolve().parents[1]
    for folder in ("rrt", "train", "eval", "bench"):
        for path in sorted((root / folder).rglob("*.py")):
            yield path.read_text(encoding="utf-8")


def measure_traffic(name: str, num_loops: int, ranks: list[int]) -> list[dict[str, Any]]:
    """Collectives and bytes of one optimizer step of a preset on 8 imagined processes, in bf16.

    The first record is the unrolled parent; the others say how many times fewer bytes they gather.
    """
    config = preset(name)
    cases: list[tuple[str, RecursiveConfig, Any]] = [("parent", RecursiveConfig(), "stack")]
    for rank in ranks:
        recursion = RecursiveConfig(num_loops=num_loops, lora_rank=LoraRanks.uniform(rank))
        cases += [(f"rank {rank}", recursion, wrap) for wrap in ("stack", "layer")]
    records: list[dict[str, Any]] = []
    for label, recursion, wrap in cases:
        traffic = imagined_step(config, recursion, wrap, processes=8, accumulation=4)
        block = traffic.bytes["all-gather"] - 2 * _root_parameters(config)
        record = {
            "model": f"{name}, {label}",
            "num_loops": recursion.num_loops,
            "wrap": wrap,
            "counts": dict(traffic.counts),
            "bytes": dict(traffic.bytes),
            "block_gathered_bytes": block,
        }
        parent = records[0] if records else record
        record["fewer_bytes"] = parent["bytes"]["all-gather"] / record["bytes"]["all-gather"]
        record["fewer_block_bytes"] = parent["block_gathered_bytes"] / block
        records.append(record)
    return records


def _root_parameters(config: ModelConfig) -> int:
    """Of embedding, head and final norm."""
    matrices = 1 if config.tie_embeddings else 2
    norm = config.hidden_size * (2 if config.norm_type == "layernorm" else 1)
    return matrices * config.vocab_size * config.hidden_size + norm
