"""A run's findings in; HTML of its mistakes and the model's attention, with captions, out."""

import base64
from html import escape

from vitft.report.findings import Findings, Shown


def mistakes(findings: Findings) -> str:
    """Return the misclassified images that the model was surest of."""
    n, split = f"{findings.n:,}", findings.split
    if not findings.mistakes:
        return f"<h2>Mistakes</h2><p>None among {n} {split} images.</p>"
    return (
        f"<h2>The surest mistakes</h2><p>{findings.wrong:,} of {n} {split} images are "
        "misclassified. Below each: true → predicted class, and the prediction's probability.</p>"
        f'<div class="grid" style="--w: 150px">{"".join(map(_figure, findings.mistakes))}</div>'
    )


def looks(findings: Findings) -> str:
    """Return some images, beside each the same image brightened by the model's attention."""
    if not findings.looks:
        return ""
    return (
        "<h2>Where the model looks</h2><p>Attention roll-out (Abnar and Zuidema, 2020) of some "
        f"{findings.split} images: attention carries more of the brighter parts to the head. It "
        "shows where a model looks, not why it gives its answer.</p>"
        f'<div class="grid" style="--w: 300px">{"".join(map(_figure, findings.looks))}</div>'
    )


def _figure(shown: Shown) -> str:
    """Return a picture, or two side by side, with its caption."""
    images = "".join(_img(data) for data in (shown.picture, shown.lit) if data)
    name = f"<br><small>{escape(shown.name)}</small>" if shown.name else ""
    return (
        f'<figure><div class="pair">{images}</div>'
        f"<figcaption>{escape(shown.says)}{name}</figcaption></figure>"
    )


def _img(data: bytes) -> str:
    """Return a picture as an element that contains its data."""
    is_png = data.startswith(b"\x89PNG")  # a small picture, whose pixels are shown unsmoothed
    kind, small = ("png", 'class="small" ') if is_png else ("jpeg", "")
    text = base64.b64encode(data).decode()
    return f'<img {small}src="data:image/{kind};base64,{text}" alt="">'
