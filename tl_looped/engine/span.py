"""From where to where a run goes: a loop's beginning, or a layer of a loop, prelude or coda, and back in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.schedule import CODA, FAST, LEAD_IN, PRELUDE, READS_TOKENS, SLOW, HookSite, LoopSchedule, Pass

At = tuple[Any, ...]
"""A layer of a run: (loop, layer) of the core; (stack, loop, layer) where several stacks loop; ("prelude", layer) or
("coda", layer) of what runs once. Negative numbers count from the end."""


class Place(NamedTuple):
    """Where a run is, in the order of the run: what layer `layer` of a pass reads.

    A layer of -1 is before what leads into the pass (an injection, the embedding), one more than the last before what
    closes it (a norm, the head's norm).
    """

    number: int
    layer: int


def resolve_at(name: str, at: object, schedule: LoopSchedule) -> str | None:
    """The name of the residual stream that enters a layer; None for None.

    Args:
        name: of the argument, for the error.
        at: see `At`.
        schedule: of the run.

    Raises:
        InputError: no such layer or loop, or it is left open of which stack.
    """
    if at is None:
        return None
    forms = [f"({one!r}, loop, layer)" for one in schedule.looping()] if len(schedule.looping()) > 1 else []
    forms = forms or ["(loop, layer)"]
    forms += [f"({one!r}, layer)" for one in (PRELUDE, CODA) if schedule.n_layers(one)]
    parts = list(at) if isinstance(at, (tuple, list)) else []
    if len(schedule.looping()) == 1 and len(parts) == 2 and not isinstance(parts[0], str):
        parts = [*schedule.looping(), *parts]
    if len(parts) == 2:
        parts.insert(1, None)
    stack = parts[0] if len(parts) == 3 and isinstance(parts[0], str) else None
    if stack not in schedule.stacks() or (parts[1] is None) != (stack in (PRELUDE, CODA)):
        raise InputError(f"{name} must be {' or '.join(forms)}, got {at!r}: the model runs {schedule.describe()}.")
    loop = None if parts[1] is None else resolve_index(f"the loop of {name}", parts[1], schedule.n_loops(stack))
    layer = resolve_index(f"the layer of {name}", parts[2], schedule.n_layers(stack))
    return HookSite("hook_resid_pre", stack, layer, loop).name


@dataclass(frozen=True)
class Span:
    """What runs of a schedule: everything from one place on, and before another.

    Attributes:
        schedule: of the whole run.
        start, stop: the names of streams (see `resolve_at`), or loops of the run at whose beginning it starts or stops;
            a stop of None is the end, with the head.
    """

    schedule: LoopSchedule
    start: str | int
    stop: str | int | None

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """All passes of the run, with prelude and coda as the first and the last, also where they have no layers."""
        loops = (one for one in self.schedule.passes if one.loop is not None)
        first, last = (Pass(one, self.schedule.n_layers(one), None) for one in (PRELUDE, CODA))
        return (first, *loops, last)

    @cached_property
    def _index(self) -> dict[tuple[str, int | None], int]:
        return {(one.stack, one.loop): i for i, one in enumerate(self.passes)}

    def _place(self, end: str | int) -> Place:
        if isinstance(end, str):
            return self.place_of(HookSite.parse(end))
        first = self.schedule.looping()[0]
        return Place(self._index.get((first, end * self.schedule.per_loop(first)), len(self.passes) - 1), -1)

    @cached_property
    def begins(self) -> Place:
        """Where it starts."""
        return Place(0, -1) if self.start == 0 else self._place(self.start)

    @cached_property
    def ends(self) -> Place:
        """Where it stops."""
        return Place(len(self.passes), -1) if self.stop is None else self._place(self.stop)

    def has(self, place: Place) -> bool:
        """Whether it runs what comes at a place."""
        return self.begins <= place < self.ends

    def layers(self, index: int) -> range:
        """The layers of a pass that it runs."""
        first = self.begins.layer if index == self.begins.number else 0
        last = self.ends.layer if index == self.ends.number else self.passes[index].n_layers
        return range(max(0, first), max(0, last)) if self.begins.number <= index <= self.ends.number else range(0)

    def touched(self) -> Iterator[tuple[int, Pass]]:
        """The passes that it runs something of."""
        last = min(self.ends.number, len(self.passes) - 1)
        return ((i, self.passes[i]) for i in range(self.begins.number, last + 1))

    def place_of(self, site: HookSite) -> Place:
        """Where a site fires; for one that loops, `site` says in which loop."""
        part, stack, end = site.component, site.stack, len(self.passes) - 1
        if not site.looped and not site.in_layer:
            index = 0 if part in READS_TOKENS or part == "hook_state_init" else end
            return Place(index, -1 if part.startswith(LEAD_IN) else self.passes[index].n_layers)
        if stack == SLOW and part == "hook_state_pre":  # shown when the loop of the run begins
            stack, site = FAST, site.at((site.loop or 0) * self.schedule.per_loop(FAST))
        index = self._index[stack or self.schedule.looping()[0], site.loop]
        leads = -1 if part.startswith(LEAD_IN) else self.passes[index].n_layers
        return Place(index, leads if site.layer is None else site.layer)

    def reaches(self, site: HookSite) -> bool:
        """Whether a site fires in it. What tells the layers their time is made anew for any of them."""
        place = self.place_of(site)
        return len(self.layers(place.number)) > 0 if site.component == "hook_condition" else self.has(place)

    @property
    def enters_loop(self) -> bool:
        """Whether a pass that loops begins in it, so that it mixes in what was read of the tokens."""
        return any(self.has(Place(i, -1)) for i, one in self.touched() if one.loop is not None)

    @property
    def within(self) -> bool:
        """Whether it starts or stops at a layer."""
        return isinstance(self.start, str) or isinstance(self.stop, str)


class Parted:
    """The arguments by which a run is of a part, for messages."""

    start_at: str | None
    stop_at: str | None

    @property
    def stops_by(self) -> str:
        """Where it stops early."""
        return "stop_at_loop" if self.stop_at is None else "stop_at"

    @property
    def parted_by(self) -> str:
        """Where it starts, and where it stops."""
        return f"{'start_at_loop' if self.start_at is None else 'start_at'} and {self.stops_by}"
