"""Keys and values of positions that have run, so that a later position need not run them again."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.engine.schedule import LoopSchedule

Layer = tuple[str | None, int | None]  # stack, index in it


class Keys(Protocol):
    """What takes the keys and values of a run's positions, and gives those to attend to."""

    def extend(
        self,
        layer: Layer,
        loop: int | None,
        k: Float[Tensor, "batch pos kv_head d_head"],
        v: Float[Tensor, "batch pos kv_head d_head"],
    ) -> tuple[Float[Tensor, "batch key kv_head d_head"], Float[Tensor, "batch key kv_head d_head"]]:
        """The keys and values that a layer attends to in a loop, from those of the positions that run."""
        ...


class KVCache:
    """Keys and values with one slot for every attention call of a run: for each (stack, layer, loop).

    A forward over the next positions, with this cache in its `Frame`, adds theirs to every slot it passes, and attends
    to all there are. `commit` then counts these positions as done. Until then they may be run again, as the coda is at
    several loop ends: what runs last stays. For runs without gradients.

    Args:
        schedule: which stack runs in which loops.
        slots: how many a layer that loops has: loop t uses slot t mod slots, and writes over what an earlier loop wrote
            there, so that later positions find keys and values of later loops. None: a slot for every loop.
        limit: the most positions that it will hold. Memory grows up to that, by doubling.

    Attributes:
        length: how many positions are done.
    """

    def __init__(self, schedule: LoopSchedule, limit: int, slots: int | None = None):
        self.schedule = schedule
        self.limit = limit
        self.slots = slots
        self.length = 0
        self._stores: dict[Layer, Float[Tensor, "kv loop batch kv_head room d_head"]] = {}

    def extend(
        self,
        layer: Layer,
        loop: int | None,
        k: Float[Tensor, "batch pos kv_head d_head"],
        v: Float[Tensor, "batch pos kv_head d_head"],
    ) -> tuple[Float[Tensor, "batch key kv_head d_head"], Float[Tensor, "batch key kv_head d_head"]]:
        """Keep the keys and values of the next positions; returns those of all positions so far."""
        end = self.length + k.shape[1]
        keys, values = self._store(layer, loop, k, end)[:, self._slot(loop), :, :, :end]
        keys[:, :, self.length :] = k.transpose(1, 2)
        values[:, :, self.length :] = v.transpose(1, 2)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def commit(self, n_positions: int) -> None:
        """Count the positions that ran last as done."""
        self.length += n_positions

    def share(self, last_loop: Int[Tensor, " batch"]) -> None:
        """Give every later loop, at the newest position, the keys and values of each row's last loop.

        A stack that runs several times in a loop of the run gives each pass those of the same pass of that loop.
        """
        rows = torch.arange(len(last_loop), device=last_loop.device)
        for (stack, _), store in self._stores.items():
            each = self.schedule.per_loop(stack)
            if each:
                passes = torch.arange(self.schedule.n_loops(stack), device=last_loop.device)[:, None]
                last = (passes // each).minimum(last_loop) * each + passes % each
                newest = store[..., self.length, :]
                newest.copy_(newest[:, last, rows])

    def _slot(self, loop: int | None) -> int:
        return (loop or 0) if self.slots is None else (loop or 0) % self.slots

    def _store(
        self, layer: Layer, loop: int | None, k: Float[Tensor, "batch pos kv_head d_head"], end: int
    ) -> Float[Tensor, "kv loop batch kv_head room d_head"]:
        """The slots of a layer, with room for `end` positions."""
        store = self._stores.get(layer)
        room = 0 if store is None else store.shape[-2]
        if store is None or room < end:
            batch, _, heads, size = k.shape
            loops = 1 if loop is None else self.schedule.n_loops(layer[0])
            loops = loops if self.slots is None else min(loops, self.slots)
            larger = k.new_empty(2, loops, batch, heads, min(self.limit, max(end, 2 * room)), size)
            if store is not None:
                larger[..., :room, :] = store
            store = self._stores[layer] = larger
        return store
