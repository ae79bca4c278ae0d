"""Lyapunov exponents of the loop: how fast small differences between states grow or die out, along a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.dynamics.tokens import one_prompt, prepare_long
from tl_looped.engine.checks import check_finite
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, Run, RunOptions, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.model import LoopedModel
from tl_looped.observe.watching import naming_origin
from tl_looped.viz.dynamics import exponent_bars

FEWEST_LOOPS = 16

_TRANSIENT = 0.25  # share of the loops, at the beginning, that the state takes to come to where it stays
_ALIGNING = 0.25  # share of them, at the end, in which directions turn to those that grow most
_BLOCKS = 4


@dataclass(frozen=True, eq=False, repr=False)
class LyapunovExponents(Result):
    """The leading Lyapunov exponents of a run, the largest first, in nats a loop.

    Attributes:
        exponents: mean log growth a loop. Above zero: small differences grow, so a bounded state is chaotic. Zero: it
            goes round or drifts. Below: it is drawn to rest or to a closed path, and exp(exponent) is the rate.
        error: standard error of each, from four stretches of the run.
        growth: log growth in each loop that counts, in the order of the run.
        first_loop: the first of these loops.
    """

    exponents: Float[Tensor, " k"]
    error: Float[Tensor, " k"]
    growth: Float[Tensor, "loop k"]
    first_loop: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each exponent: index, exponent, error, and the growth factor exp(exponent)."""
        table = pd.DataFrame({"exponent": self.exponents.numpy(), "error": self.error.numpy()})
        return table.assign(factor=self.exponents.exp().numpy()).reset_index(names="index")

    def plot(self) -> go.Figure:
        """The exponents with their errors, and a line at zero."""
        return exponent_bars(self.exponents, self.error, f"Lyapunov exponents: {self.made_by.get('model', '')}")


@torch.inference_mode(mode=False)  # it needs gradients, whatever the caller's mode
@with_run_options
def lyapunov_exponents(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    k: int = 4,
    direction_seed: int = 0,
    **options: Unpack[RunOptions],
) -> LyapunovExponents:
    """The leading Lyapunov exponents of the map of one loop, along a run of one prompt.

    k directions are carried by the transposed Jacobians of the loops, from the last loop to the first, and made
    orthogonal again after each (Benettin et al. 1980); the product of the Jacobians and its transpose have the same
    exponents, and a transposed product is one backward pass. No Jacobian is formed. The first quarter of the loops is
    left out, and the last quarter only turns the directions. The map is that of the whole state, all positions
    together; exponents differ between prompts, and between runs too short for their mean to settle (see `error`).

    `long_run` tells slow contraction from chaos by the path alone; this tells by how neighbours of the path part.

    Args:
        model: in float32 or float64.
        prompts: one prompt.
        n_loops: at least 16; None for 128.
        k: how many exponents.
        direction_seed: of the first directions.
        options: as in `LoopedModel.forward`.

    Raises:
        InputError: several prompts, a half-precision model, too few loops, more exponents than the state has numbers,
            or states that are not finite.

    Source:
        Benettin, Galgani, Giorgilli and Strelcyn 1980.
    """
    runs = prepare_long(model, prompts, n_loops, options, least=FEWEST_LOOPS, several_stacks=True)
    if model.dtype not in (torch.float32, torch.float64):
        raise InputError(f"the model is {model.dtype}: load it in float32, or better float64, for its Jacobians.")
    run = one_prompt(model, runs)
    size = model.cfg.d_state * run.tokens.shape[1]
    if check_count("k", k) > size:
        raise InputError(f"the state has {size} numbers, so k must be at most {size}, got {k}.")
    model.reach(run).check_hooks()
    first, counted = math.ceil(_TRANSIENT * run.n_loops), run.n_loops - math.ceil(_ALIGNING * run.n_loops)
    with naming_origin(model, run):
        growth = _growth(model, run, first, k, direction_seed)[: counted - first]
    blocks = torch.stack([block.mean(0) for block in growth.chunk(_BLOCKS)])
    return LyapunovExponents(
        made_by={"model": model.cfg.model_name, **run.describe(), "direction_seed": direction_seed},
        exponents=growth.mean(0),
        error=blocks.std(0) / math.sqrt(len(blocks)),
        growth=growth,
        first_loop=first,
    )


def _growth(model: LoopedModel, run: Run, first: int, k: int, seed: int) -> Float[Tensor, "loop k"]:
    """Log growth of each direction in the loops from `first` on, in float64 on the CPU."""
    transformer, frame = model.transformer, model.frame(run)
    states: list[Tensor] = []
    with torch.no_grad():
        x, e = transformer.begin(run.tokens, frame, run.state, run.start)
        for t in range(run.n_loops):
            if t >= first:
                states.append(x.clone())
            x = transformer.loop(x, e, frame, t)
            check_finite(x[0], (f"loop {t}, leaving: position",))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(x.numel(), k, generator=generator, dtype=torch.float64)
    directions, logs = torch.linalg.qr(drawn)[0], []
    for t in range(run.n_loops - 1, first - 1, -1):
        with torch.enable_grad():
            before = states.pop().requires_grad_()
            after = transformer.loop(before, e, frame, t)
        columns = [
            torch.autograd.grad(after, before, column.view_as(after).to(after), retain_graph=True)[0].flatten()
            for column in directions.T
        ]
        directions, sizes = torch.linalg.qr(torch.stack(columns, dim=1).double().cpu())
        logs.append(sizes.diagonal().abs().log())
    return torch.stack(logs[::-1])
