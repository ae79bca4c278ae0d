"""How the state moves from loop to loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from tl_looped.engine.numbers import median
from tl_looped.viz.figure import Figure
from tl_looped.viz.style import (
    BLUE,
    GREY,
    LOOP_SCALE,
    ORANGE,
    base_layout,
    curve_axes,
    loop_axis,
    loop_colors,
    numbers,
    plotly_text,
    token_axis,
)

_LOG: dict[str, Any] = {"type": "log", "tickformat": "~g", "automargin": True}
_MOST_GREY_LINES = 64


def state_convergence(
    step: Float[Tensor, "loop pos"], cosine: Float[Tensor, "loop pos"], tokens: Sequence[str]
) -> go.Figure:
    """How far each loop moves the state, and how much it turns it; one line a position.

    Args:
        step: ‖x_{t+1} − x_t‖ / ‖x_{t+1}‖ at loop t, with x_t the state that enters the loop and x_{t+1} the one that
            leaves it.
        cosine: cosine of x_{t+1} and x_t; NaN where a state is zero.
        tokens: the token at each position.

    Returns:
        Two panels over loops: the last position and the median over positions in colour, the others in grey.
    """
    n_loops, n_positions = step.shape
    loops = list(range(n_loops))
    titles = ["How far each loop moves the state", "Direction: cosine of xₜ and xₜ₊₁"]
    fig = make_subplots(figure=Figure(), rows=1, cols=2, horizontal_spacing=0.1, subplot_titles=titles)
    for column, values in ((1, step), (2, cosine)):
        by_position = numbers(values.T)
        for j in range(max(0, n_positions - 1 - _MOST_GREY_LINES), n_positions - 1):
            name = f"position {j}: {plotly_text(tokens[j])}"
            fig.add_trace(
                go.Scatter(
                    x=loops,
                    y=by_position[j],
                    name="each other position",
                    mode="lines",
                    line={"color": GREY, "width": 1},
                    opacity=0.6,
                    legendgroup="other",
                    showlegend=column == 1 and j == n_positions - 2,
                    hovertemplate=f"loop %{{x}}: %{{y:.3g}}<extra>{name}</extra>",
                ),
                row=1,
                col=column,
            )
        for name, line, symbol, curve in (
            (
                "median over positions",
                {"color": ORANGE, "dash": "dash"},
                "diamond",
                numbers(median(values, 1)),
            ),
            ("last position", {"color": BLUE}, "circle", by_position[-1]),
        ):
            style = {"line": {"width": 2.5, **line}, "marker": {"size": 7 if n_loops <= 32 else 4, "symbol": symbol}}
            hover = f"loop %{{x}}: %{{y:.3g}}<extra>{name}</extra>"
            trace = go.Scatter(x=loops, y=curve, name=name, mode="lines+markers", hovertemplate=hover, **style)
            trace.update(legendgroup=name, showlegend=column == 1)
            fig.add_trace(trace, row=1, col=column)
    curve_axes(fig)
    fig.update_xaxes(**loop_axis(n_loops))
    fig.update_yaxes(title={"text": "relative step ‖xₜ₊₁ − xₜ‖ / ‖xₜ₊₁‖"}, **_LOG, row=1, col=1)
    fig.update_yaxes(title={"text": "cosine"}, row=1, col=2)
    legend = {"orientation": "h", "x": 0, "y": -0.24, "xanchor": "left", "yanchor": "top"}
    return base_layout(fig, height=400, legend=legend, margin={"l": 80, "r": 20, "t": 50, "b": 90})


def step_by_position(step: Float[Tensor, "loop pos"], tokens: Sequence[str]) -> go.Figure:
    """How far each loop moves the state at every position; one line a loop, later loops more yellow.

    Args:
        step: ‖x_{t+1} − x_t‖ / ‖x_{t+1}‖ at loop t, as in `state_convergence`.
        tokens: the token at each position.
    """
    n_loops, n_positions = step.shape
    positions = list(range(n_positions))
    fig = Figure()
    for t, (color, values) in enumerate(zip(loop_colors(n_loops), numbers(step), strict=True)):
        line = {"color": color, "width": 2 if n_loops <= 16 else 1}
        hover = "position %{x}: %{y:.3g}" + f"<extra>loop {t}</extra>"
        style = {"mode": "lines+markers", "line": line, "marker": {"size": 5}}
        fig.add_trace(go.Scatter(x=positions, y=values, name=f"loop {t}", hovertemplate=hover, **style))
    bar = {"title": {"text": "loop"}, "thickness": 14, **{k: v for k, v in loop_axis(n_loops).items() if k != "title"}}
    scale = {"colorscale": LOOP_SCALE, "cmin": 0, "cmax": max(n_loops - 1, 1), "color": [0], "colorbar": bar}
    fig.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=scale, hoverinfo="skip"))
    curve_axes(fig)
    fig.update_xaxes(
        **token_axis(tokens, title="position (label: the token read there)"), range=[-0.5, n_positions - 0.5]
    )
    fig.update_yaxes(title={"text": "relative step ‖xₜ₊₁ − xₜ‖ / ‖xₜ₊₁‖"}, **_LOG)
    return base_layout(fig, height=340, showlegend=False, margin={"l": 80, "r": 20, "t": 36, "b": 70})
