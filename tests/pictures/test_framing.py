"""A picture of any shape, kind and depth becomes the square that a viewer would expect."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from tests.shared import TINY, paint
from vitft import VisionTransformer, ViTConfig, load_model, save_model
from vitft.data.load import load_data
from vitft.pictures.decode import read_header, read_image
from vitft.pictures.preprocess import Fit, Framing, Preprocessing


def photograph(width: int, height: int) -> Image.Image:
    """Return smooth colours, as photographs have them."""
    small = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((0, 0, 3, 7), fill=(0, 0, 0, 255))
    if mode == "P":
        image = image.quantize(4)
    found = Fit(8)(image.convert(mode) if mode != "P" else image)
    assert found[:, :, :4].max() == 0
    assert found[:, :, 4:].min() == 255


@pytest.mark.parametrize(
    ("orientation", "size"), [(1, (9, 5)), (4, (9, 5)), (5, (5, 9)), (8, (5, 9))]
)
def test_a_picture_on_its_side_is_as_large_as_it_is_shown(
    orientation: int, size: tuple[int, int], tmp_path: Path
) -> None:
    image, exif = photograph(9, 5), Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_header(tmp_path / "a.jpg") == (size, False)


def test_what_is_padded_has_the_mean_colour_of_the_model() -> None:
    model = VisionTransformer(ViTConfig(**TINY, dropout=0.0))
    model.mean, model.framing = (0.25, 0.5, 1.0), Framing(resize="pad")
    found = Fit.of(model)(Image.new("RGB", (8, 4), (9, 9, 9)))
    assert found[:, 0, 0].tolist() == [64, 128, 255]
    assert found[:, 4, 4].tolist() == [9, 9, 9]


def test_a_picture_with_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitft.pictures.preprocess.MAX_PIXELS", 80)
    assert Fit(8)(photograph(10, 8)).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="9x9 pixels are more than can be decoded"):
        Fit(8)(photograph(9, 9))


def test_a_record_may_tell_several_labels() -> None:
    record = {"image_size": 8, "mean": (0.5,), "std": (0.5,)}
    assert Preprocessing.of(record | {"labels": "several"}).labels == "several"


def test_a_thin_picture_keeps_a_line() -> None:
    grey = Image.fromarray(np.full((1, 400), 255, dtype=np.uint8))
    found = Fit(8, 1, Framing(resize="pad", kernel="draft-bilinear"), fill=(0,))(grey)
    assert (found[0] > 0).sum(dim=0).tolist() == [1] * 8


@pytest.mark.parametrize("kernel", ["bicubic", "draft-bicubic", "draft-bilinear"])
@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (33, 47), (5, 9)])
def test_a_square_is_filled_squashed_or_padded(kernel: str, width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), (250, 20, 30))
    for resize in ("shortest", "squash"):
        found = Fit(16, 3, Framing(resize=resize, kernel=kernel))(image)
        assert found.shape == (3, 16, 16)
        assert found.is_contiguous()
        assert {*found[0].flatten().tolist()} == {250}
    padded = Fit(16, 3, Framing(resize="pad", kernel=kernel), fill=(1, 2, 3))(image)
    assert padded.shape == (3, 16, 16)
    across = padded[:, 0, 8] if width > height else padded[:, 8, 0]
    assert across.tolist() == [1, 2, 3]
    assert padded[:, 8, 8].tolist() == [250, 20, 30]
    share = (padded[0] == 250).double().mean().item()
    assert share == pytest.approx(min(width, height) / max(width, height), abs=0.08)


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_a_crop_is_the_middle_of_what_torchvision_resizes(name: str) -> None:
    image = photograph(90, 61)
    found = Fit(14, 3, Framing(crop=0.875, kernel=f"draft-{name}"))(image)
    mode = tv.InterpolationMode(name)
    expected = tv.center_crop(tv.resize(tv.pil_to_tensor(image), [16], mode, antialias=True), [14])
    assert (found.int() - expected.int()).abs().max() <= 1


def test_a_large_jpeg_is_decoded_small_to_nearly_the_same(tmp_path: Path) -> None:
    photograph(800, 600).save(tmp_path / "large.jpg", quality=95)
    sizes: list[tuple[int, int]] = []

    def fit(image: Image.Image) -> Tensor:
        found = Fit(64, 3, Framing("squash", kernel="draft-bicubic"))(image)
        sizes.append(image.size)  # as the draft left it
        return found

    found = read_image(tmp_path / "large.jpg", fit)
    plain = read_image(tmp_path / "large.jpg", Fit(64, 3, Framing("squash")))
    assert sizes == [(200, 150)]  # twice the 64 at least, in eighths
    assert (found.float() - plain.float()).abs().mean() < 1.5


def test_a_draft_is_scaled_to_the_size_of_the_whole(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # on its side
    for size in ((400, 427), (427, 400)):
        photograph(*size).save(tmp_path / "a.jpg", quality=95, exif=exif)
        framing = Framing(crop=64 / 73, kernel="draft-bicubic")
        drafted = read_image(tmp_path / "a.jpg", Fit(64, 3, framing))
        photograph(*size).transpose(Image.Transpose.ROTATE_270).save(tmp_path / "b.png")
        whole = read_image(tmp_path / "b.png", Fit(64, 3, framing))
        assert (drafted.float() - whole.float()).abs().mean() < 1


def test_deep_pictures_are_seen_by_the_range_of_their_set(tmp_path: Path) -> None:
    for i, low in enumerate((7800, 7900, 8000)):
        for part, more in (("train", 0), ("test", 1)):
            values = np.linspace(low + more, low + 900, 64, dtype=np.uint16).reshape(8, 8)
            path = tmp_path / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
    data = load_data(str(tmp_path), Fit(8, 1))
    assert data.fit.framing.range == (7800, 8900)
    assert data.notes == ("16-bit or float pictures: values 7800 to 8900 become 0 to 255",)
    first = data.test.decode(0)
    assert (first.min(), first.max()) == (0, int(900 * 255 / 1100))
    assert Fit(8, 1)(Image.fromarray(np.full((8, 8), 8000, np.uint16))).unique().tolist() == [31]


def test_pictures_that_lose_much_are_said(tmp_path: Path) -> None:
    for i, part in enumerate(("train", "test")):
        for name in "ab":
            paint(tmp_path / part / name / "1.png", (i, 0, 0), (400, 534))
    little, cut = load_data(str(tmp_path), Fit(32)).notes
    assert little.startswith("pictures of 400x534 become 32x32: this model sees little of them")
    assert cut.startswith("25% of a picture is cut off at two of its sides; --resize pad or squash")
    assert load_data(str(tmp_path), Fit(112, 3, Framing(resize="pad"))).notes == ()


def test_the_record_travels_with_the_model(tiny: VisionTransformer, tmp_path: Path) -> None:
    tiny.framing = Framing("pad", 0.875, "draft-bilinear", (1.0, 9.0))
    save_model(tiny.float(), tmp_path / "x.safetensors")
    again = load_model(tmp_path / "x.safetensors")
    assert again.framing == tiny.framing
    assert again.preprocessing == tiny.preprocessing
    old = {key: tiny.preprocessing[key] for key in ("image_size", "mean", "std")}
    again.preprocessing = old  # of version 0.1
    assert again.framing == Framing()


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"resize": "fit"}, "resize='fit' is none of shortest, squash, pad"),
        ({"kernel": "area"}, "kernel='area' is none of bicubic, draft-bicubic, draft-bilinear"),
        ({"crop": 0}, "crop=0.0 is not in 0.01 <= crop <= 1"),
        ({"crop": 1.1}, "crop=1.1 is not in"),
        ({"range": [3, 3]}, r"range=\(3.0, 3.0\) does not go from a lower to a higher value"),
        ({"range": 3}, "preprocessing: range: Expected array | null, got int"),
        ({"crop": "much"}, "preprocessing: crop: Expected float, got str"),
        ({"image_size": 0}, r"image_size=0 is not in 1\.\.16384"),
        ({"image_size": 2**40}, r"image_size=\d+ is not in 1\.\.16384"),
        ({"image_size": [8]}, "preprocessing: image_size: Expected int, got array"),
        ({"mean": [float("nan")]}, "preprocessing: a number is not finite"),
        ({"std": [0]}, r"std=\(0.0,\) is not positive"),
        ({"labels": "many"}, "labels='many' is neither one nor several"),
    ],
)
def test_a_record_out_of_its_range_is_refused(record: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Preprocessing.of({"image_size": 8, "mean": [0.5], "std": [0.5]} | record)


def test_a_jpeg_of_more_pixels_than_can_be_decoded_is_decoded_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.jpg"
    photograph(640, 480).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # Pillow refuses twice as many
    monkeypatch.setattr("vitft.pictures.preprocess.MAX_PIXELS", 200_000)
    assert read_image(path, Fit(32)).shape == (3, 32, 32)
    photograph(640, 480).save(path.with_suffix(".png"))
    with pytest.raises(ValueError, match=r"large\.png is no readable image \(.*exceeds limit"):
        read_image(path.with_suffix(".png"), Fit(32))


def test_every_kernel_gives_what_is_there_where_nothing_is_resized() -> None:
    image = photograph(16, 16)
    plain = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for kernel in ("bicubic", "draft-bicubic"):
        assert torch.equal(Fit(16, 3, Framing(kernel=kernel))(image), plain)


def test_only_what_trains_tells_the_range(tmp_path: Path) -> None:
    for i, part in enumerate(("train", "test")):
        path = tmp_path / part / "a" / "1.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 5000 + i, np.uint16)).save(path)
        Image.fromarray(np.full((8, 8), 100, np.uint16)).save(path.with_name("2.png"))
    known = Fit(8, 1, Framing(range=(0.0, 9000.0)))
    assert load_data(str(tmp_path), known, learn=False).fit == known
    assert load_data(str(tmp_path), Fit(8, 1), learn=False).fit.framing.range is None
    assert load_data(str(tmp_path), known).fit.framing.range == (100, 5000)  # of the new set


@pytest.mark.parametrize("kernel", ["bicubic", "draft-bilinear"])
def test_a_padded_picture_stands_in_the_middle_of_its_mean_colour(kernel: str) -> None:
    framing = Framing(resize="pad", kernel=kernel)
    wide, tall = (Image.new("RGB", size, (9, 9, 9)) for size in ((60, 20), (20, 60)))
    for picture, across in ((wide, 1), (tall, 0)):
        found = Fit(30, framing=framing, fill=(250, 100, 200))(picture)
        inside = (found == 9).all(dim=0).any(dim=across)
        assert inside.nonzero().flatten().tolist() == [*range(10, 20)]
        assert found[:, 0, 0].tolist() == [250, 100, 200]
    grey = Fit(30, 1, framing=framing, fill=(250, 100, 200))(wide)
    assert grey[0, 0, 0] == 250
