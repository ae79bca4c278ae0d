"""Which position of one prompt stands for which of another, where they differ in length."""

from __future__ import annotations

from copy import copy
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.engine.cache import Keep, run_with_cache
from tl_looped.engine.checks import check_eval
from tl_looped.engine.errors import InputError
from tl_looped.engine.prompts import Rows
from tl_looped.engine.reach import NamesFilter
from tl_looped.engine.runs import Prompts, RunOptions, with_run_options
from tl_looped.engine.schedule import PATTERN, HookSite, LoopCount
from tl_looped.model import LoopedModel, check_looped
from tl_looped.patching.sources import Source

Ties = Literal["before", "after"]


@with_run_options
@torch.no_grad()
def aligned_source(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    to: Prompts,
    ties: Ties | None = None,
    positions: Int[Tensor, "batch pos"] | None = None,
    names_filter: NamesFilter = None,
    **options: Unpack[RunOptions],
) -> Source:
    """The activations of prompts of other lengths than those that are patched, position by position.

    Prompts of one length correspond token by token. Others may differ in one stretch of tokens: what comes before it
    corresponds, and what comes after it. A position without a counterpart keeps its own activation, and a sweep over
    "pos" has NaN for it. Patterns and scores are left out, as their rows would not sum to one.

    Args:
        model: in evaluation mode.
        prompts: where the activations come from.
        n_loops, options: of their run, see `RunOptions`; they must match the patched run's. `prepend_bos` and
            `padding_side` count for `to` as well.
        to: the prompts to patch, as many.
        ties: where the same tokens stand on both sides of the stretch, such as the ";" that a clause is put in with,
            whether those of the shorter prompt go with what is "before" it or "after" it. None: that is refused.
        positions: by hand, for each position of `to` that of `prompts`, or −1.
        names_filter: which activations to keep, as in `run_with_cache`.

    Raises:
        InputError: other numbers of prompts, prompts that differ at both ends, ties without `ties`, positions that
            there are not.

    Example:
        clean = aligned_source(model, "a=4; b=7; c=a; ? c", to="a=9; c=a; ? c", ties="before")
        patch_sweep(model, "a=9; c=a; ? c", source=clean, metric=metric)
    """
    check_eval(check_looped(model, several_stacks=True))
    if ties not in ("before", "after", None):
        raise InputError(f"ties must be 'before', 'after' or None, got {ties!r}.")
    runs = model.prepare(prompts, n_loops, **options)
    if not runs.whole:
        raise InputError(f"patching runs all loops: prepare the prompts without {runs.parted_by}.")
    ours = model.prepare(
        to,
        prepend_bos=options.get("prepend_bos"),
        padding_side=options.get("padding_side"),
    ).rows
    if len(ours) != len(runs.rows):
        raise InputError(f"{len(ours)} prompts to patch and {len(runs.rows)} to take from do not pair: pass as many.")
    at = align_positions(ours, runs.rows, ties) if positions is None else positions
    _check_positions(at, ours, runs.rows)
    _, cache = run_with_cache(model, model.batch_of(runs), Keep(names_filter), None)
    lacks, moved, rows = at < 0, copy(cache), torch.arange(len(at))[:, None]
    moved.cache_dict = {
        name: x[rows, at.clamp(min=0)] for name, x in cache.cache_dict.items() if HookSite.parse(name).axes != PATTERN
    }

    def give(site: HookSite, x: Tensor) -> Tensor:
        none = lacks.to(x.device).view(*lacks.shape, *(1 for _ in x.shape[2:]))
        return torch.where(none, x, moved.cache_dict[site.name].to(x))

    return Source("aligned", give, cache.run, moved, lacks=lacks)


def align_positions(ours: Rows, theirs: Rows, ties: Ties | None = None) -> Int[Tensor, "batch pos"]:
    """For each position of some prompts that of others; −1 where there is none. See `aligned_source`."""
    found = torch.full((len(ours), ours.longest), -1)
    for row in range(len(ours)):
        pairs = torch.tensor(_pairs(row, ours.unpadded(row).tolist(), theirs.unpadded(row).tolist(), ties))
        found[row, ours.places(row)] = torch.where(pairs < 0, -1, theirs.places(row)[pairs])
    return found


def _pairs(row: int, mine: list[int], other: list[int], ties: str | None) -> list[int]:
    """Of each token of one prompt the place in the other, or −1."""
    shorter, shift = min(len(mine), len(other)), len(other) - len(mine)
    if not shift:
        return list(range(len(mine)))
    before = next((i for i in range(shorter) if mine[i] != other[i]), shorter)
    after = next((i for i in range(shorter) if mine[-1 - i] != other[-1 - i]), shorter)
    if not before and not after:
        raise InputError(
            f"prompt {row} and its source begin and end with other tokens: say which correspond, with positions=."
        )
    tied = before + after - shorter
    if tied > 0 and ties is None:
        raise InputError(
            f"{tied} tokens of prompt {row} (from position {shorter - after}) may stand for those before the stretch "
            "in which it differs from its source or for those after it: pass ties='before' or 'after'."
        )
    if tied > 0:
        before, after = (before, after - tied) if ties == "before" else (before - tied, after)
    return [i if i < before else i + shift if i >= len(mine) - after else -1 for i in range(len(mine))]


def _check_positions(at: object, ours: Rows, theirs: Rows) -> None:
    shape = (len(ours), ours.longest)
    if not isinstance(at, Tensor) or at.is_floating_point() or tuple(at.shape) != shape:
        raise InputError(f"positions must be integers of shape {shape} = [batch, pos] of `to`, −1 where there is none.")
    wrong = [int(end) for end in at.aminmax() if not -1 <= int(end) < theirs.longest]
    if wrong:
        raise InputError(f"there is no position {wrong[0]} in prompts of {theirs.longest}: −1 says that there is none.")
