"""Read-outs after every loop: which tokens, how probable, how sure, how far they agree, and what exits cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.viz.figure import Figure
from tl_looped.viz.parts import PER_LOOP, cells, curve, panels
from tl_looped.viz.style import (
    BLUE,
    DARK_BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    PLOT_WIDTH,
    PROBABILITY_SCALE,
    base_layout,
    curve_axes,
    heatmap_axes,
    layer_colors,
    loop_axis,
    numbers,
    plotly_text,
    shorten,
    show_token,
    token_axis,
)

_MOST_ROWS_WITH_TEXT = 40
_MOST_LOOPS_WITH_TEXT = 8
_NATS_SCALE = [[0.0, "#FFFFFF"], [0.5, "#F3B98A"], [1.0, "#8C2D04"]]
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
    fig.update_yaxes(**_counted("loop" if place else "after loop", passed), autorange="reversed")
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
    fig.update_yaxes(**_counted("loop", loops), autorange="reversed")
    return _titled(fig, title)


def _titled(fig: go.Figure, title: str) -> go.Figure:
    return fig.update_layout(title={"text": plotly_text(title), "font": {"size": 14}}) if title else fig


def _counted(title: str, loops: Sequence[int]) -> dict[str, Any]:
    """An axis of a heatmap: cells are counted, their labels are the loops."""
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
    texts = [[plotly_text(shorten(top[0], room)) for top in row] for row in top_tokens]
    look = {"text": texts, "texttemplate": "%{text}", "textfont": {"size": 12}} if written else {}
    says = [[[headings[i][j], _ranked(probs[i][j], top_tokens[i][j])] for j in range(n_columns)] for i in range(n_rows)]
    hover = "%{customdata[0]}<br>%{customdata[1]}"
    bar = {"title": {"text": "probability of<br>the top token"}, "tickformat": ".0%"}
    fig = Figure(cells(top_probs[..., 0], says, hover, PROBABILITY_SCALE, 0, 1, bar, **look))
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
    titles = (f"Probability of {shown}", f"Rank of {shown} (0 = top token)", "Entropy, and distance to the last loop")
    fig = panels(titles, horizontal_spacing=0.09)
    for column, values, name, color, dash, symbol, unit in (
        (1, answer_prob, "probability", BLUE, "solid", "circle", ""),
        (2, answer_rank, "rank", BLUE, "solid", "circle", ""),
        (3, entropy, "entropy", GREEN, "solid", "circle", "nats"),
        (3, kl_to_final, "KL(last ‖ this loop)", ORANGE, "dash", "diamond", "nats"),
    ):
        look = {"dash": dash, "symbol": symbol, "size": 7 if n_loops <= 32 else 4, "customdata": numbers(values)}
        y = numbers(1 + values if name == "rank" else values)  # a logarithmic axis has no place for 0
        line = curve(y, name, color, f"loop %{{x}}: %{{customdata:.4g}} {unit}", **look, showlegend=column == 3)
        fig.add_trace(line, row=1, col=column)
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


def agreement_heatmaps(
    agreement: Float[Tensor, "loop loop"], kl: Float[Tensor, "loop loop"], loops: Sequence[int]
) -> go.Figure:
    """Two matrices over pairs of loops.

    Args:
        agreement: share of positions with the same top token.
        kl: KL(row ‖ column), in nats.
        loops: which loops they are.
    """
    fig = panels(["Same top token (share of positions)", "KL(row ‖ column), nats"], horizontal_spacing=0.2)
    names = list(loops)
    share = "loops %{customdata[0]} and %{customdata[1]}: the same at %{z:.2%}"
    nats = "KL(loop %{customdata[0]} ‖ loop %{customdata[1]}) = %{z:.4g} nats"
    sides = (
        (agreement, PROBABILITY_SCALE, 1.0, share, _share, {"x": 0.41, "tickformat": ".0%"}),
        (kl, _NATS_SCALE, None, nats, _nats, {"x": 1.0}),
    )
    says = [[[row, other] for other in names] for row in names]
    template = "%{text}" if len(names) <= _MOST_LOOPS_WITH_TEXT else None
    for column, (values, scale, top, hover, written, bar) in enumerate(sides, start=1):
        texts = [[written(value) for value in row] for row in numbers(values)]
        bar |= {"thickness": 12, "outlinecolor": DARK_BLUE}
        heat = cells(values, says, hover, scale, 0, top, bar, text=texts, texttemplate=template)
        fig.add_trace(heat, row=1, col=column)
    fig.update_xaxes(**_counted("loop (column)", names))
    fig.update_yaxes(**_counted("loop (row)", names), autorange="reversed")
    base_layout(fig, height=420)
    heatmap_axes(fig)
    return fig


def _share(value: float | None) -> str:
    """A share in whole percents, which is not written as all where some are missing."""
    return "" if value is None else ">99%" if 0.995 <= value < 1 else f"{value:.0%}"


def _nats(value: float | None) -> str:
    return "" if value is None else "<0.001" if 0 < value < 0.001 else f"{value:.2g}"


def exit_curves(points: pd.DataFrame, n_loops: int) -> go.Figure:
    """Two panels over the mean number of loops saved: agreement with the full run, and KL to it; a line for each rule.

    Args:
        points: columns rule, unit, threshold, saved, kl (nats), agreement (a share).
        n_loops: loops of the full run.
    """
    fig = panels(
        ["Same top token as the full run", "KL(full run ‖ read-out at the exit), nats"], horizontal_spacing=0.12
    )
    for rule, rows in points.groupby("rule", sort=False):
        rows = rows.sort_values(["saved", "threshold"])
        hover = f"threshold %{{customdata[0]:.3g}} {rows['unit'].iloc[0]}<br>%{{x:.2f}} loops saved: %{{y:.4g}}"
        color, symbol = _LOOKS.get(str(rule), _OTHER)
        for column, measure in ((1, "agreement"), (2, "kl")):
            look = {"x": rows["saved"].tolist(), "symbol": symbol, "size": 7, "legendgroup": rule}
            look |= {"customdata": rows[["threshold"]].to_numpy().tolist(), "showlegend": column == 1}
            fig.add_trace(curve(rows[measure].tolist(), str(rule), color, hover, **look), row=1, col=column)
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


def lens_losses(
    direct: Float[Tensor, "loop layer"], tuned: Float[Tensor, "loop layer"], layers: Sequence[int], site: str
) -> go.Figure:
    """Two lines for each layer over loops: the direct lens dashed, the tuned lens solid.

    Args:
        direct, tuned: mean KL(run ‖ lens) on held-out prompts, in nats.
        layers: which core layers they are.
        site: what is read.
    """
    fig = Figure()
    n_loops = len(direct)
    for i, (layer, color) in enumerate(zip(layers, layer_colors(len(layers)), strict=True)):
        what = "state" if site == "state" else f"layer {layer}"
        for name, values, dash in (("direct", direct, "dash"), ("tuned", tuned, "solid")):
            fig.add_trace(curve(numbers(values[:, i]), f"{what}, {name}", color, f"{PER_LOOP} nats", dash=dash))
    curve_axes(fig)
    fig.update_xaxes(**loop_axis(n_loops))
    fig.update_yaxes(title={"text": "KL(run ‖ lens) on held-out prompts, nats"}, rangemode="tozero")
    return base_layout(fig, height=400)


def lens_curves(
    means: Float[Tensor, "measure lens place"],
    low: Float[Tensor, "measure lens place"],
    high: Float[Tensor, "measure lens place"],
    kinds: Sequence[str],
    places: Sequence[tuple[int, int | None]],
    title: str,
) -> go.Figure:
    """Three panels over places in the order of the run, a line with intervals for each lens.

    Args:
        means, low, high: of the share of equal top tokens, the KL in nats, and the rank of the run's top token.
        kinds: the lenses.
        places: (loop, layer) of each place; a layer of None for the state.
        title: of the figure.
    """
    titles = ("Same top token (share)", "KL(run ‖ lens), nats", "Rank of the run's top token")
    fig = panels(titles, horizontal_spacing=0.08)
    names = [f"loop {loop}" if layer is None else f"loop {loop}, layer {layer}" for loop, layer in places]
    symbols = ("circle", "diamond", "square", "cross", "x")
    for which, (kind, color) in enumerate(zip(kinds, (INK, BLUE, ORANGE, GREEN, PINK), strict=False)):
        for panel in range(3):
            of, below, above = (values[panel, which] for values in (means, low, high))
            line = curve(numbers(of), kind, color, "%{customdata}: %{y:.4g}", symbol=symbols[which])
            ends = {"array": numbers(above - of), "arrayminus": numbers(of - below), "symmetric": False}
            line.update(customdata=names, legendgroup=kind, showlegend=panel == 0, error_y={**ends, "thickness": 1})
            fig.add_trace(line, row=1, col=panel + 1)
    curve_axes(fig)
    first = {loop: i for i, (loop, _) in reversed(list(enumerate(places)))}
    shown = dict(sorted(first.items())[:: max(1, len(first) // 8)])
    fig.update_xaxes(
        title={"text": "loop"}, tickmode="array", tickvals=list(shown.values()), ticktext=[str(t) for t in shown]
    )
    fig.update_yaxes(range=[-0.04, 1.04], tickformat=".0%", row=1, col=1)
    fig.update_yaxes(rangemode="tozero", row=1, col=2)
    fig.update_yaxes(rangemode="tozero", row=1, col=3)
    legend = {"orientation": "h", "x": 1, "y": -0.22, "xanchor": "right", "yanchor": "top"}
    base_layout(fig, height=380, legend=legend, margin={"l": 70, "r": 20, "t": 70, "b": 80})
    return fig.update_layout(title={"text": plotly_text(title), "font": {"size": 14}})
