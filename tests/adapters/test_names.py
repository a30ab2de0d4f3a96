"""How names choose modules, and every refusal of what an adapter would not reach."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import LoRAConfig, inject
from adapters.targets import (
    CALLED,
    EITHER,
    READ,
    ends,
    in_layers,
    matching,
    named_modules,
    refuse_statistics,
    select,
    use_of,
)
from tests.adapters.toy import toy


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def lora(*targets: str) -> LoRAConfig:
    return LoRAConfig(targets=targets, rank=1)


def test_a_name_is_whole_or_an_end_after_a_dot_or_else_a_pattern() -> None:
    names = ["a", "b.a", "ba", "b.a.c", "w1", "x.w1", "axc"]
    assert select(names, "a") == ["a", "b.a"]
    assert select(names, "b.a") == ["b.a"]
    assert select(names, "a.c") == ["b.a.c"]  # and not "axc": a name is no pattern too
    assert select(names, r".*w\d") == ["w1", "x.w1"]
    assert select(names, r"w") == []
    assert ends("b.a", "a")
    assert not ends("ba", "a")
    with pytest.raises(ValueError, match=r"^'\(' is no regular expression: missing"):
        select(names, "(")


def test_modules_are_found_under_every_name_that_they_have() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert [*named_modules(model)] == ["a", "b", "b.0"]
    assert matching(model, ("a", "b.0"), "target") == {"a": shared, "b.0": shared}


NAMES = "attn, blocks, embed, ffn, head, norm, wk, wo, wq, wv"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("wq", "target 'wq' is one string; write ('wq',)"),
        (
            ("x.wqq",),
            f"target 'x.wqq' matches no module; did you mean 'wq'? there are: {NAMES}",
        ),
        (("zzzz",), f"target 'zzzz' matches no module; there are: {NAMES}"),
    ],
)
def test_names_that_match_nothing_are_refused_with_those_that_are_there(
    names: Any, message: str
) -> None:
    with refused(message):
        matching(toy(), names, "target")


def test_a_model_of_numbers_only_says_so_and_long_lists_are_cut() -> None:
    message = "x 'a' matches no module; there are: names of numbers only, such as 0"
    with refused(message):
        matching(nn.Sequential(nn.Linear(1, 1)), ("a",), "x")
    many = nn.ModuleDict({f"n{i:02}": nn.Linear(1, 1) for i in range(32)})
    listed = ", ".join(f"n{i:02}" for i in range(30))
    with refused(f"x 'zz' matches no module; there are: {listed}"):
        matching(many, ("zz",), "x")


def modules(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(1, 1) for name in names}


@pytest.mark.parametrize(
    ("names", "layers", "expected"),
    [
        (["blocks.0.wq", "blocks.1.wq", "blocks.2.wq"], [0, 2], ["blocks.0.wq", "blocks.2.wq"]),
        (["0.blocks.4.ffn.0", "0.blocks.5.ffn.0"], [5], ["0.blocks.5.ffn.0"]),
        (["layer_3.mlp.0", "layer_4.mlp.0"], [4], ["layer_4.mlp.0"]),
        (["blocks.3.wq"], [3], ["blocks.3.wq"]),  # alone, it is the first number
        (["blocks.0.wq", "blocks.1.wq", "head"], [1], ["blocks.1.wq"]),
        (["blocks.10.wq", "blocks.1.wq"], [1], ["blocks.1.wq"]),
        (["a.0.b.1.x", "a.0.b.2.x"], [2], ["a.0.b.2.x"]),
    ],
)
def test_the_number_of_a_block_is_the_first_that_tells_it_from_others(
    names: list[str], layers: list[int], expected: list[str]
) -> None:
    assert [*in_layers(modules(*names), layers, ())] == expected


def test_layers_without_a_target_are_refused_with_those_that_have_one() -> None:
    found = modules("blocks.2.wq", "blocks.0.wq", "blocks.10.wk")
    with refused("layer 1 has no target; there are: 0, 2, 10"):
        in_layers(found, [3, 1], ())
    with refused("layer 0 has no target; there are: none"):
        in_layers(modules("head"), [0], ())
    with refused("target 'wk' is in none of the layers [0, 2]"):
        in_layers(found, (0, 2), ("wq", "wk"))


class Reading(nn.Module):
    """Reads weights in its pass or its making only, or calls, or does both."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.either, self.made = (nn.Linear(2, 2) for _ in range(4))
        self.biased, self.unused, self.listed = (nn.Linear(2, 2) for _ in range(3))
        nn.init.zeros_(self.made.weight)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.made.weight)

    def _reset(self) -> None:
        nn.init.zeros_(self.made.weight)

    def init_weights(self) -> None:
        nn.init.zeros_(self.made.weight)

    @torch.no_grad()
    def _init_weights(self) -> None:
        nn.init.zeros_(self.made.weight)

    def extra_repr(self) -> str:
        return str(self.made.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.read.weight) + self.biased.bias
        for part in [self.called, self.listed]:
            x = part(x.to(self.listed.weight.dtype))
        if self.training:
            return self.either(x)
        return self.called(F.linear(x, self.either.weight))


def test_how_a_module_is_used_stands_in_its_parents_pass() -> None:
    model = nn.Sequential(Reading())
    uses = {"read": READ, "biased": READ, "called": CALLED, "either": EITHER}
    uses |= {"listed": EITHER}
    uses |= {"made": CALLED, "unused": CALLED}  # in doubt, it is taken as called
    assert {name: use_of(model, f"0.{name}") for name in uses} == uses
    kind = type("Nowhere", (nn.Module,), {})  # a class without a source
    made = kind()
    made.child = nn.Linear(2, 2)
    assert use_of(made, "child") == CALLED
    with refused("'0.read' is never called: Reading reads its weight directly"):
        inject(model, lora("read"))


class Derived(Reading):
    """Inherits the pass that reads."""


def test_a_pass_that_is_inherited_or_of_a_class_inside_a_function_is_read_too() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.read.weight)

    for parent in (Derived(), Inside()):
        assert use_of(parent, "read") == READ
    assert use_of(Derived(), "called") == CALLED


def test_a_lazy_model_is_refused_before_anything_changes() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.LazyLinear(2)})
    with refused("b is lazy, without shapes yet; run a pass first, then adapt"):
        inject(model, lora("a"))
    assert all(p.requires_grad for p in model.parameters())
    model["b"](torch.ones(1, 2))
    inject(model, lora("b"))


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "register_load_state_dict_pre_hook",
        "register_load_state_dict_post_hook",
    ],
)
def test_hooks_of_any_kind_are_refused(hook: str) -> None:
    model = Hooked()
    getattr(model.wq, hook)(lambda *_: None)
    with refused("'wq' has hooks, which an adapter would lose; remove them first"):
        inject(model, lora("wq"))


def test_what_would_not_do_what_it_seems_to_is_refused_in_a_whole_sentence() -> None:
    model = toy()
    with refused("'head' is both a target and trainable; choose one"):
        inject(model, lora("head"), trainable=("head",))
    with refused("'blocks.0.ffn.0' lies inside 'blocks.0', which is trainable; choose one"):
        inject(model, None, trainable=("blocks.0", "blocks.0.ffn.0"))
    with refused("'blocks.0.attn.wq' lies inside 'blocks.0', which is trainable; choose one"):
        inject(model, lora("wq"), trainable=("blocks.0",))
    model.blocks[0].attn.wq.forward = lambda x: x  # type: ignore[method-assign]
    message = (
        "'blocks.0.attn.wq' has a forward of its own, such as a hook, which an adapter would "
        "lose; adapt first"
    )
    with refused(message):
        inject(model, lora("wq"))
    linear = nn.Linear(2, 2)
    with refused("'a' and 'b' are one module; it can't be replaced"):
        inject(nn.ModuleDict({"a": linear, "b": linear}), lora("a"))
    with refused("'a' and 'b' are one module; it can't be replaced"):
        inject(nn.ModuleDict({"a": linear, "b": linear}), None, trainable=("a",))
    attention = nn.Sequential(nn.MultiheadAttention(2, 1))
    with refused("'0.out_proj' is never called: nn.MultiheadAttention reads its weight directly"):
        inject(attention, lora("out_proj"))
    with refused("'out_proj' is never called: nn.MultiheadAttention reads its weight directly"):
        inject(attention[0], lora("out_proj"))


def test_wrappers_outside_and_inside_are_refused_by_name() -> None:
    with refused("the model is wrapped in DataParallel; adapt first, compile and wrap last"):
        inject(nn.DataParallel(toy()), lora("wq"))
    model = nn.ModuleDict({"a": nn.DataParallel(nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    with refused("a is wrapped in DataParallel; adapt first, compile and wrap last"):
        inject(model, lora("b"))


def test_a_tied_parameter_trains_only_with_its_twin() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "ab": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    with refused("'a.weight' and 'b.weight' are one parameter; a trained copy unties them"):
        inject(model, None, trainable=("b",))
    inject(model, None, trainable=("ab",))  # has no part in it
    both = nn.ModuleDict({"x": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    both["x"][1].weight = both["x"][0].weight
    inject(both, None, trainable=("x",))
    assert both["x"][1].weight is both["x"][0].weight


def test_a_batch_norm_is_refused_unless_it_trains_or_has_no_statistics() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))})
    message = (
        "'a.1' keeps running statistics, which training changes though the base is frozen; "
        "name it in trainable"
    )
    with refused(message):
        refuse_statistics(model, {})
    with refused(message):
        refuse_statistics(model, {"a.0": model["a"][0]})
    refuse_statistics(model, {"a.1": model["a"][1]})
    refuse_statistics(model, {"a": model["a"]})
    model["a"][1] = nn.BatchNorm1d(2, track_running_stats=False)
    refuse_statistics(model, {})
    model["a"][1] = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))
    with refused(message):
        refuse_statistics(model, {})
    refuse_statistics(model, {"a.1": model["a"][1]})
