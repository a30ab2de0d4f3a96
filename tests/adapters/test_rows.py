"""Banks and joint passes tell a row from another by the first axis: what has another is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import Bank, inject, save_adapter, shared_copy, together
from tests.adapters.toy import IMAGES, X, config, move, snapshot, toy

ALONE = "use each adapter by itself"


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


class Turned(nn.Module):
    """A model whose linears and norms see what `turn` makes of the tokens (B, N, D)."""

    def __init__(self, turn: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.turn, self.back, self.wq, self.norm = turn, back, nn.Linear(5, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(self.norm(self.wq(self.turn(x)))))


def tokens_first() -> nn.Module:
    return Turned(lambda x: x.transpose(0, 1), lambda x: x.mean(dim=0)).double()


def flattened() -> nn.Module:
    return Turned(lambda x: x.flatten(0, 1), lambda x: x.unflatten(0, (-1, 3)).mean(dim=1)).double()


def of_tokens() -> nn.Module:
    return Turned(lambda x: x, lambda x: x).double()


def members(base: nn.Module, *kinds: str) -> list[nn.Module]:
    targets = {"lora": ("wq",), "ssf": ("wq", "norm"), "norm": ("norm",)}
    made = []
    for kind in kinds:
        own = config(kind, targets=targets[kind])
        made.append(inject(shared_copy(base), own, trainable=("head",)).eval())
        move(made[-1])
    return made


def banked(base: nn.Module, some: list[nn.Module], folder: Path) -> Bank:
    for i, model in enumerate(some):
        save_adapter(model, folder / str(i))
    return Bank(base, [folder / str(i) for i in range(len(some))])


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (nn.MultiheadAttention(8, 2), "part is a MultiheadAttention"),
        (nn.TransformerDecoderLayer(8, 2, 8), "part.self_attn is a MultiheadAttention"),
        (nn.GRU(8, 8), "part is a GRU"),
    ],
)
def test_a_base_with_tokens_first_is_refused_by_name_and_nothing_changes(
    part: nn.Module, said: str
) -> None:
    base = toy()
    base.part = part
    some = [inject(shared_copy(base), config("lora"), trainable=("head",))]
    before = str(snapshot(base)), str(snapshot(some[0]))
    message = (
        f"{said} with batch_first=False, for tokens (N, B, D), whose first axis is not that of "
        f"images; build the base with batch_first=True, or {ALONE}"
    )
    for call in (lambda: Bank(base, []), lambda: together(base, some)):
        with refused(message):
            call()
    assert (str(snapshot(base)), str(snapshot(some[0]))) == before


def test_a_base_that_is_tokens_first_itself_is_refused_and_images_first_are_not() -> None:
    with pytest.raises(ValueError, match="^the model is a LSTM with batch_first=False"):
        Bank(nn.LSTM(8, 8), [])
    base = toy()
    base.part = nn.MultiheadAttention(8, 2, batch_first=True)
    Bank(base, [])
    together(base, [inject(shared_copy(base), config("lora"), trainable=("head",))])


@pytest.mark.parametrize("kind", ["lora", "ssf", "norm"])
@pytest.mark.parametrize("make", [tokens_first, flattened])
@pytest.mark.parametrize("n", [1, 2])
def test_a_bank_refuses_other_first_axes(
    make: Callable[[], nn.Module], kind: str, n: int, tmp_path: Path
) -> None:
    base = make()
    bank = banked(base, members(base, kind), tmp_path)
    name, width = ("norm", 8) if kind == "norm" else ("wq", 5)
    shape = (3, n, width) if make is tokens_first else (3 * n, width)
    with refused(
        f"{name} saw {shape}, whose first axis is not that of the {n} images; leave it out of "
        f"targets, or {ALONE}"
    ):
        bank(X[:n], torch.ones(n, dtype=torch.long))


@pytest.mark.parametrize("kind", ["lora", "ssf", "norm"])
def test_a_joint_pass_refuses_tokens_first_also_where_they_divide(kind: str) -> None:
    base = tokens_first()
    joint = together(base, members(base, kind, kind, kind))
    name, width = ("norm", 8) if kind == "norm" else ("wq", 5)
    with refused(
        f"{name} saw {(3, 6, width)}, whose first axis is not that of the 6 images; leave it out "
        f"of targets, or {ALONE}"
    ):
        joint(IMAGES[:6])
    with pytest.raises(ValueError, match="whose first axis is not that of the 6 images"):
        joint(x=IMAGES[:6].repeat(1, 4, 1))


def test_a_joint_pass_takes_parts_of_images_one_image_after_another() -> None:
    base = flattened()
    some = members(base, "lora", "ssf", "norm")
    joint = together(base, some)
    for _ in range(2):
        rows = joint(IMAGES[:6]).chunk(3)
        for found, model, x in zip(rows, some, IMAGES[:6].chunk(3), strict=True):
            torch.testing.assert_close(found, model(x), rtol=0, atol=1e-10)
    assert joint(IMAGES[:9]).shape == (9, 3)  # a batch of another size later


def test_a_head_may_give_logits_of_every_token(tmp_path: Path) -> None:
    base = of_tokens()
    some = members(base, "lora", "ssf")
    rows = together(base, some)(IMAGES[:4]).chunk(2)
    for found, model, x in zip(rows, some, IMAGES[:4].chunk(2), strict=True):
        torch.testing.assert_close(found, model(x), rtol=0, atol=1e-10)
    mixed = banked(base, some, tmp_path)(IMAGES[:4], torch.tensor([1, 1, 2, 2]))
    torch.testing.assert_close(mixed, torch.cat([*rows]), rtol=0, atol=1e-10)


def test_heads_refuse_other_first_axes(tmp_path: Path) -> None:
    base = Turned(lambda x: x, lambda x: x.transpose(0, 1)).double()
    some = members(base, "lora", "lora")
    for call in (
        lambda: together(base, some)(IMAGES[:2]),
        lambda: banked(base, some, tmp_path)(IMAGES[:2], torch.tensor([1, 2])),
    ):
        with pytest.raises(ValueError, match=r"^head saw \(3, 2, 8\), whose first axis is not"):
            call()


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_norms_over_several_axes_are_those_of_each_alone(
    shape: tuple[int, ...], bias: bool, tmp_path: Path
) -> None:
    base = of_tokens()
    base.norm = nn.LayerNorm(shape, bias=bias).double()
    nn.init.normal_(base.norm.weight)
    images = torch.randn(6, *((4,) if len(shape) == 2 else ()), *shape[:-1], 5).double()
    some = members(base, "ssf", "norm", "lora")
    joint, bank = together(base, some), banked(base, some, tmp_path)
    expected = [model(x) for model, x in zip(some, images.chunk(3), strict=True)]
    for found in (joint(images), bank(images, torch.tensor([1, 1, 2, 2, 3, 3]))):
        torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-10)
    torch.testing.assert_close(bank(images, torch.zeros(6).long()), base.eval()(images))
    assert bank(images[:0], torch.arange(0)).shape == (0, *expected[0].shape[1:])
