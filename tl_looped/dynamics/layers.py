"""Layers beside each other: how alike their outputs are, and the cycle of fixed points that a loop walks through.

Where a loop reaches a fixed point, so does every rotation of it: layer l's output has a fixed point of its own, and the
loop goes through them in turn (Prop. 4.1 of arXiv 2604.11791).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.dynamics.measures import cosine_to
from tl_looped.dynamics.settling import convergence
from tl_looped.dynamics.tokens import place_table, prepare_long
from tl_looped.engine.cache import Keep, LoopedCache, run_with_cache
from tl_looped.engine.checks import check_axes, check_eval, check_finite, check_floats, check_number, check_same_shape
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import unit
from tl_looped.engine.results import Result, pairs_of_calls
from tl_looped.engine.runs import Prompts, RunOptions, check_whole_run, with_run_options
from tl_looped.engine.schedule import HookSite, LoopCount
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe.observation import BATCH_SIZE
from tl_looped.observe.watching import watch
from tl_looped.viz.dynamics import cycle_histogram, similarity_heatmap

RESID_POST = "hook_resid_post"


# All pairs of layer calls.


def similarity_matrix(states: Float[Tensor, "call *dims d_model"]) -> Float[Tensor, "call other_call"]:
    """Cosine between the residual streams of all pairs of layer calls, averaged over tokens.

    S_ij = mean over tokens of cos(x_i, x_j), over the tokens where neither is zero; NaN where there is none.

    Args:
        states: of every layer call, for all tokens.

    Raises:
        InputError: states that are not finite.

    Source:
        arXiv 2604.11791, similarity of residual streams between (loop, layer) pairs.
    """
    check_floats(states, "states", "[call, ..., d_model]", 2)
    check_finite(states, ("call", *check_axes(None, states.ndim - 2)))
    units = unit(states.reshape(len(states), -1, states.shape[-1]))
    defined = (~units.isnan().any(-1)).to(units.dtype)
    flat = units.nan_to_num().flatten(1)
    return (flat @ flat.T / (defined @ defined.T)).clamp(-1, 1)


@dataclass(frozen=True, eq=False, repr=False)
class Similarity(Result):
    """Cosine between the residual streams of all (loop, layer) pairs.

    Attributes:
        loops: which loops.
        layers: which core layers, in each.
        matrix: between every two calls, mean over tokens; call = loop · layers + layer, counted among these.
    """

    loops: tuple[int, ...]
    layers: tuple[int, ...]
    matrix: Float[Tensor, "call call"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each pair: loop, layer, other_loop, other_layer, cosine."""
        return pairs_of_calls(self.loops, self.layers, self.matrix, "cosine")

    def plot(self) -> go.Figure:
        """The matrix as a heatmap, with lines between the loops."""
        title = f"Similarity of residual streams: {self.made_by.get('model', '')}"
        return similarity_heatmap(self.matrix, self.loops, self.layers, title)


def similarity_of(cache: LoopedCache, *, stack: str | None = None) -> Similarity:
    """`similarity_matrix` of the core layers' outputs in a cache, over all real tokens of all its prompts.

    Args:
        cache: has "resid_post" of the core layers, in the same loops and at all positions. For other tensors there is
            `similarity_matrix`.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: a cache without them, or states that are not finite, with loop, layer and position.
    """
    stack = cache.cfg.looping_stack(stack)
    name = cache.cfg.name_in(stack, "resid_post")
    layers = [i for i in range(cache.schedule.n_layers(stack)) if cache.loops(name, i)]
    states = cache.stack(name, layers or None)
    states = states if cache.has_batch_dim else states[:, :, None]
    loops = cache.loops(name, layers[0]) if layers else []
    check_finite(states, ("loop", "layer", "prompt", "position"), {"loop": loops, "layer": layers})
    mask = cache.run.attention_mask.to(states.device)
    if mask.shape != states.shape[2:4]:
        raise InputError(
            f"the cache has {tuple(states.shape[2:4])} prompts and positions of a run of {tuple(mask.shape)}: cache "
            "all positions (without pos_slice), or call similarity_matrix on the states."
        )
    return Similarity(
        made_by={"model": cache.cfg.model_name, **cache.run.describe(), **cache.cfg.made_of(stack)},
        loops=tuple(loops),
        layers=tuple(layers),
        matrix=similarity_matrix(states[:, :, mask].flatten(0, 1)).cpu(),
    )


@torch.no_grad()
@with_run_options
def similarity(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    stack: str | None = None,
    **options: Unpack[RunOptions],
) -> Similarity:
    """`similarity_of` a run that is made for it.

    Keeps the residual streams of all loops, n_loops · layers · pos · d_model numbers for each prompt.

    Args:
        model, prompts, options: as in `LoopedModel.forward`; prompts run as one batch.
        n_loops: two or more; None for the count the model was trained with.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: one loop, or what `forward` refuses, before the run; states that are not finite.
    """
    check_eval(check_looped(model, several_stacks=True))
    chosen = model.cfg.looping_stack(stack)
    run = model.batch_of(model.prepare(prompts, n_loops, **options))
    check_whole_run(run)
    names = [HookSite(RESID_POST, chosen, layer).name for layer in range(model.cfg.n_core)]
    _, cache = run_with_cache(model, replace(run, reads_out=False), Keep(names))
    return similarity_of(cache, stack=chosen)


# Fixed points of the layers.


@dataclass(frozen=True, eq=False, repr=False)
class Cycle(Result):
    """Whether the fixed points of a loop's layers are distinct, at every token.

    Attributes:
        axes: names of the axes.
        places: prompt and position of each index of the last axis; empty where it is a plain index.
        threshold: a smallest cosine of at least this means degenerate.
        smallest: the smallest cosine between the fixed point of layer 0 and that of another layer; NaN where a layer
            did not converge (or its state is zero), so that there is no cycle of fixed points.
        layer: the layer that has it; -1 where there is none.
    """

    axes: tuple[str, ...]
    places: dict[str, Int[Tensor, " token"]]
    threshold: float
    smallest: Float[Tensor, "*dims"]
    layer: Int[Tensor, "*dims"]

    @property
    def degenerate(self) -> Float[Tensor, "*dims"]:
        """1.0 where all layers have one fixed point, 0.0 where they are distinct, NaN where there is no cycle."""
        return (self.smallest >= self.threshold).to(self.smallest.dtype).where(~self.smallest.isnan(), self.smallest)

    def verdict(self) -> str:
        """One of "distinct", "degenerate", "mixed" (tokens differ) and "no fixed points" (no token has them)."""
        seen = set(self.degenerate[~self.smallest.isnan()].tolist())
        return {0: "no fixed points", 2: "mixed"}.get(len(seen)) or ("degenerate" if 1.0 in seen else "distinct")

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each token: its place, verdict, smallest cosine and the layer that has it."""
        table = place_table(self.smallest.shape, self.axes, self.places)
        names = {1.0: "degenerate", 0.0: "distinct"}
        table["verdict"] = [names.get(value, "no fixed points") for value in self.degenerate.flatten().tolist()]
        table["smallest_cosine"] = self.smallest.flatten().numpy()
        table["layer"] = self.layer.flatten().numpy()
        return table

    def plot(self) -> go.Figure:
        """The smallest cosines of all tokens as a histogram, with the threshold."""
        title = f"Fixed points of the layers: {self.made_by.get('model', '')}, {self.verdict()}"
        return cycle_histogram(self.smallest.flatten(), self.threshold, title)


def cycle_of(
    points: Float[Tensor, "layer *dims d_model"],
    converged: Float[Tensor, "layer *dims"] | None = None,
    *,
    threshold: float = 0.99,
    axes: Sequence[str] | None = None,
) -> Cycle:
    """Whether the layers' fixed points differ: the smallest cosine between layer 0's and any other layer's.

    Args:
        points: the fixed point of every core layer: its output after the last loop.
        converged: 1.0 where it is a fixed point, 0.0 or NaN where it is not, such as `Convergence.converged`; None: all
            are. One layer without makes a token's answer NaN.
        threshold: from which cosine on the fixed points count as one, in (-1, 1).
        axes: names of the axes behind the layer.

    Raises:
        InputError: fewer than two layers, points that are not finite, a threshold out of range, shapes that differ.

    Source:
        arXiv 2604.11791, Prop. 4.1 and section 4.2 (distinctness); the threshold is this library's.
    """
    check_number("threshold", threshold, -1.0, 1.0)
    if points.ndim < 2 or len(points) < 2 or points.numel() == 0:
        raise InputError(f"points must be [layer, ..., d_model] with at least two layers, got {tuple(points.shape)}.")
    names = check_axes(axes, points.ndim - 2)
    check_finite(points, ("layer", *names))
    cosines = _to_first(points).cpu()
    if converged is not None:
        check_same_shape(cosines.new_empty(points.shape[:-1]), converged, "converged", first="points without d_model")
        cosines = cosines.where((converged.cpu() == 1).all(0), float("nan"))
    return _cycle(cosines, names, {}, threshold, {"measure": "given points"})


@with_run_options
def cycle(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    threshold: float = 0.99,
    tolerance: float = 1e-2,
    hold: float = 0.25,
    stack: str | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> Cycle:
    """Whether the model's layers have distinct fixed points, at each token of the prompts.

    Every prompt runs three times: for the end, for the distances to it, which say what converged, and for the cosines
    of the layers' fixed points. Of the states nothing is kept.

    Args:
        model: in evaluation mode, with two core layers or more.
        prompts, batch_size, progress, options: as in `observe`.
        n_loops: None for 128, as in the paper.
        threshold: as in `cycle_of`.
        tolerance, hold: when a state has converged, as in `settled`.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: one core layer, or what `cycle_of`, `settled` and `observe` refuse.

    Source:
        arXiv 2604.11791, Prop. 4.1.
    """
    check_number("threshold", threshold, -1.0, 1.0)
    runs = prepare_long(model, prompts, n_loops, options, several_stacks=True)
    chosen = model.cfg.looping_stack(stack)
    if model.cfg.n_core < 2:
        raise InputError("this model has one core layer, so its cycle has one point: nothing to tell apart.")
    how = {"tolerance": tolerance, "hold": hold, "stack": stack}
    judged = convergence(model, runs, **how, batch_size=batch_size, progress=progress)
    last = model.cfg.schedule(runs.counts).n_loops(chosen) - 1
    names = [HookSite(RESID_POST, chosen, layer, last).name for layer in range(model.cfg.n_core)]
    cosines: dict[int, Tensor] = {}
    for rows in runs.equal_lengths(batch_size):
        ends: list[Tensor] = []
        run = model.batch_of(runs, rows)
        watch(model, run, names, lambda _, x, ends=ends: ends.append(x), only_loops=True)
        cosines |= zip(rows, _to_first(torch.stack(ends)).cpu().unbind(1), strict=True)
    found = torch.cat([cosines[row] for row in range(len(runs))], dim=-1)
    found = found.where((judged.converged == 1).all(0), float("nan"))
    return _cycle(found, ("token",), judged.places, threshold, judged.made_by)


def _to_first(points: Float[Tensor, "layer *dims d_model"]) -> Float[Tensor, "other_layer *dims"]:
    return cosine_to(points[1:], points[:1].expand_as(points[1:]))


def _cycle(
    cosines: Float[Tensor, "other_layer *dims"],
    axes: tuple[str, ...],
    places: dict[str, Tensor],
    threshold: float,
    made_by: dict[str, Any],
) -> Cycle:
    smallest, layer = cosines.min(0)  # NaN where one is NaN
    return Cycle(
        made_by={**made_by, "threshold": threshold},
        axes=axes,
        places=places,
        threshold=float(threshold),
        smallest=smallest,
        layer=(layer + 1).where(~smallest.isnan(), -1),
    )
