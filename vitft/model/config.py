"""The sizes and options of a `VisionTransformer`, checked when they are made."""

import math
from dataclasses import Field, dataclass, fields
from typing import Any

ACTS = ("gelu", "gelu_tanh", "quick_gelu", "silu")
# the values that each option may have; the first is the default
CHOICES = {
    "pooling": ("cls", "mean", "cls+mean", "cls+dist", "map"),
    "stem": ("linear", "conv"),
    "act": ACTS,
    "gate": ("silu", *ACTS[:-1]),
    "pos": ("learned", "none"),
    "pos_resize": ("bicubic-antialias", "bicubic", "bilinear-antialias", "bilinear"),
    "final_norm": ("before", "after", "none"),
}

MAX_SIZE = 10**7  # of any integer field: a larger one comes from a damaged file


@dataclass(frozen=True)
class ViTConfig:
    """The sizes and options of a `VisionTransformer`; the defaults are the article's.

    Raises:
        ValueError: a value of another type, a size that is not positive or does not fit the others,
            or an unknown option.
    """

    dim: int = 256  # width of a token
    hidden_dim: int = 512  # width inside a feed-forward
    n_heads: int = 8  # attention heads; divides dim
    n_layers: int = 6  # blocks
    patch_size: int = 4  # side of a square patch, in pixels; divides image_size
    n_channels: int = 3  # 3 for colour, 1 for grey
    n_classes: int = 10  # logits
    dropout: float = 0.2  # after the positions and in the feed-forward
    image_size: int = 32  # side of a square image, in pixels
    # what the head reads: "cls" the class token, "mean" the mean of the patches, "cls+mean" both,
    # "cls+dist" the class and distillation tokens, "map" attention of a learned query to all tokens
    pooling: str = "cls"
    # what turns patches into tokens: "linear" as in the article, "conv" three small convolutions
    stem: str = "linear"
    eps: float = 1e-5  # added to the variance in the layer norms
    qkv_bias: bool = False  # wq, wk and wv have biases
    proj_bias: bool = False  # wo has a bias
    patch_bias: bool = True  # the linear patch embedding has a bias
    head_bias: bool = True  # the head has a bias
    act: str = "gelu"  # the activation between w1 and w2
    gated: bool = False  # w2(gate(w1 x) * w3 x) in place of w2(act(w1 x))
    gate: str = "silu"  # the activation of a gate
    layer_scale: bool = False  # a learned factor a feature, after attention and feed-forward
    class_token: bool | None = None  # None: only where the pooling reads it
    dist_token: bool = False  # a distillation token beside it, as DeiT's (arXiv:2012.12877)
    n_registers: int = 0  # learned tokens right before the patches (arXiv:2309.16588)
    pos: str = "learned"  # position embedding
    # tokens before the patches that have a position embedding; None: all but the registers
    n_pos_prefix: int | None = None
    pos_resize: str = "bicubic-antialias"  # interpolation of positions for another image size
    pos_offset: float = 0.0  # added to the number of rows when positions are resized; DINOv2: 0.1
    rope_theta: float = 0.0  # base of rotary positions of rows and columns, as DINOv3's; 0: none
    pre_norm: bool = False  # a layer norm before the first block, as CLIP's
    final_norm: str = "before"  # the last layer norm: before the pooling, after it, or none

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field, getattr(self, field.name))
        if self.dim % self.n_heads:
            raise ValueError(
                f"dim={self.dim} is not divisible by n_heads={self.n_heads}; "
                f"choose n_heads from {_divisors(self.dim)}"
            )
        if not 0 <= (self.n_pos_prefix or 0) <= self.n_prefix:
            raise ValueError(
                f"n_pos_prefix={self.n_pos_prefix} is not in 0..{self.n_prefix}, the tokens before "
                "the patches; None: all but the registers"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}; "
                f"choose patch_size from {_divisors(self.image_size)}"
            )
        if not 0 < self.eps < 1:
            raise ValueError(f"eps={self.eps} is not in 0 < eps < 1; the article's is 1e-05")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout={self.dropout} is not in 0 <= dropout < 1; 0 switches it off"
            )
        if self.stem == "conv" and self.patch_size % 2:
            raise ValueError(
                f'patch_size={self.patch_size} is odd, which stem="conv" cannot cut; '
                'choose patch_size=4, or stem="linear"'
            )
        if self.rope_theta and (self.dim // self.n_heads) % 4:
            raise ValueError(
                f"rotary positions need heads of a width divisible by 4, not "
                f"{self.dim // self.n_heads}; choose another n_heads"
            )
        if self.class_token is False and self.pooling.startswith("cls"):
            raise ValueError(
                f"pooling={self.pooling!r} reads the class token; class_token is False"
            )

    @property
    def n_patches(self) -> int:
        """Patches in an image of `image_size`."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The tokens before the registers and patches, in their order: "cls", "dist"."""
        has_class = self.pooling.startswith("cls") if self.class_token is None else self.class_token
        has_dist = self.dist_token or self.pooling == "cls+dist"
        return ("cls",) * has_class + ("dist",) * has_dist

    @property
    def n_prefix(self) -> int:
        """Tokens before the patches."""
        return len(self.special_tokens) + self.n_registers

    @property
    def n_features(self) -> int:
        """Length of the vector that the head reads: D, or 2 D where it reads two tokens."""
        return self.dim * (2 if "+" in self.pooling else 1)


def _check(field: "Field[Any]", value: Any) -> None:
    """Check one option by itself.

    Raises:
        ValueError: it is of another type, out of its range or none of its choices.
    """
    if not _is_of(value, field.type):
        kind = getattr(field.type, "__name__", field.type)
        finite = "finite " * (field.type is float)
        raise ValueError(f"{field.name}={value!r} is no {finite}{kind}")
    if field.type is int and value < (field.name != "n_registers"):
        raise ValueError(f"{field.name}={value} is not positive; the article's is {field.default}")
    if field.type is int and value > MAX_SIZE:
        raise ValueError(f"{field.name}={value} is more than {MAX_SIZE:,}")
    if field.name in CHOICES and value not in CHOICES[field.name]:
        known = ", ".join(map(repr, CHOICES[field.name])).replace("'", '"')
        raise ValueError(f"{field.name}={value!r} is unknown; choose from {known}")


def _is_of(value: object, kind: Any) -> bool:
    """Return whether a value is of a type; unlike in Python, a bool is no int.

    A float must be finite, and an int is accepted for it.
    """
    if isinstance(value, bool):
        return kind in (bool, bool | None)
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
