"""Path patching: from one component to another, everything else kept at its corrupted value, across loops too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast, get_args

import pandas as pd
import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.hooks import HookFn, HookName, LoopHookPoint
from tl_looped.engine.runs import Prompts, Run, RunOptions, with_run_options
from tl_looped.engine.schedule import CODA, CORE, PRELUDE, HookSite
from tl_looped.model import LoopedModel
from tl_looped.observe.watching import watch
from tl_looped.patching.checks import prepare_patch
from tl_looped.patching.results import LoopPatchingResult, Metric, Metrics, Reduce
from tl_looped.patching.sources import Given, Values

SenderKind = Literal["head", "attn", "mlp"]
ReceiverKind = Literal["q", "k", "v", "mlp", "readout"]

_INPUTS = {
    "q": ("attn.hook_q",),
    "k": ("attn.hook_k",),
    "v": ("attn.hook_v",),
    "mlp": ("mlp.hook_pre", "mlp.hook_pre_linear"),
}


@dataclass(frozen=True)
class Sender:
    """What writes: one "head", all of "attn", or the "mlp", of a core layer in a loop."""

    loop: int
    layer: int
    kind: SenderKind
    head: int | None = None

    def __str__(self) -> str:
        return _spell(self.kind, self.loop, self.layer, self.head)


@dataclass(frozen=True)
class Receiver:
    """What reads: a head's "q", "k" or "v" (`head` None for all heads), the "mlp"'s input, or the "readout"."""

    kind: ReceiverKind
    loop: int | None = None
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        return _spell(self.kind, self.loop, self.layer, self.head)


def _spell(kind: str, loop: int | None, layer: int | None, head: int | None) -> str:
    """Such as "mlp, loop 1, layer 0"."""
    places = {"loop": loop, "layer": layer, "head": head}
    return ", ".join([kind, *(f"{name} {index}" for name, index in places.items() if index is not None)])


@with_run_options
def path_patch(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: int | None = None,
    *,
    source: Given,
    metric: Metric,
    sender: Sender,
    receivers: Sequence[Receiver],
    reduce: Reduce = "scalar",
    **options: Unpack[RunOptions],
) -> LoopPatchingResult:
    """The metric when only the direct path from a sender to one receiver carries the clean value.

    1. Corrupted run, with every head's z and every MLP's output kept at its corrupted value, but the sender's at its
       clean one. What reaches a receiver's input now came straight through the residual stream and what lies on
       it: norms between loops, and the injection.
    2. Corrupted run in which only that receiver's input is the one of step 1.

    Args:
        model: in evaluation mode, without hooks of its own.
        prompts, n_loops, options: as in `patch_sweep`.
        source: the cache of the clean run, with the sender's output ("attn.hook_z", or "hook_mlp_out") in its loop; or
            as in `patch_sweep`.
        metric: from logits to a scalar or [batch], see `reduce`.
        sender: where the path begins.
        receivers: where it ends; each is measured alone. "readout" needs no second run.
        reduce: as in `patch_sweep`.

    Returns:
        A PatchingResult with the axis "receiver": values [receiver, batch?].

    Raises:
        InputError: a sender or receiver that the model does not have, or a receiver that comes before the sender.

    Source:
        Path patching (Wang et al. 2022, arXiv 2211.00593), with freezing instead of subtraction, since norms and
        injection between loops do not pass a difference on as it is.
    """
    metrics = Metrics(metric, reduce, only_one="path_patch")
    run, given = prepare_patch(model, prompts, n_loops, source, options)
    origin = _sender_site(model, run, sender)
    given.require([origin.name], run)
    targets = [_receiver_sites(model, run, receiver, sender) for receiver in receivers]
    if not targets:
        raise InputError("receivers is empty: name at least one place where the path ends.")
    names = sorted({site.name for sites in targets for site in sites})
    with torch.no_grad():
        frozen, logits = _seen(model, run, _outputs(model, run))
        baseline = metrics(logits)
        with model.hooks(fwd_hooks=_freeze(frozen, origin, given.values, sender)):
            inputs, direct = _seen(model, run, names)
        rows = []
        for receiver, sites in zip(receivers, targets, strict=True):
            logits = direct
            if sites:
                write: HookFn = partial(_write_input, inputs, receiver.head)
                with model.hooks(fwd_hooks=[(site.name, write) for site in sites]):
                    logits = model.execute(run)
            rows.append(metrics(logits))
    index = pd.DataFrame({"receiver": [str(receiver) for receiver in receivers]})
    how = {"method": "path patching", "sender": str(sender)}
    return LoopPatchingResult.of(
        metrics, torch.stack(rows, 1), baseline, index, origin.name, (model, run, given), **how
    )


def _sender_site(model: LoopedModel, run: Run, sender: Sender) -> HookSite:
    if sender.kind not in get_args(SenderKind):
        raise InputError(f"a sender's kind must be one of {get_args(SenderKind)}, got {sender.kind!r}.")
    if (sender.kind == "head") != (sender.head is not None):
        raise InputError(f"a sender has a head where its kind is 'head', and only there, got {sender!r}.")
    if sender.head is not None:
        resolve_index("head", sender.head, model.cfg.n_heads)
    loop = resolve_index("loop", sender.loop, run.n_loops)
    layer = resolve_index("layer", sender.layer, model.cfg.n_core)
    return HookSite("hook_mlp_out" if sender.kind == "mlp" else "attn.hook_z", CORE, layer, loop)


def _receiver_sites(model: LoopedModel, run: Run, receiver: Receiver, sender: Sender) -> list[HookSite]:
    if receiver.kind not in get_args(ReceiverKind):
        raise InputError(f"a receiver's kind must be one of {get_args(ReceiverKind)}, got {receiver.kind!r}.")
    if receiver.kind == "readout":
        if (receiver.loop, receiver.layer, receiver.head) != (None, None, None):
            raise InputError(f"the readout has no loop, layer or head: leave them out of {receiver!r}.")
        return []
    loop = resolve_index("loop", receiver.loop, run.n_loops)
    layer = resolve_index("layer", receiver.layer, model.cfg.n_core)
    if receiver.head is not None:
        if receiver.kind == "mlp":
            raise InputError(f"an mlp has no heads: leave head out of {receiver!r}.")
        resolve_index("head", receiver.head, model.cfg.n_heads if receiver.kind == "q" else model.cfg.kv_heads)
    begins = (resolve_index("loop", sender.loop, run.n_loops), resolve_index("layer", sender.layer, model.cfg.n_core))
    same_layer = (loop, layer) == begins and receiver.kind == "mlp" and sender.kind != "mlp"
    if (loop, layer) <= begins and not same_layer:
        raise InputError(f"{receiver!r} reads before {sender!r} writes, so there is no path between them.")
    return [HookSite(name, CORE, layer, loop) for name in _INPUTS[receiver.kind]]


def _outputs(model: LoopedModel, run: Run) -> list[str]:
    """Every head's z and every MLP's output in a run, by name."""
    stacks = (PRELUDE, CORE, CODA) if model.transformer.needs_input(run.state is not None) else (CORE, CODA)
    return [
        HookSite(name, stack, layer, loop).name
        for stack, layer, loop in model.cfg.schedule(run.n_loops).layer_calls()
        if stack in stacks
        for name in ("attn.hook_z", "hook_mlp_out")
    ]


def _seen(model: LoopedModel, run: Run, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """(the activations at some sites, the logits)."""
    seen: dict[str, Tensor] = {}
    logits = watch(model, run, names, lambda site, x: seen.update({site.name: x}), read_out=True)
    return seen, cast(Tensor, logits)


def _freeze(
    frozen: dict[str, Tensor], origin: HookSite, clean: Values, sender: Sender
) -> list[tuple[HookName, HookFn]]:
    def hold(x: Tensor, hook: LoopHookPoint) -> Tensor:
        kept = frozen[hook.name]
        return _mixed(kept, clean(origin, x), sender.head) if hook.site == origin else kept

    return [(name, hold) for name in frozen]


def _write_input(inputs: dict[str, Tensor], head: int | None, x: Tensor, hook: LoopHookPoint) -> Tensor:
    return _mixed(x, inputs[hook.name], head)


def _mixed(x: Tensor, value: Tensor, head: int | None) -> Tensor:
    """The value, at one head only where one is named."""
    if head is None:
        return value
    mixed = x.clone()
    mixed[:, :, head] = value[:, :, head]
    return mixed
