"""Step by step through the loops: how far each step goes, how it turns, and how it differs from the one before."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.dynamics.measures import MOTION
from tl_looped.dynamics.tokens import place_table, prepare_long
from tl_looped.engine.errors import resolve_index
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, RunOptions, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.model import LoopedModel
from tl_looped.observe.observation import BATCH_SIZE, observe
from tl_looped.observe.observed import Observed
from tl_looped.viz.dynamics import motion_curves


@dataclass(frozen=True, eq=False, repr=False)
class StateMotion(Result):
    """The steps of one core layer's output from loop to loop, at every token; NaN where a step has none before it.

    Attributes:
        layer: the core layer.
        places: prompt and position of each token.
        step: ‖x_t − x_{t−1}‖ / ‖x_t‖.
        angle: between a step and the one before, in radians: 0 straight on, π/2 orthogonal, π back.
        acceleration: length of the difference of the two steps, over ‖x_t‖.
        step_change: how much longer the relative step is than the one before; below zero where steps shrink.
    """

    layer: int
    places: dict[str, Int[Tensor, " token"]]
    step: Float[Tensor, "loop token"]
    angle: Float[Tensor, "loop token"]
    acceleration: Float[Tensor, "loop token"]
    step_change: Float[Tensor, "loop token"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each loop and token: loop, prompt, pos and the four measures."""
        table = place_table(self.step.shape, ("loop", "token"), self.places)
        return table.assign(**{one.name: getattr(self, one.name).flatten().numpy() for one in MOTION})

    def plot(self) -> go.Figure:
        """Step length and turning angle over loops: the last positions, and the median over all tokens."""
        title = f"Steps of core layer {self.layer}: {self.made_by.get('model', '')}"
        last = self.places["prompt"].diff(append=self.places["prompt"].new_tensor([-1])) != 0
        return motion_curves(self.step, self.angle, last, title)


def motion_of(observed: Observed, *, layer: int = -1, stack: str | None = None) -> StateMotion:
    """The steps of a core layer's output, of an observation.

    Args:
        observed: from `observe(..., measures=MOTION, per_token=[measure.name for measure in MOTION])`.
        layer: the core layer, by default the last.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: no such layer, or a measure was not kept for every token.
    """
    values = {one.name: observed.tokens_by_loop(one.name, stack) for one in MOTION}
    places = values["step"][1]
    index = resolve_index("layer", layer, values["step"][0].shape[1])
    steps = {name: series[:, index] for name, (series, _) in values.items()}
    made_by = observed.made_by | ({} if stack is None else {"stack": stack})
    return StateMotion(made_by=made_by, layer=index, places=places, **steps)


@with_run_options
def state_motion(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    layer: int = -1,
    stack: str | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> StateMotion:
    """How a core layer's output moves from loop to loop at every token: step lengths, angles, and how steps change.

    It is `motion_of` of what `observe` sees, which keeps three states of each layer, whatever the number of loops.

    Args:
        model, prompts, batch_size, progress, options: as in `observe`.
        n_loops: three or more; None for 128.
        layer: the core layer, by default the last.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: too few loops, no such layer, or what `observe` refuses.

    Source:
        arXiv 2509.23314: step norms, angles between steps, acceleration.
    """
    runs = prepare_long(model, prompts, n_loops, options, least=3, several_stacks=True)
    model.cfg.looping_stack(stack)
    index = resolve_index("layer", layer, model.cfg.n_core)
    names = [one.name for one in MOTION]
    found = observe(model, runs, measures=MOTION, per_token=names, batch_size=batch_size, progress=progress)
    return motion_of(found, layer=index, stack=stack)
