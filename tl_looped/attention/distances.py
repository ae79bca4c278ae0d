"""How much attention patterns differ: tensor functions on patterns of any model, [..., query, key]."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.attention.patterns import checked_pattern
from tl_looped.engine.checks import check_loop_axis, check_number, check_same_shape
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import met_from, wide_dtype

Scale = Literal["absolute", "relative", "normalised"]


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
    wide = checked_pattern(patterns)
    rows = wide.flatten(-2).movedim(0, -2)
    # Not by way of inner products: they cancel for patterns that are nearly the same.
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return distance if wide.shape[-1] > 1 else torch.full_like(distance, math.nan)


def stability_score(patterns: Float[Tensor, "loop *dims query key"]) -> Float[Tensor, "*dims"]:
    """1 − the mean over t ≥ 1 and queries of TV(A_t, A_{t−1}).

    1 for attention that never moves, 0 where every loop moves all of it to other keys.

    Args:
        patterns: of every loop, in order, `cache.stack("pattern", layer)`.

    Raises:
        InputError: not patterns, or only one loop.

    Source:
        This library's; the paper describes stability by curves only.
    """
    check_loop_axis(patterns, "patterns")
    return 1 - mean_total_variation(patterns[1:], patterns[:-1]).mean(0)


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
