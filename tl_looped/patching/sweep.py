"""Activation patching over loops, layers, positions and heads, in batches and without repeating what can't change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.patching import PatchingResult

from tl_looped.engine.cache import LoopedCache
from tl_looped.engine.errors import InputError
from tl_looped.engine.hooks import HookFn, LoopHookPoint
from tl_looped.engine.network import Frame
from tl_looped.engine.results import AnyResult
from tl_looped.engine.runs import Run
from tl_looped.engine.schedule import HookSite
from tl_looped.model import LoopedModel
from tl_looped.patching.cells import Axis, Group, Plan, When
from tl_looped.patching.checks import Metric, Metrics, Reduce, check_model, check_sites, check_source, rows_that_fit
from tl_looped.patching.sources import Source, as_source
from tl_looped.viz.patching import patching_heatmap


@dataclass(repr=False)
class LoopPatchingResult(PatchingResult, AnyResult):
    """TransformerLens's PatchingResult, with what made it.

    Attributes:
        site: short name of the patched site.
        made_by: model, loop count, initial state, source and options of the sweep.
        str_tokens: the patched prompt's tokens, where there is a tokenizer and one prompt.
    """

    site: str = ""
    made_by: dict[str, Any] = field(default_factory=dict)
    str_tokens: list[str] | None = None

    __repr__ = AnyResult.__repr__

    def __getitem__(self, metric_name: str) -> LoopPatchingResult:
        """One metric's result, with what made it."""
        one = super().__getitem__(metric_name)
        if isinstance(one, LoopPatchingResult):
            return one
        return LoopPatchingResult(**vars(one), site=self.site, made_by=self.made_by, str_tokens=self.str_tokens)

    def plot(self, metric_name: str | None = None) -> go.Figure:
        """The effect of every patch, averaged over prompts, as a heatmap.

        Args:
            metric_name: which metric, where there are several.
        """
        if self.has_metric_axis and metric_name is None:
            raise InputError(f"this result has the metrics {self.metric_names}: pass metric_name.")
        one: PatchingResult = self if metric_name is None else self[metric_name]
        effect = one.effect() if one.reduced else one.effect().mean(-1)
        title = f"{self.made_by.get('method', 'patching')} of {self.site}: {self.made_by.get('model', '')}"
        return patching_heatmap(effect, self.axis_names, title, f"change of {one.metric_names[0]}", self.str_tokens)


def patch_sweep(
    model: LoopedModel,
    corrupted: str | list[str] | Tensor,
    source: LoopedCache | Source,
    metric: Metric | Mapping[str, Metric],
    site: str = "resid_pre",
    axes: Sequence[Axis] = ("loop", "layer", "pos"),
    *,
    when: When = "at",
    source_loop: int | None = None,
    reduce: Reduce = "scalar",
    n_loops: int | None = None,
    initial_state: Tensor | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> LoopPatchingResult:
    """Patch one site, cell by cell, into the corrupted run, and measure the output.

    Every cell is what one forward of the corrupted prompt with a patching hook would give. The unpatched run is made
    once; a cell starts from its state just before the patched layer, and cells that differ in position, head, neuron or
    key run as one batch, so results agree with single runs up to rounding.

    Args:
        model: in evaluation mode, without hooks of its own.
        corrupted: the prompt (or prompts) to patch into.
        source: the cache of the clean run; or `zero()`, `mean(...)`, `fixed(...)` for ablation.
        metric: from logits [batch, pos, d_vocab] to a scalar or [batch] (see `reduce`), or a mapping of several.
        site: "state" (entering a loop, before injection), "injection", "resid_pre", "resid_mid", "resid_post",
            "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "post" (of the MLP), "initial_state", "embed", or any
            component's name.
        axes: what to sweep over: "loop", "layer", "pos" (of queries, for a pattern), "head", "neuron", "key",
            "source_loop". What is left out is patched in full: without "pos" all positions, without "layer" all layers.
        when: where in time, see `Plan`: "at" the loop, "from" it on, "clamp" from it on, or at "every" loop.
        source_loop: take the source's activations from this loop, whichever loop is written; as an axis, the full
            matrix.
        reduce: "scalar", "mean" or "none", as in TransformerLens.
        n_loops, initial_state, seed: of the corrupted run; they must be those of the source.
        batch_size: most rows (cells x prompts) to run at once; None for what fits. Results do not depend on it.
        progress: show a bar.

    Returns:
        TransformerLens's PatchingResult, always with the baseline: values [metric?, *axes, batch?].

    Raises:
        InputError: before any cell runs; the message says what to change.

    Source:
        Activation patching as in TransformerLens's `transformer_lens.patching`; over loops it is this library's.
    """
    check_model(model)
    given = as_source(source)
    metrics = Metrics(metric, reduce)
    run = model.batch(corrupted, n_loops, initial_state=initial_state, seed=seed)
    check_source(given, run)
    plan = Plan(model.cfg, run.n_loops, run.tokens.shape[1], site, axes, when, source_loop)
    groups = plan.groups()
    sites = [origin.name for group in groups for _, origin in group.sites]
    check_sites(model, run, sites)
    given.require(sites, run)
    rows = rows_that_fit(model, run, batch_size)
    with torch.no_grad():
        values, baseline = _Sweep(model, run, plan, given, metrics, rows).values(groups, progress)
    values, baseline = metrics.reduced(values), metrics.reduced(baseline)
    return LoopPatchingResult(
        values=values if metrics.several else values[0],
        axis_names=list(plan.axes),
        index_df=plan.index(),
        metric_names=list(metrics.functions),
        reduced=reduce != "none",
        baseline=baseline if metrics.several else baseline[0],
        has_metric_axis=metrics.several,
        site=site,
        made_by={
            "model": model.cfg.model_name,
            **run.describe(),
            "source": given.name,
            "when": when,
            "source_loop": source_loop,
        },
        str_tokens=str_tokens_of(model, run),
    )


def str_tokens_of(model: LoopedModel, run: Run) -> list[str] | None:
    """The tokens of a single prompt as text; None without a tokenizer or with several prompts."""
    return model.to_str_tokens(run.tokens[0]) if model.tokenizer is not None and len(run.tokens) == 1 else None


class _Sweep:
    """The unpatched run, passed along once, and the patched ends that branch off it."""

    def __init__(self, model: LoopedModel, run: Run, plan: Plan, source: Source, metrics: Metrics, rows: int):
        self.model, self.run, self.plan, self.source, self.metrics = model, run, plan, source, metrics
        self.transformer = model.transformer
        self.frame = model.frame(run)
        self.prompts = run.tokens.shape[0]
        self.cells_at_once = max(1, rows // self.prompts)

    def values(
        self, groups: Sequence[Group], progress: bool
    ) -> tuple[Float[Tensor, "metric *cells"], Float[Tensor, "metric *batch"]]:
        """(every cell's metrics, those of the unpatched run)."""
        baseline = self.metrics(self.model.execute(self.run))
        shape = (len(self.metrics.functions), *self.plan.sizes, *baseline.shape[1:])
        store = torch.zeros(shape, dtype=baseline.dtype, device=baseline.device)
        places = self.plan.places()
        e = self.transformer.read(self.run.tokens, self.frame)
        at, x = (0, 0), e if self.run.state is None else self.run.state
        with tqdm(total=len(groups) * len(places), desc=f"Patching {self.plan.component}", disable=not progress) as bar:
            for group in groups:
                if group.first is not None:
                    at, x = self._advance(at, x, e, group.first)
                for begin in range(0, len(places), self.cells_at_once):
                    chunk = places[begin : begin + self.cells_at_once]
                    logits = self._patched(group, chunk, x, e)
                    for place, one in zip(chunk, logits.split(self.prompts), strict=True):
                        store[(slice(None), *self._cell(group, place))] = self.metrics(one)
                    bar.update(len(chunk))
        return store, baseline

    def _cell(self, group: Group, place: tuple[int, ...]) -> tuple[int, ...]:
        outer, inner = iter(group.outer), iter(place)
        return tuple(next(outer) if axis in self.plan.outer else next(inner) for axis in self.plan.axes)

    def _advance(
        self, at: tuple[int, int], x: Tensor, e: Tensor, to: tuple[int, int]
    ) -> tuple[tuple[int, int], Float[Tensor, "batch pos d_model"]]:
        """Go on with the unpatched run from what layer `at` reads to what layer `to` reads, (loop, layer) each."""
        (t, layer), (last, stop) = at, to
        while t < last:
            x = self.transformer.loop(x, e, self.frame, t, layer)
            t, layer = t + 1, 0
        if layer < stop:
            x = self.transformer.enter(x, e, t) if layer == 0 else x
            for block in self.transformer.blocks[layer:stop]:
                x = block(x, self.frame, t)
        return (t, max(layer, stop)), x

    def _patched(
        self, group: Group, places: Sequence[tuple[int, ...]], x: Tensor, e: Tensor
    ) -> Float[Tensor, "rows pos d_vocab"]:
        """Logits of the chunk's cells, [cell x prompt, pos, d_vocab]."""
        cells = len(places)
        frame = repeat_frame(self.frame, cells)
        hooks = [(site.name, self._writer(origin, places)) for site, origin in group.sites]
        with self.model.hooks(fwd_hooks=hooks):
            if group.first is None:
                state = None if self.run.state is None else _repeat(self.run.state, cells)
                return self.transformer.readout(
                    self.transformer(_repeat(self.run.tokens, cells), frame, state, 0, self.run.n_loops), frame
                )
            t, layer = group.first
            e, x = _repeat(e, cells), _repeat(x, cells)
            if (t, layer) == (0, 0):
                x = self.transformer.hooks.hook_state_init(x)
            for loop in range(t, self.run.n_loops):
                x = self.transformer.loop(x, e, frame, loop, layer if loop == t else 0)
            return self.transformer.readout(x, frame)

    def _writer(self, origin: HookSite, places: Sequence[tuple[int, ...]]) -> HookFn:
        def write(x: Tensor, hook: LoopHookPoint) -> Tensor:
            rows = x.unflatten(0, (len(places), self.prompts))
            mask = self.plan.mask(places, rows.shape[1:], x.device)
            give = self.source.values
            given = give(origin, rows[0]) if self.source.constant else torch.stack([give(origin, row) for row in rows])
            return torch.where(mask, given, rows).flatten(0, 1)

        return write


def _repeat(x: Tensor, cells: int) -> Tensor:
    return x.repeat(cells, *(1 for _ in x.shape[1:]))


def repeat_frame(frame: Frame, cells: int) -> Frame:
    """The frame of a batch that holds every prompt `cells` times; what is the same for all rows stays one row."""
    return frame.repeat(cells)
