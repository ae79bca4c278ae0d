"""A few numbers over loops, each a line with its interval, such as probes and effects have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from torch import Tensor

from tl_looped.viz.figure import Figure
from tl_looped.viz.style import GREY, base_layout, curve_axes, layer_colors, loop_axis, numbers, plotly_text


@dataclass(frozen=True)
class Series:
    """One line: a number for each loop.

    Attributes:
        name: in the legend; "" for a line alone.
        values: NaN is a gap.
        band: (low, high) around them.
        control: drawn dashed and grey: what the others are to be compared with.
    """

    name: str
    values: Tensor
    band: tuple[Tensor, Tensor] | None = None
    control: bool = False


def loop_series(lines: Sequence[Series], loops: Sequence[int], label: str, title: str = "") -> go.Figure:
    """Lines over loops.

    Args:
        lines: in the order of the legend; later ones are greener.
        loops: the loop of each value.
        label: what was measured, with its unit.
        title: of the figure.
    """
    fig = Figure()
    colors = iter(layer_colors(max(1, sum(not line.control for line in lines))))
    for line in lines:
        color = GREY if line.control else next(colors)
        error = None
        if line.band is not None:
            low, high = line.values - line.band[0], line.band[1] - line.values
            error = {"array": numbers(high), "arrayminus": numbers(low), "symmetric": False, "thickness": 1}
        fig.add_trace(
            go.Scatter(
                x=list(loops),
                y=numbers(line.values),
                error_y=error,
                name=line.name,
                mode="lines+markers",
                line={"color": color, "width": 2, "dash": "dash" if line.control else "solid"},
                hovertemplate="loop %{x}: %{y:.4g}<extra>" + line.name + "</extra>",
                showlegend=bool(line.name),
            )
        )
    curve_axes(fig)
    fig.update_xaxes(**loop_axis(max(loops) + 1))
    fig.update_yaxes(title={"text": label})
    return base_layout(fig, height=400, title={"text": plotly_text(title), "font": {"size": 15}})
