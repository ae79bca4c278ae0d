"""Activation patching over loops, layers, positions and heads, in batches and without repeating what can't change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.engine.hooks import HookFn, HookName, LoopHookPoint
from tl_looped.engine.network import Frame
from tl_looped.engine.runs import Prompts, Run, RunOptions, with_run_options
from tl_looped.engine.schedule import HookSite, LoopCount
from tl_looped.model import LoopedModel
from tl_looped.nn import LoopedTransformer
from tl_looped.patching.batches import Batch, Batches, Part
from tl_looped.patching.cells import Axis, Plan, When
from tl_looped.patching.checks import Positions, Room, check_sites, looks_back, positions_read, prepare_patch
from tl_looped.patching.results import LoopPatchingResult, Metric, Metrics, Reduce
from tl_looped.patching.sources import Given, Source
from tl_looped.patching.unpatched import Place, Unpatched, advance


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
    positions: Positions = "all",
    batch_size: int | None = None,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> LoopPatchingResult:
    """Patch one site, cell by cell, into the run of the prompts, and measure the output.

    Every cell is what one forward of the prompts (the corrupted ones) with a patching hook would give, up to rounding.
    The unpatched run is made once. Cells run in batches, which each of them joins where its patch can first act, with
    the unpatched run's state there; and where a patch acts at one position and no token sees later ones, what comes
    before it is left out too, if that is estimated to take less time.

    Args:
        model: in evaluation mode, without hooks of its own.
        prompts: what to patch into; all run as one batch.
        n_loops, options: of their run, see `RunOptions`; they must be those of the source.
        source: the cache of the clean run; or `zero()`, `mean_source(...)`, `fixed(...)` for ablation.
        metric: from logits [batch, pos, d_vocab] to a scalar or [batch] (see `reduce`), or a mapping of several. One
            made of tensor operations is called for many cells at once (`torch.vmap`), any other cell by cell.
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
        positions: the positions whose logits the metric is given, in this order: "all"; "last", of every prompt; or
            some, counted over each prompt's real tokens, negative ones from its end. Logits of others are not formed.
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
    sites = [origin.name for group in plan.groups() for _, origin in group.sites]
    check_sites(model, run, sites)
    given.require(sites, run)
    read = positions_read(run, positions)
    room = Room.of(model, run, batch_size, run.tokens.shape[1] if read is None else read.shape[1])
    cuts = given.constant and looks_back(model.cfg, run) and room.keeps_keys
    prompts_at_once, pos = run.tokens.shape
    batches = Batches(plan, max(1, room.rows // prompts_at_once), prompts_at_once, pos, cuts, model.device)
    with torch.no_grad():
        values, baseline = _Sweep(model, run, batches, given, metrics, read, room.states).values(progress)
    values = given.blank(values, plan.axes)
    made: dict[str, object] = {"when": when, "source_loop": source_loop, **model.cfg.made_of(plan.stack)}
    if positions != "all":
        made["positions"] = positions if isinstance(positions, str) else list(positions)
    return LoopPatchingResult.of(metrics, values, baseline, plan.index(), site, (model, run, given), **made)


class _Patch(NamedTuple):
    """What some cells write at one site: from where, which cells, at which place of the source and of what runs."""

    origin: HookSite
    cells: list[int]
    read: tuple[Tensor, ...]
    written: tuple[Tensor, ...]  # the cells first


class _Sweep:
    """The unpatched run, and the batches of patched ends that branch off it.

    Args:
        model, run: what is patched.
        batches: the cells.
        source: what is written.
        metrics: what is measured.
        read: positions that metrics read, [batch, pos]; None for all.
        room: how many states of the unpatched run to keep.
    """

    def __init__(
        self,
        model: LoopedModel,
        run: Run,
        batches: Batches,
        source: Source,
        metrics: Metrics,
        read: Int[Tensor, "batch pos"] | None,
        room: int,
    ):
        self.model, self.run, self.source, self.metrics, self.read = model, run, source, metrics, read
        self.batches, self.plan, self.transformer = batches, batches.plan, model.transformer
        self.prompts, self.pos = run.tokens.shape
        alike = bool((run.position_ids == run.position_ids[:1]).all())
        self.frame = model.frame(replace(run, position_ids=run.position_ids[:1]) if alike else run)
        cut = any(batch.start for batch in batches.all)
        self.unpatched = Unpatched(model, run, self.frame, batches.joins, room, keys=cut)
        self.logits = self._read(self.unpatched.out)

    def values(self, progress: bool) -> tuple[Float[Tensor, "metric *cells"], Float[Tensor, "metric *batch"]]:
        """(every cell's metrics, those of the unpatched run)."""
        baseline, plan = self.metrics(self.logits.clone()), self.plan  # a metric may write to what it is given
        store = baseline.new_zeros(len(baseline), math.prod(plan.sizes), *baseline.shape[1:])
        with tqdm(total=store.shape[1], desc=f"Patching {plan.component}", disable=not progress) as bar:
            for batch in self.batches.all:
                numbers = [plan.number(group, place) for group, places in batch.parts for place in places]
                found = self.metrics.of_cells(self._logits(batch)).to(store.dtype)
                store[:, torch.tensor(numbers, device=store.device)] = found
                bar.update(len(batch))
        self.metrics.check(store, plan.describe)
        return store.unflatten(1, plan.sizes), baseline

    def _logits(self, batch: Batch) -> Float[Tensor, "cell batch pos d_vocab"]:
        """Of a batch's cells, at the positions that metrics read."""
        out, start = self._patched(batch).unflatten(0, (-1, self.prompts)), batch.start
        if not start:
            return self._read(out)
        if self.read is None:
            return torch.cat((self.logits[:, :start].expand(len(out), -1, -1, -1), self._read(out)), dim=2)
        return torch.where((self.read < start)[..., None], self.logits, self._read(out, start))

    def _read(
        self, out: Float[Tensor, "*cell batch pos d_read"], start: int = 0
    ) -> Float[Tensor, "*cell batch read d_vocab"]:
        """The logits at the positions that metrics read, of what begins at `start`."""
        if self.read is not None:
            at = (self.read - start).clamp(min=0)[..., None].expand(*out.shape[:-2], -1, out.shape[-1])
            out = out.gather(-2, at)
        return self.transformer.unembed(out)

    def _patched(self, batch: Batch) -> Float[Tensor, "rows pos d_read"]:
        """What the unembedding would read of all cells, [cell x prompt]: each joins where its patch can first act."""
        cells, start, end = len(batch), batch.start, (self.run.n_loops, 0)
        frame, apart = self._frame(cells, start), self.plan.apart
        with self.model.hooks(fwd_hooks=[] if apart else self._hooks(batch.parts, start)):
            if batch.parts[0][0].first is None:
                state = None if self.run.state is None else _repeat(self.run.state[:, start:], cells)
                x, e = self.transformer.begin(_repeat(self.run.tokens[:, start:], cells), frame, state)
                return self.transformer.finish(advance(self.model, x, e, frame, (0, 0), end), frame)
            e = None if self.unpatched.e is None else _repeat(self.unpatched.e[:, start:], cells)
            x, at = self.transformer.embed.weight.new_zeros(0), (0, 0)
            for place, parts in batch.joins():
                new = _repeat(self.unpatched.state(place)[:, start:], sum(len(places) for _, places in parts))
                if apart:
                    new, place = self._alone(new, e, frame, place, parts, start)
                elif self.plan.component == "hook_state_init":
                    new = cast(LoopedTransformer, self.transformer).hooks.hook_state_init(new)
                rows = len(x)
                if rows:
                    x = advance(self.model, x, None if e is None else e[:rows], frame.part(rows), at, place)
                x, at = torch.cat((x, new)) if rows else new, place
            return self.transformer.finish(advance(self.model, x, e, frame, at, end), frame)

    def _alone(
        self, x: Tensor, e: Tensor | None, frame: Frame, place: Place, parts: Sequence[Part], start: int
    ) -> tuple[Float[Tensor, "rows pos d_model"], Place]:
        """Run the patched layer before the others are joined: what it costs to show its site they need not pay."""
        (t, layer), rows = place, len(x)
        with self.model.hooks(fwd_hooks=self._hooks(parts, start)):
            e = None if e is None else e[:rows]
            return advance(self.model, x, e, frame.part(rows), place, (t, layer + 1)), (t, layer + 1)

    def _frame(self, cells: int, start: int) -> Frame:
        """Of so many cells, from a position on."""
        frame = self.frame
        if start:
            if frame.visible is None:
                sees = torch.ones(self.pos, self.pos, dtype=torch.bool, device=self.run.tokens.device).tril()[None]
                frame = frame._replace(visible=sees)
            frame = frame.part(start=start)._replace(kv=self.unpatched.keys(start))
        return frame.repeat(cells)

    def _hooks(self, parts: Sequence[Part], start: int) -> list[tuple[HookName, HookFn]]:
        """What writes the patches of cells, whose rows come in this order."""
        cells: dict[HookSite, dict[HookSite, list[int]]] = {}
        at = 0
        for group, places in parts:
            for site, origin in group.sites:
                cells.setdefault(site, {}).setdefault(origin, []).extend(range(at, at + len(places)))
            at += len(places)
        where = torch.tensor([place for _, places in parts for place in places], dtype=torch.long)
        before = torch.tensor([start if axis == "pos" else 0 for axis in self.plan.inner], dtype=torch.long)

        def patch(origin: HookSite, rows: list[int]) -> _Patch:
            read, index, device = where[rows], torch.tensor(rows), self.run.tokens.device
            written = torch.cat((index[:, None], read - before), dim=1)
            return _Patch(origin, rows, read.to(device).unbind(1), written.to(device).unbind(1))

        return [
            (site.name, partial(self._write, [patch(origin, rows) for origin, rows in by_origin.items()]))
            for site, by_origin in cells.items()
        ]

    def _write(self, patches: Sequence[_Patch], x: Tensor, hook: LoopHookPoint) -> None:
        """Put what the source gives at every cell's place, into what the hook may write to."""
        rows, give = x.unflatten(0, (-1, self.prompts)), self.source.values
        dims = [self.plan.dim(axis) for axis in self.plan.inner]
        named = zip(hook.site.axes, rows.shape[1:], strict=True)
        shape = [self.pos if name in ("pos", "query") else size for name, size in named]
        target = rows.movedim([dim + 1 for dim in dims], list(range(1, 1 + len(dims))))
        for patch in patches:
            if self.source.constant:
                value = give(patch.origin, x.new_zeros(()).expand(shape)).to(x).expand(shape)
                value = value.movedim(dims, list(range(len(dims))))[patch.read] if dims else value
            else:
                value = torch.stack([give(patch.origin, rows[cell]).to(x).expand(shape) for cell in patch.cells])
                value = value.movedim([dim + 1 for dim in dims], list(range(1, 1 + len(dims))))
                value = value[(torch.arange(len(value), device=x.device), *patch.read)]
            target[patch.written] = value


def _repeat(x: Tensor, cells: int) -> Tensor:
    return x.repeat(cells, *(1 for _ in x.shape[1:]))
