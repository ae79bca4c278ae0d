"""The dynamics of the residual stream as measures for `tl_looped.observe.observe`, one number for each token."""

from __future__ import annotations

from functools import partial

from tl_looped.dynamics.steps import cosine_to, distance_to, step_cosine, step_norm
from tl_looped.observe import Measure

_RESID = "hook_resid_post"

STEP = Measure("step", "step ‖x_t − x_{t−1}‖ / ‖x_t‖", "relative L2", _RESID, step_norm, "previous", ("pos",))
"""How far a loop moves a layer's output; see `step_norm`."""

STEP_NORM = Measure(
    "step_norm", "step ‖x_t − x_{t−1}‖", "L2", _RESID, partial(step_norm, relative=False), "previous", ("pos",)
)
"""The same, not divided by the state's norm."""

COSINE = Measure("cosine", "cosine of x_t and x_{t−1}", "", _RESID, step_cosine, "previous", ("pos",))
"""How much of its direction a layer's output keeps from loop to loop; see `step_cosine`."""

DISTANCE = Measure(
    "distance", "distance to the last loop ‖x_t − x_T‖ / ‖x_T‖", "relative L2", _RESID, distance_to, "last", ("pos",)
)
"""How far a layer's output is from that of the last loop; see `distance_to`."""

COSINE_TO_END = Measure("cosine_to_end", "cosine of x_t and x_T", "", _RESID, cosine_to, "last", ("pos",))
"""How far a layer's output points where that of the last loop does; see `cosine_to`."""
