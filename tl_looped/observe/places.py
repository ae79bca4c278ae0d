"""Where a site fires in a run: at every layer call, in every loop, or once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tl_looped.engine.errors import InputError, nearest
from tl_looped.engine.schedule import BLOCK_AXES, CORE, LOOP_AXES, MODEL_AXES, HookSite, LoopSchedule

_COMPONENTS = (*BLOCK_AXES, *LOOP_AXES, *MODEL_AXES)


def component_of(name: str) -> str:
    """TransformerLens's component of a short name: "z" -> "attn.hook_z", "state_post" -> "hook_state_post"."""
    for candidate in (name, f"hook_{name}", f"attn.hook_{name}", f"mlp.hook_{name}"):
        if candidate in _COMPONENTS:
            return candidate
    short = [one.rpartition("hook_")[2] for one in _COMPONENTS]
    raise InputError(f"there is no site {name!r}.{nearest(name, short)}")


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
        if component in BLOCK_AXES:
            return cls(component, "depth", tuple(HookSite(component, *call) for call in schedule.layer_calls()))
        if component in LOOP_AXES:
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
