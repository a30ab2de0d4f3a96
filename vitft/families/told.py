"""What the JSON files of another library's folder may say, of the entries that are read here.

Each is checked for its type when the folder is read. An entry that is null counts as left out.
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
Side = Positive | list[Positive]  # of images; or height and width


@dataclass(frozen=True)
class VisionConfig:
    """Of transformers: what its tensors do not tell."""

    hidden_size: Positive | None = None
    hidden_act: str | None = None
    layer_norm_eps: float | None = None
    num_attention_heads: Positive | None = None
    image_size: Side | None = None
    rope_theta: float | None = None


@dataclass(frozen=True)
class PretrainedCfg:
    """Of timm: how its images are prepared, and its classes."""

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
    """Of timm: arguments of the model."""

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
    do_center_crop: bool | None = None
    image_mean: Numbers | None = None
    image_std: Numbers | None = None
    resample: int | str | None = None


@dataclass(frozen=True)
class NormKwargs:
    """Of open_clip: of the layer norms."""

    eps: float | None = None


@dataclass(frozen=True)
class ActKwargs:
    """Of open_clip: of the activation."""

    approximate: str | None = None


@dataclass(frozen=True)
class VisionCfg:
    """Of open_clip: the vision tower."""

    timm_model_name: str | None = None
    pool_type: str | None = None
    head_width: Positive | None = None
    final_ln_after_pool: bool | None = None
    act_kwargs: ActKwargs | None = None
    norm_kwargs: NormKwargs | None = None


@dataclass(frozen=True)
class ModelCfg:
    """Of open_clip: the model."""

    quick_gelu: bool | None = None
    vision_cfg: VisionCfg | None = None


@dataclass(frozen=True)
class PreprocessCfg:
    """Of open_clip: how its images are prepared."""

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
    """model.safetensors.index.json."""

    weight_map: dict[str, str] | None = None


def side_of(size: int | list[int]) -> int:
    """Return the side of square images.

    Raises:
        ValueError: they are not square.
    """
    sides = [size] if isinstance(size, int) else size
    if len(set(sides)) != 1:
        raise ValueError(f"images of {size} pixels are not covered; square ones are")
    return sides[0]


def checked(found: Mapping[str, Any], kind: type[Any], where: str) -> dict[str, Any]:
    """Return what a file says without its nulls, once what is read of it is of its type.

    Raises:
        ValueError: something is not.
    """
    said: dict[str, Any] = _without_nulls(found)
    known = {field.name for field in fields(kind)}
    record_of(kind, {key: value for key, value in said.items() if key in known}, where)
    return said


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(part) for key, part in value.items() if part is not None}
