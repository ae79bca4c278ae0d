"""How attention changes from loop to loop, and what bounds the change."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.errors import InputError
from tl_looped.viz.figure import Figure
from tl_looped.viz.parts import cells
from tl_looped.viz.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    base_layout,
    curve_axes,
    heading,
    heatmap_axes,
    loop_axis,
    numbers,
)

CHANGE_SCALE = [[0.0, "#FFFFFF"], [0.25, "#FDE0C5"], [0.5, "#F0A063"], [0.75, "#C4571B"], [1.0, "#662506"]]
"""White is no change."""

_MOST_LABELS = 32


def head_changes(
    change: Float[Tensor, "loop layer head"],
    settles_at: Float[Tensor, "layer head"],
    tolerance: float,
    label: str,
    title: str = "",
    top: float | None = None,
) -> go.Figure:
    """Every head's change over loops: a row for each head, a column for each loop, a mark where it settles.

    Args:
        change: what the colours show; NaN stays empty.
        settles_at: the loop, NaN for never.
        tolerance: by which a head was judged to settle.
        label: of the colours, with <br> between lines.
        top: where the scale ends; None for the largest value.

    Raises:
        InputError: no finite value.
    """
    if not bool(change.isfinite().any()):
        raise InputError(f"{label.replace('<br>', ' ')} has no finite value, so there is nothing to draw.")
    n_loops, n_layers, n_heads = change.shape
    names = [f"layer {layer} head {head}" for layer in range(n_layers) for head in range(n_heads)]
    n_rows = len(names)
    look = {"xgap": 1 if n_loops <= 64 else 0}
    hover, bar = "%{customdata}, loop %{x}: %{z:.4g}", {"title": {"text": label}}
    says = [[name] * n_loops for name in names]
    fig = Figure(cells(change.flatten(1).T, says, hover, CHANGE_SCALE, 0, top, bar, **look))
    settled = [(row, int(loop)) for row, loop in enumerate(settles_at.flatten().tolist()) if not math.isnan(loop)]
    fig.add_trace(
        go.Scatter(
            x=[loop for _, loop in settled] or [None],
            y=[row for row, _ in settled] or [None],
            mode="markers",
            marker={"symbol": "diamond-open", "size": 9, "color": BLUE, "line": {"width": 2}},
            name=f"settles: within {tolerance:g} of the last loop from here on ({len(settled)} of {n_rows} heads)",
            showlegend=True,
            customdata=[names[row] for row, _ in settled] or [None],
            hovertemplate="%{customdata} settles at loop %{x}<extra></extra>",
        )
    )
    step = -(-n_rows // _MOST_LABELS)
    kept = list(range(0, n_rows, step))
    fig.update_yaxes(tickmode="array", tickvals=kept, ticktext=[names[row] for row in kept], autorange="reversed")
    fig.update_xaxes(**loop_axis(n_loops), range=[-0.5, n_loops - 0.5])
    legend = {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}
    height = 190 + min(max(24 * n_rows, 90), 800)
    base_layout(fig, height, title=heading(title), legend=legend, margin={"l": 120, "r": 20, "t": 80, "b": 60})
    heatmap_axes(fig)
    return fig


def bound_scatter(
    bound: Float[Tensor, "loop layer head"],
    observed: Float[Tensor, "loop layer head"],
    plain: Float[Tensor, "loop layer head"],
    limit: float,
    title: str = "",
) -> go.Figure:
    """A bound against what it bounds, both logarithmic, a point for each loop from 1 on, layer and head.

    Args:
        bound: what should not be exceeded.
        observed: of the model as it is.
        plain: of the model without what the bound ignores.
        limit: above it a bound says nothing.

    Raises:
        InputError: no point with a change and a bound above zero.
    """
    n_loops, n_layers, n_heads = bound.shape
    places = [
        f"loop {loop + 1}, layer {layer}, head {head}"
        for loop in range(n_loops)
        for layer in range(n_layers)
        for head in range(n_heads)
    ]
    fig, hidden, every = Figure(), 0, []
    for values, name, color, symbol in (
        (plain, "as the proposition has it: no rotary, biases, q/k norms", GREY, "circle"),
        (observed, "the model's own attention", ORANGE, "diamond"),
    ):
        shown = (values > 0) & (bound > 0)
        hidden += int((~shown).sum())
        x, y = values[shown], bound[shown]
        every += x.tolist() + y.tolist()
        kept = shown.flatten().tolist()
        fig.add_trace(
            go.Scatter(
                x=numbers(x),
                y=numbers(y),
                mode="markers",
                name=name,
                marker={"color": color, "size": 6, "symbol": symbol, "opacity": 0.8},
                customdata=[place for place, keep in zip(places, kept, strict=True) if keep],
                hovertemplate="%{customdata}<br>change %{x:.4g}, bound %{y:.4g}<extra></extra>",
            )
        )
    if not every:
        raise InputError("no pattern changed, so there is nothing to draw on logarithmic axes.")
    ends = [min(every), max(*every, limit)]
    dash = {"color": INK, "width": 1.5}
    fig.add_trace(go.Scatter(x=ends, y=ends, mode="lines", name="change = bound", line=dash, hoverinfo="skip"))
    fig.add_hline(y=limit, line={"color": INK, "width": 1, "dash": "dot"})
    text = "above the dotted line: further than two patterns can be apart"
    fig.add_annotation(
        text=text, x=1, y=math.log10(limit), xref="paper", xanchor="right", yanchor="bottom", showarrow=False
    )
    curve_axes(fig)
    log = {"type": "log", "exponentformat": "power", "dtick": max(1, round(math.log10(ends[1] / ends[0]) / 8))}
    note = f"; {hidden} of zero not shown" if hidden else ""
    fig.update_xaxes(title={"text": f"change of the pattern ‖Aₜ − Aₜ₋₁‖ (Frobenius norm{note})"}, **log)
    fig.update_yaxes(title={"text": "bound ½ · (2Bκ / √d_head) · ‖Xₜ − Xₜ₋₁‖"}, **log)
    legend = {"orientation": "h", "x": 0, "y": -0.16, "xanchor": "left", "yanchor": "top"}
    return base_layout(fig, 520, title=heading(title), legend=legend, margin={"l": 80, "r": 20, "t": 60, "b": 110})
