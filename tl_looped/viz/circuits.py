"""Circuits: heads and MLPs through the loops, and the edges between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.viz.figure import Figure
from tl_looped.viz.style import BLUE, GREY, ORANGE, base_layout, heading, numbers

_COLORS = {"q": BLUE, "k": ORANGE, "v": "#2A9D8F", "gate": "#9B5DE5", "mlp": "#8D6E63", "logits": "#1B2733"}
_THINNEST, _THICKEST = 0.6, 6.0


def circuit_figure(
    writers: Sequence[Mapping[str, Any]],
    readers: Sequence[Mapping[str, Any]],
    edges: Bool[Tensor, "writer reader"],
    scores: Float[Tensor, "writer reader"],
    title: str = "",
    most: int = 200,
) -> go.Figure:
    """Edges as lines from what writes to what reads, thicker where their score is larger, coloured by what reads.

    Args:
        writers, readers: name, kind, layer, loop, head and time of each.
        edges: which to draw.
        scores: of them; NaN where not known.
        title: of the figure.
        most: how many edges to draw, the largest.
    """
    n_heads = 1 + max((one["head"] for one in writers if one["head"] is not None), default=0)
    sizes = scores.abs().nan_to_num(0).masked_fill(~edges, -1).flatten()
    shown = sizes.argsort(descending=True, stable=True)[: min(most, int(edges.sum()))].tolist()
    largest = float(sizes.max()) if shown else 0.0
    fig, labelled, ends = Figure(), set(), {}
    for at in reversed(shown):
        writer, reader = writers[at // len(readers)], readers[at % len(readers)]
        (x0, y0), (x1, y1) = _place(writer, n_heads), _place(reader, n_heads)
        ends |= {(x1, y1): reader["name"], (x0, y0): writer["name"]}
        share = (float(sizes[at]) / largest) ** 0.5 if largest > 0 else 0.3
        fig.add_trace(
            go.Scatter(
                x=[x0, x1],
                y=[y0, y1],
                mode="lines",
                line={"width": _THINNEST + (_THICKEST - _THINNEST) * share, "color": _COLORS[reader["kind"]]},
                opacity=0.75,
                name=reader["kind"],
                legendgroup=reader["kind"],
                showlegend=reader["kind"] not in labelled,
                hovertemplate=f"{writer['name']} → {reader['name']}: {float(scores.flatten()[at]):.4g}<extra></extra>",
            )
        )
        labelled.add(reader["kind"])
    fig.add_trace(
        go.Scatter(
            x=[x for x, _ in ends],
            y=[y for _, y in ends],
            mode="markers",
            marker={"size": 9, "color": GREY},
            customdata=list(ends.values()),
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
        )
    )
    columns = _columns([*writers, *readers])
    fig.update_xaxes(
        tickmode="array", tickvals=list(columns), ticktext=list(columns.values()), showgrid=False, zeroline=False
    )
    rows = ["input, logits", *(f"head {head}" for head in range(n_heads)), "MLP"]
    fig.update_yaxes(
        tickmode="array", tickvals=list(range(-1, n_heads + 1)), ticktext=rows, showgrid=False, zeroline=False
    )
    return base_layout(fig, height=220 + 60 * n_heads, title=heading(title), margin={"l": 100, "t": 60})


def _place(node: Mapping[str, Any], n_heads: int) -> tuple[float, float]:
    """Time to the right; inputs and logits below the heads, the MLP above them."""
    across = n_heads if node["kind"] == "mlp" else -1 if node["head"] is None else node["head"]
    return node["time"] / 3, float(across)


def _columns(nodes: Sequence[Mapping[str, Any]]) -> dict[float, str]:
    """Where loops lie and what they are called."""
    places: dict[str, list[float]] = {}
    for node in nodes:
        name = str(node["name"] if node["layer"] is None else node["stack"] if node["loop"] is None else node["loop"])
        places.setdefault(name.removeprefix("hook_"), []).append(node["time"] / 3)
    names = {name: f"loop {name}" if name.isdigit() else name for name in places}
    return {sum(times) / len(times): names[name] for name, times in places.items()}


def faithfulness_figure(
    sizes: Int[Tensor, " circuit"],
    faithful: Float[Tensor, " circuit"],
    complete: Float[Tensor, " circuit"],
    random: Float[Tensor, "circuit draw"],
    title: str = "",
) -> go.Figure:
    """What circuits keep, what is left without them, and what random ones keep, over the number of edges.

    Args:
        sizes: edges of each circuit.
        faithful: what it keeps.
        complete: what is left without it.
        random: what random circuits keep.
        title: of the figure.
    """
    order = sizes.argsort()
    curves = [("circuit", faithful, BLUE), ("all but the circuit", complete, ORANGE)]
    curves += [("random circuits, mean", random.mean(1), GREY)] if random.shape[1] else []
    fig = Figure()
    for name, values, color in curves:
        lines = {"mode": "lines+markers", "line": {"color": color}, "name": name}
        fig.add_trace(go.Scatter(x=sizes[order].tolist(), y=numbers(values[order]), **lines))
    fig.update_xaxes(title={"text": "edges"}, type="log")
    fig.update_yaxes(title={"text": "share of the effect that is kept"})
    return base_layout(fig, height=380, title=heading(title), margin={"l": 70, "t": 60})
