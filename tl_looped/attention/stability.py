"""Whether a model's attention comes to rest over loops: per head for one prompt, and between all layer calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.attention.distances import (
    distance_matrix,
    mean_total_variation,
    pattern_distance,
    settling_loop,
    stability_score,
)
from tl_looped.attention.patterns import checked_pattern
from tl_looped.engine.cache import LoopedCache
from tl_looped.engine.checks import check_eval, check_number
from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.results import Result
from tl_looped.engine.runs import check_one_prompt, check_whole_run
from tl_looped.engine.schedule import CORE, HookSite
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe.watching import naming_origin
from tl_looped.viz.stability import call_distances, head_changes

Change = Literal["tv_to_previous", "tv_to_last", "frobenius_to_previous", "frobenius_to_last"]

_LABELS: dict[str, str] = {
    "tv_to_previous": "total variation<br>to the previous loop",
    "tv_to_last": "total variation<br>to the last loop",
    "frobenius_to_previous": "Frobenius distance<br>to the previous loop",
    "frobenius_to_last": "Frobenius distance<br>to the last loop",
}


@dataclass(frozen=True, eq=False, repr=False)
class AttentionStability(Result):
    """How each head's pattern changes over loops, for one prompt.

    What compares with the loop before is NaN at loop 0; what compares with the last is 0 in the last.

    Attributes:
        position: the query that was looked at; None for all.
        tolerance: total variation up to which a pattern counts as the last one.
        tv_to_previous, tv_to_last: total variation, mean over queries: the share of attention that sits elsewhere.
        frobenius_to_previous, frobenius_to_last: Frobenius norm of the difference.
        score: `stability_score`: 1 where attention never moves, 0 where every loop moves all of it.
        settles_at: the first loop from which on `tv_to_last` stays within the tolerance, see `settling_loop`; NaN for
            never.
    """

    position: int | None
    tolerance: float
    tv_to_previous: Float[Tensor, "loop layer head"]
    tv_to_last: Float[Tensor, "loop layer head"]
    frobenius_to_previous: Float[Tensor, "loop layer head"]
    frobenius_to_last: Float[Tensor, "loop layer head"]
    score: Float[Tensor, "layer head"]
    settles_at: Float[Tensor, "layer head"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each loop, core layer and head: loop, layer, head and the four changes."""
        places = np.indices(self.tv_to_last.shape).reshape(3, -1)
        columns = dict(zip(("loop", "layer", "head"), places, strict=True))
        return pd.DataFrame(columns | {name: getattr(self, name).flatten().numpy() for name in _LABELS})

    def heads(self) -> pd.DataFrame:
        """One row for each core layer and head: layer, head, score, settles_at (NaN for never)."""
        layer, head = np.indices(self.score.shape).reshape(2, -1)
        values = {name: getattr(self, name).flatten().numpy() for name in ("score", "settles_at")}
        return pd.DataFrame({"layer": layer, "head": head, **values})

    def plot(self, change: Change = "tv_to_last") -> go.Figure:
        """Every head's change over loops, a row for each, with a mark where it settles.

        Args:
            change: which of the four.

        Raises:
            InputError: no such change.
        """
        if change not in get_args(Change):
            raise InputError(f"change must be one of {get_args(Change)}, got {change!r}.")
        which = "all queries" if self.position is None else f"query at position {self.position}"
        title = f"Attention over loops: {self.made_by.get('model', '')}, {which}"
        top = 1.0 if change.startswith("tv") else None
        return head_changes(getattr(self, change), self.settles_at, self.tolerance, _LABELS[change], title, top)


@torch.no_grad()
def attention_stability(
    model: LoopedModel,
    prompt: str | Tensor,
    n_loops: int | None = None,
    *,
    position: int | None = None,
    tolerance: float = 0.05,
    **options: Any,
) -> AttentionStability:
    """Whether, and from which loop on, each head of the core layers looks at the same keys.

    Over all queries, one that keeps moving hardly shows among many at rest: to follow the token that answers, pass
    its position.

    Keeps the patterns of all loops, n_loops · layers · heads · pos² numbers; for many prompts or many loops of a large
    model take the measures of `tl_looped.attention.measures` with `tl_looped.observe`.

    Args:
        model: the model.
        prompt: one prompt, text or token ids, of two tokens or more.
        n_loops: loops to run, two or more; None for the count the model was trained with.
        position: of one query, negative from the end; None for all queries, of which total variation is the mean.
        tolerance: total variation up to which a pattern counts as the last one.
        options: `initial_state`, `seed`, `attention_mask`, `position_ids`, `prepend_bos`, as in `LoopedModel.forward`.

    Raises:
        InputError: before the run, for one loop, one token or several prompts; after it, for patterns that are not
            finite: the message names the layer and loop where that began.

    Source:
        arXiv 2604.11791, section 4 (Frobenius distances); score and settling loop are this library's.
    """
    check_eval(check_looped(model))
    run = model.batch(prompt, n_loops, **options)
    check_whole_run(run)
    check_one_prompt(run, tokens=2)
    query = None if position is None else resolve_index("position", position, run.tokens.shape[1])
    check_number("tolerance", tolerance, low_too=True)
    filters = [f"{CORE}.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_core)]
    _, cache = model.run_with_cache(
        run.tokens, run.n_loops, names_filter=filters, device="cpu", return_type=None, **options
    )
    with naming_origin(model, run):
        for name, pattern in cache.items():
            checked_pattern(pattern, repr(name))
    patterns = cache.stack("pattern")[:, :, 0]
    if query is not None:
        patterns = patterns[..., query : query + 1, :]
    before, last = patterns.roll(1, 0), patterns[-1:].expand_as(patterns)
    changes: dict[str, Tensor] = {
        "tv_to_previous": mean_total_variation(patterns, before),
        "tv_to_last": mean_total_variation(patterns, last),
        "frobenius_to_previous": pattern_distance(patterns, before),
        "frobenius_to_last": pattern_distance(patterns, last),
    }
    for name in ("tv_to_previous", "frobenius_to_previous"):
        changes[name][0] = float("nan")
    return AttentionStability(
        made_by={"model": model.cfg.model_name, **run.describe()},
        position=query,
        tolerance=float(tolerance),
        **changes,
        score=stability_score(patterns),
        settles_at=settling_loop(changes["tv_to_last"], tolerance),
    )


@dataclass(frozen=True, eq=False, repr=False)
class PatternDistances(Result):
    """Frobenius distances between the patterns of all core layers in all loops, for one prompt.

    A call is a layer in a loop, in the order in which they run: call = loop · layers + layer.

    Attributes:
        loops: the loops that were cached.
        layers: the core layers that were cached.
        distance: between the same head of every two calls.
    """

    loops: tuple[int, ...]
    layers: tuple[int, ...]
    distance: Float[Tensor, "head call call"]

    def mean(self) -> Float[Tensor, "call call"]:
        """Mean over heads. Between two layers, heads of the same index have nothing else in common."""
        return self.distance.mean(0)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each head and pair: head, loop, layer, other_loop, other_layer, distance."""
        head, call, other = np.indices(self.distance.shape).reshape(3, -1)
        loops, layers = np.array(self.loops), np.array(self.layers)
        table = {"head": head}
        for prefix, index in (("", call), ("other_", other)):
            table[f"{prefix}loop"] = loops[index // len(layers)]
            table[f"{prefix}layer"] = layers[index % len(layers)]
        return pd.DataFrame({**table, "distance": self.distance.flatten().numpy()})

    def plot(self, head: int | None = None) -> go.Figure:
        """The matrix as a heatmap.

        Args:
            head: of which head; None for the mean over heads.
        """
        chosen = None if head is None else resolve_index("head", head, len(self.distance))
        shown = self.mean() if chosen is None else self.distance[chosen]
        which = f"mean of {len(self.distance)} heads" if chosen is None else f"head {chosen}"
        title = f"Distance of attention patterns, {which}: {self.made_by.get('model', '')}"
        return call_distances(shown, self.loops, self.layers, title)


def pattern_distances(cache: LoopedCache) -> PatternDistances:
    """Frobenius distances between the patterns of every two (loop, layer) pairs of a cache.

    Args:
        cache: of one prompt, with "attn.hook_pattern" of the core layers, the same loops for each.

    Raises:
        InputError: several prompts, a single token, no patterns, or patterns that are not finite.

    Source:
        arXiv 2604.11791, similarity of attention patterns between all (loop, layer) pairs.
    """
    component = "attn.hook_pattern"
    layers = [i for i in range(cache.cfg.n_core) if cache.loops(HookSite(component, CORE, i).name)]
    patterns = cache.stack("pattern", layers or None)  # [loop, layer, batch?, head, query, key]
    if cache.has_batch_dim:
        if patterns.shape[2] != 1:
            raise InputError(
                f"the cache holds {patterns.shape[2]} prompts: pass one, cache.apply_slice_to_batch_dim(0)."
            )
        patterns = patterns[:, :, 0]
    if patterns.shape[-1] < 2:
        raise InputError("a single token can only look at itself: cache a prompt of two tokens or more.")
    return PatternDistances(
        made_by={"model": cache.cfg.model_name, **cache.run.describe()},
        loops=tuple(cache.loops("pattern", layers[0])),
        layers=tuple(layers),
        distance=distance_matrix(patterns.flatten(0, 1)).cpu(),
    )
