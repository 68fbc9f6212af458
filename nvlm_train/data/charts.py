"""Small charts without a plotting library: a scene of rectangles, lines and texts, written as SVG or as PNG."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Told apart by people who do not see red and green, on white and on black (Okabe and Ito, without the yellow).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7570b3", "#8c8c8c")
INK, FAINT, PAPER = "#24292f", "#8c959f", "#ffffff"


@dataclass(frozen=True)
class Rectangle:
    """A filled box; `tip` is shown when a reader points at it (SVG only)."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    tip: str = ""


@dataclass(frozen=True)
class Text:
    """A line of text; `anchor` is start, middle or end."""

    x: float
    y: float
    text: str
    size: int = 12
    anchor: str = "start"
    colour: str = INK


@dataclass
class Scene:
    """What is drawn, in pixels from the upper left corner."""

    width: int
    height: int
    items: list[Rectangle | Text] = field(default_factory=list)


def svg(scene: Scene) -> str:
    """The scene as an SVG element; every text escaped."""
    size = f'width="{scene.width}" height="{scene.height}" viewBox="0 0 {scene.width} {scene.height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui,sans-serif" role="img">']
    parts.append(f'<rect width="{scene.width}" height="{scene.height}" fill="{PAPER}"/>')
    for item in scene.items:
        if isinstance(item, Text):
            parts.append(
                f'<text x="{item.x:.1f}" y="{item.y:.1f}" font-size="{item.size}" fill="{item.colour}" '
                f'text-anchor="{item.anchor}">{html.escape(item.text)}</text>'
            )
            continue
        tip = f"<title>{html.escape(item.tip)}</title>" if item.tip else ""
        parts.append(
            f'<rect x="{item.x:.1f}" y="{item.y:.1f}" width="{item.width:.1f}" height="{item.height:.1f}" '
            f'fill="{item.colour}">{tip}</rect>'
        )
    return "\n".join([*parts, "</svg>"])


def write_png(scene: Scene, path: Path, scale: int = 2) -> None:
    """The scene as a PNG of `scale` times its size."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (scene.width * scale, scene.height * scale), PAPER)
    draw = ImageDraw.Draw(image)
    for item in scene.items:
        if isinstance(item, Text):
            font = ImageFont.load_default(item.size * scale)
            anchor = {"start": "ls", "middle": "ms", "end": "rs"}[item.anchor]
            draw.text((item.x * scale, item.y * scale), item.text, fill=item.colour, font=font, anchor=anchor)
        elif item.width > 0 and item.height > 0:
            right, bottom = (item.x + item.width) * scale - 1, (item.y + item.height) * scale - 1
            left, top = item.x * scale, item.y * scale
            draw.rectangle((left, top, max(left, right), max(top, bottom)), fill=item.colour)
    image.save(path, format="PNG")


@dataclass(frozen=True)
class Histogram:
    """Stacked bars. edges: [n+1] bounds of the bins. layers: for each name its n heights."""

    title: str
    unit: str
    edges: Sequence[float]
    layers: dict[str, Sequence[float]]


def draw_histograms(histograms: Sequence[Histogram], colours: dict[str, str], title: str) -> Scene:
    """Histograms under each other, with a legend; bars are stacked by source, heights are shares of all draws."""
    left, right, each, gap = 64, 24, 190, 74
    width = 860
    scene = Scene(width, 0)
    scene.items.append(Text(left, 30, title, 17))
    x, y = left, 52.0
    for name, colour in colours.items():
        needed = 30 + 7 * len(name)
        if x + needed > width - right and x > left:
            x, y = left, y + 20
        scene.items += [Rectangle(x, y - 10, 12, 12, colour), Text(x + 17, y, name, 12)]
        x += needed
    y += 36
    for histogram in histograms:
        scene.items += [Text(left, y, histogram.title, 14)]
        bottom = y + 12 + each
        totals = [sum(heights[k] for heights in histogram.layers.values()) for k in range(len(histogram.edges) - 1)]
        most = max(totals, default=0.0) or 1.0
        for share in _ticks(most):
            at = bottom - each * share / most
            scene.items += [
                Rectangle(left, at, width - left - right, 1, "#e6e8eb"),
                Text(left - 8, at + 4, f"{share:.1%}" if most < 0.1 else f"{share:.0%}", 11, "end", FAINT),
            ]
        step = min(64.0, (width - left - right) / len(totals))  # a few bars stay bars
        for k in range(len(totals)):
            base = bottom
            low, high = histogram.edges[k], histogram.edges[k + 1]
            for name, heights in histogram.layers.items():
                tall = each * heights[k] / most
                if tall <= 0:
                    continue
                base -= tall
                span = f"{low:,.0f}" if high - low <= 1 else f"{low:,.0f} to {high - 1:,.0f}"
                tip = f"{name}: {heights[k]:.2%} of samples have {span} {histogram.unit}"
                bar = max(1.0, step - 1.5)
                scene.items.append(Rectangle(left + k * step + 0.75, base, bar, tall, colours[name], tip))
        scene.items.append(Rectangle(left, bottom, width - left - right, 1, INK))
        every = max(1, -(-len(totals) // 12))
        for k in range(0, len(totals), every):
            centre = left + (k + 0.5) * step
            scene.items.append(Text(centre, bottom + 16, f"{histogram.edges[k]:,.0f}", 11, "middle", FAINT))
        scene.items.append(Text(width - right, bottom + 34, histogram.unit, 11, "end", FAINT))
        y = bottom + gap
    scene.height = round(y - gap + 50)
    return scene


def _ticks(most: float) -> list[float]:
    """Two to five round values up to `most`."""
    unit = 10.0**-4
    while True:
        for factor in (1, 2, 5):
            if most / (unit * factor) <= 5:
                return [k * unit * factor for k in range(1, int(most / (unit * factor) + 1e-9) + 1)]
        unit *= 10
