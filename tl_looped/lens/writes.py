"""What is written to the residual stream, and the stream cut there: every write a leaf, later branches constant."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor

from tl_looped.engine.hooks import HookFn, HookName, LoopHookPoint
from tl_looped.engine.schedule import FAST, PRELUDE, SLOW, HookSite, LoopCount
from tl_looped.model import LoopedModel

KINDS = {"hook_attn_out": "attn", "attn.hook_z": "head", "hook_mlp_out": "mlp", "mlp.hook_post": "neuron"}


def write_sites(
    model: LoopedModel, counts: LoopCount | None, has_state: bool, attention: str, mlp: str
) -> dict[str, tuple[str, HookSite]]:
    """Name of a hook point -> (kind, site): all that a run writes to the stream, in the order of the run.

    Args:
        model: what runs.
        counts: its loops.
        has_state: whether it starts from a state that is not the prelude's, given or drawn.
        attention: where what attention writes is seen, a component of `KINDS`.
        mlp: where what an MLP writes is.
    """
    cfg, found = model.cfg, [("embed", HookSite("hook_embed"))]
    if cfg.learned_positions:
        found.append(("pos_embed", HookSite("hook_pos_embed")))
    skipped: tuple[str, ...] = ()
    if cfg.two_states is not None:
        found.append(("state", HookSite("hook_state_pre", FAST, loop=0)))
        if has_state or cfg.two_states.h_start == "vector":
            found.append(("state", HookSite("hook_state_pre", SLOW, loop=0)))
    elif has_state:
        found.append(("state", HookSite("hook_state_init")))
    if has_state and not model.transformer.needs_input(state_given=True):
        found, skipped = [one for one in found if one[0] == "state"], (PRELUDE,)  # nothing reads the tokens
    for stack, layer, loop in cfg.schedule(counts).layer_calls():
        if stack not in skipped:
            found += [(KINDS[name], HookSite(name, stack, layer, loop)) for name in (attention, mlp)]
    return {site.name: (kind, site) for kind, site in found}


@contextmanager
def cut_writes(
    model: LoopedModel, names: Collection[str], more: Collection[tuple[HookName, HookFn]] = ()
) -> Iterator[dict[str, Tensor]]:
    """In a `with` block the writes of a run are leaves that ask for gradients; what is given comes to hold them.

    So a gradient by one of them came along the stream alone, past layers, and not through what these make of it.

    Args:
        model: whose runs.
        names: the writes.
        more: other hooks of these runs, that act before.
    """
    writes: dict[str, Tensor] = {}

    def cut(x: Tensor, hook: LoopHookPoint) -> Tensor:
        writes[hook.name] = x.detach().requires_grad_(True)
        return writes[hook.name]

    with model.hooks([*more, *((name, cut) for name in names)]):
        yield writes
