"""Attention patterns of every loop, with circuitsvis and plotly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import torch
from circuitsvis.attention import attention_heads as circuitsvis_heads
from circuitsvis.utils.render import RenderedHTML
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.cache import LoopedCache
from tl_looped.engine.errors import InputError
from tl_looped.engine.schedule import CORE, HookSite
from tl_looped.viz.browser import notebook_html, packed
from tl_looped.viz.parts import cells, panels
from tl_looped.viz.still import still_svg
from tl_looped.viz.style import (
    DARK_BLUE,
    PROBABILITY_SCALE,
    base_layout,
    data_block,
    heatmap_axes,
    loop_axis,
    show_token,
    token_axis,
)

_MOST_PANELS = 8


@dataclass(frozen=True, repr=False)
class LayerAttention:
    """Attention of one layer for one prompt, in the loops at which it was kept.

    Attributes:
        stack: "prelude", "blocks" or "coda".
        layer: index in its stack.
        loops: the loops kept, in order; (None,) for a layer that runs once.
        pattern: row-softmaxed attention.
    """

    stack: str
    layer: int
    loops: tuple[int | None, ...]
    pattern: Float[Tensor, "loop head query key"]

    def __repr__(self) -> str:
        return f"LayerAttention({self.name}, pattern {[*self.pattern.shape]})"

    @property
    def name(self) -> str:
        """Such as "core layer 0"."""
        return f"{'core' if self.stack == CORE else self.stack} layer {self.layer}"


def attention_heads(pattern: Float[Tensor, "head query key"], tokens: Sequence[str], label: str = "") -> RenderedHTML:
    """All heads of one layer in one loop, as circuitsvis shows them.

    Args:
        pattern: attention of each head.
        tokens: the token at each position.
        label: put before each head's name, such as "loop 3".
    """
    names = [f"{label} head {head}".strip() for head in range(len(pattern))]
    shown = [show_token(token) for token in tokens]
    return circuitsvis_heads(pattern.float().cpu(), shown, attention_head_names=names, positive_color=DARK_BLUE)


@dataclass(frozen=True, repr=False)
class LoopAttention:
    """A circuitsvis view of attention heads in which the reader picks layer and loop.

    Shows itself in a notebook, without a network; where no script runs, as a still picture of what the last position
    looks at. A page that has `circuitsvis_script()` once takes `fragment()` for each view instead, which is only data.
    Attention is kept in steps of 1/255.

    Attributes:
        tokens: the token at each position.
        layers: what there is to pick from.
        start: index into `layers` of the one to show first.
    """

    tokens: Sequence[str]
    layers: Sequence[LayerAttention]
    start: int = 0

    def __repr__(self) -> str:
        names = ", ".join(layer.name for layer in self.layers[:8]) + (", ..." if len(self.layers) > 8 else "")
        return f"LoopAttention({len(self.tokens)} tokens; {names})"

    def fragment(self) -> str:
        """The view as an element of a page that has `circuitsvis_script()`."""
        return f'<div class="tl-loop-attention">{data_block(self._props())}</div>'

    @classmethod
    def of(cls, cache: LoopedCache, tokens: Sequence[str], batch: int = 0) -> LoopAttention:
        """The attention patterns that a cache has, of every layer and loop.

        >>> from tl_looped import LoopedModel
        >>> model = LoopedModel.from_pretrained("looped-hops")
        >>> _, cache = model.run_with_cache("a=4; c=a; ? c", names_filter=lambda name: name.endswith("hook_pattern"))
        >>> [layer.name for layer in LoopAttention.of(cache, model.to_str_tokens("a=4; c=a; ? c")).layers]
        ['prelude layer 0', 'core layer 0', 'core layer 1']

        Args:
            cache: with patterns in it.
            tokens: of the prompt, as `model.to_str_tokens` gives them.
            batch: which prompt of the cache.

        Raises:
            InputError: it has no pattern, or one over other positions than the tokens.
        """
        found: dict[tuple[str, int], dict[int | None, Tensor]] = {}
        for name, pattern in cache.cache_dict.items():
            site = HookSite.parse(name)
            if site.component == "attn.hook_pattern" and site.stack is not None and site.layer is not None:
                one = pattern[batch] if cache.has_batch_dim else pattern
                found.setdefault((site.stack, site.layer), {})[site.loop] = one
        if not found:
            raise InputError(
                "this cache has no attention pattern: make it without names_filter, or with one that takes them: "
                'lambda name: name.endswith("hook_pattern").'
            )
        shape = next(iter(next(iter(found.values())).values())).shape
        if tuple(shape[-2:]) != (len(tokens), len(tokens)):
            raise InputError(
                f"patterns are over {shape[-2]} x {shape[-1]} positions, but {len(tokens)} tokens were given: pass "
                "model.to_str_tokens(prompt) of the same prompt, and cache all positions."
            )
        layers = [
            LayerAttention(*place, tuple(loops), torch.stack([*loops.values()])) for place, loops in found.items()
        ]
        return cls(tokens, layers, next((i for i, layer in enumerate(layers) if layer.stack == CORE), 0))

    def _repr_html_(self) -> str:
        shown = self.layers[self.start]
        name = f"{shown.name}: where the last position looks"
        figure = attention_from_position([shown], self.tokens).update_layout(title={"text": name})
        return notebook_html(self.fragment(), still_svg(figure))

    def _props(self) -> dict[str, Any]:
        layers = [
            {"name": layer.name, "loops": list(layer.loops), "heads": layer.pattern.shape[1], "pattern": _levels(layer)}
            for layer in self.layers
        ]
        tokens = [show_token(token) for token in self.tokens]
        return {"tokens": tokens, "layers": layers, "start": self.start, "color": DARK_BLUE}


def _levels(layer: LayerAttention) -> str:
    """Attention in steps of 1/255, [loop, head, query, key], packed."""
    levels = (layer.pattern.detach().float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return packed(levels.cpu().numpy().tobytes())


def attention_from_position(layers: Sequence[LayerAttention], tokens: Sequence[str], position: int = -1) -> go.Figure:
    """Where one position looks, loop by loop: a panel for each head, a row for each loop, a column for each key.

    Args:
        layers: layers that run in every loop. With more than eight heads in all, a panel is a layer, the mean of its
            heads, and of more than eight layers eight are shown, evenly spaced.
        tokens: the token at each position.
        position: the query position; the last by default.

    Returns:
        Heatmaps of attention from that position; the colour scale ends at the next tenth above the largest value.
    """
    drawn = _panels(layers, position)
    n_rows = len(drawn[0][1])
    loops = ["once" if t is None else t for t in layers[0].loops]
    inner, gap = max(70, min(20 * n_rows, 240)), 46
    height = len(drawn) * (inner + gap) + 90
    spacing = gap / (height - 110) if len(drawn) > 1 else 0
    fig = panels([title for title, _ in drawn], 1, shared_xaxes=True, vertical_spacing=spacing)
    for row, (_, values) in enumerate(drawn, start=1):
        says = [[[loops[t], j] for j in range(len(tokens))] for t in range(n_rows)]
        hover = "loop %{customdata[0]}, key position %{x}: %{z:.1%}"
        fig.add_trace(cells(values, says, hover, None, None, None, coloraxis="coloraxis"), row=row, col=1)
    fig.update_xaxes(**token_axis(tokens, title=""))
    fig.update_xaxes(title={"text": "key position (label: its token)"}, row=len(drawn), col=1)
    places = loop_axis(n_rows)["dtick"]
    kept = list(range(0, n_rows, places))
    fig.update_yaxes(
        title={"text": "loop"}, autorange="reversed", tickvals=kept, ticktext=[str(loops[t]) for t in kept]
    )
    most = max(float(values.nan_to_num().max()) for _, values in drawn)
    bar = {"title": {"text": "attention"}, "thickness": 14, "tickformat": ".0%"}
    bar |= {"len": 200, "lenmode": "pixels", "y": 1, "yanchor": "top"}
    scale = {"colorscale": PROBABILITY_SCALE, "cmin": 0, "cmax": max(0.1, math.ceil(most * 10) / 10), "colorbar": bar}
    base_layout(fig, height=height, coloraxis=scale, margin={"l": 60, "r": 20, "t": 40, "b": 70})
    heatmap_axes(fig)
    return fig


def _panels(layers: Sequence[LayerAttention], position: int) -> list[tuple[str, Float[Tensor, "loop key"]]]:
    rows = [(layer.name, layer.pattern[:, :, position]) for layer in layers]  # [loop, head, key]
    if sum(pattern.shape[1] for _, pattern in rows) <= _MOST_PANELS:
        return [(f"{name}, head {h}", pattern[:, h]) for name, pattern in rows for h in range(pattern.shape[1])]
    step = -(-len(rows) // _MOST_PANELS)
    return [(f"{name}, mean of {pattern.shape[1]} heads", pattern.mean(1)) for name, pattern in rows[::step]]
