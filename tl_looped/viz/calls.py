"""Matrices over all layer calls: every (loop, layer) against every other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.errors import InputError
from tl_looped.viz.figure import Figure
from tl_looped.viz.parts import cells
from tl_looped.viz.style import INK, base_layout, heading, heatmap_axes, loop_axis

_MOST_LINES = 32  # loops up to which lines are drawn between them


def call_matrix(
    matrix: Float[Tensor, "call call"],
    loops: Sequence[int],
    layers: Sequence[int],
    title: str,
    what: str,
    unit: str,
    scale: list[list[Any]],
    bounds: tuple[float, float | None],
) -> go.Figure:
    """Loops along both axes, layers within them, lines between loops.

    Args:
        matrix: call = loop · layers + layer.
        loops, layers: which they are.
        title: of the figure.
        what: what an error calls the numbers.
        unit: at the colour bar.
        scale: the colours.
        bounds: the values at its ends; None for the largest.

    Raises:
        InputError: no finite value.
    """
    if not bool(matrix.isfinite().any()):
        raise InputError(f"{what} have no finite value, so there is nothing to draw.")
    names = [f"loop {loop}, layer {layer}" for loop in loops for layer in layers]
    width = len(layers)
    low, high = bounds
    says = [[f"{row} and {column}" for column in names] for row in names]
    bar = {"title": {"text": unit}}
    fig = Figure(cells(matrix, says, "%{customdata}: %{z:.4g}", scale, low, high, bar, xgap=0, ygap=0))
    kept = range(0, len(loops), loop_axis(len(loops))["dtick"])
    text = "loop" if width == 1 else f"loop (in each: layers {layers[0]} to {layers[-1]})"
    axis = {"tickmode": "array", "tickvals": [i * width + (width - 1) / 2 for i in kept], "title": {"text": text}}
    axis["ticktext"] = [str(loops[i]) for i in kept]
    base_layout(fig, 580, title=heading(title))
    heatmap_axes(fig)
    fig.update_xaxes(**axis, constrain="domain")
    fig.update_yaxes(**axis, autorange="reversed", scaleanchor="x", constrain="domain")
    if width > 1 and len(loops) <= _MOST_LINES:
        for i in range(1, len(loops)):
            for line in (fig.add_vline, fig.add_hline):
                line(i * width - 0.5, line={"color": INK, "width": 1})
    return fig
