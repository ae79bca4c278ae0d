"""The cycle that a loop walks through its layers: one fixed point for each layer, distinct or all the same.

Where a loop reaches a fixed point, so does every rotation of it: layer l's output has a fixed point of its own, and the
loop goes through them in turn (Prop. 4.1 of arXiv 2604.11791).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.dynamics.convergence import convergence_of
from tl_looped.dynamics.measures import DISTANCE
from tl_looped.dynamics.steps import N_LOOPS, cosine_to
from tl_looped.dynamics.tokens import observe_tokens, place_table
from tl_looped.engine.cache import LoopedCache
from tl_looped.engine.checks import check_axes, check_eval, check_finite, check_floats, check_number, check_same_shape
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import unit
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, check_whole_run
from tl_looped.engine.schedule import CORE, HookSite
from tl_looped.model import LoopedModel, check_looped
from tl_looped.viz.dynamics import distinctness_histogram, similarity_heatmap

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
        call, other = np.indices(self.matrix.shape).reshape(2, -1)
        loops, layers, table = np.array(self.loops), np.array(self.layers), {}
        for prefix, index in (("", call), ("other_", other)):
            table[f"{prefix}loop"] = loops[index // len(layers)]
            table[f"{prefix}layer"] = layers[index % len(layers)]
        return pd.DataFrame({**table, "cosine": self.matrix.flatten().numpy()})

    def plot(self) -> go.Figure:
        """The matrix as a heatmap, with lines between the loops."""
        title = f"Similarity of residual streams: {self.made_by.get('model', '')}"
        return similarity_heatmap(self.matrix, self.loops, self.layers, title)


def similarity(cache: LoopedCache) -> Similarity:
    """`similarity_matrix` of the core layers' outputs in a cache, over all real tokens of all its prompts.

    Args:
        cache: has "resid_post" of the core layers, in the same loops and at all positions. For other tensors there is
            `similarity_matrix`.

    Raises:
        InputError: a cache without them, or states that are not finite, with loop, layer and position.
    """
    layers = [i for i in range(cache.cfg.n_core) if cache.loops("resid_post", i)]
    states = cache.stack("resid_post", layers or None)
    states = states if cache.has_batch_dim else states[:, :, None]
    loops = cache.loops("resid_post", layers[0]) if layers else []
    check_finite(states, ("loop", "layer", "prompt", "position"), {"loop": loops, "layer": layers})
    mask = cache.run.attention_mask.to(states.device)
    if mask.shape != states.shape[2:4]:
        raise InputError(
            f"the cache has {tuple(states.shape[2:4])} prompts and positions of a run of {tuple(mask.shape)}: cache "
            "all positions (without pos_slice), or call similarity_matrix on the states."
        )
    return Similarity(
        made_by={"model": cache.cfg.model_name, **cache.run.describe()},
        loops=tuple(loops),
        layers=tuple(layers),
        matrix=similarity_matrix(states[:, :, mask].flatten(0, 1)).cpu(),
    )


@torch.no_grad()
def loop_similarity(
    model: LoopedModel, input: str | list[str] | Tensor, n_loops: int | None = None, **options: Any
) -> Similarity:
    """`similarity` of a run that is made for it.

    Keeps the residual streams of all loops, n_loops · layers · pos · d_model numbers for each prompt.

    Args:
        model, input: as in `LoopedModel.forward`.
        n_loops: loops to run, two or more; None for the count the model was trained with.
        options: `initial_state`, `seed`, `attention_mask`, `position_ids`, `prepend_bos`, `padding_side`.

    Raises:
        InputError: one loop, or what `forward` refuses, before the run; states that are not finite.
    """
    check_eval(check_looped(model))
    run = model.batch(input, n_loops, **options)
    check_whole_run(run)
    names = [HookSite(RESID_POST, CORE, layer).name for layer in range(model.cfg.n_core)]
    _, cache = model.run_with_cache(input, n_loops, names_filter=names, stop_at_loop=run.n_loops, **options)
    return similarity(cache)


# Fixed points of the layers.


@dataclass(frozen=True, eq=False, repr=False)
class Distinctness(Result):
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
        return distinctness_histogram(self.smallest.flatten(), self.threshold, title)


def distinctness(
    points: Float[Tensor, "layer *dims d_model"],
    converged: Float[Tensor, "layer *dims"] | None = None,
    *,
    threshold: float = 0.99,
    axes: Sequence[str] | None = None,
) -> Distinctness:
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
    return _distinct(points, converged, threshold, axes, {}, {"measure": "given points"})


def loop_cycle(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: int = N_LOOPS,
    *,
    threshold: float = 0.99,
    tolerance: float = 1e-2,
    hold: float = 0.25,
    seed: int | None = None,
    **options: Any,
) -> Distinctness:
    """Whether the model's layers have distinct fixed points, at each token of the prompts.

    Every prompt runs three times: for the end, for the distances to it, which say what converged, and for the fixed
    points.

    Args:
        model: in evaluation mode, with two core layers or more.
        prompts: as in `observe`.
        n_loops: 128 in the paper.
        threshold: as in `distinctness`.
        tolerance, hold: when a state has converged, as in `convergence`.
        seed: of a drawn initial state.
        options: `field`, `limit`, `batch_size`, `save_to`, `progress`, as in `observe`.

    Raises:
        InputError: one core layer, or what `distinctness`, `convergence` and `observe` refuse.

    Source:
        arXiv 2604.11791, Prop. 4.1.
    """
    check_number("threshold", threshold, -1.0, 1.0)
    if "initial_state" in options:
        raise InputError("loop_cycle takes no initial_state: fixed points are looked for from the model's own.")
    if isinstance(model, LoopedModel) and model.cfg.n_core < 2:
        raise InputError("this model has one core layer, so its cycle has one point: nothing to tell apart.")
    observed = observe_tokens(model, prompts, DISTANCE, n_loops, 2, {"seed": seed, **options})
    judged = convergence_of(observed, tolerance, hold=hold)
    points = torch.cat([_end(model, tokens, n_loops, seed) for tokens in observed.tokens], dim=1)
    return _distinct(points, judged.converged, threshold, ("token",), judged.places, judged.made_by)


@torch.no_grad()
def _end(model: LoopedModel, tokens: Tensor, n_loops: int, seed: int | None) -> Float[Tensor, "layer pos d_model"]:
    """Every core layer's output in the last loop, for one prompt."""
    names = [HookSite(RESID_POST, CORE, layer, n_loops - 1).name for layer in range(model.cfg.n_core)]
    everything = torch.ones_like(tokens)[None]  # as in collect, a token like the padding's is a token
    _, cache = model.run_with_cache(
        tokens[None], n_loops, names_filter=names, stop_at_loop=n_loops, seed=seed, attention_mask=everything
    )
    return torch.stack([cache[name][0] for name in names]).cpu()


def _distinct(
    points: Tensor,
    converged: Tensor | None,
    threshold: float,
    axes: Sequence[str] | None,
    places: dict[str, Tensor],
    made_by: dict[str, Any],
) -> Distinctness:
    check_number("threshold", threshold, -1.0, 1.0)
    if points.ndim < 2 or len(points) < 2 or points.numel() == 0:
        raise InputError(f"points must be [layer, ..., d_model] with at least two layers, got {tuple(points.shape)}.")
    names = check_axes(axes, points.ndim - 2)
    check_finite(points, ("layer", *names))
    cosines = cosine_to(points[1:], points[:1].expand_as(points[1:])).cpu()
    if converged is not None:
        check_same_shape(cosines.new_empty(points.shape[:-1]), converged, "converged", first="points without d_model")
        cosines = cosines.where((converged.cpu() == 1).all(0), float("nan"))
    smallest, layer = cosines.min(0)  # NaN where one is NaN
    return Distinctness(
        made_by={**made_by, "threshold": threshold},
        axes=names,
        places=places,
        threshold=float(threshold),
        smallest=smallest,
        layer=(layer + 1).where(~smallest.isnan(), -1),
    )
