"""From files to pixels: grey depths, the way an image is fitted, and what is refused."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vitft.pictures.decode import is_image, read_image
from vitft.pictures.preprocess import Fit


def eight_bits(image: Image.Image) -> list[int]:
    """Return the pixels of an image of one row as they come out in grey."""
    side = image.size[0]
    square = Image.fromarray(np.repeat(np.asarray(image), side, axis=0))
    return Fit(side, 1)(square)[0, 0].tolist()


def row(values: list[float], dtype: str) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=dtype))


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 255, 256, 32767, 65535], "uint16", [0, 0, 1, 127, 255]),
        ([0, 3, 255, 2, 1], "uint16", [0, 0, 0, 0, 0]),  # 16 bits, however dark
        ([0, 1, 128, 254, 255], "int32", [0, 1, 128, 254, 255]),
        ([0, 1, 128, 255, 256], "int32", [0, 0, 0, 0, 1]),
        ([0, 512, 65535], "int32", [0, 2, 255]),
        ([0.0, 0.25, 0.5, 1.0], "float32", [0, 63, 127, 255]),
        ([0.0, 1.0, 1.5], "float32", [0, 1, 1]),  # above 1, so 0..255
        ([0.0, 128.0, 255.0], "float32", [0, 128, 255]),
        ([0.0, 256.0, 65535.0], "float32", [0, 1, 255]),
        ([0, 1, 1], "int32", [0, 1, 1]),  # whole numbers up to 1 are dark, not a share
    ],
)
def test_a_grey_image_of_any_depth_keeps_its_brightness(
    values: list[float], dtype: str, expected: list[int]
) -> None:
    assert eight_bits(row(values, dtype)) == expected


@pytest.mark.parametrize(
    ("values", "dtype", "told"),
    [
        ([0, 65536], "int32", "0 to 65536"),
        ([-1, 5], "int32", "-1 to 5"),
        ([0.5, 1e6], "float32", "0.5 to 1e+06"),
    ],
)
def test_values_of_no_known_depth_are_refused(values: list[float], dtype: str, told: str) -> None:
    message = f"^its values, {re.escape(told)}, are not those of 8 or 16 bits$"
    with pytest.raises(ValueError, match=message):
        eight_bits(row(values, dtype))


def photograph(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pixels_of_the_right_size_are_kept_as_they_are() -> None:
    image = photograph(6, 6)
    found = Fit(6, 3)(image)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, torch.tensor(np.asarray(image)).permute(2, 0, 1))
    grey = Fit(6, 1)(image)
    assert torch.equal(grey, torch.tensor(np.asarray(image.convert("L")))[None])


@pytest.mark.parametrize("size", [(12, 12), (17, 9), (6, 11), (3, 3)])
def test_other_sizes_are_fitted_in_bicubic(size: tuple[int, int]) -> None:
    image = photograph(*size)
    fitted = ImageOps.fit(image, (6, 6), Image.Resampling.BICUBIC)
    found = Fit(6, 3)(image)
    assert torch.equal(found, torch.tensor(np.asarray(fitted)).permute(2, 0, 1))


def fail(error: Exception) -> Callable[[Image.Image], Tensor]:
    def fit(_: Image.Image) -> Tensor:
        raise error

    return fit


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad"),
        OSError("bad"),
        SyntaxError("bad"),
        OverflowError("bad"),
        MemoryError("bad"),
        Image.DecompressionBombError("bad"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    tmp_path: Path, error: Exception
) -> None:
    path = tmp_path / "a.png"
    photograph(3, 3).save(path)
    message = rf"^{re.escape(str(path))} is no readable image \(bad\); repair or remove it$"
    with pytest.raises(ValueError, match=message):
        read_image(path, fail(error))
    gone = tmp_path / "gone.png"
    with pytest.raises(FileNotFoundError, match=f"^there is no image {re.escape(str(gone))}$"):
        read_image(gone, fail(error))
    with pytest.raises(KeyError):
        read_image(path, fail(KeyError()))


@pytest.mark.parametrize("comment", [0, 10, 60_000, 5_000_000])
def test_a_header_without_end_is_not_waited_for(comment: int, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (90, 90, 3), dtype=torch.uint8)
    header = b"P6\n#" + b"x" * comment + b"\n90 90\n255\n"
    path = tmp_path / "image.ppm"
    path.write_bytes(header + pixels.numpy().tobytes())
    started = time.perf_counter()
    if comment < 2**16:
        assert torch.equal(read_image(path, Fit(90)), pixels.permute(2, 0, 1))
    else:
        with pytest.raises(ValueError, match="its header is longer than 65,536 bytes"):
            read_image(path, Fit(90))
    (tmp_path / "image").write_bytes(path.read_bytes())
    assert is_image(tmp_path / "image") == (comment < 2**16)
    assert time.perf_counter() - started < 2


def test_the_order_of_a_pixels_bytes_does_not_matter() -> None:
    values = np.array([[0, 255, 256], [32767, 65535, 4096], [1, 2, 3]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 3), values.tobytes())
    found = Fit(3, 1)(image)[0]
    assert found.tolist() == (values // 256).tolist()
