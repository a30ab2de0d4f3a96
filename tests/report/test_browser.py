"""Pages in headless Chromium: no error on the console, no wider than a phone, good contrast."""

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from recipes.serving.app import Limits, make_app
from recipes.serving.desk import Desk
from tests.shared import Run, drawn, long, paint, some
from vitft import load_model

COLOURS = {"red": (210, 30, 40), "green": (20, 210, 40), "blue": (20, 30, 210)}
DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def answers(program: str | None) -> bool:
    """Return whether a program is there and starts."""
    return (
        bool(program) and not subprocess.run([program, "--version"], capture_output=True).returncode
    )


pytestmark = [
    long,
    pytest.mark.skipif(
        not (answers(DRIVER) and answers(BROWSER)), reason="there is no Chromium with its driver"
    ),
]
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
FLAGS += "--disable-background-networking --disable-component-update --force-color-profile=srgb"
# the lowest contrast of a text to what is behind it (WCAG 2, 1.4.3), and that text
CONTRAST = """
const part = (c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4 };
const light = (c) => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
let worst = [99, ""];
const texts = "h1,h2,h3,p,dt,dd,td,th,span,small,figcaption,label,.panel,svg text";
for (const element of document.querySelectorAll(texts)) {
  if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
  let behind = element;
  while (behind.parentElement && rgb(getComputedStyle(behind).backgroundColor)[3] === 0)
    behind = behind.parentElement;
  const own = getComputedStyle(element), ink = element.tagName === "text" ? own.fill : own.color;
  const pair = [ink, getComputedStyle(behind).backgroundColor];
  const [a, b] = pair.map((colour) => light(rgb(colour)) + 0.05);
  const found = Math.max(a, b) / Math.min(a, b);
  if (found < worst[0]) worst = [found, element.textContent.slice(0, 40)];
}
return worst;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return a browser."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


def check(
    browser: Any, scheme: str, media: str = "screen", widths: Sequence[int] = (390, 1200)
) -> None:
    """Check the page that the browser shows, as wide as a phone and a desk."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    shown = {"media": media, "features": features}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", shown)
    for width in widths:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, f"{wide} pixels at {width}"
    worst, text = browser.execute_script(CONTRAST)
    assert worst >= 4.5, f"{worst:.1f}:1 for {text!r}"
    assert browser.get_log("browser") == []


def wait(condition: Callable[[], bool]) -> None:
    """Wait up to ten seconds."""
    for _ in range(100):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come")


@pytest.fixture(scope="module")
def pages(
    vitft: Run, base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return every kind of page, by name."""
    out = tmp_path_factory.mktemp("pages")
    wrong = out / "wrong"  # photographs that the model takes for something else
    shutil.copytree(folder, wrong)
    for i, colour in enumerate(("red", "green", "blue")):
        size, name = (300, 400), f"a photograph with a very long name, number {i}.jpg"
        paint(wrong / "test" / ("green", "blue", "red")[i] / name, COLOURS[colour], size)
    shutil.copytree(base.parent, out / "base")
    common = ["--base", base, "--epochs=1", "--data", wrong, "--out"]
    with drawn():
        vitft("report", out / "base")
        vitft("finetune", "--adapter=lora", *common, out / "lora")
        vitft("finetune", "--adapter=vpt", *common[:3], "--data", folder, "--out", out / "v")
        vitft("sweep", "--adapter=lora", "--rank=1,2", "--lr=1e-3,1e-2", *common, out / "sweep")
        vitft("compare", base.parent, out / "lora", out / "v", "--out", out / "compare.html")
    return {
        "pretrain": out / "base" / "report.html",
        "finetune": out / "lora" / "report.html",
        "no weight": out / "v" / "report.html",
        "sweep": out / "sweep" / "report.html",
        "compare": out / "compare.html",
    }


PAGES = ("pretrain", "finetune", "no weight", "sweep", "compare")


@pytest.mark.parametrize(("name", "scheme"), some([*product(PAGES, ("light", "dark"))], 3))
def test_every_page(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    browser.get(pages[name].as_uri())
    check(browser, scheme)


@pytest.mark.parametrize(
    ("name", "width"),
    [("finetune", 700), ("sweep", 700), ("compare", 1000)],  # browsers make wide tables smaller
)
def test_a_page_is_printed_in_light_colours_and_whole(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.get(pages[name].as_uri())
    check(browser, "dark", "print", [width])
    behind = "return getComputedStyle(document.documentElement).backgroundColor"
    assert browser.execute_script(behind) == "rgb(255, 255, 255)"


def test_pictures_are_large_enough_to_see(browser: Any, pages: dict[str, Path]) -> None:
    browser.get(pages["finetune"].as_uri())
    check(browser, "light")  # the width of a desk is left
    sizes = browser.execute_script(
        "return [...document.images].map((i) => [i.complete, i.naturalWidth, i.clientWidth])"
    )
    assert len(sizes) > 3
    assert all(complete and natural > 0 for complete, natural, _ in sizes)
    assert min(shown for _, _, shown in sizes) >= 140
    assert max(natural for _, natural, _ in sizes) == 256
    assert "a photograph with a very long name, number 0.jpg" in browser.page_source


def test_the_page_of_a_server_answers(browser: Any, base: Path, folder: Path) -> None:
    desk = Desk(load_model(base), {}, device=torch.device("cpu"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app = make_app(desk, Limits(), token=None, hosts=["127.0.0.1"])
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        browser.get(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        files = [str(folder / "test" / name / "000.png") for name in ("red", "blue")]
        browser.find_element("css selector", "input[type=file]").send_keys("\n".join(files))
        wait(lambda: len(browser.find_elements("css selector", "article")) == 2)
        texts = [found.text for found in browser.find_elements("css selector", ".row")]
        assert len(texts) == 6
        assert {text.split("\n")[0] for text in texts} == {"red", "green", "blue"}
        for scheme in ("light", "dark"):
            check(browser, scheme)
        server.should_exit = True
        thread.join()
    desk.close()
