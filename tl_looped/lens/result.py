"""What a lens returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.numbers import first_met, met_from
from tl_looped.engine.results import Result
from tl_looped.lens.reads import table_of, target_name
from tl_looped.viz.readout import PLACES, lens_heatmap, readout_heatmap
from tl_looped.viz.style import show_token
from tl_looped.viz.tokens import LoopTokens, top_tokens_table


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Result):
    """What a model would say at every loop (and layer). Measures have `axes`; at padding they are NaN, or −1 for ids.

    Attributes:
        site: what was read: "state", "resid_post", ...
        loops, layers, positions: what was read, as indices; layers is None for the state.
        tokens: the prompts.
        real: which of the positions read hold a real token.
        target_ids: the tokens that are followed.
        target_names: their names: the text asked for, or "id 7"; "target" where they differ by row; "final top token".
        texts: text of every token id that occurs, by the id.
        top_probs, top_ids: the most probable tokens, the first the highest.
        entropy: of each read-out, in nats.
        kl_to_final: KL(what the whole run says ‖ read-out), in nats.
        kl_to_previous: KL(read-out one loop earlier ‖ read-out) at the same layer, in nats; NaN at loop 0, and
            where a lens can't read the one before.
        target_probs: probability of each target.
        target_ranks: its rank: 0 is the top token, as in TransformerLens; −1 at padding.
    """

    site: str
    loops: tuple[int, ...]
    layers: tuple[int, ...] | None
    positions: tuple[int, ...]
    tokens: Int[Tensor, "batch all_pos"]
    real: Bool[Tensor, "batch pos"]
    target_ids: Int[Tensor, "batch pos target"]
    target_names: tuple[str, ...]
    texts: dict[str, str]
    top_probs: Float[Tensor, "*axes top"]
    top_ids: Int[Tensor, "*axes top"]
    entropy: Float[Tensor, "*axes"]
    kl_to_final: Float[Tensor, "*axes"]
    kl_to_previous: Float[Tensor, "*axes"]
    target_probs: Float[Tensor, "*axes target"]
    target_ranks: Int[Tensor, "*axes target"]

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of the measures."""
        return ("loop", "batch", "pos") if self.layers is None else ("loop", "layer", "batch", "pos")

    def text(self, token: int) -> str:
        """The text of a token id that occurs in the result; empty at padding."""
        return self.texts[str(int(token))] if token >= 0 else ""

    def top_tokens(self, batch: int = 0) -> list[Any]:
        """Texts of one prompt's most probable tokens: [loop][layer][pos][top], or [loop][pos][top] of the state."""

        def name(ids: list[Any]) -> list[Any]:
            return [self.text(one) if isinstance(one, int) else name(one) for one in ids]

        row = self.top_ids.select(self.axes.index("batch"), self._row(batch))
        return name(row.tolist())

    def _labels(self) -> dict[str, Sequence[int]]:
        """What the indices of the axes behind the loop stand for."""
        layers = {} if self.layers is None else {"layer": self.layers}
        return {**layers, "batch": range(len(self.tokens)), "pos": self.positions}

    def _row(self, batch: int) -> int:
        return resolve_index("batch", batch, len(self.tokens))

    def _target(self, target: str | int | None) -> int:
        """The index of a target that was followed."""
        if target is None and len(self.target_names) == 1:
            return 0
        named = None if target is None else target_name(target)
        if named not in self.target_names:
            raise InputError(
                f"this result follows {list(self.target_names)}, not {target!r}: pass one of them, or run "
                f"logit_lens(..., targets=...)."
            )
        return self.target_names.index(named)

    def rank_trajectory(self, target: str | int | None = None) -> Int[Tensor, "*axes"]:
        """The rank of a target at every place; 0 is the top token, as in TransformerLens; −1 at padding.

        Args:
            target: one that was followed; may be left out where there is only one.
        """
        return self.target_ranks[..., self._target(target)]

    def first_loop_correct(self, target: str | int | None = None, stays: bool = False) -> Float[Tensor, "*places"]:
        """The first loop (of those read) at which the target is the top token; NaN where it never is.

        Args:
            target: one that was followed.
            stays: count only from where it stays on top in all later loops read.

        Returns:
            [batch, pos], or [layer, batch, pos].
        """
        right = (self.rank_trajectory(target) == 0) & self.real
        order = torch.tensor(self.loops).argsort()
        first = (met_from if stays else first_met)(right[order])
        loops = torch.tensor(self.loops, dtype=self.entropy.dtype)[order]
        return loops[first.nan_to_num(0).long()].masked_fill(first.isnan(), float("nan"))

    def answer_flips(self) -> pd.DataFrame:
        """Every change of the top token between loops that follow one another among those read.

        Columns: layer (where there are layers), batch, pos, loop (at which the new token is on top), before, after,
        came_back (whether the token before is on top again at a later loop).
        """
        order = torch.tensor(self.loops).argsort()
        top = self.top_ids[..., 0][order]
        steps = range(len(top) - 1)
        later = [(top[step + 2 :] == top[step]).any(0) for step in steps]
        columns = {"before": top[:-1], "after": top[1:], "came_back": torch.stack(later) if later else top[:-1].bool()}
        loops = [self.loops[order[step + 1]] for step in steps]
        table = table_of({"loop": loops, **self._labels()}, (top[1:] != top[:-1]) & self.real, columns)
        table = table.assign(**{name: list(map(self.text, table[name])) for name in ("before", "after")})
        return table.loc[:, [*self._labels(), "loop", *columns]]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each place with a real token: top token, measures, and each target's probability and rank."""
        columns = {"token": self.tokens[:, list(self.positions)], "top_token": self.top_ids[..., 0]}
        columns["top_prob"] = self.top_probs[..., 0]
        columns |= {name: getattr(self, name) for name in ("entropy", "kl_to_final", "kl_to_previous")}
        texts = ["token", "top_token"]
        for i, target in enumerate(self.target_names):
            tail = f"[{target}]" if len(self.target_names) > 1 else ""
            texts.append(f"target{tail}")
            columns |= {
                f"target{tail}": self.target_ids[..., i],
                f"target_prob{tail}": self.target_probs[..., i],
                f"target_rank{tail}": self.target_ranks[..., i],
            }
        table = table_of({"loop": self.loops, **self._labels()}, self.real.expand(self.entropy.shape), columns)
        return table.assign(**{name: list(map(self.text, table[name])) for name in texts})

    def plot(self, batch: int = 0, layer: int = -1) -> go.Figure:
        """Loop by position: the top token in each cell, its probability as colour, the top tokens when hovering.

        Args:
            batch: the prompt.
            layer: index among the layers read; of no use for the state.
        """
        tops, probs = self.top_tokens(batch), self.top_probs.select(self.axes.index("batch"), self._row(batch))
        place = ""
        if self.layers is not None:
            index = resolve_index("layer", layer, len(self.layers))
            tops, probs = [row[index] for row in tops], probs[:, index]
            place = f"{PLACES[self.site]} {self.layers[index]}"
        read = [self.text(int(self.tokens[self._row(batch), position])) for position in self.positions]
        return readout_heatmap(probs, tops, read, self.positions, self.loops, place)

    def plot_layers(self, batch: int = 0, position: int = -1) -> go.Figure:
        """Loop by layer at one position: the top token in each cell, its probability as colour.

        Args:
            batch: the prompt.
            position: index among the positions read.

        Raises:
            InputError: the result has no layers.
        """
        if self.layers is None:
            raise InputError("this result reads the state, which has no layers: pass site='resid_post' to logit_lens.")
        row, index = self._row(batch), resolve_index("position", position, len(self.positions))
        tops = [[layer[index] for layer in loop] for loop in self.top_tokens(batch)]
        read = show_token(self.text(int(self.tokens[row, self.positions[index]])))
        title = f"position {self.positions[index]}, reads {read}"
        return lens_heatmap(self.top_probs[:, :, row, index], tops, self.loops, self.layers, self.site, title)

    def view_top_tokens(self, batch: int = 0) -> LoopTokens:
        """A circuitsvis table of one prompt's top tokens, a column for each position; the reader picks loop and layer.

        Args:
            batch: the prompt.
        """
        tops, probs = self.top_tokens(batch), self.top_probs.select(self.axes.index("batch"), self._row(batch))
        if self.layers is None:
            tops, probs = [[loop] for loop in tops], probs[:, None]
        places = ["state"] if self.layers is None else [f"{PLACES[self.site]} {layer}" for layer in self.layers]
        return top_tokens_table(probs, tops, self.loops, places, self.positions)
