"""Two sets of small colour images drawn by the program itself: a name, a count and a seed go in,
uint8 images and their labels come out, with no download.

`shapes` has filled figures turned by any angle, to pretrain on. `symbols` has upright signs drawn
with a pen on textured paper, to fine-tune on: telling left from right is what `shapes` never asks.
Figures are signed distance functions (https://iquilezles.org/articles/distfunctions2d/) evaluated
on a whole batch of pixel grids. In a figure's own frame x points right, y down, the radius is 1.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

Point = tuple[float, float]
Distance = Callable[[Tensor, Tensor], Tensor]  # x, y -> signed distance, all (B, 1, size, size)

_BATCH = 500  # images drawn at once: small enough to stay in a CPU's cache


def _disc(x: Tensor, y: Tensor, *, centre: Point = (0, 0), radius: float = 1) -> Tensor:
    return torch.hypot(x - centre[0], y - centre[1]) - radius


def _line(x: Tensor, y: Tensor, *, points: tuple[Point, ...]) -> Tensor:
    """Return the distance to the open line through `points`."""
    distance = torch.full_like(x, torch.inf)
    for (ax, ay), (bx, by) in pairwise(points):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        distance = distance.minimum(torch.hypot(x - ax - along * ex, y - ay - along * ey))
    return distance


def _polygon(x: Tensor, y: Tensor, *, corners: tuple[Point, ...]) -> Tensor:
    """Return the signed distance to a polygon: a ray from inside crosses an odd number of edges."""
    closed = (*corners, corners[0])
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in pairwise(closed):
        left = ((x - ax) * (by - ay) < (bx - ax) * (y - ay)) == (by > ay)
        inside ^= ((ay > y) != (by > y)) & left
    distance = _line(x, y, points=closed)
    return torch.where(inside, -distance, distance)


def _ellipse(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (torch.hypot(x, y / 0.5) - 1)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return _disc(x, y, radius=0.75).abs() - 0.25


def _half_disc(x: Tensor, y: Tensor) -> Tensor:
    return _disc(x, y, centre=(0, -0.4)).maximum(-0.4 - y)


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return _disc(x, y).maximum(-_disc(x, y, centre=(0.55, 0), radius=0.75))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    lobe = _disc(x.abs(), y, centre=(0.45, -0.35), radius=0.5)
    return lobe.minimum(
        _polygon(x, y, corners=((0, -0.5), (0.85, -0.05), (0, 0.95), (-0.85, -0.05)))
    )


def _arrow(x: Tensor, y: Tensor, *, ahead: Point) -> Tensor:
    along, aside = ahead[0] * x + ahead[1] * y, (ahead[0] * y - ahead[1] * x).abs()
    shaft = _line(along, aside, points=((-1, 0), (1, 0)))
    return shaft.minimum(_line(along, aside, points=((1, 0), (0.3, 0.7))))


def _ring_plus(x: Tensor, y: Tensor) -> Tensor:
    plus = _line(x.abs().maximum(y.abs()), x.abs().minimum(y.abs()), points=((0, 0), (0.5, 0)))
    return _disc(x, y).abs().minimum(plus)


def _regular(n: int, *, radii: tuple[float, ...] = (1.0,)) -> tuple[Point, ...]:
    """Return `n` corners at equal angles whose radii take turns."""
    turns = [(radii[i % len(radii)], 2 * math.pi * i / n) for i in range(n)]
    return tuple((r * math.sin(angle), -r * math.cos(angle)) for r, angle in turns)


def _spiral() -> tuple[Point, ...]:
    """Return a line that turns twice on its way out."""
    turns = [(i / 20, 4 * math.pi * i / 20) for i in range(1, 21)]
    return tuple((r * math.cos(angle), r * math.sin(angle)) for r, angle in turns)


_HALF_CROSS: tuple[Point, ...] = (
    (-0.3, -1),
    (0.3, -1),
    (0.3, -0.3),
    (1, -0.3),
    (1, 0.3),
    (0.3, 0.3),
)
_CROSS = _HALF_CROSS + tuple((-x, -y) for x, y in _HALF_CROSS)

SHAPES: dict[str, Distance] = {
    "circle": _disc,
    "ellipse": _ellipse,
    "ring": _ring,
    "half-disc": _half_disc,
    "crescent": _crescent,
    "heart": _heart,
    "triangle": partial(_polygon, corners=_regular(3)),
    "square": partial(_polygon, corners=_regular(4, radii=(1.1,))),
    "bar": partial(_polygon, corners=((-1, -0.35), (1, -0.35), (1, 0.35), (-1, 0.35))),
    "pentagon": partial(_polygon, corners=_regular(5)),
    "star": partial(_polygon, corners=_regular(10, radii=(1.1, 0.45))),
    "cross": partial(_polygon, corners=_CROSS),
}

SYMBOLS: dict[str, Distance] = {
    "arrow-left": partial(_arrow, ahead=(-1, 0)),
    "arrow-right": partial(_arrow, ahead=(1, 0)),
    "arrow-up": partial(_arrow, ahead=(0, -1)),
    "arrow-down": partial(_arrow, ahead=(0, 1)),
    "letter-l": partial(_line, points=((-0.6, -0.9), (-0.6, 0.9), (0.7, 0.9))),
    "letter-z": partial(_line, points=((-0.7, -0.9), (0.7, -0.9), (-0.7, 0.9), (0.7, 0.9))),
    "mirrored-z": partial(_line, points=((0.7, -0.9), (-0.7, -0.9), (0.7, 0.9), (-0.7, 0.9))),
    "check": partial(_line, points=((-0.9, 0.1), (-0.3, 0.7), (0.9, -0.7))),
    "spiral": partial(_line, points=_spiral()),
    "ring-plus": _ring_plus,
}


class _Canvas:
    """A batch of images being painted; lengths are fractions of an image's side."""

    def __init__(self, n: int, size: int, rng: torch.Generator) -> None:
        self.n, self.size, self.rng = n, size, rng
        self.image = torch.zeros(n, 3, size, size)
        self.across = (torch.arange(size) + 0.5) / size  # (size,), pixel centres

    def uniform(self, low: float, high: float, channels: int = 1) -> Tensor:
        """Return a random number for each image, (B, channels, 1, 1)."""
        return low + (high - low) * torch.rand(self.n, channels, 1, 1, generator=self.rng)

    def colour(self, luminance: Tensor, *, tint: float) -> Tensor:
        """Return random colours (B, 3, 1, 1) whose channels have the mean `luminance`."""
        hue = self.uniform(-tint, tint, channels=3)
        return luminance + hue - hue.mean(1, keepdim=True)

    def contrasting(self, least: float, most: float) -> tuple[Tensor, Tensor]:
        """Return a dark and a bright colour whose luminances differ by `least` to `most`."""
        gap = self.uniform(least, most)
        dark = self.uniform(0, 1) * (1 - gap)
        return self.colour(dark, tint=0.25), self.colour(dark + gap, tint=0.25)

    def frame(self, radius: Tensor | float, *, turn: float, roam: float) -> tuple[Tensor, Tensor]:
        """Return pixel coordinates x and y, (B, 1, size, size), in randomly placed frames.

        Args:
            radius: the frame's unit of length.
            turn: largest rotation either way, in radians.
            roam: 0 keeps the frame in the middle, 1 lets it go as far as its radius fits.
        """
        angle, room = self.uniform(-turn, turn), roam * (0.5 - radius)
        dx = self.across - 0.5 - room * self.uniform(-1, 1)  # (B, 1, 1, size)
        dy = self.across[:, None] - 0.5 - room * self.uniform(-1, 1)  # (B, 1, size, 1)
        cos, sin = angle.cos() / radius, angle.sin() / radius
        return cos * dx + sin * dy, cos * dy - sin * dx

    def paint(self, distance: Tensor, colour: Tensor) -> None:
        """Fill where `distance` (B, 1, size, size) is negative, its edge smooth over two pixels."""
        t = (0.5 - distance * self.size / 2).clamp(0, 1)
        self.image = self.image.lerp(colour, t * t * (3 - 2 * t))

    def developed(self, *, noise: float) -> Tensor:
        """Return the images blurred a little, dimmed a little and noisy, as uint8."""
        soft = F.avg_pool2d(self.image, 3, stride=1, padding=1, count_include_pad=False)
        image = self.image.lerp(soft, self.uniform(0, 1)) * self.uniform(0.7, 1.1)
        grain = torch.randn(image.shape, generator=self.rng) * self.uniform(0, noise)
        return ((image + grain) * 255).round().clamp(0, 255).to(torch.uint8)


def _by_label(figures: tuple[Distance, ...], labels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return each image's distance to the figure that its label names, (B, 1, size, size)."""
    distance = torch.empty_like(x)
    for label, figure in enumerate(figures):
        rows = labels == label
        distance[rows] = figure(x[rows], y[rows])
    return distance


def _clutter(canvas: _Canvas) -> None:
    """Paint one small dot or dash of any colour somewhere on every image."""
    x, y = canvas.frame(0.1, turn=math.pi, roam=1.2)
    overhang = (x.abs() - canvas.uniform(-1, 2)).clamp(min=0)
    colour = canvas.colour(canvas.uniform(0, 1), tint=0.3)
    canvas.paint(torch.hypot(overhang, y) * 0.1 - canvas.uniform(0.01, 0.05), colour)


def _shapes(labels: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Filled figures at any angle over a colour gradient, with clutter behind them."""
    canvas = _Canvas(len(labels), size, rng)
    paper, ink = canvas.contrasting(0.35, 0.7)
    x, _ = canvas.frame(radius=0.5, turn=math.pi, roam=0.0)
    canvas.image = paper + x * canvas.colour(canvas.uniform(-0.12, 0.12), tint=0.2)
    for _ in range(2):
        _clutter(canvas)
    radius = canvas.uniform(0.28, 0.42)
    x, y = canvas.frame(radius, turn=math.pi, roam=0.4)
    canvas.paint(_by_label(tuple(SHAPES.values()), labels, x, y) * radius, ink)
    return canvas.developed(noise=0.06)


def _symbols(labels: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Signs drawn with a pen, nearly upright, over stripes or a checkerboard."""
    canvas = _Canvas(len(labels), size, rng)
    ink, paper = canvas.contrasting(0.35, 0.7)
    x, y = canvas.frame(canvas.uniform(0.05, 0.12), turn=math.pi, roam=1.0)
    checker = torch.where(canvas.uniform(0, 1) < 0.5, y.sin(), 1.0)
    other = canvas.colour(canvas.uniform(-0.12, 0.12), tint=0.3)
    canvas.image = paper + (2 * x.sin() * checker).clamp(-1, 1) * other
    radius, pen = canvas.uniform(0.25, 0.4), canvas.uniform(0.025, 0.05)
    x, y = canvas.frame(radius, turn=0.25, roam=0.85)
    canvas.paint(_by_label(tuple(SYMBOLS.values()), labels, x, y) * radius - pen, ink)
    return canvas.developed(noise=0.06)


_SETS = {"shapes": (SHAPES, _shapes), "symbols": (SYMBOLS, _symbols)}
CLASSES: dict[str, tuple[str, ...]] = {name: tuple(figures) for name, (figures, _) in _SETS.items()}


def draw(name: str, n: int, *, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Draw `n` images of the set `name`, the same ones for the same seed, classes balanced.

    Returns:
        Images (n, 3, size, size) in uint8, and labels (n,) in int64 that index `CLASSES[name]`.

    Raises:
        ValueError: no set has this name.
    """
    if name not in _SETS:
        raise ValueError(f"{name=} is not a set that can be drawn; choose from {sorted(_SETS)}")
    figures, scene = _SETS[name]
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n)[torch.randperm(n, generator=rng)] % len(figures)
    images = [scene(part, size, rng) for part in torch.split(labels, _BATCH)]
    return torch.cat(images), labels
