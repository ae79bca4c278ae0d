"""Does a state come to rest, when, and how fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from scipy.stats import linregress
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.dynamics.measures import DISTANCE
from tl_looped.dynamics.tokens import place_table, prepare_long
from tl_looped.engine.checks import check_axes, check_loop_axis, check_number, undefined_series
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import held_to_end, met_from, wide
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, RunOptions, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.model import LoopedModel
from tl_looped.observe.observation import BATCH_SIZE, observe
from tl_looped.observe.observed import Observed
from tl_looped.viz.dynamics import convergence_curves

CLEAR = 20.0
"""A distance enters the fit where it is so many times what remains in the end: the end then stands for the fixed point
to within 5 %, and rounding noise is as small beside it."""

_FEWEST = 4  # points for a line, its error and its bend
_SCATTER = 12  # points that tell scatter from a bend
_TAIL = 0.25  # share of the loops, at the end, that says what remains
_DRIFT = 5.0  # where the spectrum is dense, the slope goes on for some more drifts like that over the fitted loops
_TURN = 2.0  # and turns from the slope of the loops before by as much as it has turned since, and as much again
_NO_FIT = (math.nan, math.nan, 0, 0)


@dataclass(frozen=True, eq=False, repr=False)
class Convergence(Result):
    """For every series of distances: whether it came to rest, from which loop on, and how fast.

    A series that is NaN throughout (padding) is undefined: NaN in every field.

    Attributes:
        distances: what was judged.
        axes: names of the axes behind the loop.
        places: prompt and position of each index of the last axis; empty where it is a plain index.
        tolerance: the distance that counts as rest.
        converged: 1.0 where it converged, 0.0 where it did not.
        loop: the first loop from which on the tolerance is met until the end; NaN where it did not converge.
        rate: the fitted exponent per loop, d_t ≈ C exp(rate · t), so below zero where distances shrink; NaN where
            fewer than four loops can be fitted, or where the error would be as large as the rate.
        rate_error: its error, in the same unit: the scatter about the line and what biases it, see `settled`.
        fit_start, fit_stop: the first fitted loop and the one behind the last; both 0 where there is no fit.
    """

    distances: Float[Tensor, "loop *dims"]
    axes: tuple[str, ...]
    places: dict[str, Int[Tensor, " token"]]
    tolerance: float
    converged: Float[Tensor, "*dims"]
    loop: Float[Tensor, "*dims"]
    rate: Float[Tensor, "*dims"]
    rate_error: Float[Tensor, "*dims"]
    fit_start: Int[Tensor, "*dims"]
    fit_stop: Int[Tensor, "*dims"]

    def share(self) -> float:
        """Share of the defined series that converged; NaN where none is defined."""
        return float(self.converged.nanmean())

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each series: its place, verdict, loop, rate and rate_error, and the fitted loops."""
        table = place_table(self.converged.shape, self.axes, self.places)
        names = {1.0: "converged", 0.0: "did not converge"}
        table["verdict"] = [names.get(value, "undefined") for value in self.converged.flatten().tolist()]
        for name in ("loop", "rate", "rate_error", "fit_start", "fit_stop"):
            table[name] = getattr(self, name).flatten().numpy()
        return table

    def plot(self) -> go.Figure:
        """Distance over loops, one line for each layer: the median over tokens, with the range of the middle 80 %."""
        layered = self.axes[:1] == ("layer",)
        rows = len(self.converged) if layered else 1
        curves, verdict = self.distances.reshape(len(self.distances), rows, -1), self.converged.reshape(rows, -1)
        counted = "layers and tokens" if layered else "series"
        title = f"Convergence: {self.made_by.get('model', '')}, {self.share():.1%} of {counted}"
        return convergence_curves(curves, verdict, self.tolerance, layered, title)


def settled(
    distances: Float[Tensor, "loop *dims"],
    tolerance: float = 1e-2,
    *,
    hold: float = 0.25,
    axes: Sequence[str] | None = None,
) -> Convergence:
    """Judge series of distances to the end: converged or not, from which loop on, at which rate.

    A series converged if its distances are at most `tolerance` from some loop on until the end, and that loop is early
    enough: at least the share `hold` of all loops, and at least two, lie at or behind it. (The last loop's distance to
    itself is zero whatever the state does, and a state that passes by its end is near it for a few loops only.)

    The rate is the slope of a least-squares line through log d_t over t. With m the largest distance in the last
    quarter of the loops, what remains there, and ε the spacing of numbers at 1 in the distances' dtype, a loop is
    clear if d_t > 20 max(m, ε max(1, largest d)). Fitted are the loops from 0 up to the first that is not clear; if
    those are eight or more, the later half of them, as early loops may still be on their way to the geometric regime.
    So neither rounding noise nor the tail, where d_t falls because x_T is not quite the fixed point, bends the line,
    and a series that has not come to rest in three quarters of its loops has no rate.

    The rate's error is the root of a sum of squares: the line's standard error; rounding, ε max(1, largest d) in every
    distance; the end, where the last distance is zero, so that distances are to x_T: with fixed point x*, d_t is
    ‖x_t − x*‖ give or take ‖x_T − x*‖, and this is the most by which that can turn the line; and the transient, in
    which faster components of the state still count: five times the drift of the slope over the fitted loops, and twice
    its difference from the slope over the loops before, from half as far on, both less what scatter alone makes of
    them. On constructed contractions (rates 0.5 to 0.99, 32 to 128 loops, up to 64 dimensions, random matrices among
    them) the true rate lies within two errors in nine of ten cases or more of every kind. The rest are components so
    alike that the fitted loops can't tell them apart.

    Args:
        distances: ‖x_t − x_T‖, relative or not, such as `DISTANCE` gives; or to a fixed point that is known.
        tolerance: in the unit of the distances. Half-precision states do not rest closer than about 1e-2.
        hold: the share of loops for which the tolerance must have been met in the end, above 0 and at most 1.
        axes: names of the axes behind the loop.

    Raises:
        InputError: fewer than two loops, negative or infinite distances, a series with NaN in some loops, or a
            tolerance or share out of range.

    Source:
        arXiv 2604.11791 measures distances to the state at loop 128; verdict and rate are this library's.
    """
    _check(tolerance, hold)
    check_loop_axis(distances, "distances")
    names = check_axes(axes, distances.ndim - 1)
    undefined = undefined_series(distances, "distances")
    if bool((distances < 0).any()):
        raise InputError(f"distances must not be below zero, got {float(distances[distances < 0][0]):.4g}.")
    values = wide(distances).cpu()
    n = len(values)
    converged = held_to_end(values <= tolerance) >= max(2, math.ceil(hold * n))
    nan = torch.tensor(float("nan"), dtype=values.dtype)
    return Convergence(
        made_by={"measure": "given distances", "tolerance": tolerance, "hold": hold},
        distances=values,
        axes=names,
        places={},
        tolerance=float(tolerance),
        converged=converged.to(values.dtype).where(~undefined.cpu(), nan),
        loop=met_from(values <= tolerance).to(values.dtype).where(converged, nan),
        **_fits(values),
    )


def convergence_of(
    observed: Observed,
    *,
    tolerance: float = 1e-2,
    hold: float = 0.25,
    name: str = DISTANCE.name,
    stack: str | None = None,
) -> Convergence:
    """`settled` for every core layer and token of an observation.

    Args:
        observed: from `observe(..., measures=[DISTANCE], per_token=["distance"])`.
        tolerance, hold: as in `settled`.
        name: of another measure of distance to the last loop.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: what `settled` refuses; or the measure was not kept for every token.
    """
    values, places = observed.tokens_by_loop(name, stack)
    found = settled(values, tolerance, hold=hold, axes=("layer", "token"))
    made_by = {**observed.made_by, "tolerance": tolerance, "hold": hold} | ({} if stack is None else {"stack": stack})
    return replace(found, made_by=made_by, places=places)


@with_run_options
def convergence(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    tolerance: float = 1e-2,
    hold: float = 0.25,
    stack: str | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> Convergence:
    """Whether each core layer's output comes to rest at each token, from which loop on, and how fast.

    Distances are ‖x_t − x_T‖ / ‖x_T‖ with T the last loop; every batch runs twice, once for the end. To go on after an
    interruption, pass `convergence_of` what `observe(..., save_to=...)` gives.

    Args:
        model, prompts, batch_size, progress, options: as in `observe`.
        n_loops: T; None for 128, as in the paper.
        tolerance, hold: as in `settled`.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: what `settled` and `observe` refuse; states that are not finite, with layer and loop.

    Source:
        arXiv 2604.11791, distance to the approximate fixed point.
    """
    _check(tolerance, hold)
    runs = prepare_long(model, prompts, n_loops, options, several_stacks=True)
    model.cfg.looping_stack(stack)
    per_token = [DISTANCE.name]
    found = observe(model, runs, measures=[DISTANCE], per_token=per_token, batch_size=batch_size, progress=progress)
    return convergence_of(found, tolerance=tolerance, hold=hold, stack=stack)


def _check(tolerance: float, hold: float) -> None:
    check_number("tolerance", tolerance)
    check_number("hold", hold, 0.0, 1.0, high_too=True)


def _fits(distances: Float[Tensor, "loop *dims"]) -> dict[str, Tensor]:
    """The fields of `Convergence` that come from the fit."""
    columns, eps = distances.double().reshape(len(distances), -1).T.numpy(), torch.finfo(distances.dtype).eps
    found = torch.tensor([_fit(column, eps) for column in columns], dtype=torch.float64)
    rate, error, start, stop = found.T.reshape(4, *distances.shape[1:])
    fit = {"rate": rate.to(distances.dtype), "rate_error": error.to(distances.dtype)}
    return {**fit, "fit_start": start.long(), "fit_stop": stop.long()}


def _fit(d: np.ndarray, eps: float) -> tuple[float, float, int, int]:
    """(slope, its error, first loop, loop behind the last) of log d over loops; see `settled`."""
    noise = eps * max(1.0, d.max())
    remains = d[-max(2, math.ceil(_TAIL * len(d))) :].max()
    clear = d > CLEAR * max(remains, noise)
    stop = int(clear.argmin())  # the last loops are never clear, so there is one; NaN is not clear either
    start = stop // 2 if stop >= 2 * _FEWEST else 0
    if stop - start < _FEWEST:
        return _NO_FIT
    loops, logs = np.arange(start, stop), np.log(d[start:stop])
    line: Any = linregress(loops, logs)
    slope, x = float(line.slope), loops - loops.mean()
    weights = x / (x @ x)  # the slope is weights @ logs
    # Scatter is told by third differences, of which a smooth curve has little, where there are loops enough for them.
    scatter = math.sqrt(np.square(np.diff(logs, 3)).mean() / 20) if len(x) >= _SCATTER else 0.0
    square = np.square(x) - np.square(x).mean()
    bend = len(x) * (abs(square @ logs) / (square @ square) - 2 * scatter / np.linalg.norm(square))
    parts = [float(line.stderr), float(np.linalg.norm(weights * noise / d[start:stop])), _DRIFT * max(0.0, bend)]
    if start:
        earlier = np.arange(start // 2, start) - (start // 2 + start - 1) / 2
        before = earlier / (earlier @ earlier)
        turn = abs(before @ np.log(d[start // 2 : start]) - slope)
        by_chance = 2 * scatter * math.hypot(np.linalg.norm(weights), np.linalg.norm(before))
        parts.append(_TURN * max(0.0, float(turn) - by_chance))
    if d[-1] == 0 and slope < 0:
        left = np.exp(slope * (len(d) - 1 - loops))  # how large the end's own distance is beside each fitted one
        parts.append(float(np.dot(np.abs(weights), -np.log1p(-left))))
    error = math.hypot(*parts)
    return (slope, error, start, stop) if error < abs(slope) else _NO_FIT
