"""Whether a model's attention comes to rest over loops: per head, and between all layer calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.attention.patterns import STABILITY, at_query, distance_matrix, settling_loop
from tl_looped.engine.cache import LoopedCache
from tl_looped.engine.checks import check_eval, check_number
from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.results import Result, pairs_of_calls
from tl_looped.engine.runs import Prompts, RunOptions, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe import Measure
from tl_looped.observe.observation import BATCH_SIZE, observe
from tl_looped.observe.observed import Observed
from tl_looped.viz.calls import call_matrix
from tl_looped.viz.stability import CHANGE_SCALE, head_changes

Change = Literal["tv_to_previous", "tv_to_last", "frobenius_to_previous", "frobenius_to_last"]

_MEASURES = dict(zip(get_args(Change), STABILITY, strict=True))


@dataclass(frozen=True, eq=False, repr=False)
class AttentionStability(Result):
    """How each head's pattern changes over loops: the mean over prompts, and each prompt's own.

    What compares with the loop before is NaN at loop 0; what compares with the last is 0 in the last. A prompt of one
    token, which can only look at itself, is NaN, and in no mean.

    Attributes:
        position: the query that was looked at, as it was given; None for all.
        tolerance: total variation up to which a pattern counts as the last one.
        tv_to_previous, tv_to_last: total variation, mean over queries: the share of attention that sits elsewhere.
        frobenius_to_previous, frobenius_to_last: Frobenius norm of the difference.
        score: 1 − the mean of `tv_to_previous` over loops: 1 where attention never moves, 0 where every loop moves all
            of it to other keys.
        settles_at: the first loop from which on `tv_to_last` stays within the tolerance, see `settling_loop`; NaN for
            never.
        per_prompt: the four changes of each prompt, by their names.
    """

    position: int | None
    tolerance: float
    tv_to_previous: Float[Tensor, "loop layer head"]
    tv_to_last: Float[Tensor, "loop layer head"]
    frobenius_to_previous: Float[Tensor, "loop layer head"]
    frobenius_to_last: Float[Tensor, "loop layer head"]
    score: Float[Tensor, "layer head"]
    settles_at: Float[Tensor, "layer head"]
    per_prompt: dict[str, Float[Tensor, "prompt loop layer head"]]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each loop, core layer and head: loop, layer, head and the four changes."""
        places = np.indices(self.tv_to_last.shape).reshape(3, -1)
        columns = dict(zip(("loop", "layer", "head"), places, strict=True))
        return pd.DataFrame(columns | {name: getattr(self, name).flatten().numpy() for name in _MEASURES})

    def heads(self) -> pd.DataFrame:
        """One row for each core layer and head: layer, head, score, settles_at (NaN for never)."""
        layer, head = np.indices(self.score.shape).reshape(2, -1)
        values = {name: getattr(self, name).flatten().numpy() for name in ("score", "settles_at")}
        return pd.DataFrame({"layer": layer, "head": head, **values})

    def plot(self, change: Change = "tv_to_last") -> go.Figure:
        """Every head's change over loops, mean over prompts: a row for each, with a mark where it settles.

        Args:
            change: which of the four.

        Raises:
            InputError: no such change.
        """
        if change not in get_args(Change):
            raise InputError(f"change must be one of {get_args(Change)}, got {change!r}.")
        which = "all queries" if self.position is None else f"query at position {self.position}"
        prompts = len(self.per_prompt[change])
        which += f", mean over {prompts} prompts" if prompts > 1 else ""
        title = f"Attention over loops: {self.made_by.get('model', '')}, {which}"
        top, label = 1.0 if change.startswith("tv") else None, f"{_MEASURES[change].unit}<br>{_MEASURES[change].label}"
        return head_changes(getattr(self, change), self.settles_at, self.tolerance, label, title, top)


def stability_of(
    observed: Observed, *, position: int | None = None, tolerance: float = 0.05, stack: str | None = None
) -> AttentionStability:
    """Whether attention comes to rest, of an observation.

    Args:
        observed: from `observe(..., measures=STABILITY)`, or of one query, `[at_query(one, position) for one in
            STABILITY]`.
        position: that query, for the result to say.
        tolerance: total variation up to which a pattern counts as the last one.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: the measures are missing, or no prompt has two tokens.
    """
    check_number("tolerance", tolerance, low_too=True)
    per_prompt = {name: observed.prompts_by_loop(one.name, stack) for name, one in _MEASURES.items()}
    changes = {name: values.nanmean(0) for name, values in per_prompt.items()}
    if not bool(changes["tv_to_last"].isfinite().any()):
        raise InputError("no prompt has two tokens, and a single token can only look at itself: pass longer prompts.")
    return AttentionStability(
        made_by=observed.made_by | ({} if stack is None else {"stack": stack}),
        position=position,
        tolerance=float(tolerance),
        **changes,
        score=1 - changes["tv_to_previous"][1:].mean(0),
        settles_at=settling_loop(changes["tv_to_last"], tolerance),
        per_prompt=per_prompt,
    )


@with_run_options
def attention_stability(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    position: int | None = None,
    tolerance: float = 0.05,
    stack: str | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> AttentionStability:
    """Whether, and from which loop on, each head of the core layers looks at the same keys.

    Over all queries, one that keeps moving hardly shows among many at rest: to follow the token that answers, pass its
    position. Every batch runs twice, once for the end; of patterns two loops are kept.

    Args:
        model, batch_size, progress, options: as in `observe`.
        prompts: of two tokens or more.
        n_loops: loops to run, two or more; None for the count the model was trained with.
        position: of one query, negative from each prompt's end; None for all, of which total variation is the mean.
        tolerance: total variation up to which a pattern counts as the last one.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: before the run, for a position that a prompt does not have, or prompts of one token; in it, for
            activations that are not finite: the message names the layer and loop where that began.

    Source:
        arXiv 2604.11791, section 4 (Frobenius distances); score and settling loop are this library's.
    """
    check_eval(check_looped(model, several_stacks=True))
    model.cfg.looping_stack(stack)
    check_number("tolerance", tolerance, low_too=True)
    runs = model.prepare(prompts, n_loops, **options)
    lengths = [int(real.sum()) for real in runs.rows.real]
    if max(lengths) < 2:
        raise InputError("no prompt has two tokens, and a single token can only look at itself: pass longer prompts.")
    measures: Sequence[Measure] = STABILITY
    if position is not None:
        resolve_index("position", position, min(lengths))
        measures = [at_query(one, position) for one in STABILITY]
    observed = observe(model, runs, measures=measures, batch_size=batch_size, progress=progress)
    return stability_of(observed, position=position, tolerance=tolerance, stack=stack)


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
        return pairs_of_calls(self.loops, self.layers, self.distance, "distance", "head")

    def plot(self, head: int | None = None) -> go.Figure:
        """The matrix as a heatmap.

        Args:
            head: of which head; None for the mean over heads.
        """
        chosen = None if head is None else resolve_index("head", head, len(self.distance))
        shown = self.mean() if chosen is None else self.distance[chosen]
        which = f"mean of {len(self.distance)} heads" if chosen is None else f"head {chosen}"
        title = f"Distance of attention patterns, {which}: {self.made_by.get('model', '')}"
        look = ("the distances", "Frobenius<br>distance", CHANGE_SCALE, (0.0, None))
        return call_matrix(shown, self.loops, self.layers, title, *look)


def pattern_distances_of(cache: LoopedCache, *, stack: str | None = None) -> PatternDistances:
    """Frobenius distances between the patterns of every two (loop, layer) pairs of a cache.

    Args:
        cache: of one prompt, with "attn.hook_pattern" of the core layers, the same loops for each.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: several prompts, a single token, no patterns, or patterns that are not finite.

    Source:
        arXiv 2604.11791, similarity of attention patterns between all (loop, layer) pairs.
    """
    stack = cache.cfg.looping_stack(stack)
    name = cache.cfg.name_in(stack, "pattern")
    layers = [i for i in range(cache.cfg.n_core) if cache.loops(name, i)]
    patterns = cache.stack(name, layers or None)  # [loop, layer, batch?, head, query, key]
    if cache.has_batch_dim:
        if patterns.shape[2] != 1:
            raise InputError(
                f"the cache holds {patterns.shape[2]} prompts: pass one, cache.apply_slice_to_batch_dim(0)."
            )
        patterns = patterns[:, :, 0]
    if patterns.shape[-1] < 2:
        raise InputError("a single token can only look at itself: cache a prompt of two tokens or more.")
    return PatternDistances(
        made_by={"model": cache.cfg.model_name, **cache.run.describe(), **cache.cfg.made_of(stack)},
        loops=tuple(cache.loops(name, layers[0])),
        layers=tuple(layers),
        distance=distance_matrix(patterns.flatten(0, 1)).cpu(),
    )
