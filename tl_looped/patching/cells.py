"""What a sweep patches: its axes, and for every cell the sites, loops and places that it writes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.schedule import HookSite, LoopCount, find_component

Axis = Literal["source_loop", "loop", "layer", "pos", "head", "neuron", "key"]
When = Literal["at", "from", "clamp", "every"]

# Axis of a sweep -> axis of an activation, for those that pick a place inside it.
_INNER = {"pos": ("pos", "query"), "head": ("head", "kv_head"), "neuron": ("d_mlp",), "key": ("key",)}
# Sites whose values the fast path does not form: hooks that may change them cost every row of their batch.
_FORMED = ("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_result")
_SITES = {"state": "hook_state_pre", "initial_state": "hook_state_init"}


@dataclass(frozen=True)
class Group:
    """Cells that write the same sites from the same loops, and differ only in the place inside the activation.

    Attributes:
        sites: pairs of the site written and the site its values come from.
        first: (loop, layer) before which nothing changes, the loop of the run behind the last for what comes after all
            of them; None when the run changes from its beginning.
        outer: the coordinates on the outer axes.
    """

    sites: tuple[tuple[HookSite, HookSite], ...]
    first: tuple[int, int] | None
    outer: tuple[int, ...]


def component(site: str) -> str:
    """TransformerLens's component of a site's short name; "state" is the one entering a loop, before injection."""
    return _SITES[site] if site in _SITES else find_component(site)


class Plan:
    """All cells of one sweep.

    Args:
        cfg: the model's config.
        n_loops: loops of the patched run.
        pos: length of the prompts.
        site: short name of the site.
        axes: what to sweep over, in the order of the result's axes.
        when: "at": at the cell's loop only. "from": at it and every later loop, each from its own loop of the source.
            "clamp": at it and every later loop, all from the cell's loop of the source. "every": at every loop.
        source_loop: the source's loop for all cells; None: the loop that is written.
        stack: whose layers and loops are meant; None for the only one that loops.

    Raises:
        InputError: an axis that the site does not have, or options that contradict each other.
    """

    def __init__(
        self,
        cfg: LoopedConfig,
        n_loops: LoopCount,
        pos: int,
        site: str,
        axes: Sequence[str],
        when: When,
        source_loop: int | None,
        stack: str | None = None,
    ):
        self.cfg, self.when = cfg, when
        self.schedule = cfg.schedule(n_loops)
        self.component = component(site)
        there = HookSite(self.component)
        self.layered, self.looped, self.inner_axes = there.in_layer, there.looped, there.axes
        if stack is not None and not there.looped:
            raise InputError(f"site {site!r} belongs to no stack that loops: leave out stack={stack!r}.")
        self.stack = cfg.looping_stack(stack) if there.looped else cfg.looping[0]
        n_loops, n_layers = self.schedule.n_loops(self.stack), self.schedule.n_layers(self.stack)
        self.n_loops = n_loops
        self.axes = tuple(axes)
        self.source_loop = None if source_loop is None else resolve_index("source_loop", source_loop, n_loops)
        self._check(site)
        sizes = {"loop": n_loops, "source_loop": n_loops, "layer": n_layers, "pos": pos, "key": pos}
        sizes |= {"head": cfg.kv_heads if "kv_head" in self.inner_axes else cfg.n_heads, "neuron": cfg.d_mlp}
        self.sizes = tuple(sizes[axis] for axis in self.axes)
        self.outer = tuple(axis for axis in self.axes if axis not in _INNER)
        self.inner = tuple(axis for axis in self.axes if axis in _INNER)

    def _check(self, site: str) -> None:
        if not self.axes or len(set(self.axes)) != len(self.axes) or not set(self.axes) <= set(get_args(Axis)):
            raise InputError(f"axes must be some of {get_args(Axis)}, each once, got {self.axes}.")
        if self.when not in get_args(When):
            raise InputError(f"when must be one of {get_args(When)}, got {self.when!r}.")
        has = {axis for axis, names in _INNER.items() if set(names) & set(self.inner_axes)}
        has |= {"layer"} if self.layered else set()
        has |= {"loop", "source_loop"} if self.looped else set()
        lacking = [axis for axis in self.axes if axis not in has]
        if lacking:
            raise InputError(f"site {site!r} has no axis {lacking[0]!r}: its axes are {sorted(has)}.")
        if self.looped and ("loop" in self.axes) == (self.when == "every"):
            mend = "leave 'loop' out of axes" if self.when == "every" else "put 'loop' into axes, or pass when='every'"
            raise InputError(f"when={self.when!r} and axes={self.axes} do not go together: {mend}.")
        sourced = "source_loop" in self.axes or self.source_loop is not None
        if sourced and not self.looped:
            raise InputError(f"site {site!r} fires once in a run, so it has no source_loop.")
        if not self.looped and self.when in ("from", "clamp"):
            raise InputError(f"site {site!r} fires once in a run, so it has no when={self.when!r}: leave it out.")
        if sourced and self.when == "clamp":
            raise InputError(
                "when='clamp' takes the source at the cell's own loop: leave source_loop out, or use 'from'."
            )
        if "source_loop" in self.axes and self.source_loop is not None:
            raise InputError("source_loop is an axis of this sweep and given as a value too: leave one out.")

    def index(self) -> pd.DataFrame:
        """One row for each cell, in the order of the result."""
        rows = itertools.product(*map(range, self.sizes))
        return pd.DataFrame(list(rows), columns=list(self.axes))

    def groups(self) -> list[Group]:
        """The groups in the order of the run, so that one unpatched run can pass along them."""
        sizes = [self.sizes[self.axes.index(axis)] for axis in self.outer]
        groups = [
            self._group(dict(zip(self.outer, at, strict=True)), at) for at in itertools.product(*map(range, sizes))
        ]
        return sorted(groups, key=lambda group: group.first or (-1, -1))

    def _group(self, at: dict[str, int], outer: tuple[int, ...]) -> Group:
        if not self.looped:
            site = HookSite(self.component)
            begins = (0, 0) if self.component == "hook_state_init" else None
            after = self.component.startswith(("hook_state_out", "ln_coda", "ln_final", "hook_head_in"))
            return Group(((site, site),), (self.schedule.n_loops(None), 0) if after else begins, outer)
        t = at.get("loop", 0)
        loops = {"at": range(t, t + 1), "every": range(self.n_loops)}.get(self.when, range(t, self.n_loops))
        every = range(self.schedule.n_layers(self.stack)) if self.layered else [None]
        layers = [at["layer"]] if "layer" in at else every
        source = at.get("source_loop", self.source_loop)
        of_loop = not self.layered and len(self.cfg.looping) == 1
        pairs = []
        for loop in loops:
            origin = source if source is not None else t if self.when == "clamp" else loop
            for layer in layers:
                site = HookSite(self.component, None if of_loop else self.stack, layer, loop)
                pairs.append((site, site.at(origin)))
        first = self.schedule.around(self.stack, [loops.start])[0]
        return Group(tuple(pairs), (first, self._first_layer(layers[0])), outer)

    def _first_layer(self, layer: int | None) -> int:
        """The layer from which a run must be repeated for a patch at this layer, or at the loop's own site.

        The number of layers stands for what closes a loop behind the last.
        """
        if not self.cfg.resumes_in_loop:
            return 0
        closes = self.component in ("hook_state_post", "hook_exit_gate") or self.component.startswith("ln_loop")
        return layer if layer is not None else self.cfg.n_core if closes else 0

    @property
    def apart(self) -> bool:
        """Whether the one layer that a cell patches should run before its rows join others'."""
        return self.component in _FORMED and self.when == "at" and "layer" in self.axes and self.cfg.resumes_in_loop

    def places(self) -> list[tuple[int, ...]]:
        """The cells of a group: their coordinates on the inner axes."""
        return list(itertools.product(*(range(self.sizes[self.axes.index(axis)]) for axis in self.inner)))

    def dim(self, axis: str) -> int:
        """The activation's axis that an axis of the sweep picks from."""
        return next(i for i, name in enumerate(self.inner_axes) if name in _INNER[axis])

    def number(self, group: Group, place: tuple[int, ...]) -> int:
        """Which of all cells it is, counted in the order of the result."""
        outer, inner, number = iter(group.outer), iter(place), 0
        for axis, size in zip(self.axes, self.sizes, strict=True):
            number = number * size + next(outer if axis in self.outer else inner)
        return number

    def describe(self, number: int) -> str:
        """A cell in words, such as "loop 1, pos 3"."""
        at = []
        for size in reversed(self.sizes):
            number, index = divmod(number, size)
            at.append(index)
        return ", ".join(f"{axis} {index}" for axis, index in zip(self.axes, reversed(at), strict=True))
