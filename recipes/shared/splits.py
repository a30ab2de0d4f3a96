"""The data of a command in; training, validation and test images out."""

from dataclasses import dataclass

import click
import torch

from recipes.shared.options import VAL_FRACTION, DataOptions, TrainOptions
from vitft.data.listing import ImageSet
from vitft.data.load import load_data
from vitft.data.split import few, limit, split
from vitft.model.vit import VisionTransformer
from vitft.pictures.images import Images, listed
from vitft.pictures.preprocess import Fit

MAX_LARGER = 1.25  # images to crop are kept at a side up to so many times the model's


@dataclass(frozen=True)
class Splits:
    """Training, validation and test images.

    Attributes:
        notes: lines for the user about the set.
    """

    train: Images
    validation: Images
    test: Images
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        train, validation, test = (f"{len(x):,}" for x in (self.train, self.validation, self.test))
        held = [x.held for x in (self.train, self.validation, self.test) if x.held is not None]
        n_bytes = sum(x.numel() for x in held)
        return (
            f"{train} images ({validation} to validate, {test} to test; {n_bytes / 1e6:,.0f} MB in "
            "memory)"
        )


def open_data(options: DataOptions, model: VisionTransformer, *, learn: bool = True) -> ImageSet:
    """Return the data set of --data, and set the model's framing and labels to fit it.

    Args:
        options: of the command.
        model: the model that will take the images.
        learn: whether the model will be trained on them.

    Raises:
        ValueError, OSError: as for `load_data`.
    """
    data = load_data(
        options.data,
        Fit.of(model),
        test_fraction=options.test_fraction,
        source_pattern=options.source_pattern,
        learn=learn,
    )
    for note in data.notes:
        say(note)
    model.framing = data.fit.framing
    if learn:
        model.labels = "several" if data.several else "one"
    return data


def on_device(images: Images, device: torch.device, *, skip_broken: bool) -> Images:
    """Return images that are held on `device` if they fit there, and read batch by batch if not.

    Args:
        images: to hold.
        device: where they are needed.
        skip_broken: leave out broken ones, and say how many.

    Raises:
        ValueError: an image is broken, and `skip_broken` is not given.
    """
    if not skip_broken:
        return images.to(device)
    whole, broken = images.readable(device)
    if broken:
        pictures = "picture is" if len(broken) == 1 else "pictures are"
        say(f"{len(broken)} broken {pictures} left out: {listed(broken)}")
    return whole


def make_splits(data: ImageSet, options: TrainOptions, device: torch.device) -> Splits:
    """Return training, validation and test images, held on `device` where they fit.

    Raises:
        ValueError: there is only one class, a split that is needed has no readable image, or an
            option is out of its range or does not suit the set.
    """
    if len(data.classes) < 2:
        raise ValueError(f"{data.name} has only the class {data.classes[0]!r}; add another")
    if not len(data.train):
        raise ValueError(f"{data.name} has no images to train on; put them into train/CLASS/")
    if options.calibrate and data.several:
        raise ValueError("--calibrate is for one label an image; leave it out")
    train, validation, fraction = data.train, data.validation, options.val_fraction
    if not len(validation):
        fraction = VAL_FRACTION if fraction is None else fraction
        train, validation = split(train, fraction=fraction, seed=options.seed)
    elif fraction is not None:
        raise ValueError(
            f"{data.name} has a validation split, so --val-fraction has nothing to do; leave it out"
        )
    if options.shots is not None:
        train = few(train, options.shots, seed=options.seed)
    if options.limit is not None:
        train = limit(train, options.limit, seed=options.seed)
    if options.min_area < 1:
        train = train.at(kept_side(data.fit.image_size, options.min_area))
    train, validation_held, test = (
        on_device(x, device, skip_broken=options.skip_broken)
        for x in (train, validation, data.test)
    )
    found = Splits(train, validation_held, test, data.notes)
    if not len(found.train):
        raise ValueError(f"{data.name} has no readable image to train on")
    if len(validation) and not len(found.validation):
        raise ValueError(f"{data.name} has no readable image to validate with")
    for flag, needs in (("--calibrate", options.calibrate), ("--patience", options.patience)):
        if needs and not len(validation):
            raise ValueError(f"{flag} needs validation images; leave out --val-fraction 0")
    return found


def kept_side(image_size: int, min_area: float) -> int:
    """Return the side, in pixels, at which to keep images, so that crops have enough pixels."""
    return round(image_size * min(MAX_LARGER, min_area**-0.5))


def say(text: str) -> None:
    """Print a line of progress on standard error."""
    click.echo(text, err=True)
