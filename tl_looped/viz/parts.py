"""What several figures are made of: curves, cells, panels, and a bar for the colours of lines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from tl_looped.viz.figure import Figure
from tl_looped.viz.style import loop_axis, numbers

Number = int | float
PER_LOOP = "loop %{x}: %{y:.4g}"
"""What a point over loops says."""


def panels(titles: Sequence[str], columns: int | None = None, **spacing: Any) -> go.Figure:
    """Plots with their titles: all beside each other, or so many in a row."""
    across = columns or len(titles)
    rows = -(-len(titles) // across)
    return make_subplots(figure=Figure(), rows=rows, cols=across, subplot_titles=titles, **spacing)


def curve(
    y: Sequence[Any],
    name: str,
    color: str,
    hover: str = PER_LOOP,
    *,
    x: Sequence[Any] | None = None,
    dash: str = "solid",
    width: Number = 2,
    symbol: str = "circle",
    size: int = 6,
    **look: Any,
) -> go.Scatter:
    """A line with its points marked.

    Args:
        y: None is a gap.
        name: in the legend and beside what a point says.
        color: of line and points.
        hover: what a point says.
        x: None for loops from 0 on.
        dash, width: of the line.
        symbol, size: of the points, in pixels; with 0 they are not marked.
        look: plotly's options.
    """
    return go.Scatter(
        x=list(range(len(y)) if x is None else x),
        y=list(y),
        name=name,
        mode="lines+markers" if size else "lines",
        line={"color": color, "width": width, "dash": dash},
        marker={"color": color, "size": size, "symbol": symbol},
        **{"hovertemplate": f"{hover}<extra>{name}</extra>", **look},
    )


def add_band(fig: go.Figure, x: Sequence[Any], low: Sequence[Any], high: Sequence[Any], color: str) -> None:
    """What lies between two curves: a closed shape for every stretch without a gap."""
    points = zip(x, low, high, strict=True)
    for whole, stretch in groupby(points, lambda point: None not in point):
        across, below, above = zip(*stretch, strict=True)
        if whole and len(across) > 1:
            look = {"fill": "toself", "fillcolor": color, "opacity": 0.15, "mode": "none", "hoverinfo": "skip"}
            fig.add_trace(go.Scatter(x=across + across[::-1], y=below + above[::-1], showlegend=False, **look))


def cells(
    values: Float[Tensor, "row column"],
    says: Sequence[Sequence[Any]] | None,
    hover: str,
    scale: list[list[Any]] | None,
    low: Number | None,
    high: Number | None,
    bar: dict[str, Any] | None = None,
    **look: Any,
) -> go.Heatmap:
    """A heatmap, its first row below: axes that count cells from 0.

    Args:
        values: NaN stays empty.
        says: of each cell, for `hover`.
        hover: what a cell says.
        scale: the colours.
        low, high: values at its ends; None for the smallest and the largest.
        bar: plotly's options of the colour bar.
        look: and of the heatmap.
    """
    rows, columns = values.shape
    return go.Heatmap(
        z=numbers(values),
        x=list(range(columns)),
        y=list(range(rows)),
        customdata=says,
        hovertemplate=f"{hover}<extra></extra>",
        colorscale=scale,
        zmin=low,
        zmax=high,
        colorbar={"thickness": 14, **(bar or {})},
        **{"xgap": 1, "ygap": 1, **look},
    )


def explain_colors(fig: go.Figure, scale: list[list[Any]], last: int, what: str = "loop") -> None:
    """A bar that says which line has which colour, from 0 to the last; a trace without points carries it."""
    bar = {"title": {"text": what}, "thickness": 14, "tick0": 0, "dtick": loop_axis(last + 1)["dtick"]}
    marker = {"colorscale": scale, "cmin": 0, "cmax": max(last, 1), "color": [0], "colorbar": bar}
    fig.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, hoverinfo="skip", showlegend=False))
