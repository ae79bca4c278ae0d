"""Curves of many models side by side, a panel for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from tl_looped.viz.parts import curve, panels
from tl_looped.viz.style import BLUE, GREEN, ORANGE, PINK, base_layout, curve_axes, loop_axis, numbers, plotly_text

_COLORS, _DASHES = (BLUE, ORANGE, GREEN, PINK), ("solid", "dash", "dot", "dashdot")
_LOWEST = 1e-8  # below it is rounding, and the last loop's distance to itself


def study_panels(
    curves: Float[Tensor, "curve loop"],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    colors: Sequence[str],
    names: Sequence[str],
    label: str,
) -> go.Figure:
    """Curves over loops on a logarithmic axis, in a grid of panels.

    Args:
        curves: one for each model; what is not above 1e-8 is not drawn.
        columns, rows: the panel of each.
        colors: the group of each, which gives its colour and dash, and one entry of the legend.
        names: what each says when hovered over.
        label: of the axis.
    """
    across, down, groups = (list(dict.fromkeys(kind)) for kind in (columns, rows, colors))
    titles = [plotly_text(f"{column}, {row}") for row in down for column in across]
    spacing = {"horizontal_spacing": 0.03, "vertical_spacing": 0.12}
    fig = panels(titles, len(across), shared_xaxes=True, shared_yaxes=True, **spacing)
    shown: set[str] = set()
    for values, column, row, group, name in zip(numbers(curves), columns, rows, colors, names, strict=True):
        index = groups.index(group)
        look = {"dash": _DASHES[index % len(_DASHES)], "width": 1.6, "size": 0, "showlegend": group not in shown}
        look |= {"hovertemplate": f"loop %{{x}}: %{{y:.3g}}<extra>{plotly_text(name)}</extra>", "legendgroup": group}
        y = [value if value is not None and value > _LOWEST else None for value in values]
        line = curve(y, plotly_text(group), _COLORS[index % len(_COLORS)], **look)
        fig.add_trace(line, row=down.index(row) + 1, col=across.index(column) + 1)
        shown.add(group)
    legend: dict[str, Any] = {"orientation": "h", "x": 0, "y": -0.12, "yanchor": "top"}
    base_layout(fig, height=90 + 280 * len(down), legend=legend, margin={"l": 80, "r": 20, "t": 64, "b": 80})
    curve_axes(fig)
    axis = loop_axis(curves.shape[1])
    fig.update_xaxes(tick0=axis["tick0"], dtick=axis["dtick"])
    fig.update_xaxes(title={"text": "loop"}, row=len(down))
    fig.update_yaxes(matches="y", type="log", exponentformat="power", dtick=1, automargin=True)
    for row in range(len(down)):
        fig.update_yaxes(title={"text": label, "standoff": 8}, row=row + 1, col=1)
    return fig
