"""Optimizers: what each trains, how fast, and Muon; and the schedules of their learning rates."""

import copy

import pytest
import torch
from torch import Tensor, nn

import adapters
from tests.shared import TINY
from vitft import VisionTransformer, ViTConfig
from vitft.optimizers.build import build_optimizers, lr_factor, set_lr
from vitft.optimizers.muon import Muon, orthogonalise


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_weight_decay_spares_biases_norms_and_tokens(stem: str) -> None:
    model = VisionTransformer(ViTConfig(**TINY, stem=stem))
    assert decayed(model) == {
        name
        for name, p in model.named_parameters()
        if name.endswith("weight") and "norm" not in name
    }


def test_muon_and_adamw_share_the_parameters() -> None:
    model = VisionTransformer(ViTConfig(**TINY))
    both = build_optimizers(model, name="muon", lr=1, weight_decay=0.0)
    groups = [
        {id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in both
    ]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in model.parameters()}
    assert len(groups[1]) == 12  # wq wk wv wo w1 w2 of two blocks


def test_a_part_of_the_parameters_can_learn_faster() -> None:
    model = nn.Module()
    model.lora_a, model.lora_b = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    factors = {"lora_b": 16.0}
    optimizers = build_optimizers(
        model, name="adamw", lr=1e-3, weight_decay=0.0, lr_factors=factors
    )
    set_lr(optimizers, 1e-2)
    (model.lora_a.sum() + model.lora_b.sum()).backward()
    optimizers[0].step()
    moved = 1 - torch.stack([model.lora_a.mean(), model.lora_b.mean()])
    torch.testing.assert_close(moved, torch.tensor([0.01, 0.16]))


def decayed(model: nn.Module) -> set[str]:
    """Return the names of the trainable parameters that weight decay is for."""
    names = {id(p): name for name, p in model.named_parameters()}
    (optimizer,) = build_optimizers(model, name="adamw", lr=1, weight_decay=0.5)
    return {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}


@pytest.mark.parametrize("rank", [1, 2])
def test_factors_of_any_rank_decay(rank: int) -> None:
    model = VisionTransformer(ViTConfig(**TINY, n_classes=1))
    adapters.inject(model, adapters.DoRAConfig(rank=rank, targets=("wq",)), trainable=("head",))
    factors = {f"blocks.{i}.attn.wq.lora_{ab}" for i in (0, 1) for ab in "ab"}
    assert decayed(model) == {*factors, "head.weight"}  # not the magnitude


def test_the_first_kernel_of_a_grey_stem_decays() -> None:
    model = VisionTransformer(ViTConfig(**TINY, stem="conv", n_channels=1))
    assert "patch_embed.conv1.weight" in decayed(model)


def test_a_vector_that_is_stored_as_a_matrix_does_not_decay() -> None:
    model = VisionTransformer(ViTConfig(**TINY))
    adapters.inject(model, adapters.IA3Config(), trainable=("head",))
    assert decayed(model) == {"head.weight"}


@pytest.mark.parametrize("config", [None, adapters.IA3Config()])
def test_muon_without_a_matrix_is_refused(config: adapters.AdapterConfig | None) -> None:
    model = adapters.inject(VisionTransformer(ViTConfig(**TINY)), config, trainable=("head",))
    with pytest.raises(ValueError, match="muon is for the matrices of blocks, and none trains"):
        build_optimizers(model, name="muon", lr=1, weight_decay=0.1)


def test_a_copy_of_muon_goes_on() -> None:
    matrix = nn.Parameter(torch.randn(3, 4))
    optimizer = copy.deepcopy(Muon([matrix], lr=0.1))
    (copied,) = optimizer.param_groups[0]["params"]

    def closure() -> Tensor:
        loss = copied.square().sum()
        loss.backward()
        return loss

    before = copied.detach().clone()
    assert optimizer.step(closure) == before.square().sum()
    assert not torch.equal(copied, before)


@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 7, 7)])
def test_orthogonalising_turns_every_direction_alike(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalise(x, 10)
    values = u.mT @ found @ v.mT  # diagonal: the same directions, other lengths
    assert (values.diagonal(dim1=1, dim2=2) - 0.95).abs().max() < 0.3
    assert (values - torch.diag_embed(values.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_muon_is_torchs() -> None:
    ours, theirs = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.empty(6, 4))
    theirs.data = ours.data.clone()
    mine = Muon([ours], lr=0.01, weight_decay=0.1)
    other = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", momentum=0.95
    )
    for _ in range(3):
        ours.grad = torch.randn(6, 4)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-4)  # torch's is in bfloat16


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_learning_rate_may_be_a_tensor_that_is_filled(name: str) -> None:
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = VisionTransformer(ViTConfig(**TINY))
        options = {"name": name, "lr": 1.0, "weight_decay": 0.1, "recorded": recorded}
        optimizers = build_optimizers(model, **options)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        for lr in (1e-2, 1e-3):
            set_lr(optimizers, lr)
            for p in model.parameters():
                p.grad = torch.sin(torch.arange(p.numel()).view_as(p))
            for optimizer in optimizers:
                optimizer.step()
        assert all(torch.is_tensor(rate) is recorded for rate in rates)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        ("cosine", 0.0, 0.0), ("cosine", 0.05, 0.5), ("cosine", 0.1, 1.0),
        ("cosine", 0.55, 0.5), ("cosine", 1.0, 0.0),
        ("linear", 0.55, 0.5), ("constant", 0.9, 1.0),
        ("multistep", 79 / 150, 1.0), ("multistep", 80 / 150, 0.1), ("multistep", 130 / 150, 0.01),
    ],
)  # fmt: skip
def test_schedules_rise_and_fall(schedule: str, progress: float, factor: float) -> None:
    assert lr_factor(schedule, progress, warmup=0.1) == pytest.approx(factor)


def test_a_block_learns_the_slower_the_more_stand_behind_it() -> None:
    model = VisionTransformer(ViTConfig(**TINY, n_classes=3))
    options = {"name": "adamw", "lr": 1.0, "weight_decay": 0.1}
    (optimizer,) = build_optimizers(model, layer_decay=0.5, lr_factors={"weight": 3.0}, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: g["lr_factor"] for g in optimizer.param_groups for p in g["params"]}
    assert found["head.bias"] == found["norm.bias"] == 1
    assert found["blocks.1.ffn.w1.bias"] == 0.5
    assert found["blocks.1.attn.wq.weight"] == 1.5
    assert found["blocks.0.norm1.bias"] == 0.25
    assert found["pos_embedding"] == found["cls_token"] == 0.125
    assert found["patch_embed.weight"] == 0.375
