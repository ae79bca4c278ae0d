"""In which number format a measure is computed."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def wide(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """The same numbers in float32 at least: half precision is for running models, not for measuring them."""
    return x if x.element_size() >= 4 else x.float()
