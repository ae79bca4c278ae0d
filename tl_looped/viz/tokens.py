"""Read-outs after every loop with circuitsvis: the prompt's own tokens by their log probability, and top tokens."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.viz.browser import notebook_html
from tl_looped.viz.figure import Figure
from tl_looped.viz.parts import cells
from tl_looped.viz.readout import readout_heatmap
from tl_looped.viz.still import still_svg
from tl_looped.viz.style import (
    PROBABILITY_SCALE,
    base_layout,
    data_block,
    heatmap_axes,
    numbers,
    plotly_text,
    show_token,
)


@dataclass(frozen=True, repr=False)
class LoopTokens:
    """A circuitsvis view of tokens; where it has several loops, the reader picks one.

    Shows itself in a notebook, without a network; where no script runs, as a still picture. A page that has
    `circuitsvis_script()` once takes `fragment()` for each view instead, which is only data.

    Attributes:
        component: the circuitsvis component.
        caption: a sentence that is put above it.
        loops: which loops there are; empty where the component itself has the choice.
        props: what the component draws, for each loop.
        picture: what stands where no script runs.
        start: index of the loop to show first.
    """

    component: Literal["TokenLogProbs", "TopkTokens"]
    caption: str
    loops: Sequence[int]
    props: Sequence[dict[str, Any]]
    picture: go.Figure
    start: int = 0

    def __repr__(self) -> str:
        return f"LoopTokens({self.component}: {self.caption})"

    def fragment(self) -> str:
        """The view as an element of a page that has `circuitsvis_script()`."""
        data = {"component": self.component, "loops": list(self.loops), "props": list(self.props), "start": self.start}
        return f'<div class="tl-tokens"><p>{html.escape(self.caption)}</p>{data_block(data)}</div>'

    def _repr_html_(self) -> str:
        return notebook_html(self.fragment(), still_svg(self.picture))


def token_log_probs(
    tokens: Sequence[str],
    log_probs: Float[Tensor, "loop next"],
    ranks: Int[Tensor, "loop next"],
    top_log_probs: Float[Tensor, "loop next top"],
    top_tokens: Sequence[Sequence[Sequence[str]]],
    loops: Sequence[int],
    start: int = -1,
) -> LoopTokens:
    """The prompt's tokens, coloured by the log probability that the read-out before them gave them.

    Args:
        tokens: the prompt.
        log_probs: of each token but the first, in nats.
        ranks: of each token but the first; 0 is the top token.
        top_log_probs: of the most probable tokens at each position but the last, the highest first.
        top_tokens: their texts, in the same order, [loop][next][top].
        loops: which they are.
        start: index of the loop to show first.
    """
    prompt = [_shown(token) for token in tokens]
    props = [
        {
            "prompt": prompt,
            "topKLogProbs": numbers(top_log_probs[i]),
            "topKTokens": [[_shown(token) for token in top] for top in top_tokens[i]],
            "correctTokenRank": ranks[i].tolist(),
            "correctTokenLogProb": numbers(log_probs[i]),
        }
        for i in range(len(loops))
    ]
    caption = (
        f"Redder: more probable, given what comes before, as read out after the loop. The first token, "
        f"{show_token(tokens[0])}, is not predicted and not shown. Hover over a token for its probability and the top "
        "tokens there (#0 is the highest)."
    )
    picture = _own_tokens(tokens, log_probs, loops)
    return LoopTokens("TokenLogProbs", caption, loops, props, picture, start % len(loops))


def top_tokens_table(
    top_probs: Float[Tensor, "loop layer pos top"],
    top_tokens: Sequence[Sequence[Sequence[Sequence[str]]]],
    loops: Sequence[int],
    layers: Sequence[str],
    positions: Sequence[int],
) -> LoopTokens:
    """A table of the most probable next tokens, a column for each position; the reader picks loop and layer.

    Args:
        top_probs: probabilities of the top tokens, the highest first.
        top_tokens: their texts, in the same order, [loop][layer][pos][top].
        loops: which loops they are.
        layers: names of what was read in a loop.
        positions: which they are; the component counts its columns from 0, so the caption says it where they differ.
    """
    texts = sorted({token for loop in top_tokens for layer in loop for pos in layer for token in pos})
    place = {token: i for i, token in enumerate(texts)}
    n_top = top_probs.shape[-1]
    indices = [
        [[[place[pos[k]] for pos in layer] for k in range(n_top)] for layer in loop] for loop in top_tokens
    ]  # [loop][layer][top][pos]
    nothing: list[Any] = [[[] for _ in layers] for _ in loops]  # the component's lowest tokens: not in a lens's result
    props = {
        "tokens": [[_shown(token) for token in texts]] * len(loops),
        "topkVals": numbers(top_probs.nan_to_num().transpose(-1, -2)),
        "topkIdxs": indices,
        "bottomkVals": nothing,
        "bottomkIdxs": nothing,
        "firstDimensionName": "Read-out",
        "thirdDimensionName": "Position",
        "sampleLabels": [f"loop {t}" for t in loops],
        "firstDimensionLabels": list(layers),
    }
    caption = "The most probable next tokens at each position, the highest first. Hover over one for its probability."
    if list(positions) != list(range(len(positions))):
        caption += f" The columns are the positions {', '.join(map(str, positions))}."
    read = [str(position) for position in positions]
    last = [loop[-1] for loop in top_tokens]
    picture = readout_heatmap(top_probs[:, -1].nan_to_num(), last, read, list(positions), list(loops), layers[-1])
    return LoopTokens("TopkTokens", caption, (), [props], picture)


def _own_tokens(tokens: Sequence[str], log_probs: Float[Tensor, "loop next"], loops: Sequence[int]) -> go.Figure:
    """The prompt's tokens in every loop, darker where they were more probable."""
    bar = {"title": {"text": "probability of<br>the token"}, "tickformat": ".0%"}
    texts = [[plotly_text(token) for token in tokens[1:]]] * len(loops)
    look = {"text": texts, "texttemplate": "%{text}"}
    own = cells(log_probs.exp(), None, "%{text}: %{z:.2%}", PROBABILITY_SCALE, 0, 1, bar, **look)
    fig = base_layout(Figure(own), height=120 + 24 * len(loops), margin={"l": 60, "r": 20, "t": 20, "b": 50})
    heatmap_axes(fig)
    fig.update_xaxes(
        title={"text": "position"}, tickvals=list(range(len(tokens) - 1)), ticktext=list(range(1, len(tokens)))
    )
    rows = list(range(len(loops)))
    fig.update_yaxes(title={"text": "after loop"}, autorange="reversed", tickvals=rows, ticktext=list(loops))
    return fig


def _shown(token: str) -> str:
    """A token for circuitsvis, which takes text as HTML."""
    return html.escape(show_token(token))
