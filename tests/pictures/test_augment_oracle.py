"""Every change of an image beside torchvision's, and how often and how far images change."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vitft.data.named import import_torchvision
from vitft.devices.shares import Rows
from vitft.pictures import changes
from vitft.pictures.augment import Augmentation
from vitft.pictures.changes import MOVES, RECOLOURINGS, erased, rand_augment, trivial_augment

import_torchvision()
from torchvision.transforms.v2 import InterpolationMode  # noqa: E402
from torchvision.transforms.v2 import functional as TF  # noqa: E402

STRENGTHS = (-1.0, -0.6, -0.1, 0.3, 1.0)


def pictures(n: int = 3, size: int = 24) -> Tensor:
    """Return smooth pictures (n, 3, size, size), whole numbers of 0..255 as floats."""
    x = torch.rand(n, 3, 6, 6)
    x = torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear")
    return (255 * x).round()


def inner(x: Tensor) -> Tensor:
    """Return the middle, which no edge reaches: what lies outside is filled in another way."""
    return x[..., 9:15, 9:15]


@pytest.mark.parametrize("s", STRENGTHS)
@pytest.mark.parametrize("name", ["brightness", "colour", "contrast", "sharpness"])
def test_blends_are_torchvisions(name: str, s: float) -> None:
    theirs = {"colour": "saturation"}.get(name, name)
    x = pictures() / 255
    found = getattr(changes, f"_{name}")(x * 255, torch.tensor(s)).clamp(0, 255) / 255
    expected = getattr(TF, f"adjust_{theirs}")(x, 1 + 0.9 * s)
    if name == "sharpness":  # torchvision leaves the border as it is
        found, expected = found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("s", STRENGTHS)
def test_posterizing_and_solarizing_are_torchvisions(s: float) -> None:
    x = pictures()
    whole = x.to(torch.uint8)
    bits = 8 - round(4 * abs(s))
    found = changes._posterize(x, torch.tensor(s))
    assert torch.equal(found.to(torch.uint8), TF.posterize(whole, bits))
    found, threshold = changes._solarize(x, torch.tensor(s)), 256 * abs(s)
    assert torch.equal(found, torch.where(x >= threshold, 255 - x, x))
    if threshold <= 255:
        assert torch.equal(found.to(torch.uint8), TF.solarize(whole, math.ceil(threshold)))


def test_stretching_the_contrast_is_torchvisions() -> None:
    x = pictures()
    x[0, 1] = 77  # one colour stays
    found = changes._autocontrast(x, torch.tensor(1.0))
    torch.testing.assert_close(found / 255, TF.autocontrast(x / 255), rtol=0, atol=1e-5)


@pytest.mark.parametrize("s", STRENGTHS)
@pytest.mark.parametrize("name", MOVES)
def test_moves_are_torchvisions(name: str, s: float) -> None:
    x, limit = pictures(), MOVES[name]
    change = torch.full((3,), 1 + list(MOVES).index(name))
    found = changes._moved(x, change, torch.full((3,), s))
    angle, shift, shear = 0.0, [0, 0], [0.0, 0.0]
    if name == "turn":
        angle = math.degrees(-limit * s)
    elif name in ("x", "y"):
        shift[name == "y"] = round(-limit * s * 12)  # halves of 24 pixels
        if not float(limit * s * 12).is_integer():
            return
    else:
        shear[name == "shear y"] = math.degrees(math.atan(-limit * s))
    if any(shear):  # torchvision's shears go through angles: compared by their own matrix
        grid = (
            np.array([[1, limit * s], [0, 1]]) if shear[0] else np.array([[1, 0], [limit * s, 1]])
        )
        expected = sheared(x, grid)
    else:
        options = {"scale": 1.0, "shear": [0.0, 0.0], "interpolation": InterpolationMode.BILINEAR}
        expected = TF.affine(x, angle=angle, translate=shift, **options)
    torch.testing.assert_close(inner(found), inner(expected), rtol=0, atol=0.05)


def sheared(x: Tensor, matrix: np.ndarray) -> Tensor:
    """Return x read at `matrix` times each pixel's place, from the centre, between the pixels."""
    n = x.shape[-1]
    place = np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1) - (n - 1) / 2  # (y, x, xy)
    at = place @ matrix.T + (n - 1) / 2
    low = np.clip(np.floor(at).astype(int), 0, n - 2)
    part = torch.tensor(at - low, dtype=torch.float32)
    ys, xs = low[..., 1], low[..., 0]
    top = x[..., ys, xs] * (1 - part[..., 0]) + x[..., ys, xs + 1] * part[..., 0]
    bottom = x[..., ys + 1, xs] * (1 - part[..., 0]) + x[..., ys + 1, xs + 1] * part[..., 0]
    return top * (1 - part[..., 1]) + bottom * part[..., 1]


def test_every_change_is_drawn_equally_often_and_strengths_evenly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Tensor] = []
    n_kinds = len(MOVES) + len(RECOLOURINGS) + 1

    def moved(images: Tensor, change: Tensor, strength: Tensor) -> Tensor:
        drawn.extend([change, strength])
        return images

    monkeypatch.setattr(changes, "_moved", moved)
    n = 130 * n_kinds
    trivial_augment(torch.zeros(n, 3, 2, 2), Rows(n))
    counts = drawn[0].bincount(minlength=n_kinds)
    assert len(counts) == n_kinds
    assert ((counts - 130).abs() < 5 * math.sqrt(130)).all()
    ordered = drawn[1].sort().values
    assert (ordered - torch.linspace(-1, 1, n)).abs().max() < 0.1


def gradients(n: int, size: int = 32) -> Tensor:
    """Return images whose first channel is the column, the second the row."""
    line = torch.arange(size, dtype=torch.float32)
    x, y = line.expand(size, size), line[:, None].expand(size, size)
    return torch.stack([x, y, x]).expand(n, 3, size, size).clone()


def test_half_of_the_images_are_mirrored() -> None:
    x = gradients(400)
    y = Augmentation(flip=True).move(x, Rows(len(x)))
    same = torch.isclose(y, x, atol=1e-3).all(dim=(1, 2, 3))
    mirrored = torch.isclose(y, x.flip(3), atol=1e-3).all(dim=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(int(mirrored.sum()) - 200) < 50


def test_shifts_are_whole_evenly_drawn_and_reflect_the_edge() -> None:
    x = gradients(2000, 8)
    y = Augmentation(shift=2).move(x, Rows(len(x)))
    dx, dy = (y[:, c, 4, 4] - 4 for c in (0, 1))
    for shifts in (dx, dy):
        counts = torch.bincount((shifts.round() + 2).long(), minlength=5)
        assert len(counts) == 5
        assert ((counts - 400).abs() < 100).all()
        torch.testing.assert_close(shifts, shifts.round(), rtol=0, atol=1e-3)
    padded = torch.from_numpy(np.pad(x[0].numpy(), ((0, 0), (2, 2), (2, 2)), "symmetric"))
    for image, right, down in zip(y[:50], dx.round().long(), dy.round().long(), strict=False):
        expected = padded[:, 2 + down : 10 + down, 2 + right : 10 + right]
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-3)


def test_cuts_have_the_areas_and_the_sides_that_are_said() -> None:
    y = Augmentation(min_area=0.25).move(gradients(2000), Rows(2000))
    width = (y[:, 0, 16, 20] - y[:, 0, 16, 12]) / 8
    height = (y[:, 1, 20, 16] - y[:, 1, 12, 16]) / 8
    area = width * height
    assert area.min() >= 0.25 - 1e-3
    assert area.max() <= 1 + 1e-3
    ordered = area.sort().values
    assert (ordered - torch.linspace(0.25, 1, 2000)).abs().max() < 0.05
    assert (width / height).min() >= 9 / 10 - 1e-2
    assert (width / height).max() <= 10 / 9 + 1e-2
    assert (y >= -1e-3).all()
    assert (y <= 31 + 1e-3).all()  # nothing from outside: a cut lies within the image


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_are_mixed_as_the_images_are(kind: str) -> None:
    n = 600
    images = torch.arange(n, dtype=torch.float32).view(-1, 1, 1, 1).expand(n, 3, 16, 16).clone()
    targets = torch.eye(n)
    mixed, shares = Augmentation(**{kind: 1.0}).mix(images, targets, Rows(len(images)))
    other = torch.arange(n).flip(0)
    share = (mixed.mean(dim=(1, 2, 3)) - torch.arange(n)) / (other - torch.arange(n))
    torch.testing.assert_close(shares[torch.arange(n), other], share, rtol=0, atol=1e-4)
    torch.testing.assert_close(shares.sum(1), torch.ones(n))
    assert 0.05 < share.std() < 0.5
    values = mixed.flatten(1)
    if kind == "mixup":
        assert (values.amax(1) - values.amin(1)).max() < 1e-3
        assert abs(share.mean() - 0.5) < 0.05
    else:
        pure = (values - images.flatten(1)).abs() < 1e-3
        assert (pure | ((values - other[:, None]).abs() < 1e-3)).all()


def test_the_share_of_mixed_images_is_that_which_is_asked_for() -> None:
    images = torch.rand(4000, 3, 8, 8)
    mixed, _ = Augmentation(mixup=0.2, cutmix=0.3).mix(images, torch.zeros(4000, 2), Rows(4000))
    touched = (mixed != images).flatten(1)
    assert abs(touched.all(1).float().mean() - 0.2) < 0.03
    assert 0.2 < touched.any(1).float().mean() - touched.all(1).float().mean() < 0.31


def areas(images: Tensor) -> Tensor:
    """Return the share of each image that was changed, from images of all different pixels."""
    return (images != PIXELS).any(dim=1).double().mean(dim=(1, 2))


PIXELS = torch.arange(3 * 24 * 30).float().view(1, 3, 24, 30) / 9


def test_rectangles_are_erased_as_torchvision_erases_them() -> None:
    n = 4000
    ours = areas(erased(PIXELS.expand(n, -1, -1, -1), 0.5, Rows(n)))
    transforms = import_torchvision().transforms.v2
    theirs = areas(torch.cat([transforms.RandomErasing(0.5, value=-1)(PIXELS) for _ in range(n)]))
    for found, expected in (
        ((ours > 0).double(), (theirs > 0).double()),
        (ours[ours > 0], theirs[theirs > 0]),
        (ours[ours > 0].square(), theirs[theirs > 0].square()),
    ):
        error = (found.var() / len(found) + expected.var() / len(expected)).sqrt()
        assert (found.mean() - expected.mean()).abs() < 4.5 * error


def test_what_is_erased_is_one_rectangle_of_the_mean_colour() -> None:
    for image in erased(PIXELS.expand(20, -1, -1, -1), 1.0, Rows(20)):
        gone = (image != PIXELS[0]).any(dim=0)
        rows, columns = gone.any(dim=1), gone.any(dim=0)
        assert gone.sum() == rows.sum() * columns.sum()
        colour = image[:, gone]
        torch.testing.assert_close(colour, PIXELS.mean(dim=(0, 2, 3))[:, None].expand_as(colour))


def test_two_changes_of_one_strength_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    strengths: list[Tensor] = []
    plain = changes.changed

    def noted(images: Tensor, strength: Tensor, rows: Rows) -> Tensor:
        strengths.append(strength)
        return plain(images, strength, rows)

    monkeypatch.setattr(changes, "changed", noted)
    found = rand_augment(PIXELS.expand(500, -1, -1, -1).clone(), Rows(500))
    assert len(strengths) == 2
    for strength in strengths:
        assert strength.unique().tolist() == pytest.approx([-0.3, 0.3])
        assert 180 < (strength > 0).sum() < 320
    assert not torch.equal(*strengths)
    assert found.shape == (500, 3, 24, 30)


def test_a_cut_may_be_wider_than_the_image_is() -> None:
    torch.manual_seed(0)
    x = torch.linspace(0, 255, 64).view(1, 1, 1, 64).expand(800, 3, 64, 64)
    y = x.transpose(2, 3)
    both = torch.cat([x[:, :1], y[:, :1], y[:, :1]], dim=1).contiguous()
    found, _ = Augmentation(min_area=0.3, max_ratio=4 / 3)(both, torch.zeros(800, 2))
    inner = found[:, :, 16:48, 16:48]
    wide = inner[:, 0, :, -1].mean(dim=1) - inner[:, 0, :, 0].mean(dim=1)
    tall = inner[:, 1, -1].mean(dim=1) - inner[:, 1, 0].mean(dim=1)
    ratio = (wide / tall).abs()
    assert ratio.max() == pytest.approx(4 / 3, rel=0.03)
    assert ratio.min() == pytest.approx(3 / 4, rel=0.03)
