"""What early exits save and cost."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_looped.viz.style import BLUE, DARK_BLUE, GREEN, GREY, INK, ORANGE, PINK, base_layout, curve_axes

# A rule looks the same in every figure, whichever others are there.
_LOOKS = {
    "gate": (DARK_BLUE, "x"),
    "KL": (BLUE, "circle"),
    "latent difference": (ORANGE, "diamond"),
    "acceleration": (GREEN, "square"),
    "entropy": (PINK, "triangle-up"),
    "stable top token": (INK, "cross"),
}
_OTHER = (GREY, "cross")


def exit_curves(points: pd.DataFrame, n_loops: int) -> go.Figure:
    """Two panels over the mean number of loops saved: agreement with the full run, and KL to it; a line for each rule.

    Args:
        points: columns rule, unit, threshold, saved, kl (nats), agreement (a share).
        n_loops: loops of the full run.
    """
    fig = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.12,
        subplot_titles=["Same top token as the full run", "KL(full run ‖ read-out at the exit), nats"],
    )
    for rule, rows in points.groupby("rule", sort=False):
        color, symbol = _LOOKS.get(str(rule), _OTHER)
        rows = rows.sort_values(["saved", "threshold"])
        custom = rows[["threshold"]].to_numpy().tolist()
        unit = rows["unit"].iloc[0]
        for column, measure in ((1, "agreement"), (2, "kl")):
            fig.add_trace(
                go.Scatter(
                    x=rows["saved"].tolist(),
                    y=rows[measure].tolist(),
                    customdata=custom,
                    name=str(rule),
                    legendgroup=str(rule),
                    showlegend=column == 1,
                    mode="lines+markers",
                    line={"color": color, "width": 2},
                    marker={"size": 7, "symbol": symbol},
                    hovertemplate=f"threshold %{{customdata[0]:.3g}} {unit}<br>%{{x:.2f}} loops saved: %{{y:.4g}}"
                    f"<extra>{rule}</extra>",
                ),
                row=1,
                col=column,
            )
    curve_axes(fig)
    most = n_loops - 1  # a token that stops after loop 0 saves all others
    fig.update_xaxes(title={"text": f"loops saved of {n_loops}, mean over tokens"}, range=[-0.05 * most, 1.05 * most])
    lowest = min([*points["agreement"].tolist(), 0.9])
    span = [lowest - 0.05 * (1 - lowest), 1 + 0.05 * (1 - lowest)]
    fig.update_yaxes(title={"text": "share of tokens"}, range=span, tickformat=".0%", row=1, col=1)
    fig.update_yaxes(title={"text": "nats"}, rangemode="tozero", row=1, col=2)
    return base_layout(
        fig, height=400, legend={"orientation": "h", "y": -0.25}, margin={"l": 70, "r": 20, "t": 50, "b": 90}
    )
