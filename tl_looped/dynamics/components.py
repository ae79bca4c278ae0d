"""The path of a token's latent state through layers and loops, seen in its principal components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.dynamics.tokens import one_prompt
from tl_looped.engine.checks import check_eval, check_finite, check_floats
from tl_looped.engine.errors import InputError, check_count, resolve_index
from tl_looped.engine.numbers import ratio, wide
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, RunOptions, with_run_options
from tl_looped.engine.schedule import HookSite, LoopCount
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe.watching import watch
from tl_looped.viz.dynamics import trajectory_figure


class Components(NamedTuple):
    """Principal components of states.

    Attributes:
        mean: of all states.
        directions: unit vectors, the one with the most variance first.
        scores: each state's coordinates along them, from the mean.
        explained: share of the total variance along each; NaN where all states are the same.
    """

    mean: Float[Tensor, " d_model"]
    directions: Float[Tensor, "component d_model"]
    scores: Float[Tensor, "*dims component"]
    explained: Float[Tensor, " component"]


def pca(states: Float[Tensor, "*dims d_model"], n_components: int = 2) -> Components:
    """Exact principal components of states, by a singular value decomposition in float64.

    A direction's sign is arbitrary, so it is fixed: its largest entry (by absolute value) is positive. Where two
    components have the same variance, their directions are arbitrary in the plane of the two.

    Args:
        states: at least two; all leading axes count as samples.
        n_components: how many.

    Raises:
        InputError: fewer than two states, more components than states − 1 or d_model can have, or states that are not
            finite.
    """
    check_floats(states, "states", "[..., d_model]", 2)
    rows = states.reshape(-1, states.shape[-1]).double()
    most = min(len(rows) - 1, rows.shape[1])
    if check_count("n_components", n_components) > most:
        raise InputError(
            f"{len(rows)} states of {rows.shape[1]} numbers have at most {most} principal components, got "
            f"n_components={n_components}: take more loops, layers or tokens."
        )
    check_finite(states)
    mean = rows.mean(0)
    _, sizes, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    directions = directions[:n_components]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * largest.sign()
    scores = ((rows - mean) @ directions.T).reshape(*states.shape[:-1], n_components)
    variance = sizes.square()
    explained = ratio(variance[:n_components], variance.sum().expand(n_components))
    dtype = wide(states).dtype
    return Components(mean.to(dtype), directions.to(dtype), scores.to(dtype), explained.to(dtype))


@dataclass(frozen=True, eq=False, repr=False)
class Trajectory(Result):
    """Where the latent states of some tokens go, layer by layer and loop by loop.

    Attributes:
        positions: the tokens' positions.
        str_tokens: their texts; their ids where there is no tokenizer.
        scores: coordinates of each core layer's output along the principal components of all of them.
        explained: share of the variance along each component.
        mean, directions: of the components: coordinates of other states are (x − mean) @ directions.T.
    """

    positions: tuple[int, ...]
    str_tokens: tuple[str, ...]
    scores: Float[Tensor, "loop layer token component"]
    explained: Float[Tensor, " component"]
    mean: Float[Tensor, " d_model"]
    directions: Float[Tensor, "component d_model"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each state: loop, layer, pos, token, and its coordinates pc1, pc2, ..."""
        loop, layer, token = np.indices(self.scores.shape[:-1]).reshape(3, -1)
        table = {"loop": loop, "layer": layer, "pos": np.array(self.positions)[token]}
        names = np.array(self.str_tokens, dtype=object)[token]
        coordinates = self.scores.reshape(-1, self.scores.shape[-1]).numpy()
        return pd.DataFrame(
            {**table, "token": names} | {f"pc{i + 1}": column for i, column in enumerate(coordinates.T)}
        )

    def plot(self) -> go.Figure:
        """The first two components: a line for each loop through its layers, later loops more yellow.

        The last loop's cycle is closed and drawn strong, with the numbers of its layers.

        Raises:
            InputError: one component only.
        """
        if self.scores.shape[-1] < 2:
            raise InputError("a trajectory with one component can't be drawn: pass n_components=2 or more.")
        title = f"Latent states through layers and loops: {self.made_by.get('model', '')}"
        return trajectory_figure(self.scores, self.explained, self.positions, self.str_tokens, title)


@with_run_options
def trajectory(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    position: int | Sequence[int] = -1,
    n_components: int = 2,
    stack: str | None = None,
    **options: Unpack[RunOptions],
) -> Trajectory:
    """The path of one token's latent state, or several tokens', through all core layers of all loops.

    The components are those of all these states together: of every layer's output in every loop, at the positions
    asked for.

    Args:
        model, options: as in `LoopedModel.forward`.
        prompts: one prompt.
        n_loops: two or more; None for the count the model was trained with.
        position: of the token, or several; by default the last.
        n_components: how many principal components.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: several prompts, one loop, a position that there is not, or more components than states can have,
            before the run; states that are not finite, with loop, layer and position.

    Source:
        arXiv 2604.11791, PCA over all latent states of one token.
    """
    check_eval(check_looped(model, several_stacks=True))
    chosen = model.cfg.looping_stack(stack)
    run = one_prompt(model, model.prepare(prompts, n_loops, **options), loops=2)
    wanted = list(position) if isinstance(position, Sequence) else [position]
    places = [resolve_index("position", one, run.tokens.shape[1]) for one in wanted]
    if not places or len(set(places)) < len(places):
        raise InputError(f"position must name one position or several different ones, got {position!r}.")
    n_core, n_loops = model.cfg.n_core, model.cfg.schedule(run.counts).n_loops(chosen)
    most = min(n_loops * n_core * len(places) - 1, model.cfg.d_model)
    if check_count("n_components", n_components) > most:
        raise InputError(f"these states have at most {most} principal components, got n_components={n_components}.")
    kept: list[Tensor] = []
    names = [HookSite("hook_resid_post", chosen, layer).name for layer in range(n_core)]
    watch(model, run, names, lambda _, x: kept.append(x[0, places].cpu()), only_loops=True)
    states = torch.stack(kept).unflatten(0, (n_loops, n_core))
    check_finite(states, ("loop", "layer", "position"), {"position": places})
    return Trajectory(
        made_by={"model": model.cfg.model_name, **run.describe(), **model.cfg.made_of(chosen)},
        positions=tuple(places),
        str_tokens=model.token_texts(run.tokens[0, places]),
        **pca(states, n_components)._asdict(),
    )
