"""The base Vision Transformer (arXiv:2010.11929): images in, logits out.

Images are (B, C, height, width), logits (B, n_classes).
Shapes, here and everywhere: `B` batch, `C` channels, `N` tokens, `D` dim, `H` heads, `K` head_dim,
`O` out, `I` in, `R` rank. In "prefix + N", N counts the patches only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitft.model.blocks import Block
from vitft.model.config import ViTConfig
from vitft.model.patches import ConvEmbed, PatchEmbed
from vitft.model.pooling import MapPooling, reduce_tokens
from vitft.model.positions import AxialRope, positions_of
from vitft.pictures.preprocess import Framing, Preprocessing

STEMS = {"linear": PatchEmbed, "conv": ConvEmbed}


class VisionTransformer(nn.Module):
    """Patches -> tokens -> blocks -> logits.

    Attributes:
        config: the sizes and options it was built from.
        classes: a name for each logit.
        mean, std: of each channel, for pixels in 0..1; `normalize` uses them.
        image_size: side of the images that `forward` takes now, in pixels; see `resize`.
        framing: how a picture of any shape becomes a square one.
        labels: "one" label an image, or "several", each with its own probability.
        facts: what else its file records, such as family, source and licence.
    """

    def __init__(self, config: ViTConfig = ViTConfig()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.classes = tuple(str(i) for i in range(config.n_classes))
        self.mean = self.std = (0.5,) * config.n_channels
        self.framing = Framing()
        self.labels = "one"
        self.facts: dict[str, Any] = {}
        dim, special = config.dim, config.special_tokens
        sizes = {"patch_size": config.patch_size, "n_channels": config.n_channels, "dim": dim}
        bias = {} if config.stem == "conv" else {"bias": config.patch_bias}
        self.patch_embed = STEMS[config.stem](**sizes, **bias)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim)) if "cls" in special else None
        self.dist_token = nn.Parameter(torch.randn(1, 1, dim)) if "dist" in special else None
        self.registers = None
        if config.n_registers:
            self.registers = nn.Parameter(torch.randn(1, config.n_registers, dim))
        self.n_pos_prefix = len(special) if config.n_pos_prefix is None else config.n_pos_prefix
        self.pos_embedding = None
        if config.pos == "learned":
            n_rows = self.n_pos_prefix + config.n_patches
            self.pos_embedding = nn.Parameter(torch.randn(1, n_rows, dim))
        self.dropout = nn.Dropout(config.dropout)
        self.pre_norm = nn.LayerNorm(dim, config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.rope = AxialRope.of(config) if config.rope_theta else None
        for block in self.blocks:
            vars(block.attn)["rope"] = self.rope  # not as a submodule, see `Attention`
        self.map_pool = MapPooling(config) if config.pooling == "map" else None
        none = config.final_norm == "none"
        self.norm: nn.Module = nn.Identity() if none else nn.LayerNorm(dim, config.eps)
        self.head = nn.Linear(config.n_features, config.n_classes, bias=config.head_bias)

    def new_head(self, classes: Sequence[str]) -> None:
        """Replace the head by one of zeros for these classes, on its device and in its dtype."""
        weight = self.head.weight
        self.head = nn.Linear(
            self.config.n_features, len(classes), device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.classes = tuple(classes)

    @property
    def has_head(self) -> bool:
        """Whether the head has been trained: that of a base without classes holds zeros."""
        return bool(self.head.weight.any())

    def resize(self, image_size: int) -> None:
        """Take images of another size from now on.

        `positions` then interpolates the position embedding; no parameter changes.

        Raises:
            ValueError: `image_size` is not a positive multiple of the patch size.
        """
        patch_size = self.config.patch_size
        if image_size < patch_size or image_size % patch_size:
            raise ValueError(
                f"{image_size=} is not a positive multiple of {patch_size=}; "
                f"try {max(1, round(image_size / patch_size)) * patch_size}"
            )
        self.image_size = image_size
        if self.rope is not None:
            self.rope.n_rows = image_size // patch_size

    def translate(self, name: str) -> tuple[str, ...]:
        """Return our names for a module or tensor of the library that the base comes from.

        The result is () where we have none, or where the base was not converted.
        """
        from vitft.families.rename import translate  # only a converted base needs it

        return translate(name, str(self.facts.get("family")))

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image file becomes the model's input, and whether it has one label or several.

        Raises:
            ValueError: when set, a value is outside its range or does not fit the model.
        """
        normal = {"image_size": self.image_size, "mean": self.mean, "std": self.std}
        return normal | asdict(self.framing) | {"labels": self.labels}

    @preprocessing.setter
    def preprocessing(self, record: Mapping[str, Any]) -> None:
        found = Preprocessing.of(record)
        if len(found.mean) != self.config.n_channels:
            raise ValueError(
                f"mean={found.mean} and std={found.std} are not for {self.config.n_channels} "
                "channels"
            )
        self.resize(found.image_size)
        self.mean, self.std, self.labels = found.mean, found.std, found.labels
        self.framing = found.framing

    def positions(self) -> Tensor:
        """Return the position embedding for images of `image_size`: (1, prefix + N, D)."""
        return positions_of(self.pos_embedding, self.n_pos_prefix, self.config, self.image_size)

    def embed(self, images: Tensor) -> Tensor:
        """Return tokens (B, prefix + N, D) of normalised images (B, C, height, width)."""
        x = self.patch_embed(images)
        prefix = [t for t in (self.cls_token, self.dist_token, self.registers) if t is not None]
        if prefix:
            x = torch.cat([*(t.expand(x.shape[0], -1, -1) for t in prefix), x], dim=1)
        if self.pos_embedding is not None:
            x = x + self.positions()
        return self.pre_norm(self.dropout(x))

    def pool(self, x: Tensor) -> Tensor:
        """Return what the head reads, (B, D or 2 D), from the blocks' output (B, prefix + N, D)."""
        x = self.norm(x) if self.config.final_norm == "before" else x
        if self.map_pool is None:
            x = reduce_tokens(x, self.config)
        else:
            x = self.map_pool(x[:, self.config.n_prefix :])
        return self.norm(x) if self.config.final_norm == "after" else x

    def check(self, images: Tensor) -> None:
        """Check that images have the shape that the model takes now.

        Raises:
            ValueError: they have another shape.
        """
        expected = (self.config.n_channels, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but the model takes (batch, "
                f"{', '.join(map(str, expected))}); resize the images, "
                "or call model.resize(image_size)"
            )

    def tokens(self, images: Tensor) -> Tensor:
        """Return every token (B, prefix + N, D), after the final norm if it precedes the pooling.

        Args:
            images: normalised (B, C, height, width).

        Raises:
            ValueError: the images have another shape than the model takes.
        """
        self.check(images)
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) if self.config.final_norm == "before" else x

    def features(self, images: Tensor) -> Tensor:
        """Return what the head reads, (B, D or 2 D), of normalised images (B, C, height, width).

        Raises:
            ValueError: the images have another shape than the model takes.
        """
        self.check(images)
        return self.run(images, last=-1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, n_classes) for normalised images (B, C, height, width).

        Raises:
            ValueError: the images have another shape than the model takes.
        """
        self.check(images)
        return self.run(images)

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """Return the stages from images to logits: embed, every block, pool, head.

        Where the head reads only the first tokens, the last block computes only these.
        """
        *blocks, last = self.blocks
        n_read = {"cls": 1, "cls+dist": 2}.get(self.config.pooling)
        last_block = last if n_read is None else partial(last, n=n_read)
        return [self.embed, *blocks, last_block, self.pool, self.head]

    def run(
        self,
        x: Tensor,
        first: int = 0,
        last: int | None = None,
        stages: Sequence[Callable[[Tensor], Tensor]] = (),
    ) -> Tensor:
        """Return the output of the stages first..last - 1 for `x`, the input of stage `first`.

        Args:
            stages: computed in place of the model's, such as compiled ones; by default the model's.
        """
        for stage in (stages or self.stages())[first:last]:
            x = stage(x)
        return x

    def normalize(self, images: Tensor) -> Tensor:
        """Return pixels (B, C, height, width) in 0..255, normalised, in the model's dtype."""
        dtype = self.head.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        mean, std = (  # created on the device, since a copy to it would wait for it
            torch.stack([images.new_full((1, 1), 255 * x, dtype=wide) for x in values])
            for values in (self.mean, self.std)
        )
        return ((images - mean) / std).to(dtype)
