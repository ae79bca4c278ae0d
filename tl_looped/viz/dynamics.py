"""How states move from loop to loop, where they end, and how fast."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import median, quantile
from tl_looped.viz.calls import call_matrix
from tl_looped.viz.figure import Figure
from tl_looped.viz.parts import add_band, curve, explain_colors, panels
from tl_looped.viz.patching import EFFECT_SCALE
from tl_looped.viz.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LOOP_SCALE,
    ORANGE,
    PINK,
    base_layout,
    curve_axes,
    heading,
    layer_colors,
    loop_axis,
    loop_colors,
    numbers,
    plotly_text,
    shorten,
)

_HIGH_SCALE = [[0.0, "#FFFFFF"], [0.5, "#F4A582"], [0.8, "#B2182B"], [1.0, "#4A0612"]]
_BEHAVIOUR_COLORS = (BLUE, ORANGE, GREEN, PINK, GREY)
_VERDICT_COLORS = (BLUE, "#56B4E9", ORANGE, GREEN, "#F0E442", PINK, GREY)
_MOST_LINES = 60  # of a kind, in one figure
_MOST_IN_LEGEND = 10
_BELOW = {"orientation": "h", "x": 0, "y": -0.2, "xanchor": "left", "yanchor": "top"}


def _gaps(values: Tensor) -> list[Any]:
    """Numbers for a logarithmic axis: what is not above zero is a gap."""
    return numbers(torch.where(values > 0, values, float("nan")))


def _over_loops(fig: go.Figure, n_loops: int, level: float, height: int, title: str) -> go.Figure:
    """The layout of curves over loops, with a dashed line at a level that they are judged by."""
    fig.add_hline(y=level, line={"color": INK, "width": 1.5, "dash": "dash"})
    curve_axes(fig)
    fig.update_xaxes(**loop_axis(n_loops), range=[-0.5, n_loops - 0.5])
    return base_layout(fig, height, title=heading(title), legend=_BELOW, showlegend=True, margin={"l": 95, "b": 100})


def _within(fig: go.Figure, curves: Sequence[Tensor], tolerance: float, what: str, label: str, title: str) -> go.Figure:
    """The layout of distances over loops on a logarithmic axis, with a line at the tolerance.

    Raises:
        InputError: no distance above zero.
    """
    shown = [curve[(curve > 0) & curve.isfinite()] for curve in curves]
    ends = [tolerance, *(float(end) for some in shown if some.numel() for end in some.aminmax())]
    if len(ends) == 1:
        raise InputError(f"{what} has no value above zero, so there is nothing to draw.")
    decades = math.log10(max(ends) / min(ends))
    note = {"text": f"tolerance {tolerance:g}", "x": 1, "xref": "paper", "xanchor": "right", "yanchor": "bottom"}
    fig.add_annotation(y=math.log10(tolerance), showarrow=False, **note)
    _over_loops(fig, len(curves[0]), tolerance, 420, title)
    tick = max(1, round(decades / 8)) if decades > 1 else "D2"
    fig.update_yaxes(title={"text": label}, type="log", exponentformat="power", dtick=tick)
    return fig


def convergence_curves(
    distances: Float[Tensor, "loop layer token"],
    converged: Float[Tensor, "layer token"],
    tolerance: float,
    layered: bool,
    title: str = "",
) -> go.Figure:
    """Distance to the end over loops: a line for each layer, the median over tokens, with the range of the middle 80 %.

    Args:
        distances: NaN throughout for a token that is not defined. Zero (the last loop's to itself) is a gap.
        converged: 1.0, 0.0 or NaN, for the legend.
        tolerance: drawn as a line.
        layered: whether the middle axis is layers, or of size one without a meaning.

    Raises:
        InputError: no distance above zero.
    """
    n_loops, n_layers, n_tokens = distances.shape
    low, middle, high = (quantile(distances, q) for q in (0.1, 0.5, 0.9))
    colors, fig = layer_colors(n_layers) if layered else [BLUE], Figure()
    for layer in range(n_layers):
        judged = converged[layer][~converged[layer].isnan()]
        name = f"layer {layer}" if layered else "distance"
        verdict = f"{int(judged.sum())} of {len(judged)} converged"
        if n_tokens > 1 and n_layers <= 6:
            add_band(fig, range(n_loops), _gaps(low[:, layer]), _gaps(high[:, layer]), colors[layer])
        look = {"size": 6 if n_loops <= 32 else 3, "showlegend": n_layers <= 2 * _MOST_IN_LEGEND}
        fig.add_trace(curve(_gaps(middle[:, layer]), f"{name}: {verdict}", colors[layer], **look))
    label = "distance to the last loop" + (" (median,<br>band: middle 80 % of tokens)" if n_tokens > 1 else "")
    return _within(fig, (low, high), tolerance, "distances", label, title)


def similarity_heatmap(
    matrix: Float[Tensor, "call call"], loops: Sequence[int], layers: Sequence[int], title: str = ""
) -> go.Figure:
    """Cosine between all layer calls: loops along both axes, layers within them, lines between loops.

    Args:
        matrix: call = loop · layers + layer. Where a cosine is negative, white is 0 and the scale goes from -1 to 1.
        loops, layers: which they are.

    Raises:
        InputError: no finite value.
    """
    finite = matrix[matrix.isfinite()]
    low = float(finite.min()) if len(finite) else 0.0
    scale, bottom = (EFFECT_SCALE, -1.0) if low < 0 else (_HIGH_SCALE, math.floor(low * 10) / 10 if low > 0.5 else 0.0)
    return call_matrix(matrix, loops, layers, title, "the similarities", "cosine", scale, (bottom, 1.0))


def cycle_histogram(smallest: Float[Tensor, " token"], threshold: float, title: str = "") -> go.Figure:
    """Smallest cosines between the layers' fixed points: how many tokens have which.

    Args:
        smallest: NaN for a token without fixed points; they are counted in a note.
        threshold: from which on the points count as one, drawn as a line.

    Raises:
        InputError: no token has fixed points.
    """
    defined = smallest[~smallest.isnan()]
    if not len(defined):
        raise InputError("no token has fixed points in all layers, so there is no cycle to draw.")
    low = min(float(defined.min()), threshold)
    size = max((1 - low) / 40, 1e-6)
    bins = {"start": threshold - math.ceil((threshold - low) / size) * size, "end": 1 + size, "size": size}
    fig = Figure(
        go.Histogram(
            x=numbers(defined), xbins=bins, marker={"color": BLUE}, hovertemplate="%{y} tokens near %{x}<extra></extra>"
        )
    )
    fig.add_vline(x=threshold, line={"color": INK, "width": 1.5, "dash": "dash"})
    fig.add_annotation(
        text=f"degenerate from {threshold:g} on",
        x=threshold,
        y=1,
        yref="paper",
        xanchor="right",
        yanchor="bottom",
        showarrow=False,
    )
    curve_axes(fig)
    missing = len(smallest) - len(defined)
    without = f"; {missing} of {len(smallest)} tokens have no fixed points" if missing else ""
    fig.update_xaxes(title={"text": f"smallest cosine of layer 0's fixed point and another layer's{without}"})
    fig.update_xaxes(range=[bins["start"] - size / 2, 1 + size / 2])
    fig.update_yaxes(title={"text": "tokens"})
    return base_layout(fig, 340, title=heading(title), margin={"t": 70})


def trajectory_figure(
    scores: Float[Tensor, "loop layer token component"],
    explained: Float[Tensor, " component"],
    positions: Sequence[int],
    tokens: Sequence[str],
    title: str = "",
) -> go.Figure:
    """The path of latent states in their first two principal components, a panel for each token.

    A line for each loop, from the layer before it (the last of the loop before) through its own layers: later loops are
    more yellow. The last loop's cycle is closed, in black below the other lines, with the numbers of its layers.

    Args:
        scores: coordinates; all panels have the same components.
        explained: share of the variance along each.
        positions, tokens: what the panels show.
    """
    n_loops, _, n_tokens, _ = scores.shape
    names = [f"position {p}: {plotly_text(shorten(token))}" for p, token in zip(positions, tokens, strict=True)]
    columns = min(n_tokens, 3)
    rows = -(-n_tokens // columns)
    fig = panels(names, columns, horizontal_spacing=0.1, vertical_spacing=0.3 / rows)
    for i in range(n_tokens):
        for trace in _paths(scores[:, :, i, :2], in_legend=i == 0):
            fig.add_trace(trace, row=i // columns + 1, col=i % columns + 1)
    explain_colors(fig, LOOP_SCALE, n_loops - 1)
    curve_axes(fig)
    shares = ["" if math.isnan(share) else f" ({share:.0%} of the variance)" for share in explained.tolist()]
    fig.update_xaxes(title={"text": f"component 1{shares[0]}"}, row=rows)
    fig.update_yaxes(title={"text": f"component 2{shares[1]}"}, col=1)
    legend = {"orientation": "h", "x": 0, "y": -0.28 / rows, "xanchor": "left", "yanchor": "top"}
    return base_layout(fig, 130 + 350 * rows, title=heading(title), legend=legend, margin={"t": 90, "b": 100})


def _paths(points: Float[Tensor, "loop layer 2"], in_legend: bool) -> Iterator[go.Scatter]:
    """One token's lines, the last loop's cycle below the others."""
    n_loops, n_layers, _ = points.shape
    colors = loop_colors(n_loops)
    closed = [*range(n_layers), 0]
    x, y = numbers(points[-1, closed].T)
    look = {"width": 5, "size": 11, "hoverinfo": "skip", "showlegend": in_legend, "hovertemplate": None}
    cycle = curve(y, "last loop's cycle (numbers: layers)", INK, x=x, **look)
    yield cycle.update(mode="lines+markers+text", text=[*map(str, range(n_layers)), ""], textposition="top center")
    path = points.flatten(0, 1)
    for t in range(n_loops):
        calls = range(max(0, t * n_layers - 1), (t + 1) * n_layers)
        x, y = numbers(path[calls.start : calls.stop].T)
        hover = "%{customdata}<br>(%{x:.3g}, %{y:.3g})<extra></extra>"
        look = {"hovertemplate": hover, "customdata": [f"loop {c // n_layers}, layer {c % n_layers}" for c in calls]}
        yield curve(y, "", colors[t], x=x, width=1.5, size=5, **look, showlegend=False)
    yield go.Scatter(
        x=numbers(points[0, :, 0]),
        y=numbers(points[0, :, 1]),
        name="first loop",
        mode="markers",
        marker={"size": 11, "symbol": "circle-open", "color": colors[0], "line": {"width": 2}},
        hoverinfo="skip",
        showlegend=in_legend,
    )


def limit_curves(
    cosines: Float[Tensor, "loop token"],
    labels: Int[Tensor, " token"],
    behaviours: Sequence[str],
    threshold: float,
    names: Sequence[str],
    title: str = "",
) -> go.Figure:
    """Cosine to the last loop over loops, a line for each token, coloured by its limit behaviour.

    At most 60 tokens of each behaviour are drawn; the legend counts all.

    Args:
        cosines: of each token.
        labels: indices of `behaviours`; -1 for undefined, which is not drawn.
        behaviours: their names.
        threshold: how far below 1 a cosine may be to count as at rest, drawn as a line.
        names: what each token is called.

    Raises:
        InputError: no token has a label.
    """
    total = int((labels >= 0).sum())
    if not total:
        raise InputError("no token has a limit behaviour, so there is nothing to draw.")
    n_loops, fig = len(cosines), Figure()
    for index, (behaviour, color) in enumerate(zip(behaviours, _BEHAVIOUR_COLORS, strict=False)):
        tokens: list[int] = (labels == index).nonzero().flatten().tolist()
        legend = f"{behaviour}: {len(tokens)} of {total} tokens"
        if not tokens:
            fig.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line={"color": color}, name=legend))
        step = -(-len(tokens) // _MOST_LINES) or 1
        for number, token in enumerate(tokens[::step]):
            hover = f"{plotly_text(names[token])}, loop %{{x}}: %{{y:.4f}}<extra>{behaviour}</extra>"
            look: dict[str, Any] = {"width": 2, "opacity": 0.9} if index else {"width": 1, "opacity": 0.5}
            look |= {"legendgroup": behaviour, "showlegend": number == 0, "size": 0, "hovertemplate": hover}
            fig.add_trace(curve(numbers(cosines[:, token]), legend, color, **look))
    label = f"cosine to the state of the last loop<br>(at rest above the dashed line, {1 - threshold:g})"
    fig.update_yaxes(title={"text": label}, automargin=True)
    return _over_loops(fig, n_loops, 1 - threshold, 420, title)


def path_curves(
    distances: Float[Tensor, "loop pos"], tolerance: float, tokens: Sequence[str], title: str = ""
) -> go.Figure:
    """How far apart runs from different states are, over loops: the last position and the median in colour.

    Args:
        distances: the largest between any two runs, relative L2; zero is a gap.
        tolerance: drawn as a line.
        tokens: the token at each position.

    Raises:
        InputError: no distance above zero.
    """
    n_positions, fig = distances.shape[1], Figure()
    for pos in range(max(0, n_positions - 1 - _MOST_LINES), n_positions - 1):
        hover = f"loop %{{x}}: %{{y:.3g}}<extra>position {pos}: {plotly_text(tokens[pos])}</extra>"
        look = {"legendgroup": "other", "showlegend": pos == n_positions - 2, "hovertemplate": hover}
        fig.add_trace(curve(_gaps(distances[:, pos]), "each other position", GREY, width=1, size=0, **look))
    fig.add_trace(curve(_gaps(distances[:, -1]), "last position", BLUE, width=2.5, size=0))
    if n_positions > 1:
        middle = _gaps(median(distances, 1))
        fig.add_trace(curve(middle, "median over positions", ORANGE, dash="dash", width=2.5, size=0))
    label = "largest distance between<br>two runs (relative L2)"
    return _within(fig, [distances], tolerance, "the distance between runs", label, title)


def motion_curves(
    step: Float[Tensor, "loop token"],
    angle: Float[Tensor, "loop token"],
    last: Bool[Tensor, " token"],
    title: str = "",
) -> go.Figure:
    """Two panels over loops: step length on a log axis, and the angle to the step before.

    Args:
        step: relative L2; zero is a gap.
        angle: radians.
        last: which tokens are the last of their prompts; of several the median is drawn.

    Raises:
        InputError: no step above zero.
    """
    if not bool((step > 0).any()):
        raise InputError("no step is above zero, so there is nothing to draw.")
    titles = ["Length of the step", "Angle to the step before"]
    fig = panels(titles, horizontal_spacing=0.18)
    curves = {"last position": (last, BLUE, "solid")}
    if len(last) > 1:
        curves["median over tokens"] = (torch.ones_like(last), ORANGE, "dash")
    for name, (tokens, color, dash) in curves.items():
        for column, y in enumerate((_gaps(median(step[:, tokens])), numbers(median(angle[:, tokens]))), start=1):
            look = {"dash": dash, "size": 0, "legendgroup": name, "showlegend": column == 1}
            fig.add_trace(curve(y, name, color, **look), row=1, col=column)
    fig.add_hline(y=math.pi / 2, line={"color": "#8A94A0", "width": 1, "dash": "dot"}, row=1, col=2)  # pyright: ignore[reportArgumentType]
    curve_axes(fig)
    fig.update_xaxes(**loop_axis(len(step)))
    fig.update_yaxes(title={"text": "relative L2"}, type="log", exponentformat="power", row=1, col=1)
    quarters = [i * math.pi / 4 for i in range(5)]
    names = ["0: straight on", "π/4", "π/2: orthogonal", "3π/4", "π: back"]
    fig.update_yaxes(tickmode="array", tickvals=quarters, ticktext=names, range=[-0.1, 3.25], row=1, col=2)
    return base_layout(fig, 400, title=heading(title), legend=_BELOW, margin={"t": 80, "b": 90})


def spectrum_plane(real: Float[Tensor, " k"], imag: Float[Tensor, " k"], title: str = "") -> go.Figure:
    """Eigenvalues in the complex plane, with the unit circle: inside it, small differences shrink.

    Args:
        real, imag: their parts.
    """
    turn = torch.linspace(0, 2 * math.pi, 181, dtype=torch.float64)
    circle = {"x": numbers(turn.cos()), "y": numbers(turn.sin()), "mode": "lines", "hoverinfo": "skip"}
    fig = Figure(go.Scatter(**circle, name="unit circle", line={"color": INK, "width": 1.5}))
    sizes = torch.complex(real.double(), imag.double()).abs()
    fig.add_trace(
        go.Scatter(
            x=numbers(real),
            y=numbers(imag),
            name="leading eigenvalues",
            mode="markers",
            marker={"size": 9, "color": ORANGE, "line": {"color": "white", "width": 1}},
            customdata=numbers(sizes),
            hovertemplate="%{x:.4g} + %{y:.4g} i<br>absolute value %{customdata:.4g}<extra></extra>",
        )
    )
    curve_axes(fig)
    reach = 1.1 * max(1.0, float(sizes.max()))
    fig.update_xaxes(
        title={"text": "real part"}, range=[-reach, reach], constrain="domain", zeroline=True, zerolinecolor=GREY
    )
    fig.update_yaxes(
        title={"text": "imaginary part"}, range=[-reach, reach], scaleanchor="x", zeroline=True, zerolinecolor=GREY
    )
    return base_layout(fig, 480, title=heading(title), legend={**_BELOW, "y": -0.15}, margin={"b": 90})


def verdict_shares(
    verdict: Int[Tensor, " token"], pos: Int[Tensor, " token"], names: Sequence[str], model: str
) -> go.Figure:
    """Bars of what tokens do in the long run: all of them, then those at each position, one colour for each verdict.

    Args:
        verdict: indices of `names`.
        pos: position of each token.
        names: of the verdicts.
        model: for the title.
    """
    groups = {"all": torch.ones_like(pos, dtype=torch.bool), **{str(i): pos == i for i in pos.unique().tolist()}}
    counts = torch.stack([torch.bincount(verdict[tokens], minlength=len(names)) for tokens in groups.values()])
    fig = Figure()
    for index, name in enumerate(names):
        if counts[0, index]:
            total, part = counts.sum(1), counts[:, index]
            shown = [f"{int(n)} of {int(m)} tokens" for n, m in zip(part, total, strict=True)]
            look: dict[str, Any] = {"marker": {"color": _VERDICT_COLORS[index]}, "customdata": shown}
            look["hovertemplate"] = f"position %{{x}}: %{{customdata}}<extra>{name}</extra>"
            fig.add_trace(go.Bar(x=list(groups), y=numbers(100 * part / total), name=name, **look))
    curve_axes(fig)
    fig.update_xaxes(type="category", title={"text": "position in the prompt"})
    fig.update_yaxes(title={"text": "tokens (%)"}, range=[0, 100])
    title = heading(f"In the long run: {model}")
    return base_layout(fig, 380, title=title, barmode="stack", legend=_BELOW, showlegend=True, margin={"b": 90})


def exponent_bars(exponents: Float[Tensor, " k"], error: Float[Tensor, " k"], title: str = "") -> go.Figure:
    """Lyapunov exponents as bars with a standard error, the largest first.

    Args:
        exponents: in nats a loop.
        error: of each.
    """
    look: dict[str, Any] = {"marker": {"color": BLUE}, "error_y": {"type": "data", "array": numbers(error)}}
    look["hovertemplate"] = "exponent %{x}: %{y:.4g} nats a loop<extra></extra>"
    fig = Figure(go.Bar(x=[*range(len(exponents))], y=numbers(exponents), **look))
    curve_axes(fig)
    fig.update_xaxes(title={"text": "exponent, the largest first"}, dtick=1)
    fig.update_yaxes(title={"text": "nats a loop<br>(above 0 differences grow)"}, zeroline=True, zerolinecolor=INK)
    return base_layout(fig, 380, title=heading(title))
