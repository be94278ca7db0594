"""Settings of a LoRA adapter, which define what to adapt and how."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from .config_checks import check_config
from .layers.fused_parts import Part, parse_parts
from .name_patterns import ALL_LINEAR, parse_names, parse_patterns, pattern_for


@dataclass
class LoraConfig:
    """Settings of a LoRA adapter (Hu et al. 2021, arXiv:2106.09685).

    Names and matching rules are PEFT's, so that an adapter saved here means the same in PEFT.

    Raises:
        UserError: a value is out of range. The message names the field.
    """

    rank: int = 8
    """Rank r, the inner width of the update B A."""
    alpha: float | None = None
    """Numerator of the scaling.

    None means `alpha_ratio * rank`, also for ranks in `rank_pattern`.
    """
    alpha_ratio: float = 2.0
    """Ratio alpha / rank if alpha is not given."""
    scale: float | None = None
    """The scaling itself, as an alternative to alpha.

    Alpha is then scale * rank, or scale * sqrt(rank) with rsLoRA. No rank and no scaling rule
    then changes the size of the update.
    """
    dropout: float = 0.0
    """Probability of dropping an input of A during training."""
    targets: Any = ALL_LINEAR
    """"all-linear" (heads excluded), a list of name suffixes, or one regex for the whole name."""
    exclude: Any = field(default_factory=list)
    """Modules to leave out, as a list of name suffixes or one regex for the whole name."""
    target_parameters: list[str] = field(default_factory=list)
    """Further parameters to adapt, by name suffix.

    Examples are the weights of all experts in one tensor (mlp.experts.gate_up_proj) and the weight
    of a router (mlp.gate.weight). As in PEFT, `exclude` and `layers` do not apply to them.
    """
    parts: dict[str, Any] = field(default_factory=dict)
    """Fused layers, by name suffix or regex, whose parts are adapted separately.

    A value lists the part names in row order, for example [q, -k, v]. A minus leaves a part as it
    is. A value may also map names to sizes, {q: 64, k: 32, v: 32}. Parts are contiguous rows of
    the weight (out, in).
    """
    layers: list[int] | None = None
    """Layer indices to adapt, or None for all.

    The index is the first number in a module's name.
    """
    layers_pattern: Any = None
    """Name or names of the module list that `layers` indexes, e.g. "layers", or None for any."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank by name suffix or regex, which overrides `rank`."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alpha by name suffix or regex, which overrides `alpha`."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732) instead of alpha / r."""
    bias: str = "none"
    """Train no bias ("none"), every bias ("all"), or biases of adapted modules ("lora_only")."""
    modules_to_save: list[str] = field(default_factory=list)
    """Further modules, by name suffix, trained whole and stored with the adapter."""
    trainable_token_indices: Any = None
    """Tokens whose rows are trained, in PEFT's format.

    A list of ids applies to the input embedding and the layers tied to it. Lists by name are
    possible too, {embed_tokens: [7], lm_head: [7]}. For new tokens see `model.new_tokens`.
    """
    init: str = "kaiming"
    """Initial values of A and B.

    * "kaiming" (uniform) and "gaussian" (std 1/r) draw A, and B starts at zero.
    * "pissa" ("pissa_niter_4" is faster) and "olora" take both from the weight, see `svd.py`. Such
      an adapter is stored as plain LoRA of twice the rank.
    * "eva" takes A and each layer's rank from the training data, see `eva.py`.
    * "loftq" takes both from the quantization error, see `loftq.py`.
    """
    eva_rho: float = 2.0
    """Upper limit of a layer's rank with init="eva", as a multiple of `rank`.

    The total of all ranks stays the same. With 1 each layer keeps its rank.
    """
    use_dora: bool = False
    """Train the weights' magnitudes too (DoRA, Liu et al. 2024, arXiv:2402.09353)."""
    freeze_A: bool = False
    """Train only B (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).

    A keeps its random initial values, and no layer has to save its input. In an embedding B is
    random, so A is trained instead.
    """

    def __post_init__(self) -> None:
        self.targets = parse_patterns(self.targets)
        self.exclude = parse_patterns(self.exclude)
        self.modules_to_save = parse_names(self.modules_to_save)
        self.target_parameters = parse_names(self.target_parameters)
        if isinstance(self.layers_pattern, str):
            self.layers_pattern = [self.layers_pattern]
        check_config(self)

    def parts_of(self, name: str) -> tuple[Part, ...] | None:
        """Return the parts of the fused layer `name`, or None if it is adapted as a whole."""
        key = pattern_for(self.parts, name)
        return None if key is None else parse_parts(f"lora.parts[{key!r}]", self.parts[key])

    @property
    def starts_from_weight(self) -> bool:
        """Whether A and B start from parts of the base weight."""
        return self.init not in ("kaiming", "gaussian", "eva", "loftq")

    def exported(self) -> LoraConfig:
        """Return the settings under which the adapter is stored as plain LoRA."""
        if not self.starts_from_weight:
            return self
        factor = math.sqrt(2) if self.use_rslora else 2.0  # factor of alpha that keeps the scaling
        by_ratio = self.alpha is None and self.scale is None
        return replace(
            self,
            init="kaiming",
            rank=2 * self.rank,
            alpha=None if self.alpha is None else factor * self.alpha,
            alpha_ratio=self.alpha_ratio * (factor / 2 if by_ratio else 1),
            rank_pattern={name: 2 * rank for name, rank in self.rank_pattern.items()},
            alpha_pattern={name: factor * alpha for name, alpha in self.alpha_pattern.items()},
        )

    def rank_of(self, name: str) -> int:
        """Return the rank of the module `name`."""
        key = pattern_for(self.rank_pattern, name)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, name: str) -> float:
        """Return alpha of the module `name`."""
        key = pattern_for(self.alpha_pattern, name)
        if key is not None:
            return float(self.alpha_pattern[key])
        return self.default_alpha(self.rank_of(name))

    def default_alpha(self, rank: int) -> float:
        """Return alpha of modules of this rank that `alpha_pattern` does not match."""
        if self.scale is not None:
            return float(self.scale * self.divisor(rank))
        return float(self.alpha_ratio * rank if self.alpha is None else self.alpha)

    def scaling_of(self, name: str) -> float:
        """Return s in W + s B A, which is alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.alpha_of(name) / self.divisor(self.rank_of(name))

    def divisor(self, rank: int) -> float:
        """Return the divisor of alpha in the scaling, which is r, or sqrt(r) with rsLoRA."""
        return math.sqrt(rank) if self.use_rslora else rank
