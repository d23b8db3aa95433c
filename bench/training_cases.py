"""Benchmark cases of bench/training.py on one process: steps, relaxation, operators and activation checkpointing."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.timing import Samples, Timer, Variant, speedup, spread
from rrt import ops
from rrt.checkpoint.presets import preset
from rrt.common.dtypes import dtype_name
from rrt.model.config import LoraRanks, ModelConfig, RecursiveConfig
from rrt.model.transformer import ForwardContext, LoopedStack, RecursiveTransformer, rope_cos_sin
from train.compile import compile_layers
from train.estimate import LiveMemory
from train.flops import peak_flops, training_flops_per_token
from train.objective import NEXT_TOKEN
from train.optimizer import make_optimizer
from train.recipe import OptimConfig

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
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    parallel_residual=False,
    tie_embeddings=False,
    scale_embeddings=False,
)
"""26.4 M parameters."""
Losses = Callable[[Tensor, Tensor], Tensor]
CPU = torch.device("cpu")
STEP_VARIANTS = ("ours", "transformers", "ours, compiled")


@dataclass
class Measured:
    """Samples of the variants of a case; the first variant is ours."""

    case: dict[str, Any]
    samples: Samples

    def record(self) -> dict[str, Any]:
        """Return the case as a record: its seconds, and the speedup of the first variant over each other."""
        ours, *others = self.samples
        return {
            **self.case,
            "seconds": {name: spread(values) for name, values in self.samples.items()},
            "speedup": {name: speedup(self.samples, ours, name) for name in others},
            "rounds": len(self.samples[ours]),
        }


def make_batch(vocab_size: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Draw random inputs and targets, int64 [batch, length]."""
    ids = torch.randint(0, vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def our_losses(
    config: ModelConfig, dtype: torch.dtype, device: torch.device = CPU
) -> tuple[RecursiveTransformer, Losses]:
    """Make our model with initial weights, and its next-token loss."""
    model = RecursiveTransformer(config)
    model.init_weights()
    losses = NEXT_TOKEN.bind(model.to(device, dtype))
    return model, lambda inputs, targets: losses(inputs, targets)[0]


def transformers_losses(
    config: ModelConfig, dtype: torch.dtype, device: torch.device = CPU
) -> tuple[nn.Module, Losses]:
    """Make transformers' Llama of the same shape, and its own loss."""
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
    ).to(device, dtype)

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = hf(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False).loss
        return loss

    return hf, losses


def optimizer_step(
    model: nn.Module, losses: Losses, batch: tuple[Tensor, Tensor], micro_batches: int = 1
) -> Callable[[int], Tensor]:
    """Make a function that takes a step of fused AdamW, with clipped gradients, over `micro_batches` times `batch`."""
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


def measure_step(
    timer: Timer,
    config: ModelConfig,
    dtype: torch.dtype,
    tokens: tuple[int, int] = (4, 512),
    device: torch.device = CPU,
    variants: tuple[str, ...] = STEP_VARIANTS,
) -> Measured:
    """Measure an optimizer step over `tokens`, batch and length.

    On a GPU also the peak memory of each variant and, where the GPU's peak rate is known, its MFU: a step is timed with
    the host's clock until the GPU is done.

    Args:
        variants: "ours" and "transformers", each also ", compiled": ours layer by layer, theirs as a whole.
    """
    inputs, targets = make_batch(config.vocab_size, *tokens)
    batch = inputs.to(device), targets.to(device)
    made: dict[str, tuple[nn.Module, Losses]] = {}
    for name in variants:
        if name.startswith("ours"):
            ours, losses = our_losses(config, dtype, device)
            if name.endswith("compiled"):
                compile_layers(ours.stack, device)
            made[name] = ours, losses
        else:
            theirs, losses = transformers_losses(config, dtype, device)
            if name.endswith("compiled"):
                theirs.compile()
            made[name] = theirs, losses
    steps = {name: optimizer_step(*model_and_losses, batch) for name, model_and_losses in made.items()}
    case: dict[str, Any] = {"vocab_size": config.vocab_size, "dtype": dtype_name(dtype), "tokens": inputs.numel()}
    for step in steps.values():
        step(0)
    if device.type == "cuda":
        case["peak_bytes"] = {name: _peak_bytes(made[name][0], step) for name, step in steps.items()}
    samples = timer.measure({name: Variant(_until_done(step, device)) for name, step in steps.items()}, copies=1)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is not None:
        flops = inputs.numel() * training_flops_per_token(config, RecursiveConfig(), tokens[1])
        case["mfu"] = {name: flops / statistics.median(times) / peak for name, times in samples.items()}
    return Measured(case, samples)


def _until_done(step: Callable[[int], Tensor], device: torch.device) -> Callable[[int], Tensor]:
    def run(i: int) -> Tensor:
        loss = step(i)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return loss

    return run


def _peak_bytes(model: nn.Module, step: Callable[[int], Tensor]) -> int:
    """Return a step's peak memory on its GPU: weights and both moments of AdamW, and what the step adds to them."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(0)
    added = torch.cuda.max_memory_allocated() - before
    return 3 * sum(parameter.nbytes for parameter in model.parameters()) + added


def measure_relaxation(
    timer: Timer, rows: int, rank: int, dtype: torch.dtype, forms: tuple[str, ...] = ("merged", "plain")
) -> Measured:
    """Measure forward and backward of a TinyLlama layer that runs twice: recursive, and relaxed in each form."""
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
    """Measure forward and backward of one layer's causal attention over 2048 tokens: ours and PyTorch's."""
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
    """Measure forward and backward of an operator over 2048 tokens of TinyLlama's widths: ours and PyTorch's."""
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
    # Read and write once: inputs and result; then the result's gradient, the inputs it needs, and their gradients.
    inputs = sum(leaf.nbytes for leaf in leaves)
    floor = 2 * grad.nbytes + (2 if name == "rotary_embedding" else 3) * inputs
    return Measured({"operator": name, "tokens": tokens, "dtype": dtype_name(dtype), "floor_bytes": floor}, samples)


def measure_checkpointing(timer: Timer) -> Measured:
    """Measure forward and backward of a model of 8 layers in 2 loops, and its peak memory beside the weights."""
    model = RecursiveTransformer(SMALL_LLAMA, RecursiveConfig(num_loops=2))
    model.init_weights()
    losses, batch = NEXT_TOKEN.bind(model), make_batch(SMALL_LLAMA.vocab_size, 4, 512)

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
