import multiprocessing
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.shared import paint
from vitft.data.split import channel_statistics, limit, split
from vitft.pictures.decode import read_image
from vitft.pictures.images import Images, listed
from vitft.pictures.preprocess import Fit

CPU = torch.device("cpu")
fit = Fit(8, 3)


def numbered(labels: list[int], sources: list[str] | None = None) -> Images:
    """Return images whose every pixel is their number."""
    return Images(
        lambda i: torch.full((3, 2, 2), i, dtype=torch.uint8), torch.tensor(labels), sources or ()
    )


def numbers(images: Images) -> list[int]:
    batches = images.batches(torch.arange(len(images)).split(7), CPU)
    return [int(image[0, 0, 0]) for batch, _ in batches for image in batch]


def test_streamed_and_held_images_give_the_same_batches() -> None:
    streamed, held = numbered([0, 1] * 10), numbered([0, 1] * 10).to(CPU)
    streamed.to(CPU, max_bytes=5)
    assert streamed.held is None
    assert held.held is not None
    parts = torch.randperm(20).split(6)
    for a, b in zip(streamed.batches(parts, CPU), held.batches(parts, CPU), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_a_subset_has_the_chosen_images_in_order() -> None:
    for images in (numbered([0] * 9), numbered([0] * 9).to(CPU)):
        assert numbers(images.subset(torch.tensor([5, 2])).subset(torch.tensor([1, 0]))) == [2, 5]


def test_a_broken_image_of_a_streamed_set_ends_its_workers(tmp_path: Path) -> None:
    images = Images(lambda i: read_image(tmp_path / "gone.png", fit), torch.zeros(9).long())
    before = {*multiprocessing.active_children()}
    with pytest.raises(ValueError, match=r"^there is no image .*gone.png$") as caught:
        next(images.batches(torch.arange(9).split(2), CPU))
    assert {*multiprocessing.active_children()} == before
    assert caught.value.__context__ is None


def test_workers_stay_for_the_next_pass_and_end_with_the_set() -> None:
    images, parts = numbered([0] * 40), torch.arange(40).split(2)
    before = {*multiprocessing.active_children()}
    workers = []
    for k in (1, 3, 7):
        order = [part * k % 40 for part in parts[k:]]  # other batches in each pass
        found = [batch[:, 0, 0, 0].tolist() for batch, _ in images.batches(order, CPU)]
        assert found == [part.tolist() for part in order]
        workers.append({*multiprocessing.active_children()} - before)
    assert workers[0]
    assert workers[0] == workers[1] == workers[2]
    one, other = images.batches(parts, CPU), images.batches(parts[::-1], CPU)
    for i, (ours, theirs) in enumerate(zip(one, other, strict=True)):  # side by side
        assert torch.equal(ours[0][:, 0, 0, 0], parts[i])
        assert torch.equal(theirs[0][:, 0, 0, 0], parts[19 - i])
    broken = images.batches(parts, CPU)
    next(broken)
    broken.close()
    assert len([*images.batches(parts, CPU)]) == 20
    del images, broken, one, other
    assert {*multiprocessing.active_children()} == before


def test_a_program_ends_while_its_sets_have_workers() -> None:
    program = """if True:
        import torch
        from vitft.pictures.images import Images
        images = Images(lambda i: torch.zeros(3, 2, 2).byte(), torch.zeros(40).long())
        parts, cpu = torch.arange(40).split(2), torch.device("cpu")
        print(len([*images.batches(parts, cpu)]))
        begun = images.batches(parts, cpu)
        next(begun)
        raise KeyboardInterrupt
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.stdout == b"20\n"
    assert done.stderr.endswith(b"KeyboardInterrupt\n")


def test_a_streamed_set_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("vitft.pictures.stream.DataLoader.__iter__", fail)
    with pytest.raises(ValueError, match="Too many open files"):
        next(numbered([0, 1]).batches(torch.arange(2).split(1), CPU))


def test_the_split_is_stratified_seeded_and_complete() -> None:
    images = numbered([0] * 50 + [1] * 30 + [2])
    train, validation = split(images, fraction=0.1, seed=1)
    assert validation.labels.bincount().tolist() == [5, 3]
    assert sorted(numbers(train) + numbers(validation)) == list(range(81))
    assert numbers(split(images, fraction=0.1, seed=1)[1]) == numbers(validation)
    assert numbers(split(images, fraction=0.1, seed=2)[1]) != numbers(validation)


def test_the_split_keeps_a_source_together() -> None:
    tracks = [f"{i // 6:03}" for i in range(120)]
    train, validation = split(numbered([i // 60 for i in range(120)], tracks), fraction=0.1, seed=0)
    assert not set(train.sources) & set(validation.sources)
    assert validation.labels.bincount().tolist() == [6, 6]


@pytest.mark.parametrize("seed", range(4))
def test_a_source_too_large_for_the_validation_trains(seed: int) -> None:
    sources = ["a day"] * 9 + ["another"] * 3 + ["a third"] * 8
    _, validation = split(numbered([0] * 20, sources), fraction=0.1, seed=seed)
    assert {*validation.sources} == {"another"}


def test_a_class_of_one_source_is_split_by_image() -> None:
    train, validation = split(numbered([0] * 10, ["same"] * 10), fraction=0.2, seed=0)
    assert (len(train), len(validation)) == (8, 2)


def test_without_a_fraction_everything_trains() -> None:
    train, validation = split(numbered([0, 1, 1]), fraction=0, seed=0)
    assert (len(train), len(validation)) == (3, 0)
    with pytest.raises(ValueError, match="val_fraction=1 is not in"):
        split(numbered([0]), fraction=1, seed=0)


def test_a_limit_takes_equally_of_each_class() -> None:
    chosen = limit(numbered([0] * 50 + [1] * 3 + [2] * 20), 12, seed=0)
    assert chosen.labels.bincount().tolist() in ([5, 3, 4], [4, 3, 5])
    assert len(limit(numbered([0, 1]), 99, seed=0)) == 2
    with pytest.raises(ValueError, match="limit=0 is not positive"):
        limit(numbered([0]), 0, seed=0)


def test_channel_statistics_are_those_of_all_pixels() -> None:
    pixels = torch.randint(0, 256, (9, 3, 4, 5), dtype=torch.uint8)
    mean, std = channel_statistics(Images(lambda i: pixels[i], torch.zeros(9)))
    expected = pixels.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(expected.mean(1).tolist(), abs=1e-4)
    assert std == pytest.approx(expected.std(1, correction=0).tolist(), abs=1e-4)


def test_images_of_any_size_and_mode_become_a_square_of_colours(tmp_path: Path) -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
        assert fit(Image.new(mode, (31, 17))).shape == (3, 8, 8)
    assert Fit(4, 1)(Image.new("RGB", (5, 5))).shape == (1, 4, 4)


def test_sixteen_bits_keep_their_brightness() -> None:
    for mode, value in (("I;16", 32768), ("I", 32768), ("I", 128), ("F", 128.0), ("F", 0.502)):
        assert fit(Image.new(mode, (8, 8), value)).unique().tolist() == [128]
    with pytest.raises(ValueError, match="its values, -1 to -1, are not those of 8 or 16 bits"):
        fit(Image.new("F", (8, 8), -1.0))


def test_the_centre_is_cut_out() -> None:
    image = Image.new("RGB", (24, 8), "black")
    image.paste("white", (8, 0, 16, 8))
    assert fit(image).unique().tolist() == [255]


def test_a_photograph_is_turned_upright() -> None:
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # white above
    image.getexif()[0x0112] = 3  # taken upside down
    assert fit(image)[0, :, 0].tolist() == [0] * 4 + [255] * 4


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    paint(tmp_path / "good.png", (1, 2, 3))
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:45])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=f"{name} is no readable image .* repair or remove it"):
            read_image(tmp_path / name, fit)
    with pytest.raises(FileNotFoundError, match="there is no image .*none.png"):
        read_image(tmp_path / "none.png", fit)


def test_images_are_held_once_while_they_are_made() -> None:
    alive, most = set(), 0

    def decode(i: int) -> torch.Tensor:
        nonlocal most
        image = torch.full((1, 2, 2), i, dtype=torch.uint8)
        alive.add(i)
        weakref.finalize(image, alive.discard, i)
        most = max(most, len(alive))
        return image

    images = Images(decode, torch.zeros(200)).to(torch.device("cpu"))
    assert images.held is not None
    assert images.held[:, 0, 0, 0].tolist() == list(range(200))
    assert most <= 2 * (os.cpu_count() or 1) + 2


def test_ten_errors_stand_in_a_line_and_more_are_hinted_at() -> None:
    errors = [ValueError(str(i)) for i in range(12)]
    assert listed(errors[:2]) == "0; 1"
    assert listed(errors[:10]) == "0; 1; 2; 3; 4; 5; 6; 7; 8; 9"
    assert listed(errors[:11]) == "0; 1; 2; 3; 4; 5; 6; 7; 8; 9; ..."
    assert listed(errors) == listed(errors[:11])


def test_the_stratum_of_several_labels_is_the_rarest() -> None:
    labels = torch.tensor([[1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1]])
    images = Images(lambda i: torch.zeros(1, 2, 2, dtype=torch.uint8), labels.to(torch.uint8))
    assert images.strata().tolist() == [2, 1, 0, 2, 2]  # 4, 1 and 3 images have them
    assert numbered([2, 0, 1]).strata().tolist() == [2, 0, 1]


def test_images_of_another_size_keep_labels_sources_and_names() -> None:
    def sized(side: int) -> Callable[[int], torch.Tensor]:
        return lambda i: torch.full((1, side, side), i, dtype=torch.uint8)

    labels, sources, names = torch.tensor([0, 1, 0]), ["a", "b", "c"], ["x", "y", "z"]
    images = Images(sized(4), labels, sources, names, sized=sized)
    larger = images.at(6)
    assert torch.equal(larger.labels, labels)
    assert (larger.sources, larger.names) == (sources, names)
    assert larger.decode(2).shape == (1, 6, 6)
    assert images.decode(2).shape == (1, 4, 4)


def test_readable_images_are_held_where_they_fit_and_streamed_where_not() -> None:
    def decode(i: int) -> torch.Tensor:
        if i == 1:
            raise ValueError("broken")
        return torch.full((1, 2, 2), i, dtype=torch.uint8)

    images = Images(decode, torch.tensor([0, 1, 0]))
    held, broken = Images(decode, images.labels).readable(CPU)
    assert held.held is not None
    assert (held.held[:, 0, 0, 0].tolist(), [*map(str, broken)]) == ([0, 2], ["broken"])
    streamed, broken = images.readable(CPU, max_bytes=0)
    assert streamed.held is None
    assert (numbers(streamed), len(broken)) == ([0, 2], 1)
