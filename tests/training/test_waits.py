"""No step on an accelerator waits for it, and no tensor of a step stands elsewhere.

On the meta device, which stands for the accelerator here, a tensor has a shape and a type but no
numbers. So `.item()`, a comparison or a copy to the CPU is an error, where it would be a wait.
"""

from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adapters
from tests.shared import TINY, long, some
from vitft.devices.shares import Rows
from vitft.model.config import ViTConfig
from vitft.model.vit import VisionTransformer
from vitft.pictures.augment import Augmentation
from vitft.pictures.images import Images
from vitft.training.forward import Pass, prepare
from vitft.training.gradients import loss_and_totals
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.step import Step

AWAY = torch.device("meta")
METHODS = some([*adapters.METHODS], 5)
AUGMENTATIONS = [
    Augmentation(flip=True, shift=1, min_area=0.5, trivial=True, mixup=0.3, cutmix=0.3),
    Augmentation(rand=True, erase=0.5),
]


@pytest.fixture(autouse=True)
def _away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the device neither for its random state nor for bfloat16."""
    monkeypatch.setattr("vitft.training.run.seeded_state", lambda *_: [])
    for place in ("vitft.training.step", "vitft.training.gradients"):
        monkeypatch.setattr(f"{place}.random_state", lambda *_: [])
        monkeypatch.setattr(f"{place}.set_random_state", lambda *_: None)
    monkeypatch.setattr("vitft.training.step.varies", lambda model: True)
    monkeypatch.setattr("vitft.evaluation.features.first_varying_stage", lambda model: 0)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def tiny() -> VisionTransformer:
    return VisionTransformer(ViTConfig(**TINY, n_classes=2, dropout=0.1)).train()


def take_steps(folder: Path, *methods: str | None, **options: Any) -> None:
    """Take two steps, away from the CPU, of a run of each method; None trains the whole model."""
    base, runs = tiny(), []
    for i, method in enumerate(methods):
        model = base if method is None else adapters.shared_copy(base)
        if method is not None:
            adapters.inject(model, adapters.METHODS[method](), trainable=("head",))
        model.to(AWAY)
        plan = Plan(**{"epochs": 1, "batch_size": 8, "lr": 1e-3, "weight_decay": 0.0} | options)
        images = Images(lambda i: torch.empty(0), torch.zeros(8, dtype=torch.long))
        (folder / str(i)).mkdir()
        runs.append(Run(model, images, images, plan, folder / str(i)))
    optimizers = [optimizer for run in runs for optimizer in run.updates.optimizers]
    for group in chain.from_iterable(o.param_groups for o in optimizers):
        group["fused"] = False  # which this device does not have
    base.to(AWAY)
    step = Step(runs, lambda models: adapters.together(base, models))
    for _ in range(2):
        pixels = torch.zeros(8, 3, 8, 8, dtype=torch.uint8, device=AWAY)
        step([(pixels, torch.zeros(8, dtype=torch.long, device=AWAY)) for _ in runs])
    states = [s for o in optimizers for p in o.state.values() for s in p.values()]
    moments = [value for value in states if isinstance(value, Tensor) and value.ndim]
    tensors = [value for run in runs for value in (run.totals, *run.trainable.values())]
    assert {value.device for value in tensors + moments} == {AWAY}


@pytest.mark.parametrize("method", [None, *METHODS])
def test_a_step_of_every_method_waits_for_nothing(method: str | None, tmp_path: Path) -> None:
    take_steps(tmp_path, method)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "muon"},
        {"optimizer": "adam"},
        {"augmentation": AUGMENTATIONS[0], "label_smoothing": 0.1},
        {"augmentation": AUGMENTATIONS[1], "ema": 0.9},
        {"accumulate": 2, "clip": 0.0},
        {"checkpoint_blocks": True},
        {"layer_decay": 0.7, "auto_accumulate": True},
    ],
)
def test_no_option_of_a_plan_makes_it_wait(options: dict[str, Any], tmp_path: Path) -> None:
    take_steps(tmp_path, None, **options)


@long
def test_many_runs_in_one_pass_wait_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for check in ("plain", "plain_linear"):  # it refuses modules without numbers
        monkeypatch.setattr(f"adapters.many.together.{check}", lambda module, *_: module)
    take_steps(tmp_path, "lora", "lora", "dora", "ssf", "vera", "ia3")


def test_a_mixed_batch_of_a_bank_waits_for_nothing(tmp_path: Path) -> None:
    base = tiny().eval()
    folders = [tmp_path / method for method in ("lora", "dora", "vera", "ia3", "ssf", "norm")]
    for folder in folders:
        config = adapters.METHODS[folder.name]()
        model = adapters.inject(adapters.shared_copy(base), config, trainable=("head",))
        adapters.save_adapter(model, folder)
    bank = adapters.Bank(base, folders).to(AWAY)
    ids = torch.zeros(8, dtype=torch.long, device=AWAY)
    assert bank(torch.zeros(8, 3, 8, 8, device=AWAY), ids).device == AWAY


@pytest.mark.parametrize(
    ("augmentation", "checkpoint_blocks"), [(AUGMENTATIONS[0], False), (AUGMENTATIONS[1], True)]
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's tracing does it
@long
def test_a_step_is_compiled_without_graph_breaks(
    augmentation: Augmentation, checkpoint_blocks: bool, tmp_path: Path
) -> None:
    pixels, labels = torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 2
    images = Images(pixels.__getitem__, labels)
    options = {"augmentation": augmentation, "checkpoint_blocks": checkpoint_blocks}
    plan = Plan(epochs=1, batch_size=8, lr=0.1, weight_decay=0.0, **options)  # type: ignore[arg-type]
    run = Run(adapters.inject(tiny(), adapters.LoRAConfig()), images, images, plan, tmp_path)

    def losses(pixels: Tensor, labels: Tensor) -> Tensor:
        x, targets = prepare(run, pixels, labels, Rows(8), stage=0)
        return loss_and_totals(run, Pass(run, 0)(x), targets)[0]

    torch._dynamo.reset()
    found = torch._dynamo.explain(losses)(pixels, labels)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_what_waits_is_seen(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="data-dependent|item|bool"):
        take_steps(tmp_path, None, on_nan="skip")  # which must know each step's gradient
