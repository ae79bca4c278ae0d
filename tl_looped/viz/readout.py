"""Read-outs after every loop: which tokens, how probable, how sure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
PLACES = {
    "resid_pre": "entering core layer",
    "resid_mid": "between attention and MLP of core layer",
    "resid_post": "leaving core layer",
}
"""Where in a loop a residual stream is, in words that a layer's number follows."""


def readout_heatmap(
    top_probs: Float[Tensor, "loop pos top"],
    top_tokens: Sequence[Sequence[Sequence[str]]],
    tokens: Sequence[str],
    positions: Sequence[int] | None = None,
    loops: Sequence[int] | None = None,
    place: str = "",
) -> go.Figure:
    """The most probable next token after every loop at every position.

    Args:
        top_probs: probabilities of the top tokens, the highest first.
        top_tokens: their texts, in the same order, [loop][pos][top].
        tokens: the input token at each position.
        positions: the positions, where not all are shown.
        loops: the loops, where not all are shown.
        place: what is read, such as "leaving core layer 2"; empty for the state that leaves each loop.

    Returns:
        A heatmap: colour is the probability of the top token, the text in a cell is that token (where there is room),
        and hovering shows all of the top tokens.
    """
    n_loops, n_positions, _ = top_probs.shape
    places = list(range(n_positions)) if positions is None else list(positions)
    passed = list(range(n_loops)) if loops is None else list(loops)
    headings = [
        [
            f"position {position}, reads {plotly_text(token)}<br>"
            + (f"loop {t}, {place}:" if place else f"after loop {t}:")
            for position, token in zip(places, tokens, strict=True)
        ]
        for t in passed
    ]
    fig = _top_token_cells(top_probs, top_tokens, headings)
    fig.update_xaxes(**token_axis(tokens, title="position (label: the token read there)"))
    fig.update_yaxes(**_row_axis("loop" if place else "after loop", passed), autorange="reversed")
    return _titled(fig, place)


def lens_heatmap(
    top_probs: Float[Tensor, "loop layer top"],
    top_tokens: Sequence[Sequence[Sequence[str]]],
    loops: Sequence[int],
    layers: Sequence[int],
    site: str,
    title: str,
) -> go.Figure:
    """The most probable next token at one position, for every loop and core layer.

    Args:
        top_probs: probabilities of the top tokens, the highest first.
        top_tokens: their texts, in the same order, [loop][layer][top].
        loops, layers: which they are.
        site: the residual stream that is read.
        title: which position it is.
    """
    headings = [[f"loop {t}, {PLACES[site]} {layer}:" for layer in layers] for t in loops]
    fig = _top_token_cells(top_probs, top_tokens, headings)
    columns = list(range(len(layers)))
    fig.update_xaxes(
        title={"text": PLACES[site]}, tickmode="array", tickvals=columns, ticktext=[str(n) for n in layers]
    )
    fig.update_yaxes(**_row_axis("loop", loops), autorange="reversed")
    return _titled(fig, title)


def _titled(fig: go.Figure, title: str) -> go.Figure:
    return fig.update_layout(title={"text": plotly_text(title), "font": {"size": 14}}) if title else fig


def _row_axis(title: str, loops: Sequence[int]) -> dict[str, Any]:
    """Rows are counted; their labels are the loops."""
    ticks = loop_axis(len(loops), title)
    shown = list(range(0, len(loops), ticks["dtick"]))
    return {"title": ticks["title"], "tickmode": "array", "tickvals": shown, "ticktext": [str(loops[i]) for i in shown]}


def _top_token_cells(
    top_probs: Float[Tensor, "row column top"],
    top_tokens: Sequence[Sequence[Sequence[str]]],
    headings: Sequence[Sequence[str]],
) -> go.Figure:
    """Cells coloured by the probability of the top token, with its text where there is room."""
    n_rows, n_columns, _ = top_probs.shape
    probs = numbers(top_probs)
    room = int(PLOT_WIDTH / n_columns / 8)  # characters that fit in a cell
    longest = max(len(show_token(top[0])) for row in top_tokens for top in row)
    written = n_rows <= _MOST_ROWS_WITH_TEXT and room >= min(3, longest)
    fig = go.Figure(
        go.Heatmap(
            z=[[cell[0] for cell in row] for row in probs],
            x=list(range(n_columns)),
            y=list(range(n_rows)),
            text=[[plotly_text(shorten(top[0], room)) for top in row] for row in top_tokens] if written else None,
            texttemplate="%{text}" if written else None,
            textfont={"size": 12},
            customdata=[
                [[headings[i][j], _ranked(probs[i][j], top_tokens[i][j])] for j in range(n_columns)]
                for i in range(n_rows)
            ],
            hovertemplate="%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
            colorscale=PROBABILITY_SCALE,
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "probability of<br>the top token"}, "thickness": 14, "tickformat": ".0%"},
        )
    )
    row = 26 if n_rows <= 16 else 17 if n_rows <= _MOST_ROWS_WITH_TEXT else 640 / n_rows
    base_layout(fig, height=max(240, round(row * n_rows) + 120), margin={"l": 60, "r": 20, "t": 36, "b": 70})
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
        answer_rank: its rank; 0 is the top token.
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
            f"Rank of {shown} (0 = top token)",
            "Entropy, and distance to the last loop",
        ],
    )
    loops = list(range(n_loops))

    def draw(column: int, values: list[float], name: str, color: str, dash: str, symbol: str, unit: str) -> None:
        line = {"color": color, "width": 2, "dash": dash}
        marker = {"size": 7 if n_loops <= 32 else 4, "symbol": symbol}
        style = {"line": line, "marker": marker, "mode": "lines+markers", "showlegend": column == 3}
        hover = f"loop %{{x}}: %{{customdata:.4g}} {unit}<extra>{name}</extra>"
        # A logarithmic axis has no place for rank 0.
        y = [1 + value for value in values] if name == "rank" else values
        trace = go.Scatter(x=loops, y=y, customdata=values, name=name, hovertemplate=hover, **style)
        fig.add_trace(trace, row=1, col=column)

    draw(1, numbers(answer_prob), "probability", BLUE, "solid", "circle", "")
    draw(2, numbers(answer_rank), "rank", BLUE, "solid", "circle", "")
    draw(3, numbers(entropy), "entropy", GREEN, "solid", "circle", "nats")
    draw(3, numbers(kl_to_final), "KL(last ‖ this loop)", ORANGE, "dash", "diamond", "nats")
    curve_axes(fig)
    fig.update_xaxes(**loop_axis(n_loops, "after loop"))
    fig.update_yaxes(title={"text": "probability"}, range=[-0.04, 1.04], row=1, col=1)
    top = 1 + max(1, int(answer_rank.max()))
    ranks = [rank for rank in (0, 1, 2, 5, 10, 20, 50, 100, 1_000, 10_000, 100_000) if rank < top * 1.5]
    fig.update_yaxes(
        title={"text": "rank (log scale)"},
        type="log",
        range=[math.log10(top * 1.3), math.log10(0.85)],  # the top token is drawn at the top
        tickmode="array",
        tickvals=[1 + rank for rank in ranks],
        ticktext=[f"{rank:,}" for rank in ranks],
        row=1,
        col=2,
    )
    fig.update_yaxes(title={"text": "nats"}, rangemode="tozero", row=1, col=3)
    legend = {"orientation": "h", "x": 1, "y": -0.24, "xanchor": "right", "yanchor": "top"}
    return base_layout(fig, height=350, legend=legend, margin={"l": 70, "r": 20, "t": 50, "b": 80})
