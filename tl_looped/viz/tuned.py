"""How well a tuned lens says what the run says at last."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from tl_looped.viz.style import base_layout, curve_axes, layer_colors, loop_axis, numbers


def lens_losses(
    direct: Float[Tensor, "loop layer"], tuned: Float[Tensor, "loop layer"], layers: Sequence[int], site: str
) -> go.Figure:
    """Two lines for each layer over loops: the direct lens dashed, the tuned lens solid.

    Args:
        direct, tuned: mean KL(run ‖ lens) on held-out texts, in nats.
        layers: which core layers they are.
        site: what is read.
    """
    fig = go.Figure()
    n_loops = len(direct)
    for i, (layer, color) in enumerate(zip(layers, layer_colors(len(layers)), strict=True)):
        what = "state" if site == "state" else f"layer {layer}"
        for name, values, dash in (("direct", direct, "dash"), ("tuned", tuned, "solid")):
            fig.add_trace(
                go.Scatter(
                    x=list(range(n_loops)),
                    y=numbers(values[:, i]),
                    name=f"{what}, {name}",
                    mode="lines+markers",
                    line={"color": color, "dash": dash, "width": 2},
                    hovertemplate=f"loop %{{x}}: %{{y:.4g}} nats<extra>{what}, {name}</extra>",
                )
            )
    curve_axes(fig)
    fig.update_xaxes(**loop_axis(n_loops))
    fig.update_yaxes(title={"text": "KL(run ‖ lens) on held-out texts, nats"}, rangemode="tozero")
    return base_layout(fig, height=400)
