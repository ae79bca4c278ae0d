"""How the state moves from loop to loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.numbers import median
from tl_looped.viz.figure import Figure
from tl_looped.viz.parts import curve, explain_colors, panels
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
    titles = ["How far each loop moves the state", "Direction: cosine of xₜ and xₜ₊₁"]
    fig = panels(titles, horizontal_spacing=0.1)
    for column, values in ((1, step), (2, cosine)):
        by_position = numbers(values.T)
        for j in range(max(0, n_positions - 1 - _MOST_GREY_LINES), n_positions - 1):
            hover = f"loop %{{x}}: %{{y:.3g}}<extra>position {j}: {plotly_text(tokens[j])}</extra>"
            look = {"width": 1, "size": 0, "opacity": 0.6, "hovertemplate": hover, "legendgroup": "other"}
            shown = column == 1 and j == n_positions - 2
            line = curve(by_position[j], "each other position", GREY, **look, showlegend=shown)
            fig.add_trace(line, row=1, col=column)
        for name, color, dash, symbol, y in (
            ("median over positions", ORANGE, "dash", "diamond", numbers(median(values, 1))),
            ("last position", BLUE, "solid", "circle", by_position[-1]),
        ):
            look = {"dash": dash, "width": 2.5, "symbol": symbol, "size": 7 if n_loops <= 32 else 4}
            look |= {"legendgroup": name, "showlegend": column == 1}
            fig.add_trace(curve(y, name, color, "loop %{x}: %{y:.3g}", **look), row=1, col=column)
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
    fig = Figure()
    for t, (color, values) in enumerate(zip(loop_colors(n_loops), numbers(step), strict=True)):
        width = 2 if n_loops <= 16 else 1
        fig.add_trace(curve(values, f"loop {t}", color, "position %{x}: %{y:.3g}", width=width, size=5))
    explain_colors(fig, LOOP_SCALE, n_loops - 1)
    curve_axes(fig)
    fig.update_xaxes(
        **token_axis(tokens, title="position (label: the token read there)"), range=[-0.5, n_positions - 0.5]
    )
    fig.update_yaxes(title={"text": "relative step ‖xₜ₊₁ − xₜ‖ / ‖xₜ₊₁‖"}, **_LOG)
    return base_layout(fig, height=340, showlegend=False, margin={"l": 80, "r": 20, "t": 36, "b": 70})
