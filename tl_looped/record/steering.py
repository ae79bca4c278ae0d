"""Steering: directions from differences of means by loop, added to a site or taken out of it at the loops asked for."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.engine.checks import check_eval, check_number
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.hooks import HookFn, HookName, LoopHookPoint
from tl_looped.engine.numbers import length, unit, wide
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, RunOptions, with_run_options
from tl_looped.engine.schedule import HookSite, LoopCount
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe.observation import BATCH_SIZE
from tl_looped.record.probing import Labels, of_rows
from tl_looped.record.recorded import Grid, Recorded
from tl_looped.record.recording import Positions, record
from tl_looped.viz.loops import Series, loop_series

When = Literal["at", "from", "every"]
Hooks = list[tuple[HookName, HookFn]]


@dataclass(frozen=True, eq=False, repr=False)
class Directions(Result):
    """For every loop (and layer) of a site, the mean of one group's activations less that of another's.

    Attributes:
        site: where, without layer and loop.
        loops, layers: of the directions; −1 for what the site does not have.
        vectors: the differences of means, in float64.
        stream: mean length of the activations at each place, both groups together.
        groups: the two groups; the direction points to the first.
        examples: how many activations of each were averaged.
    """

    site: str
    loops: tuple[int, ...]
    layers: tuple[int, ...]
    vectors: Float[Tensor, "loop layer d_model"]
    stream: Float[Tensor, "loop layer"]
    groups: tuple[str, str]
    examples: tuple[int, int]

    @property
    def relative(self) -> Float[Tensor, "loop layer"]:
        """Length of each direction over the mean length of the stream there."""
        return length(self.vectors) / self.stream

    def random(self, seed: int = 0) -> Directions:
        """Directions of the same lengths that point anywhere: a null."""
        draw = torch.randn(self.vectors.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        vectors = unit(draw) * length(self.vectors)[..., None]
        return replace(self, vectors=vectors, made_by={**self.made_by, "random": seed})

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each place: loop, layer, length of the direction, of the stream, and their ratio."""
        table = pd.DataFrame(list(product(self.loops, self.layers)), columns=["loop", "layer"]).astype("Int64")
        numbers = {"length": length(self.vectors), "stream": self.stream, "relative": self.relative}
        return table.mask(table < 0).assign(**{name: one.flatten().numpy() for name, one in numbers.items()})

    def plot(self) -> go.Figure:
        """Length relative to the stream over loops, a line for each layer."""
        names = [f"layer {layer}" if layer >= 0 else "" for layer in self.layers]
        lines = [Series(name, one) for name, one in zip(names, self.relative.T, strict=True)]
        title = f"{self.groups[0]} less {self.groups[1]} at {self.site}"
        return loop_series(lines, self.loops, "length of the direction over that of the stream", title)

    def hooks(
        self,
        strength: float = 1.0,
        loop: int | None = None,
        *,
        when: When = "every",
        ablate: bool = False,
        layer: int | None = None,
        source_loop: int | None = None,
        positions: Sequence[int] | None = None,
    ) -> Hooks:
        """Hooks that add the direction of each loop, for `run_with_hooks(fwd_hooks=)`, `generate` or `hooks`.

        Args:
            strength: how many times: 1 for the difference of means, negative for the other way.
            loop: the loop for "at", or the first one for "from".
            when: "at" one loop, "from" one on, or at "every" one that has a direction.
            ablate: instead take out the part of the stream that lies along it, x − (x·u)u.
            layer: at which layer; None where the site has one.
            source_loop: take the direction of this loop at all of them.
            positions: which, counted in the whole text while it is generated; None for all.

        Raises:
            InputError: a loop or layer without a direction, or a direction of length zero.
        """
        check_number("strength", strength, -math.inf)
        if when not in get_args(When):
            raise InputError(f"when must be one of {get_args(When)}, got {when!r}.")
        if (loop is None) != (when == "every"):
            raise InputError(f"when={when!r} {'takes no' if loop is not None else 'needs a'} loop: got loop={loop}.")
        at = _index("layer", layer, self.layers) if layer is not None or len(self.layers) > 1 else 0
        first = 0 if loop is None else _index("loop", loop, self.loops)
        source = None if source_loop is None else _index("source_loop", source_loop, self.loops)
        hooks: Hooks = []
        for t in range(first, first + 1 if when == "at" else len(self.loops)):
            vector = self.vectors[t if source is None else source, at]
            if not float(length(vector)) > 0:
                raise InputError(
                    f"the direction at loop {self.loops[t]} has length zero, as both groups have the same mean there: "
                    "take other groups, or another loop."
                )
            change = partial(_project, u=unit(vector)) if ablate else partial(_add, vector=strength * vector)
            where = {"layer": self.layers[at], "loop": self.loops[t]}
            site = replace(HookSite.parse(self.site), **{name: one for name, one in where.items() if one >= 0})
            hooks.append((site.name, partial(_at_positions, change=change, positions=positions)))
        return hooks


def _index(name: str, value: int | None, known: Sequence[int]) -> int:
    if value not in known:
        raise InputError(f"there is no direction for {name}={value}: pass one of {list(known)}.")
    return known.index(value)


def _add(x: Tensor, vector: Tensor) -> Tensor:
    return x + vector.to(x)


def _project(x: Tensor, u: Tensor) -> Tensor:
    u = u.to(x.device, wide(x).dtype)
    return (wide(x) - (wide(x) @ u)[..., None] * u).to(x.dtype)


def _at_positions(
    x: Tensor, hook: LoopHookPoint, change: Callable[[Tensor], Tensor], positions: Sequence[int] | None
) -> Tensor:
    if positions is None:
        return change(x)
    here = [p - hook.first_position for p in positions if 0 <= p - hook.first_position < x.shape[1]]
    x[:, here] = change(x[:, here])
    return x


def directions_of(recorded: Recorded, labels: Labels, toward: Any, *, site: str | None = None) -> Directions:
    """Directions from recorded activations: the mean of the rows with one label less that of all others.

    Args:
        recorded: the activations.
        labels: of every prompt, or of every row.
        toward: the label that the directions point to.
        site: of the residual stream or a state; None where one site was recorded.

    Raises:
        InputError: labels of another number; none of them, or all, are `toward`; a site without d_model.
    """
    mine = torch.from_numpy(of_rows(recorded, labels, "labels") == str(toward))
    if not bool(mine.any()) or bool(mine.all()):
        raise InputError(f"{'all' if bool(mine.any()) else 'none'} of the labels are {toward!r}: give two groups.")
    return _between((recorded, mine), (recorded, ~mine), recorded.grid(site), (str(toward), "others"))


@with_run_options
def directions(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    against: Prompts,
    site: str = "resid_post",
    layers: Iterable[int] | None = None,
    positions: Positions = "last",
    batch_size: int = BATCH_SIZE,
    **options: Unpack[RunOptions],
) -> Directions:
    """Directions from two sets of prompts: the mean activation of `prompts` less that of `against`, by loop and layer.

    Args:
        model: in evaluation mode.
        prompts, against: the sets; the directions point to the first.
        n_loops, layers, positions, batch_size, options: as for `record`, which keeps the activations in a folder for
            temporary files meanwhile.
        site: of the residual stream or a state.
    """
    kept: dict[str, Any] = {"sites": site, "layers": layers, "positions": positions, "batch_size": batch_size}
    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            record(model, one, n_loops, out=Path(folder) / str(i), progress=False, **kept, **options)
            for i, one in enumerate((prompts, against))
        )
        rows, others = (torch.ones(len(one), dtype=torch.bool) for one in (first, second))
        return _between((first, rows), (second, others), first.grid(), ("prompts", "against"))


def _between(
    toward: tuple[Recorded, Tensor], against: tuple[Recorded, Tensor], grid: Grid, groups: tuple[str, str]
) -> Directions:
    """The mean of some rows of one record less that of some of another."""
    if grid.site.axes != ("batch", "pos", "d_model"):
        raise InputError(f"{grid.site.name!r} is {list(grid.site.axes)}, and a direction needs [batch, pos, d_model].")
    vectors, stream = [], []
    for t, layer in product(grid.loops, grid.layers):
        first, second = (one.tensor(grid.name(t, layer))[rows].double() for one, rows in (toward, against))
        vectors.append(first.mean(0) - second.mean(0))
        stream.append(length(torch.cat([first, second])).mean())
    shape = len(grid.loops), len(grid.layers)
    return Directions(
        made_by=toward[0].made_by,
        site=grid.site.name,
        loops=grid.labels[0],
        layers=grid.labels[1],
        vectors=torch.stack(vectors).unflatten(0, shape),
        stream=torch.stack(stream).unflatten(0, shape),
        groups=groups,
        examples=(int(toward[1].sum()), int(against[1].sum())),
    )


@dataclass(frozen=True, eq=False, repr=False)
class Steered(Result):
    """What adding directions did to a metric, by strength and loop, beside random directions of the same length.

    Attributes:
        when: "at": each loop alone; "from": from it on; "every": all loops, and there is one column.
        strengths, loops: of the cells; −1 for every loop.
        baseline: the metric without steering.
        effect: with it, less the baseline.
        null: the same for random directions.
        relative: length of what is added over the mean length of the stream, at the loop (mean over all for "every").
    """

    when: str
    strengths: tuple[float, ...]
    loops: tuple[int, ...]
    baseline: Float[Tensor, " prompt"]
    effect: Float[Tensor, "strength loop prompt"]
    null: Float[Tensor, "draw strength loop prompt"]
    relative: Float[Tensor, "strength loop"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a cell: mean effect over prompts, its standard error, and the range of random directions' means."""
        table = pd.DataFrame(list(product(self.strengths, self.loops)), columns=["strength", "loop"])
        means = self.null.mean(-1).flatten(1)
        error = self.effect.std(-1).flatten() / self.effect.shape[-1] ** 0.5
        return table.assign(
            relative=self.relative.flatten().numpy(),
            effect=self.effect.mean(-1).flatten().numpy(),
            error=error.numpy(),
            null_low=means.amin(0).numpy() if len(means) else math.nan,
            null_high=means.amax(0).numpy() if len(means) else math.nan,
        )

    def plot(self) -> go.Figure:
        """Mean effect over loops with two standard errors, a line for each strength; random directions dashed."""
        lines = []
        for i, strength in enumerate(self.strengths):
            mean, error = self.effect[i].mean(-1), 2 * self.effect[i].std(-1) / self.effect.shape[-1] ** 0.5
            lines.append(Series(f"strength {strength:g}", mean, (mean - error, mean + error)))
            lines += [Series(f"random, {strength:g}", draw.mean(-1), control=True) for draw in self.null[:, i]]
        return loop_series(lines, self.loops, "effect on the metric", f"directions added {self.when} the loop")


@with_run_options
def steering_sweep(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    directions: Directions,
    metric: Callable[[Float[Tensor, "batch pos d_vocab"]], Tensor],
    strengths: Sequence[float] = (-1.0, 1.0),
    when: When = "at",
    layer: int | None = None,
    source_loop: int | None = None,
    draws: int = 3,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> Steered:
    """Add directions at each loop in turn, at several strengths, and measure what becomes of the output.

    Args:
        model: in evaluation mode.
        prompts: in any form; those of one length run together, without padding.
        n_loops: loops to run; None for the count the model was trained with.
        directions: what to add.
        metric: from logits to a number for each prompt, [batch].
        strengths: how many times the direction is added.
        when, layer, source_loop: see `Directions.hooks`.
        draws: how many random directions of the same lengths to try as a null.
        batch_size: most prompts to run at once.
        progress: show a bar.
        options: see `RunOptions`.
    """
    check_eval(check_looped(model, several_stacks=True))
    check_count("batch_size", batch_size)
    check_count("draws", draws, 0)
    runs = model.prepare(prompts, n_loops, **options)
    if not runs.reads_out:
        raise InputError(f"a metric reads logits, and these runs stop before: leave out {runs.stops_by}.")
    loops: list[int | None] = [None] if when == "every" else list(directions.loops)
    every = [directions, *(directions.random(seed) for seed in range(draws))]
    cells: list[Hooks] = [[]]
    for one, strength, t in product(every, strengths, loops):
        cells.append(one.hooks(strength, t, when=when, layer=layer, source_loop=source_loop))
    values = torch.full((len(cells), len(runs)), math.nan, dtype=torch.float64)
    batches = runs.equal_lengths(batch_size)
    with torch.no_grad(), tqdm(total=len(batches) * len(cells), desc="Steering", disable=not progress) as bar:
        for rows in batches:
            run = model.batch_of(runs, rows)
            for i, hooks in enumerate(cells):
                with model.hooks(fwd_hooks=hooks):
                    found = metric(model.execute(run))
                if tuple(found.shape) != (len(rows),):
                    raise InputError(f"metric must return a number for each prompt, [batch], got {tuple(found.shape)}.")
                values[i, rows] = found.double().cpu()
                bar.update()
    made_by = {"model": model.cfg.model_name, **model.batch_of(runs, [0]).describe()}
    effects = (values[1:] - values[0]).reshape(len(every), len(strengths), len(loops), len(runs))
    at = 0 if layer is None else directions.layers.index(layer)
    relative = directions.relative[:, at].mean(0, keepdim=True) if when == "every" else directions.relative[:, at]
    return Steered(
        made_by=made_by | {"site": directions.site, "layer": layer},
        when=when,
        strengths=tuple(map(float, strengths)),
        loops=tuple(-1 if t is None else t for t in loops),
        baseline=values[0],
        effect=effects[0],
        null=effects[1:],
        relative=torch.tensor(strengths, dtype=torch.float64).abs()[:, None] * relative,
    )
