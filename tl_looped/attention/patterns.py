"""What an attention pattern is, checked, and how much patterns differ: tensor functions, and the measures they are.

The functions take patterns of any model, [..., query, key]. The measures read "attn.hook_pattern", so a feedforward
model has nothing to compare: it has no loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.checks import check_floats, check_loop_axis, check_number, check_same_shape
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import met_from, wide, wide_dtype
from tl_looped.observe import Measure

Scale = Literal["absolute", "relative", "normalised"]

# How far a row's sum may be from one: some times what rounding each share does to it.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def checked_pattern(
    pattern: Float[Tensor, "*dims query key"], name: str = "the pattern"
) -> Float[Tensor, "*dims query key"]:
    """The pattern in float32 at least, once it is one.

    Args:
        pattern: attention after its softmax.
        name: what to call it in an error.

    Raises:
        InputError: NaN or infinity, a negative share, or a row that does not sum to one, within 1e-9 in float64, 1e-5
            in float32, 2e-3 in float16 and 1e-2 in bfloat16.
    """
    shares = wide(check_floats(pattern, name, "[..., query, key]", 2))
    off = float((shares.sum(-1) - 1).abs().max())
    if not off <= _TOLERANCE.get(pattern.dtype, 1e-5):  # also where it is NaN
        if not bool(shares.isfinite().all()):
            raise InputError(f"{name} holds NaN or infinity: the state before it is not finite.")
        raise InputError(
            f"{name} has a row whose sum is {off:.3g} away from one: pass attention after the softmax (hook_pattern, "
            "not hook_attn_scores), unedited, in the dtype that it was computed in."
        )
    if bool((shares < 0).any()):
        raise InputError(f"{name} has a negative share, {float(shares.min()):.3g}: pass attention after the softmax.")
    return shares


def pattern_distance(
    pattern: Float[Tensor, "*dims query key"], other: Float[Tensor, "*dims query key"], scale: Scale = "absolute"
) -> Float[Tensor, "*dims"]:
    """‖A − B‖, the Frobenius norm of the difference of two patterns.

    Args:
        pattern: A.
        other: B.
        scale: "absolute": as it is, at most sqrt(2 S) for S queries; "relative": divided by ‖B‖; "normalised": divided
            by sqrt(2 S), so 1 means that every query looks at one key, and at another one in B, whatever the length.

    Returns:
        One distance for each pair, NaN where there is a single key: then there is only one pattern.

    Raises:
        InputError: not patterns, or of different shapes.

    Source:
        arXiv 2604.11791, successive differences and distances of attention patterns ("absolute").
    """
    if scale not in get_args(Scale):
        raise InputError(f"scale must be one of {get_args(Scale)}, got {scale!r}.")
    a, b = _pair(pattern, other)
    distance = torch.linalg.matrix_norm(a - b)
    if scale == "relative":
        distance = distance / torch.linalg.matrix_norm(b)
    elif scale == "normalised":
        distance = distance / math.sqrt(2 * a.shape[-2])
    return _unless_single(distance, a)


def total_variation(
    pattern: Float[Tensor, "*dims query key"], other: Float[Tensor, "*dims query key"]
) -> Float[Tensor, "*dims query"]:
    """½ Σ_j |A_ij − B_ij| for every query i: the share of its attention that has moved to other keys, from 0 to 1.

    In a causal model the first query always looks at itself, so it counts with 0 in a mean over queries.

    Returns:
        One share for each query; NaN where there is a single key.

    Raises:
        InputError: not patterns, or of different shapes.
    """
    a, b = _pair(pattern, other)
    return _unless_single((a - b).abs().sum(-1) / 2, a)


def mean_total_variation(
    pattern: Float[Tensor, "*dims query key"], other: Float[Tensor, "*dims query key"]
) -> Float[Tensor, "*dims"]:
    """The mean of `total_variation` over queries."""
    return total_variation(pattern, other).mean(-1)


def distance_matrix(patterns: Float[Tensor, "call *dims query key"]) -> Float[Tensor, "*dims call call"]:
    """‖A − B‖, Frobenius, between every two of the patterns along the first axis.

    Args:
        patterns: stacked patterns, such as all loops of a layer, `cache.stack("pattern", layer)`.

    Returns:
        A symmetric matrix for each of the axes between, with zeros on its diagonal; NaN where there is a single key.

    Raises:
        InputError: not patterns.

    Source:
        arXiv 2604.11791, similarity of attention patterns between all (loop, layer) pairs.
    """
    shares = checked_pattern(patterns)
    rows = shares.flatten(-2).movedim(0, -2)
    # Not by way of inner products: they cancel for patterns that are nearly the same.
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return _unless_single(distance, shares)


def settling_loop(to_last: Float[Tensor, "loop *dims"], tolerance: float) -> Float[Tensor, "*dims"]:
    """The first loop t from which on the distance to the last loop stays at or below the tolerance.

    The last loop is at distance 0 of itself, so it says nothing: a head that first comes within the tolerance there has
    not settled. Any two loops from t on are within twice the tolerance of each other (for a distance). A drift by small
    steps is near the last loop only shortly before it, so a t close to the end is no sign of rest: run more loops.

    Args:
        to_last: distance of each loop to the last one, in order, the last one included.
        tolerance: in the same unit.

    Returns:
        The loop, from 0, as a float; NaN for never (or where a distance is NaN).

    Raises:
        InputError: only one loop, or a tolerance that is not a number of at least 0.
    """
    check_loop_axis(to_last, "to_last")
    check_number("tolerance", tolerance, low_too=True)
    return met_from(to_last[:-1] <= tolerance).to(wide_dtype(to_last.dtype))


def _pair(pattern: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    check_same_shape(pattern, other, "the other", first="the pattern")
    return checked_pattern(pattern, "the first pattern"), checked_pattern(other, "the second pattern")


def _unless_single(distance: Tensor, pattern: Tensor) -> Tensor:
    return distance if pattern.shape[-1] > 1 else torch.full_like(distance, math.nan)


_PATTERN = "attn.hook_pattern"

PATTERN_STEP = Measure(
    "pattern_step", "‖Aₜ − Aₜ₋₁‖", "Frobenius norm", _PATTERN, pattern_distance, "previous", ("head",)
)
"""Frobenius distance of each head's pattern to that of the loop before."""

PATTERN_DISTANCE = Measure(
    "pattern_distance", "‖Aₜ − A_last‖", "Frobenius norm", _PATTERN, pattern_distance, "last", ("head",)
)
"""Frobenius distance of each head's pattern to that of the last loop; 0 in the last loop itself."""

TOTAL_VARIATION = Measure(
    "total_variation",
    "attention moved since the previous loop",
    "total variation",
    _PATTERN,
    mean_total_variation,
    "previous",
    ("head",),
)
"""Total variation between each head's pattern and that of the loop before, mean over queries."""

VARIATION_TO_LAST = Measure(
    "variation_to_last",
    "attention elsewhere than in the last loop",
    "total variation",
    _PATTERN,
    mean_total_variation,
    "last",
    ("head",),
)
"""Total variation between each head's pattern and that of the last loop, mean over queries."""

STABILITY = (TOTAL_VARIATION, VARIATION_TO_LAST, PATTERN_STEP, PATTERN_DISTANCE)
"""What `attention_stability` looks at."""


def at_query(measure: Measure, position: int) -> Measure:
    """One of these measures, of a single query: negative positions count from each prompt's end."""
    return replace(measure, function=partial(_at_query, measure.function, position))


def _at_query(function: Callable[..., Tensor], position: int, *patterns: Tensor) -> Tensor:
    return function(*(pattern[..., position, :][..., None, :] for pattern in patterns))
