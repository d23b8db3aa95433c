"""The numerical core of conversion: one shared weight and a LoRA per loop that fit the weights of B loops.

For weights W_l [N, K] `fit_tied` minimises over W', A_l and B_l of rank R, in fp64,

    sum over l of  tr(G_l E_l C_l E_l^T),   E_l = W_l - W' - B_l A_l

where C_l [K, K] and G_l [N, N] say how much errors at the linear's inputs and outputs matter. Both are identities where
no metric is given, and the sum is then the energy lost.

Elimination of W': let only the C_l differ, and two loops have given LoRAs. The best W' then leaves ``tr(G X H X^T)``
with ``X = W_1 - W_2 - (B_1 A_1 - B_2 A_2)`` and the parallel sum ``H = (C_1^-1 + C_2^-1)^-1``. The difference of two
LoRAs is any matrix of rank 2R, so that the best X is the tail of W_1 - W_2 in this metric beyond 2R: a closed form,
whose leading triplets the two LoRAs take by turns. For more loops the same elimination, of one loop against the mean
of the others, is an exact step for W' and one LoRA together. A sweep takes every loop once.

Where both the C_l and the G_l differ, the fit starts from that for one common G, then alternates between W', by
conjugate gradients, and the LoRAs. No step raises the objective.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rrt.folding.svd import leading_eigenvectors, random_unit_rows, squared_singular_values, truncated_svd

RIDGE = 1e-3
"""Part of a side's mean diagonal that is added to its diagonal: directions never seen are not free."""

_LEAST_WEIGHT = 1e-9
_LEAST_COLUMN = 1e-10
_GRADIENT_STEPS = 8
_GRADIENT_TOLERANCE = 1e-3

_Lora = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Metric:
    """Importance of errors at one linear in one loop; None is the identity.

    Sums over tokens and means over them give the same fit: what counts is each side's shape, and per loop one size, the
    mean diagonal of the side given or, of both, the geometric mean of theirs. The objective is in units of that size.

    Attributes:
        inputs: C [K, K], symmetric without negative eigenvalues.
        outputs: G [N, N], likewise.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class TiedFit:
    """One shared weight with a LoRA per loop, and how well they fit. Tensors are fp64.

    Attributes:
        weight: W' [N, K].
        lora_a, lora_b: A [B, R, K] and B [B, N, R] in the form of `fit_lora`; R is the rank asked for, capped.
        errors: tr(G_l E_l C_l E_l^T) per loop, ridge included.
        norms: tr(G_l W_l C_l W_l^T) per loop.
        objectives: sum of the errors at the start and after each sweep, never rising; one value for a closed form.
        bound: no W' and LoRAs of this rank have a lower sum of errors; None where no bound is known.
    """

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    errors: tuple[float, ...]
    norms: tuple[float, ...]
    objectives: tuple[float, ...]
    bound: float | None


def fit_tied(
    weights: Sequence[Tensor],
    rank: int,
    metrics: Sequence[Metric] | None = None,
    sweeps: int = 3,
    generator: torch.Generator | None = None,
) -> TiedFit:
    """Fit one shared weight and a LoRA per loop to `weights`.

    The optimum, in closed form, for at most two loops whose metrics differ on one side at most; otherwise the result of
    `sweeps` sweeps, which never is worse than the metric's mean and the best LoRAs beside it.

    Args:
        weights: W_l [N, K] of each loop, finite.
        rank: of each LoRA; capped at min(N, K).
        metrics: one per loop, on the weights' device. Loops that have a side in common share the tensor. Default the
            identities.
        generator: as in `fit_lora`.
    """
    wide = [weight.double() for weight in weights]
    forms = _forms(wide, metrics)
    fit = _Fit(wide, forms, min(rank, *wide[0].shape), generator or torch.Generator().manual_seed(0))
    bound: float | None
    if all(torch.equal(weight, wide[0]) for weight in wide):
        objectives, bound = [0.0], 0.0
    elif _share_a_side(forms):
        objectives, bound = _fit_sharing_a_side(fit, sweeps)
    else:
        fit.measure_in(_with_common_outputs(forms))
        _fit_sharing_a_side(fit, sweeps, is_start=True)
        fit.measure_in(forms)
        objectives, bound = _alternate(fit, sweeps), None
    return TiedFit(
        fit.weight,
        torch.stack([lora_a for lora_a, _ in fit.loras]),
        torch.stack([lora_b for _, lora_b in fit.loras]),
        tuple(fit.errors()),
        tuple(form.square(original) for form, original in zip(forms, wide, strict=True)),
        tuple(objectives),
        bound,
    )


def fit_lora(
    residual: Tensor, rank: int, metric: Metric | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Fit a LoRA to one matrix: A [R, K] and B [N, R], fp64, that minimise tr(G E C E^T) of E = residual - B A.

    The rows of A are orthonormal and B's columns are orthogonal and hold the energy, largest first, whatever the
    metric: as `truncated_svd` gives them, so that every init starts training at the same scale of A.

    Args:
        residual: [N, K], finite.
        rank: R; capped at min(N, K).
        generator: of the unit rows of A beside columns of B that are zero, as in `truncated_svd`; default of seed 0.
    """
    wide = residual.double()
    (form,) = _forms([wide], None if metric is None else [metric])
    return _lora_step(wide, min(rank, *wide.shape), form, generator or torch.Generator().manual_seed(0))


def metric_norms(weights: Sequence[Tensor], metrics: Sequence[Metric]) -> tuple[float, ...]:
    """Compute tr(G_l W_l C_l W_l^T) of each weight [N, K], ridge included, in the units of `TiedFit.errors`."""
    wide = [weight.double() for weight in weights]
    return tuple(form.square(weight) for form, weight in zip(_forms(wide, metrics), wide, strict=True))


def singular_gains(weights: Sequence[Tensor], metrics: Sequence[Metric] | None = None) -> Tensor:
    """Compute how much each further unit of rank lowers the objective of `fit_tied`: [min(N, K)], never rising.

    Exact where `fit_tied` has a closed form; for two loops that differ on both sides, that of the closed form they
    start from. For other numbers of loops W' is the metric's mean at every rank.
    """
    wide = [weight.double() for weight in weights]
    forms = _with_common_outputs(_forms(wide, metrics))
    if len(wide) == 2:
        squares = squared_singular_values(_parallel(*forms).whiten(wide[0] - wide[1]))
        return F.pad(squares, (0, len(squares))).unflatten(0, (-1, 2)).sum(dim=1)
    mean = _mean(wide, _sum(forms), forms)
    gains = [squared_singular_values(form.whiten(w - mean)) for form, w in zip(forms, wide, strict=True)]
    return torch.stack(gains).sum(dim=0)


class _Side:
    """One side of a metric, mean diagonal 1 and ridge included, with its Cholesky factor."""

    def __init__(self, matrix: Tensor, factor: Tensor) -> None:
        self.matrix, self.factor = matrix, factor

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> "_Side":
        factor, failure = torch.linalg.cholesky_ex(matrix)
        if failure:
            # A sum in a narrow dtype may have eigenvalues below zero.
            values, vectors = torch.linalg.eigh(matrix)
            matrix = (vectors * values.clamp(min=RIDGE * float(matrix.diagonal().mean()))) @ vectors.T
            factor = torch.linalg.cholesky(matrix)
        return cls(matrix, factor)

    @classmethod
    def of_statistics(cls, matrix: Tensor) -> tuple[float, "_Side"]:
        """Return a metric's side as given: its mean diagonal, and its shape with the ridge."""
        matrix = matrix.double()
        size = float(matrix.diagonal().mean())
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        # Symmetric to the last bit. Nothing reached the loop at size 0.
        shape = (matrix + matrix.T) / (2.0 * size) if size > 0.0 else identity
        return max(size, 0.0), cls.of_matrix(shape + RIDGE * identity)

    def single(self) -> "_Side":
        return _Side(self.matrix.float(), self.factor.float())


@dataclass(frozen=True)
class _Form:
    """The quadratic form ``weight * tr(G E C E^T)``, which is ``weight * ||T^T E S||^2`` for S S^T = C, T T^T = G."""

    weight: float = 1.0
    inputs: _Side | None = None
    outputs: _Side | None = None

    def single(self, unit: float) -> "_Form":
        """Return the form in fp32, and in multiples of `unit`."""
        inputs, outputs = (None if side is None else side.single() for side in (self.inputs, self.outputs))
        return _Form(self.weight / unit, inputs, outputs)

    def square(self, error: Tensor) -> float:
        return float(self.whiten(error).square().sum())

    def whiten(self, error: Tensor) -> Tensor:
        """Map errors [N, K] to where their energy is the form's value."""
        error = error if self.weight == 1.0 else error * self.weight**0.5
        if self.inputs is not None:
            error = error @ self.inputs.factor
        return error if self.outputs is None else self.outputs.factor.T @ error

    def unwhiten(self, lora: _Lora) -> _Lora:
        """Map the factors of a whitened product back, and give them the form that `fit_lora` promises."""
        lora_a, lora_b = lora[0], lora[1] / self.weight**0.5
        if self.inputs is not None:
            lora_a = torch.linalg.solve_triangular(self.inputs.factor, lora_a, upper=False, left=False)
        if self.outputs is not None:
            lora_b = torch.linalg.solve_triangular(self.outputs.factor.T, lora_b, upper=True)
        is_plain = self.inputs is None and self.outputs is None
        return (lora_a, lora_b) if is_plain or not len(lora_a) else _balanced(lora_a, lora_b)

    def gradient(self, error: Tensor) -> Tensor:
        """Compute ``weight * G E C``, half the gradient."""
        error = error * self.weight
        if self.inputs is not None:
            error = error @ self.inputs.matrix
        return error if self.outputs is None else self.outputs.matrix @ error

    def solve(self, gradient: Tensor) -> Tensor:
        """Undo `gradient`."""
        gradient = gradient / self.weight
        if self.inputs is not None:
            gradient = torch.cholesky_solve(gradient.T, self.inputs.factor).T
        return gradient if self.outputs is None else torch.cholesky_solve(gradient, self.outputs.factor)


def _forms(weights: Sequence[Tensor], metrics: Sequence[Metric] | None) -> list[_Form]:
    if metrics is None:
        return [_Form()] * len(weights)
    assert len(metrics) == len(weights), (len(metrics), len(weights))

    def sides_of(matrices: list[Tensor | None], width: int) -> list[tuple[float | None, _Side | None]]:
        if all(matrix is None for matrix in matrices):
            return [(None, None)] * len(matrices)
        identity = torch.eye(width, dtype=torch.float64, device=weights[0].device)
        # One tensor of several loops stays one side, which is how `_sum` knows that they have it in common.
        sides: dict[int, tuple[float, _Side]] = {}
        for matrix in matrices:
            if id(matrix) not in sides:
                sides[id(matrix)] = _Side.of_statistics(identity if matrix is None else matrix)
        return [(None if matrix is None else sides[id(matrix)][0], sides[id(matrix)][1]) for matrix in matrices]

    outputs, inputs = weights[0].shape
    forms = []
    for (size_in, side_in), (size_out, side_out) in zip(
        sides_of([metric.inputs for metric in metrics], inputs),
        sides_of([metric.outputs for metric in metrics], outputs),
        strict=True,
    ):
        sizes = [size for size in (size_in, size_out) if size is not None] or [1.0]
        forms.append(_Form((sizes[0] * sizes[-1]) ** 0.5, side_in, side_out))
    # A loop that nothing reaches takes what the others leave free.
    least = _LEAST_WEIGHT * max(form.weight for form in forms) or 1.0
    return [replace(form, weight=max(form.weight, least)) for form in forms]


def _share_a_side(forms: Sequence[_Form]) -> bool:
    return len({form.inputs for form in forms}) == 1 or len({form.outputs for form in forms}) == 1


def _combined(
    forms: Sequence[_Form], of_weights: Callable[[list[float]], float], of_sides: Callable[[list[Tensor]], Tensor]
) -> _Form:
    """Combine forms that share a side; `of_sides` takes the other side's matrices, each times its form's weight."""
    first = forms[0]
    if any(form.inputs is not first.inputs for form in forms):
        return _Form(1.0, _Side.of_matrix(of_sides(_scaled(forms, "inputs"))), first.outputs)
    if any(form.outputs is not first.outputs for form in forms):
        return _Form(1.0, first.inputs, _Side.of_matrix(of_sides(_scaled(forms, "outputs"))))
    return _Form(of_weights([form.weight for form in forms]), first.inputs, first.outputs)


def _sum(forms: Sequence[_Form]) -> _Form:
    """Add forms that share a side."""
    return _combined(forms, sum, _total)


def _parallel(first: _Form, second: _Form) -> _Form:
    """Compute the parallel sum of two forms that share a side: ``min over Y of first(Y) + second(X - Y)``, of X."""
    return _combined((first, second), lambda weights: weights[0] * weights[1] / sum(weights), _parallel_sum)


def _parallel_sum(matrices: list[Tensor]) -> Tensor:
    """Compute ``(C_1^-1 + C_2^-1)^-1`` without a difference of large terms."""
    first, second = (torch.linalg.cholesky(matrix) for matrix in matrices)
    ratio = torch.linalg.solve_triangular(second, first, upper=False)
    identity = torch.eye(len(ratio), dtype=ratio.dtype, device=ratio.device)
    inner = torch.linalg.cholesky(identity + ratio.T @ ratio)
    factor = torch.linalg.solve_triangular(inner, first.T, upper=False)
    return factor.T @ factor


def _with_common_outputs(forms: list[_Form]) -> list[_Form]:
    """Give forms that share no side one G, their mean."""
    if _share_a_side(forms):
        return forms
    common = _mean_side(forms, "outputs")
    return [replace(form, outputs=common) for form in forms]


def _mean_side(forms: Sequence[_Form], name: Literal["inputs", "outputs"]) -> _Side:
    """Compute the mean of one side of all forms, each counting by its weight."""
    return _Side.of_matrix(_total(_scaled(forms, name)) / sum(form.weight for form in forms))


def _scaled(forms: Sequence[_Form], name: Literal["inputs", "outputs"]) -> list[Tensor]:
    """Return one side's matrices, each times its form's weight."""
    sides = [form.inputs if name == "inputs" else form.outputs for form in forms]
    return [form.weight * side.matrix for form, side in zip(forms, sides, strict=True) if side is not None]


def _mean(matrices: Sequence[Tensor], total: _Form, forms: Sequence[_Form]) -> Tensor:
    """Compute the matrix nearest to all of `matrices`, each in its form; `total` is the sum of the forms."""
    if len({(form.inputs, form.outputs) for form in forms}) == 1:
        return _total(form.weight / total.weight * matrix for form, matrix in zip(forms, matrices, strict=True))
    return total.solve(_total(form.gradient(matrix) for form, matrix in zip(forms, matrices, strict=True)))


class _Fit:
    """A fit in progress: one shared weight and a LoRA per loop, at first the first loop's weight and none.

    Attributes:
        weights, forms: W_l and their quadratic forms.
        weight: W'.
        loras: (A_l, B_l).
        remainders: W_l - B_l A_l.
    """

    def __init__(self, weights: list[Tensor], forms: list[_Form], rank: int, generator: torch.Generator) -> None:
        self.weights, self.forms, self.rank, self.generator = weights, forms, rank, generator
        self._errors: list[float] | None = None
        self.weight, self.remainders = weights[0], list(weights)
        nothing = weights[0].new_zeros(weights[0].shape[0], rank)
        self.loras: list[_Lora] = [(random_unit_rows(rank, weights[0], generator), nothing) for _ in weights]

    def measure_in(self, forms: list[_Form]) -> None:
        self.forms, self._errors = forms, None

    def set_weight(self, weight: Tensor) -> None:
        self.weight, self._errors = weight, None

    def set_lora(self, loop: int, lora: _Lora) -> None:
        self._errors = None
        self.loras[loop] = lora
        self.remainders[loop] = torch.addmm(self.weights[loop], lora[1], lora[0], alpha=-1.0)

    def fit_lora(self, loop: int, shared: Tensor, form: _Form) -> None:
        """Fit the LoRA of a loop to what `shared` leaves of its weight."""
        self.set_lora(loop, _lora_step(self.weights[loop] - shared, self.rank, form, self.generator))

    def fit_weight(self, total: _Form) -> None:
        """Fit W' to given LoRAs; `total` is the sum of the forms."""
        self.set_weight(_mean(self.remainders, total, self.forms))

    def errors(self) -> list[float]:
        if self._errors is None:
            pairs = zip(self.forms, self.remainders, strict=True)
            self._errors = [form.square(remainder - self.weight) for form, remainder in pairs]
        return self._errors


def _fit_sharing_a_side(fit: _Fit, sweeps: int, *, is_start: bool = False) -> tuple[list[float], float]:
    """Fit in forms that share a side, by the closed form for two loops, by elimination for more.

    Args:
        is_start: of a fit in other forms, so that nobody asks for the objectives and their bound.

    Returns:
        The objective at the start and after each sweep, and its bound.
    """
    forms, loops = fit.forms, range(len(fit.forms))
    total = _sum(forms)
    if len(forms) == 2:
        difference = fit.weights[0] - fit.weights[1]
        for loop, lora in enumerate(_fit_difference(difference, fit.rank, _parallel(*forms), fit.generator)):
            fit.set_lora(loop, lora)
        fit.fit_weight(total)
        objective = 0.0 if is_start else sum(fit.errors())
        return [objective], objective

    fit.fit_weight(total)
    for loop in loops:
        fit.fit_lora(loop, fit.weight, forms[loop])
    objectives = [] if is_start else [sum(fit.errors())]
    others = [[other for other in loops if other != loop] for loop in loops]
    sums = [_sum([forms[other] for other in rest]) for rest in others]
    eliminated = [_parallel(form, rest) for form, rest in zip(forms, sums, strict=True)]
    for _ in range(sweeps):
        for loop, rest in enumerate(others):
            mean = _mean([fit.remainders[other] for other in rest], sums[loop], [forms[other] for other in rest])
            fit.fit_lora(loop, mean, eliminated[loop])
        fit.fit_weight(total)
        if not is_start:
            objectives.append(sum(fit.errors()))
    return objectives, 0.0 if is_start else _bound(fit.weights, fit.rank, forms)


def _fit_difference(difference: Tensor, rank: int, form: _Form, generator: torch.Generator) -> list[_Lora]:
    """Fit two LoRAs whose difference is nearest to `difference`; its leading triplets go to them by turns."""
    rows, columns = truncated_svd(form.whiten(difference), min(2 * rank, *difference.shape), generator)
    loras = []
    for loop, sign in enumerate((1.0, -1.0)):
        lora_a, lora_b = rows[loop::2], sign * columns[:, loop::2]
        absent = rank - len(lora_a)
        lora_a = torch.cat((lora_a, random_unit_rows(absent, lora_a, generator)))
        loras.append(form.unwhiten((lora_a, F.pad(lora_b, (0, absent)))))
    return loras


def _alternate(fit: _Fit, sweeps: int) -> list[float]:
    """Improve a fit in forms that share no side: W' for given LoRAs, then every LoRA for that W'.

    Returns:
        The objective at the start and after each sweep.
    """
    objectives = [sum(fit.errors())]
    scale = _Form(1.0, _mean_side(fit.forms, "inputs"), _mean_side(fit.forms, "outputs"))
    for _ in range(sweeps):
        fit.set_weight(_descend(fit.weight, fit.remainders, fit.forms, scale))
        for loop, form in enumerate(fit.forms):
            fit.fit_lora(loop, fit.weight, form)
        objectives.append(sum(fit.errors()))
    return objectives


def _descend(weight: Tensor, targets: list[Tensor], forms: list[_Form], scale: _Form) -> Tensor:
    """Move W' towards the matrix nearest to all `targets`, by steps of conjugate gradients that `scale` preconditions.

    Every step lowers the objective, so that stopping early is safe. What is added to W' needs no more digits than fp32.
    """
    residual = _total(form.gradient(target - weight) for form, target in zip(forms, targets, strict=True))
    # In units in which fp32 has room.
    unit = sum(form.weight for form in forms)
    residual = (residual / unit).float()
    forms, scale = [form.single(unit) for form in forms], scale.single(1.0)
    moved = torch.zeros_like(residual)
    direction = scale.solve(residual)
    product = float((residual * direction).sum())
    enough = product * _GRADIENT_TOLERANCE**2
    for _ in range(_GRADIENT_STEPS):
        if product <= enough:
            break
        curved = _total(form.gradient(direction) for form in forms)
        step = product / float((direction * curved).sum())
        moved += step * direction
        residual -= step * curved
        solved = scale.solve(residual)
        before, product = product, float((residual * solved).sum())
        direction = solved + product / before * direction
    return weight + moved


def _bound(weights: list[Tensor], rank: int, forms: list[_Form]) -> float:
    """Bound the objective of forms that share a side from below, by the optima of all pairs of loops.

    Every loop is in B - 1 pairs, whence the factor. Of equal forms the pairs' differences alone, ``sum ||E_i - E_j||^2
    / B``, bound ``sum ||E_l||^2``, which is more.
    """
    pairs = 0.0
    for i, j in combinations(range(len(forms)), 2):
        pairs += float(
            squared_singular_values(_parallel(forms[i], forms[j]).whiten(weights[i] - weights[j]))[2 * rank :].sum()
        )
    equal = len({(form.weight, form.inputs, form.outputs) for form in forms}) == 1
    return pairs * (2.0 / len(forms) if equal else 1.0 / (len(forms) - 1))


def _total(matrices: Iterable[Tensor]) -> Tensor:
    """Add matrices without holding them all."""
    return reduce(torch.add, matrices)


def _lora_step(residual: Tensor, rank: int, form: _Form, generator: torch.Generator) -> _Lora:
    """Fit a LoRA to `residual` in `form`, exactly."""
    return form.unwhiten(truncated_svd(form.whiten(residual), rank, generator))


def _balanced(lora_a: Tensor, lora_b: Tensor) -> _Lora:
    """Rewrite ``B A`` as its own SVD, orthonormal rows in A, without forming the product; zero columns last."""
    basis, triangle = torch.linalg.qr(lora_a.T)
    columns = lora_b @ triangle.T
    rotation = leading_eigenvectors(columns.T @ columns, columns.shape[1])
    columns = columns @ rotation
    lengths = columns.norm(dim=0)
    columns[:, lengths <= _LEAST_COLUMN * lengths.max()] = 0.0
    return (basis @ rotation).T.contiguous(), columns
