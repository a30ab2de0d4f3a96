"""A report is one file that shows what happened, whatever happened."""

import base64
import io
import math
import os
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.shared import long
from vitft.pictures.images import Images
from vitft.pictures.preprocess import Fit
from vitft.report.figures import percent, wilson
from vitft.report.findings import Change, Findings, examine
from vitft.report.run import write_report
from vitft.report.thumbnails import Thumbnails

pytestmark = long
CLASSES = ("cat", "dog", "owl")
ROW = {"epoch": 1, "train_loss": 1.5, "val_loss": 1.25, "val_accuracy": 0.625, "lr": 3e-4}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def predictions(labels: list[int], predicted: list[int], n_classes: int = 3) -> dict[str, Any]:
    """Return noise (n, 3, 8, 8), labels (n,) and probabilities (n, n_classes), 0.9 if predicted."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(labels), 3, 8, 8)
    probabilities = torch.full((len(labels), n_classes), 0.1 / max(n_classes - 1, 1))
    probabilities[torch.arange(len(labels)), torch.tensor(predicted, dtype=torch.long)] = 0.9
    return {
        "image": torch.randint(256, shape, dtype=torch.uint8, generator=generator).__getitem__,
        "labels": torch.tensor(labels, dtype=torch.long),
        "probabilities": probabilities,
    }


def findings(image: Any, classes: Sequence[str] = CLASSES, **given: Any) -> Findings:
    """Return what a report shows of images."""
    images = Images(image, given["labels"])
    return examine(classes, "test", thumbnails=Thumbnails(images, Fit(8)), **given)


def report(folder: Path, **given: Any) -> str:
    """Write a report with some arguments replaced; return its text."""
    page = {"title": "a run", "facts": {}, "history": [ROW]}
    found = predictions([0, 1, 2, 2], [0, 1, 2, 1]) | {"classes": CLASSES} | given
    shown = findings(**{name: found[name] for name in found.keys() - page.keys()})
    page |= {name: given[name] for name in given.keys() & page.keys()}
    write_report(folder / "report.html", **page, findings=shown)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert_well_nested(text)
    return text


def assert_well_nested(text: str) -> None:
    """Fail where a tag is closed that is not the innermost open one."""
    open_tags: list[str] = []

    class Nesting(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Nesting().feed(text)
    assert not open_tags


@pytest.mark.usefixtures("draws")
def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    text = report(tmp_path)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", text)
    sources = re.findall(r'(?:src|href)="([^"]*)', text)
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert os.listdir(tmp_path) == ["report.html"]


def test_facts_read_as_a_person_would_write_them(tmp_path: Path) -> None:
    facts = {
        "test_accuracy": 0.93125,
        "n_parameters": 3_189_002,
        "n_trainable": 31_890,
        "seconds": 1843.2,
        "seed": 1234,
        "resumed": False,
        "targets": ["wq", "wv"],
        "versions": {"torch": "2.13.0"},
        "note": None,
    }
    text = report(tmp_path, facts=facts)
    for expected in ("93.12%", "3,189,002", "1.00%", "1,843", ">1234<", ">no<", "wq, wv"):
        assert expected in text
    assert "<strong>93.12%</strong>test accuracy" in text
    assert "torch 2.13.0" in text


@pytest.mark.usefixtures("draws")
def test_every_name_is_escaped(tmp_path: Path) -> None:
    text = report(
        tmp_path,
        title="<i>title</i>",
        facts={"<i>key</i>": "<i>value</i>", "versions": {"<i>a</i>": ["<i>b</i>"]}},
        classes=("<i>cat</i>", '"dog" & co', "'owl'"),
    )
    assert "<i>" not in text
    assert "&quot;dog&quot; &amp; co" in text


def lines(text: str) -> list[str]:
    """Return the path of each curve."""
    return re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: #(?:3b7de0|e5641b)', text)


def words(text: str) -> list[str]:
    """Return the words in the pictures."""
    return re.findall(r"<text [^>]*>([^<]*)</text>", text)


@pytest.mark.usefixtures("draws")
@pytest.mark.parametrize("n_epochs", [0, 1, 150])
def test_any_number_of_epochs_is_drawn(tmp_path: Path, n_epochs: int) -> None:
    rows = [{**ROW, "epoch": i, "train_loss": i**1.5} for i in range(1, n_epochs + 1)]
    text = report(tmp_path, history=rows)
    assert text.count("<b ") == len(lines(text)) == 4 * (n_epochs > 0)
    assert ("Training" in text) == (n_epochs > 0)
    assert [line.count("M") for line in lines(text)] == [1] * len(lines(text))
    assert text.count("<use ") >= 4 * n_epochs * (n_epochs < 20)


@pytest.mark.usefixtures("draws")
def test_a_loss_that_is_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    values = (4.0, 3.0, math.nan, 2.0, 1.0, math.inf, 2.0, 1.0, -math.inf, 2.0, 1.0)
    rows = [{**ROW, "epoch": i, "train_loss": v} for i, v in enumerate(values)]
    line = lines(report(tmp_path, history=rows, facts={"test_loss": math.nan}))[0]
    assert (line.count("M"), line.count("L")) == (4, 4)
    assert not re.search("nan|inf", line)


@pytest.mark.usefixtures("draws")
def test_a_run_without_validation_has_no_curve_of_it(tmp_path: Path) -> None:
    rows = [{**ROW, "epoch": i, "val_loss": None, "val_accuracy": None} for i in range(3)]
    text = report(tmp_path, history=rows)
    assert re.findall(r"●</b> ([a-z ]*) [0-9]", text) == ["train loss", "lr"]
    assert len(lines(text)) == 2


def test_epochs_without_validation_keep_the_last_value(tmp_path: Path) -> None:
    rows = [{**ROW, "val_accuracy": value} for value in (0.5, 0.75, None)]
    assert "</b> val accuracy 75.00%" in report(tmp_path, history=rows)


@pytest.mark.usefixtures("draws")
def test_the_confusion_matrix_counts_every_test_image(tmp_path: Path) -> None:
    text = report(tmp_path, **predictions([0, 0, 0, 1, 2], [0, 0, 1, 1, 0]))
    (matrix,) = re.findall(r"<h2>Confusions.*(?=<h2>The surest)", text, re.DOTALL)
    assert words(matrix) == [*CLASSES, *CLASSES, "2", "1", "1", "1"]


@pytest.mark.usefixtures("draws")
def test_the_matrix_holds_a_pixel_a_cell(tmp_path: Path) -> None:
    text = report(tmp_path, **predictions([0, 0, 0, 0, 1], [0, 0, 0, 1, 1]))
    (data,) = re.findall(r'<image xlink:href="data:image/png;base64,([^"]*)', text)
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))
    alpha = np.array([[0.75**0.5, 0.5, 0], [0, 1, 0], [0, 0, 0]]) * 255
    assert abs(pixels[..., 3] - alpha).max() < 1
    assert pixels[0, 0, 2] > pixels[0, 0, 0]  # right is blue
    assert pixels[0, 1, 0] > pixels[0, 1, 2]  # wrong is orange


@pytest.mark.usefixtures("draws")
@pytest.mark.parametrize(("n_classes", "numbered"), [(1, True), (20, True), (21, False)])
def test_counts_are_printed_up_to_twenty_classes(
    tmp_path: Path, n_classes: int, numbered: bool
) -> None:
    names = [f"name {i}" for i in range(n_classes)]
    labels = [*range(n_classes)]
    given = predictions(labels, labels, n_classes)
    text = report(tmp_path, classes=names, history=[], **given)
    assert words(text).count("1") == n_classes * numbered


@pytest.mark.usefixtures("draws")
def test_a_thousand_classes_are_labelled_sparsely(tmp_path: Path) -> None:
    labels = [*range(1000)]
    text = report(
        tmp_path, classes=[f"name {i}" for i in labels], **predictions(labels, labels, 1000)
    )
    assert len([word for word in words(text) if word.startswith("name")]) == 200
    assert text.count("<i style=") == 100
    assert "<h2>Accuracy of the 100 hardest classes</h2>" in text


@pytest.mark.usefixtures("draws")
def test_of_many_classes_those_confused_most_are_drawn(tmp_path: Path) -> None:
    n = 30_000  # a full matrix of them takes 7 GB
    confused = [0, 9, *range(20_000, 20_600)]
    found = Findings(
        split="test",
        n=2 * n,
        classes=[f"name {i}" for i in range(n)],
        confusions=[(i, i, 1) for i in range(n)] + [(i, 7, 2 if i < 10 else 1) for i in confused],
    )
    assert found.most_confused(3) == [0, 7, 9]
    assert found.counts([0, 7, 9]).tolist() == [[1, 2, 0], [0, 1, 0], [0, 2, 1]]
    write_report(tmp_path / "report.html", title="many", facts={}, history=[], findings=found)
    text = (tmp_path / "report.html").read_text()
    assert "Shown are the 500 of 30,000 classes that are confused most." in text
    drawn = [word for word in words(text) if word.startswith("name")]
    assert drawn[:3] == ["name 0", "name 20002", "name 20007"]


def test_a_class_without_test_images_comes_last(tmp_path: Path) -> None:
    text = report(tmp_path, **predictions([0, 0, 2], [0, 1, 2])).partition("Accuracy of each")[2]
    bars = re.findall(r"<span>(\w+)</span><i style=\"--x: ([^\"]*)\"></i>([^<]*)", text)
    assert bars == [
        ("cat", "50.0%", "50% of 2"),
        ("owl", "100.0%", "100% of 1"),
        ("dog", "0.0%", "no test image"),
    ]
    assert text.count("no test image<") == 1


def test_the_surest_mistakes_come_first(tmp_path: Path) -> None:
    given = predictions([0, 1, 2], [1, 2, 2])
    given["probabilities"][1] = torch.tensor([0.01, 0.02, 0.97])
    text = report(tmp_path, **given)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert captions == ["dog → owl 97%", "cat → dog 90%"]


def test_at_most_24_mistakes_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    text = report(tmp_path, **predictions([0] * 40, [1] * 40))
    assert text.count("<img") == 24
    assert "40 of 40 test images" in text


@pytest.mark.parametrize("n", [0, 3])
def test_no_mistake_is_said_to_be_none(tmp_path: Path, n: int) -> None:
    text = report(tmp_path, **predictions([*range(n)], [*range(n)]))
    assert f"None among {n} test images." in text


@pytest.mark.parametrize("n_channels", [1, 2, 3, 4])
def test_thumbnails_keep_small_images_as_they_are(tmp_path: Path, n_channels: int) -> None:
    given = predictions([0], [1])
    image = torch.randint(256, (1, n_channels, 6, 9), dtype=torch.uint8)
    given["image"] = image.__getitem__
    (data,) = re.findall(
        r'<img class="small" src="data:image/png;base64,([^"]*)', report(tmp_path, **given)
    )
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
    expected = image[0, :3].permute(1, 2, 0) if n_channels >= 3 else image[0, 0]
    assert (torch.from_numpy(picture) == expected).all()


def test_probabilities_that_are_nan_still_give_a_report(tmp_path: Path) -> None:
    given = predictions([0, 1], [0, 1])
    text = report(tmp_path, **given | {"probabilities": torch.full((2, 3), math.nan)})
    assert "dog → cat 0%" in text


@pytest.mark.usefixtures("draws")
def test_any_name_fits(tmp_path: Path) -> None:
    names = [
        "W" * 300,
        "猫" * 30,
        "مرحبا",
        "\udcff",
        "a\nb",
        "",
        "$\\frac{$",
        "<!-- a",
        "--!>",
        "\x1b",
    ]
    labels = [*range(len(names))]
    report(tmp_path, classes=names, **predictions(labels, labels[::-1], len(names)))


@pytest.mark.usefixtures("draws")
def test_a_name_is_shown_as_it_is_but_cut(tmp_path: Path) -> None:
    classes = ("c" * 300, "\udcff", "$猫$")
    text = report(tmp_path, classes=classes, **predictions([0], [1]))
    (caption,) = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert caption == "c" * 23 + "… → ? 90%"
    assert words(text).count("$猫$") == 2
    assert "<span>$猫$</span>" in text


@pytest.mark.usefixtures("draws")
def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    assert report(tmp_path / "a") == report(tmp_path / "b")


@pytest.mark.usefixtures("draws")
def test_the_readers_matplotlib_settings_stay_and_do_not_matter(tmp_path: Path) -> None:
    import matplotlib

    before = report(tmp_path)
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "red"}):
        assert report(tmp_path) == before
        assert matplotlib.rcParams["figure.facecolor"] == "red"


@pytest.mark.usefixtures("draws")
def test_large_noise_with_43_classes_stays_under_one_and_a_half_megabytes(tmp_path: Path) -> None:
    labels = torch.arange(43).repeat_interleave(43)
    given = predictions(labels.tolist(), (labels * 7 % 43).tolist(), 43)
    given["image"] = lambda i: torch.randint(256, (3, 128, 128), dtype=torch.uint8)
    given["probabilities"] = torch.rand(43 * 43, 43)
    assert len(report(tmp_path, classes=["a class name"] * 43, **given)) < 1_500_000


def test_a_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = report(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        report(tmp_path, title="another run")
    assert os.listdir(tmp_path) == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        report(tmp_path, classes=("cat", "dog"))


@pytest.mark.usefixtures("draws")
def test_drawing_needs_no_screen_and_no_pyplot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # another test's
    report(tmp_path)
    assert "matplotlib.pyplot" not in sys.modules


def test_an_accuracy_has_the_interval_that_its_images_allow(tmp_path: Path) -> None:
    # Newcombe (1998), table II: 81 of 263, and 15 of 148
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    text = report(tmp_path, facts={"test_accuracy": 81 / 263, "n_test": 263})
    assert "test accuracy<br>95 % interval 25.5% to 36.6%, 263 images" in text


def test_what_is_said_of_the_images_stands_under_the_figures(tmp_path: Path) -> None:
    notes = ["pictures of 400x534 become 32x32: this model sees little of them", "no image of <b>"]
    text = report(tmp_path, facts={"test_accuracy": 0.5, "notes": notes})
    for note in ("32x32: this model sees little of them</p>", "<p>no image of &lt;b&gt;</p>"):
        assert text.count(note) == 1
    assert "<p>x</p>" not in report(tmp_path, facts={"notes": {"x": 1}})


@pytest.mark.usefixtures("draws")
def test_frozen_features_stand_beside_the_curve(tmp_path: Path) -> None:
    facts = {"frozen_knn_accuracy": 0.5, "frozen_probe_accuracy": 0.75}
    text = report(tmp_path, facts=facts, history=[{**ROW, "epoch": i} for i in (1, 2)])
    assert "nearest neighbours of frozen features 50.00%" in text
    assert "linear probe of frozen features 75.00%" in text
    plain = report(tmp_path, facts={}, history=[{**ROW, "epoch": i} for i in (1, 2)])
    assert text.count("stroke-dasharray") == plain.count("stroke-dasharray") + 2


def test_figures_have_as_many_digits_as_their_images_allow(tmp_path: Path) -> None:
    assert [percent(0.12345, n) for n in (25, 100, 10_000, None)] == [
        *("12%", "12.3%", "12.35%", "12.35%")
    ]
    facts = {"test_accuracy": 0.75, "n_test": 4, "val_accuracy": 0.25, "n_validation": 120}
    text = report(tmp_path, facts=facts)
    assert "<strong>75%</strong>" in text
    assert "<dt>validation accuracy</dt><dd>25.0%</dd>" in text


@pytest.mark.usefixtures("draws")
def test_an_update_is_drawn_a_block_a_row(tmp_path: Path) -> None:
    sizes = {"blocks.0.attn.wq": 0.5, "blocks.1.attn.wq": 0.25, "blocks.1.norm1": 0.125}
    found = [Change(name, x, None if "norm" in name else 1.5) for name, x in sizes.items()]
    text = report(tmp_path, changes=found).partition("Where training changes")[2]
    drawn = words(text.partition("All figures")[0])
    assert drawn.count("block 0") == drawn.count("block 1") == 2
    assert [w for w in drawn if w.endswith("%")] == ["50.0%", "25.0%", "12.5%"]
    assert drawn.count("1.5") == 2
    none = report(tmp_path, changes=[Change("blocks.0.attn.wq", 0.0, 0.0)])
    assert "No weight of the base has changed:" in none
    assert "Where training" not in report(tmp_path)


@pytest.mark.usefixtures("draws")
def test_dots_tell_how_often_what_is_said_comes_true(tmp_path: Path) -> None:
    text = report(tmp_path, **predictions([0, 0, 0, 0, 1], [0, 0, 0, 1, 1]))
    part = text.partition("<h2>Calibration")[2]
    assert words(part).count("probability") == 1
    assert len(re.findall(r"<use [^>]*clip|<use [^>]*style=.fill: #3b7de0", part)) >= 1


def test_curves_come_before_the_list_of_figures(tmp_path: Path) -> None:
    text = report(tmp_path, facts={"seed": 3, "test_accuracy": 0.5, "file_bytes": 409_296})
    heads = re.findall(r"<h2>([^<]*)</h2>", text)
    assert heads[0] == "Training"
    assert heads[-1] == "All figures and options"
    assert "<dt>its size</dt><dd>409 kB</dd>" in text


@pytest.mark.usefixtures("draws")
def test_no_control_character_stands_in_a_page(tmp_path: Path) -> None:
    text = report(tmp_path, title="a\x00b\x1bc", facts={"note": "d\x07e"})
    assert "a\\x00b\\x1bc" in text
    assert "d\\x07e" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
