"""What a method is made of: a config that adapts a module, a layer that takes the module's place.

A config says what it adapts and how PEFT spells it; a layer computes the adapted function and knows
how to merge. Shapes: `O` out, `I` in, `R` rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class AdapterLayer(nn.Module):
    """A module that took a base module's place, with the base's own Parameters and some to train.

    Mixed in before the base's class. The base's Parameters keep their names and are the same
    objects; those that it adds are named in `AdapterConfig.peft_tensors`.
    """

    enabled: bool = True  # False computes the base's function

    def merged(self) -> nn.Module:
        """Return the base's class of module with the adapter baked in.

        Raises:
            ValueError: no module of the base's class computes this function.
        """
        raise ValueError(f"{type(self).__name__} cannot be merged; keep it, or eject it")


class AdapterLinear(AdapterLayer, nn.Linear):
    """An `nn.Linear` whose weight (O, I) and bias (O,) are the base layer's own Parameters."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        self.weight, self.bias = base.weight, base.bias

    def adapted_weight(self) -> Tensor:
        """Return the weight (O, I) that merging bakes in, in float32 or wider."""
        raise NotImplementedError

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain `nn.Linear` that computes what this layer computes in eval mode."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.adapted_weight().to(self.weight.dtype))
        linear.bias = self.bias
        return linear


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ABC):
    """The options of a method; a subclass adds its own and says how PEFT spells them.

    Raises:
        ValueError: `targets` is empty, or one string; or `layers` are not numbers.
    """

    targets: tuple[str, ...]  # exact names of modules, or dotted suffixes: "wq", "attn.wq"
    layers: tuple[int, ...] = ()  # of the blocks to adapt, 4 in "blocks.4.attn.wq"; (): all

    peft_marks: ClassVar[dict[str, object]]  # what marks the method in an adapter_config.json
    peft_options: ClassVar[dict[str, str]] = {"targets": "target_modules"}  # ours -> PEFT's
    peft_tensors: ClassVar[dict[str, str]]  # a layer's own parameter -> PEFT's suffix
    peft_ignored: ClassVar[frozenset[str]] = frozenset(  # PEFT's keys that change no function
        {
            "auto_mapping",
            "base_model_name_or_path",
            "inference_mode",
            "modules_to_save",
            "peft_version",
            "revision",
            "task_type",
        }
    )

    def __post_init__(self) -> None:
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
        """Return the layer to put in the place of `module`, which stays as it is.

        Raises:
            ValueError: the method does not adapt such a module.
        """

    def to_peft(self) -> dict[str, Any]:
        """Return the entries of an adapter_config.json that tell this config.

        Raises:
            ValueError: `layers` are given, which only `inject` turns into names.
        """
        if self.layers:
            raise ValueError(f"layers={self.layers} are not names yet; inject the config first")
        options = {theirs: getattr(self, ours) for ours, theirs in self.peft_options.items()}
        return {**self.peft_marks, **options, "target_modules": list(self.targets)}

    @classmethod
    def reads(cls, written: Mapping[str, Any]) -> bool:
        """Return whether an adapter_config.json is of this method."""
        return all(written.get(key, False) == mark for key, mark in cls.peft_marks.items())

    @classmethod
    def from_peft(cls, written: Mapping[str, Any]) -> Self:
        """Return the config that an adapter_config.json tells.

        Raises:
            ValueError: an option is missing, has a wrong value, or is not supported and not off.
        """
        understood = {*cls.peft_marks, *cls.peft_options.values(), *cls.peft_ignored}
        for key, value in written.items():
            if key not in understood and value and value != "none":  # bias="none" is off too
                raise ValueError(f"option {key}={value!r} is not supported by {cls.__name__}")
        if missing := [key for key in cls.peft_options.values() if key not in written]:
            raise ValueError(f"option {missing[0]!r} is missing")
        try:
            return cls(**{ours: written[theirs] for ours, theirs in cls.peft_options.items()})
        except TypeError as error:
            raise ValueError(f"an option has a value of the wrong type: {error}") from error


def plain_linear(module: nn.Module, name: str) -> nn.Linear:
    """Return `module` if it is an `nn.Linear` that an `AdapterLinear` can take the place of.

    Raises:
        ValueError: it is not, with the reason.
    """
    if type(module) is not nn.Linear:
        kind = "a subclass of nn.Linear" if isinstance(module, nn.Linear) else "not an nn.Linear"
        raise ValueError(
            f"{name!r} is a {type(module).__name__}, {kind}; only plain nn.Linear is adapted"
        )
    if module.weight.is_meta:
        raise ValueError(f"{name!r} has no weights yet (device meta); load the base, then inject")
    if not module.weight.is_floating_point():
        raise ValueError(
            f"{name!r} has weights of {module.weight.dtype}; adapters need a floating-point base"
        )
    return module
