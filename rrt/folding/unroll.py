"""Unrolling of a checkpoint into an ordinary Hugging Face directory.

Depth l gets the weight W' + B_l A_l and its own copy of the norms and biases, so the exported model is as
large as the base. A vanilla checkpoint keeps its tensors bit for bit. What early exits have for themselves, a LoRA on
the head or translators, is left out: the last loop, which is what the export computes, does without it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rrt.checkpoint.hf_config import model_config_to_hf
from rrt.checkpoint.hf_layout import HFTensor, tensor_table
from rrt.checkpoint.source import Source, open_source
from rrt.checkpoint.tensor_files import MAX_SHARD_BYTES, SafetensorsWriter
from rrt.common.dtypes import dtype_name
from rrt.common.files import atomic_directory, check_output, write_json
from rrt.common.provenance import make_provenance
from rrt.data.tokenizer import Tokenizer, tokenizer_of
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.loop_linear import merge_lora
from rrt.model.meta import parameter_shapes
from rrt.model.sizes import Sizes, model_sizes


@dataclass(frozen=True)
class PreparedExport:
    """An export that has been checked and can run; made by `prepare_export`."""

    source: Source
    out: Path
    dtype: torch.dtype
    overwrite: bool
    after: Sizes
    tokenizer: Tokenizer | None
    notices: tuple[str, ...]


def prepare_export(
    checkpoint: str | Path, out: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> PreparedExport:
    """Open the checkpoint and check everything that can be checked before work starts. Arguments as in `export`."""
    checkpoint, out = Path(checkpoint), Path(out)
    source = open_source(checkpoint)
    if source.recursion.prefix_length:
        raise UserError(
            f"{checkpoint / 'config.json'}: field 'recursive.prefix_length': found {source.recursion.prefix_length}; "
            "expected 0: the HF layout has no place for prefix vectors"
        )
    check_output(out, checkpoint, overwrite)
    tokenizer = tokenizer_of(checkpoint, source.model.vocab_size)
    notices: tuple[str, ...] = () if tokenizer else (f"{checkpoint} has no tokenizer; the export will have none",)
    if source.recursion.head_lora_rank:
        notices += ("the LoRA on the head is left out: only exits before the last loop use it",)
    if source.recursion.exit_translators:
        notices += ("exit translators are left out: only exits before the last loop use them",)
    dtype = dtype or source.dtype
    after = model_sizes(source.model, RecursiveConfig(), dtype)
    return PreparedExport(source, out, dtype, overwrite, after, tokenizer, notices)


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write the unrolled HF directory `out`, whole or not at all.

    Args:
        checkpoint: one of our checkpoints, an HF directory or a GGUF file.
        dtype: of the written tensors; default as stored. W' + B_l A_l is summed in fp32 and then cast.
        progress: show a bar over the tensors on stderr.

    Raises:
        UserError: the checkpoint is unusable, has prefix vectors, or `out` exists.
    """
    run_export(prepare_export(checkpoint, out, dtype=dtype, overwrite=overwrite), progress=progress)


def run_export(prepared: PreparedExport, *, progress: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Carry out an export that `prepare_export` has checked."""
    provenance = make_provenance("export", prepared.source.directory)
    with atomic_directory(prepared.out, prepared.overwrite, needed=prepared.after.bytes) as directory:
        writer = SafetensorsWriter(directory, max_shard_bytes)
        for key, tensor in _unrolled(prepared.source, prepared.dtype, progress):
            writer.add(key, tensor)
        writer.finish()
        write_json(directory / "config.json", model_config_to_hf(prepared.source.model, dtype_name(prepared.dtype)))
        write_json(directory / "provenance.json", provenance)
        if prepared.tokenizer is not None:
            prepared.tokenizer.save(directory)
            _write_generation_config(directory, prepared.tokenizer)


def _write_generation_config(directory: Path, tokenizer: Tokenizer) -> None:
    """Write the tokens that end a generation, if there are several and the base brought no file that says so."""
    path = directory / "generation_config.json"
    if len(tokenizer.stop_ids) > 1 and not path.exists():
        special = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
        fields = {name: token_id for name, token_id in special.items() if token_id is not None}
        write_json(path, fields | {"eos_token_id": list(tokenizer.stop_ids)})


def _unrolled(source: Source, dtype: torch.dtype, progress: bool) -> Iterator[tuple[str, Tensor]]:
    shapes = parameter_shapes(source.model, source.recursion)
    # Without a terminal the bar would fill a log file.
    table = tqdm(tensor_table(source.model), unit="tensor", desc="exporting", disable=None if progress else True)
    for entry in table:
        parts = [_parameter(source, shapes, name).to(dtype) for name in entry.targets]
        # A copy: shared tensors would otherwise be one memory under several keys, which safetensors refuses.
        tensor = parts[0].clone() if len(parts) == 1 else _fused(source.model, entry, parts)
        if not tensor.isfinite().all():
            raise UserError(
                f"{source.directory}: tensor '{entry.key}' is not finite in {dtype_name(dtype)}; "
                "expected finite values: choose another --dtype"
            )
        yield entry.key, tensor


def _fused(model: ModelConfig, entry: HFTensor, parts: list[Tensor]) -> Tensor:
    """Interleave q, k, v [H * D_h, ...] into the one tensor [H * 3 * D_h, ...] that GPT-NeoX stores."""
    per_head = [part.unflatten(0, (model.num_heads, model.head_dim)) for part in parts]
    return torch.stack(per_head, dim=1).reshape(entry.shape)


def _parameter(source: Source, shapes: dict[str, tuple[int, ...]], name: str) -> Tensor:
    """Make parameter `name` of the vanilla model that computes the same as `source`."""
    if not name.startswith("stack.layers."):
        return source.get(name)
    depth, rest = name.removeprefix("stack.layers.").split(".", 1)
    loop, layer = source.recursion.places(source.model)[int(depth)]
    shared_name = f"stack.layers.{layer}.{rest}"
    linear, _, leaf = shared_name.rpartition(".")
    shared = source.get(shared_name) if shared_name in shapes else None
    if shared is not None and ("norm" in rest or leaf == "bias"):
        return shared[loop] if shared.dim() == 2 else shared
    if shared is not None and f"{linear}.lora_a" not in shapes:
        return shared
    return merge_lora(shared, source.get(f"{linear}.lora_a")[loop], source.get(f"{linear}.lora_b")[loop])
