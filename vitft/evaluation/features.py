"""Images and a model in; the output of the model's frozen first stages out, computed once.

Where nothing changes from one epoch to the next, an epoch then costs only the stages that train.
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from vitft.bars import progress_bar
from vitft.devices.memory import max_set_bytes
from vitft.devices.processes import add_up
from vitft.devices.shares import own_batches, own_slice
from vitft.evaluation.evaluate import compute, evaluating, suitable_batch
from vitft.model.vit import VisionTransformer
from vitft.pictures.images import Images
from vitft.training.draws import first_varying_stage


def n_frozen(model: VisionTransformer) -> int:
    """Return how many of the first stages are frozen, so that their output never changes.

    They have no trainable parameter, draw no random numbers and change no buffer.
    """
    n_blocks = len(model.blocks)
    stage = {"norm.": n_blocks + 1, "map_pool.": n_blocks + 1, "head.": n_blocks + 2}
    stage |= {f"blocks.{i}.": i + 1 for i in range(n_blocks)}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    firsts = [next((stage[s] for s in stage if name.startswith(s)), 0) for name in trained]
    return min([first_varying_stage(model), *firsts])


def feature_bytes(model: VisionTransformer, n_stages: int) -> int:
    """Return the bytes that the output of the first `n_stages` takes for an image, in float32."""
    with torch.device("meta"):
        same, size = VisionTransformer(model.config), model.image_size
        same.resize(size)
        images = torch.empty(1, model.config.n_channels, size, size)
        return 4 * same.run(images, last=n_stages).numel()


def extract(
    model: VisionTransformer,
    images: Images,
    n_stages: int,
    *,
    folder: Path,
    bf16: bool = False,
    batch_size: int | None = None,
    max_bytes: int | None = None,
) -> Images:
    """Return `images` with the output of the first `n_stages` in place of pixels.

    Args:
        model: any mode; it computes in evaluation mode.
        images: pixels, or the output of fewer of the model's stages.
        n_stages: how many of the model's first stages to compute.
        folder: for a memory-mapped file, where the features take more than `max_bytes`. The file
            is unlinked at once, so its space is freed with the tensor.
        bf16: compute in bfloat16.
        batch_size: images at a time; by default see `suitable_batch`.
        max_bytes: of memory that the features may take; by default the device's `max_set_bytes`.

    Raises:
        OSError: the file cannot be written.
    """
    device, own = model.head.weight.device, own_slice(len(images))
    done = own.start
    extracted = Images(images.decode, images.labels, images.sources)
    extracted.stage = n_stages
    parts = own_batches(len(images), batch_size or suitable_batch(model))
    with (
        evaluating(model),
        progress_bar(own.stop - own.start, desc="frozen stages") as bar,
    ):
        for batch, _ in images.batches(parts, device):
            features = compute(model, batch, stage=images.stage, last=n_stages, bf16=bf16)
            if extracted.held is None:
                shape = (len(images), *features.shape[1:])
                extracted.held = _allocate(shape, features, folder, max_bytes)
            n = min(len(batch), own.stop - done)
            extracted.held[done : done + n] = features[:n]
            done += n
            bar.update(n)
    if extracted.held is not None:
        add_up(extracted.held)
    return extracted


def _allocate(shape: tuple[int, ...], like: Tensor, folder: Path, max_bytes: int | None) -> Tensor:
    """Return a tensor of zeros, in memory on the device of `like` where it fits, else in a file."""
    size = torch.Size(shape).numel()
    n_bytes = size * like.element_size()
    if n_bytes <= (max_set_bytes(like.device) if max_bytes is None else max_bytes):
        return like.new_zeros(shape)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is then an error here, not a SIGBUS later
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        mapped = torch.from_file(file.name, shared=True, size=size, dtype=like.dtype)
    return mapped.view(shape)
