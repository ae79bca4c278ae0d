"""What analyses ask of their input before they work: numbers in range, modes, axes, states that are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_looped.engine.errors import InputError


def check_number(
    name: str,
    value: object,
    low: float = 0.0,
    high: float = math.inf,
    *,
    low_too: bool = False,
    high_too: bool = False,
    mend: str = "",
) -> float:
    """Return `value` when it is a finite number above `low` (or equal to it, with `low_too`) and below `high`.

    Args:
        name: what to call it in the error.
        value: what was given; a bool is no number.
        low, high: the range.
        low_too, high_too: whether an end belongs to it.
        mend: what else to say.
    """
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    above = number > low or (low_too and number == low)
    below = number < high or (high_too and number == high)
    if not (above and below and math.isfinite(number)):
        begin = f"{'of at least' if low_too else 'above'} {low:g}"
        end = f"{'at most' if high_too else 'below'} {high:g}"
        bounds = f"finite number {begin}" if math.isinf(high) else f"number {begin} and {end}"
        raise InputError(f"{name} must be a {bounds}, got {value!r}{': ' if mend else ''}{mend}.")
    return float(number)


# Models.


def check_eval(model: nn.Module) -> None:
    """Raise for a model in training mode, where a drawn state is another one in every run."""
    if any(module.training for module in model.modules()):
        raise InputError("the model is in training mode: call model.eval() first, or a drawn state makes runs differ.")


# Tensors.


def check_same_shape(x: Tensor, other: Tensor, name: str, first: str = "x") -> None:
    """Raise unless two activations have one shape: broadcasting would compare what does not belong together."""
    if x.shape != other.shape:
        raise InputError(f"{first} and {name} must have the same shape, got {tuple(x.shape)} and {tuple(other.shape)}.")


def check_floats(values: object, name: str, axes: str, dims: int) -> Tensor:
    """Return `values` when it is a floating-point tensor of `dims` axes or more that is not empty.

    Args:
        values: what was given.
        name: what to call it in the error.
        axes: how to write its axes there, such as "[..., query, key]".
        dims: the fewest axes.
    """
    seen = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim < dims or not values.numel():
        raise InputError(f"{name} must be floats {axes}, not empty, got {seen}.")
    return values


def check_loop_axis(values: object, name: str, dims: int = 1, loops: int = 2) -> None:
    """Raise unless `values` is a floating-point tensor of `dims` axes or more, the first with enough loops."""
    found = len(check_floats(values, name, "[loop, ..., d_model]" if dims > 1 else "[loop, ...]", dims))
    if found < loops:
        least = "two, as it compares loops" if loops == 2 else str(loops)
        raise InputError(f"{name} has {found} loops, but this needs at least {least}: pass a larger n_loops.")


def check_axes(axes: Sequence[str] | None, n: int) -> tuple[str, ...]:
    """Names of the axes behind the loop; numbered where none are given."""
    if axes is None:
        return tuple(f"axis {i}" for i in range(1, n + 1))
    if len(axes) != n or len(set(axes)) < n:
        raise InputError(f"axes must name the {n} axes behind the loop, each once, got {list(axes)}.")
    return tuple(axes)


def check_finite(
    states: Float[Tensor, "*dims d_model"],
    axes: Sequence[str] | None = None,
    labels: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Raise where states are not finite, and say where that begins: the first such place, axis by axis.

    Args:
        states: with an index for each of `axes`, then d_model.
        axes: their names; None to number them.
        labels: what the indices of an axis stand for, where it is not themselves.
    """
    fine = states.isfinite().all(-1)
    if bool(fine.all()):
        return
    place = (~fine).nonzero()[0].tolist()
    names = [f"axis {i}" for i in range(fine.ndim)] if axes is None else axes
    named = [
        (axis, (labels or {}).get(axis, range(index + 1))[index]) for axis, index in zip(names, place, strict=True)
    ]
    where = ", ".join(f"{axis} {label}" for axis, label in named)
    raise InputError(
        f"states are not finite from {where} on: look at the weights there, or run in a wider dtype or fewer loops."
    )


def undefined_series(values: Float[Tensor, "loop *dims"], name: str) -> Bool[Tensor, "*dims"]:
    """Which series are NaN throughout, as at padding, so that nothing can be said of them.

    Raises:
        InputError: infinite values, or a series that is NaN in some of its loops: the message says where.
    """
    missing = values.isnan()
    for wrong, what, mend in (
        (values.isinf(), "infinite", "look for states so large that their squares overflow"),
        (
            missing & ~missing.all(0),
            "NaN",
            "other loops have a value, so leave out the loops without one (such as loop 0 of what compares with the "
            "loop before), and look for states that are zero",
        ),
    ):
        if bool(wrong.any()):
            loop, *place = wrong.nonzero()[0].tolist()
            at = f", series {tuple(place)}" if place else ""
            raise InputError(f"{name} is {what} at loop {loop}{at}: {mend}.")
    return missing.all(0)
