"""Pictures with several labels, from a table to the answers."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.shared import Run, summary
from vitft import Classifier
from vitft.data.load import load_data
from vitft.data.split import split
from vitft.pictures.preprocess import Fit

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a table of pictures whose quarters are grey or of colours, which are their labels."""
    root = tmp_path_factory.mktemp("several")
    rows = ["path,label,split"]
    generator = torch.Generator().manual_seed(0)
    for i in range(120):
        chosen = torch.rand(3, generator=generator) < 0.5
        names = [name for name, there in zip(COLOURS, chosen, strict=True) if there] or ["red"]
        shade = int(torch.randint(60, 190, (1,), generator=generator))
        image = Image.new("RGB", (8, 8), (shade, shade, shade))
        for k, name in enumerate(names):
            image.paste(
                COLOURS[name], (4 * (k % 2), 4 * (k // 2), 4 * (k % 2) + 4, 4 * (k // 2) + 4)
            )
        image.save(root / f"{i}.png")
        rows.append(f"{i}.png,{'|'.join(names)},{'test' if i % 4 == 0 else 'train'}")
    (root / "list.csv").write_text("\n".join(rows))
    return root / "list.csv"


def test_labels_are_0_and_1_and_every_class_is_held_out(table: Path) -> None:
    data = load_data(str(table), Fit(8))
    assert data.several
    assert data.classes == ("blue", "green", "red")
    assert (len(data.train), len(data.test)) == (90, 30)
    first = (table.parent / "list.csv").read_text().splitlines()[2].split(",")[1].split("|")
    assert data.train.labels[0].tolist() == [int(name in first) for name in data.classes]
    train, validation = split(data.train, fraction=0.2, seed=0)
    assert len(train) + len(validation) == 90
    assert (validation.labels.sum(dim=0) > 0).all()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_tells_several_labels_apart(
    method: str, table: Path, base: Path, vitft: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ["--adapter", method, "--base", base, "--data", table, "--out", out, "--epochs=12"]
    done = vitft("finetune", *flags, "--batch-size=8", "--lr=3e-3")
    told = summary(out)
    assert told["test_mean_average_precision"] > 0.85
    assert done.stdout.startswith(
        f"test mean average precision {told['test_mean_average_precision']:.2%}"
    )
    assert "mean average precision" in done.stderr
    frozen = [told[f"frozen_{name}_mean_average_precision"] for name in ("knn", "probe")]
    told_first = "mean average precision {:.2%} by nearest neighbours, {:.2%} by a linear probe"
    assert told_first.format(*frozen) in done.stderr
    assert "Average precision on 30 test images" in (out / "report.html").read_text()
    model = ["--base", out] if method == "full" else ["--adapter", out]
    again = json.loads(vitft("evaluate", *model, "--data", table, "--json").stdout)
    for name in ("accuracy", "mean_average_precision", "macro_f1"):
        assert again[f"test_{name}"] == pytest.approx(told[f"test_{name}"])
    loaded = Classifier(out) if method == "full" else Classifier(adapter=out)
    image = Image.new("RGB", (8, 8), COLOURS["red"])
    image.paste(COLOURS["blue"], (4, 0, 8, 8))
    found = loaded.predict(image)
    assert sum(found.values()) != pytest.approx(1, abs=1e-3)
    pixels = loaded.read(image)[None].float()
    with torch.no_grad():
        logits = loaded.base(loaded.base.normalize(pixels))
    torch.testing.assert_close(loaded.probabilities(image), logits.sigmoid())


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--class-weights=balanced", "--class-weights is for one label an image"),
        ("--calibrate", "--calibrate is for one label an image"),
    ],
)
def test_what_is_for_one_label_is_refused(
    flag: str, told: str, table: Path, base: Path, vitft: Run, tmp_path: Path
) -> None:
    flags = ["--adapter=linear", "--base", base, "--data", table, "--out", tmp_path / "x", flag]
    assert told in vitft("finetune", *flags, code=2).stderr


def test_one_label_and_several_are_not_mixed(table: Path, base: Path, vitft: Run) -> None:
    told = vitft("evaluate", "--base", base, "--data", table, code=2).stderr
    assert "the images have several labels each, but the model tells one" in told


def test_nearest_neighbours_tell_several_labels(table: Path, base: Path, vitft: Run) -> None:
    rows = [row.split(",") for row in (table.parent / "list.csv").read_text().splitlines()[1:]]
    images = [table.parent / name for name, _, split in rows if split == "test"]
    done = vitft("predict", "--base", base, *images, "--knn", table, "--json")
    found = [row["classes"] for row in json.loads(done.stdout)]
    right = [
        (found[i][name] > 0.5) == (name in labels.split("|"))
        for i, (_, labels, _) in enumerate(row for row in rows if row[2] == "test")
        for name in COLOURS
    ]
    assert sum(right) / len(right) > 0.7
    assert max(sum(shares.values()) for shares in found) > 1.5  # they need not add up to 1
