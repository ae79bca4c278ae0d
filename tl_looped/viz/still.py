"""A still picture of a figure, as SVG: what stands where no script runs, as on GitHub and in an exported page.

Plotly's own stills need a browser on the machine that makes them. Matplotlib draws what our figures are made of
(heatmaps, lines, points, bars, histograms) to scale, in their colours and words; it is imported with the first picture.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import plotly.graph_objects as go
from plotly.colors import get_colorscale

from tl_looped.viz.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

Number = int | float
_WIDTH = 720  # pixels of all plots together; what stands around them is put around it
_FONTS = ["DejaVu Sans", "Verdana", "sans-serif"]
_LOOK: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#8A94A0",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 72,  # a point is a pixel
    "font.sans-serif": _FONTS[:-1],
    "font.size": 12,
    "grid.color": "#E6E9ED",
    "legend.frameon": False,
    "lines.scale_dashes": False,
    "svg.fonttype": "none",  # words stay words
    "svg.hashsalt": "tl_looped",  # the same figure is the same text
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
_DASHES = {"dash": (0, (7, 4)), "dot": (0, (2, 3)), "dashdot": (0, (7, 3, 2, 3))}  # pixels
_MARKERS = {"diamond": "D", "square": "s", "x": "x", "cross": "+", "triangle-up": "^"}
_TAG = re.compile(r"<[^>]*>")
# In a tag: digits after the third, units (a point is a pixel), line ends, turns by nothing, the font of all words.
_NEEDLESS = re.compile(
    r"""(\.\d{3})\d+|(?<=\d)pt(?=")|\n"""
    r"""| transform="rotate\(-0 [^"]*"|font-family: 'DejaVu Sans', 'Verdana', sans-serif; """
)
_MOST_GRID = 64  # rows or columns of a heatmap with lines between them


def still_svg(figure: go.Figure) -> str:
    """A figure of ours, also one that plotly's own class holds, as an SVG picture."""
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings(), io.StringIO() as file:
        mpl.rcdefaults()
        mpl.rcParams.update(_LOOK)
        warnings.filterwarnings("ignore", "Glyph")  # of other scripts: the reader's fonts have them
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        _Still(figure).canvas.savefig(file, format="svg", bbox_inches="tight", metadata=unsaid)
        drawn = file.getvalue()
    label = html.escape(_words(figure.layout.title.text).replace("\n", " ") or "figure", quote=True)
    drawn = re.sub(r">\s+<", "><", _TAG.sub(lambda tag: _NEEDLESS.sub(r"\1", tag[0]), drawn[drawn.index("<svg ") :]))
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" font-family="{", ".join(_FONTS)}" ', 1)


def _words(text: object) -> str:
    """Text of a figure without plotly's tags, but with its line breaks."""
    lines = re.sub(r"<br ?/?>", "\n", str(text or ""))
    return html.unescape(_TAG.sub("", lines))


def _shown(text: object) -> str:
    """Text as matplotlib takes it, without reading formulas into it."""
    return _words(text).replace("$", r"\$")


def _color(name: Any) -> Any:
    """A colour as matplotlib takes it."""
    return tuple(float(part) / 255 for part in name[4:-1].split(",")) if str(name).startswith("rgb(") else name


class _Still:
    """Draws one figure: its plots are the whole canvas, and what stands around them sticks out of it."""

    def __init__(self, figure: Any):  # plotly's types do not say what is in one
        from matplotlib.figure import Figure

        self.layout = figure.layout
        self.traces = [trace for trace in figure.data if trace.type in ("bar", "heatmap", "histogram", "scatter")]
        margin = self.layout.margin
        self.height = (self.layout.height or 450) - (margin.t or 60) - (margin.b or 60)
        self.canvas: Figure = Figure((_WIDTH / 72, self.height / 72))
        self.axes: dict[str, Axes] = {}  # by plotly's names of both of their axes: "x", "y2"
        self.base: Any = 0.0  # what the next bars stand on
        drawn = [(self._plot(trace.xaxis or "x", trace.yaxis or "y"), trace) for trace in self.traces]
        for name, ax in self.axes.items():
            other = self.axes.get(self._axis(name).matches or name, ax)
            if other is not ax:
                (ax.sharex if name[0] == "x" else ax.sharey)(other)
        for i, (ax, trace) in enumerate(drawn):
            self._trace(ax, trace, f"C{i % 10}")
        for shape in self.layout.shapes:
            self._line(shape)
        for name, ax in self.axes.items():
            self._finish(ax, name)
        for note in self.layout.annotations:
            self._note(note)
        self._around()

    def _axis(self, name: str) -> Any:
        return self.layout[f"{name[0]}axis{name[1:]}"]

    def _plot(self, x: str, y: str) -> Axes:
        if x not in self.axes:
            (left, right), (low, high) = (self._axis(name).domain or (0, 1) for name in (x, y))
            ax = self.canvas.add_axes((left, low, right - left, high - low))
            ax.set_facecolor(self.layout.plot_bgcolor or "white")
            self.axes |= {x: ax, y: ax}
        return self.axes[x]

    # What is drawn in a plot.

    def _trace(self, ax: Axes, trace: Any, color: str) -> None:
        several = len(self.traces) > 1 if trace.showlegend is None else trace.showlegend
        named = trace.name and several and self.layout.showlegend is not False and trace.type != "heatmap"
        label = _shown(trace.name) if named else "_"
        if trace.type == "heatmap":
            self._heatmap(ax, trace)
        elif trace.type == "scatter":
            self._scatter(ax, trace, color, label)
        elif trace.type == "histogram":
            bins = np.arange(trace.xbins.start, trace.xbins.end + trace.xbins.size / 2, trace.xbins.size)
            ax.hist(np.array(trace.x, float), bins, color=_color(trace.marker.color or color), label=label)
        else:
            heights = np.array(trace.y, float)
            ax.bar(trace.x, heights, bottom=self.base, color=_color(trace.marker.color or color), label=label)
            _error_bars(ax, trace, trace.x, heights, INK)
            self.base = self.base + heights if self.layout.barmode == "stack" else 0.0

    def _heatmap(self, ax: Axes, trace: Any) -> None:
        shared = self.layout[trace.coloraxis] if trace.coloraxis else None
        colors = _colors(trace, trace.zmin, trace.zmax) if shared is None else _colors(shared, shared.cmin, shared.cmax)
        z = np.array(trace.z, float)
        image = ax.imshow(z, colors.cmap, cast(Any, colors.norm), aspect="auto", interpolation="none", origin="lower")
        rows, columns = z.shape
        for axis, gap, cells in ((ax.xaxis, trace.xgap, columns), (ax.yaxis, trace.ygap, rows)):
            if gap and cells <= _MOST_GRID:
                axis.set_ticks(np.arange(1, cells) - 0.5, minor=True)
                axis.grid(which="minor", color="#DDE2E8")
        if trace.texttemplate:
            for (row, column), words in np.ndenumerate(np.array(trace.text, object)):
                *shade, there = image.to_rgba(z[row, column])
                ink = "white" if there and np.mean(shade) < 0.55 else INK
                ax.text(column, row, _shown(words), color=ink, size=11, ha="center", va="center")
        if shared is None or trace is self.traces[0]:
            self._color_bar(image, (shared or trace).colorbar)

    def _scatter(self, ax: Axes, trace: Any, color: str, label: str) -> None:
        marker, mode = trace.marker, trace.mode or "lines+markers"
        if marker.colorscale is not None:  # a trace without points, which brings a colour bar
            self._color_bar(_colors(marker, marker.cmin, marker.cmax), marker.colorbar)
            return
        y = np.array(trace.y, float)
        x = np.arange(len(y)) if trace.x is None else np.array(trace.x, float)
        color = _color(trace.line.color or marker.color or color)
        alpha = trace.opacity or marker.opacity
        if trace.fill == "toself":
            ax.fill(x, y, color=_color(trace.fillcolor or color), alpha=alpha, linewidth=0)
        if mode == "none":
            return
        symbol, is_open, _ = (marker.symbol or "circle").partition("-open")
        ax.plot(
            x,
            y,
            color=color,
            alpha=alpha,
            linestyle=_DASHES.get(trace.line.dash, "-") if "lines" in mode else "",
            linewidth=trace.line.width or 2,
            marker=_MARKERS.get(symbol, "o") if "markers" in mode else "",
            markersize=marker.size or 6,
            markerfacecolor="white" if is_open else _color(marker.color or color),
            markeredgewidth=2 if is_open or symbol in ("x", "cross") else 0,
            label=label,
        )
        ax.update_datalim(np.stack([x, np.ones(len(x))], -1), updatey=False)  # gaps too are part of the axis
        _error_bars(ax, trace, x, y, color)
        for a, b, words in zip(x, y, trace.text if "text" in mode else (), strict=False):
            ax.annotate(_shown(words), (a, b), (0, 6), textcoords="offset points", ha="center")

    def _color_bar(self, colors: ScalarMappable, bar: Any) -> None:
        """What colours mean, at the right of the plots or where the figure has it."""
        from matplotlib.ticker import MultipleLocator

        length = (bar.len or 1) / (self.height if bar.lenmode == "pixels" else 1)
        start = 1 - length if bar.yanchor == "top" else (1 - length) / 2
        side = self.canvas.add_axes(((bar.x or 1) + 0.02, start, 14 / _WIDTH, length))
        self.canvas.colorbar(colors, side, ticks=MultipleLocator(bar.dtick) if bar.dtick else None)
        if bar.tickformat:
            side.yaxis.set_major_formatter(f"{{x:{bar.tickformat}}}")
        if bar.title.side == "right":
            side.set_ylabel(_shown(bar.title.text), rotation=270, va="bottom")
        else:
            side.set_title(_shown(bar.title.text), loc="left", size=11, pad=9)

    def _line(self, shape: Any) -> None:
        ax = next(self.axes[name] for name in (shape.xref or "x", shape.yref or "y") if name in self.axes)
        dash, place = _DASHES.get(shape.line.dash, "-"), self._place(shape)
        look = {"color": shape.line.color, "linewidth": shape.line.width, "linestyle": dash, "transform": place}
        ax.plot((shape.x0, shape.x1), (shape.y0, shape.y1), **look, zorder=1 if shape.layer == "below" else 2)

    def _place(self, item: Any) -> Transform:
        """What the numbers of a line or a note count: an axis's data, shares of its length, or of the canvas."""
        from matplotlib.transforms import blended_transform_factory

        kinds = []
        for name in (item.xref or "x", item.yref or "y"):
            ax = self.axes.get(name.removesuffix(" domain"))
            kinds.append(self.canvas.transFigure if ax is None else ax.transAxes if " " in name else ax.transData)
        return blended_transform_factory(*kinds)

    def _note(self, note: Any) -> None:
        x, y = (self._number(note[f"{letter}ref"] or letter, note[letter]) for letter in "xy")
        across, up = note.xanchor or "center", (note.yanchor or "middle").replace("middle", "center")
        look = {"size": min(note.font.size or 12, 12), "color": note.font.color or INK}
        self.canvas.text(x, y, _shown(note.text), transform=self._place(note), ha=across, va=up, **look)

    # Axes, and what stands around the plots.

    def _number(self, name: str, value: Number) -> Number:
        """A number on an axis: plotly gives its logarithm where the axis has a logarithmic scale."""
        return 10**value if name in self.axes and self._axis(name).type == "log" else value

    def _finish(self, ax: Axes, name: str) -> None:
        """Scale, range, ticks, labels and title of an axis."""
        from matplotlib.ticker import MultipleLocator

        given, letter = self._axis(name), name[0]
        axis = ax.xaxis if letter == "x" else ax.yaxis
        is_log = given.type == "log"
        if is_log:
            ax.set(**{f"{letter}scale": "log"})
        if given.range:
            ax.set(**{f"{letter}lim": [self._number(name, end) for end in given.range]})
        elif given.rangemode == "tozero":
            ax.set(**{f"{letter}lim": (0, None)})
        if given.autorange == "reversed":
            axis.set_inverted(True)
        if given.scaleanchor:
            ax.set(aspect="equal", anchor="E")
        if given.tickvals is not None:
            axis.set_ticks(given.tickvals, None if given.ticktext is None else [*map(_shown, given.ticktext)])
        elif isinstance(given.dtick, (int, float)) and not is_log:
            axis.set_major_locator(MultipleLocator(given.dtick))
        if given.tickformat:
            axis.set_major_formatter(f"{{x:{given.tickformat.strip('~')}}}")
        axis.set_tick_params(labelsize=11, length=3 if given.ticks else 0, label1On=given.showticklabels is not False)
        axis.set_tick_params(which="minor", length=0)
        axis.grid(given.showgrid is not False)
        axis.set_label_text(_shown(given.title.text))
        if given.zeroline:
            (ax.axvline if letter == "x" else ax.axhline)(0, color=given.zerolinecolor, linewidth=1)
        if letter == "x":
            (low, high), wide = sorted(axis.get_view_interval()), ax.get_window_extent().width
            labels = [label for label in axis.get_ticklabels() if low <= label.get_position()[0] <= high]
            touching = sum(label.get_window_extent().width + 3 for label in labels) > wide
            turned = -given.tickangle if given.tickangle is not None else 60 * touching
            for label in labels if turned else ():
                label.set(rotation=turned, ha="right", rotation_mode="anchor")

    def _around(self) -> None:
        """The legend under all that is drawn, the title over it."""
        wide, high = self.canvas.get_size_inches()
        box = self.canvas.get_tightbbox()
        labels = [label for ax in self.canvas.axes for label in ax.get_legend_handles_labels()[1]]
        if labels:
            columns = max(1, int(_WIDTH / (50 + 7 * max(map(len, labels)))))
            self.canvas.legend(loc="upper left", bbox_to_anchor=(0, box.y0 / high), ncols=columns)
        self.canvas.text(box.x0 / wide, box.y1 / high + 0.03, _shown(self.layout.title.text), size=15, va="bottom")


def _colors(given: Any, low: Number | None, high: Number | None) -> ScalarMappable:
    """A plotly colour scale between two values."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    stops = [(at, _color(shade)) for at, shade in given.colorscale or get_colorscale("Viridis")]
    return ScalarMappable(Normalize(low, high), LinearSegmentedColormap.from_list("", stops))


def _error_bars(ax: Axes, trace: Any, x: Any, y: np.ndarray, color: Any) -> None:
    up, down = trace.error_y.array, trace.error_y.arrayminus
    if up is not None:
        ends = y - np.array(up if down is None else down, float), y + np.array(up, float)
        ax.vlines(x, *ends, color=color, linewidth=1)
