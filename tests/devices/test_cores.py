from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adapters
from tests.shared import TINY, long, some
from vitft import VisionTransformer, ViTConfig
from vitft.devices.cores import each, n_parts
from vitft.devices.shares import Rows
from vitft.evaluation.evaluate import evaluate
from vitft.pictures.images import Images
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.run import Run
from vitft.training.step import Step


@pytest.mark.parametrize(
    ("n_cores", "n_images", "expected"),
    [(1, 1, 1), (1, 33, 2), (2, 15, 1), (2, 16, 2), (2, 64, 2), (2, 65, 4), (16, 50, 6)],
)
def test_parts_suit_the_cores(
    n_cores: int, n_images: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: n_cores)
    assert n_parts(torch.device("cpu"), n_images) == expected
    assert n_parts(torch.device("meta"), n_images) == 1


def test_parts_come_back_in_order_and_an_error_comes_through() -> None:
    torch.set_num_threads(2)
    for n in (7, 1):
        sums = each(lambda a, b: a + b, [(i, 10) for i in range(n)])
        assert list(sums) == list(range(10, 10 + n))
        with pytest.raises(ZeroDivisionError):
            list(each(lambda a: 1 // a, [(1,), (0,)][-n:]))


def test_parts_share_the_cores_and_leave_other_threads_theirs() -> None:
    torch.set_num_threads(4)
    threads = each(lambda _: torch.get_num_threads(), [(0,), (1,)])
    assert list(threads) == [2, 2]
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 4
    assert torch.get_num_threads() == 4


def images(n: int) -> Images:
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
    return Images(lambda i: pixels[i], torch.arange(n) % 2).to(torch.device("cpu"))


def test_gradients_in_parts_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    model = VisionTransformer(ViTConfig(**TINY, n_classes=2, dropout=0.0)).double()
    plan = Plan(epochs=1, batch_size=70, lr=1e-3, weight_decay=0.0, label_smoothing=0.1)
    run = Run(model, images(70), images(4), plan, tmp_path)
    monkeypatch.setattr(run, "update", lambda: None)
    batch, targets = torch.randn(70, 3, 8, 8).double(), torch.rand(70, 2).double()

    def gradients() -> list[Tensor]:
        run.totals.zero_()
        model.zero_grad()
        step = Step([run], lambda models: models[0])
        step.rows = Rows(70)
        step.learn(batch, targets)
        grads = [p.grad.clone() for p in run.trainable.values() if p.grad is not None]
        return [run.totals.clone(), *grads]

    parts, again = gradients(), gradients()
    monkeypatch.setattr("vitft.training.gradients.n_parts", lambda device, n_images: 1)
    whole = gradients()
    assert len(parts) == len(run.trainable) + 1
    for a, b, c in zip(parts, again, whole, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-12, rtol=1e-6)


def test_evaluation_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    model = VisionTransformer(ViTConfig(**TINY))
    tests = images(75)
    parts = evaluate(model, tests)
    monkeypatch.setattr("vitft.devices.cores.n_parts", lambda device, n_images: 1)
    whole = evaluate(model, tests)
    assert parts.probabilities.shape == (75, 10)
    torch.testing.assert_close(parts.probabilities, whole.probabilities)


@pytest.mark.parametrize("method", some([*adapters.METHODS], 3))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_runs_in_parts_end_alike(method: str, dropout: float, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    config = adapters.METHODS[method]
    own = {"dropout": dropout} if "dropout" in {f.name for f in fields(config)} else {}
    data, ends = images(40), []
    for _ in range(2):
        torch.manual_seed(0)
        model = VisionTransformer(ViTConfig(**TINY, n_classes=2, dropout=0.0))
        adapters.inject(model, config(**own), trainable=("head",))
        plan = Plan(epochs=3, batch_size=40, lr=0.1, weight_decay=0.0)
        run = Run(model, data, data, plan, tmp_path)
        train(run)
        ends.append(torch.cat([p.detach().flatten() for p in run.trainable.values()]))
    assert torch.equal(*ends)


@long
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks for it
def test_a_compiled_run_is_that_of_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    data, ends = images(20), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = VisionTransformer(ViTConfig(**TINY, n_classes=2, dropout=0.0))
        plan = Plan(epochs=2, batch_size=10, lr=1e-2, weight_decay=0.0, compiled=compiled)
        train(Run(model, data, data, plan, tmp_path))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("auto", [False, True])
def test_dropout_in_parts_is_neither_compiled_nor_recorded(auto: bool, tmp_path: Path) -> None:
    plan = Plan(epochs=1, batch_size=4, lr=0.1, weight_decay=0.0, compiled=True)
    parts = {"auto_accumulate": True} if auto else {"accumulate": 2}
    for dropout, asked, compiled in ((0.2, parts, False), (0.0, parts, True), (0.2, {}, True)):
        model = VisionTransformer(ViTConfig(**TINY, n_classes=2, dropout=dropout))
        run = Run(model, images(8), images(2), replace(plan, **asked), tmp_path)  # type: ignore[arg-type]
        assert run.plan.compiled is compiled


def test_steps_are_recorded_on_cuda_only(tmp_path: Path) -> None:
    model = VisionTransformer(ViTConfig(**TINY))
    plan = Plan(epochs=1, batch_size=2, lr=1.0, weight_decay=0.0, recorded=True)
    with pytest.raises(ValueError, match="recorded=True is for CUDA; the model is on cpu"):
        Run(model, images(4), images(2), plan, tmp_path)
