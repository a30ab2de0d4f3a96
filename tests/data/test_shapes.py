"""Drawn images: reproducible, balanced, all different, and not solved by their pixels' averages."""

import pytest
import torch
from torch import Tensor

from vitft.data.shapes import CLASSES, draw

SETS = pytest.mark.parametrize("name", CLASSES)


def distinct(images: Tensor) -> int:
    """Return how many different images there are."""
    return len({image.numpy().tobytes() for image in images})


@SETS
def test_the_same_seed_draws_the_same_images(name: str) -> None:
    torch.manual_seed(1)
    images, labels = draw(name, 30, seed=3)
    torch.manual_seed(2)
    again, labels_again = draw(name, 30, seed=3)
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)


@SETS
def test_drawing_leaves_the_global_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    draw(name, 5, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@SETS
def test_different_seeds_share_no_image(name: str) -> None:
    train, _ = draw(name, 100, seed=0)
    test, _ = draw(name, 100, seed=1)
    assert distinct(torch.cat([train, test])) == 200


@SETS
@pytest.mark.parametrize("size", [16, 32, 48])
def test_images_are_uint8_and_labels_int64(name: str, size: int) -> None:
    images, labels = draw(name, 7, seed=0, size=size)
    assert images.shape == (7, 3, size, size)
    assert images.dtype == torch.uint8
    assert labels.shape == (7,)
    assert labels.dtype == torch.int64


@SETS
def test_pixels_use_the_whole_range(name: str) -> None:
    images, _ = draw(name, 100, seed=0)
    assert images.min() == 0
    assert images.max() == 255


@SETS
@pytest.mark.parametrize("n", [60, 67, 501])
def test_classes_are_balanced_and_shuffled(name: str, n: int) -> None:
    _, labels = draw(name, n, seed=0)
    counts = labels.bincount(minlength=len(CLASSES[name]))
    assert len(counts) == len(CLASSES[name])
    assert counts.max() - counts.min() <= (n % len(CLASSES[name]) > 0)
    assert not torch.equal(labels, torch.arange(n) % len(CLASSES[name]))


@SETS
def test_a_drawing_of_nothing_is_empty(name: str) -> None:
    images, labels = draw(name, 0, seed=0)
    assert images.shape == (0, 3, 32, 32)
    assert labels.shape == (0,)


@SETS
def test_the_mean_image_of_a_class_does_not_tell_it(name: str) -> None:
    images, labels = draw(name, 1000, seed=0)
    means = torch.stack([images[labels == c].float().mean(0) for c in range(len(CLASSES[name]))])
    test, truth = draw(name, 300, seed=1)
    nearest = torch.cdist(test.flatten(1).float(), means.flatten(1)).argmin(1)
    assert (nearest == truth).float().mean() < 0.35


def test_an_unknown_set_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"name='shape' .* choose from \['shapes', 'symbols'\]"):
        draw("shape", 1, seed=0)
