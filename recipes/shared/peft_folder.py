"""An adapter of a converted base in, a folder that PEFT loads on the source library's model out.

The folder holds LoRA or DoRA with alpha / r = 1; B is multiplied by the adapter's scale. Where the
library has one linear for several of ours, such as fused queries, keys and values, the ranks add
up: A stacks the adapters' rows, and B is block-diagonal.
"""

import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adapters
from adapters.folder import PREFIX, AdapterFolder
from adapters.methods.dora import DoRALinear
from adapters.record import adapter_layer, injection
from vitft.data.named import import_torchvision
from vitft.families.check import load, output
from vitft.families.write import write_source
from vitft.model.vit import VisionTransformer


def write_peft(model: VisionTransformer, out: Path, library: str, images: Tensor) -> float:
    """Write the folder, and return the largest difference of PEFT's logits from the model's.

    Args:
        model: the converted base with its adapter.
        out: the folder to write.
        library: "hf" or "timm".
        images: normalised (B, C, height, width).

    Raises:
        ValueError: peft is not installed, PEFT has no such method, or an adapted module has no
            counterpart in the library's model, or one that is never called.
    """
    import_torchvision()  # PEFT's import fails where torchvision was built for another torch
    try:
        import peft
    except ImportError as error:
        raise ValueError("the export is checked by peft; install it") from error
    expected = model(images)
    theirs = source_model(model, library)
    folder = peft_folder(model, theirs)
    if missed := uncalled(theirs, folder.config["target_modules"], images):
        raise ValueError(
            f"{library}'s model reads the weight of {missed[0]!r} without calling it, so PEFT's "
            "adapter there would do nothing; merge the adapter, and export the base"
        )
    folder.save(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers deprecates
        found = output(peft.PeftModel.from_pretrained(theirs, str(out)).eval(), images)
    return float((found - expected).abs().max())


def uncalled(model: nn.Module, names: Sequence[str], images: Tensor) -> list[str]:
    """Return which modules a forward pass of images does not call."""
    called: set[str] = set()

    def note(name: str, *_: object) -> None:
        called.add(name)

    hooks = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    output(model, images)
    for hook in hooks:
        hook.remove()
    return [name for name in names if name not in called]


def source_model(model: VisionTransformer, library: str) -> nn.Module:
    """Return the base, without adapter but with its head, as a model of the library it came from.

    It takes images of the size that the adapter was trained at.

    Raises:
        ValueError: the base came from another library, or the library has no model with a head.
    """
    if not str(model.facts.get("family", "")).startswith(library):
        raise ValueError(
            f"the base was not converted from a folder of {library}, so its adapter fits no model "
            "there; on this base PEFT loads the adapter's folder as it is"
        )
    base = adapters.shared_copy(model)
    adapters.eject(base)
    base.new_head(model.classes)
    base.head.weight.copy_(model.head.weight)
    with tempfile.TemporaryDirectory() as folder:
        write_source(base, Path(folder), library)
        theirs: Any = load(Path(folder), library, base)
    if library == "timm" and model.image_size != model.config.image_size:
        theirs.set_input_size(img_size=model.image_size)  # transformers' models take any size
    made: nn.Module = theirs
    return made


def peft_folder(model: VisionTransformer, theirs: nn.Module) -> AdapterFolder:
    """Return the adapter under the names of the library's model.

    Raises:
        ValueError: PEFT has no such method, an adapted module has no counterpart, more than the
            head was trained beside it, or the head has not been trained.
    """
    record = injection(model)
    if not model.has_head:
        raise ValueError("the adapter's head holds zeros: it has not been trained; train it first")
    adapted = {name: adapter_layer(model, name) for name in record.adapted}
    names = {name: model.translate(name) for name, _ in theirs.named_modules()}
    linears = {name: ours for name, ours in names.items() if adapted.keys() & {*ours}}
    if missing := sorted(adapted.keys() - {one for ours in linears.values() for one in ours}):
        raise ValueError(f"{missing[0]!r} has no counterpart that PEFT adapts; leave it out")
    if others := sorted(record.trained.keys() - {"head"}):
        raise ValueError(f"{others[0]!r} trained too, which PEFT's folder has no place for")
    is_dora = any(isinstance(layer, DoRALinear) for layer in adapted.values())
    tensors: dict[str, Tensor] = {}
    for name, ours in linears.items():
        tensors |= {f"{PREFIX}{name}.{k}": t for k, t in _joined(model, ours, is_dora).items()}
    ranks = {n: len(tensors[f"{PREFIX}{n}.lora_A.weight"]) for n in linears}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    unusual = {name: rank for name, rank in ranks.items() if rank != usual}
    heads = [name for name, ours in names.items() if ours == ("head",)]
    for key, tensor in model.head.state_dict().items():
        tensors[f"{PREFIX}{heads[0]}.{key}"] = tensor
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "target_modules": [*linears],
        "modules_to_save": heads[:1],
        "use_dora": is_dora,
    }
    return AdapterFolder(config=config, tensors=tensors, fingerprint=None, classes=None)


def _joined(model: VisionTransformer, ours: tuple[str, ...], is_dora: bool) -> dict[str, Tensor]:
    """Return PEFT's tensors for the linear that holds the rows of these linears of ours.

    Returns:
        lora_A.weight (sum of R, I), lora_B.weight (sum of O, sum of R) and, for DoRA,
        lora_magnitude_vector (sum of O,).

    Raises:
        ValueError: a linear is adapted by another method than LoRA or DoRA.
    """
    a, b, lengths = [], [], []
    for name in ours:
        layer = model.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        terms: dict[str, Tensor] = {}
        if isinstance(layer, adapters.layers.AdapterLayer):
            terms = layer.terms()
        if unknown := sorted(terms.keys() - {"a", "b", *["gain"] * is_dora}):
            kind = type(layer).__name__
            raise ValueError(f"{name!r} is a {kind}, which PEFT has not ({unknown[0]}); merge it")
        a.append(terms.get("a", weight.new_zeros(0, weight.shape[1])))
        b.append(terms.get("b", weight.new_zeros(weight.shape[0], 0)))
        plain = torch.linalg.vector_norm(weight, dim=1)
        lengths.append(layer.magnitude if isinstance(layer, DoRALinear) else plain)
    found = {"lora_A.weight": torch.cat(a), "lora_B.weight": torch.block_diag(*b)}
    return found | ({"lora_magnitude_vector": torch.cat(lengths)} if is_dora else {})
