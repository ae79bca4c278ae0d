"""Weights as matrices, for who computes with them and not through their module."""

from __future__ import annotations

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from tl_looped.engine.errors import InputError


def is_plain(module: nn.Module) -> bool:
    """Whether a map is its weight and bias, also if that is parametrised: nothing was put on it or in its place."""
    hooked = module._forward_hooks or module._forward_pre_hooks  # torch has no public way to ask
    return type(module).forward in (nn.Linear.forward, nn.Embedding.forward) and not hooked


def matrix(module: nn.Module, name: str) -> Float[Tensor, "rows columns"]:
    """The weight of a projection or an embedding, which is its whole map but for a bias.

    Args:
        module: a Linear or an Embedding, or what was put in its place.
        name: what the caller calls it, for the error.

    Raises:
        InputError: it has an adapter or a torch hook on it, or is quantised, so that no one matrix is its map.
    """
    if not is_plain(module):
        raise InputError(
            f"{name} is a {type(module).__name__}, no plain layer, or has torch hooks on it, so its weight is not the "
            "map that runs: merge the adapter first (merge_and_unload in PEFT), or read activations, such as "
            "attn.hook_result, which use the module itself."
        )
    return cast(Tensor, module.weight)
