"""Hooks that change a run's course: freeze attention, skip a loop or a layer, inject another prompt.

Each function returns hooks for `model.run_with_hooks(tokens, fwd_hooks=...)` or `model.hooks(...)`; lists may be added.
A list keeps activations of the run it is used in, so make a new one for every run.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from tl_looped.engine.cache import LoopedCache
from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.hooks import HookFn, HookName, LoopHookPoint
from tl_looped.engine.schedule import CORE, HookSite, LoopCount
from tl_looped.model import LoopedModel
from tl_looped.patching.sources import as_source

Hooks = list[tuple[HookName, HookFn]]


def freeze_patterns(
    model: LoopedModel,
    loop: int,
    n_loops: LoopCount | None = None,
    layers: Iterable[int] | None = None,
    *,
    stack: str | None = None,
) -> Hooks:
    """Keep the attention patterns of one loop in all later loops: has attention stabilised by then, causally?

    Args:
        model: the model.
        loop: the loop whose patterns are kept; negative numbers count from the end.
        n_loops: loops of the run.
        layers: core layers to freeze; None for all.
        stack: whose loops and layers are meant; None for the only one that loops.

    Raises:
        InputError: the loop is the last, so nothing comes after it.
    """
    stack, loops = _stack(model, n_loops, stack)
    chosen = _layers(model, layers)
    start = resolve_index("loop", loop, loops)
    if start == loops - 1:
        raise InputError(f"loop {start} is the last of {loops}: there is no later loop to freeze.")
    kept: dict[int, Tensor] = {}

    def keep(pattern: Tensor, hook: LoopHookPoint) -> None:
        kept[hook.layer()] = pattern

    def replace(pattern: Tensor, hook: LoopHookPoint) -> Tensor:
        return kept[hook.layer()]

    hooks: Hooks = []
    for layer in chosen:
        site = HookSite("attn.hook_pattern", stack, layer)
        hooks.append((site.at(start).name, keep))
        hooks += [(site.at(t).name, replace) for t in range(start + 1, loops)]
    return hooks


def skip_loop(model: LoopedModel, loop: int, n_loops: LoopCount | None = None, *, stack: str | None = None) -> Hooks:
    """Leave one loop (of a stack) out: its state passes it unchanged, and the later loops keep their number."""
    stack, loops = _stack(model, n_loops, stack)
    t, owner = resolve_index("loop", loop, loops), None if stack == CORE else stack
    return _pass_by(HookSite("hook_state_pre", owner, loop=t), HookSite("hook_state_post", owner, loop=t))


def skip_layer(
    model: LoopedModel, layer: int, loop: int, n_loops: LoopCount | None = None, *, stack: str | None = None
) -> Hooks:
    """Leave one core layer (of a stack) out in one loop: the residual stream passes it unchanged."""
    stack, loops = _stack(model, n_loops, stack)
    t, index = resolve_index("loop", loop, loops), resolve_index("layer", layer, model.cfg.n_core)
    return _pass_by(HookSite("hook_resid_pre", stack, index, t), HookSite("hook_resid_post", stack, index, t))


def _pass_by(before: HookSite, after: HookSite) -> Hooks:
    kept: list[Tensor] = []

    def keep(x: Tensor, hook: LoopHookPoint) -> None:
        kept[:] = [x]

    return [(before.name, keep), (after.name, lambda x, hook: kept[0])]


def replace_injection(model: LoopedModel, cache: LoopedCache, loops: Iterable[int] | None = None) -> Hooks:
    """Mix in another prompt's prelude output, in some loops or all, while the state stays this prompt's.

    Args:
        model: the model.
        cache: the other prompt's, with "hook_injection_in" at these loops.
        loops: loops to change; None for all.

    Raises:
        InputError: the model mixes nothing in, or the cache lacks the activations.
    """
    if not model.cfg.reads_input_in_loops:
        raise InputError(f"{model.cfg.model_name} has no input injection to replace.")
    total = cache.run.n_loops
    chosen = range(total) if loops is None else [resolve_index("loop", t, total) for t in loops]
    if not chosen:
        raise InputError("loops is empty, so nothing would change: leave it out for all loops.")
    source = as_source(cache)
    sites = [HookSite("hook_injection_in", loop=t) for t in chosen]
    source.require([site.name for site in sites])
    return [(site.name, lambda e, hook: source.values(hook.site, e)) for site in sites]


def _stack(model: LoopedModel, n_loops: LoopCount | None, stack: str | None) -> tuple[str, int]:
    """(the stack that is meant, its loops in a run)."""
    chosen = model.cfg.looping_stack(stack)
    return chosen, model.cfg.schedule(n_loops).n_loops(chosen)


def _layers(model: LoopedModel, layers: Iterable[int] | None) -> list[int]:
    n_core = model.cfg.n_core
    chosen = list(range(n_core)) if layers is None else [resolve_index("layer", layer, n_core) for layer in layers]
    if not chosen:
        raise InputError("layers is empty, so nothing would change: leave it out for all layers.")
    return chosen
