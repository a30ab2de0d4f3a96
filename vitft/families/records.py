"""Typed records of the JSON files in other libraries' folders, with the entries that we read.

Their types are checked when a folder is read. An entry that is null counts as missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

import msgspec

from vitft.records import record_of

Positive = Annotated[int, msgspec.Meta(gt=0)]
Numbers = tuple[float, ...]
Name = str | int | float | bool  # of a class
Names = list[Name] | dict[str, Name]
Side = Positive | list[Positive]  # of square images; or height and width


@dataclass(frozen=True)
class VisionConfig:
    """Entries of transformers' config.json that the tensors do not show."""

    hidden_size: Positive | None = None
    hidden_act: str | None = None
    layer_norm_eps: float | None = None
    num_attention_heads: Positive | None = None
    image_size: Side | None = None
    rope_theta: float | None = None


@dataclass(frozen=True)
class PretrainedCfg:
    """timm's `pretrained_cfg`: preprocessing and classes."""

    mean: Numbers | None = None
    std: Numbers | None = None
    input_size: tuple[Positive, Positive, Positive] | None = None
    crop_mode: str | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    label_names: Names | None = None
    license: str | None = None


@dataclass(frozen=True)
class ModelArgs:
    """timm's `model_args`: arguments of the model."""

    img_size: Side | None = None
    num_heads: Positive | None = None
    global_pool: str | None = None


@dataclass(frozen=True)
class Config(VisionConfig):
    """config.json, of transformers or timm."""

    model_type: str | None = None
    vision_config: VisionConfig | None = None
    id2label: dict[str, Name] | None = None
    license: str | None = None
    architecture: str | None = None
    architectures: list[str] | None = None
    global_pool: str | None = None
    label_names: Names | None = None
    model_args: ModelArgs | None = None
    pretrained_cfg: PretrainedCfg | None = None


@dataclass(frozen=True)
class Processor:
    """preprocessor_config.json, of transformers."""

    size: Positive | list[Positive] | dict[str, Positive] | None = None
    crop_size: Positive | list[Positive] | dict[str, Positive] | None = None
    do_resize: bool | None = None
    do_center_crop: bool | None = None
    do_pad: bool | None = None
    image_processor_type: str | None = None
    feature_extractor_type: str | None = None
    image_mean: Numbers | None = None
    image_std: Numbers | None = None
    resample: int | str | None = None
    do_rescale: bool | None = None
    rescale_factor: Annotated[float, msgspec.Meta(gt=0)] | None = None
    do_normalize: bool | None = None


@dataclass(frozen=True)
class NormKwargs:
    """open_clip's `norm_kwargs`: options of the layer norms."""

    eps: float | None = None


@dataclass(frozen=True)
class ActKwargs:
    """open_clip's `act_kwargs`: options of the activation."""

    approximate: str | None = None


@dataclass(frozen=True)
class VisionCfg:
    """open_clip's `vision_cfg`: the vision tower."""

    timm_model_name: str | None = None
    pool_type: str | None = None
    head_width: Positive | None = None
    final_ln_after_pool: bool | None = None
    act_kwargs: ActKwargs | None = None
    norm_kwargs: NormKwargs | None = None


@dataclass(frozen=True)
class ModelCfg:
    """open_clip's `model_cfg`: the model."""

    quick_gelu: bool | None = None
    vision_cfg: VisionCfg | None = None


@dataclass(frozen=True)
class PreprocessCfg:
    """open_clip's `preprocess_cfg`: preprocessing."""

    mean: Numbers | None = None
    std: Numbers | None = None
    resize_mode: str | None = None
    interpolation: str | None = None


@dataclass(frozen=True)
class OpenClip:
    """open_clip_config.json."""

    model_cfg: ModelCfg | None = None
    preprocess_cfg: PreprocessCfg | None = None


@dataclass(frozen=True)
class Index:
    """model.safetensors.index.json, and the same of pytorch_model.bin."""

    weight_map: dict[str, str] | None = None


def side_of(size: int | list[int]) -> int:
    """Return the side of square images in pixels.

    Raises:
        ValueError: they are not square.
    """
    sides = [size] if isinstance(size, int) else size
    if len(set(sides)) != 1:
        raise ValueError(f"images of {size} pixels are not covered; square ones are")
    return sides[0]


def checked(found: Mapping[str, Any], kind: type[Any], where: str) -> dict[str, Any]:
    """Return a file's entries without nulls, after a check of the types of those that we read.

    Args:
        found: the file's entries.
        kind: the record with the entries that we read.
        where: the file's path, for messages.

    Raises:
        ValueError: an entry is of another type.
    """
    entries: dict[str, Any] = _without_nulls(found)
    known = {field.name for field in fields(kind)}
    record_of(kind, {key: value for key, value in entries.items() if key in known}, where)
    return entries


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(part) for key, part in value.items() if part is not None}
