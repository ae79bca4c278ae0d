"""How states move from loop to loop: tensor functions, and the measures that they are for `tl_looped.observe`.

The functions take any leading axes; a norm is over the last axis. What divides by the norm of a zero vector is
undefined, so NaN. All raise an InputError for states that differ in shape.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.checks import check_same_shape
from tl_looped.engine.numbers import cosine, length, ratio, unit, wide
from tl_looped.observe import Measure


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

    Source:
        arXiv 2604.11791, successive differences; arXiv 2502.05171, relative.
    """
    check_same_shape(x, before, "before")
    x, before = wide(x), wide(before)
    step = length(x - before)
    return ratio(step, length(x)) if relative else step


def distance_to(
    x: Float[Tensor, "*dims d_model"], end: Float[Tensor, "*dims d_model"], relative: bool = True
) -> Float[Tensor, "*dims"]:
    """How far a state is from the end: ‖x_t − x_T‖ / ‖x_T‖, or ‖x_t − x_T‖; relative, NaN where the end is zero.

    Args:
        x: a state.
        end: the same after the last loop, the approximate fixed point.
        relative: divide by ‖x_T‖.

    Source:
        arXiv 2604.11791, distance to the approximate fixed point (T = 128 loops).
    """
    check_same_shape(x, end, "end")
    return step_norm(end, x, relative)


def cosine_to(x: Float[Tensor, "*dims d_model"], other: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims"]:
    """How far a state points where another does: their cosine, in [−1, 1]; NaN where either is zero.

    Args:
        x: a state.
        other: the same one loop earlier, or after the last loop.

    Source:
        arXiv 2604.11791, successive cosines, and cosine to the approximate fixed point.
    """
    check_same_shape(x, other, "the other")
    return cosine(x, other)


def step_angle(
    x: Float[Tensor, "*dims d_model"], before: Float[Tensor, "*dims d_model"], earlier: Float[Tensor, "*dims d_model"]
) -> Float[Tensor, "*dims"]:
    """How much a step turns from the step before: the angle of x_t − x_{t−1} and x_{t−1} − x_{t−2}.

    0: straight on; π/2: orthogonal; π: back. As 2 atan2(‖u − v‖, ‖u + v‖) of the unit vectors u, v, which keeps small
    angles that an arc cosine would round away.

    Args:
        x: a state.
        before, earlier: the same one and two loops earlier.

    Returns:
        Radians in [0, π]; NaN where one of the two steps is zero.

    Source:
        arXiv 2509.23314, angles between consecutive steps.
    """
    step, last = _steps(x, before, earlier)
    u, v = unit(step), unit(last)
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))


def acceleration(
    x: Float[Tensor, "*dims d_model"],
    before: Float[Tensor, "*dims d_model"],
    earlier: Float[Tensor, "*dims d_model"],
    relative: bool = True,
) -> Float[Tensor, "*dims"]:
    """How much a step differs from the step before: ‖(x_t − x_{t−1}) − (x_{t−1} − x_{t−2})‖ (/ ‖x_t‖).

    Unlike `step_change` it is not zero for steps of one length that turn, as on an orbit. The paper's exit rule,
    "second-order difference in step-size" in its abstract, looks at it; see `tl_looped.lens.AccelerationRule`.

    Args:
        x: a state.
        before, earlier: the same one and two loops earlier.
        relative: divide by ‖x_t‖.

    Source:
        arXiv 2509.23314, acceleration ‖Δ_t − Δ_{t−1}‖, there as it is.
    """
    step, last = _steps(x, before, earlier)
    found = length(step - last)
    return ratio(found, length(wide(x))) if relative else found


def step_change(
    x: Float[Tensor, "*dims d_model"], before: Float[Tensor, "*dims d_model"], earlier: Float[Tensor, "*dims d_model"]
) -> Float[Tensor, "*dims"]:
    """How much longer a relative step (`step_norm`) is than the one before; below zero where steps shrink.

    Args:
        x: a state.
        before, earlier: the same one and two loops earlier.

    Source:
        This library's. (The paper's second-order quantity is `acceleration`.)
    """
    return step_norm(x, before) - step_norm(before, earlier)


def _steps(x: Tensor, before: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    check_same_shape(x, before, "before")
    check_same_shape(x, earlier, "earlier")
    return wide(x) - wide(before), wide(before) - wide(earlier)


_RESID = "hook_resid_post"
_L2 = "relative L2"

STEP = Measure("step", "step ‖x_t − x_{t−1}‖ / ‖x_t‖", _L2, _RESID, step_norm, "previous", ("pos",))
"""How far a loop moves a layer's output; see `step_norm`."""

STEP_NORM = Measure(
    "step_norm", "step ‖x_t − x_{t−1}‖", "L2", _RESID, partial(step_norm, relative=False), "previous", ("pos",)
)
"""The same, not divided by the state's norm."""

COSINE = Measure("cosine", "cosine of x_t and x_{t−1}", "", _RESID, cosine_to, "previous", ("pos",))
"""How much of its direction a layer's output keeps from loop to loop."""

DISTANCE = Measure(
    "distance", "distance to the last loop ‖x_t − x_T‖ / ‖x_T‖", _L2, _RESID, distance_to, "last", ("pos",)
)
"""How far a layer's output is from that of the last loop; see `distance_to`."""

COSINE_TO_END = Measure("cosine_to_end", "cosine of x_t and x_T", "", _RESID, cosine_to, "last", ("pos",))
"""How far a layer's output points where that of the last loop does."""

ANGLE = Measure("angle", "angle to the step before", "radians", _RESID, step_angle, "previous_two", ("pos",))
"""How much each step of a layer's output turns; see `step_angle`."""

ACCELERATION = Measure("acceleration", "‖Δ_t − Δ_{t−1}‖ / ‖x_t‖", _L2, _RESID, acceleration, "previous_two", ("pos",))
"""How much each step of a layer's output differs from the one before; see `acceleration`."""

STEP_CHANGE = Measure("step_change", "change of the step's length", _L2, _RESID, step_change, "previous_two", ("pos",))
"""How much longer each step of a layer's output is than the one before; see `step_change`."""

MOTION = (STEP, ANGLE, ACCELERATION, STEP_CHANGE)
"""What `state_motion` looks at."""
