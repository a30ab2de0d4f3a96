from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

from vitft.devices.shares import Rows
from vitft.pictures.augment import Augmentation
from vitft.pictures.changes import MOVES, RECOLOURINGS, trivial_augment


def batch(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 3, 8, 8), torch.eye(4)[torch.arange(n) % 4]


def test_nothing_is_the_default() -> None:
    images, targets = batch()
    changed, same = Augmentation()(images, targets)
    assert changed is images
    assert same is targets


def test_a_flip_mirrors_about_half_of_the_images_exactly() -> None:
    images, _ = batch(200)
    moved = Augmentation(flip=True).move(images, Rows(len(images)))
    same = (moved - images).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (moved - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    assert (same ^ mirrored).all()
    assert 60 < int(mirrored.sum()) < 140


def test_a_shift_moves_by_whole_pixels_and_reflects() -> None:
    images, _ = batch(300)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    moved = Augmentation(shift=1).move(images, Rows(len(images)))
    inner = moved[..., 1:-1, 1:-1]
    windows = [
        padded[..., y : y + 8, x : x + 8][..., 1:-1, 1:-1] for y in (1, 2, 3) for x in (1, 2, 3)
    ]
    found = torch.stack([(inner - w).abs().amax((1, 2, 3)) < 1e-4 for w in windows])
    assert (found.sum(0) == 1).all()
    assert (found.sum(1) > 10).all()  # each of the nine moves


def test_a_cut_keeps_at_least_its_area() -> None:
    ramp = torch.arange(32.0).expand(500, 1, 32, 32)
    moved = Augmentation(min_area=0.64).move(ramp, Rows(len(ramp)))
    width = (moved[:, 0, 0, -1] - moved[:, 0, 0, 0]) / 31
    assert width.min() > 0.74  # sqrt(0.64 * 0.9) = 0.76, within a pixel
    assert width.max() <= 1.001
    assert width.std() > 0.03


def test_mixed_targets_tell_the_share_of_each_image() -> None:
    images = torch.cat([torch.zeros(500, 1, 8, 8), torch.ones(500, 1, 8, 8)])
    targets = torch.eye(2)[[0] * 500 + [1] * 500]
    for options in ({"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.3, "cutmix": 0.3}):
        mixed, shares = Augmentation(**options)(images, targets)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares[:, 1])
        untouched = ((mixed == 0) | (mixed == 1)).all(dim=(1)).flatten(1).all(1) & (
            shares.amax(1) == 1
        )
        share = float(untouched.float().mean())
        assert share == pytest.approx(1 - sum(options.values()), abs=0.1)


def test_parts_of_a_larger_image_show_its_detail() -> None:
    fine = torch.tensor([0.0, 255.0]).repeat(16).expand(400, 1, 32, 32).clone()  # stripes
    coarse = F.avg_pool2d(fine, 2)  # of which nothing is left at half the size
    targets = torch.ones(400, 1)
    cut = Augmentation(min_area=0.25, max_ratio=1.0)
    torch.manual_seed(1)
    large, _ = cut(fine, targets, 16)
    torch.manual_seed(1)
    small, _ = cut(coarse, targets, 16)
    assert large.shape == small.shape == (400, 1, 16, 16)
    assert small.std() < 1 < 20 < large.std()


def test_a_larger_image_is_moved_like_a_small_one() -> None:
    ramp = torch.linspace(0, 255, 8).expand(500, 1, 8, 8).clone()
    large = F.interpolate(ramp, scale_factor=4, mode="bilinear", align_corners=False)
    move = Augmentation(flip=True, shift=2, min_area=0.5)
    torch.manual_seed(1)
    one = move.move(ramp, Rows(len(ramp)))
    torch.manual_seed(1)
    other = move.move(large, Rows(500), 8)
    assert (one - other).abs().mean() < 6  # of 255; a shift of a pixel is 36


def test_it_repeats_under_the_same_seed() -> None:
    images, targets = batch()
    augmentation = Augmentation(flip=True, shift=2, min_area=0.5, mixup=0.2, cutmix=0.5)
    torch.manual_seed(1)
    first = augmentation(images, targets)
    torch.manual_seed(1)
    second = augmentation(images, targets)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": -1}, "shift=-1 is negative"),
        ({"min_area": 0.0}, "min_area=0.0 is not in"),
        ({"mixup": 0.6, "cutmix": 0.6}, "add up to 1 at most"),
        ({"max_ratio": 0.9}, "max_ratio=0.9 is below 1"),
        ({"erase": 1.1}, "erase=1.1 is not in"),
        ({"trivial": True, "rand": True}, "two ways to change images; choose one"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


def test_trivial_augment_changes_each_image_in_one_way() -> None:
    image = torch.randint(0, 256, (1, 3, 16, 16)).float()
    images = image.expand(800, -1, -1, -1)
    changed = trivial_augment(images, Rows(800))
    assert changed.shape == images.shape
    assert 0 <= changed.min() < changed.max() <= 255
    same = ((changed - image).abs().amax((1, 2, 3)) < 1e-2).float().mean()
    assert same < 2.5 / (1 + len(MOVES) + len(RECOLOURINGS))  # none, and some too weak to be seen
    assert len(changed.round().unique(dim=0)) > 600


@pytest.mark.parametrize("recolour", RECOLOURINGS[:-1])  # the last one has no strength
def test_recolouring_is_none_at_its_neutral_strength(
    recolour: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8)).float()
    neutral = torch.full((4, 1, 1, 1), 1.0 if recolour.__name__ == "_solarize" else 0.0)
    torch.testing.assert_close(recolour(images, neutral), images, atol=1e-3, rtol=0)
    assert (recolour(images, neutral - 0.5) - images).abs().max() > 1


def test_autocontrast_stretches_each_channel() -> None:
    images = 50 + 100 * torch.rand(4, 3, 8, 8)
    stretched = RECOLOURINGS[-1](images, torch.zeros(4, 1, 1, 1))
    torch.testing.assert_close(stretched.amin((2, 3)), torch.zeros(4, 3))
    torch.testing.assert_close(stretched.amax((2, 3)), torch.full((4, 3), 255.0))


def test_enhancements_are_those_of_pillow() -> None:
    pixels = torch.randint(0, 256, (1, 1, 12, 12)).float()
    grey = Image.fromarray(pixels[0, 0].byte().numpy())
    strength = torch.full((1, 1, 1, 1), 0.5)
    for recolour, enhance in zip(
        (RECOLOURINGS[0], RECOLOURINGS[2], RECOLOURINGS[3]),
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Sharpness),
        strict=True,
    ):
        ours = recolour(pixels, strength).clamp(0, 255)[0, 0, 1:-1, 1:-1]
        theirs = bytearray(enhance(grey).enhance(1.45).tobytes())
        difference = ours - torch.tensor(list(theirs)).view(12, 12)[1:-1, 1:-1]
        assert difference.abs().max() <= 2  # Pillow rounds on its way


def test_posterizing_keeps_what_resampling_has_just_missed() -> None:
    images = torch.tensor([15.9999, 16.0, 128.0001, 127.9998]).view(1, 1, 2, 2)
    found = RECOLOURINGS[4](images, torch.ones(1, 1, 1, 1))  # 4 bits
    assert found.flatten().tolist() == [16, 16, 128, 128]
