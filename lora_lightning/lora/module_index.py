"""Index of a model's modules, and their selection by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from functools import cached_property

from torch import nn

from lora_lightning.errors import UserError, did_you_mean

from .layers.embedding import LoraEmbedding
from .layers.factory import lora_class_for
from .name_patterns import ALL_LINEAR, ends_with, matches, suffixes
from .reachability import BEHIND, read_behind, skip_reasons


class ModuleIndex:
    """Names of a bare model's modules, collected once.

    A module that a model holds under several names is known by the first of them.

    Args:
        model: the bare model.
        saved: names or suffixes of the modules to train whole. Empty by default.

    Attributes:
        modules: modules by all their names.
        aliases: all names of each module by its first name, in the model's order.
        saved: names of the modules to train whole.

    Raises:
        UserError: a name in `saved` matches nothing, or PEFT would confuse another module with it.
    """

    def __init__(self, model: nn.Module, saved: Iterable[str] = ()) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.aliases: dict[str, list[str]] = {}
        self._first: dict[nn.Module, str] = {}
        for name, module in self.modules.items():
            self.aliases.setdefault(self._first.setdefault(module, name), []).append(name)
        self.saved = self._outermost(saved)

    @cached_property
    def adaptable(self) -> dict[str, list[str]]:
        """All names of each layer that LoRA can wrap, by its first name."""
        return {
            name: aliases
            for name, aliases in self.aliases.items()
            if name and lora_class_for(self.modules[name]) is not None
            if self.behind.isdisjoint(aliases)
        }

    @cached_property
    def layers(self) -> dict[str, list[str]]:
        """The adaptable layers that are not trained whole."""
        saved = self.below(self.saved)
        return {n: aliases for n, aliases in self.adaptable.items() if saved.isdisjoint(aliases)}

    @cached_property
    def linear(self) -> set[str]:
        """Names of the layers that `all-linear` selects."""
        outside = self.below(self.heads).union(self.skipped)
        return {
            name
            for name, aliases in self.layers.items()
            if not self._is_embedding(name) and outside.isdisjoint(aliases)
        }

    @cached_property
    def skipped(self) -> dict[str, str]:
        """Names of the linear layers that `all-linear` leaves out, with the reason.

        Task heads are not included.
        """
        reasons = skip_reasons(self.model, self.heads)
        heads = self.below(self.heads)
        return {
            alias: reasons[alias]
            for name, aliases in self.adaptable.items()
            if not self._is_embedding(name) and name not in heads
            for alias in aliases
            if alias in reasons
        }

    @cached_property
    def heads(self) -> list[str]:
        """Names of the task heads."""
        return head_modules(self.model)

    @cached_property
    def behind(self) -> set[str]:
        """Names of the layers whose weights are read without calling them."""
        return read_behind(self.modules)

    @cached_property
    def suffixes(self) -> dict[str, set[str]]:
        """Names of the layers by every dotted suffix of any of their names."""
        by_suffix: dict[str, set[str]] = {}
        for name, aliases in self.layers.items():
            for suffix in suffixes(aliases):
                by_suffix.setdefault(suffix, set()).add(name)
        return by_suffix

    def select(self, patterns: str | list[str], *, setting: str = "") -> set[str]:
        """Return the names of the layers that any of the patterns matches.

        Args:
            patterns: "all-linear", a regex, or a list of name suffixes.
            setting: the setting whose patterns must all match a layer. Empty by default, which
                accepts patterns without a match.

        Raises:
            UserError: a pattern of the setting matches no layer.
        """
        if patterns == ALL_LINEAR:
            return self.linear
        if isinstance(patterns, str):
            hits = {
                name
                for name, aliases in self.layers.items()
                if any(matches(alias, patterns) for alias in aliases)
            }
            selected = {patterns: hits}
        else:
            selected = {pattern: self.suffixes.get(pattern, set()) for pattern in patterns}
        for pattern, names in selected.items():
            if setting and not names:
                raise self._no_layer(setting, pattern, isinstance(patterns, str))
        return {name for names in selected.values() for name in names}

    def below(self, names: Iterable[str]) -> set[str]:
        """Return all names of these modules and the modules below them."""
        inside = {module for name in names for module in self.modules[name].modules()}
        return {alias for module in inside for alias in self.aliases[self._first[module]]}

    def _is_embedding(self, name: str) -> bool:
        return lora_class_for(self.modules[name]) is LoraEmbedding

    def _outermost(self, patterns: Iterable[str]) -> list[str]:
        """Return the names of modules that match `patterns`, without modules inside another."""
        names = [name for name in self.aliases if name]
        chosen: dict[str, None] = {}
        for pattern in patterns:
            hits = [name for name in names if ends_with(name, pattern)]
            if not hits:
                raise no_match("lora.modules_to_save", pattern, names)
            chosen.update(dict.fromkeys(hits))
        inside = tuple(f"{name}." for name in chosen)
        for name in chosen:
            # PEFT 0.21 compares the ends of names letter by letter.
            same_end = [other for other in names if other.endswith(name) and other not in chosen]
            confused = [other for other in same_end if not other.startswith(inside)]
            if confused:
                raise UserError(
                    f"lora.modules_to_save: {name} cannot be stored without {confused[0]}, since "
                    "PEFT confuses names with the same end. Set "
                    f"lora.modules_to_save=[{','.join([*chosen, *confused])}]."
                )
        return [name for name in chosen if not name.startswith(inside)]

    def _no_layer(self, setting: str, pattern: str, is_regex: bool) -> UserError:
        """Return the error for a pattern that matches no layer, or only unsuitable modules."""
        names = [alias for aliases in self.layers.values() for alias in aliases]
        for name in self.aliases:
            if name and matches(name, pattern if is_regex else [pattern]):
                kind = type(self.modules[name]).__name__
                reason = "which LoRA cannot wrap or which is trained whole"
                if name in self.behind:
                    reason = f"but {BEHIND}, so an adapter would have no effect"
                return UserError(
                    f"{setting}: {pattern!r} is {name!r}, a {kind}, {reason}. {listing(names)}"
                )
        return no_match(setting, pattern, names)

    def no_layers(self) -> UserError:
        """Return the error for a model without any layer to adapt."""
        if self.behind:
            hint = (
                f" {min(self.behind)} is one, but {BEHIND}. Set "
                "lora.target_parameters=[in_proj_weight] to adapt queries, keys and values."
            )
        else:
            kinds = {type(m).__name__ for m in self.model.modules() if "weight" in m._parameters}
            hint = f" LoRA does not support {', '.join(sorted(kinds))}." if kinds else ""
        return UserError(
            f"lora.targets: {type(self.model).__name__} has no linear or embedding layer to adapt."
            f"{hint}"
        )


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of a Hugging Face model's task-head modules, outside the bare base model.

    The output embedding (lm_head) is a head. If the base model has its own attribute (`bert`,
    `model`, `transformer`), every module beside it is a head too.
    """
    heads: list[str] = []
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if isinstance(base, nn.Module):
        heads += [
            name
            for name, child in model.named_children()
            if child is not base and next(child.parameters(), None) is not None
        ]
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    if output is not None:
        heads += [name for name, module in model.named_modules() if module is output]
    return list(dict.fromkeys(heads))


def no_match(setting: str, pattern: str, names: Collection[str]) -> UserError:
    """Return the error for a pattern that matches none of `names`, with the nearest of them."""
    hint = did_you_mean(pattern, suffixes(names))
    return UserError(f"{setting}: {pattern!r} matches no module.{hint} {listing(names)}")


def listing(names: Iterable[str]) -> str:
    """Return a sentence that lists the last parts of the names."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    # The last part of a module's name in nn.Sequential is its number.
    listed = ", ".join(f"{leaf} (x{count})" for leaf, count in [*counts.items()][:30])
    return f"Modules that can be matched, by last name: {listed or 'none'}."
