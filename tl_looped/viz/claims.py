"""Effects with their intervals, beside those of a null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from tl_looped.viz.figure import Figure
from tl_looped.viz.style import BLUE, GREY, base_layout, curve_axes, heading, plotly_text


def claim_intervals(rows: Sequence[Mapping[str, Any]], title: str = "") -> go.Figure:
    """A point with its interval for each effect, and the null's mean and range beside it.

    Args:
        rows: of each: effect, value, low, high, null, null_low, null_high.
        title: of the figure.
    """
    fig = Figure()
    sides = (("model", BLUE, ("value", "low", "high")), ("random weights", GREY, ("null", "null_low", "null_high")))
    names = [f"{row['claim']}: {plotly_text(str(row['effect']))}" for row in rows]
    for i, (name, color, (middle, low, high)) in enumerate(sides):
        fig.add_trace(
            go.Scatter(
                x=[place + 0.2 * i for place in range(len(rows))],
                y=[row[middle] for row in rows],
                error_y={
                    "array": [row[high] - row[middle] for row in rows],
                    "arrayminus": [row[middle] - row[low] for row in rows],
                    "symmetric": False,
                },
                name=name,
                mode="markers",
                marker={"color": color, "size": 9},
                text=names,
                hovertemplate="%{text}: %{y:.3g}<extra>" + name + "</extra>",
            )
        )
    curve_axes(fig)
    fig.update_xaxes(tickmode="array", tickvals=list(range(len(rows))), ticktext=names, tickangle=-40, automargin=True)
    fig.update_yaxes(title={"text": "effect (each in its own unit)"})
    return base_layout(fig, height=460, title=heading(title), margin={"l": 70, "t": 50, "b": 160})
