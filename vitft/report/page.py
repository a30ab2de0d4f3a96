"""A title and HTML in, a self-contained page out; and the style that its pictures share.

Matplotlib draws the pictures as inline SVG whose text stays text, so that the reader's browser
provides the font, and the colours of its light or dark mode.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitft.command.streams import ESCAPED
from vitft.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COOL, WARM, GREY = "#3b7de0", "#e5641b", "#808890"  # `svg` replaces GREY by the page's text colour
RC_PARAMS = {  # of matplotlib
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "axes.edgecolor": "none",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "font.size": 9,
    "text.parse_math": False,
    "figure.constrained_layout.wspace": 0.06,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.04,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "vitft",
}
CSS = """
:root { color-scheme: light dark; background: light-dark(#fff, #14171c) }
body { max-width: 1080px; margin: 40px auto; padding: 0 24px; overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, sans-serif; color: light-dark(#1c2128, #e4e8ed) }
h2 { margin: 44px 0 8px; font-size: 19px } p { margin: 0 0 16px } figure, dd { margin: 0 }
p, dt, svg { color: light-dark(#66707c, #97a1ad) } figcaption { font-size: 13px }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--w), 1fr)); gap: 14px }
.panel { padding: 14px 18px; border-radius: 10px; overflow-x: auto;
  background: light-dark(#f2f4f7, #1e2229) } .grid svg { width: 100%; height: auto }
.panel svg { max-width: 100%; height: auto }
.matrix text { fill: light-dark(#14171c, #f2f4f7) !important; paint-order: stroke;
  stroke: light-dark(#f2f4f7, #1e2229); stroke-width: 3px }  /* a rim: readable on any colour */
.bars { columns: 320px; column-gap: 40px } .bars div { break-inside: avoid; padding: 2px 0;
  display: grid; grid-template-columns: minmax(0, 9em) minmax(40px, 1fr) auto; gap: 10px }
.bars i { align-self: center; height: 9px; border-radius: 3px;
  background: linear-gradient(90deg, #3b7de0 var(--x), light-dark(#dde2e8, #333a44) 0) }
.wide { columns: auto } .wide i { background: linear-gradient(90deg, #3b7de0 var(--low), #1d4f9e 0
  var(--x), #8db4f0 0 var(--high), light-dark(#dde2e8, #333a44) 0) }
.wide div { grid-template-columns: minmax(0, 3fr) minmax(60px, 4fr) clamp(6em, 20vw, 13em) }
.legend span { display: inline-block; margin-right: 14px } .best { font-weight: 700 }
.panel strong { display: block; font-size: 25px } dd { white-space: pre-line }
dl { columns: 400px; column-gap: 40px } dt { flex: 0 0 150px }
dl div { display: flex; gap: 12px; break-inside: avoid; padding: 3px 0 }
svg { display: block; margin: auto; overflow: visible } text { font-family: inherit !important }
table { border-collapse: collapse; font-size: 14px } th { text-align: left; font-weight: 600 }
td, th { padding: 4px 18px 4px 0; border-bottom: 1px solid light-dark(#e3e7ec, #2b313a);
  white-space: nowrap } .number { text-align: right; font-variant-numeric: tabular-nums }
img { width: 100%; aspect-ratio: 1; min-width: 0; object-fit: contain }
.small { image-rendering: pixelated } .pair { display: flex; gap: 4px }
@media print { :root { color-scheme: light; print-color-adjust: exact }
  body { margin: 0; max-width: none; padding: 0; font-size: 12px }
  .grid { grid-template-columns: repeat(auto-fill, minmax(max(118px, 0.6 * var(--w)), 1fr)) }
  .panel { overflow: visible } .panel, figure { break-inside: avoid }
  h2, h2 + p { break-after: avoid }
  .panel strong { font-size: 20px } dl { columns: 2 } dl div { break-inside: auto }
  dt { flex-basis: 120px } td, th { white-space: normal; overflow-wrap: normal;
    padding-right: 8px; font-size: 10px } td:first-child { overflow-wrap: anywhere;
    min-width: 7em } }
"""


@contextmanager
def page_style() -> Iterator[None]:
    """Draw in the style of the pages, whatever matplotlib's settings are."""
    from matplotlib import style

    with warnings.catch_warnings(), style.context(RC_PARAMS, after_reset=True):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the font
        yield


def raster(figure: "Figure") -> Tensor:
    """Return the figure on white, as an image uint8 (3, height, width)."""
    file = io.BytesIO()
    figure.savefig(file, format="png", transparent=False, facecolor="white")
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)


def svg(figure: "Figure") -> str:
    """Return the figure as an SVG element, always the same for the same content."""
    file, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    return text[text.index("<svg") :].replace(GREY, "currentColor")


def write_page(path: Path, title: str, body: str) -> None:
    """Write a self-contained HTML page, replacing `path` at once or not at all."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(title)}</title><style>{CSS}</style><h1>{escape(title)}</h1>"
    page = f'<!DOCTYPE html><html lang="en">{head}{body}</html>\n'
    write_bytes(path, page.translate(ESCAPED).encode(errors="replace"))
