"""Path patching: from one component to another, everything else kept at its corrupted value, across loops too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.cache import LoopedCache
from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.hooks import HookFn, HookName, LoopHookPoint
from tl_looped.engine.runs import Run
from tl_looped.engine.schedule import CODA, CORE, PRELUDE, HookSite
from tl_looped.model import LoopedModel
from tl_looped.patching.checks import Metric, Metrics, Reduce, check_model, check_source
from tl_looped.patching.sources import Values, as_source

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


@dataclass(frozen=True)
class Receiver:
    """What reads: a head's "q", "k" or "v" (`head` None for all heads), the "mlp"'s input, or the "readout"."""

    kind: ReceiverKind
    loop: int | None = None
    layer: int | None = None
    head: int | None = None


def path_patch(
    model: LoopedModel,
    corrupted: str | list[str] | Tensor,
    clean_cache: LoopedCache,
    metric: Metric,
    sender: Sender,
    receivers: Sequence[Receiver],
    *,
    reduce: Reduce = "scalar",
    n_loops: int | None = None,
    initial_state: Tensor | None = None,
    seed: int | None = None,
) -> Float[Tensor, "receiver *batch"]:
    """The metric when only the direct path from a sender to one receiver carries the clean value.

    1. Corrupted run, with every head's z and every MLP's output kept at its corrupted value, but the sender's at its
       clean one. What reaches a receiver's input now came straight through the residual stream and what lies on
       it: norms between loops, and the injection.
    2. Corrupted run in which only that receiver's input is the one of step 1.

    Args:
        model: in evaluation mode, without hooks of its own.
        corrupted: the prompt or prompts to patch into.
        clean_cache: of the clean run, with the sender's output ("attn.hook_z", or "hook_mlp_out") in its loop.
        metric: from logits to a scalar or [batch], see `reduce`.
        sender: where the path begins.
        receivers: where it ends; each is measured alone. "readout" needs no second run.
        reduce: as in `patch_sweep`.
        n_loops, initial_state, seed: of the corrupted run; those of the clean one.

    Returns:
        The metric for each receiver, [receiver], or [receiver, batch].

    Raises:
        InputError: a sender or receiver that the model does not have, or a receiver that comes before the sender.

    Source:
        Path patching (Wang et al. 2022, arXiv 2211.00593), with freezing instead of subtraction, since norms and
        injection between loops do not pass a difference on as it is.
    """
    check_model(model)
    run = model.batch(corrupted, n_loops, initial_state=initial_state, seed=seed)
    source = as_source(clean_cache)
    check_source(source, run)
    origin = _sender_site(model, run, sender)
    source.require([origin.name], run)
    targets = [_receiver_sites(model, run, receiver, sender) for receiver in receivers]
    if not targets:
        raise InputError("receivers is empty: name at least one place where the path ends.")
    metrics = Metrics(metric, reduce)
    metrics.single("path_patch")
    with torch.no_grad():
        metrics(model.execute(run))  # a metric that can't be used is found before the runs that need it
        frozen = _frozen_values(model, run)
        hooks = _freeze(frozen, origin, source.values, sender)
        inputs: dict[str, Tensor] = {}
        names = {site.name for sites in targets for site in sites}
        keep: list[tuple[HookName, HookFn]] = [(name, partial(_keep, inputs)) for name in sorted(names)]
        with model.hooks(fwd_hooks=hooks + keep):
            direct = model.execute(run)
        rows = []
        for receiver, sites in zip(receivers, targets, strict=True):
            logits = direct
            if sites:
                write: HookFn = partial(_write_input, inputs, receiver.head)
                with model.hooks(fwd_hooks=[(site.name, write) for site in sites]):
                    logits = model.execute(run)
            rows.append(metrics.reduced(metrics(logits))[0])
    return torch.stack(rows)


def _sender_site(model: LoopedModel, run: Run, sender: Sender) -> HookSite:
    if sender.kind not in get_args(SenderKind):
        raise InputError(f"a sender's kind must be one of {get_args(SenderKind)}, got {sender.kind!r}.")
    if (sender.kind == "head") != (sender.head is not None):
        raise InputError(f"a sender has a head where its kind is 'head', and only there, got {sender}.")
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
            raise InputError(f"the readout has no loop, layer or head: leave them out of {receiver}.")
        return []
    loop = resolve_index("loop", receiver.loop, run.n_loops)
    layer = resolve_index("layer", receiver.layer, model.cfg.n_core)
    if receiver.head is not None:
        if receiver.kind == "mlp":
            raise InputError(f"an mlp has no heads: leave head out of {receiver}.")
        resolve_index("head", receiver.head, model.cfg.n_heads if receiver.kind == "q" else model.cfg.kv_heads)
    begins = (resolve_index("loop", sender.loop, run.n_loops), resolve_index("layer", sender.layer, model.cfg.n_core))
    same_layer = (loop, layer) == begins and receiver.kind == "mlp" and sender.kind != "mlp"
    if (loop, layer) <= begins and not same_layer:
        raise InputError(f"{receiver} reads before {sender} writes, so there is no path between them.")
    return [HookSite(name, CORE, layer, loop) for name in _INPUTS[receiver.kind]]


def _frozen_values(model: LoopedModel, run: Run) -> dict[str, Tensor]:
    """Every head's z and every MLP's output in the corrupted run, by name."""
    values: dict[str, Tensor] = {}
    stacks = (PRELUDE, CORE, CODA) if model.transformer.needs_input(run.state is not None) else (CORE, CODA)
    sites = [
        HookSite(name, stack, layer, loop).name
        for stack, layer, loop in model.cfg.schedule(run.n_loops).layer_calls()
        if stack in stacks
        for name in ("attn.hook_z", "hook_mlp_out")
    ]
    with model.hooks(fwd_hooks=[(name, partial(_keep, values)) for name in sites]):
        model.execute(run)
    return values


def _freeze(
    frozen: dict[str, Tensor], origin: HookSite, clean: Values, sender: Sender
) -> list[tuple[HookName, HookFn]]:
    def hold(x: Tensor, hook: LoopHookPoint) -> Tensor:
        kept = frozen[hook.name]
        if hook.site != origin:
            return kept
        value = clean(origin, x)
        if sender.head is None:
            return value
        mixed = kept.clone()
        mixed[:, :, sender.head] = value[:, :, sender.head]
        return mixed

    return [(name, hold) for name in frozen]


def _keep(store: dict[str, Tensor], x: Tensor, hook: LoopHookPoint) -> None:
    store[hook.name] = x


def _write_input(inputs: dict[str, Tensor], head: int | None, x: Tensor, hook: LoopHookPoint) -> Tensor:
    value = inputs[hook.name]
    if head is None:
        return value
    mixed = x.clone()
    mixed[:, :, head] = value[:, :, head]
    return mixed
