"""A teacher for distillation: sharded, without gradients; it gives hidden states and its head, never whole logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from rrt.checkpoint.source import Source, open_source
from rrt.data.tokenizer import Tokenizer, load_tokenizer
from rrt.errors import UserError
from rrt.model.config import ModelConfig
from rrt.model.meta import meta_model
from rrt.model.transformer import RecursiveTransformer
from train.distributed import Processes, as_forward, fill_parameters, raise_everywhere
from train.losses import Teacher


def open_teacher(path: Path, student: ModelConfig, tokenizer: Tokenizer, seq_len: int) -> Source:
    """Open a teacher and check that its logits are over the same tokens as the student's.

    Raises:
        UserError: it is no usable model, has another tokenizer or vocabulary, or a shorter context.
    """
    source = open_source(path)
    found = load_tokenizer(path)
    if found.sha256 != tokenizer.sha256:
        raise UserError(
            f"field 'distill.teacher': {path} has the tokenizer of sha256 {found.sha256[:12]}; expected the model's, "
            f"{tokenizer.sha256[:12]}: distillation compares the same tokens"
        )
    for name, least in (("vocab_size", student.vocab_size), ("context_length", seq_len)):
        has = getattr(source.model, name)
        if has < least or (name == "vocab_size" and has != least):
            expected = f"{least}, as the model has" if name == "vocab_size" else f"at least data.seq_len = {least}"
            raise UserError(f"field 'distill.teacher': {path} has {name} {has}; expected {expected}")
    return source


class ShardedTeacher:
    """A frozen model of which each process holds a part; a layer is gathered to run and freed afterwards.

    Embedding, norm and head are one unit, which stays gathered while the loss uses it. A single process has the whole
    model and gathers nothing.
    """

    def __init__(self, model: RecursiveTransformer, mesh: DeviceMesh) -> None:
        """Shard `model`, which computes in its parameters' dtype, in place if there are several processes."""
        model.eval().requires_grad_(False)
        if mesh.size() > 1:
            for layer in model.stack.layers:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            fully_shard(model, mesh=mesh, reshard_after_forward=False)
        self.model = model
        self._states = as_forward(model, lambda inputs: model.norm(model.hidden_states(inputs)[-1]))

    @classmethod
    def load(cls, source: Source, processes: Processes, dtype: torch.dtype) -> "ShardedTeacher":
        """Load a teacher in `dtype`, of which each process reads its own part. A collective."""
        teacher = cls(meta_model(source.model, source.recursion).to(dtype), processes.mesh)
        teacher.model.to_empty(device=processes.device)
        raise_everywhere(lambda: fill_parameters(teacher.model, source.get))
        return teacher

    @contextmanager
    def read(self, inputs: Tensor) -> Iterator[Teacher]:
        """Run the teacher on inputs [batch, T]; use the result inside the context only. A collective."""
        with torch.no_grad():
            hidden = self._states(inputs).flatten(0, 1)
        try:
            yield Teacher(hidden, self.model.head_weight)
        finally:
            if isinstance(self.model, FSDPModule):
                self.model.reshard()
