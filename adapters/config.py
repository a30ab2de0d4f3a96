"""The base class of a method's config: its options, the layers it makes, and PEFT's names."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from adapters.folder import WITHOUT_EFFECT
from adapters.layers import AdapterLayer
from adapters.patterns import matcher

# the type of a field -> what its values may be, and what that is called
TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "a text"),
}
# the linears of vitft's blocks; "w3" where the feed-forward is gated
LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with a line of help, which programs such as a CLI can show."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ABC):
    """The options of a method; a subclass adds options and gives PEFT's names for them.

    Raises:
        ValueError: an option is of another type than its field; `targets` is empty, or one string;
            or `layers` are not numbers.
    """

    # exact names of modules, dotted suffixes ("wq", "attn.wq"), or regular expressions that match
    # a whole name; default targets that the model lacks are left out
    targets: tuple[str, ...]
    layers: tuple[int, ...] = ()  # numbers of the blocks to adapt, 4 for "blocks.4"; (): all

    peft_marks: ClassVar[dict[str, object]]  # what marks the method in an adapter_config.json
    peft_options: ClassVar[dict[str, str]] = {"targets": "target_modules"}  # ours -> PEFT's
    peft_defaults: ClassVar[dict[str, Any]] = {}  # PEFT's values of missing options
    peft_tensors: ClassVar[dict[str, str]]  # a parameter that a layer adds -> PEFT's suffix
    # whether another option refers to targets, which must then be whole names
    by_whole_names: ClassVar[bool] = False
    # an option that is the size of a tensor's axis -> PEFT's suffix of the tensor, and the axis
    sizes: ClassVar[Mapping[str, tuple[str, int]]] = {}
    # PEFT's keys that are accepted with any value
    peft_ignored: ClassVar[frozenset[str]] = WITHOUT_EFFECT | {"modules_to_save"}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, (types, words) = getattr(self, field.name), TYPES.get(field.type, ((), ""))
            if types and (
                not isinstance(value, types) or isinstance(value, bool) > (bool in types)
            ):
                raise ValueError(f"{field.name}={value!r} is not {words}")
        if isinstance(self.targets, str):
            raise ValueError(f"targets={self.targets!r} is one string; write ({self.targets!r},)")
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets or not all(isinstance(target, str) for target in self.targets):
            raise ValueError(f"targets={self.targets!r} must be one or more names of modules")
        if isinstance(self.layers, Iterable):
            object.__setattr__(self, "layers", tuple(self.layers))
        if not isinstance(self.layers, tuple) or not all(
            type(layer) is int and layer >= 0 for layer in self.layers
        ):
            raise ValueError(f"layers={self.layers!r} must be numbers of blocks, such as (4, 5)")

    @abstractmethod
    def adapt(self, module: nn.Module, name: str) -> AdapterLayer:
        """Return the layer that replaces `module`, which is not changed.

        Raises:
            ValueError: the method does not adapt such a module.
        """

    def suits(self, module: nn.Module) -> bool:
        """Return whether the method can adapt a module that one of its default targets names."""
        return True

    def adapt_all(self, modules: Mapping[str, nn.Module]) -> dict[str, AdapterLayer]:
        """Return the layers that replace `modules`, by name.

        Raises:
            ValueError: the method does not adapt one of them.
        """
        return {name: self.adapt(module, name) for name, module in modules.items()}

    def size(self, option: str, name: str) -> Any:
        """Return the value of `option`, a key of `sizes`, for the module called `name`."""
        return getattr(self, option)

    def lr_factors(self) -> dict[str, float]:
        """Return factors of the learning rate, by the name of a parameter that a layer adds."""
        return {}

    def shared(self) -> dict[str, str]:
        """Return the tensors that a file holds once for all layers: a layer's name -> PEFT's."""
        return {}

    def to_peft(self) -> dict[str, Any]:
        """Return this config as entries of an adapter_config.json.

        Raises:
            ValueError: `layers` are given, which PEFT lacks; `inject` turns them into names.
        """
        if self.layers:
            raise ValueError(f"layers={self.layers} are not names yet; inject the config first")
        written = dict(self.peft_marks)
        for ours, theirs in self.peft_options.items():
            if (value := getattr(self, ours)) != {}:
                written[theirs] = [*value] if isinstance(value, tuple) else value
        return written

    def kept_options(self) -> dict[str, Any]:
        """Return the options that PEFT has no key for and that are not the default."""
        named = {"layers", *self.peft_options}
        others = [field for field in dataclasses.fields(self) if field.name not in named]
        values = {field.name: getattr(self, field.name) for field in others}
        return {f.name: values[f.name] for f in others if values[f.name] != f.default}

    @classmethod
    def reads(cls, written: Mapping[str, Any]) -> bool:
        """Return whether an adapter_config.json describes this method."""
        return all(written.get(key, False) == mark for key, mark in cls.peft_marks.items())

    @classmethod
    def from_peft(cls, written: Mapping[str, Any]) -> Self:
        """Return the config in an adapter_config.json; a missing option has PEFT's default.

        Raises:
            ValueError: an option is missing, has a wrong value, or is in use but not supported.
        """
        understood = {*cls.peft_marks, *cls.peft_options.values(), *cls.peft_ignored}
        for key, value in written.items():
            if key not in understood and value and value != "none":  # bias="none" is off too
                raise ValueError(f"option {key}={value!r} is not supported by {cls.__name__}")
        given = cls.peft_defaults | dict(written)
        for field in dataclasses.fields(cls):
            name = cls.peft_options.get(field.name, "")
            if field.type is bool and not isinstance(given.get(name, False), bool):
                raise ValueError(f"option {name}={given[name]!r} is neither true nor false")
        if missing := [key for key in cls.peft_options.values() if key not in given]:
            raise ValueError(f"option {missing[0]!r} is missing")
        try:
            return cls(**{ours: given[theirs] for ours, theirs in cls.peft_options.items()})
        except TypeError as error:
            raise ValueError(f"an option has a value of the wrong type: {error}") from error


@dataclass(frozen=True, kw_only=True)
class RankConfig(AdapterConfig):
    """The options of methods with a rank; patterns set it by a module's name.

    A pattern's key is a regular expression for the end of a name, from a dot or the name's start;
    the first that matches counts, as in PEFT.

    Raises:
        ValueError: an option is out of its range.
    """

    targets: tuple[str, ...] = LINEARS
    rank: int = option(8, "rank of the update")
    alpha: float = option(16, "the update is scaled by alpha / rank")
    rank_pattern: Mapping[str, int] = option({}, "other ranks, by names: w1=4,w2=16")
    alpha_pattern: Mapping[str, float] = option({}, "other alphas, by names")

    peft_options = AdapterConfig.peft_options | {
        "rank": "r",
        "alpha": "alpha",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    }
    peft_defaults = {"r": 8, "alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
            for key in getattr(self, name):
                try:
                    matcher(key)
                except ValueError as error:
                    raise ValueError(f"{name}'s {error}") from error
        for rank in (self.rank, *self.rank_pattern.values()):
            check_count("rank", rank, "4 to 32 are usual")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not 0 < alpha < math.inf:
                raise ValueError(f"alpha={alpha!r} is not positive; twice the rank is usual")

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """Return the rank and alpha of the module called `name`."""
        ranks, alphas = self.rank_pattern, self.alpha_pattern
        rank = next((ranks[key] for key in ranks if ends_by_pattern(name, key)), self.rank)
        return rank, next((alphas[key] for key in alphas if ends_by_pattern(name, key)), self.alpha)

    def size(self, option: str, name: str) -> Any:
        """Return the rank of the module called `name`."""
        return self.rank_and_alpha(name)[0] if option == "rank" else super().size(option, name)

    def adapt_all(self, modules: Mapping[str, nn.Module]) -> dict[str, AdapterLayer]:
        """Return the layers that replace `modules`, by name.

        Raises:
            ValueError: the method does not adapt one of them, or a pattern matches none.
        """
        for key in (*self.rank_pattern, *self.alpha_pattern):
            if not any(ends_by_pattern(name, key) for name in modules):
                raise ValueError(f"pattern {key!r} matches none of the targets {[*modules]}")
        return super().adapt_all(modules)


def check_dropout(dropout: float) -> None:
    """Check a dropout probability.

    Raises:
        ValueError: it is not in 0 <= dropout < 1.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"{dropout=} is not in 0 <= dropout < 1; 0 is off")


def check_count(name: str, value: object, usual: str) -> None:
    """Check that an option is a positive integer.

    Args:
        name: of the option.
        value: of the option.
        usual: the message's advice, such as "8 is usual".

    Raises:
        ValueError: it is not.
    """
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer; {usual}")


def ends_by_pattern(name: str, pattern: str) -> bool:
    """Return whether a regular expression matches a name's end, from a dot or the name's start."""
    return matcher(rf"(.*\.)?({pattern})")(name)
