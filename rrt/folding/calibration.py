"""Statistics of a base over a calibration text: where each linear's inputs lie, and which errors the loss feels.

For a linear that maps x_t to y_t at token t, g_t is the gradient of the text's loss by y_t. An error E of its weight
changes the loss, to first order, by ``g_t^T E x_t`` at a token; the mean square of this, with x and g taken as
independent, is proportional to ``tr(G E C E^T)`` with

    both         C = sum |g_t|^2 x_t x_t^T,  G = sum |x_t|^2 g_t g_t^T
    inputs       C likewise, G the identity
    activations  C = sum w_t x_t x_t^T, without gradients: w_t is 50 for a row's first token, on which every head rests
                 (its weight by gradients is large by itself), else 1; for linears whose input no norm bounds (out,
                 down) over the squared length of the residual stream after the layer, which a few tokens own

The pass goes depth by depth: forward, keeping each layer's input; backward from the loss, keeping the gradient of each
layer's output. Either gives the statistics of any one depth by running its layer again, so that memory holds one layer
and one depth's matrices; they are kept as well, in the workspace, where they fit.

Shapes: n rows of T tokens, D model width, N out and K in of a linear.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rrt.checkpoint.source import Source
from rrt.errors import UserError
from rrt.folding.tying import Metric
from rrt.folding.views import read_finite
from rrt.folding.workspace import Workspace
from rrt.model.config import RecursiveConfig
from rrt.model.loop_linear import loop_linears
from rrt.model.meta import meta_model
from rrt.model.transformer import ForwardContext, Layer, RecursiveTransformer, rope_cos_sin
from rrt.ops.precision import matmul_dtype

CalibrationMetric = Literal["both", "inputs", "activations"]

FIRST_TOKEN_WEIGHT = 50.0
_UNBOUNDED = ("attn.out", "mlp.down")
"""Linears whose input no norm bounds."""

Record = dict[str, tuple[Tensor, Tensor]]
"""Input and output of linears, by their names in the layer."""

_BATCH_TOKENS = 4096
_LOGITS_AT_ONCE = 2**26
_GRAM_BLOCKS = 4


@dataclass(frozen=True)
class LinearStatistics:
    """Statistics of one linear at one depth.

    Attributes:
        metric: C [K, K] and G [N, N] (None for the identity), fp32, sums over tokens.
        token_weights: fp32 [n * T], what an error at each token counts for: |g_t|^2, or w_t.
    """

    metric: Metric
    token_weights: Tensor


def products_dtype(device: torch.device) -> torch.dtype:
    """Choose the dtype of matrix products in passes over the text: 16 bits where the device is faster with them."""
    return matmul_dtype(torch.empty(0, dtype=torch.bfloat16, device=device))


def fast_products(device: torch.device) -> AbstractContextManager[object]:
    """Compute products inside the context in `products_dtype`, everything else in fp32."""
    dtype = products_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)


def load_layer(source: Source, depth: int, device: torch.device) -> Layer:
    """Load one layer of a vanilla model, fp32 without gradients."""
    with torch.device("meta"):
        layer = Layer(source.model, RecursiveConfig(), depth)
    _fill(layer, lambda name: read_finite(source, f"stack.layers.{depth}.{name}"), device)
    return layer


def _fill(module: nn.Module, read: Callable[[str], Tensor], device: torch.device) -> None:
    """Give a module without memory its parameters."""
    for name, _ in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = read(name).to(device, torch.float32, copy=True)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


class TextPass:
    """What passes over the calibration text have in common: its rows, batches of them, and the model's two ends.

    Args:
        source: a vanilla model.
        rows: int64 [n, T + 1], inputs and their next tokens.
    """

    def __init__(self, source: Source, rows: Tensor, device: torch.device) -> None:
        self.source, self.device = source, device
        self.rows = rows
        self.length = rows.shape[1] - 1
        self.context = ForwardContext(
            rope_cos_sin(source.model, torch.arange(self.length, device=device)[None], torch.float32)
        )
        self.rows_at_once = max(1, _BATCH_TOKENS // self.length)

    @property
    def num_batches(self) -> int:
        return -(-len(self.rows) // self.rows_at_once)

    def batches(self) -> Iterator[slice]:
        """Yield the batches, as ranges of rows."""
        for start in range(0, len(self.rows), self.rows_at_once):
            yield slice(start, start + self.rows_at_once)

    def embed(self) -> Tensor:
        """Embed the inputs: fp32 [n, T, D]."""
        return self._ends().embed_tokens(self.rows[:, :-1].to(self.device))

    def loss_gradient(self, states: Tensor) -> Tensor:
        """Compute the gradient of the loss, summed over tokens, by the last layer's outputs [n, T, D]."""
        ends = self._ends()
        at_once = max(1, _LOGITS_AT_ONCE // (self.length * self.source.model.vocab_size))
        gradients = []
        for hidden, rows in zip(states.split(at_once), self.rows.split(at_once), strict=True):
            hidden = hidden.requires_grad_()
            with fast_products(self.device):
                logits = ends.logits(hidden).float()
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten().to(self.device), reduction="sum")
            gradients.append(torch.autograd.grad(loss, hidden)[0])
        return torch.cat(gradients)

    def _ends(self) -> RecursiveTransformer:
        """Make the model without its layers."""
        model = meta_model(self.source.model, RecursiveConfig())
        del model.stack
        _fill(model, lambda name: read_finite(self.source, name), self.device)
        return model


class BaseStatistics:
    """Statistics of every depth of a base, computed depth by depth and kept in a workspace.

    Call `forward`, then `backward`; then `depth` gives those of any depth, in any order.

    Args:
        source: the base, vanilla, with folded norms.
        workspace: may have the statistics of all depths from an earlier conversion.
        keep: keep all depths' statistics, rather than compute them again when `depth` is called.
    """

    def __init__(
        self,
        text: TextPass,
        metric: CalibrationMetric,
        workspace: Workspace,
        *,
        keep: bool,
        step: Callable[[str, int], None],
    ) -> None:
        self._text, self._metric, self._workspace, self._keep, self._step = text, metric, workspace, keep, step
        self._num_layers = text.source.model.num_layers
        narrow = products_dtype(text.device) == torch.bfloat16
        self._kept_dtype = torch.bfloat16 if narrow else torch.float32

    @property
    def _is_complete(self) -> bool:
        """Whether the workspace has everything that both passes are for."""
        names = (f"statistics-{depth:03d}" for depth in range(self._num_layers))
        return self._metric != "activations" and all(map(self._workspace.has, names))

    @torch.no_grad()
    def forward(self) -> None:
        """Run the base, keeping each layer's input and the last one's output."""
        if self._is_complete:
            for depth in range(self._num_layers):
                self._step("forward", depth)
            return
        first = next((d for d in reversed(range(self._num_layers + 1)) if self._workspace.has(f"state-{d:03d}")), None)
        states = self._text.embed() if first is None else self._load("state", first)
        if first is None:
            states = self._save("state", 0, states)
        for depth in range(first or 0):
            self._step("forward", depth)
        for depth in range(first or 0, self._num_layers):
            layer = load_layer(self._text.source, depth, self._text.device)
            for batch in self._text.batches():
                with fast_products(self._text.device):
                    after = layer(states[batch], 0, self._text.context)
                if not after.isfinite().all():
                    self._raise_not_finite(layer, depth, states[batch])
                states[batch] = after
            states = self._save("state", depth + 1, states)
            self._step("forward", depth)

    def backward(self) -> None:
        """Go back from the loss, keeping the gradient of each layer's output, and statistics if they are to be kept."""
        if not self._is_complete and not self._workspace.has(f"gradient-{self._num_layers:03d}"):
            gradient = self._text.loss_gradient(self._load("state", self._num_layers))
            self._save("gradient", self._num_layers, gradient)
        for depth in reversed(range(self._num_layers)):
            if not self._is_complete and not self._workspace.has(f"gradient-{depth:03d}"):
                statistics, gradient = self._run(depth, with_statistics=self._keep)
                if self._keep:
                    self._workspace.save(f"statistics-{depth:03d}", _packed(statistics))
                self._save("gradient", depth, gradient)
            self._step("backward", depth)
        if self._is_complete:
            for depth in range(self._num_layers + 1):
                self._workspace.drop(f"state-{depth:03d}")
                self._workspace.drop(f"gradient-{depth:03d}")

    def depth(self, depth: int) -> dict[str, LinearStatistics]:
        """Return the statistics of each linear at a depth."""
        name = f"statistics-{depth:03d}"
        if self._workspace.has(name):
            return _unpacked(self._workspace.load(name, self._text.device))
        if self._metric == "activations":
            statistics = self._run_forward(depth)
        else:
            statistics, _ = self._run(depth, with_statistics=True)
        if self._keep:
            self._workspace.save(name, _packed(statistics))
        return statistics

    def _run(self, depth: int, *, with_statistics: bool) -> tuple[dict[str, LinearStatistics], Tensor]:
        """Run a layer forward and backward: its statistics, and the gradient [n, T, D] of its input."""
        layer = load_layer(self._text.source, depth, self._text.device)
        states, after = self._load("state", depth), self._load("gradient", depth + 1)
        before = torch.empty_like(after)
        sums = {name: _Sums() for name, _ in loop_linears(layer)}
        with recorded(layer) as record:
            for batch in self._text.batches():
                x = states[batch].requires_grad_()
                with torch.enable_grad(), fast_products(self._text.device):
                    y = layer(x, 0, self._text.context)
                outputs = [record[name][1] for name in sums]
                before[batch], *gradients = torch.autograd.grad(y, [x, *outputs], after[batch])
                for (name, kept), gradient in zip(sums.items(), gradients if with_statistics else [], strict=False):
                    inputs, gradient = _tokens(record[name][0]), _tokens(gradient)
                    self._check_finite(depth, name, inputs=inputs, gradient=gradient)
                    kept.add_inputs(inputs, gradient.square().sum(1))
                    if self._metric == "both":
                        kept.add_outputs(gradient, inputs.square().sum(1))
        return {name: kept.statistics() for name, kept in sums.items()} if with_statistics else {}, before

    @torch.no_grad()
    def _run_forward(self, depth: int) -> dict[str, LinearStatistics]:
        """Run a layer forward, for statistics without gradients."""
        layer = load_layer(self._text.source, depth, self._text.device)
        states, after = self._load("state", depth), self._load("state", depth + 1)
        sums = {name: _Sums() for name, _ in loop_linears(layer)}
        with recorded(layer) as record:
            for batch in self._text.batches():
                with fast_products(self._text.device):
                    layer(states[batch], 0, self._text.context)
                weights = torch.ones(states[batch].shape[:2], device=self._text.device)
                weights[:, 0] = FIRST_TOKEN_WEIGHT
                energies = after[batch].square().sum(2)
                relative = torch.where(energies == 0.0, 0.0, weights / energies)  # no error of zeros is relative
                for name, kept in sums.items():
                    kept.add_inputs(_tokens(record[name][0]), (relative if name in _UNBOUNDED else weights).flatten())
        return {name: kept.statistics() for name, kept in sums.items()}

    def _save(self, kind: str, depth: int, states: Tensor) -> Tensor:
        """Keep [n, T, D], and return it as `_load` will, so that interrupted passes go on with the same numbers."""
        kept = states.to(self._kept_dtype)
        self._workspace.save(f"{kind}-{depth:03d}", {"states": kept})
        return kept.float()

    def _load(self, kind: str, depth: int) -> Tensor:
        """Read [n, T, D] of an earlier pass, fp32."""
        return self._workspace.load(f"{kind}-{depth:03d}", self._text.device)["states"].float()

    def _raise_not_finite(self, layer: Layer, depth: int, states: Tensor) -> NoReturn:
        """Name the first linear of a layer whose output is not finite."""
        with recorded(layer) as record, fast_products(self._text.device):
            layer(states, 0, self._text.context)
        for name, (inputs, outputs) in record.items():
            self._check_finite(depth, name, inputs=inputs, output=outputs)
        raise self._not_finite(depth, "residual stream", "values")

    def _check_finite(self, depth: int, linear: str, **tensors: Tensor) -> None:
        for kind, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise self._not_finite(depth, linear, kind)

    def _not_finite(self, depth: int, place: str, kind: str) -> UserError:
        return UserError(
            f"{self._text.source.directory}: layer {depth}, {place}: found NaN or infinity in its {kind} over the "
            "calibration text; expected finite values: calibrate on other text"
        )


class _Sums:
    """Growing sums over tokens of one linear at one depth."""

    def __init__(self) -> None:
        self._inputs: Tensor | None = None
        self._outputs: Tensor | None = None
        self._weights: list[Tensor] = []

    def add_inputs(self, inputs: Tensor, weights: Tensor) -> None:
        self._inputs = add_gram(self._inputs, inputs, weights)
        self._weights.append(weights)

    def add_outputs(self, gradients: Tensor, weights: Tensor) -> None:
        self._outputs = add_gram(self._outputs, gradients, weights)

    def statistics(self) -> LinearStatistics:
        return LinearStatistics(Metric(self._inputs, self._outputs), torch.cat(self._weights))


def add_gram(total: Tensor | None, vectors: Tensor, weights: Tensor) -> Tensor:
    """Add ``sum over t of w_t v_t v_t^T`` [n, n] to `total` (None is zero), in place; a symmetric matrix.

    Args:
        vectors: v_t [tokens, n] fp32.
        weights: w_t [tokens], not negative.
    """
    width = vectors.shape[1]
    if total is None:
        total = vectors.new_zeros(width, width)
    scaled = vectors * weights[:, None]
    # By blocks on and below the diagonal: five eighths of the products.
    block = -(-width // _GRAM_BLOCKS)
    for start in range(0, width, block):
        stop = min(start + block, width)
        rows = scaled[:, start:stop].T @ vectors[:, :stop]
        total[start:stop, :stop] += rows
        if start:
            total[:start, start:stop] += rows[:, :start].T
    return total


@contextmanager
def recorded(layer: Layer) -> Iterator[Record]:
    """Record the latest input and output of each linear inside the context."""
    record: Record = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: record.__setitem__(name, (inputs[0], output))

    handles = [linear.register_forward_hook(recorder(name)) for name, linear in loop_linears(layer)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _tokens(states: Tensor) -> Tensor:
    """Flatten [rows, T, width] to [rows * T, width], fp32, apart from its graph."""
    return states.detach().flatten(0, -2).float()


def _packed(statistics: dict[str, LinearStatistics]) -> dict[str, Tensor]:
    """Name the tensors of statistics, as they are kept."""
    tensors: dict[str, Tensor] = {}
    for name, linear in statistics.items():
        tensors[f"{name}.token_weights"] = linear.token_weights
        for side, matrix in (("inputs", linear.metric.inputs), ("outputs", linear.metric.outputs)):
            if matrix is not None:
                tensors[f"{name}.{side}"] = matrix
    return tensors


def _unpacked(tensors: dict[str, Tensor]) -> dict[str, LinearStatistics]:
    names = [name.removesuffix(".token_weights") for name in tensors if name.endswith(".token_weights")]
    return {
        name: LinearStatistics(
            Metric(tensors[f"{name}.inputs"], tensors.get(f"{name}.outputs")), tensors[f"{name}.token_weights"]
        )
        for name in names
    }
