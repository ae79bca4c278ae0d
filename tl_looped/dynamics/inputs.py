"""What the functions of this room ask of their input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_looped.engine.errors import InputError
from tl_looped.engine.runs import Run

N_LOOPS = 128
"""Loops after which the paper takes a state for the fixed point: the default where a measure needs one."""


def length(x: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims"]:
    """‖x‖ over the last axis, also where its squares overflow; NaN where the dtype can't hold the norm itself."""
    norm = x.norm(dim=-1)
    if bool(norm.isfinite().all()):
        return norm
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).to(x.dtype)
    return norm.masked_fill(norm.isinf(), float("nan"))


def ratio(part: Float[Tensor, "*dims"], whole: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """One divided by the other; NaN where the whole is zero."""
    return torch.where(whole == 0, float("nan"), part / whole)


def check_number(name: str, value: object, low: float, high: float, high_too: bool = False) -> float:
    """Return `value` when it is a number above `low` and below `high` (or, with `high_too`, equal to it)."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not (low < number < high or (high_too and number == high)):
        end = f"at most {high:g}" if high_too else "finite" if math.isinf(high) else f"below {high:g}"
        raise InputError(f"{name} must be a number above {low:g} and {end}, got {value!r}.")
    return float(number)


def check_same_shape(x: Tensor, other: Tensor, name: str) -> None:
    """Raise unless two activations have one shape: broadcasting would compare what does not belong together."""
    if x.shape != other.shape:
        raise InputError(f"x and {name} must have the same shape, got {tuple(x.shape)} and {tuple(other.shape)}.")


def check_loop_axis(values: Tensor, name: str, dims: int = 1, loops: int = 2) -> None:
    """Raise unless `values` is a floating-point tensor of `dims` axes or more, the first with enough loops."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        seen = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"{name} must be a floating-point tensor with loops as its first axis, got {seen}.")
    if values.ndim < dims or values.numel() == 0:
        raise InputError(
            f"{name} must be [loop, {'..., d_model' if dims > 1 else '...'}] and not empty, got shape "
            f"{tuple(values.shape)}: stack loops in a new first axis, as cache.stack does."
        )
    if len(values) < loops:
        least = "two, as it compares loops" if loops == 2 else str(loops)
        raise InputError(f"{name} has {len(values)} loops, but this needs at least {least}: pass a larger n_loops.")


def check_finite(
    states: Float[Tensor, "*dims d_model"], axes: Sequence[str], labels: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Raise where states are not finite, and say where that begins: the first such place, axis by axis.

    Args:
        states: with an index for each of `axes`, the loop first, then d_model.
        axes: their names.
        labels: what the indices of an axis stand for, where it is not themselves.
    """
    fine = states.isfinite().all(-1)
    if bool(fine.all()):
        return
    place = (~fine).nonzero()[0].tolist()
    named = [(axis, (labels or {}).get(axis, range(index + 1))[index]) for axis, index in zip(axes, place, strict=True)]
    where = ", ".join(f"{axis} {label}" for axis, label in named)
    raise InputError(
        f"states are not finite from {where} on: look at the weights there, or run in a wider dtype or fewer loops."
    )


def undefined_series(values: Float[Tensor, "loop *dims"], name: str) -> Bool[Tensor, "*dims"]:
    """Which series are NaN throughout, as at padding, so that nothing can be said of them.

    Raises:
        InputError: infinite values, or a series that is NaN in some of its loops: the message says where.
    """
    if bool(values.isinf().any()):
        loop, *place = values.isinf().nonzero()[0].tolist()
        raise InputError(f"{name} is infinite at loop {loop}{_spell(place)}.")
    missing = values.isnan()
    partly = missing & ~missing.all(0)
    if bool(partly.any()):
        loop, *place = partly.nonzero()[0].tolist()
        raise InputError(
            f"{name} is NaN at loop {loop}{_spell(place)} but not in all loops: leave out the loops without a value "
            "(such as loop 0 of what compares with the loop before), and look for states that are zero, or so large "
            "that their squares overflow."
        )
    return missing.all(0)


def _spell(place: list[int]) -> str:
    return f", series {tuple(place)}" if place else ""


def check_axes(axes: Sequence[str] | None, n: int) -> tuple[str, ...]:
    """Names of the axes behind the loop; numbered where none are given."""
    if axes is None:
        return tuple(f"axis {i}" for i in range(1, n + 1))
    if len(axes) != n or len(set(axes)) < n:
        raise InputError(f"axes must name the {n} axes behind the loop, each once, got {list(axes)}.")
    return tuple(axes)


def check_whole_run(run: Run, loops: int = 2) -> None:
    """Raise unless a run goes from the first loop to the last, and has at least so many."""
    if run.start or run.stop != run.n_loops:
        raise InputError("all loops are looked at: leave out start_at_loop and stop_at_loop.")
    if run.n_loops < loops:
        raise InputError(f"this compares loops, and the run has {run.n_loops}: pass n_loops of at least {loops}.")


def check_one_prompt(run: Run) -> None:
    """Raise unless a run is of one prompt without padding."""
    if len(run.tokens) != 1:
        raise InputError(f"this looks at one prompt, got {len(run.tokens)}: call it for each.")
    if not bool(run.attention_mask.all()):
        raise InputError("the prompt has padding, which would count as tokens: pass it without.")
