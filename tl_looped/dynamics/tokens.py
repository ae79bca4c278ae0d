"""Per-token numbers of many prompts, side by side: what a collection kept, as one tensor with its places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.schedule import CORE
from tl_looped.model import LoopedModel
from tl_looped.observe import Measure, collect
from tl_looped.observe.collected import Collected
from tl_looped.observe.texts import Prompts

Places = dict[str, Int[Tensor, " token"]]


def collect_tokens(
    model: LoopedModel, prompts: Prompts, measure: Measure, n_loops: int, least: int, options: Mapping[str, Any]
) -> Collected:
    """Collect one measure, kept for every token.

    Raises:
        InputError: a model without loops, fewer than `least` of them, or what `collect` refuses.
    """
    if not isinstance(model, LoopedModel):
        raise InputError(f"a {type(model).__name__} has no loops to compare: pass a LoopedModel.")
    check_count("n_loops", n_loops, minimum=least)
    return collect(model, prompts, [measure], n_loops, per_token=[measure.name], **options)


def token_series(collected: Collected, name: str) -> tuple[Float[Tensor, "loop layer token"], Places]:
    """A measure of the core layers for every token of every prompt, and each token's prompt and position.

    Args:
        collected: from `collect(..., per_token=[name])`.
        name: of a measure with one number for each token.

    Raises:
        InputError: the measure was not kept for every token, is not one number for each, or a prompt has not run.
    """
    if name not in collected.per_token:
        raise InputError(
            f"{name!r} was not kept for every token, but {list(collected.per_token)}: pass per_token=[{name!r}] to "
            "collect, with a measure of that name."
        )
    if collected.axes[name]:
        raise InputError(f"{name!r} has the axes {collected.axes[name]} besides: one number for each token is needed.")
    kept = [values for values in collected.per_token[name] if values is not None]
    if len(kept) < len(collected.tokens):
        missing = [i for i, values in enumerate(collected.per_token[name]) if values is None]
        raise InputError(f"prompts {missing[:5]} have not run: call collect again with the same save_to.")
    schedule = collected.schedule
    loops, layers = schedule.n_loops(), schedule.n_layers(CORE)
    if not loops:
        raise InputError(f"these prompts ran on a model without loops ({schedule.describe()}).")
    depths = [schedule.realised_depth(CORE, layer, t) for t in range(loops) for layer in range(layers)]
    values = torch.cat([one[depths].unflatten(0, (loops, layers)) for one in kept], dim=-1)
    lengths = [one.shape[-1] for one in kept]
    places = {
        "prompt": torch.repeat_interleave(torch.arange(len(kept)), torch.tensor(lengths)),
        "pos": torch.cat([torch.arange(length) for length in lengths]),
    }
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
