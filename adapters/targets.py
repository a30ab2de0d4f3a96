"""Names in, modules out; an error for modules on which an adapter would have no effect."""

import difflib
import inspect
import re
import textwrap
from collections.abc import Collection, Hashable, Iterable, Mapping
from functools import cache
from itertools import chain
from typing import cast

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from adapters.patterns import matcher

# These read their children's weights without calling the children.
BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# A module's attributes that hold its hooks, one for each kind that torch has.
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
NUMBER = re.compile(r"(?:^|[._])(\d+)(?=\.|$)")  # as in "blocks.4." and "encoder_layer_4."
# These put a prefix before every module's name.
WRAPPERS = (
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "OptimizedModule",
)


def matching(model: nn.Module, names: Collection[str], what: str) -> dict[str, nn.Module]:
    """Return the modules whose name is one of `names`, or ends in a dot and one of them.

    Where there is none, the name is a regular expression that must match whole names.

    Args:
        model: to search.
        names: or regular expressions.
        what: what the names are called in messages, such as "target".

    Raises:
        ValueError: `names` is one string, or one of them matches nothing.
    """
    if isinstance(names, str):
        raise ValueError(f"{what} {names!r} is one string; write ({names!r},)")
    modules = named_modules(model)
    found: dict[str, nn.Module] = {}
    for wanted in names:
        hits = select(modules, wanted)
        if not hits:
            raise ValueError(f"{what} {wanted!r} matches no module; {_choice(wanted, modules)}")
        found |= {name: modules[name] for name in hits}
    return found


def select(names: Collection[str], wanted: str) -> list[str]:
    """Return those of `names` that are `wanted` or end in it after a dot.

    Where there is none, those that it matches whole, as a regular expression.
    """
    by_name = [name for name in names if ends(name, wanted)]
    return by_name or [name for name in names if matcher(wanted)(name)]


def ends(name: str, wanted: str) -> bool:
    """Return whether `wanted` is this name, or its end after a dot."""
    return name == wanted or name.endswith(f".{wanted}")


def only(name: str) -> str:
    """Return a regular expression for this name alone, not for longer names that end in it."""
    return f"^{re.escape(name)}$"


def in_layers(
    found: Mapping[str, nn.Module], layers: Collection[int], names: Collection[str]
) -> dict[str, nn.Module]:
    """Return the modules of `found` in blocks whose numbers are in `layers`.

    Args:
        found: the modules that targets match, by name.
        layers: numbers of blocks.
        names: targets that must have a module in these blocks.

    Raises:
        ValueError: a block has no module, or one of `names` has none.
    """
    numbers = _block_numbers(found)
    if missing := sorted(set(layers) - set(numbers.values())):
        there = ", ".join(map(str, sorted(set(numbers.values()))))
        raise ValueError(f"layer {missing[0]} has no target; there are: {there or 'none'}")
    chosen = {name: module for name, module in found.items() if numbers.get(name) in layers}
    for wanted in names:
        if not select(chosen, wanted):
            raise ValueError(f"target {wanted!r} is in none of the layers {[*layers]}")
    return chosen


def refuse(
    model: nn.Module, adapted: Mapping[str, nn.Module], trained: Mapping[str, nn.Module]
) -> None:
    """Check that all these modules can be replaced, and that the replacements would be used.

    Raises:
        ValueError: one cannot, or would not; the message says why.
    """
    modules = named_modules(model)
    for name, module in {"the model": model, **modules}.items():
        if (kind := type(module).__name__) in WRAPPERS:
            raise ValueError(f"{name} is wrapped in {kind}; adapt first, compile and wrap last")
        if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
            raise ValueError(f"{name} is lazy, without shapes yet; run a pass first, then adapt")
    for name, module in adapted.items():
        if name in trained:
            raise ValueError(f"{name!r} is both a target and trainable; choose one")
        for outer in (model, *(modules[outer] for outer in _outer(name))):
            if isinstance(outer, BYPASSING):
                kind = type(outer).__name__
                raise ValueError(f"{name!r} is never called: nn.{kind} reads its weight directly")
        if use_of(model, name) == READ:
            parent = type(_parent(model, name)).__name__
            raise ValueError(f"{name!r} is never called: {parent} reads its weight directly")
        if any(getattr(module, hooks) for hooks in HOOKS):
            raise ValueError(f"{name!r} has hooks, which an adapter would lose; remove them first")
        if "forward" in vars(module):
            raise ValueError(
                f"{name!r} has a forward of its own, such as a hook, which an adapter would lose; "
                "adapt first"
            )
    for name, module in (*adapted.items(), *trained.items()):
        if inside := [outer for outer in _outer(name) if outer in trained]:
            raise ValueError(f"{name!r} lies inside {inside[0]!r}, which is trainable; choose one")
        if inside := [outer for outer in _outer(name) if outer in adapted]:
            raise ValueError(f"{name!r} lies inside {inside[0]!r}, which is a target; choose one")
        if twin := [n for n, m in modules.items() if m is module and n != name]:
            raise ValueError(f"{name!r} and {twin[0]!r} are one module; it can't be replaced")
    _refuse_tied(model, trained)


CALLED, READ, EITHER = "called", "read", "either"


def use_of(model: nn.Module, name: str) -> str:
    """Return how its parent uses a module: CALLED, READ (only its weight is), or EITHER.

    This searches the source of the parent's class and of those that it derives from; where that
    shows nothing, the module counts as called. `adapters.check` finds out by a forward pass.
    """
    kinds, child = type(_parent(model, name)).__mro__, re.escape(name.rpartition(".")[2])
    source = "\n".join(_source(cast(Hashable, kind)) for kind in kinds)
    if not re.search(rf"self\.{child}\.(weight|bias)\b", source):
        return CALLED
    # called here, or handed on in a list or as an argument, and called there
    return EITHER if re.search(rf"self\.{child}\s*[(,)\]]", source) else READ


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


@cache
def _source(kind: Hashable) -> str:
    """Return the source of a class's methods except those that set it up, "" if there is none."""
    assert isinstance(kind, type)
    try:
        text = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return ""
    methods = re.split(r"\n    (?:@\S+\n    )*(?=def )", text)
    setting_up = (
        "def __init__",
        "def reset_",
        "def _reset",
        "def init_",
        "def _init",
        "def extra_repr",
    )
    return "\n".join(method for method in methods[1:] if not method.startswith(setting_up))


def _refuse_tied(model: nn.Module, trained: Mapping[str, nn.Module]) -> None:
    """Refuse to train a copy of a parameter that another module uses too.

    Raises:
        ValueError: there is one.
    """
    seen: dict[int, tuple[str, str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        home = next((name for name in trained if key.startswith(f"{name}.")), "")
        first, first_home = seen.setdefault(id(parameter), (key, home))
        if home != first_home:
            raise ValueError(f"{first!r} and {key!r} are one parameter; a trained copy unties them")


def refuse_statistics(model: nn.Module, trained: Mapping[str, nn.Module]) -> None:
    """Refuse to train with a frozen batch norm, whose running statistics would still change.

    So would those of a spectral norm.

    Raises:
        ValueError: the model has one.
    """
    modules = named_modules(model)
    for name, module in modules.items():
        frozen = not any(outer in trained for outer in (name, *_outer(name)))
        tracks = isinstance(module, _NormBase) and module.track_running_stats
        spectral = any(
            isinstance(part, _SpectralNorm | SpectralNorm)
            for part in (module, *module._forward_pre_hooks.values())
        )
        if frozen and (tracks or spectral):
            name = name.partition(".parametrizations.")[0]
            raise ValueError(
                f"{name!r} keeps running statistics, which training changes though the base is "
                "frozen; name it in trainable"
            )


def _block_numbers(names: Iterable[str]) -> dict[str, int]:
    """Return for each name the number of its block: the first number that differs among names.

    It is 4 in "blocks.4.ffn.0" where there is a "blocks.5" too, and in "encoder_layer_4.mlp.0".
    """
    places = {
        name: [(name[: match.start(1)], int(match[1])) for match in NUMBER.finditer(name)]
        for name in names
    }
    seen: dict[str, set[int]] = {}  # the numbers that follow a prefix
    for prefix, number in chain.from_iterable(places.values()):
        seen.setdefault(prefix, set()).add(number)
    return {
        name: next((number for prefix, number in numbered if len(seen[prefix]) > 1), numbered[0][1])
        for name, numbered in places.items()
        if numbered
    }


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module below `model` under every name that it has."""
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if name}


def _outer(name: str) -> list[str]:
    """Return the names of the modules around `name`: "a" and "a.b" for "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _choice(wanted: str, modules: Mapping[str, nn.Module]) -> str:
    """Return a hint at the name that may be meant, and the names that exist."""
    last = sorted({name.rpartition(".")[2] for name in modules} - set(map(str, range(1000))))
    close = difflib.get_close_matches(wanted.rpartition(".")[2], last, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}there are: {', '.join(last[:30]) or 'names of numbers only, such as 0'}"
