"""The run that nothing is patched into: where patched ones branch off it, and what they read of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.kv import Layer
from tl_looped.engine.network import Frame
from tl_looped.engine.runs import Run
from tl_looped.model import LoopedModel, one_core

Place = tuple[int, int]
"""(loop, layer) that a run has come to: what that layer reads. The number of layers is the end of a loop, before its
norm; the number of loops the end of the run."""
KV = tuple[Float[Tensor, "batch pos kv_head d_head"], Float[Tensor, "batch pos kv_head d_head"]]


def advance(
    model: LoopedModel, x: Float[Tensor, "batch pos d_state"], e: Tensor | None, frame: Frame, at: Place, to: Place
) -> Float[Tensor, "batch pos d_state"]:
    """Go on with a run from one place to another."""
    (t, layer), (last, stop) = at, to
    while t < last:
        x = model.transformer.loop(x, e, frame, t, layer)
        t, layer = t + 1, 0
    if layer < stop:
        core = one_core(model)
        x = core.enter(x, e, t) if layer == 0 else x
        x = core.run_layers(x, frame, t, layer, stop)
    return x


class Unpatched:
    """Runs once, and keeps what patched runs go on from.

    Args:
        model, run, frame: what to run.
        places: where they branch off, in order.
        room: how many of the states there to keep; one that was not kept is made again from the last that was.
        keys: whether to keep all keys and values.

    Attributes:
        e: what the loops read of the tokens; None where they read nothing.
        out: what the unembedding reads in the end.
    """

    def __init__(self, model: LoopedModel, run: Run, frame: Frame, places: Sequence[Place], room: int, keys: bool):
        self._model, self._kept = model, _Kept({})
        self._frame = frame._replace(kv=self._kept) if keys else frame
        x, self.e = model.transformer.begin(run.tokens, self._frame, run.state)
        self._states, at = {(0, 0): x}, (0, 0)
        for place in places:
            x, at = advance(model, x, self.e, self._frame, at, place), place
            if len(self._states) <= room:
                self._states[place] = x
        x = advance(model, x, self.e, self._frame, at, (run.n_loops, 0))
        self.out = model.transformer.finish(x, self._frame)
        self._last = (0, 0), self._states[0, 0]

    def state(self, place: Place) -> Float[Tensor, "batch pos d_state"]:
        """What the layer at a place reads."""
        if place in self._states:
            return self._states[place]
        at = max(known for known in (*self._states, self._last[0]) if known <= place)
        x = self._states[at] if at in self._states else self._last[1]
        self._last = place, advance(self._model, x, self.e, self._frame, at, place)
        return self._last[1]

    def keys(self, before: int) -> _Before:
        """For runs of the positions from one on: the keys and values of those before it."""
        return _Before(self._kept.found, before)


class _Kept:
    """Keeps the keys and values of every attention call."""

    def __init__(self, found: dict[tuple[Layer, int | None], KV]):
        self.found = found

    def extend(self, layer: Layer, loop: int | None, k: Tensor, v: Tensor) -> KV:
        self.found[layer, loop] = k, v
        return k, v


class _Before(_Kept):
    """Puts the first positions' keys and values before those of every row; rows are [any x batch]."""

    def __init__(self, found: dict[tuple[Layer, int | None], KV], before: int):
        super().__init__(found)
        self.before = before

    def extend(self, layer: Layer, loop: int | None, k: Tensor, v: Tensor) -> KV:
        known_k, known_v = self.found[layer, loop]
        return self._put(known_k, k), self._put(known_v, v)

    def _put(self, known: Tensor, new: Tensor) -> Tensor:
        times = len(new) // len(known)
        before = known[:, : self.before].expand(times, -1, -1, -1, -1).flatten(0, 1)
        return torch.cat((before, new), dim=1)
