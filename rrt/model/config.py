"""The two configurations of a checkpoint: the base architecture and how it is looped.

Both are frozen dataclasses read from JSON by :func:`rrt.common.schema.from_mapping`, which refuses unknown keys and
wrong types by name. The recipes of ``train/`` are read by the same function.
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rrt.common.schema import field_doc
from rrt.errors import UserError

# No real size comes near it, and sizes beyond it overflow in torch.
_LARGEST = 2**40

Family = Literal["gemma", "llama", "mistral", "qwen2", "qwen3", "gpt_neox"]
Init = Literal["stepwise", "stepwise-fixed-start", "average", "lower", "random"]
NormInit = Literal["folded", "average", "choice", "zero"]
LoraInit = Literal["svd", "zero", "joint", "calibrated", "low-rank-only"]
LoraGroup = Literal["q", "kv", "out", "ffn"]
Sharing = Literal["cycle", "sequence", "cycle-rev"]


def _require_positive(config: object, names: tuple[str, ...], prefix: str = "") -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 < value < _LARGEST:
            raise UserError(f"field '{prefix}{name}': found {value}; expected a positive number below {_LARGEST:.0e}")


@dataclass(frozen=True)
class RopeScaling:
    """Change of the rotary frequencies with which a base was trained further to longer contexts."""

    kind: Literal["linear", "llama3"] = field_doc("'linear' divides all frequencies, 'llama3' (Llama 3.1) the low ones")
    factor: float = field_doc("divisor of the frequencies")
    low_freq_factor: float | None = field_doc(
        "llama3: frequencies that turn fewer times than this within the original context are divided", default=None
    )
    high_freq_factor: float | None = field_doc(
        "llama3: those that turn more often than this are kept; between the two, a mean", default=None
    )
    original_max_position_embeddings: int | None = field_doc(
        "llama3: longest context before the change, tokens", default=None
    )

    def __post_init__(self) -> None:
        own = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        for name in own:
            if (getattr(self, name) is None) == (self.kind == "llama3"):
                expected = "a number" if self.kind == "llama3" else f"none for {self.kind}"
                raise UserError(f"field 'rope_scaling.{name}': found {getattr(self, name)}; expected {expected}")
        _require_positive(self, ("factor", *own) if self.kind == "llama3" else ("factor",), "rope_scaling.")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise UserError(f"field 'rope_scaling.high_freq_factor': found {high}; expected more than {low}")


@dataclass(frozen=True)
class ModelConfig:
    """The base architecture: everything that an unlooped layer stack needs."""

    family: Family = field_doc("architecture family, which decides the HF layout and the BOS rule")
    vocab_size: int = field_doc("rows of the embedding")
    hidden_size: int = field_doc("model width D")
    num_layers: int = field_doc("depth L: how many layers a token passes at full depth")
    num_heads: int = field_doc("query heads H")
    num_kv_heads: int = field_doc("key/value heads H_kv; H for MHA, 1 for MQA")
    head_dim: int = field_doc("width of one head D_h")
    intermediate_size: int = field_doc("width of the feed-forward layer")
    max_position_embeddings: int = field_doc("longest context the base was trained for, tokens")
    activation: Literal["silu", "gelu_tanh", "gelu"] = field_doc("feed-forward nonlinearity; 'gelu' is the erf form")
    gated_mlp: bool = field_doc("down(act(gate(x)) * up(x)) if true, down(act(up(x))) if false")
    norm_type: Literal["rmsnorm", "rmsnorm_1p", "layernorm"] = field_doc("'rmsnorm_1p' multiplies by (1 + weight)")
    norm_eps: float = field_doc("epsilon inside the norm's square root")
    rope_theta: float = field_doc("base of the rotary frequencies")
    rotary_fraction: float = field_doc("fraction of each head's dimensions that rotate")
    qkv_bias: bool = field_doc("biases on the query, key and value projections")
    out_bias: bool = field_doc("a bias on the attention output projection")
    mlp_bias: bool = field_doc("biases on the feed-forward linears")
    parallel_residual: bool = field_doc("attention and feed-forward both read the layer's input")
    tie_embeddings: bool = field_doc("the head is the embedding")
    scale_embeddings: bool = field_doc("embeddings are multiplied by sqrt(hidden_size)")
    bos_token_id: int | None = field_doc("begin-of-sequence token, if any", default=None)
    eos_token_ids: tuple[int, ...] = field_doc("end-of-sequence tokens; the first separates documents", default=())
    pad_token_id: int | None = field_doc("padding token, if any", default=None)
    qk_norm: bool = field_doc("a norm over each head's width on queries and keys, before they rotate", default=False)
    rope_scaling: RopeScaling | None = field_doc("change of the rotary frequencies, if any", default=None)
    sliding_window: int | None = field_doc(
        "tokens that a token sees in the base, itself included; contexts stay within it here", default=None
    )

    def __post_init__(self) -> None:
        sizes = "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size"
        _require_positive(self, (*sizes.split(), "max_position_embeddings", "norm_eps", "rope_theta"))
        if self.sliding_window is not None:
            _require_positive(self, ("sliding_window",))
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"field 'num_kv_heads': found {self.num_kv_heads}; expected a divisor of num_heads = {self.num_heads}"
            )
        if not 0 < self.rotary_fraction <= 1:
            raise UserError(f"field 'rotary_fraction': found {self.rotary_fraction}; expected a number in (0, 1]")
        if self.rotary_dim % 2:
            raise UserError(
                f"field 'rotary_fraction': {self.rotary_fraction} of head_dim {self.head_dim} is "
                f"{self.rotary_dim} dimensions; expected an even number"
            )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that rotate."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def context_length(self) -> int:
        """Longest context that the model computes as the base does, tokens."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


LORA_GROUPS: tuple[LoraGroup, ...] = typing.get_args(LoraGroup)
LORA_GROUP_OF_LINEAR: dict[str, LoraGroup] = {
    "attn.q": "q",
    "attn.k": "kv",
    "attn.v": "kv",
    "attn.out": "out",
    "mlp.gate": "ffn",
    "mlp.up": "ffn",
    "mlp.down": "ffn",
}


def linear_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return outputs N and inputs K of each linear of a layer, by names such as ``attn.q``."""
    hidden, inner = model.hidden_size, model.intermediate_size
    width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "attn.q": (width, hidden),
        "attn.k": (kv_width, hidden),
        "attn.v": (kv_width, hidden),
        "attn.out": (hidden, width),
        **({"mlp.gate": (inner, hidden)} if model.gated_mlp else {}),
        "mlp.up": (inner, hidden),
        "mlp.down": (hidden, inner),
    }


@dataclass(frozen=True)
class LoraRanks:
    """LoRA rank of each group of linears, or of single matrices; 0 means none.

    A group's rank is capped at min(in, out) of each of its linears. A matrix, one linear of one shared layer, has one
    rank for all loops.
    """

    q: int = field_doc("query projection", default=0)
    kv: int = field_doc("key and value projections, each", default=0)
    out: int = field_doc("attention output projection", default=0)
    ffn: int = field_doc("feed-forward linears, each", default=0)
    is_budget: bool = field_doc(
        "the groups' ranks are a budget: conversion distributes their parameters over the matrices", default=False
    )
    matrices: Mapping[str, int] = field_doc(
        "ranks of single matrices in place of their group's, by names such as layers.0.attn.q",
        default_factory=dict,
        hash=False,
    )

    def __post_init__(self) -> None:
        groups = {group: getattr(self, group) for group in LORA_GROUPS}
        for name, rank in (groups | {f"matrices.{name}": rank for name, rank in self.matrices.items()}).items():
            if rank < 0:
                raise UserError(f"field 'lora_rank.{name}': found {rank}; expected 0 (no LoRA) or more")

    @classmethod
    def uniform(cls, rank: int, *, is_budget: bool = False) -> "LoraRanks":
        return cls(q=rank, kv=rank, out=rank, ffn=rank, is_budget=is_budget)

    def of(self, model: ModelConfig, layer: int, linear: str) -> int:
        """Return the rank of one matrix: a linear such as ``attn.q`` of a shared layer."""
        group_rank: int = getattr(self, LORA_GROUP_OF_LINEAR[linear])
        return self.matrices.get(f"layers.{layer}.{linear}", min(group_rank, *linear_shapes(model)[linear]))

    def check_matrices(self, model: ModelConfig, layers: int) -> None:
        """Check the ranks of single matrices for a block of so many shared layers.

        Raises:
            UserError: a name that the block does not have, or a rank beyond the matrix's smaller side.
        """
        shapes = linear_shapes(model)
        names = {f"layers.{layer}.{linear}": shape for layer in range(layers) for linear, shape in shapes.items()}
        for name, rank in self.matrices.items():
            if name not in names:
                expected = f"layers.K.LINEAR with K in [0, {layers}) and LINEAR one of {', '.join(shapes)}"
                raise UserError(f"field 'lora_rank.matrices': found {name!r}; expected {expected}")
            if rank > min(names[name]):
                sides = " x ".join(map(str, names[name]))
                raise UserError(
                    f"field 'lora_rank.matrices.{name}': found {rank}; expected at most {min(names[name])}, the "
                    f"smaller side of {sides}"
                )

    def __bool__(self) -> bool:
        return any((self.q, self.kv, self.out, self.ffn, *self.matrices.values()))

    def __str__(self) -> str:
        groups = f"q {self.q}, kv {self.kv}, out {self.out}, ffn {self.ffn}"
        text = str(self.q) if self.q == self.kv == self.out == self.ffn else groups
        if self.is_budget:
            text = f"budget {text}"
        if not self.matrices:
            return text
        ranks = self.matrices.values()
        return f"{text}, {len(ranks)} matrices {min(ranks)} to {max(ranks)}"


class Place(NamedTuple):
    """Shared layer that a depth runs, and at which of its loops."""

    loop: int
    layer: int


@dataclass(frozen=True)
class RecursiveConfig:
    """Folding of L layers into one block of K = L/B shared ones, and its relaxation (arXiv 2410.20672, section 2).

    The default is a vanilla model: one loop, nothing relaxed.
    """

    num_loops: int = field_doc("loops B over the shared block; 1 is a vanilla model", default=1)
    sharing: Sharing = field_doc(
        "depth l runs shared layer l mod K (cycle), that with every second loop backwards (cycle-rev), or l // B "
        "(sequence: a layer's loops follow each other)",
        default="cycle",
    )
    init: Init = field_doc("how the shared block is made from the base's layers", default="stepwise")
    norm_init: NormInit = field_doc(
        "tied norms: neutral, their gains folded into the linears; or under init 'average' the mean, one layer's, or "
        "zero, under the others the kept layer's",
        default="folded",
    )
    lora_rank: LoraRanks = field_doc("rank per group of linears, one LoRA per depth", default=LoraRanks())
    lora_init: LoraInit = field_doc(
        "LoRA from the SVD of what tying lost, zero, or shared weights and LoRAs together: joint, the nearest to the "
        "base's weights, or calibrated, the nearest in what they do to a text; or of the whole weight (low-rank-only)",
        default="svd",
    )
    low_rank_only: bool = field_doc(
        "nothing is shared: linears of rank R > 0 are B A without a weight beside it", default=False
    )
    untie_norms: bool = field_doc("norms and biases of the block's layers per depth", default=False)
    prefix_length: int = field_doc("trainable prefix vectors per depth", default=0)
    exit_loops: tuple[int, ...] = field_doc(
        "loops (from 0) before the last that were trained, or fitted, to exit", default=()
    )
    head_lora_rank: int = field_doc("rank of the LoRAs on the head, one for each loop before the last", default=0)
    exit_translators: bool = field_doc(
        "each loop before the last exits through an affine map that predicts the last loop's normalised state",
        default=False,
    )

    def __post_init__(self) -> None:
        _require_positive(self, ("num_loops",))
        for name in ("prefix_length", "head_lora_rank"):
            if not 0 <= getattr(self, name) < _LARGEST:
                raise UserError(
                    f"field '{name}': found {getattr(self, name)}; expected 0 or more, below {_LARGEST:.0e}"
                )
        if self.head_lora_rank and self.num_loops == 1:
            raise UserError(f"field 'head_lora_rank': found {self.head_lora_rank}; expected 0 for num_loops = 1")
        if self.exit_translators and self.num_loops == 1:
            raise UserError("field 'exit_translators': found true; expected false for num_loops = 1")
        for loop in self.exit_loops:
            if not 0 <= loop < self.num_loops - 1:
                raise UserError(f"field 'exit_loops': found {loop}; expected loops in [0, {self.num_loops - 1})")
        if self.low_rank_only and self.num_loops > 1:
            raise UserError(f"field 'num_loops': found {self.num_loops}; expected 1 with low_rank_only")
        if not self.runs_whole_loops:
            for name in ("exit_loops", "head_lora_rank", "exit_translators"):
                if getattr(self, name):
                    self.require_whole_loops(f"field '{name}': found {getattr(self, name)}")

    @property
    def is_relaxed(self) -> bool:
        """True if any parameter besides norms and biases differs between depths."""
        return bool(self.lora_rank) or self.prefix_length > 0

    @property
    def runs_whole_loops(self) -> bool:
        """True if one loop ends before the next begins, so that there is a state between them to exit from."""
        return self.sharing != "sequence" or self.num_loops == 1

    def require_whole_loops(self, found: str) -> None:
        """Raise `UserError`, which begins with `found`, if the model does not run whole loops."""
        if not self.runs_whole_loops:
            raise UserError(
                f"{found} with sharing 'sequence', which has no state between loops; expected sharing 'cycle' or "
                "'cycle-rev' for exits"
            )

    def places(self, model: ModelConfig) -> tuple[Place, ...]:
        """Return what each of the L depths runs. Raises `UserError` as `layers_per_loop` does."""
        layers = self.layers_per_loop(model)
        if self.sharing == "sequence":
            return tuple(Place(depth % self.num_loops, depth // self.num_loops) for depth in range(model.num_layers))
        places = [Place(depth // layers, depth % layers) for depth in range(model.num_layers)]
        if self.sharing == "cycle-rev":
            places = [Place(loop, layers - 1 - layer if loop % 2 else layer) for loop, layer in places]
        return tuple(places)

    def layers_per_loop(self, model: ModelConfig) -> int:
        """Return K = L/B. Raises `UserError` if B does not divide L."""
        if model.num_layers % self.num_loops:
            divisors = [n for n in range(1, model.num_layers + 1) if model.num_layers % n == 0]
            raise UserError(
                f"field 'num_loops': found {self.num_loops}, which does not divide the base's "
                f"{model.num_layers} layers; expected one of {', '.join(map(str, divisors))}"
            )
        return model.num_layers // self.num_loops

    def check_fits(self, model: ModelConfig) -> None:
        """Check what depends on the base.

        Raises:
            UserError: B does not divide L, or a matrix's rank is not possible.
        """
        self.lora_rank.check_matrices(model, self.layers_per_loop(model))
