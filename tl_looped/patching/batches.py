"""Which cells of a sweep run together, and from which position on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tl_looped.engine.config import LoopedConfig
from tl_looped.patching.cells import Group, Plan
from tl_looped.patching.unpatched import Place

Part = tuple[Group, tuple[tuple[int, ...], ...]]
"""Cells of one group: it, and their places."""

# What starting a layer costs, in multiplications and additions of it: some 300 µs of one core, or of a GPU.
_START = {"cpu": 2e7, "cuda": 1e10}
# A CPU computes positions fastest while what a layer makes of a batch stays in its cache.
_AT_ONCE = {"cpu": 1024}
# And what handing a layer the keys and values of a position costs, in those of each of their numbers.
_HAND_ON = 160.0


@dataclass(frozen=True)
class Batch:
    """Cells that run together: each joins the batch when its patch can first act.

    Attributes:
        parts: groups in the order in which they join, each with places of its own.
        start: the position from which they run; what comes before is that of the unpatched run.
    """

    parts: tuple[Part, ...]
    start: int = 0

    def __len__(self) -> int:
        return sum(len(places) for _, places in self.parts)

    def joins(self) -> Iterator[tuple[Place, list[Part]]]:
        """Who joins where, in the order of the run; of cells that do not run from its beginning."""
        for first, parts in itertools.groupby(self.parts, lambda part: part[0].first):
            if first is not None:
                yield first, list(parts)


class Batches:
    """The batches of a sweep.

    Cells that write at a position may leave out what comes before it. Then the positions are cut into blocks, each with
    batches of its own that begin with the block: more blocks have fewer positions to run, and more layers to start.

    Args:
        plan: the cells.
        at_once: most cells of a batch.
        prompts, pos: rows of a cell, and their length.
        cuts: whether positions before a cell's may be left out.
        device: where it runs.
    """

    def __init__(self, plan: Plan, at_once: int, prompts: int, pos: int, cuts: bool, device: torch.device):
        self.plan, self.at_once, self.prompts, self.pos = plan, at_once, prompts, pos
        self.positions = _AT_ONCE.get(device.type, at_once * prompts * pos)
        self.groups = plan.groups()
        self.starts, self.hands_on = _costs(plan.cfg, device)
        counts = [2**i for i in range(pos.bit_length())] + [pos] if cuts and "pos" in plan.inner else [1]
        self.all = min((self._cut(count) for count in counts if count <= pos), key=self.cost)

    @property
    def joins(self) -> list[Place]:
        """Where cells join, in the order of the run."""
        return sorted({group.first for group in self.groups if group.first is not None})

    def _cut(self, blocks: int) -> list[Batch]:
        places = self.plan.places()
        if blocks == 1:
            return self._fill(places, 0)
        column, found = self.plan.inner.index("pos"), []
        for i in range(blocks):
            start, stop = i * self.pos // blocks, (i + 1) * self.pos // blocks
            found += self._fill([place for place in places if start <= place[column] < stop], start)
        return found

    def _fill(self, places: Sequence[tuple[int, ...]], start: int) -> list[Batch]:
        """Batches of all groups at these places."""
        batches: list[Batch] = []
        parts: list[Part] = []
        most = min(self.at_once, max(1, self.positions // (self.prompts * (self.pos - start))))
        room = most
        for group in self.groups:
            rest = tuple(places)
            while rest:
                parts.append((group, rest[:room]))
                rest, room = rest[room:], room - len(rest[:room])
                if not room:
                    batches.append(Batch(tuple(parts), start))
                    parts, room = [], most
        return [*batches, Batch(tuple(parts), start)] if parts else batches

    def layers_from(self, join: Place | None) -> int:
        """How many layers run from there to the end."""
        cfg, schedule = self.plan.cfg, self.plan.schedule
        if join is None:
            return schedule.depth
        each = (schedule.depth - cfg.n_prelude - cfg.n_coda) // schedule.n_loops(None)
        return (schedule.n_loops(None) - join[0]) * each - join[1] + cfg.n_coda

    def cost(self, batches: Sequence[Batch]) -> float:
        """About what they take, in positions of a layer."""
        total = 0.0
        for batch in batches:
            rows = self.prompts * sum(len(places) * self.layers_from(group.first) for group, places in batch.parts)
            total += self.starts * self.layers_from(batch.parts[0][0].first)
            total += rows * (self.pos - batch.start + (self.hands_on * self.pos if batch.start else 0))
        return total


def _costs(cfg: LoopedConfig, device: torch.device) -> tuple[float, float]:
    """(what starting a layer costs, what handing it a position's keys and values does), in positions of a layer."""
    heads = 2 * cfg.n_heads + 2 * cfg.kv_heads
    each = 2 * cfg.d_model * (heads * cfg.d_head + (3 if cfg.gated_mlp else 2) * cfg.d_mlp)
    return _START.get(device.type, _START["cuda"]) / each, _HAND_ON * 2 * cfg.kv_heads * cfg.d_head / each
