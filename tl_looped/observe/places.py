"""Where a site fires in a run: at every layer call, in every loop, or once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tl_looped.engine.schedule import CORE, HookSite, LoopSchedule

PlaceKind = Literal["depth", "loop", "once"]


@dataclass(frozen=True)
class Places:
    """The places of one site, numbered in the order in which they come.

    Attributes:
        component: of the site.
        kind: "depth", a place for every layer call; "loop", one for every loop; "once".
        sites: of every place.
    """

    component: str
    kind: PlaceKind
    sites: tuple[HookSite, ...]

    @classmethod
    def of(cls, component: str, schedule: LoopSchedule) -> Places:
        """The places of a component in a schedule."""
        if HookSite(component).in_layer:
            return cls(component, "depth", tuple(HookSite(component, *call) for call in schedule.layer_calls()))
        if HookSite(component).looped:
            return cls.of_loops(component, schedule)
        return cls(component, "once", (HookSite(component),))

    @classmethod
    def of_loops(cls, component: str, schedule: LoopSchedule) -> Places:
        """One place for every loop."""
        return cls(component, "loop", tuple(HookSite(component, loop=t) for t in range(schedule.n_loops(CORE))))

    @property
    def names(self) -> tuple[str, ...]:
        """The physical hook names, without loops."""
        return tuple(dict.fromkeys(site.at(None).name for site in self.sites))
