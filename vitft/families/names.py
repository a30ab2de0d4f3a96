"""Names of tensors: a table for each family, the library's name -> ours.

A name may hold {i}, a block's number. A module's name stands for its weight and bias. Where one
tensor of the library is several of ours, stacked along its first axis, our name is a tuple.
"""

from dataclasses import dataclass

QKV = ("attn.wq", "attn.wk", "attn.wv")
GATED = ("ffn.w1", "ffn.w3")  # gate, then what it multiplies

Names = dict[str, str | tuple[str, ...]]


def block(prefix: str, names: Names) -> Names:
    """Return a table of names in a block with `prefix`, which holds {i}, and ours added."""
    return {
        prefix + theirs: tuple(f"blocks.{{i}}.{one}" for one in ours)
        if isinstance(ours, tuple)
        else f"blocks.{{i}}.{ours}"
        for theirs, ours in names.items()
    }


@dataclass(frozen=True)
class Family:
    """The names of a library's ViTs.

    Attributes:
        names: the library's names of modules and tensors -> ours.
        prefixes: prefixes of every name in models for a task; they are removed.
        unused: regular expressions for names of tensors that our forward pass does not need.
    """

    names: Names
    prefixes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


_HF_EMBEDDINGS: Names = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "registers",
    "embeddings.position_embeddings": "pos_embedding",
    "embeddings.patch_embeddings.projection": "patch_embed",
    "layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}
_HF_UNUSED = (r"pooler\.dense\..*", r"embeddings\.mask_token", r"decoder\..*", r".*position_ids")
# names of transformers 4, which files hold, and those of transformers 5 in memory
_HF_VIT = block(
    "encoder.layer.{i}.",
    {
        "layernorm_before": "norm1",
        "attention.attention.query": "attn.wq",
        "attention.attention.key": "attn.wk",
        "attention.attention.value": "attn.wv",
        "attention.output.dense": "attn.wo",
        "layernorm_after": "norm2",
        "intermediate.dense": "ffn.w1",
        "output.dense": "ffn.w2",
    },
) | block(
    "layers.{i}.",
    {
        "layernorm_before": "norm1",
        "attention.q_proj": "attn.wq",
        "attention.k_proj": "attn.wk",
        "attention.v_proj": "attn.wv",
        "attention.o_proj": "attn.wo",
        "layernorm_after": "norm2",
        "mlp.fc1": "ffn.w1",
        "mlp.fc2": "ffn.w2",
    },
)
_HF_DINOV2: Names = {}
for _prefix in ("encoder.layer.{i}.", "layers.{i}."):
    _HF_DINOV2 |= block(
        _prefix,
        {
            "norm1": "norm1",
            "attention.attention.query": "attn.wq",
            "attention.attention.key": "attn.wk",
            "attention.attention.value": "attn.wv",
            "attention.output.dense": "attn.wo",
            "attention.q_proj": "attn.wq",
            "attention.k_proj": "attn.wk",
            "attention.v_proj": "attn.wv",
            "attention.o_proj": "attn.wo",
            "layer_scale1.lambda1": "ls1.gamma",
            "norm2": "norm2",
            "mlp.fc1": "ffn.w1",
            "mlp.fc2": "ffn.w2",
            "mlp.weights_in": GATED,
            "mlp.weights_out": "ffn.w2",
            "mlp.gate_proj": "ffn.w1",
            "mlp.up_proj": "ffn.w3",
            "mlp.down_proj": "ffn.w2",
            "layer_scale2.lambda1": "ls2.gamma",
        },
    )
_HF_DINOV3: Names = {
    "norm1": "norm1",
    "attention.q_proj": "attn.wq",
    "attention.k_proj": "attn.wk",
    "attention.v_proj": "attn.wv",
    "attention.o_proj": "attn.wo",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2": "norm2",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.down_proj": "ffn.w2",
}
_HF_DINOV3_OUTER: Names = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "registers",
    "embeddings.patch_embeddings": "patch_embed",
    "norm": "norm",
}
_HF_CLIP: Names = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embedding",
    "embeddings.patch_embedding": "patch_embed",
    "pre_layrnorm": "pre_norm",
    "post_layernorm": "norm",
    "visual_projection": "head",
}
_HF_CLIP |= block(
    "encoder.layers.{i}.",
    {
        "layer_norm1": "norm1",
        "self_attn.q_proj": "attn.wq",
        "self_attn.k_proj": "attn.wk",
        "self_attn.v_proj": "attn.wv",
        "self_attn.out_proj": "attn.wo",
        "layer_norm2": "norm2",
        "mlp.fc1": "ffn.w1",
        "mlp.fc2": "ffn.w2",
    },
)
_MAP = ("map_pool.attn.wq", "map_pool.attn.wk", "map_pool.attn.wv")
_HF_SIGLIP: Names = _HF_CLIP | {
    "head.probe": "map_pool.query",
    "head.attention.in_proj_weight": tuple(f"{name}.weight" for name in _MAP),
    "head.attention.in_proj_bias": tuple(f"{name}.bias" for name in _MAP),
    "head.attention.out_proj": "map_pool.attn.wo",
    "head.layernorm": "map_pool.norm",
    "head.mlp.fc1": "map_pool.ffn.w1",
    "head.mlp.fc2": "map_pool.ffn.w2",
    "classifier": "head",
}

_TIMM_BLOCK: Names = {
    "norm1": "norm1",
    "attn.qkv": QKV,
    "attn.proj": "attn.wo",
    "ls1.gamma": "ls1.gamma",
    "norm2": "norm2",
    "mlp.fc1": "ffn.w1",
    "mlp.fc2": "ffn.w2",
    "ls2.gamma": "ls2.gamma",
}
_TIMM: Names = {
    "cls_token": "cls_token",
    "dist_token": "dist_token",
    "reg_token": "registers",
    "pos_embed": "pos_embedding",
    "patch_embed.proj": "patch_embed",
    "norm_pre": "pre_norm",
    "norm": "norm",
    "fc_norm": "norm",
    "head": "head",
    "head_dist": "head_dist",
}
_TIMM |= block("blocks.{i}.", _TIMM_BLOCK)
_TIMM_MAP: Names = {
    "attn_pool.latent": "map_pool.query",
    "attn_pool.q": "map_pool.attn.wq",
    "attn_pool.kv": ("map_pool.attn.wk", "map_pool.attn.wv"),
    "attn_pool.proj": "map_pool.attn.wo",
    "attn_pool.norm": "map_pool.norm",
    "attn_pool.mlp.fc1": "map_pool.ffn.w1",
    "attn_pool.mlp.fc2": "map_pool.ffn.w2",
}

_CLIP: Names = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embedding",
    "conv1": "patch_embed",
    "ln_pre": "pre_norm",
    "ln_post": "norm",
    "proj": "head.weight",
}
_CLIP |= block(
    "transformer.resblocks.{i}.",
    {
        "ln_1": "norm1",
        "attn.in_proj_weight": tuple(f"{name}.weight" for name in QKV),
        "attn.in_proj_bias": tuple(f"{name}.bias" for name in QKV),
        "attn.out_proj": "attn.wo",
        "ln_2": "norm2",
        "mlp.c_fc": "ffn.w1",
        "mlp.c_proj": "ffn.w2",
    },
)

_HEADS = (r"(dino_|ibot_)?head\.(mlp|last_layer)\..*",)  # of self-supervised training
_TEXT = (r".*position_ids", r"text_model\..*", r"text_projection\..*", r"logit_.*")

FAMILIES: dict[str, Family] = {
    "hf-vit": Family(
        _HF_EMBEDDINGS | _HF_VIT,
        ("vit.", "deit.", "ijepa."),
        _HF_UNUSED,
    ),
    "hf-dinov2": Family(
        _HF_EMBEDDINGS | _HF_DINOV2, ("dinov2.", "dinov2_with_registers."), _HF_UNUSED
    ),
    "hf-dinov3": Family(
        _HF_DINOV3_OUTER
        | block("layer.{i}.", _HF_DINOV3 | {"mlp.up_proj": "ffn.w1"})
        | block("model.layer.{i}.", _HF_DINOV3 | {"mlp.up_proj": "ffn.w1"}),
        unused=(r"embeddings\.mask_token", r"rope_embeddings\..*"),
    ),
    "hf-dinov3-gated": Family(
        _HF_DINOV3_OUTER
        | block("layer.{i}.", _HF_DINOV3 | {"mlp.gate_proj": "ffn.w1", "mlp.up_proj": "ffn.w3"})
        | block(
            "model.layer.{i}.", _HF_DINOV3 | {"mlp.gate_proj": "ffn.w1", "mlp.up_proj": "ffn.w3"}
        ),
        unused=(r"embeddings\.mask_token", r"rope_embeddings\..*"),
    ),
    "hf-clip": Family(_HF_CLIP | {"classifier": "head"}, ("vision_model.",), _TEXT),
    "hf-siglip": Family(_HF_SIGLIP, ("vision_model.",), _TEXT),
    "timm": Family(_TIMM | _TIMM_MAP, unused=(r"mask_token", *_HEADS, r"decoder_.*")),
    "timm-gated": Family(_TIMM | block("blocks.{i}.", {"mlp.fc1": GATED}), unused=(r"mask_token",)),
    "timm-dinov3": Family(
        _TIMM
        | block(
            "blocks.{i}.",
            {
                "gamma_1": "ls1.gamma",
                "gamma_2": "ls2.gamma",
                "mlp.fc1_g": "ffn.w1",
                "mlp.fc1_x": "ffn.w3",
                "attn.q_bias": "attn.wq.bias",
                "attn.v_bias": "attn.wv.bias",
            },
        ),
        unused=(r"rope\..*",),
    ),
    "dinov2": Family(
        _TIMM
        | {"register_tokens": "registers"}
        | block("blocks.{i}.", {"mlp.w12": GATED, "mlp.w3": "ffn.w2"}),
        unused=(r"mask_token", *_HEADS),
    ),
    "dinov3": Family(
        _TIMM
        | {"storage_tokens": "registers", "rope_embed.periods": "rope.periods"}
        | block("blocks.{i}.", {"mlp.w1": "ffn.w1", "mlp.w2": "ffn.w3", "mlp.w3": "ffn.w2"}),
        unused=(r"mask_token", r"local_cls_norm\..*", r".*bias_mask", *_HEADS),
    ),
    "clip": Family(_CLIP, ("visual.",), (r"(?!visual\.).*",)),
}
