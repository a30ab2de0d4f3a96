"""The original repositories' models, transcribed: random tensors in, what they compute out.

Written from the papers' code in plain functions, one a family, so that names, order and arithmetic
stand beside ours. `t` is a state dict; images are (B, 3, H, W) in float64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]
DIM, HIDDEN, PATCH, SIDE = 192, 40, 4, 4  # 3 heads of 64; a table of 4 x 4 positions


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def linear(t: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))


def norm(t: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def patches(t: Tensors, name: str, images: Tensor) -> Tensor:
    weight = t[f"{name}.weight"]
    x = F.conv2d(images, weight, t.get(f"{name}.bias"), stride=weight.shape[-1])
    return x.flatten(2).transpose(1, 2)


def attend(qkv: Tensor, n_heads: int, turn: tuple[Tensor, Tensor, int] | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    if turn is not None:
        q, k = (rotate(x, *turn) for x in (q, k))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, n_prefix: int) -> Tensor:
    prefix, rest = x[:, :, :n_prefix], x[:, :, n_prefix:]
    a, b = rest.chunk(2, dim=-1)
    return torch.cat([prefix, rest * cos + torch.cat([-b, a], -1) * sin], dim=2)


def linear_shapes(name: str, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def block_shapes(
    prefix: str, dim: int, feed: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for one in ("norm1", "norm2"):
        shapes |= {f"{prefix}.{one}.weight": (dim,), f"{prefix}.{one}.bias": (dim,)}
    shapes |= linear_shapes(f"{prefix}.attn.qkv", dim, 3 * dim)
    shapes |= linear_shapes(f"{prefix}.attn.proj", dim, dim)
    for one, (n_in, n_out) in feed.items():
        shapes |= linear_shapes(f"{prefix}.{one}", n_in, n_out)
    return shapes


def outer_shapes(dim: int, patch: int = PATCH) -> dict[str, tuple[int, ...]]:
    shapes = {"cls_token": (1, 1, dim), "norm.weight": (dim,), "norm.bias": (dim,)}
    return shapes | {
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }


def scales(prefix: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.ls1.gamma": (dim,), f"{prefix}.ls2.gamma": (dim,)}


def dinov2_tensors(*, registers: bool, gated: bool, chunked: bool) -> Tensors:
    if gated:
        feed = {"mlp.w12": (DIM, 2 * HIDDEN), "mlp.w3": (HIDDEN, DIM)}
    else:
        feed = {"mlp.fc1": (DIM, HIDDEN), "mlp.fc2": (HIDDEN, DIM)}
    shapes = outer_shapes(DIM) | {"mask_token": (1, DIM), "pos_embed": (1, 1 + SIDE**2, DIM)}
    shapes |= {"register_tokens": (1, 4, DIM)} if registers else {}
    for prefix in ("blocks.0.0", "blocks.1.1") if chunked else ("blocks.0", "blocks.1"):
        shapes |= block_shapes(prefix, DIM, feed) | scales(prefix, DIM)
    return random_tensors(shapes)


def dinov2(t: Tensors, images: Tensor) -> Tensor:
    """Return the normed tokens: class, registers, patches."""
    x, rows = patches(t, "patch_embed.proj", images), images.shape[-1] // PATCH
    registers = t.get("register_tokens")
    x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], 1)
    pos, grid = t["pos_embed"][:, :1], t["pos_embed"][:, 1:]
    if rows != SIDE:
        grid = grid.reshape(1, SIDE, SIDE, DIM).permute(0, 3, 1, 2)
        if registers is None:  # interpolate_offset 0.1, no antialias
            factor = (rows + 0.1) / SIDE
            grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        else:
            grid = F.interpolate(grid, size=(rows, rows), mode="bicubic", antialias=True)
        grid = grid.permute(0, 2, 3, 1).reshape(1, -1, DIM)
    x = x + torch.cat([pos, grid], 1)
    if registers is not None:
        x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], 1)
    for p in (
        ("blocks.0.0", "blocks.1.1") if "blocks.0.0.norm1.bias" in t else ("blocks.0", "blocks.1")
    ):
        y = attend(linear(t, f"{p}.attn.qkv", norm(t, f"{p}.norm1", x, 1e-6)), 3)
        x = x + t[f"{p}.ls1.gamma"] * linear(t, f"{p}.attn.proj", y)
        y = norm(t, f"{p}.norm2", x, 1e-6)
        if f"{p}.mlp.w12.weight" in t:
            a, b = linear(t, f"{p}.mlp.w12", y).chunk(2, dim=-1)
            y = linear(t, f"{p}.mlp.w3", F.silu(a) * b)
        else:
            y = linear(t, f"{p}.mlp.fc2", F.gelu(linear(t, f"{p}.mlp.fc1", y)))
        x = x + t[f"{p}.ls2.gamma"] * y
    return norm(t, "norm", x, 1e-6)


def dinov3_tensors(*, gated: bool) -> Tensors:
    dim = 32  # 2 heads of 16
    names = ("w1", "w2", "w3") if gated else ("fc1", "fc2")
    feed = {f"mlp.{name}": (dim, HIDDEN) for name in names[:-1]} | {
        f"mlp.{names[-1]}": (HIDDEN, dim)
    }
    shapes = outer_shapes(dim) | {"mask_token": (1, dim), "storage_tokens": (1, 4, dim)}
    for prefix in ("blocks.0", "blocks.1"):
        shapes |= block_shapes(prefix, dim, feed) | scales(prefix, dim)
    t = random_tensors(shapes)
    for prefix in ("blocks.0", "blocks.1"):
        mask = torch.ones(3 * dim)
        mask[dim : 2 * dim] = 0
        t[f"{prefix}.attn.qkv.bias_mask"] = mask
    t["rope_embed.periods"] = (100 ** (torch.arange(4) / 4)).bfloat16()
    return t


def dinov3(t: Tensors, images: Tensor) -> Tensor:
    """Return the normed tokens: class, storage, patches."""
    x, rows = patches(t, "patch_embed.proj", images), images.shape[-1] // PATCH
    prefix = torch.cat([t["cls_token"], t["storage_tokens"]], 1)
    x = torch.cat([prefix.expand(len(x), -1, -1), x], 1)
    place = 2 * torch.arange(0.5, rows, dtype=torch.float64) / rows - 1
    coords = torch.stack(torch.meshgrid(place, place, indexing="ij"), -1).flatten(0, 1)
    angles = 2 * math.pi * coords[:, :, None] / t["rope_embed.periods"].double()
    angles = angles.flatten(1, 2).tile(2)
    turn = (angles.cos(), angles.sin(), 5)
    for p in ("blocks.0", "blocks.1"):
        bias = t[f"{p}.attn.qkv.bias"] * t[f"{p}.attn.qkv.bias_mask"]
        qkv = F.linear(norm(t, f"{p}.norm1", x, 1e-5), t[f"{p}.attn.qkv.weight"], bias)
        x = x + t[f"{p}.ls1.gamma"] * linear(t, f"{p}.attn.proj", attend(qkv, 2, turn))
        y = norm(t, f"{p}.norm2", x, 1e-5)
        if f"{p}.mlp.w3.weight" in t:
            y = linear(
                t, f"{p}.mlp.w3", F.silu(linear(t, f"{p}.mlp.w1", y)) * linear(t, f"{p}.mlp.w2", y)
            )
        else:
            y = linear(t, f"{p}.mlp.fc2", F.gelu(linear(t, f"{p}.mlp.fc1", y)))
        x = x + t[f"{p}.ls2.gamma"] * y
    return norm(t, "norm", x, 1e-5)


def plain_tensors() -> Tensors:
    """Return the tensors of DINO's and MAE's ViT."""
    shapes = outer_shapes(DIM) | {"pos_embed": (1, 1 + SIDE**2, DIM)}
    for prefix in ("blocks.0", "blocks.1"):
        shapes |= block_shapes(prefix, DIM, {"mlp.fc1": (DIM, HIDDEN), "mlp.fc2": (HIDDEN, DIM)})
    return random_tensors(shapes)


def plain(t: Tensors, images: Tensor) -> Tensor:
    """Return the normed tokens: class, patches."""
    x = patches(t, "patch_embed.proj", images)
    x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], 1) + t["pos_embed"]
    for p in ("blocks.0", "blocks.1"):
        y = attend(linear(t, f"{p}.attn.qkv", norm(t, f"{p}.norm1", x, 1e-6)), 3)
        x = x + linear(t, f"{p}.attn.proj", y)
        y = F.gelu(linear(t, f"{p}.mlp.fc1", norm(t, f"{p}.norm2", x, 1e-6)))
        x = x + linear(t, f"{p}.mlp.fc2", y)
    return norm(t, "norm", x, 1e-6)


def clip_tensors() -> Tensors:
    """Return the tensors of OpenAI's and open_clip's vision tower."""
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (DIM,),
        "positional_embedding": (1 + SIDE**2, DIM),
        "conv1.weight": (DIM, 3, PATCH, PATCH),
        "proj": (DIM, 7),
    }
    for one in ("ln_pre", "ln_post"):
        shapes |= {f"{one}.weight": (DIM,), f"{one}.bias": (DIM,)}
    for i in range(2):
        p = f"transformer.resblocks.{i}"
        for one in ("ln_1", "ln_2"):
            shapes |= {f"{p}.{one}.weight": (DIM,), f"{p}.{one}.bias": (DIM,)}
        shapes |= {f"{p}.attn.in_proj_weight": (3 * DIM, DIM), f"{p}.attn.in_proj_bias": (3 * DIM,)}
        shapes |= linear_shapes(f"{p}.attn.out_proj", DIM, DIM)
        shapes |= linear_shapes(f"{p}.mlp.c_fc", DIM, HIDDEN)
        shapes |= linear_shapes(f"{p}.mlp.c_proj", HIDDEN, DIM)
    return random_tensors({f"visual.{name}": shape for name, shape in shapes.items()})


def clip(t: Tensors, images: Tensor, *, n_heads: int, quick: bool) -> Tensor:
    """Return the embeddings of images."""
    t = {name.removeprefix("visual."): tensor for name, tensor in t.items()}
    x = patches(t, "conv1", images)
    x = torch.cat([t["class_embedding"].expand(len(x), 1, -1), x], 1) + t["positional_embedding"]
    x = norm(t, "ln_pre", x, 1e-5)
    for i in range(2):
        p = f"transformer.resblocks.{i}"
        y = norm(t, f"{p}.ln_1", x, 1e-5)
        qkv = F.linear(y, t[f"{p}.attn.in_proj_weight"], t[f"{p}.attn.in_proj_bias"])
        x = x + linear(t, f"{p}.attn.out_proj", attend(qkv, n_heads))
        y = linear(t, f"{p}.mlp.c_fc", norm(t, f"{p}.ln_2", x, 1e-5))
        y = y * torch.sigmoid(1.702 * y) if quick else F.gelu(y)
        x = x + linear(t, f"{p}.mlp.c_proj", y)
    return norm(t, "ln_post", x[:, 0], 1e-5) @ t["proj"]
