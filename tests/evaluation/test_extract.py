"""Features of frozen stages: where they are kept, which stages are frozen, and who shares them."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import adapters
from tests.shared import TINY
from vitft import VisionTransformer, ViTConfig
from vitft.evaluation import features
from vitft.evaluation.features import extract, feature_bytes, n_frozen
from vitft.pictures.images import Images
from vitft.training import loop
from vitft.training.loop import train
from vitft.training.plan import Plan
from vitft.training.run import Run

CPU = torch.device("cpu")


def images(n: int = 12, side: int = 8) -> Images:
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    return Images(lambda i: pixels[i], torch.arange(n) % 3, [f"s{i}" for i in range(n)]).to(CPU)


def tiny_model(**options: Any) -> VisionTransformer:
    return VisionTransformer(ViTConfig(**TINY | {"n_classes": 3, "dropout": 0.0} | options))


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ("cls_token", 0),
        ("patch_embed.weight", 0),
        ("blocks.0.norm1.weight", 1),
        ("blocks.1.attn.wq.weight", 2),
        ("blocks.10.ffn.w1.weight", 11),
        ("norm.weight", 12),
        ("map_pool.query", 12),
        ("head.bias", 13),
        (None, 14),
    ],
)
def test_the_stages_before_the_first_that_trains_are_frozen(
    trained: str | None, expected: int
) -> None:
    model = tiny_model(n_layers=11, pooling="map", class_token=True).requires_grad_(False)
    if trained:
        model.get_parameter(trained).requires_grad_(True)
        model.head.weight.requires_grad_(True)
    assert n_frozen(model) == expected


def test_dropout_that_is_at_work_ends_what_is_frozen() -> None:
    model = tiny_model(n_layers=3).requires_grad_(False)
    model.blocks[1].ffn.dropout.p = 0.5
    assert n_frozen(model) == 2
    model.blocks[0].norm1.weight.requires_grad_(True)
    assert n_frozen(model) == 1


def test_features_keep_what_belongs_to_their_images(tmp_path: Path) -> None:
    some = images()
    found = extract(tiny_model(), some, 2, folder=tmp_path)
    assert (found.decode, found.labels, found.stage) == (some.decode, some.labels, 2)
    assert found.sources == some.sources
    assert found.digest() == some.digest()


def test_features_can_be_made_of_features(tmp_path: Path) -> None:
    model, some = tiny_model(), images()
    once = extract(model, some, 3, folder=tmp_path)
    twice = extract(model, extract(model, some, 1, folder=tmp_path), 3, folder=tmp_path)
    torch.testing.assert_close(twice.held, once.held)
    assert twice.stage == 3


def test_features_in_bfloat16_are_those_of_the_stages_in_it(tmp_path: Path) -> None:
    model, some = tiny_model().eval(), images()
    found = extract(model, some, 2, folder=tmp_path, bf16=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model.run(model.normalize(some.held), 0, 2)
    torch.testing.assert_close(found.held, expected, rtol=0, atol=1e-6)
    assert not torch.equal(found.held, extract(model, some, 2, folder=tmp_path).held)


@pytest.mark.parametrize("spare", [0, -1])
def test_features_that_just_fit_are_in_memory_and_others_in_a_file_of_the_folder(
    tmp_path: Path, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    plain, made = features.tempfile.NamedTemporaryFile, []
    monkeypatch.setattr(os, "posix_fallocate", lambda *call: calls.append(call[1:]))

    def file(**options: Any) -> Any:
        made.append(options)
        opened = plain(**options)
        os.truncate(opened.name, 12 * 5 * 16 * 4)
        return opened

    monkeypatch.setattr(features.tempfile, "NamedTemporaryFile", file)
    model, size = tiny_model(), 12 * feature_bytes(tiny_model(), 2)
    assert size == 12 * 5 * 16 * 4
    found = extract(model, images(), 2, folder=tmp_path, max_bytes=size + spare)
    assert found.held is not None
    assert (found.held.untyped_storage().filename is None) is (spare == 0)
    assert calls == [(0, size)] * (spare < 0)
    assert made == [{"dir": tmp_path}] * (spare < 0)
    assert (found.held.dtype, found.held.shape) == (torch.float32, (12, 5, 16))


def test_features_in_a_file_keep_their_dtype(tmp_path: Path) -> None:
    model, some = tiny_model().double(), images()
    held = [extract(model, some, 2, folder=tmp_path, max_bytes=n).held for n in (0, 10**9)]
    assert held[0] is not None
    assert held[0].dtype == torch.float64
    assert torch.equal(*held)


@pytest.mark.parametrize(("size", "n_tokens"), [(8, 5), (12, 10)])
def test_the_bytes_of_features_are_those_of_the_models_present_size(
    size: int, n_tokens: int
) -> None:
    model = tiny_model()
    model.resize(size)
    assert feature_bytes(model, 1) == feature_bytes(model, 2) == 4 * 16 * n_tokens
    assert feature_bytes(model, 3) == feature_bytes(model, 4) == 4 * 16
    assert feature_bytes(model, 5) == 4 * 3
    grey = tiny_model(n_channels=1, pooling="mean")
    assert feature_bytes(grey, 1) == 4 * 16 * 4


def runs(folder: Path, sets: list[Images], **options: Any) -> tuple[VisionTransformer, list[Run]]:
    base, made = tiny_model(), []
    for i, data in enumerate(sets):
        model = adapters.shared_copy(base)
        adapters.inject(model, adapters.LoRAConfig(rank=2, layers=(1,)), trainable=("head",))
        plan = {"epochs": 1, "batch_size": 6, "lr": 1e-2, "weight_decay": 0.0} | options
        (folder / str(i)).mkdir()
        made.append(Run(model, data, images(4), Plan(**plan), folder / str(i)))
    return base, made


def test_every_set_is_extracted_once_as_far_as_asked_and_frozen_into_its_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def noted(model: Any, some: Images, n: int, *, folder: Path, bf16: bool) -> Images:
        calls.append((some, n, folder, bf16))
        return extract(model, some, n, folder=folder, bf16=bf16)

    monkeypatch.setattr(loop, "extract", noted)
    a, b = images(), images()
    base, made = runs(tmp_path, [a, b, a], n_cached=9, bf16=True)
    train(made, lambda models: adapters.together(base, models))
    expected = [(made[0], a), (made[0], made[0].validation), (made[1], b)]
    expected.append((made[1], made[1].validation))
    assert calls == [(some, 2, run.folder, True) for run, some in expected]
    assert 0 < made[0].feature_seconds < 60
    assert 0 < made[1].feature_seconds < 60
    assert made[2].feature_seconds == 0.0
    assert all(run.inputs is run.train for run in made)
    assert all(run.validation_inputs is run.validation for run in made)


@pytest.mark.parametrize(("options", "expected"), [({"n_cached": 1}, [1, 1]), ({}, [])])
def test_no_more_is_extracted_than_the_plan_says(
    tmp_path: Path, options: dict[str, int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[int] = []
    plain = extract

    def noted(model: Any, some: Images, n: int, **rest: Any) -> Images:
        stages.append(n)
        return plain(model, some, n, **rest)

    monkeypatch.setattr(loop, "extract", noted)
    _, (run,) = runs(tmp_path, [images()], **options)
    train(run)
    assert stages == expected
    run.epoch = run.plan.epochs  # at its end already
    train(run)
    assert stages == expected


def test_nothing_is_extracted_where_nothing_is_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "extract", lambda *_, **__: 1 // 0)
    plan = Plan(epochs=1, batch_size=6, lr=1e-2, weight_decay=0.0, n_cached=3)
    run = Run(tiny_model(), images(), images(4), plan, tmp_path)
    assert train(run) == {}
    assert run.feature_seconds == 0.0


def test_the_clock_waits_for_the_device_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for kind in ("cpu", "cuda", "mps", "meta"):
        loop.synchronize(SimpleNamespace(type=kind))  # type: ignore[arg-type]
    assert [getattr(device, "type", device) for device in waited] == ["cuda", "mps"]
