"""Heatmaps of patching and attribution sweeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

from tl_looped.viz.figure import Figure
from tl_looped.viz.parts import cells
from tl_looped.viz.style import base_layout, heading, plotly_text, shorten

# Blue and red are told apart with every kind of colour blindness; white is no effect.
EFFECT_SCALE = [[0.0, "#2166AC"], [0.25, "#92C5DE"], [0.5, "#FFFFFF"], [0.75, "#F4A582"], [1.0, "#B2182B"]]
_TIME = ("loop", "layer")


def patching_heatmap(
    values: Tensor,
    axes: Sequence[str],
    title: str = "",
    unit: str = "change of the metric",
    names: Mapping[str, Sequence[str]] | None = None,
) -> go.Figure:
    """One cell for each cell of a sweep, coloured around zero.

    Loops run downward and layers within them; positions, heads and neurons run to the right. A sweep over loops and
    layers alone, or over source and destination loops, has one on each side.

    Args:
        values: the effect of each patch, [*axes].
        axes: names of the axes.
        title: of the figure.
        unit: what the colours mean.
        names: of an axis's cells, for their labels: the tokens of "pos".
    """
    down, right = _sides(axes)
    order = [axes.index(axis) for axis in (*down, *right)]
    sizes = [values.shape[i] for i in order]
    n_down, n_right = math.prod(sizes[: len(down)]), math.prod(sizes[len(down) :])
    flat = values.permute(order).reshape(n_down, n_right)
    rows = _labels(down, sizes[: len(down)], names or {})
    columns = _labels(right, sizes[len(down) :], names or {})
    limit = float(flat.abs().max()) or 1.0
    says = [[f"{row or ''} {column or ''}".strip() for column in columns] for row in rows]
    bar = {"title": {"text": unit, "side": "right"}, "exponentformat": "power"}
    fig = Figure(cells(flat, says, "%{customdata}: %{z:.4g}", EFFECT_SCALE, -limit, limit, bar))
    fig.update_xaxes(**_axis(right, columns))
    fig.update_yaxes(**_axis(down, rows), autorange="reversed")
    height = 150 + max(22 * min(n_down, 40), 120)
    return base_layout(fig, height=height, title=heading(title), margin={"l": 110, "t": 60})


def _sides(axes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which axes run down and which to the right."""
    if "source_loop" in axes:
        return ["source_loop"], [axis for axis in axes if axis != "source_loop"]
    time = [axis for axis in _TIME if axis in axes]
    rest = [axis for axis in axes if axis not in _TIME]
    if len(time) == 2 and not rest:
        return ["layer"], ["loop"]
    return (time, rest) if rest else ([], time)


def _labels(axes: Sequence[str], sizes: Sequence[int], names: Mapping[str, Sequence[str]]) -> list[str]:
    """A label for every combination, such as "loop 2 layer 1"; sizes of one are left out where others say enough."""
    shown = [i for i, size in enumerate(sizes) if size > 1] or list(range(len(sizes)))
    labels = []
    for at in itertools.product(*map(range, sizes)):
        parts = []
        for i in shown:
            known = names.get(axes[i])
            if known is None:
                parts.append(f"{axes[i].replace('_', ' ')} {at[i]}")
            else:
                parts.append(f"{at[i]}: {plotly_text(shorten(known[at[i]]) if axes[i] == 'pos' else known[at[i]])}")
        labels.append(", ".join(parts))
    return labels


def _axis(axes: Sequence[str], labels: Sequence[str], most: int = 40) -> dict[str, Any]:
    if not axes:
        return {"showticklabels": False, "title": {"text": ""}}
    step = -(-len(labels) // most)
    places = list(range(0, len(labels), step))
    title = {"pos": "position", "loop": "loop", "source_loop": "loop that the activation comes from"}
    if len(axes) == 1 and axes[0] not in ("pos", "receiver"):
        labels = [label.rpartition(" ")[2] for label in labels]
    return {
        "title": {"text": ", ".join(title.get(axis, axis) for axis in axes)},
        "tickmode": "array",
        "tickvals": places,
        "ticktext": [labels[i] for i in places],
        "showgrid": False,
        "automargin": True,
    }
