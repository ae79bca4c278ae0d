"""Which hook points a run reaches: a hook or a filter that would do nothing is an error before the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from tl_looped.engine.errors import HookNameError, InputError, resolve_index
from tl_looped.engine.hooks import HookDict, SharedHookPoint
from tl_looped.engine.runs import Run
from tl_looped.engine.schedule import DEAD_ENDS, PRELUDE, READS_TOKENS, HookSite
from tl_looped.engine.span import Span

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
Chosen = list[tuple[SharedHookPoint, frozenset[int] | None]]

HEAVY = "attn.hook_result"  # [batch, pos, head, d_model]: cached only where it is named


class Reach:
    """The sites that one run calls.

    Args:
        hook_dict: the model's hook points.
        run: the run.
        span: from where to where it goes.
        reads_tokens: whether it runs the embedding, and the prelude as far as it goes.
    """

    def __init__(self, hook_dict: HookDict, run: Run, span: Span, reads_tokens: bool):
        self.hook_dict = hook_dict
        self.run = run
        self.span, self.schedule = span, span.schedule
        self.loops = range(run.start, run.stop)
        self.reads_tokens = reads_tokens

    def __contains__(self, point: SharedHookPoint) -> bool:
        if point.looped:
            return len(self.loops_of(point) if self.span.within else self.loops) > 0
        begins, found = self.span.begins, self.span.reaches(point.site)
        if point.site.stack == PRELUDE or point.name in READS_TOKENS:
            return self.reads_tokens if begins.number else found and (self.reads_tokens or begins.layer >= 0)
        return found

    def sites(self, point: SharedHookPoint) -> list[HookSite]:
        """The point's sites in this run: one for each loop, or one."""
        if point not in self:
            return []
        return [point.site.at(t) for t in self.loops_of(point)] if point.looped else [point.site]

    def loops_of(self, point: SharedHookPoint, loops: Iterable[int] | None = None) -> list[int]:
        """The loops of the point's stack that lie in some loops of the run; None for all that run."""
        found = self.schedule.loops_in(point.site.stack, self.loops if loops is None else sorted(loops))
        return [t for t in found if self.span.reaches(point.site.at(t))] if self.span.within else found

    def _ran(self) -> str:
        if self.span.within:
            start, stop = self.run.start_at or f"loop {self.run.start}", self.run.stop_at or f"loop {self.run.stop}"
            return f"it goes from {start} to {'the logits' if self.run.reads_out else stop}"
        return f"loops {self.loops.start} to {self.loops.stop - 1} run" if self.loops else "no loop runs"

    def check_hooks(self) -> None:
        """Raise for a hook of this thread that acts nowhere in this run, or that no gradient can reach."""
        points = [point for point in self.hook_dict.points() if point.fwd_hooks or point.bwd_hooks]
        if not torch.is_grad_enabled() and any(point.handles("bwd") for point in points):
            raise InputError("a backward hook is registered, but gradients are off: run outside torch.no_grad().")
        matched: dict[Callable[[str], bool], bool] = {}
        for point in points:
            for handle in point.handles():
                where, dead = handle.where, point.site.component in DEAD_ENDS and handle in point.handles("bwd")
                name = point.site.at(where if isinstance(where, int) else None).name
                if callable(where):
                    reached = not dead and any(map(handle.acts_at, self.sites(point)))
                    matched[where] = matched.get(where, False) or reached
                elif dead:
                    raise HookNameError(
                        f"a backward hook is on {name!r}, which no output of the model reads, so no gradient comes "
                        "there: take a forward hook, or hook what it is computed from."
                    )
                elif point not in self or (isinstance(where, int) and where not in self.loops_of(point)):
                    raise HookNameError(f"a hook is on {name!r}, which this run does not reach: {self._ran()}.")
        for function, found in matched.items():
            if not found:
                raise HookNameError(f"the function {function!r} accepts no hook name that this run reaches.")

    def select(self, names_filter: NamesFilter, loops: Iterable[int] | None) -> Chosen:
        """The points to cache, each with its loops (None for one that fires once).

        Raises:
            HookNameError: a name, or the whole filter, to which nothing in this run answers.
            InputError: a loop that does not run.
        """
        total = self.run.n_loops
        kept = set(self.loops) if loops is None else {resolve_index("loop", t, total) for t in loops}
        if not kept <= set(self.loops):
            raise InputError(f"loops {sorted(kept - set(self.loops))} can't be kept: {self._ran()}.")
        if names_filter is not None and not callable(names_filter):
            names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            return self._named(names, frozenset(kept))
        chosen: Chosen = []
        for point in self.hook_dict.points():
            if point not in self or (names_filter is None and point.site.component == HEAVY):
                continue
            at: Iterable[int | None] = self.loops_of(point, kept) if point.looped else (None,)
            found = [t for t in at if names_filter is None or names_filter(point.at(t).name)]
            if found:
                chosen.append((point, frozenset(t for t in found if t is not None) or None))
        if not chosen:
            raise HookNameError(
                f"names_filter={names_filter!r} accepts no hook name that this run reaches: {self._ran()}."
            )
        return chosen

    def _named(self, names: Sequence[str], kept: frozenset[int]) -> Chosen:
        """What the names mean; not a look at all that there is, as a model may have thousands of points."""
        points = {name: self.hook_dict.shared(name) for name in names}  # raises for a name that the model does not have
        if not points:
            raise HookNameError(
                f"names_filter={list(names)} accepts no hook name that this run reaches: {self._ran()}."
            )
        chosen: dict[SharedHookPoint, frozenset[int] | None] = {}
        for name, point in points.items():
            loop = HookSite.parse(name).loop
            loops = frozenset(self.loops_of(point, kept)) if point.looped else kept
            loops = loops if loop is None else loops & {loop}
            if point not in self or (point.looped and not loops):
                raise HookNameError(f"nothing to cache at {name!r}: {self._ran()}, and {sorted(kept)} are kept.")
            chosen[point] = (chosen.get(point) or frozenset()) | loops if point.looped else None
        return list(chosen.items())
