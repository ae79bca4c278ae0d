"""Activations that a generation computes itself, put together over its steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_looped.engine.cache import LoopedCache
from tl_looped.engine.engine import Engine
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.reach import NamesFilter
from tl_looped.engine.runs import Run
from tl_looped.engine.schedule import PATTERN, HookSite
from tl_looped.observe.watching import SCORES


class GeneratedCache(LoopedCache):
    """A cache of generated text. NaN where a token did not run a loop, or had ended.

    `made_by` says how the text was made.
    """

    @property
    def loops_run(self) -> Int[Tensor, "batch pos"]:
        """How many loops each position ran."""
        return torch.tensor(self.notes["loops_run"])


class Kept:
    """What the steps of one generation compute at some sites.

    Args:
        model: the model.
        run: the prompt.
        names_filter: as in `run_with_cache`.
        device: where to keep activations; None for where they are.

    Raises:
        HookNameError: a name that the run does not reach.
    """

    def __init__(self, model: Engine, run: Run, names_filter: NamesFilter, device: torch.device | str | None):
        self.model, self.device = model, device
        self.chosen = model.reach(run).select(names_filter, None)
        self.pieces: dict[HookSite, dict[int, Tensor]] = {}  # by the position at which each begins

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep what runs in this `with` block; of what runs again at a position, the latest."""
        with self.model.hooks():
            for point, where in self.chosen:
                point.add_hook(self._save, level=self.model.context_level, where=where, reads_only=True)
            yield

    def _save(self, x: Tensor, hook: LoopHookPoint) -> None:
        self.pieces.setdefault(hook.site, {})[hook.first_position] = x.detach().to(self.device, copy=True)

    def cache(self, run: Run, loops_run: Sequence[Int[Tensor, " batch"]], generated: dict[str, Any]) -> GeneratedCache:
        """The pieces as one cache.

        Args:
            run: prompt and new tokens.
            loops_run: of the last positions, how many loops each ran; those before ran all.
            generated: how the text was made.
        """
        ran = torch.full_like(run.tokens, run.n_loops)
        ran[:, -len(loops_run) :] = torch.stack(list(loops_run), dim=1)
        schedule, on = self.model.cfg.schedule(run.counts), ran.to(self.device)
        tensors = {
            site.name: _whole(site, pieces, on, max(1, schedule.per_loop(site.stack)))
            for site, pieces in self.pieces.items()
        }
        cache = GeneratedCache(tensors, self.model, run)
        cache.notes = {**generated, "loops_run": ran.tolist()}
        return cache


def _whole(site: HookSite, pieces: dict[int, Tensor], ran: Int[Tensor, "batch pos"], per_loop: int) -> Tensor:
    """The pieces of one site along its positions; `per_loop` of its loops lie in one of the run."""
    some, at, n = next(iter(pieces.values())), site.pos_axis, ran.shape[1]
    keys = PATTERN.index("key") if site.axes == PATTERN else None
    shape = [n if axis in (at, keys) else size for axis, size in enumerate(some.shape)]
    whole = some.new_full(shape, math.nan)
    if keys is not None:  # later positions are seen by none
        whole.fill_(-math.inf if site.component == SCORES else 0)
    for start, piece in sorted(pieces.items()):
        stop = start + piece.shape[at]
        here = whole.narrow(at, start, stop - start)
        (here if keys is None else here.narrow(keys, 0, piece.shape[keys])).copy_(piece)
    if site.loop is None:
        return whole
    by_place = [size if axis in (0, at) else 1 for axis, size in enumerate(shape)]
    lacking = (ran <= site.loop // per_loop).view(by_place)
    return whole.masked_fill(lacking, math.nan)
