"""What this room's calls on a model share: how prompts run, and the numbers of their tokens side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd
from torch import Tensor

from tl_looped.engine.checks import check_eval
from tl_looped.engine.errors import check_count
from tl_looped.engine.runs import Prompts, Run, RunOptions, Runs, check_one_prompt, check_whole_run
from tl_looped.engine.schedule import LoopCount
from tl_looped.model import LoopedModel, check_looped

N_LOOPS = 128
"""Loops after which the paper takes a state for the fixed point: what runs where the caller does not say."""


def prepare_long(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None,
    options: Mapping[str, object],
    least: int = 2,
    several_stacks: bool = False,
) -> Runs:
    """`model.prepare`, but 128 loops where neither `n_loops` nor prepared runs say how many.

    Raises:
        InputError: a model without loops or in training mode, fewer than `least` loops, or what `prepare` refuses.
    """
    check_eval(check_looped(model, several_stacks=several_stacks))
    loops = N_LOOPS if n_loops is None and not isinstance(prompts, Runs) else n_loops
    runs = model.prepare(prompts, loops, **cast(RunOptions, options))
    check_count("n_loops", runs.n_loops, minimum=least)
    return runs


def one_prompt(model: LoopedModel, runs: Runs, loops: int = 1) -> Run:
    """The run of a single prompt, from the first loop to the last."""
    run = model.batch_of(runs)
    check_whole_run(run, loops)
    check_one_prompt(run)
    return run


def place_table(shape: Sequence[int], axes: Sequence[str], places: Mapping[str, Tensor]) -> pd.DataFrame:
    """One row for each cell: a column with the index on each axis, and for the last axis those of `places` instead."""
    columns = {axis: index.ravel() for axis, index in zip(axes, np.indices(tuple(shape)), strict=True)}
    if places:
        index = columns.pop(axes[-1])
        columns |= {name: values.numpy()[index] for name, values in places.items()}
    return pd.DataFrame(columns, index=pd.RangeIndex(int(np.prod(tuple(shape)))))
