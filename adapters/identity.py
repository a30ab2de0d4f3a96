"""A model in; the fingerprint of its base, and copies that share its memory, out."""

import copy
import hashlib
from collections.abc import Collection
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from adapters.record import Injection, injection, unwrapped
from adapters.targets import matching

Model = TypeVar("Model", bound=nn.Module)


def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> str:
    """Return a hash of the base's tensors, taken as float32: 16 hexadecimal digits.

    Adapters and trained modules are left out, so it is the same before `inject` with
    `exclude=trainable`, after `inject`, on any device, and after training.

    Args:
        model: the base, adapted or not.
        exclude: names of modules to leave out, as for `trainable`.

    Raises:
        ValueError: a name in `exclude` matches no module.
    """
    model = unwrapped(model)
    trained, added = set(matching(model, exclude, "exclude")), set()
    record = vars(model).get("_injection")
    if isinstance(record, Injection):
        trained |= record.trained.keys()
        for name, base in record.adapted.items():
            own = model.get_submodule(name).state_dict().keys() - base.state_dict().keys()
            added |= {f"{name}.{key}" for key in own}
    left_out = tuple(f"{name}." for name in trained)
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if key not in added and not key.startswith(left_out) and isinstance(tensor, Tensor):
            tensor = whole(tensor)
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of an adapted model's base, computed once.

    Raises:
        ValueError: the model is not adapted, or its adapters are switched off.
    """
    record = injection(model)
    if record.fingerprint is None:
        record.fingerprint = fingerprint(model)
    return record.fingerprint


def shared_copy(model: Model) -> Model:
    """Return a copy of `model` whose tensors lie in the same memory.

    To freeze, move or cast one leaves the other as it is; a value that changes in place changes in
    both.
    """
    memo = computed(model) | {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    return copy.deepcopy(model, memo)


def computed(model: nn.Module) -> dict[int, Any]:
    """Return what a deep copy of `model` takes for weights that hooks compute in each pass.

    They are results of autograd, which can't be copied. `nn.utils.spectral_norm`, `weight_norm` and
    `prune` have such hooks.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm | WeightNorm):
                name = hook.name
            elif isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
            else:
                continue
            weight = getattr(module, name)
            memo[id(weight)] = weight.detach()
    return memo


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered from all processes where FSDP2 shards it."""
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor
