"""How to train: every option of the training loop, checked when the plan is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from vitft.evaluation.task import SingleLabel, Task
from vitft.model.vit import VisionTransformer
from vitft.optimizers.build import lr_factor
from vitft.pictures.augment import Augmentation

KEEP = ("best", "last")
ON_NAN = ("stop", "skip")
SAMPLES = ("all", "balanced")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train.

    Raises:
        ValueError: a value outside its range.
    """

    task: Task = SingleLabel()
    epochs: int
    batch_size: int
    auto_accumulate: bool = False  # double `accumulate` where a batch does not fit into memory
    accumulate: int = 1  # parts of a batch, whose gradients are accumulated: takes less memory
    lr: float
    weight_decay: float
    optimizer: str = "adamw"
    # factors on the learning rate, by a module's name or the last part of parameters' names
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0  # factor on a block's learning rate for every block behind it
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the run over which the learning rate rises
    clip: float = 1.0  # largest norm of the gradient, above which it is scaled down; 0: any
    label_smoothing: float = 0.0
    probe_head: bool = False  # start from the head of a linear probe
    sample: str = "all"  # an epoch has each image once; "balanced": each class equally often
    keep: str = "last"  # the epoch, "best" or "last", whose weights the model has in the end
    ema: float = 0.0  # decay of a moving average of the weights, which replaces them; 0: none
    on_nan: str = "stop"  # where a gradient is not finite: "stop" the run, or "skip" the step
    patience: int = 0  # end after so many epochs without a better validation; 0: never
    sizes: tuple[tuple[int, float], ...] = ()  # (image size, share of epochs); then the full size
    augmentation: Augmentation = Augmentation()
    n_cached: int = 0  # compute the output of so many first stages once, where they are frozen
    checkpoint_blocks: bool = False  # recompute blocks in the backward pass: takes less memory
    compiled: bool = False  # compile the model's stages and the augmentation
    recorded: bool = False  # record a step as a CUDA graph and replay it
    bf16: bool = False  # compute in bfloat16; the weights stay float32
    seed: int = 0
    save_seconds: float = 60.0  # between saved states; 0: save at the end or a stop only

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "accumulate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")
        for name in ("weight_decay", "clip", "save_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; 0 switches it off")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay} is not in 0 < layer_decay <= 1")
        for name in ("warmup", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not in 0 <= {name} < 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is not in 0 <= seed < 2**32")
        if self.keep not in KEEP:
            raise ValueError(f"keep={self.keep!r} is none of {', '.join(KEEP)}")
        if self.sample not in SAMPLES:
            raise ValueError(f"sample={self.sample!r} is none of {', '.join(SAMPLES)}")
        if self.on_nan not in ON_NAN:
            raise ValueError(f"on_nan={self.on_nan!r} is none of {', '.join(ON_NAN)}")
        if self.recorded and (self.on_nan == "skip" or self.auto_accumulate):
            raise ValueError("a recorded step can neither be skipped nor computed in more parts")
        if self.patience < 0:
            raise ValueError(f"patience={self.patience} is negative; 0 never ends a run early")
        if self.checkpoint_blocks and (self.compiled or self.recorded):
            raise ValueError("checkpoint_blocks=True is for steps neither compiled nor recorded")
        shares = [share for _, share in self.sizes]
        if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
            raise ValueError(f"sizes={self.sizes}: shares are in 0..1 and add up to 1 at most")
        if self.n_cached and (self.augmentation != Augmentation() or self.sizes):
            raise ValueError(
                f"n_cached={self.n_cached} computes features of unchanged images, but augmentation "
                "or sizes change them; choose one"
            )
        lr_factor(self.schedule, 0, warmup=self.warmup)

    @property
    def in_parts(self) -> bool:
        """Whether a batch may be computed in parts, one after the other."""
        return self.accumulate > 1 or self.auto_accumulate

    def check_sizes(self, model: VisionTransformer) -> None:
        """Check that the model takes images of all `sizes`, none larger than its own.

        Raises:
            ValueError: a size is larger, or not a positive multiple of the patch size.
        """
        full = model.image_size
        try:
            for size, _ in self.sizes:
                if size > full:
                    raise ValueError(f"{size} is more than the full {full} pixels; choose less")
                model.resize(size)
        except ValueError as error:
            raise ValueError(f"sizes: {error}") from None
        finally:
            model.resize(full)

    def image_size(self, epoch: int, full: int) -> int:
        """Return the side, in pixels, of the images to train on in an epoch; `full` by default."""
        done = 0.0
        for size, share in self.sizes:
            done += share * self.epochs
            if epoch < min(round(done), self.epochs - 1):  # the last epoch always has full size
                return size
        return full
