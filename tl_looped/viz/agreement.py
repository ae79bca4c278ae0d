"""Which loops would say the same."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from tl_looped.viz.style import DARK_BLUE, PROBABILITY_SCALE, base_layout, heatmap_axes, loop_axis, numbers

_MOST_LOOPS_WITH_TEXT = 8
_KL_SCALE = [[0.0, "#FFFFFF"], [0.5, "#F3B98A"], [1.0, "#8C2D04"]]


def agreement_heatmaps(
    agreement: Float[Tensor, "loop loop"], kl: Float[Tensor, "loop loop"], loops: Sequence[int]
) -> go.Figure:
    """Two matrices over pairs of loops.

    Args:
        agreement: share of positions with the same top token.
        kl: KL(row ‖ column), in nats.
        loops: which loops they are.
    """
    fig = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.2,
        subplot_titles=["Same top token (share of positions)", "KL(row ‖ column), nats"],
    )
    names = list(loops)
    share = "loops %{customdata[0]} and %{customdata[1]}: the same at %{z:.2%}<extra></extra>"
    nats = "KL(loop %{customdata[0]} ‖ loop %{customdata[1]}) = %{z:.4g} nats<extra></extra>"
    panels = ((agreement, PROBABILITY_SCALE, 1.0, share, _share), (kl, _KL_SCALE, None, nats, _nats))
    for column, (values, scale, top, hover, written) in enumerate(panels, start=1):
        shown = numbers(values)
        fig.add_trace(
            go.Heatmap(
                z=shown,
                customdata=[[[row, other] for other in names] for row in names],
                hovertemplate=hover,
                text=[[written(value) for value in row] for row in shown],
                texttemplate="%{text}" if len(names) <= _MOST_LOOPS_WITH_TEXT else None,
                colorscale=scale,
                zmin=0,
                zmax=top,
                xgap=1,
                ygap=1,
                colorbar={
                    "thickness": 12,
                    "x": 0.41 if column == 1 else 1.0,
                    "outlinecolor": DARK_BLUE,
                    "tickformat": ".0%" if column == 1 else "",
                },
            ),
            row=1,
            col=column,
        )
    ticks = loop_axis(len(names))
    shown_ticks = list(range(0, len(names), ticks["dtick"]))
    axis = {"tickmode": "array", "tickvals": shown_ticks, "ticktext": [str(names[i]) for i in shown_ticks]}
    fig.update_xaxes(**axis, title={"text": "loop (column)"})
    fig.update_yaxes(**axis, title={"text": "loop (row)"}, autorange="reversed")
    base_layout(fig, height=420)
    heatmap_axes(fig)
    return fig


def _share(value: float | None) -> str:
    """A share in whole percents, which is not written as all where some are missing."""
    if value is None:
        return ""
    return ">99%" if 0.995 <= value < 1 else f"{value:.0%}"


def _nats(value: float | None) -> str:
    if value is None:
        return ""
    return "<0.001" if 0 < value < 0.001 else f"{value:.2g}"
