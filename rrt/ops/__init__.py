"""The operators: native kernels, references in plain PyTorch, and gradients.

Importing this package loads the native library if there is one; otherwise the references run under the same
operator names, with one warning. `build_info()` tells which.
"""

from rrt.native import BuildInfo, build_info
from rrt.ops.attention import (
    causal_attention,
    causal_attention_backward_reference,
    causal_attention_reference,
    packed_texts_mask,
    prefers_native_attention,
)
from rrt.ops.decode_block import PARAMETERS as BLOCK_PARAMETERS
from rrt.ops.decode_block import decode_block, decode_block_reference
from rrt.ops.elementwise import (
    GATED_ACTIVATIONS,
    gated_activation,
    gated_activation_backward_reference,
    gated_activation_reference,
    has_native_kernels,
    rms_norm,
    rms_norm_backward_reference,
    rms_norm_reference,
    rotary_embedding,
    rotary_embedding_reference,
)
from rrt.ops.kv import (
    loop_kv_attention,
    loop_kv_attention_reference,
    loop_kv_prefill,
    loop_kv_prefill_reference,
    loop_kv_write,
    loop_kv_write_reference,
)
from rrt.ops.logits import logit_statistics, logit_statistics_reference
from rrt.ops.loop_lora import (
    loop_lora_linear,
    loop_lora_linear_reference,
    loop_lora_prefill,
    loop_lora_prefill_reference,
)
from rrt.ops.packing import (
    pack_linear,
    pack_linear_reference,
    packed_gated_linear,
    packed_gated_linear_reference,
    packed_linear,
    packed_linear_reference,
)

__all__ = [
    "BLOCK_PARAMETERS",
    "GATED_ACTIVATIONS",
    "BuildInfo",
    "build_info",
    "causal_attention",
    "causal_attention_backward_reference",
    "causal_attention_reference",
    "decode_block",
    "decode_block_reference",
    "gated_activation",
    "gated_activation_backward_reference",
    "gated_activation_reference",
    "has_native_kernels",
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
    "packed_gated_linear",
    "packed_gated_linear_reference",
    "packed_linear",
    "packed_linear_reference",
    "packed_texts_mask",
    "prefers_native_attention",
    "rms_norm",
    "rms_norm_backward_reference",
    "rms_norm_reference",
    "rotary_embedding",
    "rotary_embedding_reference",
]
