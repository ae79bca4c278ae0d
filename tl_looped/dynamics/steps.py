"""How states move from loop to loop: tensor functions on the states of successive loops.

Functions on pairs take any leading axes; a norm is over the last axis. What divides by the norm of a zero vector is
undefined, so NaN.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.checks import check_axes, check_finite, check_loop_axis, check_same_shape
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import cosine, length, ratio, unit, wide

N_LOOPS = 128
"""Loops after which the paper takes a state for the fixed point: the default where a measure needs one."""


def step_norm(
    x: Float[Tensor, "*dims d_model"], before: Float[Tensor, "*dims d_model"], relative: bool = True
) -> Float[Tensor, "*dims"]:
    """How far a state moved: ‖x_t − x_{t−1}‖ / ‖x_t‖, or ‖x_t − x_{t−1}‖.

    Args:
        x: a state.
        before: the same one loop earlier.
        relative: divide by ‖x_t‖.

    Returns:
        Relative L2, or L2; relative, NaN where x is zero.

    Raises:
        InputError: the two differ in shape.

    Source:
        arXiv 2604.11791, successive differences; arXiv 2502.05171, relative.
    """
    check_same_shape(x, before, "before")
    x, before = wide(x), wide(before)
    step = length(x - before)
    return ratio(step, length(x)) if relative else step


def step_cosine(x: Float[Tensor, "*dims d_model"], before: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims"]:
    """How much a state kept its direction: cosine of x_t and x_{t−1}, in [−1, 1]; NaN where either is zero.

    Args:
        x: a state.
        before: the same one loop earlier.

    Raises:
        InputError: the two differ in shape.

    Source:
        arXiv 2604.11791, successive cosines.
    """
    check_same_shape(x, before, "before")
    return cosine(x, before)


def distance_to(
    x: Float[Tensor, "*dims d_model"], end: Float[Tensor, "*dims d_model"], relative: bool = True
) -> Float[Tensor, "*dims"]:
    """How far a state is from the end: ‖x_t − x_{T*}‖ / ‖x_{T*}‖, or ‖x_t − x_{T*}‖.

    Args:
        x: a state.
        end: the approximate fixed point: the same after the last loop.
        relative: divide by ‖x_{T*}‖.

    Returns:
        Relative L2, or L2; relative, NaN where the end is zero.

    Raises:
        InputError: the two differ in shape.

    Source:
        arXiv 2604.11791, distance to the approximate fixed point (T* = 128 loops).
    """
    check_same_shape(x, end, "end")
    return step_norm(end, x, relative)


def cosine_to(x: Float[Tensor, "*dims d_model"], end: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims"]:
    """How far a state points where the end does: cosine of x_t and x_{T*}, in [−1, 1]; NaN where either is zero.

    Args:
        x: a state.
        end: the same after the last loop.

    Raises:
        InputError: the two differ in shape.

    Source:
        arXiv 2604.11791, cosine to the approximate fixed point.
    """
    check_same_shape(x, end, "end")
    return cosine(x, end)


# On the states of all loops. Results keep the loop axis, NaN where a loop has no step (or no two steps) behind it.


def step_norms(states: Float[Tensor, "loop *dims d_model"], relative: bool = True) -> Float[Tensor, "loop *dims"]:
    """`step_norm` of every loop: how far it moved each state.

    Args:
        states: of successive loops.
        relative: divide by ‖x_t‖.

    Returns:
        Relative L2, or L2; NaN at loop 0, and where a relative step's state is zero.

    Raises:
        InputError: fewer than two loops, or states that are not finite (with the loop at which they began).
    """
    _check(states)
    return _after(1, step_norm(states[1:], states[:-1], relative))


def step_angles(states: Float[Tensor, "loop *dims d_model"]) -> Float[Tensor, "loop *dims"]:
    """How much each loop's step turns from the step before: the angle of x_t − x_{t−1} and x_{t−1} − x_{t−2}.

    0: straight on; π/2: orthogonal; π: back. As 2 atan2(‖u − v‖, ‖u + v‖) of the unit vectors u, v, which keeps small
    angles that an arc cosine would round away.

    Args:
        states: of successive loops.

    Returns:
        Radians in [0, π]; NaN at loops 0 and 1, and where one of the two steps is zero.

    Raises:
        InputError: fewer than two loops, or states that are not finite.

    Source:
        arXiv 2509.23314, angles between consecutive steps.
    """
    _check(states)
    steps = unit(wide(states).diff(dim=0))
    u, v = steps[1:], steps[:-1]
    return _after(2, 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)))


def accelerations(states: Float[Tensor, "loop *dims d_model"], relative: bool = True) -> Float[Tensor, "loop *dims"]:
    """How much each loop's step differs from the step before: ‖(x_t − x_{t−1}) − (x_{t−1} − x_{t−2})‖ (/ ‖x_t‖).

    Unlike `step_changes` it is not zero for steps of one length that turn, as on an orbit. The paper's exit rule,
    "second-order difference in step-size" in its abstract, looks at it; see `tl_looped.lens.AccelerationRule`.

    Args:
        states: of successive loops.
        relative: divide by ‖x_t‖.

    Returns:
        Relative L2, or L2; NaN at loops 0 and 1, and where a relative one's state is zero.

    Raises:
        InputError: fewer than two loops, or states that are not finite.

    Source:
        arXiv 2509.23314, acceleration ‖Δ_t − Δ_{t−1}‖, there as it is.
    """
    _check(states)
    states = wide(states)
    found = length(states.diff(n=2, dim=0))
    return _after(2, ratio(found, length(states[2:])) if relative else found)


def step_changes(norms: Float[Tensor, "loop *dims"]) -> Float[Tensor, "loop *dims"]:
    """How much longer each loop's step is than the one before: s_t − s_{t−1}; below zero where steps shrink.

    Args:
        norms: s_t, such as `step_norms` gives.

    Returns:
        In the unit of the norms; NaN at loop 0, and where one of the two norms is NaN.

    Raises:
        InputError: fewer than two loops, or negative norms.

    Source:
        This library's. (The paper's second-order quantity is `accelerations`.)
    """
    check_loop_axis(norms, "norms")
    if bool((norms < 0).any()):
        raise InputError(
            f"norms must not be below zero, got {float(norms[norms < 0][0]):.4g}: pass step_norms(states)."
        )
    return _after(1, wide(norms).diff(dim=0))


def _check(states: Tensor) -> None:
    check_loop_axis(states, "states", dims=2)
    check_finite(states, ("loop", *check_axes(None, states.ndim - 2)))


def _after(n: int, values: Float[Tensor, "fewer *dims"]) -> Float[Tensor, "loop *dims"]:
    """The values behind n loops that have none."""
    return torch.cat((values.new_full((n, *values.shape[1:]), float("nan")), values))
