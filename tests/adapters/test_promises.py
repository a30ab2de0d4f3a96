"""What holds on any base: other libraries' models, 16 bits, transforms, export, wrappers."""

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapters
from adapters.layers import AdapterLayer
from adapters.plain import computes_as
from tests.adapters.toy import X, adapted, config, toy

each_method = pytest.mark.parametrize("kind", adapters.METHODS)


class Bypassing(nn.Module):
    """Reads a linear's weight instead of calling it, where it is told to, as timm's BEiT does."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.qkv, self.read = nn.Linear(8, 8), read

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias) if self.read else self.qkv(x)


class Reading(nn.Module):
    """Never calls its linear."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight)


def with_head(part: nn.Module) -> nn.Sequential:
    return nn.Sequential(part, nn.Linear(8, 2))


def lora(model: nn.Module, *targets: str, trainable: tuple[str, ...] = ()) -> nn.Module:
    return adapters.inject(model, adapters.LoRAConfig(targets=targets, rank=2), trainable)


def test_what_its_parent_only_reads_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"'0\.qkv' is never called: Reading reads its weight"):
        lora(with_head(Reading()), "qkv")


def test_a_pass_tells_what_is_never_called(tmp_path: Path) -> None:
    x, model = torch.randn(2, 8), lora(with_head(Bypassing(read=True)), "qkv", trainable=("1",))
    model(x)
    with pytest.raises(ValueError, match=r"0\.qkv: never called; Bypassing reads its weight"):
        adapters.check(model, x)
    for use in (adapters.merge, lambda model: adapters.save_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match=r"'0\.qkv' was never called, and its parent may read"):
            use(model)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("proof", ["pass", "check"])
def test_a_pass_proves_that_it_is_called(proof: str) -> None:
    x, model = torch.randn(2, 8), lora(with_head(Bypassing(read=False)), "qkv")
    expected = model(x) if proof == "pass" else adapters.check(model, x) or model(x)
    torch.testing.assert_close(adapters.merge(model)(x), expected)


def test_a_copy_and_a_pickle_are_proved_by_their_own_passes(tmp_path: Path) -> None:
    x, model = torch.randn(2, 8), lora(with_head(Bypassing(read=False)), "qkv")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(x)
        adapters.save_adapter(twin, tmp_path / "twin")
        assert not twin[0].qkv._forward_pre_hooks
    with pytest.raises(ValueError, match="was never called"):
        adapters.save_adapter(model, tmp_path / "model")


def test_a_check_leaves_no_trace() -> None:
    model = adapted("lora").train()
    model.blocks[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    adapters.check(model, X)
    adapters.check(torch.compile(model, backend="eager"), X)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_trained_module_that_is_not_called_is_named() -> None:
    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = lora(Headless(), "body", trainable=("head",))
    with pytest.raises(ValueError, match="head: never called; Headless reads its weight"):
        adapters.check(model, torch.randn(2, 8))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_timms_linears_that_are_read_are_found(name: str) -> None:
    timm = pytest.importorskip("timm")
    patch = 16 if "16" in name else 14
    small = {"img_size": 2 * patch, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = timm.create_model(name, **small)
    images = torch.randn(1, 3, 2 * patch, 2 * patch)
    with pytest.raises(ValueError, match="never called"):
        adapters.check(lora(model, "qkv"), images)


class Normalised(nn.LayerNorm):
    """Computes what its parent does, another way, as timm's does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class Doubled(nn.Linear):
    """Computes something else than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_that_computes_what_its_parent_does_is_adapted_and_comes_back() -> None:
    assert computes_as(Normalised(8), nn.LayerNorm)
    assert not computes_as(Doubled(8, 8), nn.Linear)
    model = nn.Sequential(Normalised(8), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    for method in (adapters.NormConfig, adapters.SSFConfig, adapters.BitFitConfig):
        tuned = adapters.inject(copy.deepcopy(model), method(targets=("0",)))
        with torch.no_grad():
            for p in tuned.parameters():
                if p.requires_grad:
                    p.add_(0.3)
        expected = tuned(x)
        merged = adapters.merge(tuned)
        assert type(merged[0]) is Normalised
        torch.testing.assert_close(merged(x), expected)


def test_a_name_is_not_a_pattern_too() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({"wq": nn.Linear(8, 8)})
            self.attn_wq = nn.Linear(8, 8)

    model = lora(Both(), "attn.wq")
    assert isinstance(model.attn["wq"], AdapterLayer)
    assert not isinstance(model.attn_wq, AdapterLayer)


def test_merging_one_half_of_a_tie_leaves_the_other_trainable() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    merged = adapters.merge(lora(model, "0"))
    assert all(p.requires_grad for p in merged.parameters())


def test_a_block_with_prompts_is_a_block_and_uses_parts_that_are_replaced() -> None:
    model = adapters.inject(toy(), adapters.VPTConfig(n_prompts=2), trainable=("head",))
    block, kind = model.blocks[0], type(toy().blocks[0])
    assert isinstance(block, kind)
    before = model(X)
    block.ffn = nn.Sequential(*block.ffn, nn.Tanh())
    assert not torch.allclose(model(X), before)
    assert torch.equal(copy.deepcopy(model)(X), model(X))
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))
    assert len(adapters.eject(model).blocks[0].ffn) == 4


def test_prompts_drop_out_for_each_image() -> None:
    block = adapters.VPTConfig(n_prompts=64, dropout=0.5).adapt(toy().blocks[0], "blocks.0")
    seen: list[Tensor] = []
    block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block.train()(torch.randn(2, 3, 8, dtype=torch.float64))
    assert not torch.equal(seen[0][0, 3:], seen[0][1, 3:])


@pytest.mark.parametrize("batch_first", [True, False])
def test_prompts_that_would_be_other_images_are_refused(batch_first: bool) -> None:
    block = nn.TransformerEncoderLayer(8, 2, 8, batch_first=batch_first)
    if batch_first:
        layer = adapters.VPTConfig(n_prompts=2).adapt(block, "blocks.0")
        layer(torch.randn(1, 3, 8)).square().sum().backward()
        assert layer.prompts.grad.any()
        return
    with pytest.raises(ValueError, match=r"'blocks\.0' takes tokens \(N, B, D\), not \(B, N, D\)"):
        adapters.VPTConfig(n_prompts=2).adapt(block, "blocks.0")


def test_prompts_beside_positions_are_refused() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.wq = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor, rope: Any = None) -> Tensor:
            return self.wq(self.norm(x)) * rope[0]

    block = adapters.VPTConfig(n_prompts=2).adapt(Rotary(), "blocks.0")
    with pytest.raises(ValueError, match="reads positions or a mask beside its tokens"):
        block(torch.randn(1, 4, 8), rope=(torch.ones(4, 1),))


def test_names_that_a_wrapper_needs_are_refused() -> None:
    block = toy().blocks[0]
    block.prompts = 3
    with pytest.raises(ValueError, match="Block has an attribute 'prompts', which PromptedBlock"):
        adapters.VPTConfig(n_prompts=2).adapt(block, "blocks.0")


def test_a_forward_of_its_own_is_refused() -> None:
    model = toy()
    model.blocks[0].attn.wq.forward = lambda x: x
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn\.wq' has a forward of its own"):
        lora(model, "wq")


def test_compiled_parts_are_refused_and_wrapped_models_are_reached(tmp_path: Path) -> None:
    model = toy()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    with pytest.raises(ValueError, match=r"blocks\.0 is wrapped in OptimizedModule; adapt first"):
        lora(model, "wq")
    inner = adapted("lora")
    outer = torch.compile(inner, backend="eager")
    adapters.save_adapter(outer, tmp_path)
    torch.testing.assert_close(adapters.load_adapter(toy(), tmp_path)(X), inner(X))
    with adapters.disabled(outer):
        assert torch.equal(inner(X), toy()(X))
    assert adapters.fingerprint(outer) == adapters.fingerprint(inner)
    assert adapters.mergeable(outer)
    adapters.eject(outer)
    assert torch.equal(inner(X), toy()(X))


def test_a_frozen_batch_norm_is_refused_only_to_train(tmp_path: Path) -> None:
    def base() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()

    with pytest.raises(ValueError, match="'1' keeps running statistics, which training changes"):
        lora(base(), "0")
    model = adapters.inject(base(), adapters.LoRAConfig(targets=("0",), rank=2), to_train=False)
    adapters.save_adapter(model, tmp_path)
    x = torch.randn(3, 8)
    torch.testing.assert_close(adapters.load_adapter(base(), tmp_path)(x), model(x))
    with pytest.raises(ValueError, match="keeps running statistics"):
        adapters.load_adapter(base(), tmp_path, train=True)


def test_the_base_gets_its_modes_back(tmp_path: Path) -> None:
    adapters.save_adapter(adapted("lora"), tmp_path)
    base = toy().train()
    assert all(m.training for m in adapters.eject(adapters.load_adapter(base, tmp_path)).modules())


def test_starts_that_come_from_the_weight_are_whole_tensors() -> None:
    for init in ("pissa", "olora"):
        layer = adapters.LoRAConfig(rank=2, init=init).adapt(nn.Linear(64, 64), "wq")
        for factor in (layer.lora_a, layer.lora_b):
            assert factor.is_contiguous()
            assert factor.untyped_storage().nbytes() == factor.nbytes


def test_a_large_base_is_hashed_once_and_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("adapters.identity")
    calls, plain = [], module.fingerprint
    monkeypatch.setattr(module, "fingerprint", lambda *a, **k: calls.append(1) or plain(*a, **k))
    model = adapters.inject(toy(), config("lora"), trainable=("head",))
    assert not calls
    assert module.base_fingerprint(model) == module.base_fingerprint(model)
    assert calls == [1]
