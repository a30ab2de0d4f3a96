"""A folder or file of another library in; its tensors and configs out."""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vitft.families.huggingface import KINDS
from vitft.families.records import Config, Index, OpenClip, Processor, checked
from vitft.files import read_json
from vitft.records import record_of

WEIGHTS = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
# keys under which checkpoints of training hold the model, tried in this order
MODEL_KEYS = ("model", "state_dict", "teacher", "model_state_dict", "target_encoder")


@dataclass(frozen=True)
class Source:
    """The content of a folder or file."""

    name: str  # the folder's or file's
    tensors: dict[str, Tensor] = field(repr=False)
    config: dict[str, Any]  # config.json, {} where there is none
    preprocessing: dict[str, Any]  # of transformers' image processor, {} where there is none
    open_clip: dict[str, Any]  # open_clip_config.json, {} where there is none
    raw_config: dict[str, Any]  # config.json unchanged, with its nulls
    licence: str | None  # from the head of README.md, the model card
    checksum: str  # of the files with tensors: 16 hexadecimal digits of SHA-256


def read_source(path: Path) -> Source:
    """Return the content of a folder or file of another library.

    Raises:
        FileNotFoundError: there is none, or a folder lacks its tensors.
        ValueError: a file is broken.
    """
    described = path.is_dir() or path.name in WEIGHTS  # a folder's file is that folder
    folder = path if path.is_dir() else path.parent
    files = weight_files(path) if path.is_dir() else [path]
    tensors: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    raw_config = _read_entries(folder / "config.json") if described else {}
    for file in files:
        tensors |= read_tensors(file)
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return Source(
        name=path.name,
        tensors=tensors,
        config=_checked_config(raw_config, str(folder / "config.json")),
        preprocessing=_processor(folder) if described else {},
        open_clip=_read_checked(folder / "open_clip_config.json", OpenClip) if described else {},
        raw_config=raw_config,
        licence=_licence(folder / "README.md") if described else None,
        checksum=digest.hexdigest()[:16],
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold the tensors.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the index names a file outside the folder.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():  # several files hold the tensors
            names = sorted(set(_read_checked(index, Index).get("weight_map", {}).values()))
            if any(os.path.basename(name) != name for name in names):
                raise ValueError(f"{index} names files outside its folder")
            return [folder / name for name in names]
    found = sorted([*folder.glob("*.pth"), *folder.glob("*.pt")])
    if not found:
        raise FileNotFoundError(f"{folder} holds no weights; there is none of {', '.join(WEIGHTS)}")
    return found[:1]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, .pth, .pt or .bin file; a pickle runs no code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, or holds more than tensors.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        content: Any = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a broken pickle raises anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{file} holds no tensors that can be read ({reason})") from error
    if file.suffix == ".safetensors":
        return real(content, file)
    for _ in MODEL_KEYS:
        inside = [name for name in MODEL_KEYS if isinstance(content, dict) and name in content]
        content = content[inside[0]] if inside else content
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, no tensors by name")
    found = {key: t for key, t in content.items() if isinstance(t, Tensor) and isinstance(key, str)}
    for prefix in ("module.", "backbone.", "encoder."):
        if found and all(key.startswith(prefix) for key in found if "head" not in key):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return real(found, file)


def real(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the tensors, once each is known to be dense, real and not quantized.

    Raises:
        ValueError: one is not.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
            raise ValueError(f"{file}: tensor {name} is sparse, complex or quantized; convert it")
    return tensors


def _licence(card: Path) -> str | None:
    """Return the licence in the head of a model card, None where there is none."""
    if not card.is_file():
        return None
    head = card.read_text(errors="replace").split("---")
    found = re.search(r"^license(?:_name)?:\s*(\S+)", head[1], re.MULTILINE) if head[2:] else None
    return found[1].strip("\"'") if found else None


def _processor(folder: Path) -> dict[str, Any]:
    """Return the entries of the image processor of transformers in a folder, {} without one.

    Since version 5 transformers writes a processor of images and texts as one file, which counts
    before the other.
    """
    both = folder / "processor_config.json"
    inner = _read_entries(both).get("image_processor")
    if isinstance(inner, dict):
        return checked(inner, Processor, str(both))
    return _read_checked(folder / "preprocessor_config.json", Processor)


def _checked_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a config as `checked` does, or unchanged if its model_type is not covered.

    Early folders of timm have the entries of `pretrained_cfg` beside the architecture.
    """
    kind = config.get("model_type")
    if "architecture" in config and "pretrained_cfg" not in config:
        names = {"label_names": config["labels"]} if "labels" in config else {}
        config = config | {"pretrained_cfg": config | names}
    return config if isinstance(kind, str) and kind not in KINDS else checked(config, Config, where)


def _read_checked(path: Path, kind: type[Any]) -> dict[str, Any]:
    """Return a file's entries as `checked` does."""
    return checked(_read_entries(path), kind, str(path))


def _read_entries(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return record_of(dict[str, Any], read_json(path), path.name, finite=False)
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from error
