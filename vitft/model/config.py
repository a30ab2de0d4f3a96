"""The sizes and options of a `VisionTransformer`, checked when they are made."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ViTConfig:
    """The sizes and options of a `VisionTransformer`; the defaults are the article's.

    Raises:
        ValueError: a size that is not positive or does not fit the others, or an unknown option.
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
    # what the head reads: "cls" the class token, "mean" the mean of all tokens
    pooling: str = "cls"
    # what makes tokens of patches: "linear" the article's, "conv" three small convolutions
    stem: str = "linear"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(
                    f"{field.name}={value} is not positive; the article's is {field.default}"
                )
        if self.dim % self.n_heads:
            raise ValueError(
                f"dim={self.dim} is not divisible by n_heads={self.n_heads}; "
                f"choose n_heads from {_divisors(self.dim)}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}; "
                f"choose patch_size from {_divisors(self.image_size)}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout={self.dropout} is not in 0 <= dropout < 1; 0 switches it off"
            )
        if self.pooling not in ("cls", "mean"):
            raise ValueError(f'pooling={self.pooling!r} is unknown; choose "cls" or "mean"')
        if self.stem not in ("linear", "conv"):
            raise ValueError(f'stem={self.stem!r} is unknown; choose "linear" or "conv"')
        if self.stem == "conv" and self.patch_size % 2:
            raise ValueError(
                f'patch_size={self.patch_size} is odd, which stem="conv" cannot cut; '
                'choose patch_size=4, or stem="linear"'
            )

    @property
    def n_patches(self) -> int:
        """Patches in an image of `image_size`."""
        return (self.image_size // self.patch_size) ** 2


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
