"""A base as one .safetensors file: tensors, and config, class names, preprocessing as metadata."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vitft.devices.processes import is_first
from vitft.devices.spread import is_sharded, whole
from vitft.files import check_weight, read_json, read_metadata, read_tensors, write_tensors
from vitft.model.config import ViTConfig
from vitft.model.vit import VisionTransformer
from vitft.records import record_of


@dataclass(frozen=True)
class _Metadata:
    """What the metadata of a base file holds."""

    config: ViTConfig
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)


BUNDLED = Path(__file__).parents[1] / "bases"
PICKLES = (".pth", ".pt", ".bin")  # ends of the names of other libraries' files


def save_model(model: VisionTransformer, path: str | Path) -> None:
    """Write the model to `path`, whole or not at all.

    Parameters that FSDP2 has sharded are gathered: every process must call this, and the first one
    writes.

    Raises:
        ValueError: the model has adapters, its class names don't fit its head, or the path ends as
            a pickle's does.
        OSError: the file cannot be written.
    """
    if Path(path).suffix in PICKLES:
        raise ValueError(f"{path} would be read as a pickle; let its name end in .safetensors")
    config = config_of(model)
    if len(model.classes) != config.n_classes:
        raise ValueError(
            f"{len(model.classes)} class names do not fit {config.n_classes} logits; "
            "set model.classes"
        )
    if len(set(model.classes)) < len(model.classes):
        raise ValueError("a class name is there twice; set model.classes")
    expected = _empty(config).state_dict().keys()
    state = model.state_dict()
    if state.keys() != expected:
        extra = sorted(state.keys() - expected)
        raise ValueError(
            f"the model is no plain base, it holds {extra[0]}; adapters.merge(model) first"
        )
    metadata = {
        "config": asdict(config),
        "classes": model.classes,
        "preprocessing": model.preprocessing,
        "facts": model.facts,
    }
    sharded = any(map(is_sharded, state.values()))
    state = {name: whole(value) for name, value in state.items()}
    if is_first() or not sharded:
        write_tensors(path, state, metadata)


def config_of(model: VisionTransformer) -> ViTConfig:
    """Return the config that builds this model again, with its present head."""
    head = model.head
    return replace(model.config, n_classes=head.out_features, head_bias=head.bias is not None)


def load_model(source: str | Path) -> VisionTransformer:
    """Return the model in a file or folder, or the bundled base of that name.

    It is in float32 and in evaluation mode. Another library's ViT is converted: a Hugging Face or
    timm folder, or an original DINOv2, DINOv3, DINO, MAE or CLIP file. "hf:OWNER/NAME" and
    "timm:NAME" are fetched from the hub.

    Raises:
        FileNotFoundError: the source is neither a file, nor a folder, nor a bundled base.
        ValueError: the file is no complete safetensors file or no vitft base; a tensor is missing,
            unexpected or has another shape; or another library's model is of no known family.
    """
    from vitft.families.read import read_foreign  # it imports this package, so not at the top
    from vitft.hub import fetched, is_name

    path = find_base(fetched(source))
    if path.is_dir() or is_foreign(path):
        model = read_foreign(path)
        if is_name(source):  # the folder in the hub's cache is named by a hash
            model.facts["source"] = str(source)
        return model
    tensors, metadata = read_tensors(path)
    if missing := {"config", "classes", "preprocessing"} - metadata.keys():
        raise ValueError(f"{path} is no vitft base: its metadata lacks {sorted(missing)[0]}")
    record = record_of(_Metadata, metadata, str(path))
    config, classes = record.config, record.classes
    if len(classes) != config.n_classes or len(set(classes)) < len(classes):
        raise ValueError(f"{path}: its class names do not fit its config, or one is there twice")
    model = _empty(config)
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            raise ValueError(
                f"{path} {'lacks' if name in expected else 'has an unexpected'} tensor {name}"
            )
        if expected[name].shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
            raise ValueError(f"{path}: tensor {name} has shape {shapes}")
        try:
            check_weight(name, tensors[name])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    tensors = {n: t.to(expected[n].dtype) for n, t in tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    model.classes = classes
    model.facts = record.facts
    try:
        model.preprocessing = {"image_size": config.image_size, **record.preprocessing}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model.requires_grad_().eval()


def find_base(name: str | Path) -> Path:
    """Return the path of a base.

    That is `name` itself where it is a file or another library's folder, else the model.safetensors
    in the folder `name`, else the bundled base of that name.

    Raises:
        FileNotFoundError: there is none of these; lists the bundled bases.
    """
    bundled = BUNDLED / f"{name}.safetensors"
    if Path(name).is_dir() and is_library_folder(Path(name)):
        return Path(name)
    for path in (Path(name), Path(name, "model.safetensors")):
        if path.is_file():
            return path
    if bundled.is_file():
        return bundled
    known = ", ".join(sorted(path.stem for path in BUNDLED.glob("*.safetensors"))) or "none yet"
    if Path(name, "adapter_config.json").is_file():
        raise FileNotFoundError(f"{name} holds an adapter, no base; vitft merge makes one of it")
    raise FileNotFoundError(
        f"there is no base {name}: neither a file, nor a run's folder, nor a bundled base ({known})"
    )


def is_known_backbone(source: str | Path) -> bool:
    """Return whether a base is another library's, or was converted from one.

    Raises:
        FileNotFoundError, ValueError: as for `load_model`.
    """
    from vitft.hub import fetched

    path = find_base(fetched(source))
    if path.is_dir() or is_foreign(path):
        return True
    return "family" in (read_metadata(path).get("facts") or {})


def is_library_folder(folder: Path) -> bool:
    """Return whether a folder holds another library's model.

    Its config.json names a model type or architecture; without a config.json, it has a .pth file or
    open_clip's weights.
    """
    config = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        return False
    if not config.is_file():
        return any(folder.glob("*.pth")) or (folder / "open_clip_model.safetensors").is_file()
    try:
        return not {"model_type", "architecture"}.isdisjoint(read_json(config))
    except (ValueError, TypeError):
        return False


def is_foreign(path: Path) -> bool:
    """Return whether a file is another library's: a pickle, or safetensors without our metadata."""
    if path.suffix != ".safetensors":
        return path.suffix in PICKLES
    try:
        with safe_open(path, framework="pt") as file:
            return "vitft" not in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False  # reading it as a vitft file then says what is wrong


def _empty(config: ViTConfig) -> VisionTransformer:
    with torch.device("meta"):
        return VisionTransformer(config)
