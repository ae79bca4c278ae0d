"""A still picture of a figure, as SVG: what stands where no script runs, as on GitHub and in an exported page.

Plotly's own stills need a browser on the machine that makes them; this draws what our figures are made of (see
`marks.py`), to scale and in the same colours.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tl_looped.viz.style import FONT, INK

Number = int | float
WIDTH = 760  # pixels: a notebook's cell

_TAG = re.compile(r"<[^>]*>")
_ANCHORS = {"left": "start", "center": "middle", "right": "end"}


def look_up(values: Any, path: str, default: Any = None) -> Any:
    """What stands at "a.b.c" in nested mappings; the default where something is missing or None."""
    for part in path.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return default if values is None else values


def px(value: Number) -> str:
    """A length in pixels, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")


def text(
    words: object,
    x: Number,
    y: Number,
    *,
    size: Number = 12,
    anchor: str = "middle",
    color: str = INK,
    turn: Number = 0,
) -> str:
    """Words with their baseline at (x, y), turned around that point, without plotly's tags but its line breaks."""
    lines = [html.unescape(_TAG.sub("", line)) for line in re.split(r"<br ?/?>", str(words))]
    place = f'x="{px(x)}" y="{px(y)}" font-size="{px(size)}" text-anchor="{anchor}" fill="{color}"'
    turned = f' transform="rotate({px(turn)} {px(x)} {px(y)})"' if turn else ""
    spans = [html.escape(lines[0])]
    spans += [f'<tspan x="{px(x)}" dy="{px(1.25 * size)}">{html.escape(line)}</tspan>' for line in lines[1:]]
    return f"<text {place}{turned}>{''.join(spans)}</text>"


def width_of(words: object, size: Number = 12) -> Number:
    """About how many pixels wide words are."""
    lines = re.split(r"<br ?/?>", str(words))
    return 0.56 * size * max(len(html.unescape(_TAG.sub("", line))) for line in lines)


@dataclass
class Scale:
    """One axis: from data to pixels.

    Attributes:
        start, end: pixels of the low and the high end.
        low, high: data at them; logarithms to the base of ten where `log`.
        log: whether it is logarithmic.
        names: of a categorical axis, in the order of its places 0, 1, ...
        layout: plotly's description of it.
    """

    start: Number
    end: Number
    low: Number
    high: Number
    log: bool
    names: list[str]
    layout: Mapping[str, Any] = field(repr=False)

    def place(self, value: Any) -> Number | None:
        """Data as the axis counts it; None for a gap."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if isinstance(value, str):
            return float(self.names.index(value)) if value in self.names else None
        if self.log:
            return math.log10(value) if value > 0 else None
        return float(value)

    def at(self, value: Any) -> Number | None:
        """The pixel of a value; None for a gap."""
        place = self.place(value)
        if place is None:
            return None
        return self.start + (place - self.low) / ((self.high - self.low) or 1) * (self.end - self.start)

    def ticks(self) -> list[tuple[Number, str]]:
        """(pixel, label) of every tick."""
        labels = self._labels()
        low, high = sorted((self.low, self.high))
        slack = 1e-6 * (high - low)
        shown = [(place, label) for place, label in labels if low - slack <= place <= high + slack]
        return [
            (self.start + (place - self.low) / ((self.high - self.low) or 1) * (self.end - self.start), label)
            for place, label in shown
        ]

    def _labels(self) -> list[tuple[Number, str]]:
        values = self.layout.get("tickvals")
        if values is not None:
            names = self.layout.get("ticktext") or [number(value) for value in values]
            places = [(self.place(value), str(name)) for value, name in zip(values, names, strict=False)]
            return [(place, name) for place, name in places if place is not None]
        if self.names:
            return [(float(place), name) for place, name in enumerate(self.names)]
        low, high = sorted((self.low, self.high))
        if self.log:
            return _powers(low, high)
        form, step = self.layout.get("tickformat", ""), self.layout.get("dtick")
        step = step if isinstance(step, (int, float)) else nice_step(high - low, 5)
        first = math.ceil(low / step - 1e-9)
        count = math.floor(high / step + 1e-9) - first + 1
        return [((first + i) * step, number((first + i) * step, form)) for i in range(min(count, 60))]


def _powers(low: Number, high: Number) -> list[tuple[Number, str]]:
    """Ticks at powers of ten; where fewer than two are in sight, at 1, 2 and 5 times them."""
    whole = list(range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1))
    if len(whole) < 2:
        fine = [
            (k + math.log10(m), m * 10.0**k) for k in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)
        ]
        return [(place, number(value)) for place, value in fine]
    step = -(-len(whole) // 9)
    return [(float(k), number(10.0**k) if -3 <= k <= 3 else f"10{_raised(k)}") for k in whole[::step]]


def _raised(k: int) -> str:
    return str(k).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def nice_step(span: Number, count: int) -> Number:
    """A step of 1, 2 or 5 times a power of ten, for about so many ticks."""
    if not span > 0:
        return 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= 0.8 * rough)


def number(value: Any, form: str = "") -> str:
    """A number for a tick."""
    if not isinstance(value, (int, float)):
        return str(value)
    if form.endswith("%"):
        return f"{100 * value:.{form[1:-1] or 0}f}%"
    return f"{value:.4g}".replace("-", "−") if value else "0"


def frame(scale_x: Scale, scale_y: Scale) -> tuple[list[str], list[str]]:
    """(what lies behind the marks, what lies around them): ground and grid; frame, ticks, their labels and titles."""
    left, right = sorted((scale_x.start, scale_x.end))
    top, bottom = sorted((scale_y.start, scale_y.end))
    behind, around = [], []
    for scale, across in ((scale_x, False), (scale_y, True)):
        layout = scale.layout
        if layout.get("visible") is False:
            continue
        ticks = scale.ticks()
        if layout.get("showgrid"):
            flat, upright = f"H{px(right)}", f"V{px(bottom)}"
            ends = [f"M{px(left)} {px(at)}{flat}" if across else f"M{px(at)} {px(top)}{upright}" for at, _ in ticks]
            behind.append(f'<path d="{"".join(ends)}" stroke="{layout.get("gridcolor", "#E6E9ED")}" fill="none"/>')
        if layout.get("linecolor"):
            line = f"M{px(left)} {px(top)}V{px(bottom)}" if across else f"M{px(left)} {px(bottom)}H{px(right)}"
            around.append(f'<path d="{line}" stroke="{layout["linecolor"]}" fill="none"/>')
        around += _tick_labels(scale, ticks, across, left, bottom)
    return behind, around


def _tick_labels(
    scale: Scale, ticks: Sequence[tuple[Number, str]], across: bool, left: Number, bottom: Number
) -> list[str]:
    layout, parts = scale.layout, []
    size, turned = _tick_size(layout), 0.0 if across else turn_of(scale, ticks)
    for at, label in ticks if layout.get("showticklabels") is not False else ():
        if across:
            parts.append(text(label, left - 7, at + 4, size=size, anchor="end"))
        elif turned:
            parts.append(text(label, at + 4, bottom + 14, size=size, anchor="end", turn=turned))
        else:
            parts.append(text(label, at, bottom + 17, size=size))
    title = look_up(layout, "title.text", "")
    middle = (scale.start + scale.end) / 2
    if title and across:
        room = max((width_of(label, size) for _, label in ticks), default=0)
        parts.append(text(title, left - room - 18 - 15 * str(title).count("<br>"), middle, size=12, turn=-90))
    elif title:
        parts.append(text(title, middle, bottom + label_room(scale, ticks) + 20, size=12))
    return parts


def _tick_size(layout: Mapping[str, Any]) -> Number:
    return min(12.0, look_up(layout, "tickfont.size", 12))


def turn_of(scale: Scale, ticks: Sequence[tuple[Number, str]]) -> Number:
    """The angle of labels under an axis, in degrees: as the layout says, or turned where two would touch."""
    given, size = scale.layout.get("tickangle"), _tick_size(scale.layout)
    if given is not None:
        return float(given)
    touch = (
        abs(right - left) < (width_of(one, size) + width_of(other, size)) / 2 + 4
        for (left, one), (right, other) in pairwise(ticks)
    )
    return -60.0 if any(touch) else 0.0


def label_room(scale: Scale, ticks: Sequence[tuple[Number, str]]) -> Number:
    """How many pixels the labels under an axis take."""
    if not ticks or scale.layout.get("showticklabels") is False:
        return 0.0
    size = _tick_size(scale.layout)
    return 12 + 0.8 * max(width_of(label, size) for _, label in ticks) if turn_of(scale, ticks) else 16.0


def annotation(note: Mapping[str, Any], at: Mapping[str, Scale], plot: tuple[Number, Number, Number, Number]) -> str:
    """A note of the layout, at its place in the plot (left, top, right, bottom) or on its axes."""
    left, top, right, bottom = plot
    size = look_up(note, "font.size", 12)

    def pixel(which: str, low: Number, high: Number) -> Number:
        value, reference = float(note[which]), note.get(f"{which}ref", which)
        if reference == "paper":
            return low + value * (high - low)
        scale = at[reference.removesuffix(" domain")]
        # A logarithmic axis takes logarithms here.
        share = value if reference.endswith(" domain") else (value - scale.low) / ((scale.high - scale.low) or 1)
        return scale.start + share * (scale.end - scale.start)

    x, y = pixel("x", left, right), pixel("y", bottom, top)
    x += note.get("xshift") or 0
    y -= note.get("yshift") or 0
    lines = str(note.get("text", "")).count("<br>")
    drop = {"bottom": -4 - 1.25 * size * lines, "top": size + 2}.get(note.get("yanchor") or "middle", 0.35 * size)
    anchor = _ANCHORS.get(note.get("xanchor") or "center", "middle")
    return text(
        note.get("text", ""),
        x,
        y + drop,
        size=size,
        anchor=anchor,
        color=look_up(note, "font.color", INK),
        turn=note.get("textangle") or 0,
    )


def document(parts: Sequence[str], width: Number, height: Number, label: str) -> str:
    """The whole picture."""
    font = html.escape(FONT, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(label, quote=True)}" '
        f'viewBox="0 0 {px(width)} {px(height)}" width="{px(width)}" height="{px(height)}" font-family="{font}">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>'
    )
