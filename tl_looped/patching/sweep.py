"""Activation patching over loops, layers, positions and heads, in batches and without repeating what can't change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.engine.hooks import HookFn, LoopHookPoint
from tl_looped.engine.network import Frame
from tl_looped.engine.runs import Prompts, Run, RunOptions, with_run_options
from tl_looped.engine.schedule import HookSite, LoopCount
from tl_looped.model import LoopedModel, one_core
from tl_looped.nn import LoopedTransformer
from tl_looped.patching.cells import Axis, Group, Plan, When
from tl_looped.patching.checks import check_sites, prepare_patch, rows_that_fit
from tl_looped.patching.results import LoopPatchingResult, Metric, Metrics, Reduce
from tl_looped.patching.sources import Given, Source


@with_run_options
def patch_sweep(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    source: Given,
    metric: Metric | Mapping[str, Metric],
    site: str = "resid_pre",
    axes: Sequence[Axis] = ("loop", "layer", "pos"),
    when: When = "at",
    source_loop: int | None = None,
    stack: str | None = None,
    reduce: Reduce = "scalar",
    batch_size: int | None = None,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> LoopPatchingResult:
    """Patch one site, cell by cell, into the run of the prompts, and measure the output.

    Every cell is what one forward of the prompts (the corrupted ones) with a patching hook would give. The unpatched
    run is made once; a cell starts from its state just before the patched layer, and cells that differ in position,
    head, neuron or key run as one batch, so results agree with single runs up to rounding.

    Args:
        model: in evaluation mode, without hooks of its own.
        prompts: what to patch into; all run as one batch.
        n_loops, options: of their run, see `RunOptions`; they must be those of the source.
        source: the cache of the clean run; or `zero()`, `mean_source(...)`, `fixed(...)` for ablation.
        metric: from logits [batch, pos, d_vocab] to a scalar or [batch] (see `reduce`), or a mapping of several.
        site: "state" (entering a loop, before injection), "injection", "resid_pre", "resid_mid", "resid_post",
            "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "post" (of the MLP), "initial_state", "embed", or any
            component's name.
        axes: what to sweep over: "loop", "layer", "pos" (of queries, for a pattern), "head", "neuron", "key",
            "source_loop". What is left out is patched in full: without "pos" all positions, without "layer" all layers.
        when: where in time, see `Plan`: "at" the loop, "from" it on, "clamp" from it on, or at "every" loop.
        source_loop: take the source's activations from this loop, whichever loop is written; as an axis, the full
            matrix.
        stack: whose layers and loops are meant; None for the only one that loops.
        reduce: "scalar", "mean" or "none", as in TransformerLens.
        batch_size: most rows (cells x prompts) to run at once; None for what fits. Results do not depend on it.
        progress: show a bar.

    Returns:
        TransformerLens's PatchingResult, always with the baseline: values [metric?, *axes, batch?].

    Raises:
        InputError: before any cell runs; the message says what to change.

    Source:
        Activation patching as in TransformerLens's `transformer_lens.patching`; over loops it is this library's.
    """
    metrics = Metrics(metric, reduce)
    run, given = prepare_patch(model, prompts, n_loops, source, options, several_stacks=True)
    plan = Plan(model.cfg, run.counts, run.tokens.shape[1], site, axes, when, source_loop, stack)
    groups = plan.groups()
    sites = [origin.name for group in groups for _, origin in group.sites]
    check_sites(model, run, sites)
    given.require(sites, run)
    rows = rows_that_fit(model, run, batch_size)
    with torch.no_grad():
        values, baseline = _Sweep(model, run, plan, given, metrics, rows).values(groups, progress)
    made: dict[str, object] = {"when": when, "source_loop": source_loop, **model.cfg.made_of(plan.stack)}
    return LoopPatchingResult.of(metrics, values, baseline, plan.index(), site, (model, run, given), **made)


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
        at = (0, 0)
        x, e = self.transformer.begin(self.run.tokens, self.frame, self.run.state)
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
        self, at: tuple[int, int], x: Tensor, e: Tensor | None, to: tuple[int, int]
    ) -> tuple[tuple[int, int], Float[Tensor, "batch pos d_state"]]:
        """Go on with the unpatched run from what layer `at` reads to what layer `to` reads, (loop, layer) each."""
        (t, layer), (last, stop) = at, to
        while t < last:
            x = self.transformer.loop(x, e, self.frame, t, layer)
            t, layer = t + 1, 0
        if layer < stop:
            core = one_core(self.model)
            x = core.enter(x, e, t) if layer == 0 else x
            x = core.run_layers(x, self.frame, t, layer, stop)
        return (t, max(layer, stop)), x

    def _patched(
        self, group: Group, places: Sequence[tuple[int, ...]], x: Tensor, e: Tensor | None
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
            e, x = None if e is None else _repeat(e, cells), _repeat(x, cells)
            if (t, layer) == (0, 0) and isinstance(self.transformer, LoopedTransformer):
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
