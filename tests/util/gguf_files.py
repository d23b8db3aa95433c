"""GGUF files written from Hugging Face directories as llama.cpp's converter does, for tests of what reads them."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import transformers
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

ARCHITECTURES = {"gemma": "gemma", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ARCHITECTURES |= {"gpt_neox": "gptneox"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

Fields = dict[str, Any]
Tensors = dict[str, np.ndarray]


def write_gguf(
    path: Path,
    directory: Path,
    storage: str = "F32",
    *,
    tokenizer: Fields | None = None,
    change: Callable[[Fields, Tensors], None] = lambda fields, tensors: None,
) -> Path:
    """Write the model in `directory` as a GGUF file; matrices in `storage`, vectors in F32.

    Args:
        tokenizer: fields of the tokenizer, as `bpe_fields` and `sentencepiece_fields` make them.
        change: may change metadata and tensors (numpy, rows first) before they are written.
    """
    config = transformers.AutoConfig.from_pretrained(directory)
    architecture = ARCHITECTURES[config.model_type]
    fields = {f"{architecture}.{key}": value for key, value in _model_fields(config).items()} | (tokenizer or {})
    tensors = _tensors(directory, config, architecture)
    change(fields, tensors)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", architecture))
    for key, value in fields.items():
        add_field(writer, key, value)
    for name, tensor in tensors.items():
        kind = GGMLQuantizationType[storage if tensor.ndim > 1 else "F32"]
        if tensor.dtype == np.uint8:  # bytes of blocks, in what `storage` names
            writer.add_tensor(name, tensor, raw_dtype=kind)
        elif kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            writer.add_tensor(name, tensor.astype(np.float32 if kind == GGMLQuantizationType.F32 else np.float16))
        else:
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_field(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Add a value of metadata by its Python type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _model_fields(config: transformers.PretrainedConfig) -> Fields:
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields: Fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "vocab_size": config.vocab_size,
    }
    if config.model_type == "gpt_neox":
        fields["attention.layer_norm_epsilon"] = config.layer_norm_eps
        fields["use_parallel_residual"] = config.use_parallel_residual
        del fields["vocab_size"]
        return fields
    fields |= {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    if rope["rope_type"] == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return fields


def _tensors(directory: Path, config: transformers.PretrainedConfig, architecture: str) -> Tensors:
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = config.num_attention_heads
    tensors: Tensors = {}
    for key, tensor in load_file(directory / "model.safetensors").items():
        value = tensor.float().numpy()
        if architecture == "llama" and ".q_proj." in key:
            value = _pairs(value, heads)
        if architecture == "llama" and ".k_proj." in key:
            value = _pairs(value, config.num_key_value_heads)
        if "query_key_value" in key:
            per_head = value.reshape(heads, 3, -1, *value.shape[1:])
            value = np.concatenate([per_head[:, part].reshape(-1, *value.shape[1:]) for part in range(3)])
        if architecture == "gemma" and "norm" in key:
            value = value + 1
        tensors[names.get_name(key, try_suffixes=(".weight", ".bias"))] = value
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = _llama3_divisors(rope, config.head_dim)
    return tensors


def _pairs(value: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of queries or keys as llama.cpp rotates them."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def _llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    low, high, original = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    divisors = []
    for frequency in rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim):
        turns = original * frequency / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - kept) / rope["factor"] + kept))
    return np.array(divisors, dtype=np.float32)


def bpe_fields(directory: Path, pre: str = "gpt-2", **changes: Any) -> Fields:
    """Make the fields of a byte-level `tokenizer.json`; `changes` are of ``tokenizer.ggml.*``, None drops one."""
    content = json.loads((directory / "tokenizer.json").read_text())
    vocab = dict(content["model"]["vocab"])
    kinds = dict.fromkeys(vocab.values(), NORMAL)
    for token in content["added_tokens"]:
        vocab[token["content"]] = token["id"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    tokens = sorted(vocab, key=lambda token: vocab[token])
    assert [vocab[token] for token in tokens] == list(range(len(tokens)))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges}
    fields["token_type"] = [kinds[token_id] for token_id in range(len(tokens))]
    return _tokenizer_fields(fields | changes)


def sentencepiece_fields(directory: Path, user_defined: Sequence[str] = (), **changes: Any) -> Fields:
    """Make the fields of a `tokenizer.model`, as llama.cpp's converter does.

    Args:
        user_defined: its user-defined symbols, which the library does not tell.
        changes: as in `bpe_fields`.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    kinds = []
    for token_id in range(processor.vocab_size()):
        if processor.is_unknown(token_id):
            kinds.append(UNKNOWN)
        elif processor.is_control(token_id):
            kinds.append(CONTROL)
        elif processor.id_to_piece(token_id) in user_defined:
            kinds.append(USER_DEFINED)
        else:
            kinds.append(BYTE if processor.is_byte(token_id) else NORMAL)
    pieces = [processor.id_to_piece(token_id) for token_id in range(processor.vocab_size())]
    pieces = [piece.replace("▁", " ") if piece in user_defined else piece for piece in pieces]
    fields: Fields = {"model": "llama", "pre": "default"}
    fields |= {"scores": [processor.get_score(token_id) for token_id in range(len(pieces))], "token_type": kinds}
    fields |= {"tokens": pieces, "unknown_token_id": processor.unk_id()}
    fields |= {"bos_token_id": processor.bos_id(), "eos_token_id": processor.eos_id()}
    return _tokenizer_fields(fields | changes)


def _tokenizer_fields(fields: Fields) -> Fields:
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}
