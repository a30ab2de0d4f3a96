"""The config: what follows from its values, and every refusal in a whole sentence."""

import re
from typing import Any

import pytest

from vitft.model.config import CHOICES, ViTConfig

SIZES = {"dim": 256, "hidden_dim": 512, "n_heads": 8, "n_layers": 6, "patch_size": 4}
SIZES |= {"n_channels": 3, "n_classes": 10, "image_size": 32}
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, f"{name}={value} is not positive; the article's is {size}")
        for name, size in SIZES.items()
        for value in (0, -1)
    ),
    ({"n_registers": -1}, "n_registers=-1 is not positive; the article's is 0"),
    *(
        (
            {name: "no"},
            f"{name}='no' is unknown; choose from " + ", ".join(f'"{choice}"' for choice in known),
        )
        for name, known in CHOICES.items()
    ),
    *(
        (
            {"n_pos_prefix": n, "n_registers": 2},
            f"n_pos_prefix={n} is not in 0..3, the tokens before the patches; None: all but the "
            "registers",
        )
        for n in (-1, 4)
    ),
    (
        {"dim": 12, "n_heads": 8},
        "dim=12 is not divisible by n_heads=8; choose n_heads from [1, 2, 3, 4, 6, 12]",
    ),
    (
        {"image_size": 10},
        "image_size=10 is not divisible by patch_size=4; choose patch_size from [1, 2, 5, 10]",
    ),
    *(
        ({"dropout": value}, f"dropout={value} is not in 0 <= dropout < 1; 0 switches it off")
        for value in (-0.1, 1)
    ),
    ({"dropout": float("nan")}, "dropout=nan is no finite float"),
    ({"n_heads": True}, "n_heads=True is no int"),
    ({"gated": 1}, "gated=1 is no bool"),
    ({"pos": None}, "pos=None is no str"),
    ({"class_token": "yes"}, "class_token='yes' is no bool | None"),
    ({"eps": 0}, "eps=0 is not in 0 < eps < 1; the article's is 1e-05"),
    (
        {"stem": "conv", "patch_size": 1},
        'patch_size=1 is odd, which stem="conv" cannot cut; choose patch_size=4, or stem="linear"',
    ),
    (
        {"dim": 48, "rope_theta": 100.0},
        "rotary positions need heads of a width divisible by 4, not 6; choose another n_heads",
    ),
    *(
        (
            {"class_token": False, "pooling": pooling},
            f"pooling='{pooling}' reads the class token; class_token is False",
        )
        for pooling in ("cls", "cls+mean", "cls+dist")
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_refused_in_a_whole_sentence(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ViTConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {**dict.fromkeys(SIZES, 1)},
        {"n_registers": 0, "n_pos_prefix": 0, "dropout": 0.0},
        {"dropout": 0.999},
        {"n_pos_prefix": 3, "n_registers": 2},
        {"stem": "conv", "patch_size": 2},
        {"stem": "linear", "patch_size": 1},
        {"dim": 64, "n_heads": 16, "rope_theta": 100.0},
        {"dim": 48, "rope_theta": 0.0},
        {"class_token": False, "pooling": "mean"},
        {"class_token": True, "pooling": "cls"},
    ],
    ids=str,
)
def test_what_just_fits_is_allowed(options: dict[str, Any]) -> None:
    config = ViTConfig(**options)
    assert all(getattr(config, name) == value for name, value in options.items())


@pytest.mark.parametrize(
    ("options", "special", "n_features"),
    [
        ({}, ("cls",), 256),
        ({"pooling": "mean"}, (), 256),
        ({"pooling": "map"}, (), 256),
        ({"pooling": "cls+mean"}, ("cls",), 512),
        ({"pooling": "cls+dist"}, ("cls", "dist"), 512),
        ({"pooling": "mean", "class_token": True}, ("cls",), 256),
        ({"pooling": "mean", "class_token": False}, (), 256),
        ({"pooling": "mean", "dist_token": True}, ("dist",), 256),
        ({"pooling": "map", "class_token": True, "dist_token": True}, ("cls", "dist"), 256),
    ],
    ids=str,
)
def test_tokens_and_features_follow_from_the_pooling(
    options: dict[str, Any], special: tuple[str, ...], n_features: int
) -> None:
    config = ViTConfig(**options, n_registers=3)
    assert config.special_tokens == special
    assert config.n_prefix == len(special) + 3
    assert config.n_features == n_features
    assert config.n_patches == 64


def test_a_size_beyond_all_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^hidden_dim=\d+ is more than 10,000,000$"):
        ViTConfig(hidden_dim=2**63)
