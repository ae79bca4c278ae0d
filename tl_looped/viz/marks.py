"""What our figures are made of, as SVG: heatmaps, lines, points, bars, histograms, colour bars."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from plotly.colors import get_colorscale, sample_colorscale

from tl_looped.viz.still import Number, Scale, look_up, nice_step, number, px, text

_DASHES = {"dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "10 5"}
_MOST_GRID = 64  # rows or columns of a heatmap with lines between them


def data_png(pixels: np.ndarray) -> str:
    """RGBA pixels [row, column, 4] as the address of a PNG picture."""
    rows, columns, _ = pixels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in pixels.astype(np.uint8))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def color_table(scale: Any) -> np.ndarray:
    """256 colours of a plotly colour scale, [256, 3]."""
    stops = get_colorscale(scale) if isinstance(scale, str) else [[float(at), color] for at, color in scale]
    sampled = map(str, sample_colorscale(stops, [i / 255 for i in range(256)]))
    return np.array([[round(float(part)) for part in shade[4:-1].split(",")] for shade in sampled])


def shades(values: np.ndarray, low: Number, high: Number, scale: Any) -> np.ndarray:
    """Values as RGBA pixels [*values, 4], with nothing where a value is missing."""
    share = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
    known = np.isfinite(values)
    colors = color_table(scale)[np.where(known, share * 255, 0).round().astype(int)]
    return np.concatenate([colors, np.where(known, 255, 0)[..., None]], -1)


class Colors:
    """What a heatmap's or a marker's numbers mean in colour."""

    def __init__(self, values: np.ndarray, spec: Mapping[str, Any], layout: Mapping[str, Any], letter: str):
        axis = layout.get(spec["coloraxis"]) if isinstance(spec.get("coloraxis"), str) else None
        self.spec, letter = (spec, letter) if axis is None else (axis, "c")
        known = values[np.isfinite(values)]
        low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
        self.low = float(look_up(self.spec, f"{letter}min", low))
        self.high = float(look_up(self.spec, f"{letter}max", high))
        self.scale = self.spec.get("colorscale", "Viridis")

    def pixels(self, values: np.ndarray) -> np.ndarray:
        """Values as RGBA."""
        return shades(values, self.low, self.high, self.scale)

    def bar(self, plot: tuple[Number, Number, Number, Number]) -> list[str]:
        """The colour bar, beside a plot (left, top, right, bottom)."""
        if self.spec.get("showscale") is False:
            return []
        left, top, right, bottom = plot
        bar = self.spec.get("colorbar") or {}
        x = left + float(bar.get("x", 1.0)) * (right - left) + 12
        whole, length = bottom - top, float(bar.get("len", 1))
        length = min(length, whole) if bar.get("lenmode") == "pixels" else length * whole
        middle = bottom - float(bar.get("y", 0.5)) * whole
        start = middle if bar.get("yanchor") == "top" else middle - length / 2
        width = float(bar.get("thickness", 14))
        title = look_up(bar, "title.text", "")
        above = 0.0
        if title and look_up(bar, "title.side", "top") == "top":
            above = 15.0 * (str(title).count("<br>") + 1)
        start, length = start + above, length - above
        image = data_png(shades(np.linspace(1, 0, 128)[:, None], 0, 1, self.scale))
        parts = [_image(image, x, start, width, length)]
        if above:
            parts.append(text(title, x, start - above + 5, size=11, anchor="start"))
        elif title:
            parts.append(text(title, x + width + 46, start + length / 2, size=12, turn=90))
        fixed, names = bar.get("tickvals"), bar.get("ticktext")
        form = bar.get("tickformat", "")
        step = nice_step(self.high - self.low, 5)
        ticks = fixed or [
            step * i for i in range(int(np.ceil(self.low / step)), int(np.floor(self.high / step + 1e-9)) + 1)
        ]
        for i, tick in enumerate(ticks):
            at = start + length * (1 - (tick - self.low) / ((self.high - self.low) or 1))
            parts.append(
                text(names[i] if names else number(tick, form), x + width + 4, at + 4, size=11, anchor="start")
            )
        return parts


def _image(address: str, x: Number, y: Number, width: Number, height: Number) -> str:
    return (
        f'<image href="{address}" x="{px(x)}" y="{px(y)}" width="{px(width)}" height="{px(height)}" '
        'preserveAspectRatio="none" style="image-rendering:pixelated"/>'
    )


def as_numbers(values: Any) -> np.ndarray:
    """Nested lists with None for gaps, as an array with NaN."""
    return np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)


def heatmap(trace: Mapping[str, Any], x: Scale, y: Scale, colors: Colors) -> list[str]:
    """Cells of equal size, lines between them where there are few, and their texts."""
    values = as_numbers(trace["z"])
    rows, columns = values.shape
    across = [x.place(v) or 0.0 for v in trace.get("x") or range(columns)]
    down = [y.place(v) or 0.0 for v in trace.get("y") or range(rows)]
    wide, high = _cell(across, x), _cell(down, y)
    xs = [x.start + (v - x.low) / ((x.high - x.low) or 1) * (x.end - x.start) for v in across]
    ys = [y.start + (v - y.low) / ((y.high - y.low) or 1) * (y.end - y.start) for v in down]
    order_x, order_y = np.argsort(xs), np.argsort(ys)
    left, top = min(xs) - wide / 2, min(ys) - high / 2
    pixels = colors.pixels(values)[order_y][:, order_x]
    parts = [_image(data_png(pixels), left, top, wide * columns, high * rows)]
    if trace.get("xgap") and columns <= _MOST_GRID:
        lines = "".join(f"M{px(left + i * wide)} {px(top)}v{px(high * rows)}" for i in range(1, columns))
        parts.append(f'<path d="{lines}" stroke="#DDE2E8" fill="none"/>')
    if trace.get("ygap") and rows <= _MOST_GRID:
        lines = "".join(f"M{px(left)} {px(top + i * high)}h{px(wide * columns)}" for i in range(1, rows))
        parts.append(f'<path d="{lines}" stroke="#DDE2E8" fill="none"/>')
    if trace.get("texttemplate") and trace.get("text") is not None:
        shown = colors.pixels(values)
        for i, row in enumerate(trace["text"]):
            for j, words in enumerate(row):
                ink = "white" if shown[i, j, 3] and shown[i, j, :3].mean() < 140 else "#1F2933"
                size = look_up(trace, "textfont.size", 12)
                parts.append(text(words, xs[j], ys[i] + 4, size=size, color=ink))
    return parts


def _cell(places: Sequence[Number], scale: Scale) -> Number:
    step = abs(places[1] - places[0]) if len(places) > 1 else 1.0
    return step / (abs(scale.high - scale.low) or 1) * abs(scale.end - scale.start)


def scatter(trace: Mapping[str, Any], x: Scale, y: Scale, color: str, colors: Colors | None) -> list[str]:
    """A line with gaps, a filled shape, points, error bars, words."""
    ys = trace.get("y") or []
    xs = trace.get("x") or range(len(ys))
    points = [(x.at(a), y.at(b)) for a, b in zip(xs, ys, strict=False)]
    mode, opacity = trace.get("mode") or "lines+markers", trace.get("opacity", 1)
    parts = []
    whole = [p for p in points if p[0] is not None and p[1] is not None]
    if trace.get("fill") == "toself" and whole:
        fill = trace.get("fillcolor", color)
        parts.append(f'<path d="{_line(whole)}Z" fill="{fill}" stroke="none"/>')
    stroke = look_up(trace, "line.color", color)
    width = look_up(trace, "line.width", 2)
    if "lines" in mode and width:
        runs = [list(run) for known, run in groupby(points, lambda p: None not in p) if known]
        dash = _DASHES.get(look_up(trace, "line.dash", "solid"))
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        path = "".join(_line(run) for run in runs)
        parts.append(f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{px(width)}"{dashed}/>')
    parts += _error_bars(trace, ys, xs, x, y, stroke)
    if "markers" in mode:
        parts += _markers(trace, points, stroke, colors)
    if "text" in mode:
        for words, (a, b) in zip(trace.get("text") or [], points, strict=False):
            if a is not None and b is not None:
                parts.append(text(words, a, b - 8, size=look_up(trace, "textfont.size", 12)))
    return parts if opacity == 1 else [f'<g opacity="{opacity}">{"".join(parts)}</g>']


def _line(points: Sequence[tuple[Any, Any]]) -> str:
    return "M" + "L".join(f"{px(a)} {px(b)}" for a, b in points)


def _error_bars(
    trace: Mapping[str, Any], ys: Sequence[Any], xs: Sequence[Any], x: Scale, y: Scale, stroke: str
) -> list[str]:
    up = look_up(trace, "error_y.array")
    if up is None:
        return []
    down, path = look_up(trace, "error_y.arrayminus", up), ""
    for a, b, plus, minus in zip(xs, ys, up, down, strict=False):
        if None in (a, b, plus, minus):
            continue
        at, high, low = x.at(a), y.at(b + plus), y.at(b - minus)
        if None not in (at, high, low):
            path += f"M{px(at)} {px(low)}V{px(high)}"  # pyright: ignore[reportArgumentType] - none is None
    return [f'<path d="{path}" fill="none" stroke="{stroke}"/>']


def _markers(
    trace: Mapping[str, Any], points: Sequence[tuple[Any, Any]], color: str, colors: Colors | None
) -> list[str]:
    marker = trace.get("marker") or {}
    own = marker.get("color", color)
    size = marker.get("size", 6)
    symbol = marker.get("symbol", "circle")
    if isinstance(own, (list, tuple)) and own and not isinstance(own[0], str) and colors is not None:
        pixels = colors.pixels(np.array([np.nan if v is None else v for v in own], dtype=float))
        own = [f"rgb({r:.0f},{g:.0f},{b:.0f})" for r, g, b, _ in pixels]
    parts = []
    for i, (a, b) in enumerate(points):
        if a is None or b is None:
            continue
        fill, width, kind = (
            one[i % len(one)] if isinstance(one, (list, tuple)) else one for one in (own, size, symbol)
        )
        parts.append(point(a, b, float(width) / 2, fill, str(kind)))
    return parts if (opacity := marker.get("opacity", 1)) == 1 else [f'<g opacity="{opacity}">{"".join(parts)}</g>']


def point(a: Number, b: Number, r: Number, fill: str, symbol: str = "circle") -> str:
    """A marker of radius r."""
    if symbol.startswith("square"):
        return f'<rect x="{px(a - r)}" y="{px(b - r)}" width="{px(2 * r)}" height="{px(2 * r)}" fill="{fill}"/>'
    if symbol in ("x", "cross"):
        arm = f"M{px(a - r)} {px(b - r)}L{px(a + r)} {px(b + r)}M{px(a - r)} {px(b + r)}L{px(a + r)} {px(b - r)}"
        plus = f"M{px(a - r)} {px(b)}H{px(a + r)}M{px(a)} {px(b - r)}V{px(b + r)}"
        return f'<path d="{arm if symbol == "x" else plus}" stroke="{fill}" stroke-width="2.5"/>'
    if symbol.startswith("diamond"):
        return f'<path d="{_line([(a, b - r), (a + r, b), (a, b + r), (a - r, b)])}Z" fill="{fill}"/>'
    if symbol.startswith("triangle"):
        return f'<path d="M{px(a)} {px(b - r)}L{px(a + r)} {px(b + r)}H{px(a - r)}Z" fill="{fill}"/>'
    if symbol.endswith("-open"):
        return f'<circle cx="{px(a)}" cy="{px(b)}" r="{px(r)}" fill="white" stroke="{fill}" stroke-width="1.5"/>'
    return f'<circle cx="{px(a)}" cy="{px(b)}" r="{px(r)}" fill="{fill}"/>'


def bars(
    places: Sequence[Any], heights: Sequence[Any], bases: Sequence[Number], wide: Number, x: Scale, y: Scale, color: str
) -> list[str]:
    """Upright bars of a width in units of the axis."""
    parts = []
    for place, height, base in zip(places, heights, bases, strict=True):
        middle, low, high = x.at(place), y.at(base), y.at(base + (height or 0))
        if middle is None or low is None or high is None:
            continue
        width = abs(wide / ((x.high - x.low) or 1) * (x.end - x.start))
        top = min(low, high)
        parts.append(
            f'<rect x="{px(middle - width / 2)}" y="{px(top)}" width="{px(width)}" height="{px(abs(low - high))}" '
            f'fill="{color}"/>'
        )
    return parts
