"""Does a loop pass through the stages of a feedforward model? One loop's curve against a curve over depth.

Both curves are stretched to the same relative depth and correlated. Curves of few layers correlate easily, so each
correlation comes with two nulls, made by reordering the loop's values over its layers (before stretching, as the points
between two layers are not observations):

- circular shifts: the curve keeps its shape and starts elsewhere. The stricter null, as smooth curves stay smooth; but
  k layers have k shifts, so p is never below 1 / k.
- permutations: the layers in any order. Neighbours no longer resemble each other, so against smooth curves p comes out
  too small.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.results import Result
from tl_looped.engine.schedule import CORE, LoopSchedule
from tl_looped.viz.curves import aligned_curves, loop_line

N_POINTS = 101
"""Places in relative depth at which both curves are compared."""


def resample(curve: Float[Tensor, " layer"], n_points: int = N_POINTS) -> Float64[Tensor, " point"]:
    """The curve at evenly spaced relative depths, linear between layers; 0 is the first layer, 1 the last.

    Args:
        curve: one value a layer, all finite, of three layers or more.
        n_points: how many points, two or more.

    Raises:
        InputError: fewer than three layers, or a value that is not finite: the message says at which layer.
    """
    values = _checked(curve, "curve")
    return torch.from_numpy(_stretch(len(values), check_count("n_points", n_points, 2)) @ values)


def _stretch(n_layers: int, n_points: int) -> np.ndarray:
    """The matrix that takes values at layers to values at points."""
    places, layers = np.linspace(0, 1, n_points), np.linspace(0, 1, n_layers)
    return np.stack([np.interp(places, layers, unit) for unit in np.eye(n_layers)], axis=1)


def _checked(curve: Tensor, name: str) -> np.ndarray:
    if curve.ndim != 1 or len(curve) < 3:
        raise InputError(
            f"{name} must hold one value for each of three layers or more, got shape {tuple(curve.shape)}: through two "
            "there is only a straight line, and its correlation says no more than whether it rises."
        )
    wrong = (~curve.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise InputError(
            f"{name} is {float(curve[wrong[0]])} at layer {wrong[0]}: align layers that have a value only."
        )
    return curve.detach().double().cpu().numpy()


class _Judged(NamedTuple):
    correlation: float
    shifts: np.ndarray
    permutations: np.ndarray
    p_shift: float
    p_permutation: float


@dataclass(frozen=True, eq=False, repr=False)
class CurveAlignment(Result):
    """How much a curve over a loop's layers resembles a curve over a feedforward model's layers.

    Attributes:
        curve, reference: what was compared, as given.
        correlation: Pearson's, over relative depth; NaN where a curve is constant, and so are the p-values.
        shifts: the correlations of all circular shifts of the curve, the curve itself first.
        permutations: those of its permutations: all of them (the curve itself first), or as many as were drawn.
        p_shift: share of shifts that correlate as much or more, the curve itself included.
        p_permutation: the same of permutations; of drawn ones (1 + those) / (1 + drawn).
    """

    curve: Float[Tensor, " layer"]
    reference: Float[Tensor, " reference_layer"]
    correlation: float
    shifts: Float[Tensor, " shift"]
    permutations: Float[Tensor, " permutation"]
    p_shift: float
    p_permutation: float

    def to_dataframe(self) -> pd.DataFrame:
        """One row: correlation, p_shift, p_permutation, n_permutations."""
        row = {name: [getattr(self, name)] for name in ("correlation", "p_shift", "p_permutation")}
        return pd.DataFrame({**row, "n_permutations": [len(self.permutations)]})

    def plot(self) -> go.Figure:
        """Both curves over relative depth, each in standard deviations from its mean."""
        title = (
            f"Pearson {self.correlation:.2f}; p {self.p_shift:.2g} by shifts, {self.p_permutation:.2g} by permutations"
        )
        return aligned_curves({"loop": self.curve, "feedforward model": self.reference}, title)


def align_curves(
    curve: Float[Tensor, " layer"],
    reference: Float[Tensor, " reference_layer"],
    *,
    n_points: int = N_POINTS,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> CurveAlignment:
    """Correlate a loop's curve with a feedforward model's, over relative depth, against both nulls of this module.

    The p-values are one-sided: how often is an order of the layers at least as much like the reference.

    Args:
        curve: one value for each layer of the loop, such as `observed.by_loop("mixing").mean(-1)[t]`.
        reference: one value for each layer of the feedforward model, `observe` on it, `.mean("mixing").mean(-1)`.
        n_points: at how many relative depths.
        n_permutations: draws; where the layers have fewer orders than that, all of them are taken.
        seed: of the draws.

    Raises:
        InputError: fewer than three layers, values that are not finite, or counts that are not.

    Source:
        arXiv 2604.11791 compares such curves by eye; correlation and nulls are this library's.
    """
    values, against = _checked(curve, "curve"), _checked(reference, "reference")
    for name, count, least in (("n_points", n_points, 2), ("n_permutations", n_permutations, 1), ("seed", seed, 0)):
        check_count(name, count, least)
    judged = _judge(values, against, n_points, n_permutations, seed)
    return CurveAlignment(
        made_by={"n_points": n_points, "n_permutations": n_permutations, "seed": seed},
        curve=curve.detach().cpu(),
        reference=reference.detach().cpu(),
        correlation=judged.correlation,
        shifts=torch.from_numpy(judged.shifts),
        permutations=torch.from_numpy(judged.permutations),
        p_shift=judged.p_shift,
        p_permutation=judged.p_permutation,
    )


def _judge(values: np.ndarray, against: np.ndarray, n_points: int, n_permutations: int, seed: int) -> _Judged:
    k = len(values)
    stretch = _stretch(k, n_points)
    target = _stretch(len(against), n_points) @ against
    shifted = np.stack([np.roll(values, shift) for shift in range(k)], axis=1)
    exact = math.factorial(k) <= n_permutations
    if exact:
        orders = np.array(list(itertools.permutations(range(k))))
    else:
        draw = np.random.default_rng(seed)
        orders = draw.permuted(np.tile(np.arange(k), (n_permutations, 1)), axis=1)
    shifts = _correlations(stretch @ shifted, target)
    permutations = _correlations(stretch @ values[orders].T, target)
    if math.isnan(shifts[0]):
        return _Judged(math.nan, shifts, permutations, math.nan, math.nan)
    as_much = [null >= shifts[0] - 1e-12 for null in (shifts, permutations)]  # the curve's own order ties with itself
    p = as_much[1].mean() if exact else (1 + as_much[1].sum()) / (1 + n_permutations)
    return _Judged(float(shifts[0]), shifts, permutations, float(as_much[0].mean()), float(p))


def _correlations(curves: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pearson correlation of each column with the target; NaN where one of the two is constant."""
    centered = [one - one.mean(0) for one in (curves, target[:, None])]
    lengths = [np.linalg.norm(one, axis=0) for one in centered]
    constant = [
        length <= 1e-12 * np.linalg.norm(one, axis=0)
        for length, one in zip(lengths, (curves, target[:, None]), strict=True)
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (centered[0] * centered[1]).sum(0) / (lengths[0] * lengths[1])
    return np.where(constant[0] | constant[1], np.nan, found.clip(-1, 1))


@dataclass(frozen=True, eq=False, repr=False)
class LoopAlignment(Result):
    """How much each loop's curve resembles a feedforward model's; NaN for a loop with a layer without value.

    Attributes:
        stack: the layers that were compared.
        correlation: Pearson's, over relative depth; NaN where a curve is constant.
        p_shift, p_permutation: of each loop, see `CurveAlignment`. They are not corrected for the number of loops.
    """

    stack: str
    correlation: Float[Tensor, " loop"]
    p_shift: Float[Tensor, " loop"]
    p_permutation: Float[Tensor, " loop"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each loop: loop, correlation, p_shift, p_permutation."""
        columns = {name: getattr(self, name).numpy() for name in ("correlation", "p_shift", "p_permutation")}
        return pd.DataFrame({"loop": range(len(self.correlation)), **columns})

    def plot(self) -> go.Figure:
        """The correlation over loops; p-values in the text of each point."""
        texts = [
            f"p {a:.2g} by shifts, {b:.2g} by permutations"
            for a, b in zip(self.p_shift, self.p_permutation, strict=True)
        ]
        return loop_line(self.correlation, texts, "correlation with the feedforward model's curve")


def align_loops(
    values: Float[Tensor, " depth"],
    schedule: LoopSchedule,
    reference: Float[Tensor, " reference_layer"],
    *,
    stack: str = CORE,
    n_points: int = N_POINTS,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> LoopAlignment:
    """`align_curves` for every loop of a curve over layer calls.

    Args:
        values: one for each layer call, such as `observed.mean("residual_entropy")`.
        schedule: of the run, `observed.schedule`.
        reference, n_points, n_permutations, seed: as in `align_curves`.
        stack: whose loops.

    Raises:
        InputError: a stack that does not loop, another number of values than layer calls, no loop with all values,
            or what `align_curves` refuses.
    """
    n_loops, n_layers = schedule.n_loops(stack), schedule.n_layers(stack)
    if not n_loops:
        raise InputError(f"{stack!r} does not loop: {schedule.describe()}.")
    if tuple(values.shape) != (schedule.depth,):
        raise InputError(
            f"values must hold one number for each of the {schedule.depth} layer calls of {schedule.describe()}, got "
            f"shape {tuple(values.shape)}."
        )
    curves = torch.stack(
        [torch.stack([values[schedule.realised_depth(stack, i, t)] for i in range(n_layers)]) for t in range(n_loops)]
    )
    whole = curves.isfinite().all(1)
    if not bool(whole.any()):
        raise InputError("no loop has a finite value in all of its layers, so there is nothing to align.")
    options = {"n_points": n_points, "n_permutations": n_permutations, "seed": seed}
    found = [align_curves(curve, reference, **options) if ok else None for curve, ok in zip(curves, whole, strict=True)]

    def column(name: str) -> Tensor:
        numbers = [math.nan if one is None else getattr(one, name) for one in found]
        return torch.tensor(numbers, dtype=torch.float64)

    return LoopAlignment(
        made_by={**options, "schedule": schedule.describe()},
        stack=stack,
        correlation=column("correlation"),
        p_shift=column("p_shift"),
        p_permutation=column("p_permutation"),
    )
