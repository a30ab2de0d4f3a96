"""A plan: every value outside its range is refused in words, those on its edge are not."""

import re
from typing import Any

import pytest

from vitft.pictures.augment import Augmentation
from vitft.training.plan import Plan

GOOD: dict[str, Any] = {"epochs": 1, "batch_size": 1, "lr": 1.0, "weight_decay": 0.0}
INF, NAN = float("inf"), float("nan")

REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, f"{name}={value} is not positive")
        for name in ("epochs", "batch_size", "lr", "accumulate")
        for value in (0, -1, INF, NAN)
    ),
    *(
        ({name: value}, f"{name}={value} is negative; 0 switches it off")
        for name in ("weight_decay", "clip", "save_seconds")
        for value in (-0.1, NAN)
    ),
    *(
        ({name: value}, f"{name}={value} is not in 0 <= {name} < 1")
        for name in ("warmup", "label_smoothing")
        for value in (-0.1, 1, NAN)
    ),
    *(({"seed": seed}, f"seed={seed} is not in 0 <= seed < 2**32") for seed in (-1, 2**32)),
    *(
        (
            {"checkpoint_blocks": True, name: True},
            "checkpoint_blocks=True is for steps neither compiled nor recorded",
        )
        for name in ("compiled", "recorded")
    ),
    *(
        (
            {"n_cached": 2} | changes,
            "n_cached=2 computes features of unchanged images, but augmentation or sizes change "
            "them; choose one",
        )
        for changes in ({"augmentation": Augmentation(flip=True)}, {"sizes": ((4, 0.5),)})
    ),
    (
        {"schedule": "step"},
        "unknown schedule 'step'; choose from cosine, linear, multistep, constant",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_out_of_range_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Plan(**GOOD | options)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-9},
        {"clip": 0, "save_seconds": 0, "warmup": 0, "label_smoothing": 0, "seed": 0},
        {"clip": INF, "save_seconds": INF, "warmup": 0.999, "label_smoothing": 0.999},
        {"seed": 2**32 - 1},
        {"compiled": True, "recorded": True},
        {"checkpoint_blocks": True, "n_cached": 2},
        {"augmentation": Augmentation(flip=True), "sizes": ((4, 0.5),)},
    ],
    ids=str,
)
def test_what_is_on_the_edge_is_allowed(options: dict[str, Any]) -> None:
    assert all(getattr(Plan(**GOOD | options), name) == value for name, value in options.items())


def test_sizes_add_up_and_the_last_epoch_is_in_full() -> None:
    plan = Plan(**GOOD | {"epochs": 8, "sizes": ((4, 0.25), (8, 0.25), (12, 0.125))})
    assert [plan.image_size(epoch, 16) for epoch in range(8)] == [4, 4, 8, 8, 12, 16, 16, 16]
    plan = Plan(**GOOD | {"epochs": 4, "sizes": ((4, 0.5), (8, 0.5))})
    assert [plan.image_size(epoch, 16) for epoch in range(4)] == [4, 4, 8, 16]
    plan = Plan(**GOOD | {"epochs": 1, "sizes": ((4, 1.0),)})
    assert plan.image_size(0, 16) == 16
