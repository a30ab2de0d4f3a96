"""A model and images in; the head of a linear probe, fitted to the features as they are, out.

A head that starts at random or at zero first spoils the features that it stands on: its early
gradients are large and point anywhere (arXiv:2202.10054).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from vitft.data.images import Images
from vitft.model.vit import VisionTransformer
from vitft.training.features import extract
from vitft.training.task import Task

DECAY = 0.1  # of the weights, which are those of features of variance 1
MAX_STEPS = 200


def fit_head(
    model: VisionTransformer, images: Images, task: Task, *, folder: Path, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """Return weight (O, D) and bias (O,) of a head that fits the model's features of the images.

    Args:
        model: as it is; what it computes in evaluation counts.
        images: pixels, or what the model's first stages make of them.
        task: whose loss is minimised.
        folder: for features too large for memory.
        bf16: compute the features in bfloat16.

    Raises:
        OSError: the features fit neither in memory nor in the folder.
    """
    n = len(model.stages()) - 1
    x = images.held if images.stage == n else None
    if x is None:
        x = extract(model, images, n, folder=folder, bf16=bf16).held
    assert x is not None
    n_classes = model.head.out_features
    return regression(x.float(), task.targets(images.labels.to(x.device), n_classes), task)


def regression(
    x: Tensor, targets: Tensor, task: Task, decay: float = DECAY
) -> tuple[Tensor, Tensor]:
    """Return weight (O, D) and bias (O,) with the least mean loss + decay / 2 ||W||^2.

    W is the weight for standardised features; L-BFGS finds it from zero.

    Args:
        x: features (n, D).
        targets: (n, O).
        task: tells the loss.
        decay: see above.
    """
    std, mean = torch.std_mean(x, dim=0, correction=0)
    std = std.clamp_min(1e-6)
    x = (x - mean) / std
    weight = nn.Parameter(x.new_zeros(targets.shape[1], x.shape[1]))
    bias = nn.Parameter(x.new_zeros(targets.shape[1]))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = nn.functional.linear(x, weight, bias)
        value = task.loss(logits, targets).mean() + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = weight.detach() / std
    return found, bias.detach() - found @ mean
