"""What a call says of one run besides its prompts, checked: where it starts and stops, its time, what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tl_looped.engine.checks import check_number
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.runs import Call, Prompts, Run, RunOptions, Runs, writing_out
from tl_looped.engine.schedule import CODA, PRELUDE, HookSite, LoopCount, LoopSchedule
from tl_looped.engine.span import At, Span, resolve_at

ReturnType = Literal["logits", "loss", "both"] | None


class PartOptions(RunOptions, total=False):
    """What a call takes beside these that may run a part.

    Attributes:
        start_at_loop: first loop to run; needs `initial_state`, the state that enters it before injection.
        stop_at_loop: return the state that would enter this loop, before injection, [batch, pos, d_model].
        start_at: go on from the residual stream that enters a layer, which stands in place of the prompts; these are
            `tokens`. (loop, layer) of the core; (stack, loop, layer) where several stacks loop; ("prelude", layer) or
            ("coda", layer). What the loops still mix in is read from the tokens again. `initial_state` is then the
            state that entered that loop, where what leaves it is made with it (an update other than "replace"); of two
            states both, as the stack's pass finds them. Else it is left out.
        stop_at: return the residual stream that enters a layer, [batch, pos, d_model], in the same forms.
        tokens: with `start_at`, the prompts: for positions, padding, injection, and the loss.
    """

    start_at_loop: int | None
    stop_at_loop: int | None
    start_at: At | None
    stop_at: At | None
    tokens: Any


def with_part_options(function: Call) -> Call:
    """`writing_out` of `PartOptions`."""
    return writing_out(function, PartOptions)


def resolve_loops(
    n_loops: LoopCount | None, start_at_loop: int | None, stop_at_loop: int | None, cfg: LoopedConfig
) -> tuple[int, int, int, int | None]:
    """(n_loops, start, stop, l_cycles) as counts from 0, or an error."""
    total, l_cycles = cfg.counts(n_loops)
    start = 0 if start_at_loop is None else resolve_index("start_at_loop", start_at_loop, total)
    stop = total
    if stop_at_loop is not None and (stop_at_loop != total or isinstance(stop_at_loop, bool)):
        stop = resolve_index("stop_at_loop", stop_at_loop, total)
    if stop < start:
        raise InputError(f"stop_at_loop {stop} comes before start_at_loop {start}: no loop would run.")
    return total, start, stop, l_cycles


class Ends(NamedTuple):
    """From where to where a run goes; the attributes are those of `Run`."""

    n_loops: int
    start: int
    stop: int
    reads_out: bool
    l_cycles: int | None
    start_at: str | None
    stop_at: str | None


def resolve_ends(n_loops: LoopCount | None, options: PartOptions, cfg: LoopedConfig) -> Ends:
    """What the options say of it, as counts from 0 and names, or an error."""
    first, last, at, to = (options.get(one) for one in ("start_at_loop", "stop_at_loop", "start_at", "stop_at"))
    for one, loop, layer in (("start", first, at), ("stop", last, to)):
        if loop is not None and layer is not None:
            raise InputError(f"{one}_at_loop={loop} and {one}_at={layer} both say where the run {one}s: leave one out.")
    total, start, stop, l_cycles = resolve_loops(n_loops, first, last, cfg)
    schedule = cfg.schedule(total if l_cycles is None else (total, l_cycles))
    start_at, stop_at = resolve_at("start_at", at, schedule), resolve_at("stop_at", to, schedule)
    if start_at is not None:
        start = _loop_of(start_at, schedule)
    if stop_at is not None:
        stop = _loop_of(stop_at, schedule) + (HookSite.parse(stop_at).loop is not None)
    ends = Ends(total, start, stop, last is None and to is None, l_cycles, start_at, stop_at)
    span = Span(schedule, start_at or start, None if ends.reads_out else stop_at or stop)
    if span.begins > span.ends:
        begins, comes = start_at or f"loop {start}", stop_at or f"loop {stop}"
        raise InputError(f"the run would stop at {comes}, which comes before {begins}, where it starts.")
    return ends


def _loop_of(name: str, schedule: LoopSchedule) -> int:
    """The loop of the run in which a site lies; after the last for the coda."""
    site = HookSite.parse(name)
    if site.loop is None:
        return 0 if site.stack == PRELUDE else schedule.n_loops(None)
    return site.loop // schedule.per_loop(site.stack)


def resolve_stream(
    cfg: LoopedConfig, ends: Ends, prompts: Prompts, options: PartOptions
) -> tuple[Prompts, Tensor | None]:
    """(the prompts, the stream that stands in their place in a run with start_at)."""
    at, tokens = options.get("start_at"), options.get("tokens")
    if ends.start_at is None:
        if tokens is not None:
            raise InputError("tokens are the prompts of a run with start_at: without it, pass them first.")
        return prompts, None
    if not isinstance(prompts, Tensor) or not prompts.is_floating_point() or tokens is None or isinstance(tokens, Runs):
        raise InputError(
            f"start_at={at} goes on from a residual stream in place of the prompts, which still say positions, padding "
            f"and what is injected: model(stream, start_at={at}, tokens=prompts)."
        )
    stack, state = HookSite.parse(ends.start_at).stack, options.get("initial_state")
    if stack == PRELUDE:
        return tokens, prompts
    if options.get("seed") is not None:
        raise InputError(f"start_at={at} goes on from a stream, so no state is drawn: leave out seed.")
    read = stack != CODA and not cfg.resumes_in_loop
    if read and state is None:
        what = "the state that entered the loop" if cfg.two_states is None else "both states, [z_H ; z_L], as it began"
        raise InputError(f"start_at={at} is in a loop whose end reads {what}: pass that as initial_state.")
    if state is not None and not read:
        raise InputError(f"start_at={at} goes on from a stream, and no state is read there: leave out initial_state.")
    return tokens, prompts


def check_stream(stream: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Raise for a stream that can't be that of these prompts."""
    if tuple(stream.shape) != shape or stream.dtype != dtype:
        raise InputError(
            f"the stream of these tokens must be {dtype} of shape {shape} = [batch, pos, d_model], got {stream.dtype} "
            f"of shape {tuple(stream.shape)}."
        )


def resolve_steps(cfg: LoopedConfig, given: object, n_loops: int) -> tuple[float, ...] | None:
    """The step size of every loop; None for a model whose loops have no time."""
    if not cfg.loop_time:
        if given is not None:
            raise InputError(f"the loops of {cfg.model_name} have no time, so leave out step_sizes.")
        return None
    if given is None:
        return (1 / n_loops,) * n_loops
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise InputError(f"step_sizes must be a list of step sizes, one for each loop, got {given!r}.")
    if len(given) != n_loops:
        raise InputError(
            f"step_sizes has {len(given)} step sizes, but the run has {n_loops} loops: pass one for each, or "
            f"n_loops={len(given)}."
        )
    return tuple(check_number("a step in step_sizes", one) for one in given)


def check_return(cfg: LoopedConfig, run: Run, return_type: ReturnType, loss_per_token: bool) -> None:
    """Raise for a return type that there is not, or a loss that this run can't have."""
    if return_type not in ("logits", "loss", "both", None):
        raise InputError(f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}.")
    if return_type in ("loss", "both"):
        cfg.check_causal("the loss of the next token")
        if not run.reads_out:
            what = "a state" if run.stop_at is None else "the stream there"
            raise InputError(
                f"a run with {run.stops_by} returns {what}, so it has no loss: leave out {run.stops_by}, or "
                f"return_type={return_type!r}."
            )
        if not bool(run.predicts.any()):
            behind = "" if run.prefix is None else ", and a prefix that leaves one: its own tokens see each other"
            raise InputError(f"the loss needs at least two tokens: one to read and one to predict{behind}.")
    elif loss_per_token:
        raise InputError(f"loss_per_token needs return_type 'loss' or 'both', got {return_type!r}.")
