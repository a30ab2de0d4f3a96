"""Mixed batches: every row as its adapter alone, to 1e-6 in float64 and closer."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import adapters.many.bank
from adapters import Bank, inject, load_adapter, save_adapter
from tests.adapters.toy import IMAGES, KINDS, X, adapted, config, move, toy
from tests.shared import long

UNSTACKED = ("loha", "lokr", "lokr of thin", "adaptformer", "adapterplus", "vpt")
STACKED = [kind for kind in KINDS if kind not in UNSTACKED]


def saved(kind: str, folder: Path, n_classes: int = 3, **options: object) -> Path:
    """Save a toy that was adapted at random and has a head of its own."""
    model = toy()
    model.head = nn.Linear(8, n_classes).double()
    model.classes = tuple(f"{kind} {i}" for i in range(n_classes))
    model = inject(model, config(kind, **options), trainable=("head",))
    move(model)
    save_adapter(model, folder)
    return folder


def check(bank: Bank, folders: dict[int, Path]) -> None:
    """Compare rows of a mixed batch with each adapter alone."""
    slots = [0, *folders]
    ids = torch.tensor([slots[i % len(slots)] for i in range(len(IMAGES))])
    found = bank(IMAGES, ids)
    for slot in slots:
        alone = load_adapter(toy(), folders[slot]) if slot else toy().eval()
        rows = found[ids == slot]
        expected = alone(IMAGES[ids == slot])
        n = expected.shape[1]
        torch.testing.assert_close(rows[:, :n], expected, rtol=0, atol=1e-10)
        assert (rows[:, n:] == -torch.inf).all()
        assert bank.classes[slot] == alone.classes


@pytest.mark.parametrize("kind", STACKED)
def test_rows_equal_each_adapter_alone(kind: str, tmp_path: Path) -> None:
    folders = {1: saved(kind, tmp_path / "1", 2), 2: saved(kind, tmp_path / "2", 5)}
    check(Bank(toy(), [*folders.values()]), folders)


def test_methods_ranks_targets_and_heads_are_mixed_in_one_batch(tmp_path: Path) -> None:
    folders = {
        i: saved(kind, tmp_path / str(i), n_classes=2 + i)
        for i, kind in enumerate(STACKED, start=1)
    }
    folders[len(folders) + 1] = saved("lora", tmp_path / "wide", rank=6, targets=("wk", "wq"))
    bank = Bank(toy(), [*folders.values()])
    check(bank, dict(list(folders.items())[:6]))
    check(bank, dict(list(folders.items())[6:]))
    assert len(bank(IMAGES[:0], torch.arange(0))) == 0


@long
def test_a_slot_is_loaded_and_replaced_without_recompiling(tmp_path: Path) -> None:
    folders = {i: saved("dora", tmp_path / str(i), rank=i + 1) for i in (1, 2, 3)}
    bank = Bank(toy(), [folders[1]], n_slots=4, rank=5, n_classes=6)
    torch._dynamo.reset()
    counter = CompileCounter()
    bank.compile(backend=counter, fullgraph=True)
    check(bank, {1: folders[1]})
    n_compiled = counter.frame_count
    bank.load(2, folders[2])
    bank.load(3, folders[3])
    bank.load(1, folders[3])
    check(bank, {1: folders[3], 2: folders[2], 3: folders[3]})
    assert counter.frame_count == n_compiled == 1
    lora = saved("lora", tmp_path / "lora", 6, rank=5)
    bank.load(2, lora)  # what the slot held before leaves nothing behind
    check(bank, {2: lora, 3: folders[3]})
    assert counter.frame_count == 1


@long
def test_a_compiled_bank_may_break_its_graph(tmp_path: Path) -> None:
    folders = {1: saved("lora", tmp_path)}
    bank = Bank(toy(), [*folders.values()])
    bank(IMAGES, torch.zeros(len(IMAGES), dtype=torch.long))
    bank.model.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    torch._dynamo.reset()
    bank.compile(backend="eager")
    check(bank, folders)


def test_threads_ask_one_bank_for_rows_of_their_own(tmp_path: Path) -> None:
    bank = copy.deepcopy(Bank(toy(), [saved("lora", tmp_path / str(i), i + 1) for i in (1, 2)]))
    batches = [(IMAGES, torch.full((len(IMAGES),), i % 3)) for i in range(30)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: bank(*batch), batches))
    for rows, batch in zip(found, batches, strict=True):
        assert torch.equal(rows, bank(*batch))


def test_the_base_is_shared_and_stays_what_it_is(tmp_path: Path) -> None:
    model = toy()
    bank = Bank(model, [saved("lora", tmp_path)])
    pairs = zip(bank.model.parameters(), model.parameters(), strict=True)
    assert all(one.data_ptr() == two.data_ptr() for one, two in pairs)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in bank.parameters())
    assert bank.half().model.embed.weight.dtype == torch.float16
    assert torch.equal(model(X), toy()(X))
    assert [type(m) for m in model.modules()] == [type(m) for m in toy().modules()]


def test_a_bank_computes_in_bfloat16_and_gives_gradients_of_images(tmp_path: Path) -> None:
    folders = [saved(kind, tmp_path / kind, 4) for kind in ("lora", "dora", "ssf")]
    bank, images = Bank(toy(), folders).float(), IMAGES.float().requires_grad_()
    ids = torch.arange(12) % 4
    expected = bank(images, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = bank(images, ids)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.2)
    expected.clamp(min=-1e3).sum().backward()
    assert images.grad is not None
    assert images.grad.any()


def test_an_empty_slot_gives_no_number(tmp_path: Path) -> None:
    bank = Bank(toy(), [saved("lora", tmp_path)], n_slots=3)
    assert bank(IMAGES, torch.full((12,), 2)).isnan().all()
    assert bank.classes[2] == ()


@pytest.mark.parametrize("kind", UNSTACKED)
def test_what_cannot_be_stacked_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be stacked in a bank; load it alone"):
        Bank(toy(), [saved(kind, tmp_path)])


def test_what_has_no_room_is_refused_and_the_slot_keeps_what_it_held(tmp_path: Path) -> None:
    small = saved("lora", tmp_path / "small", rank=2, targets=("wq",))
    bank = Bank(toy(), [small])
    cases = {
        r"no room for a \(4, 8\) of 'blocks.0.attn.wq'; make it": {"rank": 4, "targets": ("wq",)},
        r"no room for 'blocks.0.attn.wv'; make it with that adapter": {
            "rank": 2,
            "targets": ["wv"],
        },
        r"no room for weight \(9, 8\) of 'head'": {"targets": ["wq"], "rank": 2, "n_classes": 9},
    }
    for i, (message, options) in enumerate(cases.items()):
        other = saved("lora", tmp_path / str(i), **options)
        with pytest.raises(ValueError, match=message):
            bank.load(1, other)
    with pytest.raises(ValueError, match="no room for gain"):
        bank.load(1, saved("dora", tmp_path / "dora", rank=2, targets=("wq",)))
    for slot in (0, 2, -1):
        with pytest.raises(ValueError, match=f"slot={slot} is not in 1 <= slot < 2; 0 is the base"):
            bank.load(slot, small)
    check(bank, {1: small})


def test_an_adapter_of_another_base_or_with_more_than_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trained on the base"):
        Bank(toy(1), [saved("lora", tmp_path / "a")])
    model = inject(toy(), config("lora"), trainable=("head", "embed"))
    save_adapter(model, tmp_path / "b")
    with pytest.raises(ValueError, match="'embed' trained too; a bank stacks only the head"):
        Bank(toy(), [tmp_path / "b"])
    with pytest.raises(ValueError, match="the model is adapted already"):
        Bank(adapted("lora"), [tmp_path / "b"])


def test_a_head_alone_is_an_adapter_too(tmp_path: Path) -> None:
    model = inject(toy(), None, trainable=("head",))
    move(model)
    save_adapter(model, tmp_path / "head")
    folders = {1: tmp_path / "head", 2: saved("lora", tmp_path / "lora", 4)}
    check(Bank(toy(), [*folders.values()]), folders)


def test_the_state_of_a_bank_is_the_bases(tmp_path: Path) -> None:
    bank = Bank(toy(), [saved("lora", tmp_path / "a"), saved("ssf", tmp_path / "b")])
    assert bank.model.state_dict().keys() == toy().state_dict().keys()
    assert Bank(toy(), []).preprocessing is None


def test_classes_that_nobody_names_are_numbers(tmp_path: Path) -> None:
    bases = [toy() for _ in range(2)]
    for base in bases:
        del base.classes
    model = inject(bases[0], config("lora"), trainable=("head",))
    move(model)
    save_adapter(model, tmp_path)
    bank = Bank(bases[1], [tmp_path])
    assert bank.preprocessing is None
    assert bank.classes == [(), ("0", "1", "2")]
    expected = model.eval()(IMAGES)
    found = bank(IMAGES, torch.ones(12, dtype=torch.long))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_head_may_have_no_bias(tmp_path: Path) -> None:
    bases = [toy() for _ in range(2)]
    for base in bases:
        base.head = nn.Linear(8, 3, bias=False).double()
        base.head.weight.data.fill_(0.5)
    model = inject(bases[0], config("lora"), trainable=("head",))
    move(model)
    save_adapter(model, tmp_path)
    bank, ids = Bank(bases[1], [tmp_path]), torch.arange(12) % 2
    found, alone = bank(IMAGES, ids), model.eval()(IMAGES)
    torch.testing.assert_close(found[ids == 1], alone[ids == 1], rtol=0, atol=1e-10)
    torch.testing.assert_close(found[ids == 0], bases[1].eval()(IMAGES[ids == 0]))


def test_the_base_is_hashed_once_for_all_its_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, hashed = [saved("lora", tmp_path / str(i)) for i in range(3)], []
    plain = adapters.many.bank.fingerprint

    def noted(model: nn.Module, **options: Any) -> str:
        hashed.append(model)
        return plain(model, **options)

    monkeypatch.setattr("adapters.many.bank.fingerprint", noted)
    monkeypatch.setattr("adapters.identity.fingerprint", noted)
    Bank(toy(), folders)
    assert len(hashed) == 1
