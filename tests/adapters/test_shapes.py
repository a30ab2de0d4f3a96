"""Blocks that take something else than tokens (B, N, D): named, with the shape that they saw."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import METHODS, inject
from adapters.plain import takes
from tests.adapters.toy import snapshot, toy

D = 8


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


class Images(nn.Module):
    """A block of images (B, H, W, D), whose linears may lie between turns, as ConvNeXt's."""

    def __init__(self, *, first: bool = False, gives: Any = lambda y: y) -> None:
        super().__init__()
        self.norm, self.gives, self.first = nn.LayerNorm(D), gives, first
        self.up, self.down = nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x: Tensor) -> Any:
        x = x.movedim(1, -1) if self.first else x
        _, height, width, _ = x.shape
        y = self.down(self.up(self.norm(x)).relu()).view(-1, height, width, D)
        return self.gives(y.movedim(-1, 1) if self.first else y)


class Windowed(nn.Module):
    """A block of tokens whose attention has windows, as Hugging Face's Swin."""

    def __init__(self, window_size: Any) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(D), nn.Linear(D, D)
        self.attn.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.norm(x))


class Gridded(nn.Module):
    """A block that is told how many rows and columns its tokens have, as PVT's."""

    def __init__(self, gives: Any = lambda y: y) -> None:
        super().__init__()
        self.norm, self.gives = nn.LayerNorm(D), gives

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        return self.gives(self.norm(x))


class Resized(nn.Module):
    """A block that gives every second token, or twice as wide ones."""

    def __init__(self, wider: bool) -> None:
        super().__init__()
        self.norm, self.wider = nn.LayerNorm(D), wider

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(x)] * 2, dim=-1) if self.wider else self.norm(x)[:, ::2]


def model(block: nn.Module) -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList([block]), "head": nn.Linear(D, 2)})


def adapted(method: str, block: nn.Module) -> nn.Module:
    """Return the only block of a model, adapted."""
    settings = METHODS[method](targets=(r"blocks\.0",))
    return inject(model(block), settings, trainable=("head",))["blocks"][0]


@pytest.mark.parametrize("gives", [lambda y: y, lambda y: (y, None)])
def test_prompts_are_refused_before_anything_changes_where_blocks_take_images(gives: Any) -> None:
    base = model(Images(gives=gives))
    before, state = str(snapshot(base)), torch.get_rng_state()
    message = (
        "'blocks.0' takes images (B, H, W, 8), not tokens (B, N, D), so that prompts have no "
        "place; choose another method"
    )
    with refused(message):
        inject(base, METHODS["vpt"](), trainable=("head",))
    assert str(snapshot(base)) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [4, (7, 7)])
def test_prompts_are_refused_where_attention_has_windows(size: Any) -> None:
    message = (
        f"'blocks.0' has window_size={size}, for windows or images of one size, so that prompts "
        "have no place; choose another method"
    )
    with refused(message):
        adapted("vpt", Windowed(size))
    for none in (0, None):
        adapted("vpt", Windowed(none))(torch.randn(2, 4, D))


@pytest.mark.parametrize("method", ["vpt", "adapterplus", "adaptformer"])
def test_channels_first_are_refused_before_anything_changes(method: str) -> None:
    base = model(Images(first=True))
    before = str(snapshot(base))
    message = (
        "'blocks.0' takes channels first, (B, 8, H, W), not tokens (B, N, D); choose another method"
    )
    with refused(message):
        inject(base, METHODS[method](targets=(r"blocks\.0",)), trainable=("head",))
    assert str(snapshot(base)) == before


def test_bottlenecks_are_for_images_with_channels_last_too() -> None:
    x = torch.randn(2, 3, 4, D)
    for method in ("adapterplus", "adaptformer"):
        block = Images()
        torch.testing.assert_close(adapted(method, block)(x), block(x), atol=0.1, rtol=0.1)


def test_prompts_name_the_block_and_the_shape_that_it_saw() -> None:
    for block, x in ((Gridded(), torch.randn(2, 3, 4, D)), (Resized(True), torch.randn(2, 4, 5))):
        message = (
            f"VPT adds tokens, but 'blocks.0' saw {tuple(x.shape)}, not tokens (B, N, 8); "
            "choose another method"
        )
        with refused(message):
            adapted("vpt", block)(x)
    layer = adapted("vpt", Resized(wider=False))
    message = (
        "VPT adds tokens, but 'blocks.0' gives (2, 7, 8) for (2, 14, 8), not as many; "
        "choose another method"
    )
    with refused(message):
        layer(torch.randn(2, 4, D))
    layer = adapted("vpt", Gridded(lambda y: y.mean(dim=1)))
    with pytest.raises(
        ValueError, match=r"'blocks\.0' gives \(2, 8\) for \(2, 14, 8\), not as many"
    ):
        layer(torch.randn(2, 4, D), 8)
    layer = adapted("vpt", Gridded(lambda y: y[:, :1]))
    assert layer(torch.randn(2, 4, D), 1).shape == (2, 1, D)
    with pytest.raises(ValueError, match=r"gives \(2, 1, 8\) for \(2, 14, 8\), not as many"):
        layer(torch.randn(2, 4, D))
    assert adapted("vpt", Resized(wider=True))(torch.randn(2, 4, D)).shape == (2, 4, 2 * D)


def test_prompts_are_refused_where_tokens_are_told_to_be_an_image() -> None:
    layer, x = adapted("vpt", Gridded()), torch.randn(2, 12, D)
    message = (
        "VPT adds tokens, but 'blocks.0' takes its 12 for an image of 3 x 4; choose another method"
    )
    for rest, named in (((3, 4), {}), ((None, (3, 4)), {}), ((), {"h": 3, "w": 4})):
        with refused(message):
            layer(x, *rest, **named)
    layer(x, 3, True, 5, n=12)
    layer.enabled = False
    layer(x, 3, 4)


@pytest.mark.parametrize("shape", [(2, 4, 2 * D), (2, D, 3, 5)])
def test_adapterplus_names_the_block_and_the_shape_that_it_gives(shape: tuple[int, ...]) -> None:
    layer = adapted("adapterplus", Resized(wider=True))
    layer.norm = nn.Identity()
    x = torch.randn(shape) if len(shape) == 4 else torch.randn(2, 4, D)
    given = (*shape[:-1], 10) if len(shape) == 4 else shape
    message = (
        f"Adapter+ changes tokens (B, N, 8), but 'blocks.0' gives {given}; choose another method"
    )
    with refused(message):
        layer(x)


def test_adaptformer_names_the_feed_forward_and_the_shapes() -> None:
    flat = nn.Sequential(nn.Flatten(1, 2), nn.Linear(D, D))
    for block, x in (
        (flat, torch.randn(2, 2, 3, D)),
        (nn.Sequential(nn.Unflatten(2, (4, D)), nn.Linear(D, D)), torch.randn(2, 3, 4 * D)),
    ):
        shapes = f"{tuple(block(x).shape)} for {tuple(x.shape)}"
        message = (
            f"AdaptFormer adds to tokens (B, N, 8), but 'blocks.0' gives {shapes}; "
            "choose another method"
        )
        with refused(message):
            adapted("adaptformer", block)(x)


def test_a_norm_over_several_axes_is_of_no_tokens() -> None:
    block = nn.Sequential(nn.LayerNorm((3, D)), nn.Linear(D, D))
    for method in ("vpt", "adapterplus"):
        name = {"vpt": "VPT", "adapterplus": "Adapter+"}[method]
        message = (
            f"'blocks.0' has a norm over (3, 8), not over the width of tokens; {name} needs one "
            "over that; choose another method"
        )
        with refused(message):
            adapted(method, block)


def test_what_a_module_takes_is_found_without_numbers_and_without_a_trace() -> None:
    block, seen = toy().blocks[0], []
    block.norm.register_forward_hook(lambda *call: seen.append(call))
    images, wider = Images(), Resized(wider=True)
    before, state = str(snapshot(block)), torch.get_rng_state()
    twin = copy.deepcopy(block)
    assert takes(block, 1, 4, D)
    assert not takes(block, 1, 4, D + 1)
    assert not takes(images, 1, 4, D)
    assert takes(images, 1, 4, 5, D)
    assert not takes(wider, 1, 4, D)
    assert not seen
    assert str(snapshot(block)) == before
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(2, 3, D, dtype=torch.float64)
    assert torch.equal(block(x), twin(x))
