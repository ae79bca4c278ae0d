"""Massive activations: where they are, and what becomes of the stages without the MLP that makes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.engine.checks import check_eval, check_finite, check_number
from tl_looped.engine.errors import InputError, check_count, nearest, resolve_index
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.numbers import median, wide
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, RunOptions, check_one_prompt, check_whole_run, with_run_options
from tl_looped.engine.schedule import CORE, HookSite, LoopCount, LoopSchedule
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe import Measure, observe
from tl_looped.observe.observation import BATCH_SIZE
from tl_looped.observe.watching import watch
from tl_looped.patching.interventions import Hooks
from tl_looped.stages.measures import STAGE_MEASURES
from tl_looped.viz.curves import Group, grouped_curves

MIN_SIZE, MIN_RATIO = 100.0, 1000.0
"""An activation is massive from this size on, and from this multiple of the median size in its layer call."""


def activation_ratios(resid: Float[Tensor, "*dims pos d_model"]) -> Float[Tensor, "*dims pos d_model"]:
    """|x_ij| / median |x|, the median over all tokens and dimensions of one prompt and layer call.

    With TransformerLens: `activation_ratios(cache["resid_post", layer])`. NaN or infinite where the median is zero.
    """
    size = wide(resid).abs()
    return size / median(size.flatten(-2))[..., None, None]


@dataclass(frozen=True, eq=False, repr=False)
class MassiveActivations(Result):
    """The largest entries of the residual stream, each (position, dimension) once, by its largest ratio to the median.

    Attributes:
        schedule: which layer runs at which realised depth.
        str_tokens: the prompt's tokens as text; None without a tokenizer.
        largest_ratio: the largest ratio after each layer call.
        depth: realised depth of the layer call after which the entry's ratio is largest.
        pos, dim: where the entry is.
        size: its value there, with its sign.
        ratio: |size| / median size of that layer call.
        massive_from: realised depth of the first layer call after which the entry is massive: at least `min_size` large
            and `min_ratio` times the median. NaN for never.
        min_size, min_ratio: those thresholds.
    """

    schedule: LoopSchedule
    str_tokens: tuple[str, ...] | None
    largest_ratio: Float[Tensor, " depth"]
    depth: Int[Tensor, " entry"]
    pos: Int[Tensor, " entry"]
    dim: Int[Tensor, " entry"]
    size: Float[Tensor, " entry"]
    ratio: Float[Tensor, " entry"]
    massive_from: Float[Tensor, " entry"]
    min_size: float
    min_ratio: float

    def massive(self) -> Bool[Tensor, " entry"]:
        """Which of the entries are massive after some layer call."""
        return ~self.massive_from.isnan()

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each entry, the largest ratio first: its layer call, its place and token, size and ratio."""
        table = _calls(self.schedule).iloc[self.depth.numpy()].reset_index(drop=True)
        table["token"] = None if self.str_tokens is None else [self.str_tokens[pos] for pos in self.pos.tolist()]
        for name in ("pos", "dim", "size", "ratio", "massive_from"):
            table[name] = getattr(self, name).numpy()
        return table

    def plot(self, group: Group = "depth") -> go.Figure:
        """The largest ratio after each layer call.

        Args:
            group: as in `grouped_curves`.
        """
        n = int(self.massive().sum())
        found = f"{n} massive activation{'' if n == 1 else 's'}" if n else "no massive activation"
        title = f"Largest activations: {self.made_by.get('model', '')}, {found}"
        return grouped_curves(
            self.largest_ratio, self.schedule, group, label="largest |x| / median |x|", title=title, log=True
        )


def _calls(schedule: LoopSchedule) -> pd.DataFrame:
    """Every layer call: depth, stack, layer, loop."""
    stack, layer, loop = zip(*schedule.layer_calls(), strict=True)
    table = pd.DataFrame({"depth": range(schedule.depth), "stack": stack, "layer": layer})
    return table.assign(loop=pd.array(loop, dtype="Int64"))


@with_run_options
def massive_activations(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    top: int = 10,
    min_size: float = MIN_SIZE,
    min_ratio: float = MIN_RATIO,
    **options: Unpack[RunOptions],
) -> MassiveActivations:
    """The largest entries of the residual stream after any layer call, relative to the median of that call.

    Of every layer call, the `top` entries are looked at. A position and dimension is listed once, however many layer
    calls carry it on. Where the residual stream is normalised (Huginn) none can grow massive.

    Args:
        model: in evaluation mode.
        prompts: a single one, in any form.
        n_loops, options: of the run, see `RunOptions`.
        top: how many entries to list, and to look at in each layer call.
        min_size, min_ratio: from where on an entry is massive.

    Raises:
        InputError: before the run, for several prompts or a threshold that is not one; in it, for a state that is not
            finite: the message names the layer and loop where that began.

    Source:
        Sun et al. 2024, arXiv 2402.17762 (above 100, and about 1000 times the median); arXiv 2604.11791.
    """
    check_eval(check_looped(model, several_stacks=True))
    run = model.batch_of(model.prepare(prompts, n_loops, **options))
    check_whole_run(run, loops=1)
    check_one_prompt(run)
    check_count("top", top)
    for name, value in (("min_size", min_size), ("min_ratio", min_ratio)):
        check_number(name, value, low_too=True)
    schedule = model.cfg.schedule(run.counts)
    depths: dict[tuple[str | None, int | None, int | None], int] = {
        call: depth for depth, call in enumerate(schedule.layer_calls())
    }
    largest = torch.full((schedule.depth,), math.nan, dtype=torch.float64)
    best: dict[tuple[int, int], tuple[float, int, float]] = {}  # (pos, dim): ratio, depth, size
    first: dict[tuple[int, int], int] = {}

    def look(site: HookSite, x: Tensor) -> None:
        check_finite(x[0], (f"{site.name!r}, position",))
        ratios = activation_ratios(x)[0]
        depth = depths[site.stack, site.layer, site.loop]
        found = ratios.flatten().topk(min(top, ratios.numel()))
        largest[depth] = float(found.values[0])
        for ratio, index in zip(found.values.tolist(), found.indices.tolist(), strict=True):
            place = divmod(index, x.shape[-1])
            size = float(x[0][place])
            if place not in best or ratio > best[place][0]:
                best[place] = (ratio, depth, size)
            if abs(size) >= min_size and ratio >= min_ratio:
                first.setdefault(place, depth)

    watch(model, run, {HookSite("hook_resid_post", stack, layer).name for stack, layer, _ in depths}, look)
    entries = sorted(best, key=lambda place: -best[place][0])[:top]
    return MassiveActivations(
        made_by={"model": model.cfg.model_name, **run.describe()},
        schedule=schedule,
        str_tokens=None if model.tokenizer is None else tuple(model.to_str_tokens(run.tokens[0])),
        largest_ratio=largest,
        depth=torch.tensor([best[place][1] for place in entries]),
        pos=torch.tensor([pos for pos, _ in entries]),
        dim=torch.tensor([dim for _, dim in entries]),
        size=torch.tensor([best[place][2] for place in entries], dtype=torch.float64),
        ratio=torch.tensor([best[place][0] for place in entries], dtype=torch.float64),
        massive_from=torch.tensor([first.get(place, math.nan) for place in entries], dtype=torch.float64),
        min_size=float(min_size),
        min_ratio=float(min_ratio),
    )


def silence_mlp(
    model: LoopedModel,
    layer: int,
    loops: int | Iterable[int] | None = None,
    *,
    stack: str = CORE,
    n_loops: LoopCount | None = None,
) -> Hooks:
    """Hooks under which one MLP adds nothing to the residual stream, in some loops or in all.

    Args:
        model: the model.
        layer: index in its stack, negative from the end.
        loops: the loop or loops; None for all (and for a layer that runs once). Negative numbers count from the end.
        stack: "blocks", "prelude" or "coda"; "L_blocks" or "H_blocks", where two stacks loop.
        n_loops: loops of the run that the hooks are for; None for the count the model was trained with.

    Returns:
        For `model.run_with_hooks(tokens, n_loops, fwd_hooks=...)` or `model.hooks(...)`.

    Raises:
        InputError: no such stack, layer or loop; no loops; or loops of a layer that runs once.

    Source:
        arXiv 2604.11791, ablation of massive activations.
    """
    return [(site.name, _silence) for site in _silenced(model, layer, loops, stack, n_loops)]


def _silence(x: Tensor, hook: LoopHookPoint) -> Tensor:
    return torch.zeros_like(x)


def _silenced(
    model: LoopedModel, layer: int, loops: int | Iterable[int] | None, stack: str, n_loops: LoopCount | None
) -> list[HookSite]:
    schedule = check_looped(model, several_stacks=True).cfg.schedule(n_loops)
    if stack not in schedule.stacks():
        raise InputError(f"there is no stack {stack!r}: {schedule.describe()}.{nearest(stack, schedule.stacks())}")
    site = HookSite("hook_mlp_out", stack, resolve_index("layer", layer, schedule.n_layers(stack)))
    if loops is None:
        return [site]
    total = schedule.n_loops(stack)
    if not total:
        raise InputError(f"the {stack} runs once: leave loops out.")
    wanted = list(loops) if isinstance(loops, Iterable) else [loops]
    chosen = sorted({resolve_index("loop", loop, total) for loop in wanted})
    if not chosen:
        raise InputError("loops is empty, so nothing would change: leave it out for all loops.")
    return [site.at(loop) for loop in chosen]


@dataclass(frozen=True, eq=False, repr=False)
class AblationEffect(Result):
    """Measures with and without one MLP, at every layer call, averaged over prompts and over heads or positions.

    Attributes:
        schedule: which layer runs at which realised depth.
        labels, units: of each measure, by its name.
        clean: each measure of the model as it is.
        ablated: the same with the MLP silent.
    """

    schedule: LoopSchedule
    labels: dict[str, str]
    units: dict[str, str]
    clean: dict[str, Float[Tensor, " depth"]]
    ablated: dict[str, Float[Tensor, " depth"]]

    def change(self, measure: str) -> Float[Tensor, " depth"]:
        """Ablated minus clean.

        Raises:
            InputError: it was not taken.
        """
        if measure not in self.clean:
            known = list(self.clean)
            raise InputError(f"there is no measure {measure!r} here, but {known}.{nearest(measure, known)}")
        return self.ablated[measure] - self.clean[measure]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each measure and layer call: measure, depth, stack, layer, loop, clean, ablated."""
        calls = _calls(self.schedule)
        tables = [
            calls.assign(clean=self.clean[name].numpy(), ablated=self.ablated[name].numpy()) for name in self.clean
        ]
        return (
            pd.concat(tables, keys=list(self.clean), names=["measure", None])
            .reset_index("measure")
            .reset_index(drop=True)
        )

    def plot(self, measure: str, group: Group = "depth", *, log: bool = False) -> go.Figure:
        """One measure: by "depth" both curves, by "loop" or "layer" the change.

        Args:
            measure: its name.
            group: as in `grouped_curves`.
            log: a logarithmic axis, for both curves.
        """
        change, both = self.change(measure), group == "depth"
        where = f"{self.made_by['silent']}: {self.made_by.get('model', '')}"
        return grouped_curves(
            self.ablated[measure] if both else change,
            self.schedule,
            group,
            label=self.labels[measure] if both else f"change of {self.labels[measure]}",
            unit=self.units[measure],
            title=where,
            log=log and both,
            name="ablated",
            reference=self.clean[measure] if both else None,
            reference_name="clean",
        )


@with_run_options
def ablation_effect(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    layer: int,
    loops: int | Iterable[int] | None = None,
    stack: str = CORE,
    measures: Sequence[Measure] = STAGE_MEASURES,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> AblationEffect:
    """What becomes of the stages when one MLP adds nothing, in all loops or some.

    Args:
        model: in evaluation mode.
        prompts, n_loops, measures, batch_size, progress, options: as in `observe`.
        layer, loops, stack: which MLP, and when, as in `silence_mlp`.

    Raises:
        InputError: what `silence_mlp` and `observe` refuse, before anything runs.

    Source:
        arXiv 2604.11791, ablation of massive activations.
    """
    check_eval(check_looped(model, several_stacks=True))
    prepared = model.prepare(prompts, n_loops, **options)
    sites = _silenced(model, layer, loops, stack, prepared.counts)
    runs = []
    for hooked in ([], sites):
        with model.hooks(fwd_hooks=[(site.name, _silence) for site in hooked]):
            runs.append(observe(model, prepared, measures=measures, batch_size=batch_size, progress=progress))
    means = [{name: run.mean(name).reshape(run.schedule.depth, -1).nanmean(1) for name in run.values} for run in runs]
    silent = f"MLP of {stack}.{sites[0].layer} silent"
    if loops is not None:
        silent += f" in loop{'s' if len(sites) > 1 else ''} {', '.join(str(site.loop) for site in sites)}"
    return AblationEffect(
        made_by={**runs[0].made_by, "silent": silent},
        schedule=runs[0].schedule,
        labels=runs[0].labels,
        units=runs[0].units,
        clean=means[0],
        ablated=means[1],
    )
