"""A model and images in; the head of a linear probe, fitted to the frozen features, out.

Fine-tuning that starts from a random head or one of zeros distorts the features at first: the early
gradients through such a head are large and point anywhere (arXiv:2202.10054).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitft.evaluation.features import extract
from vitft.evaluation.task import Task
from vitft.model.vit import VisionTransformer
from vitft.pictures.images import Images

DECAY = 0.1  # weight decay, for features of variance 1
MAX_STEPS = 200  # of L-BFGS
CHUNK = 1024  # images whose neighbours are searched at a time
FIGURES = ("accuracy", "mean_average_precision")  # that say how good the features are


@dataclass(frozen=True)
class Probe:
    """A head fitted to frozen features, and figures that say how good the features are.

    Attributes:
        head: weight (O, D) and bias (O,).
        figures: "knn_accuracy" and "probe_accuracy", those of nearest neighbours and of the head on
            the validation images; with several labels an image also "knn_mean_average_precision"
            and its like. {} without validation images.
    """

    head: tuple[Tensor, Tensor]
    figures: dict[str, float]


def fit_probe(
    model: VisionTransformer,
    images: Images,
    validation: Images,
    task: Task,
    *,
    folder: Path,
    bf16: bool = False,
) -> Probe:
    """Return a head that is fitted to the model's features, and the accuracy of these features.

    Args:
        model: gives the features, in evaluation mode; it is not changed.
        images: to fit the head to: pixels, or features of the model's first stages.
        validation: likewise, to measure accuracy on; may be empty.
        task: gives the loss to minimise, and the figures.
        folder: for features too large for memory, see `extract`.
        bf16: compute the features in bfloat16.

    Raises:
        OSError: the features fit neither in memory nor in the folder.
    """

    n = len(model.stages()) - 1

    def features(some: Images) -> Tensor:
        x = some.held if some.stage == n else None
        if x is None:
            x = extract(model, some, n, folder=folder, bf16=bf16).held
        assert x is not None
        return x.float()

    x = features(images)
    targets = task.targets(images.labels.to(x.device), model.head.out_features)
    weight, bias = regression(x, targets, task)
    if not len(validation):
        return Probe((weight, bias), {})
    y = features(validation)
    labels = validation.labels.to(y.device)
    answers = {
        "knn": neighbours(x, targets, y),
        "probe": task.predict(F.linear(y, weight, bias)),
    }
    figures = {
        f"{name}_{figure}": value
        for name, probabilities in answers.items()
        for figure, value in task.figures(probabilities, labels).items()
        if figure in FIGURES
    }
    return Probe((weight, bias), figures)


def neighbours(x: Tensor, targets: Tensor, y: Tensor, k: int = 20) -> Tensor:
    """Return the weighted mean (m, O) of the targets of each y's k nearest neighbours in x.

    The nearest have the largest cosine similarity, and a weight is proportional to
    exp(cosine / 0.07) (arXiv:1805.01978).

    Args:
        x: features (n, D) of known images.
        targets: of x (n, O).
        y: features (m, D) to classify.
        k: number of neighbours that vote.
    """
    x, means = F.normalize(x, dim=1), []
    for some in F.normalize(y, dim=1).split(CHUNK):
        near = (some @ x.T).topk(min(k, len(x)), dim=1)
        weights = (near.values / 0.07).softmax(dim=1)  # (chunk, k)
        means.append((weights[:, :, None] * targets[near.indices]).sum(dim=1))
    return torch.cat(means)


def regression(
    x: Tensor, targets: Tensor, task: Task, decay: float = DECAY
) -> tuple[Tensor, Tensor]:
    """Return the weight (O, D) and bias (O,) that minimise the mean loss + decay / 2 ||W||^2.

    W is the weight for standardised features; L-BFGS starts it from zero.

    Args:
        x: features (n, D).
        targets: (n, O).
        task: gives the loss.
        decay: the weight decay of the formula above.
    """
    std, mean = torch.std_mean(x, dim=0, correction=0)
    std = std.clamp_min(1e-6)
    x = (x - mean) / std
    weight = nn.Parameter(x.new_zeros(targets.shape[1], x.shape[1]))
    bias = nn.Parameter(x.new_zeros(targets.shape[1]))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(x, weight, bias)
        value = task.loss(logits, targets).mean() + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = weight.detach() / std
    return found, bias.detach() - found @ mean
