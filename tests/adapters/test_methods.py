"""What each method is by its paper: its formula, and how many numbers it trains."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import METHODS, inject, load_adapter, merge, save_adapter
from adapters.folder import read_adapter
from adapters.methods.lokr import factorise
from tests.adapters.toy import X, adapted, config, move, toy
from tests.shared import TINY
from vitft.model.config import ViTConfig
from vitft.model.vit import VisionTransformer

D, H, L, R, P, M = 256, 512, 6, 8, 10, 64  # widths, blocks, rank, prompts, bottleneck
COUNTS = {  # trained numbers in the article's ViT, by the papers' formulas
    "lora": L * R * (4 * (D + D) + 2 * (D + H)),
    "dora": L * (R * (4 * (D + D) + 2 * (D + H)) + 5 * D + H),
    "vera": L * (5 * D + H + 6 * 256),
    "loha": L * 2 * R * (4 * (D + D) + 2 * (D + H)),
    "lokr": L * (4 * (16 * 16 + 16 * 16) + 2 * (16 * 16 + R * (16 + 32))),
    "ia3": L * (D + D + H),
    "ssf": L * 2 * (4 * D + H + D + 2 * D),
    "bitfit": L * (H + D + 2 * D),
    "norm": (2 * L + 1) * 2 * D,
    "adaptformer": L * (2 * D * M + M + D),
    "adapterplus": L * (2 * D * R + R + 2 * D),
    "vpt": L * P * D,
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_as_many_numbers_as_its_paper_says(method: str) -> None:
    model = inject(VisionTransformer(), METHODS[method]())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == COUNTS[method]


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "loha", "lokr", "ssf", "bitfit"])
def test_by_default_every_linear_of_the_blocks_is_adapted(method: str) -> None:
    options = {"gated": True, "qkv_bias": True, "proj_bias": True, "layer_scale": True}
    model = inject(VisionTransformer(ViTConfig(**TINY, **options)), METHODS[method]())
    linears = {"attn.wq", "attn.wk", "attn.wv", "attn.wo", "ffn.w1", "ffn.w2", "ffn.w3"}
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    norms = {"norm1", "norm2"} if method in ("ssf", "bitfit") else set()
    assert trained == {f"blocks.{i}.{n}" for i in range(2) for n in linears | norms}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_convolutions_alone(method: str) -> None:
    model = inject(VisionTransformer(ViTConfig(stem="conv")), METHODS[method]())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == COUNTS[method]


def layer(kind: str) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """Return the adapted blocks.1.ffn.0 of a toy, an input of it, and its parameters."""
    module = adapted(kind).blocks[1].ffn[0]
    x = torch.randn(30, 8, dtype=torch.float64)
    return module, x, dict(module.named_parameters())


def test_vera_is_its_formula() -> None:
    module, x, p = layer("vera")
    update = p["lambda_b"] * (
        (p["lambda_d"] * (x @ module.projections.a.T)) @ module.projections.b.T
    )
    expected = F.linear(x, p["weight"], p["bias"]) + update
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


def test_vera_s_matrices_are_one_for_all_layers_and_cut_to_size() -> None:
    model = adapted("vera")
    one, two = model.blocks[0].attn.wq, model.blocks[1].ffn[0]
    assert one.projections is two.projections
    assert [tuple(t.shape) for t in one.factors()] == [(5, 8), (8, 5)]
    assert [tuple(t.shape) for t in two.factors()] == [(5, 8), (12, 5)]
    assert not any("projections" in key for key in model.state_dict())


def test_loha_is_its_formula() -> None:
    module, x, p = layer("loha")
    delta = 2 * (p["b1"] @ p["a1"]) * (p["b2"] @ p["a2"])
    expected = F.linear(x, p["weight"] + delta, p["bias"])
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("lokr", {"c", "d"}), ("lokr of thin", {"c_a", "c_b", "d_a", "d_b"})],
)
def test_lokr_is_its_formula(kind: str, names: set[str]) -> None:
    module, x, p = layer(kind)
    assert p.keys() - {"weight", "bias"} >= {"d"} if kind == "lokr" else names <= p.keys()
    c = p["c"] if "c" in p else p["c_b"] @ p["c_a"]
    d = p["d"] if "d" in p else p["d_b"] @ p["d_a"]
    expected = F.linear(x, p["weight"] + module.scale * torch.kron(c, d), p["bias"])
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [(256, -1, (16, 16)), (128, -1, (8, 16)), (127, -1, (1, 127)), (128, 4, (4, 32))]
    + [(12, 5, (3, 4)), (12, 2, (2, 6)), (8, 16, (2, 4)), (12, 6, (6, 2))],
)
def test_factorising(size: int, factor: int, expected: tuple[int, int]) -> None:
    assert factorise(size, factor) == expected


def test_ia3_multiplies_outputs_or_inputs() -> None:
    module, x, p = layer("ia3")
    expected = p["factors"][:, 0] * F.linear(x, p["weight"], p["bias"])
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)
    module, x, p = layer("ia3 of inputs")
    expected = F.linear(p["factors"][0] * x, p["weight"], p["bias"])
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


def test_ssf_scales_and_shifts_linears_and_norms() -> None:
    module, x, p = layer("ssf")
    expected = p["gamma"] * F.linear(x, p["weight"], p["bias"]) + p["beta"]
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)
    norm = adapted("ssf").blocks[0].norm
    expected = norm.gamma * F.layer_norm(x, (8,), norm.weight, norm.bias) + norm.beta
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)


def test_adaptformer_is_its_formula() -> None:
    model, x = adapted("adaptformer"), torch.randn(2, 3, 8, dtype=torch.float64)
    module, base = model.blocks[0].ffn, toy().blocks[0].ffn
    down, up = module.down_weight, module.up_weight
    update = torch.relu(x @ down.T + module.down_bias) @ up.T + module.up_bias
    torch.testing.assert_close(module(x), base(x) + 0.1 * update, rtol=0, atol=1e-12)


def test_adapterplus_is_its_formula() -> None:
    model, x = adapted("adapterplus"), torch.randn(2, 3, 8, dtype=torch.float64)
    block, z = model.blocks[0], toy().blocks[0](x)
    hidden = F.gelu(z @ block.down_weight.T + block.down_bias)
    update = block.channel_scale * (hidden @ block.up_weight.T + block.up_bias)
    torch.testing.assert_close(block(x), z + update, rtol=0, atol=1e-12)


def test_prompts_are_tokens_that_the_block_reads_and_drops() -> None:
    model, x = adapted("vpt"), torch.randn(2, 3, 8, dtype=torch.float64)
    module, base = model.blocks[0], toy().blocks[0]
    prompts = module.prompts.expand(2, -1, -1)
    for order in ([x, prompts], [prompts, x]):  # where they stand means nothing
        outputs = base(torch.cat(order, dim=1))
        tokens = outputs[:, :3] if order[0] is x else outputs[:, -3:]
        torch.testing.assert_close(module(x), tokens, rtol=0, atol=1e-12)


def test_prompts_reach_a_block_that_gives_its_first_token_only() -> None:
    model = VisionTransformer().eval()
    images = torch.randn(2, 3, 32, 32)
    inject(model, METHODS["vpt"]())
    prompted = model.blocks[-1]
    assert prompted(torch.randn(2, 65, D), 1).shape == (2, 1, D)
    assert model(images).shape == (2, 10)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_starts_keep_the_base_and_save_a_plain_lora_of_twice_the_rank(init: str) -> None:
    model = inject(toy(), config("lora", init=init, rank=2))
    torch.testing.assert_close(model(X), toy()(X), rtol=0, atol=1e-12)
    module = model.blocks[0].attn.wq
    assert torch.equal(module.weight, toy().blocks[0].attn.wq.weight)
    assert [len(module.lora_a), len(module.exported()["lora_a"])] == [2, 4]
    u, s, v = torch.linalg.svd(module.weight)
    if init == "pissa":
        best = u[:, :2] * s[:2] @ v[:2]
        torch.testing.assert_close(module.scale * module.lora_b @ module.lora_a, best)
    else:
        torch.testing.assert_close(module.lora_b.T @ module.lora_b, torch.eye(2).double())


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_of_a_converted_start_are_saved_for_twice_the_rank(
    rslora: bool, tmp_path: Path
) -> None:
    own = {"rank_pattern": {"wq": 3}, "alpha_pattern": {"attn.wv": 5.0}, "use_rslora": rslora}
    model = inject(toy(), config("pissa", **own), trainable=("head",))
    move(model)
    save_adapter(model, tmp_path)
    written = read_adapter(tmp_path).config
    factor = math.sqrt(2) if rslora else 2
    assert (written["r"], written["rank_pattern"]) == (4, {"wq": 6})
    assert written["lora_alpha"] == pytest.approx(16 * factor)
    assert written["alpha_pattern"] == {"attn.wv": pytest.approx(5 * factor)}
    torch.testing.assert_close(load_adapter(toy(), tmp_path)(X), model(X), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"lr_ratio": 0.0}, "lr_ratio=0.0 is not positive; LoRA\\+ takes 16"),
        ("lora", {"init": "svd"}, "init='svd' is unknown; choose from kaiming"),
        ("lora", {"rank_pattern": {"wq": 0}}, "rank=0 is not a positive integer"),
        ("vera", {"rank": 0}, "rank=0 is not a positive integer; 256 is usual"),
        ("vera", {"dropout": 1}, "dropout=1 is not in 0 <= dropout < 1"),
        ("vera", {"projection_seed": -1}, "projection_seed=-1 is not in 0 <= seed"),
        ("lokr", {"decompose_factor": 0}, "decompose_factor=0 is neither positive nor -1"),
        ("ia3", {"feedforward": "w2"}, "feedforward='w2' is one string; write a tuple"),
        ("ia3", {"feedforward": ("ffn.w2",)}, "more than the target 'w2'; name both alike$"),
        ("vera", {"d_initial": math.inf}, "^d_initial=inf is not finite; 0.1 is usual$"),
        ("adaptformer", {"width": 0}, "width=0 is not a positive integer; 64 is usual"),
        ("adaptformer", {"scale": 0.0}, "scale=0.0 is not positive; 0.1 is usual"),
        ("adaptformer", {"dropout": 1.0}, "dropout=1.0 is not in 0 <= dropout < 1"),
        ("adapterplus", {"width": 0}, "width=0 is not a positive integer; 8 is usual"),
        ("vpt", {"n_prompts": 0}, "n_prompts=0 is not a positive integer; try 10"),
        ("lora", {"rank_pattern": {"w[": 2}}, "rank_pattern's 'w\\[' is no regular expression"),
        ("vpt", {"dropout": 1.0}, "dropout=1.0 is not in 0 <= dropout < 1"),
    ],
)
def test_options_out_of_their_range_are_refused(
    method: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS[method](**options)


@pytest.mark.parametrize(
    ("method", "target", "message"),
    [
        ("ia3", "norm", "'blocks.0.norm' is a LayerNorm, not an nn.Linear"),
        ("norm", "head", "'head' is a Linear, not an nn.LayerNorm"),
        ("ssf", "blocks", "'blocks' is a Sequential, not an nn.Linear or nn.LayerNorm"),
        ("adaptformer", "embed", "'embed' is a Linear with weights of its own or none"),
        ("adaptformer", "blocks.0.norm", "'blocks.0.norm' is a LayerNorm with weights of its own"),
        ("adapterplus", "blocks.0.ffn", "tells its width; Adapter\\+ needs one"),
        ("vpt", "blocks.0.ffn", "'blocks.0.ffn' has no nn.LayerNorm that tells its width"),
    ],
)
def test_modules_that_a_method_does_not_adapt_are_refused(
    method: str, target: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inject(toy(), METHODS[method](targets=(target,)))


@pytest.mark.parametrize("kind", ["adaptformer", "vpt", "vera"])
def test_dropout_of_a_method_acts_in_training_only(kind: str) -> None:
    model = inject(toy(), config(kind, dropout=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    assert torch.equal(model.eval()(X), model(X))
    assert not torch.equal(model.train()(X), model(X))


def test_a_feedforward_that_is_no_target_is_refused() -> None:
    with pytest.raises(ValueError, match="feedforward 'w_2' is none of the targets"):
        inject(VisionTransformer(), METHODS["ia3"](feedforward=("w_2",)))
    inject(VisionTransformer(), METHODS["ia3"](targets=("wk",)))  # the default asks for none


def test_layers_leave_out_what_only_the_default_targets_name() -> None:
    model = inject(VisionTransformer(), METHODS["norm"](layers=(5,)))
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"blocks.5.norm1", "blocks.5.norm2"}


@pytest.mark.parametrize(("kind", "name"), [("adaptformer", "ffn.0"), ("vpt", "attn.wo")])
def test_nothing_inside_a_target_can_be_trained_besides(kind: str, name: str) -> None:
    with pytest.raises(ValueError, match="lies inside .* which is a target; choose one"):
        inject(toy(), config(kind), trainable=("head", name))


@pytest.mark.parametrize("kind", ["adaptformer", "adapterplus", "vpt"])
@pytest.mark.parametrize("on", [True, False])
def test_a_wrapped_module_is_given_what_it_is_called_with(kind: str, on: bool) -> None:
    """Arguments by place and by name reach the base's forward, switched on or off."""
    seen: list[tuple[object, object]] = []

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, n: int = 0, *, mask: str = "") -> torch.Tensor:
            seen.append((n, mask))
            return self.down(self.up(self.norm(x)))

    layer = METHODS[kind]().adapt(Asking(), "blocks.0")
    layer.enabled = on
    seen.clear()  # of what `takes` asked
    layer(torch.randn(1, 3, 8), 5, mask="all")
    assert seen == [(5, "all")]


WANTED = {
    "vpt": "VPT adds tokens, but 'blocks.0' gives a tuple, not tokens; choose another method",
    "adapterplus": "Adapter+ changes tokens (B, N, 8), but 'blocks.0' gives a tuple; "
    "choose another method",
}


@pytest.mark.parametrize("method", WANTED)
def test_a_block_must_give_tokens_back(method: str) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return self.norm(x), None

    layer = METHODS[method]().adapt(Pair(), "blocks.0")
    with pytest.raises(ValueError, match=f"^{re.escape(WANTED[method])}$"):
        layer(torch.randn(1, 3, 8))
    layer.enabled = False
    assert isinstance(layer(torch.randn(1, 3, 8)), tuple)


def test_a_feedforward_may_have_any_number_of_linears() -> None:
    sides = (8, 12, 9, 8)
    three = nn.Sequential(*(nn.Linear(n, m) for n, m in itertools.pairwise(sides)))
    layer = METHODS["adaptformer"](width=2).adapt(three, "ffn")
    assert layer(torch.randn(1, 3, 8)).shape == (1, 3, 8)
    with pytest.raises(ValueError, match="'ffn' is no feed-forward"):
        METHODS["adaptformer"](width=2).adapt(three[:2], "ffn")


def test_a_block_without_a_norm_is_named() -> None:
    with pytest.raises(ValueError, match="'blocks.7' has no nn.LayerNorm that tells its width; Ad"):
        METHODS["adapterplus"]().adapt(nn.Sequential(nn.Linear(8, 8)), "blocks.7")


def test_what_has_no_bias_at_all_is_no_target_of_bitfit() -> None:
    assert not METHODS["bitfit"]().suits(nn.GELU())
    assert not METHODS["bitfit"]().suits(nn.Linear(2, 2, bias=False))
    assert METHODS["bitfit"]().suits(nn.Linear(2, 2))


def test_names_may_come_in_a_list() -> None:
    found = METHODS["ia3"](targets=["wq", "w2"], feedforward=["w2"])
    assert (found.targets, found.feedforward) == (("wq", "w2"), ("w2",))


@pytest.mark.parametrize("shape", [(3, 3), (2, 3)])
@pytest.mark.parametrize("method", ["ssf", "bitfit", "norm"])
def test_a_norm_over_several_axes_is_merged_to_what_it_computed(
    method: str, shape: tuple[int, int]
) -> None:
    model = inject(nn.Sequential(nn.LayerNorm(shape)), METHODS[method](targets=("0",)))
    move(model)
    x = torch.randn(4, *shape)
    expected = model(x)
    assert not torch.allclose(expected, nn.LayerNorm(shape)(x))
    torch.testing.assert_close(merge(model)(x), expected)
