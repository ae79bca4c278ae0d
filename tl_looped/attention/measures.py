"""Attention stability as measures for `tl_looped.observe`: over many prompts, in memory that loops do not add to.

They read "attn.hook_pattern", so a feedforward model has nothing to compare: it has no loops.
"""

from __future__ import annotations

from tl_looped.attention.distances import mean_total_variation, pattern_distance
from tl_looped.observe import Measure

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
