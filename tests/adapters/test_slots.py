"""A bank's slots: their room, their classes, and every refusal in a whole sentence."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapters import Bank, inject, save_adapter
from adapters.many.stacks import Ids, StackedHead, StackedLinear, StackedNorm
from tests.adapters.toy import Toy, X, config, move, toy


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def saved(folder: Path, kind: str = "lora", *, base: Toy | None = None, **options: Any) -> Path:
    model = inject(base or toy(), config(kind, **options), trainable=("head",))
    move(model)
    save_adapter(model, folder)
    return folder


def test_ids_that_are_no_slots_are_refused_on_a_cpu(tmp_path: Path) -> None:
    bank = Bank(toy(), [saved(tmp_path)])
    for ids in ([0, 2], [-1, 0], [5, 0]):
        with refused(f"ids={ids} are not all in 0 <= id < 2"):
            bank(X, torch.tensor(ids))
    for given in (torch.tensor([1]), torch.tensor([[0], [1]]), torch.ones(2), torch.ones(2).bool()):
        told = (
            f"ids are {tuple(given.shape)} of {given.dtype}; give an int64 for each of the 2 images"
        )
        with refused(told):
            bank(X, given)
    assert bank(X, torch.tensor([0, 1])).shape == (2, 3)
    assert bank(X[:0], torch.arange(0)).shape == (0, 3)


def test_a_bank_has_room_for_its_folders_or_more(tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(i), rank=i) for i in (2, 4)]
    for asked, n_slots in ((None, 3), (2, 3), (5, 5)):
        bank = Bank(toy(), folders, n_slots=asked)
        assert bank.n_slots == len(bank.classes) == n_slots
        assert bank.classes[:3] == [("a", "b", "c")] * 3
    for rank, room in ((0, 4), (3, 4), (6, 6)):
        bank = Bank(toy(), folders, rank=rank)
        stacks = bank.model.blocks[0].attn.wq.stacks()
        assert stacks["a"].shape == (3, room, 8)
        assert stacks["b"].shape == (3, 8, room)
    for n_classes, room in ((0, 3), (2, 3), (7, 7)):
        bank = Bank(toy(), folders, n_classes=n_classes)
        assert bank(X, torch.tensor([0, 2])).shape == (2, room)
    assert bank.training
    assert not bank.model.training
    assert not any(p.requires_grad for p in bank.parameters())


def test_slots_are_loaded_where_there_is_one(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    bank = Bank(toy(), [folder], n_slots=3)
    for slot in (0, 3, -1):
        with refused(f"slot={slot} is not in 1 <= slot < 3; 0 is the base"):
            bank.load(slot, folder)
    assert bank.classes[2] == ()
    bank.load(2, folder)
    assert bank.classes[2] == ("a", "b", "c")
    assert torch.equal(*(bank(X, torch.full((2,), slot)) for slot in (1, 2)))


def test_a_model_without_the_head_is_refused() -> None:
    with refused("the model has no 'top'; give as head what gives the logits"):
        Bank(toy(), [], head="top")
    assert Bank(toy(), [])(X, torch.zeros(2).long()).shape == (2, 3)


def test_what_has_no_room_is_named_with_the_way_out(tmp_path: Path) -> None:
    bank = Bank(toy(), [saved(tmp_path / "a", rank=2, targets=("wq",))])
    message = (
        "the bank has no room for 'blocks.0.attn.wk'; make it with that adapter among its first"
    )
    with refused(message):
        bank.load(1, saved(tmp_path / "b", rank=2, targets=("wk",)))
    rest = "make it with such an adapter among its first, or with a larger rank or n_classes"
    with refused(f"the bank has no room for a (3, 8) of 'blocks.0.attn.wq'; {rest}"):
        bank.load(1, saved(tmp_path / "c", rank=3, targets=("wq",)))
    with refused(f"the bank has no room for gain (8,) of 'blocks.0.attn.wq'; {rest}"):
        bank.load(1, saved(tmp_path / "d", "ssf", targets=("wq",)))
    trained = inject(toy(), config("lora"), trainable=("head", "embed"))
    save_adapter(trained, tmp_path / "e")
    with refused(f"{tmp_path / 'e'}: 'embed' trained too; a bank stacks only the head"):
        bank.load(1, tmp_path / "e")


def test_adapters_of_one_bank_take_images_prepared_alike(tmp_path: Path) -> None:
    folders = []
    for name, size in (("a", 8), ("b", 8), ("c", 9)):
        base = toy()
        base.preprocessing = {"image_size": size}
        folders.append(saved(tmp_path / name, base=base))
    model = toy()
    model.preprocessing = {"image_size": 7}
    bank = Bank(model, folders[:2])
    assert bank.model.preprocessing == {"image_size": 8}
    assert model.preprocessing == {"image_size": 7}
    message = f"{folders[2]} takes images prepared as {{'image_size': 9}}, not {{'image_size': 8}}"
    with refused(message):
        bank.load(1, folders[2])


@pytest.mark.parametrize("bias", [True, False])
def test_a_smaller_head_ends_in_minus_infinity(bias: bool) -> None:
    head = StackedHead(nn.Linear(4, 3, bias=bias).double())
    ids = Ids()
    head.add(ids, 3, {"weight": torch.Size([5, 4]), "bias": torch.Size([5])})
    weight, x = torch.randn(2, 4).double(), torch.randn(3, 4).double()
    head.fill(1, {"weight": weight, "bias": torch.ones(2)} if bias else {"weight": weight})
    ids.rows = torch.tensor([0, 1, 2])
    found = head(x)
    torch.testing.assert_close(found[0, :3], nn.functional.linear(x[0], head.weight, head.bias))
    torch.testing.assert_close(found[1, :2], weight @ x[1] + int(bias))
    assert (found[0, 3:] == -torch.inf).all()
    assert (found[1, 2:] == -torch.inf).all()
    assert found[2].isnan().all()


def test_a_stack_starts_as_the_base_and_keeps_what_a_slot_lacks() -> None:
    linear, norm = nn.Linear(4, 4).double(), nn.LayerNorm(4).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    ids, x = Ids(), torch.randn(2, 3, 4).double()
    room = {"gain": torch.Size([4]), "bias": torch.Size([4])}
    bare = nn.Linear(4, 4, bias=False).double()
    for base, kind in ((linear, StackedLinear), (bare, StackedLinear), (norm, StackedNorm)):
        stack = kind(base)
        own = {"in_gain": torch.Size([4])} if kind is StackedLinear else {}
        stack.add(ids, 3, room | own)
        assert stack.stacks().keys() == {*room, *own}
        ids.rows = torch.tensor([0, 2])
        torch.testing.assert_close(stack(x), base(x))
        torch.testing.assert_close(stack(x[:, :1]), base(x[:, :1]))
        torch.testing.assert_close(stack(x[:, 0]), base(x[:, 0]))
        stack.fill(2, {"bias": torch.full((4,), 9.0)})
        bias = 0 if base.bias is None else base.bias
        torch.testing.assert_close(stack(x)[1], base(x)[1] - bias + 9)
        stack.fill(2, {})
        torch.testing.assert_close(stack(x), base(x))
        wide = torch.randn(2, 2, 3, 4).double()
        torch.testing.assert_close(stack(wide), base(wide))
