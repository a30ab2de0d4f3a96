"""From a file to an answer: `vitft.Classifier`, `vitft predict` and `vitft embed`."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.shared import Run, paint
from vitft import Classifier, load_model
from vitft.pictures.decode import read_image
from vitft.pictures.preprocess import Fit


@pytest.fixture
def red(folder: Path) -> Path:
    return folder / "test" / "red" / "000.png"


@torch.no_grad()
def test_every_kind_of_picture_gets_the_same_answer(run: Path, base: Path, red: Path) -> None:
    classifier = Classifier(base, run)
    answer = classifier.predict(red)
    assert [*answer][0] == "red"
    assert sum(answer.values()) == pytest.approx(1)
    image = Image.open(red)
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [str(red), image, array, array / 255, (array / 255).astype(np.float32)]
    for picture in [*kinds, tensor, tensor / 255, tensor.float()]:
        found = classifier.predict(picture)
        assert found == pytest.approx(answer, abs=1e-6)
    assert classifier.predict([red, array]) == [pytest.approx(answer)] * 2
    assert classifier.predict(torch.stack([tensor] * 3)) == [pytest.approx(answer)] * 3
    assert len(classifier.predict(red.parent)) == 4
    assert classifier.predict([]) == []
    model = classifier.base
    pixels = read_image(red, Fit.of(model))[None].float()
    expected = model(model.normalize(pixels))
    torch.testing.assert_close(classifier.probabilities(red), expected.softmax(dim=1))
    features = model.features(model.normalize(pixels))
    torch.testing.assert_close(classifier.features(red), features)


def test_the_base_is_found_by_the_run(run: Path, base: Path, red: Path, vitft: Run) -> None:
    assert Classifier(adapter=run).predict(red, top=1) == Classifier(base, run).predict(red, top=1)
    assert vitft("predict", "--adapter", run, red).stdout.split()[1] == "red"
    flags = ["--adapter", run, "--data", red.parents[2]]
    assert "of 12 images" in vitft("evaluate", *flags).stdout
    assert "there is no base; name one by --base" in vitft("predict", red, code=2).stderr
    alone = run.parent / "alone"
    shutil.copytree(run, alone)
    (alone / "config.json").write_text("[" * 100_000)  # broken; the summary tells it, too
    assert "red" in vitft("predict", "--adapter", alone, red).stdout
    (alone / "config.json").unlink()  # as on the hub
    assert "red" in vitft("predict", "--adapter", alone, red).stdout
    (alone / "summary.json").unlink()
    told = vitft("predict", "--adapter", alone, red, code=2).stderr
    assert "does not tell which base it was trained on; name it by --base" in told


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (np.zeros((2, 2, 5)), r"a picture of shape \(2, 2, 5\) is neither"),
        (np.zeros((0, 2, 3)), r"a picture of shape \(0, 2, 3\) is neither"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "dtype complex64 are no real numbers"),
        (np.full((2, 2), None), "dtype object are no real numbers"),
        (torch.randn(3, 8, 8), "are neither 0 to 255 nor 0 to 1; give the picture as it is"),
        (np.full((2, 2, 3), 256), "pixels of 256 to 256 are neither"),
        (np.full((2, 2), np.nan), "pixels of nan to nan are neither"),
    ],
)
def test_what_is_no_picture_is_refused(picture: object, told: str, base: Path) -> None:
    with pytest.raises(ValueError, match=told):
        Classifier(base).predict(picture)


def test_tensors_in_bfloat16_are_pictures(base: Path) -> None:
    classifier, pixels = Classifier(base), torch.full((3, 8, 8), 0.5)
    assert classifier.predict(pixels.bfloat16()) == classifier.predict(pixels)


def test_grey_and_transparent_arrays_are_pictures(base: Path) -> None:
    classifier = Classifier(base)
    grey = np.full((9, 9), 200, np.uint8)
    expected = classifier.predict(np.repeat(grey[:, :, None], 3, 2))
    assert classifier.predict(grey) == classifier.predict(grey[:, :, None]) == expected
    clear = np.zeros((9, 9, 4), np.uint8)
    assert classifier.predict(clear) == classifier.predict(np.full((9, 9, 3), 255, np.uint8))


def test_several_adapters_answer_by_name(run: Path, base: Path, red: Path) -> None:
    other = run.parent / "other"
    shutil.copytree(run, other, dirs_exist_ok=True)
    classifier = Classifier(base, [run, other])
    found = classifier.predict(red, top=1)
    assert [*found] == [str(run), str(other)]
    assert found[str(run)] == pytest.approx(Classifier(base, run).predict(red, top=1), abs=1e-5)
    with pytest.raises(ValueError, match="each adapter has features of its own"):
        classifier.features(red)


def test_answers_are_printed_and_written_in_every_format(
    run: Path, base: Path, red: Path, tmp_path: Path, vitft: Run
) -> None:
    flags = ["--base", base, "--adapter", run, red, red.with_name("001.png"), "--top=2"]
    rows = [*csv.DictReader(io.StringIO(vitft("predict", *flags, "--csv").stdout))]
    assert [(row["image"], row["rank"]) for row in rows[:3]] == [
        (str(red), "1"),
        (str(red), "2"),
        (str(red.with_name("001.png")), "1"),
    ]
    assert rows[0]["class"] == "red"
    for name in ("x.csv", "x.json", "x.txt"):
        assert vitft("predict", *flags, "--out", tmp_path / name).stdout == ""
    assert (tmp_path / "x.csv").read_text() == vitft("predict", *flags, "--csv").stdout
    assert (tmp_path / "x.txt").read_text() == vitft("predict", *flags).stdout
    assert json.loads((tmp_path / "x.json").read_text())[1]["classes"]["red"] > 0.4
    assert "choose one" in vitft("predict", *flags, "--csv", "--json", code=2).stderr
    sure = vitft("predict", *flags, "--threshold=1").stdout
    assert sure == f"{red}  none\n{red.with_name('001.png')}  none\n"
    assert "threshold=2.0 is not in" in vitft("predict", *flags, "--threshold=2", code=2).stderr


def test_a_name_with_line_breaks_stays_in_its_line(
    base: Path, red: Path, tmp_path: Path, vitft: Run
) -> None:
    odd = Path(shutil.copy(red, tmp_path / "a\nb\rc\td.png"))
    (line,) = vitft("predict", "--base", base, odd, "--top=1").stdout.splitlines()
    assert line.startswith(f"{tmp_path}/a\\nb\\rc\\td.png  ")
    (told,) = json.loads(vitft("predict", "--base", base, odd, "--json").stdout)
    assert told["image"] == str(odd)


def test_a_broken_picture_costs_only_itself(
    base: Path, folder: Path, tmp_path: Path, vitft: Run
) -> None:
    for i in range(5):
        paint(tmp_path / f"{i}.png", (i, 0, 0))
    (tmp_path / "3.png").write_bytes(b"\x89PNG no more")
    done = vitft("predict", "--base", base, tmp_path, code=2)
    assert len(done.stdout.splitlines()) == 4
    assert "1 of 5 images are missing or broken" in done.stderr
    assert "3.png" in done.stderr
    assert len(vitft("predict", "--base", base, tmp_path, "--skip-broken").stdout.split("\n")) == 5
    out = tmp_path / "features.npz"
    assert "3.png" in vitft("embed", "--base", base, tmp_path, "--out", out, code=2).stderr
    assert not out.exists()
    vitft("embed", "--base", base, tmp_path, "--out", out, "--skip-broken")
    with np.load(out) as found:
        assert [Path(path).name for path in found["paths"]] == ["0.png", "1.png", "2.png", "4.png"]
        features = found["features"]
    assert (features.shape, features.dtype) == ((4, 16), np.float32)
    model = load_model(base)
    pixels = read_image(tmp_path / "4.png", Fit.of(model))[None].float()
    with torch.no_grad():
        expected = model.features(model.normalize(pixels))
    torch.testing.assert_close(torch.from_numpy(features[3:]), expected)


def test_neighbours_see_deep_pictures_by_the_range_of_their_set(
    base: Path, tmp_path: Path, vitft: Run
) -> None:
    """Without it all of these are one grey."""
    grid = np.indices((32, 32)).sum(axis=0) % 2
    for name, values in (("flat", 0 * grid), ("grid", grid)):
        (tmp_path / name).mkdir()
        for i in range(3):
            deep = (9000 + 200 * values + i).astype(np.uint16)
            Image.fromarray(deep).save(tmp_path / name / f"{i}.png")
    flags = ["--base", base, "--knn", tmp_path, tmp_path, "--json"]
    for row in json.loads(vitft("predict", *flags).stdout):
        assert [*row["classes"]][0] == Path(row["image"]).parent.name
        assert max(row["classes"].values()) > 0.9


def test_neighbours_answer_without_a_head(base: Path, folder: Path, red: Path, vitft: Run) -> None:
    done = vitft("predict", "--base", base, red, "--knn", folder, "--json")
    (row,) = json.loads(done.stdout)
    assert [*row["classes"]][0] == "red"
    assert sum(row["classes"].values()) == pytest.approx(1)
