"""Path independence: does a loop end in the same place, wherever it starts?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.dynamics.tokens import one_prompt, prepare_long
from tl_looped.engine.checks import check_finite, check_number
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.numbers import length, met_from, ratio, unit, wide
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, Run, RunOptions, Runs, check_state, with_run_options
from tl_looped.engine.schedule import HookSite
from tl_looped.model import LoopedModel
from tl_looped.observe.watching import watch
from tl_looped.viz.dynamics import path_curves


def pairwise_distances(states: Float[Tensor, "start *dims d_model"]) -> Float[Tensor, "pair *dims"]:
    """Distance between the states of every two starts: ‖x_a − x_b‖ / ((‖x_a‖ + ‖x_b‖) / 2).

    Args:
        states: from each initial state, the same tokens.

    Returns:
        Relative L2, at most 2; pairs as `itertools.combinations` orders them: (0, 1), (0, 2), ...; NaN where both
        states are zero.

    Raises:
        InputError: fewer than two starts.
    """
    if len(states) < 2:
        raise InputError(f"distances are between two starts, got {len(states)}: pass more initial states or seeds.")
    states = wide(states)
    norms = length(states)
    pairs = list(combinations(range(len(states)), 2))
    return torch.stack([ratio(length(states[a] - states[b]), (norms[a] + norms[b]) / 2) for a, b in pairs])


def noise_around(
    state: Float[Tensor, "*dims d_model"], noise: float, seed: int, size: Float[Tensor, "*dims"] | None = None
) -> Float[Tensor, "*dims d_model"]:
    """A state plus noise in a random direction: x + noise · size · g / ‖g‖ at every position, with g Gaussian.

    Args:
        state: x.
        noise: relative L2 size.
        seed: of g, drawn in float32 on the CPU, so it is the same on every device.
        size: what the noise is relative to; None for ‖x‖.

    Raises:
        InputError: a noise that is not above zero and finite, a seed that is none, or a size of zero.
    """
    check_number("noise", noise)
    generator = torch.Generator().manual_seed(check_count("seed", seed, minimum=0))
    sizes = length(wide(state)) if size is None else size
    if not bool((sizes > 0).all()):
        raise InputError(
            "noise relative to a state that is zero would be none: pass size=, such as the norm of others."
        )
    direction = unit(torch.randn(state.shape, generator=generator)).to(wide(state))
    return (wide(state) + noise * sizes[..., None] * direction).to(state.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class PathIndependence(Result):
    """Whether runs of one prompt from several initial states meet.

    Attributes:
        starts: what each run started from.
        str_tokens: the prompt's tokens; their ids where there is no tokenizer.
        tolerance: the distance up to which two runs are in the same place.
        distances: between the states of every two runs after each loop, relative L2, see `pairwise_distances`.
    """

    starts: tuple[str, ...]
    str_tokens: tuple[str, ...]
    tolerance: float
    distances: Float[Tensor, "loop pair pos"]

    @property
    def farthest(self) -> Float[Tensor, "loop pos"]:
        """The largest distance between any two runs; NaN where one is."""
        return self.distances.amax(1)

    @property
    def meets(self) -> Bool[Tensor, " pos"]:
        """At which positions all runs end in the same place: within the tolerance after the last loop."""
        return self.farthest[-1] <= self.tolerance

    @property
    def loop(self) -> Float[Tensor, " pos"]:
        """The first loop from which on all runs are in the same place; NaN where they do not meet."""
        return met_from(self.farthest <= self.tolerance).to(self.distances.dtype)

    def share(self) -> float:
        """Share of positions at which all runs meet."""
        return float(self.meets.double().mean())

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each loop, pair and position: loop, start, other_start, pos, token, distance."""
        loop, pair, pos = np.indices(self.distances.shape).reshape(3, -1)
        pairs = np.array(list(combinations(self.starts, 2)), dtype=object)
        names = np.array(self.str_tokens, dtype=object)[pos]
        table = {"loop": loop, "start": pairs[pair, 0], "other_start": pairs[pair, 1], "pos": pos, "token": names}
        return pd.DataFrame({**table, "distance": self.distances.flatten().numpy()})

    def plot(self) -> go.Figure:
        """The largest distance between any two runs over loops, a line for each position."""
        share = f"{len(self.starts)} starts, meet at {int(self.meets.sum())} of {len(self.meets)} positions"
        title = f"Path independence: {self.made_by.get('model', '')}, {share}"
        return path_curves(self.farthest, self.tolerance, self.str_tokens, title)


@torch.no_grad()
@with_run_options
def path_independence(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: int | None = None,
    *,
    seeds: Sequence[int] | None = None,
    noise: float | None = None,
    initial_states: Sequence[Tensor] | None = None,
    tolerance: float = 1e-2,
    **options: Unpack[RunOptions],
) -> PathIndependence:
    """Run a prompt from several initial states, and see whether the state that leaves each loop becomes the same.

    Where the states come from, one of:

    - `seeds` alone: drawn as the model draws its own, for a model that does (Huginn, retrofitted models).
    - `noise`: the model's own initial state first, then for each of `seeds` that state plus noise (`noise_around`)
      relative to its norm, or where it is zero, to that of the state which leaves the first loop. Where a drawn state
      is small beside the states of the loops, so is such noise: runs can then be together from the start, which says
      little, so pass more. In a model without injection the initial state is all that a loop knows of the prompt, so
      there is no reason to meet.
    - `initial_states`: given.

    All runs are one batch; of the states of earlier loops nothing is kept but their distances.

    Args:
        model: in evaluation mode.
        prompts: one prompt.
        n_loops: None for 128.
        seeds: of draws or of noise; None for 0, 1, 2, 3.
        noise: relative L2, such as 0.5.
        initial_states: two or more, each [pos, d_model] or [1, pos, d_model], in the model's dtype.
        tolerance: relative L2 up to which states are in the same place.
        options: as in `LoopedModel.forward`, without `initial_state`; `seed` is that of the model's own state.

    Raises:
        InputError: before the run: a model that draws no state without `noise` or `initial_states`, fewer than two
            starts, states of a wrong shape, several prompts; in it: states that are not finite, with loop, start and
            position.

    Source:
        arXiv 2502.05171, path independence. (Which noise, and the tolerance, are this library's.)
    """
    check_number("tolerance", tolerance)
    runs = prepare_long(model, prompts, n_loops, options, least=1)
    if runs.initial_state is not None:
        raise InputError("path independence takes several initial states: pass initial_states=[...].")
    run = one_prompt(model, runs)
    if initial_states is not None:
        if seeds is not None or noise is not None:
            raise InputError("initial_states are given, so leave out seeds and noise.")
        for one in initial_states:
            check_state(model.cfg, runs.rows, one, runs.seed, model.dtype)
        each = {f"given {i}": replace(runs, initial_state=one) for i, one in enumerate(initial_states)}
        starts = {name: _state(model, one) for name, one in each.items()}
    else:
        starts = _starts(model, runs, run, seeds, noise)
    if len(starts) < 2:
        raise InputError(f"one start has nothing to meet: pass two or more, got {list(starts)}.")
    for name, state in starts.items():
        check_finite(state[0], (f"start {name!r}, position",))
    states = torch.cat(list(starts.values()))
    kept: list[Tensor] = []

    def see(site: HookSite, x: Tensor) -> None:
        check_finite(x, (f"loop {site.loop}, start", "position"))
        kept.append(pairwise_distances(x).cpu())

    tokens, mask = (one.expand(len(states), -1) for one in (run.tokens, run.attention_mask))
    together = replace(run, tokens=tokens, attention_mask=mask, state=states, state_given=True)
    watch(model, together, ["hook_state_post"], see, only_loops=True)
    return PathIndependence(
        made_by={"model": model.cfg.model_name, **run.describe(), "initial_state": "several", "noise": noise},
        starts=tuple(starts),
        str_tokens=model.token_texts(run.tokens[0]),
        tolerance=float(tolerance),
        distances=torch.stack(kept),
    )


def _starts(
    model: LoopedModel, runs: Runs, run: Run, seeds: Sequence[int] | None, noise: float | None
) -> dict[str, Float[Tensor, "1 pos d_model"]]:
    """The initial states that are drawn or made by noise, by what they are."""
    chosen = list(range(4)) if seeds is None else [check_count("a seed", seed, minimum=0) for seed in seeds]
    if len(set(chosen)) < len(chosen):
        raise InputError(f"seeds names one twice: {chosen}.")
    if noise is not None:
        own, after = (model.execute(replace(run, stop=loop, reads_out=False)) for loop in (0, 1))
        size = length(wide(own))
        size = torch.where(size == 0, length(wide(after)), size)
        return {"own": own} | {f"noise {seed}": noise_around(own, noise, seed, size) for seed in chosen}
    if model.cfg.draws_state:
        return {f"seed {seed}": _state(model, replace(runs, seed=seed)) for seed in chosen}
    raise InputError(
        f"{model.cfg.model_name} draws no state, so seeds change nothing: it starts from {model.cfg.state_in_words()}. "
        "Pass noise=0.5 for noise around it, or initial_states=[...]."
    )


def _state(model: LoopedModel, runs: Runs) -> Float[Tensor, "1 pos d_model"]:
    """The initial state of runs that give or draw one."""
    return cast(Tensor, model.batch_of(runs).state)
