"""How to train: every choice that the training loop follows, checked when it is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from vitft.evaluation.task import SingleLabel, Task
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
    auto_accumulate: bool = False  # accumulate more where a batch does not fit into memory
    accumulate: int = 1  # compute a batch in so many parts, one after another: less memory
    lr: float
    weight_decay: float
    optimizer: str = "adamw"
    # what to multiply the rate by, by a module or by the last part of parameters' names
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0  # what to multiply a block's rate by for every block behind it
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the run over which the learning rate rises
    clip: float = 1.0  # largest norm of the gradient; 0: any
    label_smoothing: float = 0.0
    probe_head: bool = False  # start from the head of a linear probe
    sample: str = "all"  # of an epoch: every image once, or balanced: every class as often
    keep: str = "last"  # whose weights the model has in the end: those of the best or last epoch
    ema: float = 0.0  # decay of an average of the weights, which is kept in place of them; 0: none
    on_nan: str = "stop"  # what a gradient that is not finite does: end the run, or skip its step
    patience: int = 0  # end after so many epochs without a better validation; 0: never
    sizes: tuple[tuple[int, float], ...] = ()  # (image size, share of the epochs), then in full
    augmentation: Augmentation = Augmentation()
    n_cached: int = 0  # compute so many first stages once, as far as they are frozen
    checkpoint_blocks: bool = False  # compute blocks again in the backward pass: less memory
    compiled: bool = False  # compile the model's stages and what augments
    recorded: bool = False  # record a step and replay it, on CUDA
    bf16: bool = False  # compute in bfloat16; the weights stay float32
    seed: int = 0
    save_seconds: float = 60.0  # between saved states

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
        if self.n_cached and (self.augmentation != Augmentation() or self.sizes):
            raise ValueError(
                f"n_cached={self.n_cached} computes features of unchanged images, but augmentation "
                "or sizes change them; choose one"
            )
        lr_factor(self.schedule, 0, warmup=self.warmup)

    def image_size(self, epoch: int, full: int) -> int:
        """Return the side of the images to train on in this epoch, where they are `full` pixels."""
        done = 0.0
        for size, share in self.sizes:
            done += share * self.epochs
            if epoch < min(round(done), self.epochs - 1):  # the last epoch is always in full
                return size
        return full
