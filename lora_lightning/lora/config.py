"""Settings of a LoRA adapter, which define what to adapt and how."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_lightning.errors import UserError, did_you_mean

from .layers.fused_parts import Part, parse_parts

ALL_LINEAR = "all-linear"
BIAS_MODES = ("none", "all", "lora_only")
PISSA = re.compile(r"pissa_niter_[1-9]\d*")
INITS = ("kaiming", "gaussian", "pissa", "olora", "eva", "loftq")


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
        _positive_int("lora.rank", self.rank)
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise UserError(f"lora.dropout must be a number in [0, 1), got {self.dropout!r}.")
        _choice("lora.bias", self.bias, BIAS_MODES)
        if not PISSA.fullmatch(str(self.init)):
            _choice("lora.init", self.init, INITS)
        if self.freeze_A and (self.starts_from_weight or self.init == "loftq"):
            raise UserError(
                f"lora.freeze_A trains B from zero on a random A, which lora.init={self.init} does "
                "not have: use lora.init=kaiming, or lora.freeze_A=false."
            )
        self.modules_to_save = _names(self.modules_to_save)
        self.target_parameters = _names(self.target_parameters)
        self._check_patterns()
        self._check_scaling()
        for name in ("modules_to_save", "layers_pattern", "target_parameters", "layers"):
            _list_of(f"lora.{name}", getattr(self, name), int if name == "layers" else str)
        self.targets = _patterns("lora.targets", self.targets)
        self.exclude = _patterns("lora.exclude", self.exclude)
        if not self.targets and not self.target_parameters:
            raise UserError("lora.targets is empty: give 'all-linear', module names or a regex.")
        self._check_plain()
        if self.layers is not None and not self.layers:
            raise UserError("lora.layers is empty: give layer indices, or null for all layers.")
        _token_indices(self.trainable_token_indices)
        if isinstance(self.layers_pattern, str):
            self.layers_pattern = [self.layers_pattern]
        for pattern in self.layers_pattern or []:
            _compiles("lora.layers_pattern", pattern)
        if self.layers_pattern and self.layers is None:
            raise UserError(
                "lora.layers_pattern says where lora.layers counts: give lora.layers too."
            )

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern", "parts"):
            if not isinstance(getattr(self, name), Mapping):
                raise UserError(
                    f"lora.{name} must hold values by name, got {getattr(self, name)!r}."
                )
        for name, rank in self.rank_pattern.items():
            _positive_int(f"lora.rank_pattern[{name!r}]", rank)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _compiles("lora.rank_pattern / lora.alpha_pattern", pattern)

    def _check_plain(self) -> None:
        """Raise UserError for settings that target_parameters or parts do not support."""
        variant = "use_dora=true" if self.use_dora else ""
        if self.init not in ("kaiming", "gaussian"):
            variant = f"init={self.init}"
        if self.init == "loftq" and self.use_dora:
            raise UserError(
                "lora.init=loftq brings the weights nearer to the unquantised ones, and "
                "lora.use_dora takes their magnitudes from the quantised: leave out one of them."
            )
        for pattern, value in self.parts.items():
            _compiles("lora.parts", pattern)
            parse_parts(f"lora.parts[{pattern!r}]", value)
        if self.parts and variant:
            raise UserError(
                f"lora.{variant} takes a fused layer as a whole, and lora.parts its parts: leave "
                "out one of them."
            )
        if self.dropout:
            variant = f"dropout={self.dropout:g}"
        if self.bias != "none":
            variant = f"bias={self.bias}"
        if self.target_parameters and variant:
            raise UserError(
                f"lora.target_parameters takes plain LoRA without dropout and biases, as in PEFT: "
                f"leave out lora.{variant}, or adapt linear layers alone (lora.targets)."
            )

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
        return replace(
            self,
            init="kaiming",
            rank=2 * self.rank,
            alpha=None if self.alpha is None else factor * self.alpha,
            alpha_ratio=self.alpha_ratio * (factor / 2 if self.alpha is None else 1),
            rank_pattern={name: 2 * rank for name, rank in self.rank_pattern.items()},
            alpha_pattern={name: factor * alpha for name, alpha in self.alpha_pattern.items()},
        )

    def _check_scaling(self) -> None:
        if self.alpha is not None:
            _positive("lora.alpha", self.alpha)
        _positive("lora.alpha_ratio", self.alpha_ratio)
        if not isinstance(self.eva_rho, (int, float)) or not 1 <= self.eva_rho < math.inf:
            raise UserError(f"lora.eva_rho must be a number of at least 1, got {self.eva_rho!r}.")
        if self.alpha is not None and self.alpha_ratio != LoraConfig.alpha_ratio:
            raise UserError(
                f"lora.alpha={self.alpha:g} and lora.alpha_ratio={self.alpha_ratio:g} both say how "
                "the update is scaled: leave out one of them."
            )
        if self.scale is not None:
            _positive("lora.scale", self.scale)
            others = {"alpha": None, "alpha_ratio": LoraConfig.alpha_ratio}
            for name, default in others.items():
                if getattr(self, name) != default:
                    raise UserError(
                        f"lora.scale={self.scale:g} and lora.{name}={getattr(self, name):g} both "
                        "say how the update is scaled: leave out one of them."
                    )
        for name, alpha in self.alpha_pattern.items():
            _positive(f"lora.alpha_pattern[{name!r}]", alpha)

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


def pattern_for(patterns: dict[str, Any], name: str) -> str | None:
    """Return the first key that matches the end of `name`, as in PEFT's rank_pattern."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def exact_pattern(pattern: str, name: str, others: Iterable[str]) -> str:
    """Return a key for `rank_pattern` that matches `name` and none of `others`.

    Args:
        pattern: the end of `name`. It is the key if it does not match any of the others.
        name: name of a module. It may be the end of another name, and ^ then distinguishes them.
        others: names of modules.
    """
    if not pattern_for({pattern: 0}, name):  # it contains regex metacharacters
        pattern = re.escape(pattern)
    if any(pattern_for({pattern: 0}, other) for other in others):
        return f"^{re.escape(name)}"
    return pattern


def exact_targets(names: Iterable[str]) -> str:
    """Return targets that match only these modules, as one regex.

    Other names that end in one of these names do not match.
    """
    return f"^({'|'.join(re.escape(name) for name in sorted(names))})$"


def _patterns(where: str, value: Any) -> str | list[str]:
    """Return a list of suffixes, or a string that is "all-linear" or a regex."""
    if value is None:
        return []
    if isinstance(value, str):
        # A name or comma-separated names, as typed on a command line.
        if value.lower() == ALL_LINEAR:
            return ALL_LINEAR
        if re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", value) and ".*" not in value:
            return [part.strip() for part in value.split(",")]
        _compiles(where, value)
        return value
    if isinstance(value, Sequence) and all(isinstance(item, str) and item for item in value):
        return list(value)
    raise UserError(f"{where} must be a string or a list of names, got {value!r}.")


def _names(value: Any) -> Any:
    """Return names as a list, from one name or comma-separated names of a command line."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [] if value is None else value


def _list_of(where: str, value: Any, kind: type) -> None:
    if value is None or (kind is str and isinstance(value, str) and value):
        return
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [None]
    if not all(
        isinstance(item, kind) and not isinstance(item, bool) and item != "" for item in items
    ):
        what = "names" if kind is str else "numbers"
        raise UserError(f"{where} must be a list of {what}, got {value!r}.")


def _token_indices(value: Any) -> None:
    """Raise UserError unless `value` is None, a list of distinct ids, or such lists by name."""
    if value is None:
        return
    for ids in value.values() if isinstance(value, dict) and value else [value]:
        numbers = isinstance(ids, list) and all(type(item) is int and item >= 0 for item in ids)
        if not (numbers and ids) or len(set(ids)) < len(ids):
            raise UserError(
                "lora.trainable_token_indices must be a list of token ids, each once, or lists "
                f"by names of modules, got {value!r}."
            )


def _compiles(where: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"{where}: {pattern!r} is not a valid regular expression: {error}."
        ) from None


def _positive_int(where: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where} must be a whole number of at least 1, got {value!r}.")


def _positive(where: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{where} must be a positive number, got {value!r}.")


def _choice(where: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        hint = did_you_mean(str(value), known)
        raise UserError(f"{where} must be one of {', '.join(known)}, got {value!r}.{hint}")
