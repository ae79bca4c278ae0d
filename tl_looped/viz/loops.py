"""A few numbers over loops, each a line with its interval, such as probes and effects have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from torch import Tensor

from tl_looped.viz.figure import Figure
from tl_looped.viz.parts import curve
from tl_looped.viz.style import GREY, base_layout, curve_axes, heading, layer_colors, loop_axis, numbers


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
        dash = "dash" if line.control else "solid"
        look = {"x": loops, "dash": dash, "error_y": error, "showlegend": bool(line.name)}
        fig.add_trace(curve(numbers(line.values), line.name, color, **look))
    curve_axes(fig)
    fig.update_xaxes(**loop_axis(max(loops) + 1))
    fig.update_yaxes(title={"text": label})
    return base_layout(fig, height=400, title=heading(title))
