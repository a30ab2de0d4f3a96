"""In which pieces a batch is computed, and on which threads."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.shared import TINY
from vitft import VisionTransformer, ViTConfig
from vitft.devices.cores import each, in_parts
from vitft.devices.shares import Rows
from vitft.pictures.images import Images
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.step import Step


def images(n: int) -> Images:
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
    return Images(lambda i: pixels[i], torch.arange(n) % 2).to(torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "n_images", "sizes", "in_turn"),
    [
        ({}, 32, [16, 16], False),
        ({}, 12, [12], True),  # too few for two cores
        ({"accumulate": 2}, 32, [16, 16], True),
        ({"accumulate": 3}, 32, [11, 11, 10], True),
        ({"accumulate": 9}, 4, [1, 1, 1, 1], True),
        ({"dropout": 0.1}, 32, [32], True),
        ({"dropout": 0.1, "accumulate": 2}, 32, [16, 16], True),
    ],
    ids=str,
)
def test_a_batch_is_computed_in_the_pieces_that_plan_model_and_cores_ask_for(
    tmp_path: Path, options: dict[str, Any], n_images: int, sizes: list[int], in_turn: bool
) -> None:
    torch.set_num_threads(2)
    dropout = {"dropout": options.pop("dropout", 0.0)}
    model = VisionTransformer(ViTConfig(**TINY, n_classes=2, **dropout)).train()
    plan = Plan(epochs=1, batch_size=32, lr=1e-3, weight_decay=0.0, **options)
    step = Step([Run(model, images(32), images(2), plan, tmp_path)], lambda models: models[0])
    seen: list[tuple[int, bool]] = []
    plain = step.backward.forward

    def forward(x: Tensor) -> Tensor:
        seen.append((len(x), threading.current_thread() is threading.main_thread()))
        return plain(x)

    step.backward.forward, step.rows = forward, Rows(n_images)  # type: ignore[assignment]
    step.learn(torch.randn(n_images, 3, 8, 8), torch.rand(n_images, 2))
    assert [n for n, _ in seen] == sizes
    assert {main for _, main in seen} == {in_turn}


def test_one_part_stays_on_its_thread_and_several_leave_it() -> None:
    torch.set_num_threads(2)

    def on_main(*_: Any) -> bool:
        return threading.current_thread() is threading.main_thread()

    assert list(each(on_main, [])) == []
    assert list(each(on_main, [(0,)])) == [True]
    assert list(each(on_main, [(0,), (1,), (2,)])) == [False] * 3
    torch.set_num_threads(1)
    assert list(each(on_main, [(0,), (1,)])) == [True] * 2


def test_parts_of_several_tensors_are_cut_alike_and_put_together_again() -> None:
    torch.set_num_threads(2)
    x, y, sizes = torch.randn(40, 3), torch.randn(40), list[int]()

    def function(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(len(a))
        return a.sum(dim=1) * b

    torch.testing.assert_close(in_parts(function, x, y), x.sum(dim=1) * y)
    assert sorted(sizes) == [20, 20]


def test_parts_that_wait_are_given_up_after_an_error() -> None:
    torch.set_num_threads(2)
    done: list[int] = []
    go_on = threading.Event()

    def function(i: int) -> int:
        if i == 0:
            raise ZeroDivisionError
        go_on.wait()
        done.append(i)
        return i

    with pytest.raises(ZeroDivisionError):
        list(each(function, [(i,) for i in range(40)]))
    go_on.set()
    assert list(each(lambda i: i, [(0,), (1,)])) == [0, 1]  # after all that was waiting
    assert len(done) <= 2
