"""What an attention pattern is, checked: rows of shares that sum to one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.checks import check_floats
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import wide

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
