"""What every method starts from: which numbers are drawn, how, and which are zero or one."""

import math

import pytest
import torch
from torch import Tensor, nn

import adapters
from adapters.methods.inits import INITS

O, I, R = 96, 128, 16  # noqa: E741 (out, in, rank)


def started(config: adapters.AdapterConfig, module: nn.Module | None = None) -> dict[str, Tensor]:
    """Return what an adapted linear (O, I), or another module, trains."""
    layer = config.adapt(module or nn.Linear(I, O), "blocks.0")
    return {n: p.detach() for n, p in layer.named_parameters() if n not in ("weight", "bias")}


def is_uniform(x: Tensor, bound: float) -> bool:
    """Return whether numbers look like those of a uniform distribution within a bound."""
    near = 4 * bound / math.sqrt(3 * x.numel())  # four deviations of the mean
    fits = abs(x.std().item() / (bound / math.sqrt(3)) - 1) < 0.1
    return (
        bool(x.abs().max() <= bound and x.abs().max() > 0.95 * bound)
        and fits
        and abs(x.mean().item()) < near
    )


@pytest.mark.parametrize("config", [adapters.LoRAConfig, adapters.DoRAConfig])
def test_loras_a_is_uniform_and_its_b_zero(config: type[adapters.LoRAConfig]) -> None:
    found = started(config(rank=R))
    assert is_uniform(found["lora_a"], 1 / math.sqrt(I))
    assert not found["lora_b"].any()


def test_a_gaussian_a_has_the_deviation_that_peft_gives_it() -> None:
    a, b = INITS["gaussian"](torch.randn(O, I), R, 1.0)
    assert a.std().item() == pytest.approx(1 / R, rel=0.1)
    assert abs(a.mean().item()) < 4 / R / math.sqrt(a.numel())
    assert not b.any()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_pissa_starts_at_the_closest_of_its_rank(scale: float) -> None:
    weight = torch.randn(O, I, dtype=torch.float64)
    a, b = INITS["pissa"](weight, R, scale)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(scale * b @ a, u[:, :R] * s[:R] @ v[:R])
    torch.testing.assert_close(a.square().sum(1), b.square().sum(0))  # shared evenly


def test_olora_starts_at_the_first_of_a_qr() -> None:
    weight = torch.randn(O, I, dtype=torch.float64)
    a, b = INITS["olora"](weight, R, 2.0)
    torch.testing.assert_close(b.T @ b, torch.eye(R, dtype=torch.float64))
    torch.testing.assert_close((b @ a)[:, :R], weight[:, :R])


def test_doras_magnitude_starts_at_the_rows_lengths() -> None:
    linear = nn.Linear(I, O)
    found = started(adapters.DoRAConfig(rank=R), linear)
    torch.testing.assert_close(found["magnitude"], linear.weight.detach().norm(dim=1))


def test_veras_matrices_are_kaimings_and_its_vectors_constant() -> None:
    layer = adapters.VeRAConfig(rank=R, d_initial=0.2).adapt(nn.Linear(I, O), "blocks.0")
    assert is_uniform(layer.projections.a, math.sqrt(6 / I))
    assert is_uniform(layer.projections.b, math.sqrt(6 / R))
    assert (layer.lambda_d == 0.2).all()
    assert not layer.lambda_b.any()
    other = adapters.VeRAConfig(rank=R, projection_seed=1).adapt(nn.Linear(I, O), "blocks.0")
    assert not torch.equal(layer.projections.a, other.projections.a)


def test_lohas_second_a_is_zero_and_the_others_uniform() -> None:
    found = started(adapters.LoHaConfig(rank=R))
    assert not found["a2"].any()
    assert is_uniform(found["a1"], 1 / math.sqrt(I))
    assert is_uniform(found["b1"], 1 / math.sqrt(R))
    assert is_uniform(found["b2"], 1 / math.sqrt(R))


def test_lokrs_first_matrix_is_zero_and_the_second_uniform() -> None:
    found = started(adapters.LoKrConfig(rank=64))
    assert not found["c"].any()
    assert is_uniform(found["d"], 1 / math.sqrt(found["d"].shape[1]))
    thin = started(adapters.LoKrConfig(rank=1, decompose_both=True))
    assert not thin["c_b"].any()
    assert all(thin[name].any() for name in ("c_a", "d_a", "d_b"))


@pytest.mark.parametrize("feedforward", [(), ("0",)])
def test_factors_start_at_one(feedforward: tuple[str, ...]) -> None:
    (factors,) = started(adapters.IA3Config(targets=("0",), feedforward=feedforward)).values()
    assert factors.shape == ((1, I) if feedforward else (O, 1))
    assert (factors == 1).all()


def test_scale_and_shift_start_at_one_and_zero() -> None:
    for module in (nn.Linear(I, O), nn.LayerNorm(O)):
        found = started(adapters.SSFConfig(), module)
        assert (found["gamma"] == 1).all()
        assert not found["beta"].any()


def test_biases_and_norms_start_at_the_bases() -> None:
    linear, norm = nn.Linear(I, O), nn.LayerNorm(O)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    assert torch.equal(started(adapters.BitFitConfig(), linear)["tuned_bias"], linear.bias)
    found = started(adapters.NormConfig(), norm)
    assert torch.equal(found["tuned_weight"], norm.weight)
    assert torch.equal(found["tuned_bias"], norm.bias)


def test_a_bottleneck_starts_silent() -> None:
    ffn = nn.Sequential(nn.Linear(I, O), nn.GELU(), nn.Linear(O, I))
    layer = adapters.AdaptFormerConfig(width=R).adapt(ffn, "blocks.0.ffn")
    assert is_uniform(layer.down_weight, 1 / math.sqrt(I))
    assert not any(p.any() for p in (layer.down_bias, layer.up_weight, layer.up_bias))
    x = torch.randn(3, I)
    assert torch.equal(layer(x), ffn(x))


def test_a_bottleneck_behind_a_block_starts_close_to_it() -> None:
    block = nn.Sequential(nn.LayerNorm(I), nn.Linear(I, I))
    layer = adapters.AdapterPlusConfig(width=R).adapt(block, "blocks.0")
    for weight in (layer.down_weight, layer.up_weight):
        assert 0.019 < weight.detach().abs().max() <= 0.02
        assert weight.detach().std() == pytest.approx(0.0088, rel=0.1)  # 0.01, cut off at two of it
    assert torch.equal(layer.channel_scale, torch.ones(I))
    assert not any(p.any() for p in (layer.down_bias, layer.up_bias))
    x = torch.randn(3, I)
    assert 0 < (layer(x) - block(x)).abs().max() < 0.05


def test_prompts_are_within_xaviers_bound() -> None:
    block = nn.Sequential(nn.LayerNorm(I), nn.Linear(I, I))
    layer = adapters.VPTConfig(n_prompts=R).adapt(block, "blocks.0")
    assert layer.prompts.shape == (1, R, I)
    assert is_uniform(layer.prompts, math.sqrt(6 / (2 * I)))


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_dropout_drops_its_share_of_the_adapters_input_alone(p: float) -> None:
    layer = adapters.LoRAConfig(rank=R, alpha=R, dropout=p).adapt(nn.Linear(I, O), "wq").train()
    nn.init.ones_(layer.lora_a)
    nn.init.ones_(layer.lora_b)
    x = torch.ones(500, I)
    update = (layer(x) - nn.functional.linear(x, layer.weight, layer.bias)).detach()
    kept = update[:, 0] / R * (1 - p) / I  # the share of the inputs that was kept
    assert kept.mean().item() == pytest.approx(1 - p, abs=0.02)
    assert kept.std().item() == pytest.approx(math.sqrt(p * (1 - p) / I), rel=0.15)
