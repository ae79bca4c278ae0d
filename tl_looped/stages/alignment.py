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

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.results import Result
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


@dataclass(frozen=True, eq=False, repr=False)
class CurveAlignment(Result):
    """How much curves over a loop's layers resemble a curve over a feedforward model's layers.

    Of several curves every number has a first axis, [loop], and is NaN for a loop with a layer without value. p-values
    are not corrected for the number of loops.

    Attributes:
        curve, reference: what was compared, as given.
        correlation: Pearson's, over relative depth; NaN where a curve is constant, and so are the p-values.
        shifts: the correlations of all circular shifts of the curve, the curve itself first.
        permutations: those of its permutations: all of them (the curve itself first), or as many as were drawn.
        p_shift: share of shifts that correlate as much or more, the curve itself included.
        p_permutation: the same of permutations; of drawn ones (1 + those) / (1 + drawn).
    """

    curve: Float[Tensor, "*loop layer"]
    reference: Float[Tensor, " reference_layer"]
    correlation: Float64[Tensor, "*loop"]
    shifts: Float64[Tensor, "*loop shift"]
    permutations: Float64[Tensor, "*loop permutation"]
    p_shift: Float64[Tensor, "*loop"]
    p_permutation: Float64[Tensor, "*loop"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each curve: loop, correlation, p_shift, p_permutation, n_permutations."""
        columns = {name: getattr(self, name).reshape(-1) for name in ("correlation", "p_shift", "p_permutation")}
        table = pd.DataFrame({"loop": range(len(columns["p_shift"])), **columns})
        return table.assign(n_permutations=self.permutations.shape[-1])

    def plot(self) -> go.Figure:
        """Of one curve, both over relative depth, each in standard deviations from its mean; else correlations."""
        texts = [
            f"p {a:.2g} by shifts, {b:.2g} by permutations"
            for a, b in zip(self.p_shift.reshape(-1), self.p_permutation.reshape(-1), strict=True)
        ]
        if self.curve.ndim > 1:
            return loop_line(self.correlation, texts, "correlation with the feedforward model's curve")
        curves = {"loop": self.curve, "feedforward model": self.reference}
        return aligned_curves(curves, f"Pearson {self.correlation:.2f}; {texts[0]}")


def align_curves(
    curve: Float[Tensor, "*loop layer"],
    reference: Float[Tensor, " reference_layer"],
    *,
    n_points: int = N_POINTS,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> CurveAlignment:
    """Correlate a loop's curve with a feedforward model's, over relative depth, against both nulls of this module.

    The p-values are one-sided: how often is an order of the layers at least as much like the reference.

    Args:
        curve: one value for each layer of the loop, or those of all loops, [loop, layer], such as
            `observed.by_loop("residual_entropy")`. Of several, loops with a layer that has no value are left out.
        reference: one value for each layer of the feedforward model, `observe` on it, `.mean("mixing").mean(-1)`.
        n_points: at how many relative depths.
        n_permutations: draws; where the layers have fewer orders than that, all of them are taken.
        seed: of the draws, the same for every loop.

    Raises:
        InputError: fewer than three layers, values that are not finite in a single curve or in all, or counts that are
            not.

    Source:
        arXiv 2604.11791 compares such curves by eye; correlation and nulls are this library's.
    """
    against = _checked(reference, "reference")
    for name, count, least in (("n_points", n_points, 2), ("n_permutations", n_permutations, 1), ("seed", seed, 0)):
        check_count(name, count, least)
    rows = curve[None] if curve.ndim == 1 else curve
    whole = rows.isfinite().all(-1) if curve.ndim == 2 else torch.ones(len(rows), dtype=torch.bool)
    if not bool(whole.any()):
        raise InputError("no loop has a finite value in all of its layers, so there is nothing to align.")
    judged = {
        t: _judge(_checked(rows[t], "curve"), against, n_points, n_permutations, seed)
        for t in whole.nonzero().flatten().tolist()
    }
    gap = {name: torch.full_like(value, math.nan) for name, value in next(iter(judged.values())).items()}
    found = [judged.get(t, gap) for t in range(len(rows))]
    columns = {name: torch.stack([one[name] for one in found]) for name in gap}
    return CurveAlignment(
        made_by={"n_points": n_points, "n_permutations": n_permutations, "seed": seed},
        curve=curve.detach().cpu(),
        reference=reference.detach().cpu(),
        **{name: column if curve.ndim > 1 else column[0] for name, column in columns.items()},
    )


def _judge(values: np.ndarray, against: np.ndarray, n_points: int, n_permutations: int, seed: int) -> dict[str, Tensor]:
    """The numbers of a `CurveAlignment` for one curve."""
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
    p_shift = p_permutation = math.nan
    if not math.isnan(shifts[0]):  # the curve's own order ties with itself
        p_shift, least = (shifts >= shifts[0] - 1e-12).mean(), permutations >= shifts[0] - 1e-12
        p_permutation = least.mean() if exact else (1 + least.sum()) / (1 + n_permutations)
    found = {"correlation": shifts[0], "shifts": shifts, "permutations": permutations}
    found |= {"p_shift": p_shift, "p_permutation": p_permutation}
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in found.items()}


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
