"""(IA)^3: outputs, or in feed-forwards inputs, are multiplied by a trained vector.

y = l * (W x + b), or W (l * x) + b (arXiv:2205.05638, section 3.3).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from adapters.config import AdapterConfig, option
from adapters.layers import AdapterLayer, AdapterLinear, wide
from adapters.patterns import matcher
from adapters.plain import plain_linear
from adapters.targets import ends, select


class IA3Linear(AdapterLinear):
    """y = l * (W x + b) from x (..., I) to y (..., O); l starts at one."""

    vectors = frozenset({"factors"})

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.factors = nn.Parameter(wide(base.weight.new_ones(self.out_features, 1)))  # (O, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., I)."""
        y = F.linear(x, self.weight, self.bias)
        return (y * self.factors[:, 0]).to(y.dtype) if self.enabled else y

    def terms(self) -> dict[str, Tensor]:
        """Return the terms that are not the base's."""
        bias = self.adapted_bias()
        return {"gain": self.factors[:, 0]} | ({} if bias is None else {"bias": bias})

    def adapted_weight(self) -> Tensor:
        """Return diag(l) W (O, I), in float32 or wider."""
        return wide(self.factors) * wide(self.weight)

    def adapted_bias(self) -> Tensor | None:
        """Return l * b (O,), in float32 or wider."""
        return None if self.bias is None else wide(self.factors)[:, 0] * wide(self.bias)


class IA3Input(AdapterLinear):
    """y = W (l * x) + b from x (..., I) to y (..., O); l starts at one."""

    vectors = IA3Linear.vectors

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.factors = nn.Parameter(wide(base.weight.new_ones(1, self.in_features)))  # (1, I)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., I)."""
        x = (x * self.factors[0]).to(x.dtype) if self.enabled else x
        return F.linear(x, self.weight, self.bias)

    def terms(self) -> dict[str, Tensor]:
        """Return the terms that are not the base's."""
        return {"in_gain": self.factors[0]}

    def adapted_weight(self) -> Tensor:
        """Return W diag(l) (O, I), in float32 or wider."""
        return wide(self.weight) * wide(self.factors)


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """(IA)^3: a trained factor for each key, value and hidden unit (arXiv:2205.05638).

    A layer trains O numbers, and I where it is one of `feedforward`.

    Raises:
        ValueError: `feedforward` is one string, or holds a longer name for one of the targets.
    """

    targets: tuple[str, ...] = ("wk", "wv", "w2")
    feedforward: tuple[str, ...] = option(
        ("w2",), "targets whose input is multiplied, not the output"
    )

    peft_marks = {"peft_type": "IA3"}
    by_whole_names = True
    peft_options = AdapterConfig.peft_options | {"feedforward": "feedforward_modules"}
    peft_defaults = {"feedforward_modules": ()}
    peft_tensors = {"factors": "ia3_l"}
    peft_ignored = AdapterConfig.peft_ignored | {"init_ia3_weights"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward, str):
            raise ValueError(f"feedforward={self.feedforward!r} is one string; write a tuple")
        object.__setattr__(self, "feedforward", tuple(self.feedforward or ()))
        for wanted in self.feedforward:
            for target in self.targets:
                if wanted != target and ends(wanted, target):
                    raise ValueError(
                        f"feedforward {wanted!r} says more than the target {target!r}; "
                        "name both alike"
                    )

    def adapt_all(self, modules: Mapping[str, nn.Module]) -> dict[str, AdapterLayer]:
        """Return the (IA)^3 layers that replace plain `nn.Linear`s.

        Raises:
            ValueError: one of them is not, or `feedforward` is given and names none of them.
        """
        for wanted in self.feedforward:
            given = self.feedforward != type(self).feedforward
            if given and not select(modules, wanted):
                raise ValueError(f"feedforward {wanted!r} is none of the targets {[*modules]}")
        inputs = {name for wanted in self.feedforward for name in select(modules, wanted)}
        linears = {name: plain_linear(module, name) for name, module in modules.items()}
        return {n: IA3Input(m) if n in inputs else IA3Linear(m) for n, m in linears.items()}

    @classmethod
    def from_peft(cls, written: Mapping[str, Any]) -> Self:
        """Return the config in an adapter_config.json; a missing option has PEFT's default.

        Raises:
            ValueError: an option is missing, has a wrong value, or is in use but not supported.
        """
        wanted = written.get("feedforward_modules") or ()
        targets = written.get("target_modules") or ()
        if isinstance(targets, str):
            return super().from_peft(written)
        inputs = [name for name in targets if is_of_inputs(name, wanted)]
        return super().from_peft({**written, "feedforward_modules": inputs})

    def to_peft(self) -> dict[str, Any]:
        """Return the entries of an adapter_config.json, `feedforward` as names of targets."""
        chosen = {name for wanted in self.feedforward for name in select(self.targets, wanted)}
        inputs: Any = [name for name in self.targets if name in chosen]
        if any(_ends(name, inputs) for name in self.targets if name not in chosen):
            inputs = rf"(.*\.)?({'|'.join(map(re.escape, inputs))})"
        return super().to_peft() | {"feedforward_modules": inputs}

    def adapt(self, module: nn.Module, name: str) -> AdapterLinear:
        """Return the (IA)^3 layer that replaces a plain `nn.Linear`.

        Raises:
            ValueError: `module` is not a plain `nn.Linear`.
        """
        inputs = any(select([name], wanted) for wanted in self.feedforward)
        return (IA3Input if inputs else IA3Linear)(plain_linear(module, name))


def is_of_inputs(name: str, wanted: str | Iterable[str]) -> bool:
    """Return whether PEFT multiplies a module's inputs, by `feedforward_modules`.

    Args:
        name: of the module.
        wanted: an expression for whole names, or their ends.
    """
    return matcher(wanted)(name) if isinstance(wanted, str) else _ends(name, wanted)


def _ends(name: str, endings: Iterable[str]) -> bool:
    """Return whether a name ends in one of these; as in PEFT, they need not follow a dot."""
    return any(name.endswith(ending) for ending in endings)
