"""What all figures share: colours, text of tokens, axes, and data blocks for web pages."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from torch import Tensor

# Okabe and Ito's palette: told apart with every kind of colour blindness. Black is left to text and axes.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
DARK_BLUE = "#08306B"
GREY = "#B8BEC6"
INK = "#1F2933"

# Light to dark, so it reads in black and white too.
PROBABILITY_SCALE = [[0.0, "#FFFFFF"], [0.25, "#E3EEF9"], [0.5, "#B5D4E9"], [0.75, "#5BA3CF"], [1.0, DARK_BLUE]]
# The paper's convention for curves grouped by loop: later loops are more yellow.
LOOP_SCALE = [[0.0, "#00592E"], [0.5, "#5FA52E"], [1.0, "#E8CF00"]]
# And for curves grouped by layer: later layers are greener.
LAYER_SCALE = [[0.0, "#08306B"], [0.5, "#1F83A6"], [1.0, "#63BE5B"]]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
MONOSPACE = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

AnyFigure = TypeVar("AnyFigure", bound=go.Figure)

PLOT_WIDTH = 850  # about how many pixels wide a plot over positions is on a page of ours

_CONTROL = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


def loop_colors(n_loops: int) -> list[str]:
    """A colour for each loop, from green to yellow.

    >>> loop_colors(2)
    ['rgb(0, 89, 46)', 'rgb(232, 207, 0)']
    """
    return _sampled(LOOP_SCALE, n_loops)


def layer_colors(n_layers: int) -> list[str]:
    """A colour for each layer, from blue to green.

    >>> layer_colors(2)
    ['rgb(8, 48, 107)', 'rgb(99, 190, 91)']
    """
    return _sampled(LAYER_SCALE, n_layers)


def _sampled(scale: list[list[Any]], n: int) -> list[str]:
    places = [0.0] if n == 1 else [i / (n - 1) for i in range(n)]
    return [str(color) for color in sample_colorscale(scale, places)]


def show_token(token: str) -> str:
    """A token with its white space made visible: a space at an end is a middle dot, a line break an arrow.

    >>> show_token(" been"), show_token("a b"), show_token(chr(10))
    ('·been', 'a b', '⏎')
    """
    inner = token.strip(" ")
    left = len(token) - len(token.lstrip(" "))
    shown = token if not inner else "·" * left + inner + "·" * (len(token) - left - len(inner))
    shown = shown if inner else "·" * len(token)
    return "".join(_CONTROL.get(c, c if c.isprintable() or c == "\ufffd" else f"\\x{ord(c):02x}") for c in shown)


def plotly_text(token: str) -> str:
    """A token for plotly, which reads the text of labels as a kind of HTML."""
    return html.escape(show_token(token), quote=False)


def numbers(values: Tensor) -> list[Any]:
    """A tensor as nested lists for JSON, to five significant digits; what is not finite becomes None, a gap."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(one) for one in value]
        return float(f"{value:.5g}") if abs(value) < float("inf") else None

    return short(values.detach().double().cpu().tolist())


def data_block(values: str | dict[str, Any]) -> str:
    r"""JSON (or what is to become JSON) as an inert element of a page, whatever text is in it.

    A browser does not run it, and no text can close it: the only character that could is written as an escape.

    >>> data_block({"token": "</script>"})
    '<script type="application/json">{"token":"\\u003c/script>"}</script>'
    """
    text = values if isinstance(values, str) else json.dumps(values, allow_nan=False, separators=(",", ":"))
    return f'<script type="application/json">{text.replace("<", chr(92) + "u003c")}</script>'


def base_layout(fig: AnyFigure, height: int, **layout: Any) -> AnyFigure:
    """Give a figure the look of all our figures: `height` in pixels, the width of its page."""
    fig.update_layout(
        template="none",  # the default template would add 7 kB to every figure of a page
        height=height,
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 70, "r": 20, "t": 50, "b": 60},
        hoverlabel={"bgcolor": "white", "font": {"family": MONOSPACE, "size": 12, "color": INK}, "align": "left"},
    )
    fig.update_layout(**layout)
    fig.update_annotations(font={"size": 14, "color": INK})
    for update in (fig.update_xaxes, fig.update_yaxes):
        update(title={"font": {"size": 13}})
    return fig


def heading(text: str) -> dict[str, Any]:
    """A figure's title."""
    return {"text": plotly_text(text), "font": {"size": 15}}


def curve_axes(fig: go.Figure) -> None:
    """Axes for curves: a light grid, a frame line, ticks outside."""
    look = {"showgrid": True, "gridcolor": "#E6E9ED", "zeroline": False, "linecolor": "#8A94A0", "ticks": "outside"}
    fig.update_xaxes(**look)
    fig.update_yaxes(**look)


def heatmap_axes(fig: go.Figure) -> None:
    """Axes for heatmaps: no lines, and a grey ground that shows as a grid between pale cells."""
    fig.update_layout(plot_bgcolor="#DDE2E8")
    for update in (fig.update_xaxes, fig.update_yaxes):
        update(showgrid=False, zeroline=False, showline=False, ticks="")


def loop_axis(n_loops: int, title: str = "loop") -> dict[str, Any]:
    """An axis that counts loops from 0, with whole numbers as ticks."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, n_loops) if n_loops <= 12 * step or step >= n_loops)
    return {"title": {"text": title}, "tick0": 0, "dtick": step}


def token_axis(tokens: Sequence[str], first: int = 0, most: int = 64, title: str = "position") -> dict[str, Any]:
    """An axis of positions `first`, `first` + 1, ... with the tokens as labels; of very many, every so many get one.

    Labels are turned where two neighbours would touch.
    """
    step = -(-len(tokens) // most)
    places = list(range(first, first + len(tokens), step))
    labels = [plotly_text(shorten(token)) for token in tokens[::step]]
    widths = [8 * len(show_token(shorten(token))) for token in tokens[::step]]
    column = PLOT_WIDTH / len(widths)
    turned = any((left + right) / 2 > column - 4 for left, right in pairwise(widths))
    return {
        "title": {"text": title},
        "tickmode": "array",
        "tickvals": places,
        "ticktext": labels,
        "tickangle": -60 if turned else 0,
        "tickfont": {"family": MONOSPACE, "size": 12},
        "automargin": True,
    }


def shorten(text: str, most: int = 14) -> str:
    """A text cut to `most` characters, with an ellipsis where something is left out (from four characters on).

    >>> shorten("internationalisation")
    'international…'
    """
    if len(text) <= most:
        return text
    return text[: most - 1] + "…" if most > 3 else text[:most]
