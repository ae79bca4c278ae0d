"""Attribution patching: what patching would do, to first order, from one forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.hooks import HookFn, HookName, LoopHookPoint
from tl_looped.engine.network import frozen_weights
from tl_looped.engine.numbers import wide
from tl_looped.engine.runs import Prompts, Run, RunOptions, with_run_options
from tl_looped.engine.schedule import HookSite, LoopCount
from tl_looped.model import LoopedModel
from tl_looped.observe.watching import watch
from tl_looped.patching.cells import Axis, Group, Plan, When
from tl_looped.patching.checks import check_sites, prepare_patch
from tl_looped.patching.results import LoopPatchingResult, Metric, Metrics, Reduce
from tl_looped.patching.sources import Given, Source


@with_run_options
def attribution_sweep(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    source: Given,
    metric: Metric,
    site: str = "resid_pre",
    axes: Sequence[Axis] = ("loop", "layer", "pos"),
    n_steps: int | None = None,
    stack: str | None = None,
    reduce: Reduce = "scalar",
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> LoopPatchingResult:
    r"""Estimate what `patch_sweep` (with when="at", or "every" without a loop axis) measures.

    The estimate for a cell is the sum over its elements of (clean - corrupted) · d metric / d activation, with every
    activation and its gradient from the same loop, added to the corrupted run's metric, so that values compare with
    those of `patch_sweep`; `result.effect()` is the estimate itself. It is exact where the metric is linear in a site.

    With `n_steps` m the gradient is the mean over m runs whose embeddings lie at (i + 1/2) / m of the way from
    corrupted to clean (integrated gradients along the input).

    Args:
        model: in evaluation mode, without hooks of its own.
        prompts, n_loops, options: as in `patch_sweep`.
        source: the cache of the clean run, with the site in all loops, and with `n_steps` also "hook_embed"; or as in
            `patch_sweep`.
        metric: a differentiable function of logits, to a scalar or [batch], see `reduce`.
        site, axes: as in `patch_sweep`, without "source_loop".
        n_steps: steps of the integral; None for one gradient at the corrupted run.
        stack: as in `patch_sweep`.
        reduce: as in `patch_sweep`.
        progress: show a bar over steps.

    Returns:
        A PatchingResult whose values are estimates.

    Raises:
        InputError: before the runs; or after the first when the metric can't be differentiated.

    Source:
        Attribution patching (Nanda 2023; Syed et al. 2023, arXiv 2310.10348); along the input: EAP-IG (Hanna et al.
        2024, arXiv 2403.17806).
    """
    check_gradients()
    metrics = Metrics(metric, reduce, only_one="attribution_sweep")
    run, given = prepare_patch(model, prompts, n_loops, source, options, several_stacks=True)
    if "source_loop" in axes:
        raise InputError("attribution pairs each loop with itself: leave 'source_loop' out, or use patch_sweep.")
    fractions = steps_of(model, given, n_steps)
    when: When = "at" if "loop" in axes else "every"
    plan = Plan(model.cfg, run.counts, run.tokens.shape[1], site, axes, when, None, stack)
    groups = plan.groups()
    sites = [written for group in groups for written, _ in group.sites]
    names = [one.name for one in sites] + (["hook_embed"] if n_steps is not None else [])
    check_sites(model, run, names)
    given.require(names, run)
    acts: dict[str, Tensor] = {}
    logits = watch(model, run, [one.name for one in sites], lambda at, x: acts.update({at.name: x}), read_out=True)
    baseline = metrics(cast(Tensor, logits))
    grads: dict[str, Tensor] = {}
    for fraction in tqdm(fractions, desc="Attribution", disable=not progress or len(fractions) == 1):
        for name, grad in site_gradients(model, run, sites, metrics, given, fraction).items():
            grads[name] = grads.get(name, 0) + wide(grad) / len(fractions)  # a sum of many steps
    products = {one.name: _product(given.values(one, acts[one.name]), acts[one.name], grads[one.name]) for one in sites}
    effects = _collect(plan, groups, products, per_prompt=reduce != "scalar")
    method = "attribution" if n_steps is None else f"integrated gradients, {n_steps} steps"
    how, ran = {"method": method, **model.cfg.made_of(plan.stack)}, (model, run, given)
    values = given.blank((effects + baseline[0])[None], plan.axes)
    return LoopPatchingResult.of(metrics, values, baseline, plan.index(), site, ran, **how)


def check_gradients() -> None:
    """Raise where no gradient can be had."""
    if torch.is_inference_mode_enabled():
        raise InputError(
            "attribution needs gradients: call it outside torch.inference_mode(); torch.no_grad() is fine."
        )


def steps_of(model: LoopedModel, given: Source, n_steps: int | None) -> list[float]:
    """How far the embeddings of each run have moved to the source's; one run that has not, without steps."""
    if n_steps is not None and given.cache is None:
        raise InputError("n_steps integrates from the corrupted prompt to another: pass that prompt's cache.")
    if n_steps is not None and model.cfg.reads_tokens_in_layers:
        raise InputError(
            f"n_steps moves the embeddings to those of the other prompt, but layers of {model.cfg.model_name} read "
            "tokens themselves, by value embeddings: leave out n_steps."
        )
    if n_steps is None:
        return [0.0]
    steps = check_count("n_steps", n_steps)
    return [(i + 0.5) / steps for i in range(steps)]


def _product(clean: Tensor, corrupted: Tensor, grad: Tensor) -> Tensor:
    """(clean - corrupted) · gradient; 0 where the gradient is, also for the infinite scores of what can't be seen."""
    return torch.where(grad == 0, 0, (clean - corrupted) * grad)


def site_gradients(
    model: LoopedModel, run: Run, sites: Sequence[HookSite], metrics: Metrics, source: Source, fraction: float
) -> dict[str, Tensor]:
    """The metric's gradient at every site, each from its own loop; prompts do not mix, so one backward serves all."""
    grads: dict[str, Tensor] = {}

    def keep(grad: Tensor, hook: LoopHookPoint) -> None:
        grads[hook.name] = grad

    run, moves = moved(model, run, source, fraction)
    with frozen_weights(model), torch.enable_grad(), model.hooks(moves, [(site.name, keep) for site in sites]):
        value = metrics(model.execute(run)).sum()
    if not value.requires_grad:
        raise InputError("the metric does not depend on the logits in a way that can be differentiated.")
    value.backward()
    zero = {site.name for site in sites} - set(grads)
    if zero:
        raise InputError(f"no gradient reached {min(zero)!r}: nothing that the metric reads depends on it.")
    return grads


def moved(model: LoopedModel, run: Run, source: Source, fraction: float) -> tuple[Run, list[tuple[HookName, HookFn]]]:
    """A run with gradients of its own, and the hooks that move its embeddings so far to the source's."""

    def move(x: Tensor, hook: LoopHookPoint) -> Tensor:
        return x + fraction * (source.values(hook.site, x) - x)

    reads_tokens = model.transformer.needs_input(run.state is not None)
    if run.state is not None:
        run = replace(run, state=run.state.detach())  # the caller's own may ask for gradients
    return run, [("hook_embed", move)] if fraction and reads_tokens else []


def _collect(
    plan: Plan, groups: Sequence[Group], products: dict[str, Tensor], per_prompt: bool
) -> Float[Tensor, "*cells"]:
    """Sum each cell's elements: [*axes], or [*axes, batch]."""
    first = next(iter(products.values()))
    store = first.new_zeros(*plan.sizes, *(first.shape[:1] if per_prompt else ()))
    order = [axis for axis in plan.axes if axis in plan.inner]
    for group in groups:
        total = torch.stack([_inner_sum(plan, products[site.name]) for site, _ in group.sites]).sum(0)
        total = total.movedim(0, -1) if per_prompt else total.sum(0)
        at = iter(group.outer)
        store[tuple(slice(None) if axis in order else next(at) for axis in plan.axes)] = total
    return store


def _inner_sum(plan: Plan, product: Tensor) -> Float[Tensor, "batch *inner"]:
    """Sum over the activation's axes that the sweep does not have, the rest in the order of the sweep."""
    dims = [plan.dim(axis) for axis in plan.inner]
    kept = product.movedim(dims, list(range(1, 1 + len(dims))))
    return kept.flatten(1 + len(dims)).sum(-1) if kept.ndim > 1 + len(dims) else kept
