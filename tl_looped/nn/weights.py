"""Weights as matrices, for who computes with them and not through their module."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from tl_looped.engine.errors import InputError


def is_plain(linear: nn.Module) -> bool:
    """Whether a projection's map is its weight and bias: a Linear, also a parametrised one, that nothing was put on."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks  # torch has no public way to ask
    return getattr(type(linear), "forward", None) is nn.Linear.forward and not hooked


def matrix(linear: nn.Module, name: str) -> Float[Tensor, "d_out d_in"]:
    """The weight of a projection, which is its whole map but for a bias.

    Args:
        linear: the projection.
        name: what the caller calls it, for the error.

    Raises:
        InputError: it has an adapter or a torch hook on it, or is quantised, so that no one matrix is its map.
    """
    if not (is_plain(linear) and isinstance(linear, nn.Linear)):
        raise InputError(
            f"{name} is no plain nn.Linear but a {type(linear).__name__}, or has torch hooks on it, so its weight is "
            "not the map that runs: merge the adapter first (merge_and_unload in PEFT), or read activations, as "
            "attn.hook_result, which use the module itself."
        )
    return linear.weight
