"""A source in; its family, the options that its tensors do not show, classes and facts out."""

from collections.abc import Mapping, Sequence
from typing import Any

from vitft.families.architectures import describe_architecture
from vitft.families.huggingface import describe_huggingface
from vitft.families.originals import describe_original
from vitft.families.source import Source


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
