"""Native operators: their Python face, their references in plain PyTorch, their gradients.

Importing this package loads the native library if there is one; otherwise the references run under the same
operator names, with one warning each. `build_info()` tells which.
"""

from rrt._build import BuildInfo, build_info
from rrt.ops.attention import (
    causal_attention,
    causal_attention_backward_reference,
    causal_attention_reference,
    has_causal_attention,
)
from rrt.ops.kv import (
    loop_kv_attention,
    loop_kv_attention_reference,
    loop_kv_prefill,
    loop_kv_prefill_reference,
    loop_kv_write,
    loop_kv_write_reference,
)
from rrt.ops.linear import (
    logit_statistics,
    logit_statistics_reference,
    loop_lora_linear,
    loop_lora_linear_reference,
    loop_lora_prefill,
    loop_lora_prefill_reference,
    pack_linear,
    pack_linear_reference,
)

__all__ = [
    "BuildInfo",
    "build_info",
    "causal_attention",
    "causal_attention_backward_reference",
    "causal_attention_reference",
    "has_causal_attention",
    "logit_statistics",
    "logit_statistics_reference",
    "loop_kv_attention",
    "loop_kv_attention_reference",
    "loop_kv_prefill",
    "loop_kv_prefill_reference",
    "loop_kv_write",
    "loop_kv_write_reference",
    "loop_lora_linear",
    "loop_lora_linear_reference",
    "loop_lora_prefill",
    "loop_lora_prefill_reference",
    "pack_linear",
    "pack_linear_reference",
]
