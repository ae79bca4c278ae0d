"""Names of the looped model and of its realised-depth view, each from the other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from tl_looped.engine.errors import HookNameError, nearest
from tl_looped.engine.hooks import HookDict
from tl_looped.engine.schedule import CORE, HookSite
from tl_looped.unrolled.architecture import Architecture

_FINAL = "ln_final."


class DepthNames:
    """`blocks.{l}.loop.{t}.X` of the looped model is `blocks.{d}.X` of the view.

    Of two stacks, `L_blocks.loop.{t}.X` is `L.loop.{t}.X`. The norm that closes the last loop is the view's `ln_final`
    where nothing but the head comes after it (Ouro); the head's norm is its `ln_head` where another comes before it.
    Other sites of loops and of the model keep their names.

    Args:
        arch: the model.
        looped: its hook points.
        view: those of the view, by every name they have.
    """

    def __init__(self, arch: Architecture, looped: HookDict, view: Mapping[str, Any]):
        self.schedule = arch.schedule
        self._arch, self._looped, self._view = arch, looped, view

    def to_depth(self, name: str) -> str:
        """The view's name of a looped model's site; a gradient's name works alike.

        Raises:
            HookNameError: it is no name of a site, or means every loop.
        """
        site, norm = HookSite.parse(name), self._arch.closing
        if site.stack is not None and site.layer is not None:
            if site.looped and site.loop is None:
                raise HookNameError(f"{name!r} means every loop: the realised-depth view needs one.")
            return HookSite(site.component, CORE, self.schedule.realised_depth(site.stack, site.layer, site.loop)).name
        at = (site.stack, site.loop)
        if norm is not None and at == (norm.stack, norm.loop) and site.component.startswith(norm.component):
            return site.component.replace(norm.component, _FINAL)
        if site.stack is not None:
            return name.replace(site.stack, self._arch.short(site.stack), 1)
        return name.replace(_FINAL, f"{self._arch.head_norm}.") if site.component.startswith(_FINAL) else name

    def to_looped(self, name: str) -> str:
        """The looped model's name of a site of the view, by any name that TransformerLens gives it.

        Raises:
            HookNameError: the view has no such hook point, or the looped model has no site there.
        """
        if name not in self._names:
            if name in self._view:
                raise HookNameError(f"{name!r} is TransformerLens's own: the looped model has no site there.")
            raise HookNameError(f"this view has no hook point {name!r}.{nearest(name, self._names)}")
        return self._names[name]

    def loop(self, name: str) -> int | None:
        """The loop that a hook point of the view is in: `view.names.loop(hook.name)`; None outside of loops."""
        return HookSite.parse(self.to_looped(name)).loop

    @cached_property
    def pairs(self) -> dict[str, str]:
        """Every site of the looped model in such a run -> its name in the view."""
        points = self._looped.points()
        loops = {None: self._arch.n_loops, **{one: self.schedule.n_loops(one) for one in self.schedule.stacks()}}
        sites = (p.site.at(t).name for p in points for t in (range(loops[p.site.stack]) if p.looped else [None]))
        return {name: self.to_depth(name) for name in sites}

    @cached_property
    def _names(self) -> dict[str, str]:
        points = {ours: self._view[theirs].name for ours, theirs in self.pairs.items()}
        return {name: ours for names in (points, self.pairs) for ours, name in names.items()}
