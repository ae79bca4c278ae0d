"""What is patched in: the activation of another run, a mean over a reference set, zero, or a given tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.engine.cache import Keep, LoopedCache, run_with_cache
from tl_looped.engine.checks import check_eval
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import wide
from tl_looped.engine.reach import NamesFilter
from tl_looped.engine.runs import Prompts, Run, RunOptions, with_run_options
from tl_looped.engine.schedule import HookSite, LoopCount
from tl_looped.model import LoopedModel, check_looped

Values = Callable[[HookSite, Tensor], Tensor]
"""From a site (with its loop) and the activation there to what takes its place; broadcasts against the activation."""


@dataclass(frozen=True, eq=False)
class Source:
    """What a patch writes. Make one with `zero`, `fixed` or `mean_source`; a LoopedCache serves as one directly.

    Attributes:
        name: for results.
        values: the function that gives the values.
        run: the run they come from, where they come from one; it must match the patched run.
        cache: the cache they come from, where they come from one.
        spreads: whether one row or one position stands for all.
        constant: whether the values do not depend on the activation, but for its shape; then they are asked for once
            for all cells of a batch.
        lacks: the positions, [batch, pos], of which it has no values and leaves what is there; None for none.
    """

    name: str
    values: Values
    run: Run | None = None
    cache: LoopedCache | None = None
    spreads: bool = False
    constant: bool = False
    lacks: Tensor | None = None

    def blank(self, values: Tensor, axes: Sequence[str]) -> Tensor:
        """Values of cells, [metric, *axes] or [metric, *axes, batch], NaN at positions that it lacks."""
        if self.lacks is None or "pos" not in axes:
            return values
        shape, by_prompt = [1] * values.ndim, values.ndim > 1 + len(axes)
        shape[1 + list(axes).index("pos")] = self.lacks.shape[1]
        if by_prompt:
            shape[-1] = len(self.lacks)
        none = self.lacks.T if by_prompt else self.lacks.any(0)
        return values.masked_fill(none.reshape(shape).to(values.device), torch.nan)

    def require(self, names: Sequence[str], run: Run | None = None) -> None:
        """Raise for a name that the cache does not have, or not for all prompts and positions of the patched run.

        A source without a cache has all.
        """
        if self.cache is None:
            return
        missing = [name for name in names if name not in self.cache.cache_dict]
        if missing and self.spreads and "query" in HookSite.parse(missing[0]).axes:
            raise InputError(
                f"this mean has no {missing[0]!r}: over all queries it would show early ones what comes after them. "
                "Pass mean_source(..., per_position=True), with a names_filter that keeps it."
            )
        if missing:
            raise InputError(
                f"the source's cache has no {missing[0]!r} (and {len(missing) - 1} more that this call reads): "
                "run it with a names_filter and loops that keep them."
            )
        if run is None:
            return
        for name in dict.fromkeys(names):
            self._check_shape(name, *run.tokens.shape)
            if "key" in HookSite.parse(name).axes:
                self._check_sight(name, run)

    def _check_sight(self, name: str, run: Run) -> None:
        """Raise where a pattern would give queries of the patched run keys that they do not see, such as padding."""
        theirs, ours = (self.run or run).visible, run.visible
        same = theirs is None and ours is None  # both see all up to themselves
        if theirs is not None and ours is not None and theirs.shape[-2:] == ours.shape[-2:]:
            same = bool((theirs.cpu() == ours.cpu()).all())
        if not same:
            raise InputError(
                f"in the source of {name!r} queries see other keys than in the patched prompts: take both without "
                "padding, and with the same attention_mask."
            )

    def _check_shape(self, name: str, batch: int, pos: int) -> None:
        wanted = {"batch": batch, "pos": pos, "query": pos, "key": pos}
        axes, shape = HookSite.parse(name).axes, () if self.cache is None else self.cache.cache_dict[name].shape
        if len(axes) != len(shape):
            raise InputError(
                f"the source's {name!r} has shape {tuple(shape)} instead of {list(axes)}: cache it without pos_slice."
            )
        for axis, size in zip(axes, shape, strict=True):
            if axis in wanted and size != wanted[axis] and not (self.spreads and size == 1 and axis != "key"):
                raise InputError(
                    f"the source's {name!r} has {size} along {axis!r}, the patched prompts {wanted[axis]}: take the "
                    f"source from {batch} prompts of {pos} tokens, without pos_slice or rows left out"
                    f"{', or a mean with per_position=False' if self.spreads and 'query' not in axes else ''}."
                )


Given = Source | LoopedCache


def as_source(source: Given) -> Source:
    """A cache as the source of its own activations."""
    if isinstance(source, Source):
        return source
    if not isinstance(source, LoopedCache):
        raise InputError(
            f"the source must be a LoopedCache of model.run_with_cache, or tl_looped.patching's zero(), fixed(...) or "
            f"mean_source(...), got {type(source).__name__}."
        )
    if not source.has_batch_dim:
        raise InputError("the source's cache has no batch axis: run it without remove_batch_dim.")
    return Source("cache", lambda site, x: source.cache_dict[site.name].to(x), source.run, source, constant=True)


def zero() -> Source:
    """Zeros: ablation."""
    return Source("zero", lambda site, x: torch.zeros_like(x), constant=True)


def fixed(values: Tensor) -> Source:
    """One tensor for every site, of the activation's shape or one that broadcasts to it."""

    def give(site: HookSite, x: Tensor) -> Tensor:
        try:
            return values.to(x).expand_as(x)
        except RuntimeError as error:
            raise InputError(
                f"the given tensor of shape {tuple(values.shape)} does not fit {site.name!r} of {tuple(x.shape)}."
            ) from error

    return Source("fixed", give, constant=True)


@with_run_options
@torch.no_grad()
def mean_source(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    names_filter: NamesFilter = None,
    per_position: bool = True,
    **options: Unpack[RunOptions],
) -> Source:
    """The mean activation over reference prompts, for mean ablation.

    Args:
        model: in evaluation mode.
        prompts: reference prompts of one length.
        n_loops, options: of the reference runs, see `RunOptions`; they must match the patched run's.
        names_filter: which activations to keep, as in `run_with_cache`.
        per_position: one mean for each position, for prompts as long as the patched one; else one over all positions,
            which patterns and scores do not have: a mean over queries would show early ones what comes after them.

    Raises:
        InputError: a model in training mode, prompts that differ in length, so positions do not correspond; where it is
            used, a site that it does not have.
    """
    check_eval(check_looped(model, several_stacks=True))
    run = model.batch_of(model.prepare(prompts, n_loops, **options))
    if not bool(run.attention_mask.all()):
        raise InputError("the reference prompts differ in length, so their positions do not correspond.")
    _, cache = run_with_cache(model, run, Keep(names_filter), None)
    means = {}
    for name, tensor in cache.cache_dict.items():
        site = HookSite.parse(name)
        if per_position:
            means[name] = wide(tensor).mean(0, keepdim=True)
        elif "query" not in site.axes:
            means[name] = wide(tensor).mean((0, site.pos_axis), keepdim=True)

    def give(site: HookSite, x: Tensor) -> Tensor:
        source.require([site.name])
        return means[site.name].to(x).expand_as(x)

    source = Source("mean", give, run, LoopedCache(means, model, run), spreads=True, constant=True)
    return source
