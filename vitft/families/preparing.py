"""A source in; how its library makes a model's input of a picture, as our record tells it, out."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vitft.families.huggingface import CLIP_MEAN, CLIP_STD, HALF, IMAGENET, KINDS, Kind
from vitft.families.source import Source
from vitft.pictures.preprocess import Framing

TIMM_CROP = 0.875  # where a pretrained_cfg has no crop_pct
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
# timm's crop_mode and open_clip's resize_mode -> ours; to timm, any other is "center"
RESIZES = {"center": "shortest", "border": "pad", "shortest": "shortest", "squash": "squash"}

_SQUARE = {"height": 224, "width": 224}
_HALF = {"image_mean": HALF, "image_std": HALF}
_CLIP: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "crop_size": _SQUARE,
    "do_center_crop": True,
    "resample": 3,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
# transformers' image processors -> the entries that a file may lack
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"size": _SQUARE, "resample": 2} | _HALF,
    "DeiT": _CLIP | {"size": {"height": 256, "width": 256}} | _HALF,
    "Beit": {"size": _SQUARE, "crop_size": _SQUARE, "resample": 3} | _HALF,
    "Siglip": {"size": _SQUARE, "resample": 3} | _HALF,
    "DINOv3ViT": {"size": _SQUARE, "resample": 2}
    | dict(zip(("image_mean", "image_std"), IMAGENET, strict=True)),
    "CLIP": _CLIP,
    "Bit": _CLIP,
}
ONE_SIDE = ("CLIP", "Bit", "Siglip")  # to them a size of one number is the shorter side's


def preparation(source: Source, family: str, image_size: int, n_channels: int) -> dict[str, Any]:
    """Return the record of a source's preprocessing, as `Preprocessing` takes it.

    Raises:
        ValueError: the source's library makes something else of a picture than our record can tell.
    """
    pretrained = source.config.get("pretrained_cfg") or {}
    clip = source.open_clip.get("preprocess_cfg") or {}
    entries = _entries(source)
    if "architecture" in source.config:
        mean, std, framing = pretrained.get("mean"), pretrained.get("std"), _of_timm(pretrained)
    elif entries:
        mean, std, framing = entries["image_mean"], entries["image_std"], _of_transformers(entries)
    else:
        mean, std, framing = clip.get("mean"), clip.get("std"), _of_open_clip(clip)
    usual = _usual(source, family)
    mean, std = (_of_channels(x or y, n_channels) for x, y in zip((mean, std), usual, strict=True))
    if entries:
        mean, std = _rescaled(entries, mean, std)
    return {"image_size": image_size, "mean": mean, "std": std} | asdict(framing)


def prepared_side(source: Source) -> int | None:
    """Return the side of the images that a source's processor gives; None where none tells it.

    It need not be that of the model's position embedding: DINOv2 has one for 518 pixels, and 224.
    """
    entries = _entries(source)
    if not entries or not entries.get("do_resize", True):
        return None
    return _side("size", entries["crop_size" if entries.get("do_center_crop") else "size"])


def _of_timm(pretrained: Mapping[str, Any]) -> Framing:
    """Return how timm resizes and crops an image; without entries, as by its defaults."""
    crop = float(pretrained.get("crop_pct") or TIMM_CROP)
    _refuse_margin(crop, f"crop_pct={crop:g}")
    resize = RESIZES.get(str(pretrained.get("crop_mode")), "shortest")
    return Framing(resize=resize, crop=crop, kernel=_kernel(pretrained.get("interpolation")))


def _of_open_clip(clip: Mapping[str, Any]) -> Framing:
    """Return how open_clip resizes an image; without entries, the usual way of any library.

    Raises:
        ValueError: it fills a square with black.
    """
    mode = str(clip.get("resize_mode", "shortest"))
    if mode not in RESIZES:
        raise ValueError(f"resize_mode {mode!r} is not covered; there are shortest, squash")
    return Framing(resize=RESIZES[mode], kernel=_kernel(clip.get("interpolation")))


def _of_transformers(entries: Mapping[str, Any]) -> Framing:
    """Return how an image processor of transformers resizes and crops an image.

    One that does neither takes only images of the model's size, which no `Framing` changes.

    Raises:
        ValueError: an image becomes no square, or is cut without being resized, or is padded.
    """
    crops, kernel = bool(entries.get("do_center_crop")), _kernel(entries["resample"])
    if entries.get("do_pad"):
        raise ValueError("do_pad=True is not covered; pictures are resized and cropped to squares")
    if not entries.get("do_resize", True):
        if crops:
            raise ValueError("do_resize=False with do_center_crop=True is not covered")
        return Framing(kernel=kernel, halves="down")
    size = entries["size"]
    side = size.get("shortest_edge") if size.keys() == {"shortest_edge"} else _side("size", size)
    whole = int(side)
    if crops and not entries.get("crop_size"):
        raise ValueError("do_center_crop=True without crop_size is not covered")
    kept = _side("crop_size", entries["crop_size"]) if crops else whole
    if "shortest_edge" in size and not crops:
        raise ValueError(f"size={size} without do_center_crop gives images that are not square")
    _refuse_margin(kept / whole, f"crop_size={kept} of size={whole}")
    crop = kept / whole
    if int(kept / crop) < whole:  # rounding has made the crop too large
        crop = math.nextafter(crop, 0)
    resize = "shortest" if "shortest_edge" in size else "squash"
    return Framing(resize=resize, crop=crop, kernel=kernel, halves="down")


def _side(name: str, size: Mapping[str, int]) -> int:
    """Return the side of a square from a processor's entry.

    Raises:
        ValueError: it is of another shape.
    """
    if size.keys() != {"height", "width"} or size["height"] != size["width"]:
        raise ValueError(f"{name}={dict(size)} is not covered; equal height and width are")
    return size["height"]


def _refuse_margin(crop: float, said: str) -> None:
    """Refuse a crop that is larger than the resized image; the libraries fill it with black.

    Raises:
        ValueError: it is.
    """
    if crop > 1:
        raise ValueError(f"{said} leaves a black margin, which is not covered; crop at most 1")


def _kernel(by: int | str | None) -> str:
    """Return our name of a kernel, the usual one where none is named.

    Raises:
        ValueError: it is unknown.
    """
    name = RESAMPLE[by] if isinstance(by, int) and 0 <= by < len(RESAMPLE) else by or "bicubic"
    if name not in RESAMPLE:
        raise ValueError(f"the kernel {name!r} is not covered; there are {', '.join(RESAMPLE)}")
    return f"draft-{name}" if name in ("bicubic", "bilinear") else str(name)


def _entries(source: Source) -> dict[str, Any]:
    """Return the entries of transformers' image processor; {} where the source has none.

    Those of its class stand in for what the file lacks. Sizes become dictionaries:
    files that transformers wrote before 2023 have numbers.

    Raises:
        ValueError: the processor is not covered.
    """
    written = source.preprocessing
    if not written or "architecture" in source.config:  # timm reads its pretrained_cfg only
        return {}
    name = written.get("image_processor_type") or written.get("feature_extractor_type")
    kind = KINDS.get(str(source.config.get("model_type")))
    usual = kind.processor if kind else "CLIP"
    name = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name) if name else usual
    if name not in PROCESSORS:
        raise ValueError(
            f"image processor {name!r} is not covered; there are {', '.join(PROCESSORS)}"
        )
    entries = PROCESSORS[name] | written
    for key in ("size", "crop_size"):
        given = entries.get(key)
        if isinstance(given, int):
            both = key == "crop_size" or name not in ONE_SIDE
            entries[key] = dict.fromkeys(("height", "width") if both else ("shortest_edge",), given)
        elif isinstance(given, list):
            entries[key] = dict(zip(("height", "width"), given, strict=False))
    return entries


def _of_channels(values: tuple[float, ...], n_channels: int) -> tuple[float, ...]:
    """Return a number for each channel; halves where the source has them for other channels."""
    if len(values) == 1:
        return tuple(values) * n_channels
    return tuple(values) if len(values) == n_channels else (0.5,) * n_channels


def _rescaled(
    processor: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of pixels in 0..1, by which a processor is imitated.

    It may multiply pixels by another factor than 1 / 255, or leave out either step.
    """
    if not processor.get("do_normalize", True):
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    return tuple(x / (255 * factor) for x in mean), tuple(x / (255 * factor) for x in std)


def _usual(source: Source, family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the usual mean and standard deviation of a family's images."""
    architecture = str(source.config.get("architecture"))
    if family == "clip" or "_clip_" in architecture:
        return CLIP_MEAN, CLIP_STD
    if "siglip" in architecture:
        return HALF, HALF
    kind = KINDS.get(str(source.config.get("model_type")), Kind("", ""))
    return kind.mean, kind.std
