"""How long steps from loop to loop are, and how they turn."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import median
from tl_looped.viz.style import BLUE, ORANGE, base_layout, curve_axes, loop_axis, numbers, plotly_text


def motion_curves(step: Float[Tensor, "loop pos"], angle: Float[Tensor, "loop pos"], title: str = "") -> go.Figure:
    """Two panels over loops: step length on a log axis, and the angle to the step before.

    Args:
        step: relative L2; zero is a gap.
        angle: radians.
        title: of the figure.

    Raises:
        InputError: no step above zero.
    """
    shown = step.masked_fill(~(step > 0), float("nan"))
    if not bool(shown.isfinite().any()):
        raise InputError("no step is above zero, so there is nothing to draw.")
    fig = make_subplots(
        rows=1, cols=2, horizontal_spacing=0.18, subplot_titles=["Length of the step", "Angle to the step before"]
    )
    loops = list(range(len(step)))
    for column, (values, unit) in enumerate(((shown, "relative L2"), (angle, "radians")), start=1):
        curves = (("last position", values[:, -1], BLUE, "solid"),)
        if values.shape[1] > 1:
            curves += (("median over positions", median(values, 1), ORANGE, "dash"),)
        for name, curve, color, dash in curves:
            fig.add_trace(
                go.Scatter(
                    x=loops,
                    y=numbers(curve),
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    line={"color": color, "width": 2, "dash": dash},
                    hovertemplate=f"loop %{{x}}: %{{y:.4g}} {unit}<extra>{name}</extra>",
                ),
                row=1,
                col=column,
            )
    fig.add_hline(y=math.pi / 2, line={"color": "#8A94A0", "width": 1, "dash": "dot"}, row=1, col=2)  # pyright: ignore[reportArgumentType]
    curve_axes(fig)
    fig.update_xaxes(**loop_axis(len(step)))
    fig.update_yaxes(title={"text": "relative L2"}, type="log", exponentformat="power", row=1, col=1)
    quarters = [i * math.pi / 4 for i in range(5)]
    names = ["0: straight on", "π/4", "π/2: orthogonal", "3π/4", "π: back"]
    fig.update_yaxes(tickmode="array", tickvals=quarters, ticktext=names, range=[-0.1, 3.25], row=1, col=2)
    legend = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}
    heading = {"text": plotly_text(title), "font": {"size": 15}}
    return base_layout(fig, 400, title=heading, legend=legend, margin={"l": 70, "r": 20, "t": 80, "b": 90})
