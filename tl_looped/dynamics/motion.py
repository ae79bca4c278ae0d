"""Step by step through the loops: how far each step goes, how it turns, and how it differs from the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.dynamics.steps import N_LOOPS, accelerations, step_angles, step_changes, step_norms
from tl_looped.engine.checks import check_eval
from tl_looped.engine.errors import resolve_index
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.numbers import wide_dtype
from tl_looped.engine.results import Result
from tl_looped.engine.runs import check_one_prompt, check_whole_run
from tl_looped.engine.schedule import CORE, HookSite
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe.watching import naming_origin
from tl_looped.viz.motion import motion_curves

_NAMES = ("step", "angle", "acceleration", "step_change")


@dataclass(frozen=True, eq=False, repr=False)
class LoopMotion(Result):
    """The steps of one core layer's output from loop to loop, for one prompt; NaN where a step has none before it.

    Attributes:
        layer: the core layer.
        str_tokens: text of each token; its id where there is no tokenizer.
        step: ‖x_t − x_{t−1}‖ / ‖x_t‖.
        angle: between a step and the one before, in radians: 0 straight on, π/2 orthogonal, π back.
        acceleration: length of the difference of the two steps, over ‖x_t‖.
        step_change: how much longer the relative step is than the one before; below zero where steps shrink.
    """

    layer: int
    str_tokens: tuple[str, ...]
    step: Float[Tensor, "loop pos"]
    angle: Float[Tensor, "loop pos"]
    acceleration: Float[Tensor, "loop pos"]
    step_change: Float[Tensor, "loop pos"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each loop and position: loop, pos, token and the four measures."""
        loop, pos = np.indices(self.step.shape).reshape(2, -1)
        tokens = np.array(self.str_tokens, dtype=object)[pos]
        values = {name: getattr(self, name).flatten().numpy() for name in _NAMES}
        return pd.DataFrame({"loop": loop, "pos": pos, "token": tokens, **values})

    def plot(self) -> go.Figure:
        """Step length and turning angle over loops: the last position, and the median over positions."""
        title = f"Steps of core layer {self.layer}: {self.made_by.get('model', '')}"
        return motion_curves(self.step, self.angle, title)


@torch.no_grad()
def loop_motion(
    model: LoopedModel, prompt: str | Tensor, n_loops: int = N_LOOPS, *, layer: int = -1, **options: Any
) -> LoopMotion:
    """How a core layer's output moves from loop to loop: step lengths, angles, and how steps change.

    Three states are kept at a time, whatever the number of loops.

    Args:
        model: the model.
        prompt: one prompt.
        n_loops: loops to run, two or more.
        layer: the core layer, by default the last.
        options: `initial_state`, `seed`, `position_ids`, `prepend_bos`, as in `LoopedModel.forward`.

    Raises:
        InputError: several prompts, one loop, no such layer; states that are not finite, with the site where that
            began.

    Source:
        arXiv 2509.23314: step norms, angles between steps, acceleration.
    """
    check_eval(check_looped(model))
    run = model.batch(prompt, n_loops, **options)
    check_whole_run(run)
    check_one_prompt(run)
    index = resolve_index("layer", layer, model.cfg.n_core)
    states: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {name: [] for name in _NAMES}

    def measure(x: Tensor, hook: LoopHookPoint) -> None:
        states[:] = [*states[-2:], x[0]]
        missing = torch.full(x.shape[1:2], float("nan"), dtype=wide_dtype(x.dtype))
        found = dict.fromkeys(_NAMES, missing)
        if len(states) > 1:
            some = torch.stack(states)
            norms = step_norms(some)
            found["step"] = norms[-1]
            if len(states) > 2:
                found |= {"angle": step_angles(some)[-1], "acceleration": accelerations(some)[-1]}
                found["step_change"] = step_changes(norms)[-1]
        for name, value in found.items():
            rows[name].append(value.cpu())

    site = HookSite("hook_resid_post", CORE, index).name
    with naming_origin(model, run), model.hooks(fwd_hooks=[(site, measure)]):
        model.execute(run, return_type=None)
    return LoopMotion(
        made_by={"model": model.cfg.model_name, **run.describe()},
        layer=index,
        str_tokens=model.token_texts(run.tokens[0]),
        **{name: torch.stack(row) for name, row in rows.items()},
    )
