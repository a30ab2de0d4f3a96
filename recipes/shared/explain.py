"""A run that is about to train in; log messages for --verbose, to find a fault by, out."""

import logging
import re
from dataclasses import fields

import torch

from recipes.shared.summary import device_name
from vitft.command.telling import logger
from vitft.devices.memory import free_bytes
from vitft.devices.processes import n_processes
from vitft.pictures.images import Images
from vitft.training.run import Run


def explain(run: Run) -> None:
    """Log the device, the model, the trainable tensors, the images and the plan."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    free = free_bytes(run.device) / 1e6
    logger.debug(
        "device %s: %s, %s MB free, %s process(es)",
        *(run.device, device_name(run.device), f"{free:,.0f}", n_processes()),
    )
    logger.debug("model: %s", run.model.config)
    for line in tensors(run.trainable):
        logger.debug("trains: %s", line)
    for name, images in (("train", run.train), ("validation", run.validation)):
        logger.debug("images to %s: %s", name, images_line(images))
    logger.debug("%s steps an epoch, from epoch %s", run.steps_per_epoch, run.epoch + 1)
    for field in fields(run.plan):
        logger.debug("plan: %s = %r", field.name, getattr(run.plan, field.name))


def tensors(named: dict[str, torch.nn.Parameter]) -> list[str]:
    """Return a line for each trainable tensor; those that are alike in every block share a line."""
    counts: dict[str, int] = {}
    for name, value in named.items():
        shape = "x".join(map(str, value.shape)) or "one number"
        line = f"{re.sub(r'[.]([0-9]+)[.]', '.*.', name)}  {shape}  {value.dtype}"
        counts[line] = counts.get(line, 0) + 1
    return [line + (f"  ({n} of them)" if n > 1 else "") for line, n in counts.items()]


def images_line(images: Images) -> str:
    """Return where images are, and of which shape."""
    if images.held is None:
        return f"{len(images):,}, streamed" if len(images) else "none"
    shape = "x".join(map(str, images.held.shape))
    return f"{len(images):,}, held on {images.held.device} as {shape}  {images.held.dtype}"
