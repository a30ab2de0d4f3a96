"""A source in; its family, the options that its tensors do not show, classes and facts out."""

from collections.abc import Mapping, Sequence
from typing import Any

from vitft.families.architectures import describe_architecture
from vitft.families.huggingface import CLIP_MEAN, CLIP_STD, HALF, KINDS, Kind, describe_huggingface
from vitft.families.originals import describe_original
from vitft.families.records import side_of
from vitft.families.source import Source
from vitft.pictures.preprocess import Framing

# beginnings of the names of transformers' processors to which one number is a square's size
SQUARE = ("ViT", "DeiT")
TIMM_CROP = 0.875  # where a pretrained_cfg has no crop_pct


def describe(source: Source) -> tuple[str, dict[str, Any]]:
    """Return the family's name and the options that its tensors do not show.

    Raises:
        ValueError: the family is not covered.
    """
    config, tensors = source.config, source.tensors
    if any(key.startswith("visual.") for key in tensors):  # even with a config.json of transformers
        return describe_original(tensors, source.open_clip)
    if config.get("model_type"):
        return describe_huggingface(config, tensors)
    if architecture := config.get("architecture"):
        return describe_architecture(architecture, config, tensors)
    return describe_original(tensors, source.open_clip)


def names_in(config: Mapping[str, Any]) -> Sequence[str]:
    """Return the class names in a config, unchanged; [] where there are none.

    Raises:
        ValueError: a key of id2label is no number.
    """
    labels = config.get("id2label") or {}
    if not all(key.isdecimal() for key in labels):
        raise ValueError("a key of id2label is no number")
    pretrained = config.get("pretrained_cfg") or {}
    names = [labels[key] for key in sorted(labels, key=int)]
    names = names or config.get("label_names") or pretrained.get("label_names") or []
    return [str(name) for name in (names.values() if isinstance(names, dict) else names)]


def class_names(config: Mapping[str, Any], n_classes: int) -> tuple[str, ...]:
    """Return the class names in a config, made unique; () if they are not as many as the classes.

    A repeated name gets its index: ImageNet's "crane" is a bird and a machine.

    Raises:
        ValueError: a key of id2label is no number.
    """
    names = names_in(config)
    if len(names) != n_classes:
        return ()
    first = {name: i for i, name in reversed([*enumerate(names)])}
    found = [name if first[name] == i else f"{name} ({i})" for i, name in enumerate(names)]
    return tuple(found) if len(set(found)) == n_classes else ()


def statistics(
    source: Source, family: str, n_channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, for pixels in 0..1.

    They are the source's or, where it has none, its family's. A processor of transformers may
    multiply pixels by another factor than 1 / 255, or leave out either step.
    """
    pretrained = source.config.get("pretrained_cfg") or {}
    candidates = [
        (source.preprocessing.get("image_mean"), source.preprocessing.get("image_std")),
        (source.open_clip.get("preprocess_cfg", {}).get("mean"),)
        + (source.open_clip.get("preprocess_cfg", {}).get("std"),),
        (pretrained.get("mean"), pretrained.get("std")),
        _usual(source, family),
    ]
    mean, std = next((m, s) for m, s in candidates if m and s)
    if len(mean) != n_channels:
        mean, std = (0.5,) * n_channels, (0.5,) * n_channels
    processor = source.preprocessing
    if not processor.get("do_normalize", True):
        mean, std = (0.0,) * n_channels, (1.0,) * n_channels
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    return tuple(x / (255 * factor) for x in mean), tuple(x / (255 * factor) for x in std)


def framing(source: Source) -> Framing:
    """Return how the source resizes and crops an image; a JPEG may be decoded at a smaller size.

    By default the shorter side is resized to the square's, by a bicubic kernel, and crop is 1; in a
    folder of timm it is timm's default.
    """
    processor, pretrained = source.preprocessing, source.config.get("pretrained_cfg") or {}
    clip = source.open_clip.get("preprocess_cfg") or {}
    resize, crop = "shortest", TIMM_CROP if "architecture" in source.config else 1.0
    size, cut = processor.get("size") or {}, processor.get("crop_size") or {}
    side = "height" if _is_of_both_sides(source) else "shortest_edge"
    size, cut = (x if isinstance(x, dict) else {side: side_of(x)} for x in (size, cut))
    if "height" in size:
        resize = "squash"
    if processor.get("do_center_crop", bool(cut)) and cut:
        whole = size.get("shortest_edge") or size.get("height")
        kept = cut.get("height") or cut.get("shortest_edge")
        crop = kept / whole if kept and whole else 1.0
    mode = str(pretrained.get("crop_mode") or clip.get("resize_mode"))
    resize = {
        **{"center": "shortest", "border": "pad"},  # timm's names
        **{"shortest": "shortest", "squash": "squash", "longest": "pad"},  # open_clip's
    }.get(mode, resize)
    crop = float(pretrained.get("crop_pct") or crop)
    by = processor.get("resample") or pretrained.get("interpolation") or clip.get("interpolation")
    kernel = "draft-bilinear" if by in (2, "bilinear") else "draft-bicubic"
    return Framing(resize=resize, crop=min(crop, 1.0), kernel=kernel)


def _is_of_both_sides(source: Source) -> bool:
    """Return whether a size of one number is that of both sides to the source's processor.

    To others it is the shorter side's. Files that transformers wrote before 2023 have such sizes.
    """
    processor = source.preprocessing
    name = processor.get("image_processor_type") or processor.get("feature_extractor_type")
    kind = KINDS.get(str(source.config.get("model_type")), Kind("", ""))
    return str(name).startswith(SQUARE) if name else kind.family == "hf-vit"


def _usual(source: Source, family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the usual mean and standard deviation of a family's images."""
    architecture = str(source.config.get("architecture"))
    if family == "clip" or "_clip_" in architecture:
        return CLIP_MEAN, CLIP_STD
    if "siglip" in architecture:
        return HALF, HALF
    kind = KINDS.get(str(source.config.get("model_type")), Kind("", ""))
    return kind.mean, kind.std


def facts(source: Source, family: str) -> dict[str, Any]:
    """Return what a converted file records of its source, for users and for the export."""
    pretrained = source.config.get("pretrained_cfg") or {}
    local = "_name_or_path"  # may be a path on the computer that saved the source
    config = {key: value for key, value in source.raw_config.items() if key != local}
    found = {
        "source": source.name,
        "family": family,
        "architecture": source.config.get("architecture"),
        "licence": pretrained.get("license") or source.config.get("license") or source.licence,
        "checksum": source.checksum,
        "config": config or None,
        "layout": {k: [str(t.dtype)[6:], *t.shape] for k, t in source.tensors.items()},
    }
    return {key: value for key, value in found.items() if value is not None}
