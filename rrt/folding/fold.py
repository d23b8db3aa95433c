"""Initialisation of K shared layers and a LoRA per depth from L pretrained layers (arXiv 2410.20672, section 2).

:class:`Folding` makes one tensor of the new model at a time from the base's files; it keeps none.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rrt.checkpoint.source import Source
from rrt.common.dtypes import dtype_name
from rrt.errors import UserError
from rrt.folding.svd import squared_singular_values, truncated_svd
from rrt.folding.tying import fit_lora, fit_tied, singular_gains
from rrt.folding.views import FoldedNorms, read_finite
from rrt.model.config import Init, Place, RecursiveConfig

_RANDOM_STD = 0.02


def kept_depths(init: Init, num_layers: int, num_kept: int) -> tuple[int, ...]:
    """Return the base layer, from 0, that each of K kept layers copies; for the inits that copy whole layers.

    "stepwise" spaces them evenly from the first layer to the last; "stepwise-fixed-start" evenly from the
    first, so that the last loop's final layer may go; "lower" takes the first K.
    """
    if init == "stepwise":
        return tuple(round(i * (num_layers - 1) / (num_kept - 1)) if num_kept > 1 else 0 for i in range(num_kept))
    if init == "stepwise-fixed-start":
        return tuple(i * (num_layers // num_kept) for i in range(num_kept))
    assert init == "lower", init
    return tuple(range(num_kept))


def folds_norms(recursion: RecursiveConfig) -> bool:
    """Decide whether the norms' gains move into the linears before anything else is computed from them."""
    if recursion.lora_init == "calibrated":  # norms that are kept per depth start neutral then
        return True
    ties_norms = recursion.num_loops > 1 and not recursion.untie_norms
    # B A then spends its rank where the linear reads, though no norm is tied.
    return (ties_norms or recursion.low_rank_only) and recursion.norm_init == "folded" and recursion.init != "random"


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """Make a generator for one tensor, whose values then depend on `seed` and `name` alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class VectorReport:
    """Loss of one tied norm or bias by tying, per loop; no LoRA restores any of it.

    Attributes:
        name: of the parameter, such as ``stack.layers.0.attn_norm.weight``.
        tying_loss: ||v_l - v'||^2 / ||v_l||^2, of the gains 1 + w for Gemma's norms; 1 if v_l is zero and v' is not.
    """

    name: str
    tying_loss: tuple[float, ...]

    @property
    def mean_tying_loss(self) -> float:
        return sum(self.tying_loss) / len(self.tying_loss)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "tying_loss": self.tying_loss, "mean_tying_loss": self.mean_tying_loss}


@dataclass(frozen=True)
class MatrixReport:
    """Energy that one linear loses by tying, and what is left of the loss with its LoRA, per loop.

    Attributes:
        name: of the linear, such as ``stack.layers.0.attn.q``.
        rank: of its LoRA after the cap.
        norms: ||W_l||^2.
        tying_loss: ||W_l - W'||^2 / ||W_l||^2; 1 if W_l is zero and W' is not, or where there is no W'. W_l has its
            norm's gain folded in, as W' has.
        final_loss: ||W_l - W' - B A||^2 / ||W_l||^2 at initialisation.
        least_loss: no W' and LoRAs of this rank lose a smaller share of the sum of ||W_l||^2; None where it is unknown.
    """

    name: str
    rank: int
    norms: tuple[float, ...]
    tying_loss: tuple[float, ...]
    final_loss: tuple[float, ...]
    least_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "rank": self.rank,
            "norms": self.norms,
            "tying_loss": self.tying_loss,
            "final_loss": self.final_loss,
            "least_loss": self.least_loss,
        }


@dataclass(frozen=True)
class TiedLinear:
    """One linear of the shared block as stored: W' [N, K], and the LoRAs A [B, R, K] and B [B, N, R] of all loops.

    No weight where B A stands alone.
    """

    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    report: MatrixReport


class Folding:
    """Maker of the shared block and LoRAs of `recursion` from a vanilla `source`, tensor by tensor.

    Every tensor has `dtype`. Names are those of a layer's parameters: ``attn.q.weight``.
    """

    def __init__(self, source: Source, recursion: RecursiveConfig, dtype: torch.dtype, seed: int) -> None:
        self.source = FoldedNorms(source) if folds_norms(recursion) else source
        self.recursion, self.dtype, self.seed = recursion, dtype, seed
        self._depths = {place: depth for depth, place in enumerate(recursion.places(source.model))}
        self._kept: tuple[int, ...] = ()
        if recursion.init not in ("average", "random"):
            num_kept = recursion.layers_per_loop(source.model)
            self._kept = kept_depths(recursion.init, source.model.num_layers, num_kept)

    def unlooped(self, name: str) -> Tensor:
        """Return a parameter outside the block (embedding, final norm, head), unchanged."""
        return self._stored(self._read(name), name)

    def prefix(self, shape: tuple[int, ...]) -> Tensor:
        """Draw prefix vectors [L, P, D], about as large as embeddings: the paper does not say how it draws them."""
        return self._stored(
            torch.randn(shape, generator=seeded_generator(self.seed, "stack.prefix")) * _RANDOM_STD, "stack.prefix"
        )

    def shared(self, layer: int, name: str) -> Tensor:
        """Make the tied parameter `name` of shared layer `layer`."""
        target = f"stack.layers.{layer}.{name}"
        return self._stored(self._shared(layer, name, target), target)

    def vector_report(self, layer: int, name: str, shared: Tensor) -> VectorReport:
        """Measure what tying lost of the norm or bias `name`, for its tied value as stored."""
        losses = []
        offset = 1.0 if name.endswith("norm.weight") and self.source.model.norm_type == "rmsnorm_1p" else 0.0
        for loop in range(self.recursion.num_loops):
            vector = self._base(layer, loop, name)
            lost = energy_lost(vector, shared)
            losses.append(lost / ((vector.double() + offset).square().sum().item() or lost) if lost else 0.0)
        return VectorReport(f"stack.layers.{layer}.{name}", tuple(losses))

    def untied(self, layer: int, name: str) -> Tensor:
        """Stack a norm or bias of the base over the loops: [B, ...]."""
        per_loop = [self._base(layer, loop, name) for loop in range(self.recursion.num_loops)]
        return self._stored(torch.stack(per_loop), f"stack.layers.{layer}.{name}")

    def linear(self, layer: int, linear: str, rank: int) -> TiedLinear:
        """Make the tied weight and the LoRAs of one linear.

        Args:
            linear: such as ``attn.q``.
            rank: R, at most min(N, K); 0 only measures what tying lost.
        """
        name = f"stack.layers.{layer}.{linear}"
        weights = [self._base(layer, loop, f"{linear}.weight") for loop in range(self.recursion.num_loops)]
        least_loss, weight = None, None
        if self.recursion.low_rank_only and rank:
            assert len(weights) == 1
            lora_a, lora_b = fit_lora(weights[0], rank, generator=seeded_generator(self.seed, f"{name}.lora.0"))
            loras, lost = [(lora_a, lora_b)], [weights[0].double().square().sum().item()]
            left = [(weights[0].double() - lora_b @ lora_a).square().sum().item()]
        elif self.recursion.lora_init == "joint" and rank:
            fit = fit_tied(weights, rank, generator=seeded_generator(self.seed, f"{name}.lora"))
            weight = self._stored(fit.weight, f"{name}.weight")
            loras = list(zip(fit.lora_a, fit.lora_b, strict=True))
            lost, left = [energy_lost(original, weight) for original in weights], list(fit.errors)
            if fit.bound is not None:
                least_loss = fit.bound / (sum(fit.norms) or 1.0)
        else:
            weight = self._stored(self._shared(layer, f"{linear}.weight", f"{name}.weight"), f"{name}.weight")
            lost, left, loras = [], [], []
            for loop, original in enumerate(weights):
                lora, energies = self._correction(original, weight, rank, f"{name}.lora.{loop}")
                loras.append(lora)
                lost.append(energies[0])
                left.append(energies[1])
        return TiedLinear(
            weight,
            torch.stack([self._stored(lora_a, f"{name}.lora_a") for lora_a, _ in loras]),
            torch.stack([self._stored(lora_b, f"{name}.lora_b") for _, lora_b in loras]),
            matrix_report(name, rank, weights, lost, left, least_loss),
        )

    def _correction(
        self, original: Tensor, shared: Tensor, rank: int, seed_name: str
    ) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
        """Make the LoRA of one loop beside W' as stored; return also the energy lost without and with it."""
        generator = seeded_generator(self.seed, seed_name)
        lost = energy_lost(original, shared)
        if lost == 0.0 or self.recursion.lora_init == "zero" or rank == 0:
            lora_a = torch.randn(rank, shared.shape[1], generator=generator) / math.sqrt(shared.shape[1])
            return (lora_a, torch.zeros(shared.shape[0], rank)), (lost, lost)
        lora_a, lora_b = truncated_svd(original.double() - shared.double(), rank, generator)
        # The rows of A are orthonormal wherever B is not zero, so B alone holds the energy.
        return (lora_a, lora_b), (lost, max(lost - lora_b.square().sum().item(), 0.0))

    def gains(self, layer: int, linear: str) -> list[float]:
        """Compute what each unit of rank saves of a matrix's error: min(N, K) numbers, none larger than the one before.

        The error is sum_l ||W_l - W' - B_l A_l||^2 / sum_l ||W_l||^2: a share, as weights say nothing about the size of
        a linear's inputs, and folded gains make some linears much smaller than others.
        """
        weights = [self._base(layer, loop, f"{linear}.weight").double() for loop in range(self.recursion.num_loops)]
        if self.recursion.lora_init == "joint":
            saved = singular_gains(weights)
        else:
            shared = self.shared(layer, f"{linear}.weight").double()
            saved = torch.stack([squared_singular_values(weight - shared) for weight in weights]).sum(dim=0)
        energy = sum(float(weight.square().sum()) for weight in weights)
        return (saved / (energy or 1.0)).tolist()

    def _shared(self, layer: int, name: str, target: str) -> Tensor:
        init, is_norm = self.recursion.init, "norm" in name
        if init == "random":
            return self._random(layer, name, target)
        if init != "average":
            return self._read(f"stack.layers.{self._kept[layer]}.{name}")
        if is_norm and self.recursion.norm_init == "choice":
            return self._base(layer, 0, name)
        if is_norm and self.recursion.norm_init == "zero":
            return torch.zeros_like(self._base(layer, 0, name))
        total = self._base(layer, 0, name).double()
        for loop in range(1, self.recursion.num_loops):
            total += self._base(layer, loop, name)
        return total / self.recursion.num_loops

    def _random(self, layer: int, name: str, target: str) -> Tensor:
        shape = self._base(layer, 0, name).shape
        if name.endswith("bias"):
            return torch.zeros(shape)
        if "norm" in name:
            return torch.full(shape, 0.0 if self.source.model.norm_type == "rmsnorm_1p" else 1.0)
        return torch.randn(shape, generator=seeded_generator(self.seed, target)) * _RANDOM_STD

    def _base(self, layer: int, loop: int, name: str) -> Tensor:
        return self._read(f"stack.layers.{self._depths[Place(loop, layer)]}.{name}")

    def _read(self, name: str) -> Tensor:
        return read_finite(self.source, name)

    def _stored(self, tensor: Tensor, name: str) -> Tensor:
        stored = tensor.to(self.dtype)
        if not stored.isfinite().all():
            raise UserError(
                f"{self.source.directory}: tensor '{name}': found {tensor.abs().max().item():.3g}; expected at most "
                f"{torch.finfo(self.dtype).max:.3g} for {dtype_name(self.dtype)}: choose another --dtype"
            )
        return stored


def matrix_report(
    name: str,
    rank: int,
    weights: Sequence[Tensor],
    lost: Sequence[float],
    left: Sequence[float],
    least_loss: float | None = None,
) -> MatrixReport:
    """Make the report of a linear from the energies lost at each loop, without and with its LoRA."""
    norms = [float(weight.double().square().sum()) for weight in weights]

    def shares(energies: Sequence[float]) -> tuple[float, ...]:
        return tuple(energy / (norm or energy or 1.0) for energy, norm in zip(energies, norms, strict=True))

    return MatrixReport(name, rank, tuple(norms), shares(lost), shares(left), least_loss)


def energy_lost(original: Tensor, stored: Tensor) -> float:
    """Compute ||W_l - W'||^2; what only the cast to a narrower dtype lost is nothing to learn from, and none."""
    if torch.equal(original.to(stored.dtype), stored):
        return 0.0
    return (original.double() - stored.double()).square().sum().item()
