"""Where activations stopped being finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tl_looped.engine.errors import InputError
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.runs import Run
from tl_looped.model import LoopedModel

SCORES = "attn.hook_attn_scores"  # minus infinity where a query does not see a key


@torch.no_grad()
def first_not_finite(model: LoopedModel, run: Run) -> str | None:
    """The name of the first site, in the order of the run, that holds NaN or infinity; None where none does."""
    found: list[str] = []

    def look(x: Tensor, hook: LoopHookPoint) -> None:
        if not found and hook.site.component != SCORES and not bool(x.isfinite().all()):
            found.append(hook.name)

    with model.hooks(fwd_hooks=[(lambda name: True, look)]):
        model.execute(run, return_type=None)
    return found[0] if found else None


@contextmanager
def naming_origin(model: LoopedModel, run: Run) -> Iterator[None]:
    """An error in the block names the layer and loop where activations stopped being finite, if that is what happened.

    It takes one more run, with the hooks that are on the model.
    """
    try:
        yield
    except InputError as error:
        site = first_not_finite(model, run)
        if site is None:
            raise
        raise InputError(
            f"activations are not finite, from {site!r} on. Look at the weights and hooks there, or run in a wider "
            "dtype or with fewer loops."
        ) from error
