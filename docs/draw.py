"""Draw the pictures of README and docs into docs/pictures: `python docs/draw.py`.

The pictures of Part 2 are drawn by the Python blocks of part-2.md. `python docs/draw.py report
DATA` trains on a folder and photographs the run's report.html in headless Chromium.
"""

import os
import re
import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
PICTURES = HERE / "pictures"
# the picture of adapters.md: a question, and what to take where the answer is yes
CHOICES = (
    ("Only to see what the base knows?", "linear", "only the head trains: seconds, 45 kB"),
    (
        "One task, and memory to train\nevery weight?",
        "full",
        "with lora beside it: keep the one\nthat validation prefers",
    ),
    ("A folder that PEFT must load, or an\nadapter to bake in?", "lora", "or dora: both do both"),
    ("As small as can be?", "norm or ia3", "72 to 75 kB with a head of 43 classes"),
)
LAST = ("ssf", "few parameters, ahead of lora\nin most tables below")
BLUE, GREY, PALE = "#1f5fa8", "#444444", "#e8f0fa"


def box(axes, x: float, y: float, width: float, height: float, text: str, **look) -> None:
    """Draw a box with text in its middle: a name, an empty line and a reason, or a question."""
    from matplotlib.patches import FancyBboxPatch

    corner = (x, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.06", **look))
    name, _, why = text.partition("\n\n")
    axes.text(x + width / 2, y, why or name, ha="center", va="center" if not why else "top")
    if why:
        axes.text(x + width / 2, y + 0.08, name, ha="center", va="bottom", weight="bold")


def arrow(axes, start: tuple[float, float], end: tuple[float, float], word: str) -> None:
    """Draw an arrow with a word beside it."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY, "lw": 1.3})
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    down = start[0] == end[0]
    axes.annotate(
        word,
        middle,
        xytext=(6, 0) if down else (0, 5),
        textcoords="offset points",
        ha="left" if down else "center",
        va="center" if down else "bottom",
        color=GREY,
        fontsize=10,
    )


def draw_choice() -> None:
    """Draw how to choose a method."""
    step, height = 1.35, 0.85
    figure = Figure(figsize=(8.6, 6.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.2, 8.8), ylim=(-step * len(CHOICES) - 0.65, 0.65))
    axes.axis("off")
    question = {"facecolor": "white", "edgecolor": GREY}
    answer = {"facecolor": PALE, "edgecolor": BLUE}
    for i, (asked, name, why) in enumerate(CHOICES):
        y = -step * i
        box(axes, 0, y, 3.5, height, asked, **question)
        box(axes, 4.6, y, 4.0, height, f"{name}\n\n{why}", **answer)
        arrow(axes, (3.6, y), (4.5, y), "yes")
        below = -step * (i + 1) + height / 2 + 0.08
        arrow(axes, (1.75, y - height / 2 - 0.08), (1.75, below), "no")
    box(axes, 0, -step * len(CHOICES), 3.5, height, "\n\n".join(LAST), **answer)
    figure.savefig(PICTURES / "choose.svg")


def draw_part_2() -> None:
    """Run the Python of part-2.md in an empty folder, and take the pictures that it draws."""
    text = (HERE / "part-2.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(compile(code, "part-2.md", "exec"), {"__name__": "part_2"})
        finally:
            os.chdir(home)
        for file in sorted(Path(folder, "pictures").iterdir()):
            shutil.copy(file, PICTURES / file.name)


def photograph_report(data: str) -> None:
    """Fine-tune the bundled base on a part of a folder, and take a picture of the report."""
    import vitft

    os.chdir(Path(data).parent)  # the report shows the name of the folder, without its place
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "lora")
        options = {"limit": 1000, "epochs": 4, "out": str(out)}
        vitft.finetune(adapter="lora", base="cifar10", data=Path(data).name, **options)
        photograph(out / "report.html", PICTURES / "report.webp")


def photograph(page: Path, picture: Path) -> None:
    """Write the upper part of a page as a picture."""
    from PIL import Image
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless", "--no-sandbox", "--hide-scrollbars", "--force-color-profile=srgb"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        size = {"width": 1000, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.resolve().as_uri())
        image = Image.open(BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    finally:
        browser.quit()
    image.save(picture, quality=80, method=6)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # the same code draws the same bytes
    if sys.argv[1:2] == ["report"]:
        photograph_report(sys.argv[2])
    else:
        with rc_context({"svg.hashsalt": "vitft"}):
            draw_choice()
            draw_part_2()
