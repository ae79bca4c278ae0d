"""Where a site fires in a run: at every layer call, in every loop, or once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tl_looped.engine.schedule import HookSite, LoopSchedule

PlaceKind = Literal["depth", "loop", "once"]


def key_of(site: HookSite) -> str:
    """The component; with the stack, of what every loop of one of two stacks has."""
    return site.component if site.stack is None or site.layer is not None else f"{site.stack}.{site.component}"


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
    stack: str | None = None  # of a site of loops, whose they are, where two stacks loop

    @property
    def key(self) -> str:
        """What tells it from the places of other sites: `key_of` each of its own."""
        return key_of(self.sites[0])

    @classmethod
    def of_key(cls, key: str, schedule: LoopSchedule) -> Places:
        """The places that have a key."""
        site = HookSite.parse(key)
        return cls.of(site.component, schedule, site.stack)

    @classmethod
    def of(cls, component: str, schedule: LoopSchedule, stack: str | None = None) -> Places:
        """The places of a component in a schedule; with a stack, of what every loop of it has."""
        if HookSite(component).in_layer:
            return cls(component, "depth", tuple(HookSite(component, *call) for call in schedule.layer_calls()))
        if HookSite(component).looped:
            return cls.of_loops(component, schedule, stack)
        return cls(component, "once", (HookSite(component),))

    @classmethod
    def of_loops(cls, component: str, schedule: LoopSchedule, stack: str | None = None) -> Places:
        """One place for every loop, of the run or of a stack."""
        sites = tuple(HookSite(component, stack, loop=t) for t in range(schedule.n_loops(stack)))
        return cls(component, "loop", sites, stack)

    @property
    def names(self) -> tuple[str, ...]:
        """The physical hook names, without loops."""
        return tuple(dict.fromkeys(site.at(None).name for site in self.sites))
