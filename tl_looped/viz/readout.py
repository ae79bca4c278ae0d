"""Read-outs after every loop: which tokens, how probable, how sure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from tl_looped.viz.style import (
    BLUE,
    GREEN,
    ORANGE,
    PLOT_WIDTH,
    PROBABILITY_SCALE,
    base_layout,
    curve_axes,
    heatmap_axes,
    loop_axis,
    numbers,
    plotly_text,
    shorten,
    show_token,
    token_axis,
)

_MOST_ROWS_WITH_TEXT = 40


def readout_heatmap(
    top_probs: Float[Tensor, "loop pos top"],
    top_tokens: Sequence[Sequence[Sequence[str]]],
    tokens: Sequence[str],
    first_position: int = 0,
) -> go.Figure:
    """The most probable next token after every loop at every position.

    Args:
        top_probs: probabilities of the top tokens, the highest first.
        top_tokens: their texts, in the same order, [loop][pos][top].
        tokens: the input token at each position.
        first_position: the position of the first column, where earlier ones are left out.

    Returns:
        A heatmap: colour is the probability of the top token, the text in a cell is that token (where there is room),
        and hovering shows all of the top tokens.
    """
    n_loops, n_positions, _ = top_probs.shape
    probs = numbers(top_probs)
    heading = [f"position {first_position + j}, reads {plotly_text(token)}" for j, token in enumerate(tokens)]
    room = int(PLOT_WIDTH / n_positions / 8)  # characters that fit in a cell
    longest = max(len(show_token(top[0])) for row in top_tokens for top in row)
    written = n_loops <= _MOST_ROWS_WITH_TEXT and room >= min(3, longest)
    cells = [[plotly_text(shorten(top[0], room)) for top in row] for row in top_tokens] if written else None
    fig = go.Figure(
        go.Heatmap(
            z=[[probs[t][j][0] for j in range(n_positions)] for t in range(n_loops)],
            x=list(range(first_position, first_position + n_positions)),
            y=list(range(n_loops)),
            text=cells,
            texttemplate="%{text}" if written else None,
            textfont={"size": 12},
            customdata=[
                [[heading[j], _ranked(probs[t][j], top_tokens[t][j])] for j in range(n_positions)]
                for t in range(n_loops)
            ],
            hovertemplate="%{customdata[0]}<br>after loop %{y}:<br>%{customdata[1]}<extra></extra>",
            colorscale=PROBABILITY_SCALE,
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "probability of<br>the top token"}, "thickness": 14, "tickformat": ".0%"},
        )
    )
    fig.update_xaxes(**token_axis(tokens, first_position, title="position (label: the token read there)"))
    fig.update_yaxes(**loop_axis(n_loops, "after loop"), autorange="reversed")
    row = 26 if n_loops <= 16 else 17 if n_loops <= _MOST_ROWS_WITH_TEXT else 640 / n_loops
    base_layout(fig, height=max(240, round(row * n_loops) + 120), margin={"l": 60, "r": 20, "t": 36, "b": 70})
    heatmap_axes(fig)
    return fig


def _ranked(probs: Sequence[float | None], tokens: Sequence[str]) -> str:
    """Tokens with their probabilities, one a line, for plotly."""
    pairs = zip(probs, tokens, strict=True)
    return "<br>".join(f"{prob:7.2%}  {plotly_text(token)}" for prob, token in pairs if prob is not None)


def readout_curves(
    answer_prob: Float[Tensor, " loop"],
    answer_rank: Int[Tensor, " loop"],
    entropy: Float[Tensor, " loop"],
    kl_to_final: Float[Tensor, " loop"],
    answer: str,
) -> go.Figure:
    """How the read-out at one position settles, in three panels over loops.

    Args:
        answer_prob: probability of the answer.
        answer_rank: its rank; 1 is the top token.
        entropy: of the read-out, in nats.
        kl_to_final: KL(read-out of the last loop ‖ read-out of the loop), in nats.
        answer: the answer's text.
    """
    n_loops = len(answer_prob)
    shown = plotly_text(shorten(answer))
    fig = make_subplots(
        rows=1,
        cols=3,
        horizontal_spacing=0.09,
        subplot_titles=[
            f"Probability of {shown}",
            f"Rank of {shown} (1 = top token)",
            "Entropy, and distance to the last loop",
        ],
    )
    loops = list(range(n_loops))

    def draw(column: int, values: list[float], name: str, color: str, dash: str, symbol: str, unit: str) -> None:
        line = {"color": color, "width": 2, "dash": dash}
        marker = {"size": 7 if n_loops <= 32 else 4, "symbol": symbol}
        style = {"line": line, "marker": marker, "mode": "lines+markers", "showlegend": column == 3}
        hover = f"loop %{{x}}: %{{y:.4g}} {unit}<extra>{name}</extra>"
        fig.add_trace(go.Scatter(x=loops, y=values, name=name, hovertemplate=hover, **style), row=1, col=column)

    draw(1, numbers(answer_prob), "probability", BLUE, "solid", "circle", "")
    draw(2, numbers(answer_rank), "rank", BLUE, "solid", "circle", "")
    draw(3, numbers(entropy), "entropy", GREEN, "solid", "circle", "nats")
    draw(3, numbers(kl_to_final), "KL(last ‖ this loop)", ORANGE, "dash", "diamond", "nats")
    curve_axes(fig)
    fig.update_xaxes(**loop_axis(n_loops, "after loop"))
    fig.update_yaxes(title={"text": "probability"}, range=[-0.04, 1.04], row=1, col=1)
    top = max(2, int(answer_rank.max()))
    ranks = [rank for rank in (1, 2, 3, 5, 10, 20, 50, 100, 1_000, 10_000, 100_000) if rank <= top * 1.5]
    fig.update_yaxes(
        title={"text": "rank (log scale)"},
        type="log",
        range=[math.log10(top * 1.3), math.log10(0.85)],  # the top token is drawn at the top
        tickmode="array",
        tickvals=ranks,
        ticktext=[f"{rank:,}" for rank in ranks],
        row=1,
        col=2,
    )
    fig.update_yaxes(title={"text": "nats"}, rangemode="tozero", row=1, col=3)
    legend = {"orientation": "h", "x": 1, "y": -0.24, "xanchor": "right", "yanchor": "top"}
    return base_layout(fig, height=350, legend=legend, margin={"l": 70, "r": 20, "t": 50, "b": 80})
