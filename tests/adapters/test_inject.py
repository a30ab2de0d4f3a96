"""Injecting, switching off, ejecting and merging, on a transformer that is not ours."""

import contextlib
import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from adapters import LoRAConfig, disabled, eject, fingerprint, inject, merge
from adapters.config import AdapterConfig
from adapters.targets import matching
from tests.adapters.toy import (
    KINDS,
    MERGED,
    WRAPPERS,
    Toy,
    X,
    adapted,
    added,
    config,
    every_kind,
    fit,
    snapshot,
    toy,
)
from tests.processes import in_processes

merging = pytest.mark.parametrize("kind", MERGED)


@every_kind
def test_keys_are_the_base_keys_and_the_declared_ones(kind: str) -> None:
    base, model = toy(), inject(toy(), config(kind))
    settings = vars(model)["_injection"].config
    own = {*settings.peft_tensors, "start_a", "start_b"}
    targets = set(matching(toy(), settings.targets, "target"))
    assert {key.rpartition(".")[0] for key in added(model)} == targets
    assert {key.rpartition(".")[2] for key in added(model)} <= own
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert set(result.missing_keys) == added(model)
    assert not result.unexpected_keys


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("adapterplus", "vpt")])
def test_a_fresh_adapter_changes_nothing(kind: str) -> None:
    model = inject(toy(), config(kind), trainable=("head",))
    torch.testing.assert_close(model(X), toy()(X), rtol=0, atol=0 if kind == "lora" else 1e-12)


@every_kind
def test_training_moves_adapters_and_head_only(kind: str) -> None:
    model = inject(toy(), config(kind), trainable=("head",))
    before = copy.deepcopy(model.state_dict())
    kept = {key for key in before if key.endswith(("start_a", "start_b"))}
    expected = added(model) - kept | {"head.weight", "head.bias"}
    fit(model)
    after = model.state_dict()
    assert {key for key in after if not torch.equal(after[key], before[key])} == expected
    assert {key for key, p in model.named_parameters() if p.grad is not None} == expected


def test_without_a_config_only_the_head_trains() -> None:
    model = inject(toy(), None, trainable=("head",))
    fit(model)
    assert {key for key, p in model.named_parameters() if p.grad is not None} == {
        "head.weight",
        "head.bias",
    }
    assert type(eject(model).head) is nn.Linear


@merging
def test_merging_keeps_logits_keys_and_types(kind: str) -> None:
    model = adapted(kind)
    expected = model(X)
    assert merge(model) is model
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)
    assert list(model.state_dict()) == list(toy().state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in toy().modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


@merging
def test_merging_in_half_precision_casts_once(kind: str) -> None:
    model = adapted(kind).to(torch.bfloat16)
    name = next(iter(vars(model)["_injection"].adapted))
    expected = model.get_submodule(name).adapted_weight()
    assert expected.dtype == torch.float32
    assert torch.equal(merge(model).get_submodule(name).weight, expected.bfloat16())


@merging
def test_merging_refuses_what_is_not_finite_and_changes_nothing(kind: str) -> None:
    model = adapted(kind)
    name = next(iter(vars(model)["_injection"].adapted))
    with torch.no_grad():
        for key in added(model):
            if key.startswith(f"{name}."):
                model.state_dict()[key].fill_(float("inf"))
    before = str(snapshot(model))
    with pytest.raises(ValueError, match=f"merging '{name}' gives values that are not"):
        merge(model)
    assert str(snapshot(model)) == before


@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_has_no_merged_form_is_refused_and_nothing_changes(kind: str) -> None:
    model = adapted(kind)
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot be merged; keep it, or eject it"):
        merge(model)
    assert snapshot(model) == before


@every_kind
def test_ejecting_after_training_is_the_base_bit_for_bit(kind: str) -> None:
    model = toy()
    model.embed.weight.requires_grad_(False)
    model.blocks[0].eval()
    before, output = snapshot(model), model(X)
    fit(inject(model, config(kind), trainable=("head", "embed")))
    assert eject(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(X), output)


@every_kind
def test_ejecting_follows_casts_modes_and_assigned_tensors(kind: str) -> None:
    model = adapted(kind).float()
    model.load_state_dict(toy(1).float().state_dict(), strict=False, assign=True)
    eject(model.eval())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.blocks[0].attn.wq.weight, toy(1).float().blocks[0].attn.wq.weight)
    assert not any(module.training for module in model.modules())


@every_kind
def test_disabled_is_the_base_also_nested_and_after_an_error(kind: str) -> None:
    model = adapted(kind)
    model.classes = ("x", "y", "z")
    expected = model(X)
    with contextlib.suppress(KeyError), disabled(model):
        with disabled(model):
            assert torch.equal(model(X), toy()(X))
        assert torch.equal(model(X), toy()(X))
        assert model.classes == ("a", "b", "c")
        raise KeyError
    assert torch.equal(model(X), expected)
    assert model.classes == ("x", "y", "z")


@pytest.mark.parametrize("way_back", [merge, eject])
def test_no_way_back_inside_disabled(way_back: object) -> None:
    model = adapted("lora")
    with disabled(model), pytest.raises(ValueError, match="the adapters are switched off; leave"):
        way_back(model)


@pytest.mark.parametrize("call", [merge, eject, lambda model: disabled(model).__enter__()])
def test_a_model_without_adapters_has_no_way_back(call: object) -> None:
    with pytest.raises(ValueError, match="the model has no adapters; inject or load them first"):
        call(toy())


@every_kind
def test_a_model_can_be_adapted_again_after_either_way_back(kind: str) -> None:
    for way_back in (merge, eject) if kind in MERGED else (eject,):
        model = way_back(adapted(kind))
        expected = model(X)
        inject(model, config(kind))
        with disabled(model):
            assert torch.equal(model(X), expected)


@every_kind
def test_the_fingerprint_tells_the_base_only(kind: str) -> None:
    model = toy()
    before = fingerprint(model, exclude=("head",))
    assert before != fingerprint(model)
    assert before == fingerprint(model.float(), exclude=("head",))
    assert before != fingerprint(toy(1), exclude=("head",))
    both = fingerprint(model, exclude=("head", "embed"))
    inject(model, config(kind), trainable=("head",))
    assert fingerprint(model) == before
    fit(model.double())
    assert fingerprint(model) == before
    assert fingerprint(model, exclude=("embed",)) == both
    assert fingerprint(eject(model), exclude=("head",)) == before


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "wqq",
            r"target 'wqq' matches no module; did you mean 'wq'\? there are: attn, blocks, emb",
        ),
        ("q", "target 'q' matches no module"),
        ("locks.0.attn.wq", "target 'locks.0.attn.wq' matches no module"),
        ("blocks", "lies inside 'blocks', which is a target; choose one"),
        ("head", "'head' is both a target and trainable; choose one"),
    ],
)
@every_kind
def test_a_failed_injection_changes_nothing(kind: str, target: str, message: str) -> None:
    model = toy()
    before = snapshot(model)
    settings = config(kind)
    with pytest.raises(ValueError, match=message):
        inject(model, replace(settings, targets=(*settings.targets, target)), trainable=("head",))
    assert snapshot(model) == before


def test_a_second_injection_is_refused() -> None:
    model = adapted("lora")
    before = snapshot(model)
    with pytest.raises(ValueError, match="the model is adapted already; eject or merge it before"):
        inject(model, config("lora"))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ((), "nothing would train; give a config, or names of modules in trainable"),
        (("haed",), "trainable 'haed' matches no module; did you mean 'head'?"),
        ("head", r"trainable 'head' is one string; write \('head',\)"),
        (("ffn", "ffn.0"), "'blocks.0.ffn.0' lies inside 'blocks.0.ffn', which is trainable"),
    ],
)
def test_trainable_must_name_modules(trainable: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inject(toy(), None, trainable=trainable)


def test_a_target_inside_a_trainable_module_is_refused() -> None:
    with pytest.raises(ValueError, match="'blocks.1.attn.wq' lies inside 'blocks.1', which is"):
        inject(toy(), LoRAConfig(rank=2, targets=("wq",)), trainable=("blocks.1",))


def lora(*targets: str) -> AdapterConfig:
    return LoRAConfig(rank=2, targets=targets)


def test_modules_that_bypass_their_linears_are_refused() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
    message = "'layers.0.linear1' is never called: nn.TransformerEncoderLayer reads its weight"
    with pytest.raises(ValueError, match=message):
        inject(encoder, lora("linear1"))
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    message = "'attn.out_proj' is never called: nn.MultiheadAttention reads its weight directly"
    with pytest.raises(ValueError, match=message):
        inject(attention, lora("out_proj"))
    root = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    with pytest.raises(ValueError, match="'linear1' is never called: nn.TransformerEncoderLayer"):
        inject(root, LoRAConfig(targets=("linear1",)))


def test_a_linear_under_two_names_is_refused() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    with pytest.raises(ValueError, match="'a' and 'b' are one module; it can't be replaced"):
        inject(model, lora("a"))


def test_training_a_tied_parameter_is_refused_and_adapting_one_is_not() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    model["head"].weight = model["a"].weight
    with pytest.raises(ValueError, match="'a.weight' and 'head.weight' are one parameter; a train"):
        inject(model, None, trainable=("head",))
    inject(model, lora("a"))
    assert model["a"].weight is model["head"].weight
    assert torch.equal(merge(model)["head"].weight, model["a"].weight)


def test_a_frozen_batch_norm_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with pytest.raises(ValueError, match="'1' keeps running statistics.*name it in trainable"):
        inject(model, lora("0"))
    fit_input = torch.randn(4, 8)
    inject(model, lora("0"), trainable=("1",)).train()(fit_input)
    assert model[1].running_mean.any()
    assert not eject(model)[1].running_mean.any()


def test_a_wrapped_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the model is wrapped in OptimizedModule; adapt first"):
        inject(torch.compile(toy(), backend="eager"), lora("wq"))


def test_hooks_are_refused() -> None:
    model = toy()
    model.blocks[0].attn.wq.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="'blocks.0.attn.wq' has hooks, which an adapter would lo"):
        inject(model, lora("wq"))


def train_half(folder: str, kind: str) -> None:
    """Train half a batch in one of two processes, and keep what that gives."""
    rank = dist.get_rank()
    model = inject(toy(), config(kind), trainable=("head",))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        F.cross_entropy(parallel(X[rank : rank + 1]), torch.tensor([rank])).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({k: p for k, p in model.named_parameters() if p.requires_grad}, f"{folder}/{rank}")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    in_processes(2, tmp_path, train_half, str(tmp_path), "dora")
    alone: Toy = inject(toy(), config("dora"), trainable=("head",))
    fit(alone, steps=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key])
        torch.testing.assert_close(value, alone.get_parameter(key))


class Stateful(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {}


def test_what_has_no_copy_that_trains_is_refused_and_nothing_changes() -> None:
    heads = [nn.Linear(8, 3), nn.Linear(8, 3), Stateful(8, 3), nn.Linear(8, 3)]
    heads[0].doubled = 2 * heads[0].weight
    heads[1].whole = nn.Parameter(torch.arange(3), requires_grad=False)
    heads[3].forward = lambda x: F.linear(x, heads[3].weight)
    messages = (
        "'head' has no copy that trains: Only Tensors created explicitly",
        "'head' has no copy that trains: only Tensors of floating point",
        "'head' has a state that is no tensor, which no adapter's file holds",
        "'head' has a forward of its own, which a copy that trains would share",
    )
    for head, message in zip(heads, messages, strict=True):
        model = toy()
        model.head = head
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            inject(model, lora("wq"), trainable=("head",))
        assert [p.requires_grad for p in model.parameters()] == flags
        assert model.head is head
