"""Parts of a sum, the largest first."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from tl_looped.viz.figure import Figure
from tl_looped.viz.style import BLUE, GREY, ORANGE, base_layout, heading, numbers, plotly_text


def contribution_bars(
    names: Sequence[str],
    values: Float[Tensor, "prompt component"],
    total: Float[Tensor, " prompt"],
    most: int = 24,
    title: str = "",
) -> go.Figure:
    """The largest parts, mean over prompts with the range over them, the sum of the others, and the whole.

    Args:
        names: of the components.
        values: what each adds.
        total: what they add up to.
        most: how many to show.
        title: of the figure.
    """
    mean = values.mean(0)
    shown = mean.abs().argsort(descending=True)[:most].tolist()
    rest = [i for i in range(len(names)) if i not in set(shown)]
    colors = [BLUE if float(mean[i]) >= 0 else ORANGE for i in shown]
    bars = [(str(names[i]), values[:, i], color) for i, color in zip(shown, colors, strict=True)]
    bars += [(f"{len(rest)} others", values[:, rest].sum(1), GREY)] if rest else []
    bars.append(("sum", total, "#1B2733"))
    fig = Figure()
    for name, one, color in bars:
        middle = one.mean()
        spread = {"array": numbers((one.max() - middle)[None]), "arrayminus": numbers((middle - one.min())[None])}
        fig.add_trace(
            go.Bar(
                x=[plotly_text(name)],
                y=numbers(middle[None]),
                marker={"color": color},
                error_y={**spread, "symmetric": False, "thickness": 1} if len(one) > 1 else None,
                hovertemplate="%{x}: %{y:.4g}<extra></extra>",
                showlegend=False,
            )
        )
    fig.update_xaxes(tickangle=-60, automargin=True, tickfont={"size": 11})
    fig.update_yaxes(title={"text": "logits, mean and range over prompts"}, zeroline=True, zerolinecolor=GREY)
    return base_layout(fig, height=520, title=heading(title), margin={"l": 70, "t": 50, "b": 220})
