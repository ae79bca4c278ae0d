"""Activations as they come while a model runs: the one way in which anything looks at a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import InputError
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.runs import Run
from tl_looped.engine.schedule import HookSite
from tl_looped.observe.measure import READOUT

See = Callable[[HookSite, Tensor], None]
"""What is called with a site, its loop in it, and the activation there, to be read only."""

SCORES = "attn.hook_attn_scores"  # minus infinity where a query does not see a key


@torch.no_grad()
def watch(
    engine: Engine,
    run: Run,
    names: Collection[str],
    see: See,
    *,
    loops: Collection[int] | None = None,
    read_out: bool = False,
    only_loops: bool = False,
) -> Tensor | None:
    """Run once, without gradients, and show the activations at some sites, in the order in which they come.

    Hooks that are on the engine act; what is shown is what they leave. Nothing is kept.

    Args:
        engine: the model.
        run: what to run.
        names: hook names, with a loop or (for every loop) without; and "readout", for what the unembedding would read
            if the model stopped after a loop, [batch, pos, d_model]. It costs a coda for every loop. The hooks on coda
            and final norm act in it, but what is watched there is shown in the run's own end only.
        see: called with each site and activation; what it keeps it must not write to.
        loops: show sites that loop in these loops of the run only; None for all.
        read_out: whether to form the run's logits.
        only_loops: end the run with the last loop: no coda, no logits.

    Returns:
        The logits, [batch, pos, d_vocab], with `read_out`; else None.

    Raises:
        HookNameError: a name that this run does not reach; nothing was run.
    """
    reading = False

    def look(x: Tensor, hook: LoopHookPoint) -> None:
        if not reading:
            see(hook.site, x)

    def look_ahead(state: Tensor, hook: LoopHookPoint) -> None:
        nonlocal reading
        reading = True
        try:
            out = engine.transformer.finish(state, frame)
        finally:
            reading = False
        see(HookSite(READOUT, loop=hook.loop), out)

    frame, reach = engine.frame(run), engine.reach(run)
    with engine.hooks():
        for name in names:
            site = HookSite("hook_state_post", engine.cfg.head_stack) if name == READOUT else HookSite.parse(name)
            point = engine.hook_dict.shared(site.at(None).name)
            where = site.loop
            if where is None and loops is not None and point.looped:
                where = frozenset(reach.loops_of(point, loops))
            hook = look_ahead if name == READOUT else look
            point.add_hook(hook, level=engine.context_level, where=where, reads_only=True)
        if not only_loops:
            return engine.execute(run, return_type="logits" if read_out else None)
        reach.check_hooks()
        engine.transformer(run.tokens, engine.frame(run), run.state, run.start, run.stop)
    return None


@torch.no_grad()
def first_not_finite(engine: Engine, run: Run) -> tuple[str, int] | None:
    """The first site, in the order of the run, that holds NaN or infinity, and the row; None where none does."""
    found: list[tuple[str, int]] = []

    def look(x: Tensor, hook: LoopHookPoint) -> None:
        if found or not x.is_floating_point():
            return
        wrong = x.isnan() | x.isposinf() if hook.site.component == SCORES else ~x.isfinite()
        if bool(wrong.any()):
            found.append((hook.name, int(wrong.flatten(1).any(1).nonzero()[0])))

    with engine.hooks(fwd_hooks=[(lambda name: True, look)]):
        engine.execute(run)
    return found[0] if found else None


def spell_place(name: str) -> str:
    """A hook name, with its layer and loop in words."""
    if name.endswith(READOUT):
        return f"{name!r}, the log probabilities of what the model would say"
    site = HookSite.parse(name)
    numbers = {"layer": site.layer, "loop": site.loop}
    where = ", ".join(f"{part} {number}" for part, number in numbers.items() if number is not None)
    return f"{name!r} ({where})" if where else repr(name)


@contextmanager
def naming_origin(engine: Engine, run: Run) -> Iterator[None]:
    """An error in the block names the layer and loop where activations stopped being finite, if that is what happened.

    It takes one more run, with the hooks that are on the model.
    """
    try:
        yield
    except InputError as error:
        found = first_not_finite(engine, run)
        if found is None:
            raise
        raise InputError(
            f"activations are not finite, from {spell_place(found[0])} on. Look at the weights and hooks there, or run "
            "in a wider dtype or with fewer loops."
        ) from error
