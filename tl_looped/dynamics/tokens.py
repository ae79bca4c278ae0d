"""Per-token numbers of many prompts, side by side: what a collection kept, as one tensor with its places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.runs import Prompts
from tl_looped.model import LoopedModel
from tl_looped.observe import Measure, observe
from tl_looped.observe.observed import Observed

Places = dict[str, Int[Tensor, " token"]]


def observe_tokens(
    model: LoopedModel, prompts: Prompts, measure: Measure, n_loops: int, least: int, options: Mapping[str, Any]
) -> Observed:
    """Observe one measure, kept for every token.

    Raises:
        InputError: a model without loops, fewer than `least` of them, or what `observe` refuses.
    """
    if not isinstance(model, LoopedModel):
        raise InputError(f"a {type(model).__name__} has no loops to compare: pass a LoopedModel.")
    check_count("n_loops", n_loops, minimum=least)
    return observe(model, prompts, n_loops, measures=[measure], per_token=[measure.name], **options)


def token_series(observed: Observed, name: str) -> tuple[Float[Tensor, "loop layer token"], Places]:
    """A measure of the core layers for every token of every prompt, and each token's prompt and position.

    Args:
        observed: from `observe(..., per_token=[name])`.
        name: of a measure with one number for each token and layer.

    Raises:
        InputError: the measure was not kept for every token, is not one number for each, or a prompt has not run.
    """
    values, places = observed.tokens_by_loop(name)
    if values.ndim != 3:
        raise InputError(f"{name!r} must have one number for each token and layer, not {observed.axes[name]}.")
    return values, places


def place_table(shape: Sequence[int], axes: Sequence[str], places: Mapping[str, Tensor]) -> pd.DataFrame:
    """One row for each cell: a column with the index on each axis, and for the last axis those of `places` instead.

    Args:
        shape: of the cells.
        axes: names of their axes.
        places: what to say of each index of the last axis; nothing: the index.
    """
    columns = {axis: index.ravel() for axis, index in zip(axes, np.indices(tuple(shape)), strict=True)}
    if places:
        index = columns.pop(axes[-1])
        columns |= {name: values.numpy()[index] for name, values in places.items()}
    return pd.DataFrame(columns, index=pd.RangeIndex(int(np.prod(tuple(shape)))))
