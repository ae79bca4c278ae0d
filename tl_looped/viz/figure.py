"""Our figures: plotly's, which bring a still picture for readers whose notebook runs no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from plotly.colors import DEFAULT_PLOTLY_COLORS
from plotly.io.base_renderers import MimetypeRenderer, PlotlyRenderer

from tl_looped.viz.marks import Colors, as_numbers, bars, heatmap, point, scatter
from tl_looped.viz.still import (
    WIDTH,
    Number,
    Scale,
    annotation,
    document,
    frame,
    label_room,
    look_up,
    px,
    text,
    width_of,
)

_SVG = "image/svg+xml"
_STILL = "tl_looped_still"  # our renderer's name; it is never plotly's default
Plot = tuple[Number, Number, Number, Number]


class Figure(go.Figure):
    """A plotly figure whose notebook output has a still picture beside it.

    JupyterLab and VS Code draw the figure itself; GitHub, exported pages and anything else that runs no script show the
    picture. Where plotly's renderer brings HTML of its own (Colab), that is left alone.
    """

    def still_svg(self) -> str:
        """The figure as an SVG picture, drawn without a browser."""
        return still_svg(self)

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(*args, **kwargs)
        return {**bundle, _SVG: self.still_svg()} if _draws_itself() else bundle

    def _ipython_display_(self) -> None:
        self.show() if pio.renderers.render_on_display and pio.renderers.default else print(repr(self))

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Show it as plotly does: under a notebook's cell, there with a still picture, or in a browser."""
        if not args and "renderer" not in kwargs and _draws_itself():
            kwargs["renderer"] = f"{pio.renderers.default}+{_STILL}"
        super().show(*args, **kwargs)


def still_svg(figure: go.Figure) -> str:
    """A figure of ours, also one that plotly's own class holds, as an SVG picture."""
    return _Still(figure.to_dict()).svg()


def _draws_itself() -> bool:
    """Whether figures go to the notebook as data, which only some readers of it can draw."""
    names = (pio.renderers.default or "").split("+")
    return all(getattr(pio.renderers[name], "__class__", None) is PlotlyRenderer for name in names if name)


class _StillRenderer(MimetypeRenderer):
    """For plotly: the still picture, beside what other renderers bring."""

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, str]:
        return {_SVG: _Still(fig_dict).svg()}


pio.renderers[_STILL] = _StillRenderer()


class _Still:
    """Draws one figure: its plots, what is in them, legend and titles."""

    def __init__(self, figure: Mapping[str, Any]):
        self.layout: Mapping[str, Any] = figure["layout"]
        self.traces: list[Mapping[str, Any]] = [_plain(trace) for trace in figure["data"]]
        self.height = float(self.layout.get("height") or 450)
        self.entries = self._legend_entries()
        self.flat = look_up(self.layout, "legend.orientation") == "h"
        self.plot = self._plot()
        self.scales = {name: self._scale(name) for name in self._axes()}
        self._keep_aspect()
        self.height += self._missing_room()

    def svg(self) -> str:
        """The picture."""
        behind, marks, around = [], [], []
        for x, y in self._pairs():
            below, above = frame(self.scales[x], self.scales[y])
            left, right = sorted((self.scales[x].start, self.scales[x].end))
            top, bottom = sorted((self.scales[y].start, self.scales[y].end))
            ground = look_up(self.layout, "plot_bgcolor", "white")
            behind.append(
                f'<rect x="{px(left)}" y="{px(top)}" width="{px(right - left)}" height="{px(bottom - top)}" '
                f'fill="{ground}"/>'
            )
            behind += below
            around += above
        bases: dict[Any, Number] = {}
        for i, trace in enumerate(self.traces):
            drawn = self._trace(trace, DEFAULT_PLOTLY_COLORS[i % len(DEFAULT_PLOTLY_COLORS)], bases)
            marks += drawn
        marks += [self._shape(shape) for shape in self.layout.get("shapes") or ()]
        around += [annotation(note, self.scales, self.plot) for note in self.layout.get("annotations") or ()]
        around += self._legend()
        title = look_up(self.layout, "title.text", "")
        if title:
            around.append(text(title, 14, 24, size=15, anchor="start"))
        return document([*behind, *marks, *around], WIDTH, self.height, str(title) or "figure")

    # Where things are.

    def _plot(self) -> Plot:
        """The rectangle of all plots: left, top, right, bottom."""
        margin = self.layout.get("margin") or {}
        left = max(float(margin.get("l", 80)), self._left_labels())
        right = float(margin.get("r", 80))
        widest = max((width_of(name) for name, _ in self.entries), default=0)
        if self.entries and not self.flat:
            right = max(right, widest + 58)
        axis = self.layout.get("coloraxis")
        for spec in [axis, *(trace.get("marker") or trace for trace in self.traces if self._has_bar(trace))]:
            if spec is not None:
                right = max(right, 92, 20 + width_of(look_up(spec, "colorbar.title.text", ""), 11))
        top, bottom = float(margin.get("t", 60)), float(margin.get("b", 60))
        return left, top, WIDTH - right, self.height - bottom

    def _left_labels(self) -> Number:
        """How much room the labels and the title at the left need."""
        names = look_up(self.layout, "yaxis.ticktext") or ()
        title = str(look_up(self.layout, "yaxis.title.text", ""))
        return max((width_of(name) for name in names), default=0) + 15 * (1 + title.count("<br>")) + 24

    @staticmethod
    def _has_bar(trace: Mapping[str, Any]) -> bool:
        if trace["type"] == "heatmap":
            return trace.get("showscale") is not False and not trace.get("coloraxis")
        return _bar(trace.get("marker") or {})

    def _axes(self) -> list[str]:
        """Names of all axes, as traces refer to them: "x", "y2"."""
        names = {trace.get(f"{letter}axis") or letter for trace in self.traces for letter in "xy"}
        names |= {f"{key[0]}{key[5:]}" for key in self.layout if key[1:5] == "axis"}
        return sorted(names)

    def _axis_layout(self, name: str) -> Mapping[str, Any]:
        return self.layout.get(f"{name[0]}axis{name[1:]}") or {}

    def _pairs(self) -> list[tuple[str, str]]:
        pairs = [(trace.get("xaxis") or "x", trace.get("yaxis") or "y") for trace in self.traces]
        return list(dict.fromkeys(pairs))

    def _scale(self, name: str) -> Scale:
        layout, letter = self._axis_layout(name), name[0]
        left, top, right, bottom = self.plot
        low_end, high_end = layout.get("domain") or (0.0, 1.0)
        if letter == "x":
            start, end = left + low_end * (right - left), left + high_end * (right - left)
        else:
            start, end = bottom - low_end * (bottom - top), bottom - high_end * (bottom - top)
        scale = Scale(start, end, 0.0, 1.0, layout.get("type") == "log", [], layout)
        group = {name, layout.get("matches") or name}
        group |= {
            other for other in self._axes() if other[0] == letter and self._axis_layout(other).get("matches") in group
        }
        values = [v for t in self.traces if (t.get(f"{letter}axis") or letter) in group for v in _values(t, letter)]
        scale.names = list(dict.fromkeys(v for v in values if isinstance(v, str)))
        scale.low, scale.high = self._range(scale, values, letter, group)
        return scale

    def _range(self, scale: Scale, values: Sequence[Any], letter: str, group: set[str]) -> tuple[Number, Number]:
        layout = scale.layout
        fixed = next((r for r in (self._axis_layout(name).get("range") for name in sorted(group)) if r), None)
        if fixed:
            return float(fixed[0]), float(fixed[1])
        known = [place for place in map(scale.place, values) if place is not None and np.isfinite(place)]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        kinds = {t["type"] for t in self.traces if (t.get(f"{letter}axis") or letter) in group}
        if "heatmap" in kinds or (letter == "x" and kinds & {"bar", "histogram"}):
            low, high = low - 0.5, high + 0.5
        else:
            if layout.get("rangemode") == "tozero" or (letter == "y" and kinds & {"bar", "histogram"}):
                low, high = min(low, 0.0), max(high, 0.0)
            pad = 0.05 * (high - low) or 0.5
            low, high = (low if low == 0 and layout.get("rangemode") == "tozero" else low - pad), high + pad
        return (high, low) if layout.get("autorange") == "reversed" else (low, high)

    def _keep_aspect(self) -> None:
        """Where one unit is to be as long on both axes, the longer one shrinks."""
        for scale in self.scales.values():
            other = self.scales.get(scale.layout.get("scaleanchor") or "")
            if other is None:
                continue
            units = [abs((one.end - one.start) / ((one.high - one.low) or 1)) for one in (scale, other)]
            for one, unit in zip((scale, other), units, strict=True):
                middle, share = (one.start + one.end) / 2, min(units) / unit
                one.start, one.end = middle + (one.start - middle) * share, middle + (one.end - middle) * share

    def _missing_room(self) -> Number:
        """Pixels by which what stands under the lowest plots is higher than the margin."""
        margin = self.height - self.plot[3]
        under = [scale for name, scale in self.scales.items() if name[0] == "x"]
        rooms = (label_room(scale, scale.ticks()) + 28 for scale in under)
        legend = 40 if self.flat and self.entries else 0
        return max(0.0, max(rooms, default=0.0) + legend - margin)

    # What is drawn.

    def _trace(self, trace: Mapping[str, Any], color: str, bases: dict[Any, Number]) -> list[str]:
        if trace.get("visible") in (False, "legendonly"):
            return []
        x, y = (self.scales[trace.get(f"{letter}axis") or letter] for letter in "xy")
        if trace["type"] == "heatmap":
            colors = Colors(as_numbers(trace["z"]), trace, self.layout, "z")
            shared = bool(trace.get("coloraxis")) and trace is not self.traces[0]
            box = self.plot
            return heatmap(trace, x, y, colors) + ([] if shared else colors.bar(box))
        color = look_up(trace, "marker.color", color) if trace["type"] in ("bar", "histogram") else color
        if trace["type"] == "bar":
            places, heights = trace.get("x") or [], trace.get("y") or []
            stacked = self.layout.get("barmode") == "stack"
            low = [bases.get(place, 0.0) if stacked else 0.0 for place in places]
            bases.update({p: b + (h or 0) for p, b, h in zip(places, low, heights, strict=True)})
            return bars(places, heights, low, 0.8, x, y, color)
        if trace["type"] == "histogram":
            edges, counts = _counts(trace)
            wide = edges[1] - edges[0]
            middles = [edge + wide / 2 for edge in edges[:-1]]
            return bars(middles, counts, [0.0] * len(counts), wide, x, y, color)
        marker = trace.get("marker") or {}
        given = marker.get("color")
        coded = [v for v in given if isinstance(v, (int, float))] if isinstance(given, (list, tuple)) else []
        colors = Colors(np.array(coded, dtype=float), marker, self.layout, "c") if coded or _bar(marker) else None
        bar = colors.bar(self.plot) if colors is not None and _bar(marker) else []
        return scatter(trace, x, y, given if isinstance(given, str) else color, colors) + bar

    def _shape(self, shape: Mapping[str, Any]) -> str:
        ends = {}
        for letter in "xy":
            reference = shape.get(f"{letter}ref") or letter
            name = reference.removesuffix(" domain")
            for which in "01":
                value = shape[letter + which]
                if reference == "paper":
                    left, top, right, bottom = self.plot
                    low, high = (left, right) if letter == "x" else (bottom, top)
                    ends[letter + which] = low + value * (high - low)
                elif reference.endswith(" domain"):
                    scale = self.scales[name]
                    ends[letter + which] = scale.start + value * (scale.end - scale.start)
                else:
                    ends[letter + which] = self.scales[name].at(value)
        if None in ends.values():
            return ""
        color, width = look_up(shape, "line.color", "#1F2933"), look_up(shape, "line.width", 1)
        dash = {"dash": "7 4", "dot": "2 3"}.get(look_up(shape, "line.dash", ""), "")
        return (
            f'<path d="M{px(ends["x0"])} {px(ends["y0"])}L{px(ends["x1"])} {px(ends["y1"])}" stroke="{color}" '
            f'stroke-width="{width}" stroke-dasharray="{dash}" fill="none"/>'
        )

    # The legend.

    def _legend_entries(self) -> list[tuple[str, Mapping[str, Any]]]:
        if self.layout.get("showlegend") is False:
            return []
        several = len(self.traces) > 1
        return [
            (str(trace["name"]), trace)
            for trace in self.traces
            if trace.get("name") and trace.get("showlegend", several) and trace["type"] != "heatmap"
        ]

    def _legend(self) -> list[str]:
        left, top, right, _ = self.plot
        x, y, parts = (left, self.height - 14.0, []) if self.flat else (right + 16, top + 8, [])
        if self.flat and sum(width_of(name) + 52 for name, _ in self.entries) > WIDTH - left:
            y -= 18.0
        for name, trace in self.entries:
            if self.flat and x + width_of(name) + 40 > WIDTH and x > left:
                x, y = left, y + 18
            parts += [self._sample(trace, x, y), text(name, x + 30, y + 4, anchor="start")]
            x, y = (x + width_of(name) + 52, y) if self.flat else (x, y + 19)
        return parts

    def _sample(self, trace: Mapping[str, Any], x: Number, y: Number) -> str:
        marker = trace.get("marker") or {}
        shade = marker.get("color") if isinstance(marker.get("color"), str) else None
        index = self.traces.index(trace)
        color = look_up(trace, "line.color") or shade or DEFAULT_PLOTLY_COLORS[index % len(DEFAULT_PLOTLY_COLORS)]
        if trace["type"] in ("bar", "histogram") or trace.get("fill") == "toself":
            return (
                f'<rect x="{px(x)}" y="{px(y - 6)}" width="24" height="12" fill="{trace.get("fillcolor") or color}"/>'
            )
        mode = trace.get("mode") or "lines+markers"
        dash = {"dash": "7 4", "dot": "2 3"}.get(look_up(trace, "line.dash", ""), "")
        line = f'<path d="M{px(x)} {px(y)}h24" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>'
        symbol = marker.get("symbol") if isinstance(marker.get("symbol"), str) else "circle"
        dot = point(x + 12, y, 3.5, shade or color, symbol or "circle")
        return (line if "lines" in mode else "") + (dot if "markers" in mode else "")


def _plain(value: Any) -> Any:
    """A trace with lists where plotly packed numbers."""
    if isinstance(value, Mapping) and "bdata" in value:
        numbers = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        shape = value.get("shape")
        return numbers.reshape([int(n) for n in str(shape).split(",")] if shape else -1).tolist()
    return {name: _plain(part) for name, part in value.items()} if isinstance(value, Mapping) else value


def _bar(marker: Mapping[str, Any]) -> bool:
    return bool(marker.get("showscale"))


def _values(trace: Mapping[str, Any], letter: str) -> list[Any]:
    """All that a trace puts on an axis."""
    if trace["type"] == "histogram":
        edges, counts = _counts(trace)
        return list(edges) if letter == "x" else list(counts)
    given = trace.get(letter)
    if given is None:
        size = len(trace["z"][0] if letter == "x" else trace["z"]) if "z" in trace else len(trace.get("y") or ())
        return list(range(size))
    error = look_up(trace, "error_y.array") if letter == "y" else None
    if error is None:
        return list(given)
    down = look_up(trace, "error_y.arrayminus", error)
    pairs = list(zip(given, error, down, strict=False))
    return [v + up for v, up, _ in pairs if None not in (v, up)] + [
        v - low for v, _, low in pairs if None not in (v, low)
    ]


def _counts(trace: Mapping[str, Any]) -> tuple[list[Number], list[Number]]:
    """(edges, counts) of a histogram with given bins."""
    bins = trace["xbins"]
    edges = np.arange(bins["start"], bins["end"] + bins["size"] / 2, bins["size"])
    counts, edges = np.histogram([v for v in trace["x"] if v is not None], edges)
    return edges.tolist(), counts.astype(float).tolist()
