"""Pages in headless Chromium: no error on the console, no wider than a phone, good contrast."""

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from recipes.serving.app import Limits, make_app
from recipes.serving.desk import Desk
from tests.conftest import Run
from vitft import load_model

DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not DRIVER, reason="there is no chromedriver")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
FLAGS += "--disable-background-networking --disable-component-update --force-color-profile=srgb"
# the lowest contrast of a text to what is behind it (WCAG 2, 1.4.3), and that text
CONTRAST = """
const part = (c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4 };
const light = (c) => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
let worst = [99, ""];
const texts = "h1,h2,h3,p,dt,dd,td,th,span,figcaption,label,.panel";
for (const element of document.querySelectorAll(texts)) {
  if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
  let behind = element;
  while (behind.parentElement && rgb(getComputedStyle(behind).backgroundColor)[3] === 0)
    behind = behind.parentElement;
  const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
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


def check(browser: Any, scheme: str) -> None:
    """Check the page that the browser shows, at the width of a phone and of a desk."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for width in (390, 1200):
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_of_a_run(browser: Any, base: Path, scheme: str) -> None:
    browser.get((base.parent / "report.html").as_uri())
    check(browser, scheme)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_comparison(
    browser: Any, base: Path, vitft: Run, tmp_path: Path, scheme: str
) -> None:
    vitft("compare", base.parent, "--out", tmp_path / "compare.html")
    browser.get((tmp_path / "compare.html").as_uri())
    check(browser, scheme)


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
