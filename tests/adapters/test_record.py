"""What inject notes and how it is undone: records, replaced modules, fingerprints, copies."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import adapters
from adapters import LoRAConfig, disabled, eject, fingerprint, inject, merge, shared_copy
from adapters.identity import base_fingerprint, whole
from adapters.record import (
    injection,
    refuse_doubtful,
    release,
    replace_modules,
    set_classes,
    unwrapped,
)
from adapters.restore import gathered, mergeable
from tests.adapters.toy import X, adapted, config, move, toy


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_a_record_tells_what_was_done() -> None:
    model = toy()
    model.embed.weight.requires_grad_(False)
    model.preprocessing = {"image_size": 8}
    wq, head = model.blocks[0].attn.wq, model.head
    settings = config("lora")
    inject(model, settings, trainable=("head",), fingerprint="known")
    record = injection(model)
    assert record.config == settings
    assert record.adapted["blocks.0.attn.wq"] is wq
    assert record.trained == {"head": head}
    assert record.classes == ("a", "b", "c")
    assert record.preprocessing == {"image_size": 8}
    assert record.fingerprint == base_fingerprint(model) == "known"
    names = {name for name, _ in toy().named_parameters()}
    assert record.required_grad == names - {"embed.weight"}
    assert record.doubtful == set()
    assert not record.disabled


def test_a_model_without_classes_or_preprocessing_has_none() -> None:
    record = injection(inject(nn.Sequential(nn.Linear(2, 2)), LoRAConfig(targets=("0",), rank=1)))
    assert (record.classes, record.preprocessing, record.fingerprint) == (None, None, None)


@pytest.mark.parametrize("call", [injection, merge, eject, mergeable, base_fingerprint])
def test_a_model_that_is_not_ready_is_refused_in_a_whole_sentence(call: Any) -> None:
    with refused("the model has no adapters; inject or load them first"):
        call(toy())
    model = adapted("lora")
    with disabled(model):
        message = "the adapters are switched off; leave `with disabled(model)` first"
        with refused(message):
            call(model)
    with refused("the model is adapted already; eject or merge it before another inject"):
        inject(model, config("lora"))
    with refused("nothing would train; give a config, or names of modules in trainable"):
        inject(toy(), None)


def test_only_known_wrappers_are_looked_into() -> None:
    model = adapted("lora")
    parallel = nn.DataParallel(model)
    assert unwrapped(parallel) is model
    assert unwrapped(torch.compile(parallel, backend="eager")) is model
    assert unwrapped(model) is model
    other = nn.ModuleDict({"module": model})
    assert unwrapped(other) is other
    empty = nn.DataParallel(model)
    del empty.module
    assert unwrapped(empty) is empty


def test_doubt_about_a_layer_is_told_by_the_first_name() -> None:
    record = injection(adapted("lora"))
    refuse_doubtful(record)
    record.doubtful |= {"b", "a"}
    message = (
        "'a' was never called, and its parent may read its weight directly; "
        "adapters.check(model, inputs) tells, or leave it out of targets"
    )
    with refused(message):
        refuse_doubtful(record)


def test_classes_are_set_only_where_they_differ() -> None:
    class Guarded(nn.Module):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    model = Guarded()
    set_classes(model, None)
    assert not hasattr(model, "classes")
    set_classes(model, ("a",))
    assert vars(model)["classes"] == ("a",)
    set_classes(model, None)
    assert vars(model)["classes"] is None


def test_a_replaced_module_takes_over_mode_dtype_and_buffers() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).double().train()
    model[0].eval()
    norm, linear = nn.BatchNorm1d(3), nn.Linear(3, 3)
    linear.extra = nn.Parameter(torch.ones(1))
    replace_modules(model, {"0": norm, "1": linear.eval()})
    assert (model[0], model[1]) == (norm, linear)
    assert (norm.training, linear.training) == (False, True)
    assert norm.running_mean.dtype == linear.weight.dtype == torch.float64
    assert linear.extra.dtype == torch.float32  # which the old one did not have


def test_releasing_gives_back_what_trained() -> None:
    model = toy()
    model.head.bias.requires_grad_(False)
    model.tied = nn.Linear(8, 3)
    model.tied.weight = model.head.weight
    before = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    inject(model, config("lora"))
    assert not model.tied.weight.requires_grad
    merged = {name for name, p in merge(model).named_parameters() if p.requires_grad}
    assert merged == {name for name, p in toy().named_parameters() if name != "head.bias"} | {
        "tied.bias"
    }
    assert before["tied.weight"]
    with pytest.raises(KeyError):
        release(toy())


def test_targets_inside_of_trained_modules_can_be_left_out() -> None:
    targets = ("wq", "ffn.0")
    settings = LoRAConfig(targets=targets, rank=1)
    model = inject(toy(), settings, trainable=("blocks.1",), skip_trained=True)
    assert [*injection(model).adapted] == ["blocks.0.attn.wq", "blocks.0.ffn.0"]
    assert injection(model).config.targets == targets
    message = "'blocks.1.attn.wq' lies inside 'blocks.1', which is trainable; choose one"
    with refused(message):
        inject(toy(), settings, trainable=("blocks.1",))
    model = inject(toy(), config("lora", targets=("blocks.1.attn.w.",)), trainable=("head",))
    assert injection(model).config.targets == tuple(f"blocks.1.attn.w{x}" for x in "qkvo")


def test_default_targets_may_be_missing_in_the_chosen_layers() -> None:
    model = nn.ModuleDict({f"blocks_{i}": nn.ModuleDict({"wq": nn.Linear(2, 2)}) for i in (0, 1)})
    for name in ("wk", "wv", "wo"):
        model["blocks_0"][name] = nn.Linear(2, 2)
    made = inject(copy.deepcopy(model), LoRAConfig(rank=1, layers=(1,)))
    assert [*injection(made).adapted] == ["blocks_1.wq"]
    assert injection(made).config.layers == ()
    with refused("target 'wk' is in none of the layers [1]"):
        inject(model, LoRAConfig(rank=1, targets=("wq", "wk"), layers=(1,)))


def test_a_fingerprint_tells_names_shapes_values_and_nothing_else() -> None:
    def model(**changes: Any) -> nn.ModuleDict:
        made = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.BatchNorm1d(3)})
        for p in made.parameters():
            nn.init.ones_(p)
        for name, tensor in changes.items():
            made.get_submodule(name).weight = nn.Parameter(tensor)
        return made

    first = fingerprint(model())
    assert first == "209605969848e2c4"  # which stands in saved adapters
    assert fingerprint(model().half()) == fingerprint(model().double()) == first
    others = [model(a=torch.full((3, 2), 2.0)), model(a=torch.ones(2, 3)), nn.Linear(2, 3)]
    counted = model()
    counted["b"].num_batches_tracked += 1
    renamed = nn.ModuleDict({"a": model()["a"], "c": model()["b"]})
    found = [fingerprint(other) for other in (*others, counted, renamed)]
    assert len({first, *found}) == 6
    assert fingerprint(model(a=torch.zeros(3, 2)), exclude=("a",)) == fingerprint(
        model(), exclude=("a",)
    )
    with pytest.raises(ValueError, match="^exclude 'c' matches no module; "):
        fingerprint(model(), exclude=("c",))


def test_a_fingerprint_after_adapting_and_training_is_that_of_before() -> None:
    model = toy()
    expected = fingerprint(model, exclude=("head",))
    inject(model, config("dora"), trainable=("head",))
    move(model)
    assert fingerprint(model) == base_fingerprint(model) == expected
    assert fingerprint(nn.DataParallel(model)) == expected


def test_a_shared_copy_has_its_own_names_for_the_same_memory() -> None:
    model = toy()
    model.register_buffer("count", torch.zeros(1))
    model.head.bias.requires_grad_(False)
    twin = shared_copy(model)
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert a is not b
        assert a.data_ptr() == b.data_ptr()
        assert a.requires_grad == b.requires_grad == (name != "head.bias")
    assert twin.count is model.count
    twin.requires_grad_(False)
    assert model.head.weight.requires_grad


def test_a_sharded_layer_is_merged_from_whole_tensors() -> None:
    class Sharded(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            return self.detach().as_subclass(torch.Tensor) + 1

    layer = adapted("lora").blocks[0].attn.wq
    assert gathered(layer) is layer
    assert whole(layer.weight) is layer.weight
    before = layer.lora_a.detach().clone()
    layer.lora_a = nn.Parameter(before.as_subclass(Sharded))
    found = gathered(layer)
    assert found is not layer
    assert torch.equal(found.lora_a, before + 1)
    assert torch.equal(found.lora_b, layer.lora_b)
    assert type(found.lora_a) is nn.Parameter


def test_ejecting_gives_back_preprocessing_classes_and_modes() -> None:
    model = toy()
    model.preprocessing = {"image_size": 8}
    inject(model, config("lora"), trainable=("head",))
    model.preprocessing, model.classes = {"image_size": 9}, ("x",)
    injection(model).modes = {"blocks.0": True}
    model.eval()
    eject(model)
    assert model.preprocessing == {"image_size": 8}
    assert model.classes == ("a", "b", "c")
    assert model.blocks[0].training
    assert not model.blocks[1].training
    model.preprocessing = None
    inject(model, config("lora"))
    model.preprocessing = 3
    assert eject(model).preprocessing == 3  # it had none to give back


def test_switching_off_reaches_wrapped_models_and_comes_back_after_an_error() -> None:
    model = adapted("lora")
    on, off = model(X), toy()(X)
    with pytest.raises(KeyError), disabled(nn.DataParallel(model)):
        raise KeyError(torch.equal(model(X), off))
    assert torch.equal(model(X), on)
    assert all(layer.enabled for layer in model.modules() if hasattr(layer, "enabled"))
    assert adapters.mergeable(model)
    assert not adapters.mergeable(adapted("vpt"))


def test_each_part_keeps_its_mode_where_its_module_is_replaced() -> None:
    for settings, trainable in ((None, ("blocks.0",)), (config("vpt"), ("head",))):
        model = toy()
        model.blocks[0].ffn[1].eval()
        before = {name: part.training for name, part in model.named_modules()}
        inject(model, settings, trainable=trainable)
        assert {name: part.training for name, part in model.named_modules()} == before
        with disabled(model):
            assert not model.blocks[0].ffn[1].training
        assert {name: part.training for name, part in model.named_modules()} == before
        eject(model)
        assert {name: part.training for name, part in model.named_modules()} == before
