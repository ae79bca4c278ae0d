"""A run: checked input, made into what the model needs. Nothing is computed before all of it is right."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypedDict, TypeVar, Union, cast, get_type_hints

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.engine.checks import check_number
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, check_count, nearest, resolve_index
from tl_looped.engine.prompts import Rows
from tl_looped.engine.state import own_state
from tl_looped.engine.tokens import PaddingSide

DEFAULT_SEED = 0
"""Seed of the initial state where a model draws one at random and the caller says nothing."""

Prompts = Union[str, "os.PathLike[str]", Tensor, Mapping[str, Any], Iterable[Any], "Runs"]
"""What is run: text, token ids, a BatchEncoding, chat messages, a list of these, a Path to a file, a dataset, or what
`model.prepare` made of them. `engine.prompts.read_rows` says how each is read."""


@dataclass(frozen=True)
class Run:
    """One run of a model: what goes in, and which loops are run.

    Attributes:
        tokens: token ids, [batch, pos].
        attention_mask: True for real tokens, [batch, pos].
        visible: who may attend to whom, [batch, query, key]; None where every token sees itself and all before it.
        position_ids: positions for the rotary embedding, [batch or 1, pos].
        n_loops: loop count of the whole run.
        start: the first loop that runs.
        stop: the loop after the last one that runs.
        reads_out: whether the run goes on to logits.
        state: the state to start from, [batch, pos, d_model]; None where it is the prelude's output.
        seed: the seed of a drawn state; None where none was drawn from a seed.
        state_given: whether the caller gave the state.
        step_sizes: the step size of every loop of the whole run; None for a model whose loops have no time.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Tensor
    visible: Tensor | None
    position_ids: Tensor
    n_loops: int
    start: int
    stop: int
    reads_out: bool
    state: Float[Tensor, "batch pos d_model"] | None
    seed: int | None
    state_given: bool
    step_sizes: tuple[float, ...] | None = None

    @property
    def last_positions(self) -> Int[Tensor, " batch"]:
        """Where each row's last real token is."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return places.expand_as(self.tokens).masked_fill(~self.attention_mask, -1).amax(-1)

    def describe(self) -> dict[str, object]:
        """Plain values that say what made a result."""
        source = "given" if self.state_given else "model" if self.seed is None else f"seed {self.seed}"
        return {
            "n_loops": self.n_loops,
            "start_at_loop": self.start,
            "stop_at_loop": self.stop,
            "initial_state": source,
            **({} if self.step_sizes is None else {"step_sizes": list(self.step_sizes)}),
        }


class RunOptions(TypedDict, total=False):
    """What every call that runs a model takes besides prompts and `n_loops`, by name.

    Attributes:
        initial_state: the state that enters the first loop, in the model's dtype: [batch, pos, d_model], or
            [pos, d_model] for the same in all rows, counted over their real tokens.
        seed: seed of the drawn initial state, where the model draws one; None for 0. Every position has its own draw,
            the same in all rows, so a prompt's numbers do not depend on its batch.
        attention_mask: which tokens are real, [batch, pos]; or who may attend to whom in full, [batch, query, key].
        position_ids: positions for rotary, [batch, pos]; None: counted over real tokens.
        prepend_bos: whether text begins with a beginning-of-text token; None: as the tokenizer does it.
        padding_side: where prompts of different length are filled up; None: as the tokenizer says, else at the right.
        field: which field of a dataset's or a JSONL file's rows holds the prompt.
        limit: take the first so many prompts; None for all.
        step_sizes: the step size of every loop, for a model whose loops have a time (LoopFormer); None for 1 / n_loops.
    """

    initial_state: Tensor | None
    seed: int | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    prepend_bos: bool | None
    padding_side: PaddingSide | None
    field: str | None
    limit: int | None
    step_sizes: Sequence[float] | None


Call = TypeVar("Call", bound=Callable[..., Any])


def with_run_options(function: Call) -> Call:
    """Write out `**options: Unpack[RunOptions]` in a function's signature, and refuse other names in its own words.

    Type checkers read the names from `Unpack`; help() and notebooks read them from here.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    kinds = get_type_hints(RunOptions)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kinds[name])
        for name in kinds
        if name not in signature.parameters
    ]
    known = [p.name for p in (*own, *more)]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise InputError(f"{function.__name__} has no argument {unknown[0]!r}.{nearest(unknown[0], known)}")
        return function(*args, **kwargs)

    call.__signature__ = signature.replace(parameters=[*own, *more])  # pyright: ignore[reportAttributeAccessIssue]
    return cast(Call, call)


@dataclass(frozen=True, eq=False)
class Runs:
    """Prompts and how to run them, checked: what `model.prepare` makes, and every call takes in place of prompts.

    Attributes:
        rows: the prompts as tokens.
        n_loops: loop count of the whole run.
        start: the first loop that runs.
        stop: the loop after the last one that runs.
        reads_out: whether runs go on to logits.
        initial_state: as given, [batch, pos, d_model] in the layout of the padded rows, or [pos, d_model]; else None.
        seed: as given.
        position_ids: as given, in the layout of the padded rows.
        visible: who may attend to whom, as given, [batch, query, key].
        step_sizes: the step size of every loop of the whole run; None for a model whose loops have no time.
    """

    rows: Rows
    n_loops: int
    start: int
    stop: int
    reads_out: bool
    initial_state: Tensor | None = None
    seed: int | None = None
    position_ids: Tensor | None = None
    visible: Tensor | None = None
    step_sizes: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        loops = f"loops {self.start} to {self.stop - 1} of {self.n_loops}" if self.stop > self.start else "no loop"
        return f"Runs({len(self)} prompts, up to {self.rows.longest} tokens, {loops})"

    @property
    def whole(self) -> bool:
        """Whether they go from the first loop to the logits."""
        return self.start == 0 and self.reads_out

    def equal_lengths(self, most: int) -> list[list[int]]:
        """The rows in batches of one length each, shortest first: batches that need no padding."""
        lengths = [int(real.sum()) for real in self.rows.real]
        by_length: dict[int, list[int]] = {}
        for index in sorted(range(len(self)), key=lengths.__getitem__):
            by_length.setdefault(lengths[index], []).append(index)
        return [rows[i : i + most] for rows in by_length.values() for i in range(0, len(rows), most)]


def check_full_mask(mask: Tensor, batch: int, pos: int) -> None:
    """Raise for a mask that does not say who sees whom."""
    if mask.shape != (batch, pos, pos):
        raise InputError(
            f"attention_mask must have shape {(batch, pos)}, or {(batch, pos, pos)} to say who sees whom, "
            f"got {tuple(mask.shape)}."
        )


def visibility(
    tokens: Int[Tensor, "batch pos"], given: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(attention_mask [batch, pos], visible [batch, query, key] or None where the causal triangle does).

    `given` is the caller's mask, [batch, pos], or [batch, query, key] to say who sees whom in full; `padding`, True for
    real tokens, what is known without it, and beside a full mask what still tells which tokens count. A mask of
    [batch, query, key] costs memory and the fastest kernels, so it is made only where real tokens would else see
    padding: where that comes before them. Behind them it is nothing that they see. A query that would see nothing, as
    padding at the left, sees itself: patterns stay finite and sum to one.
    """
    batch, pos = tokens.shape
    if given is not None and not bool(((given == 0) | (given == 1)).all()):
        raise InputError("attention_mask must be of zeros and ones: 1 for tokens that are seen, 0 for others.")
    mask = padding if given is None else given.to(tokens.device).bool()
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool), None
    if mask.ndim != 2:
        check_full_mask(mask, batch, pos)
        real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else padding
        visible = mask.clone()
    else:
        if not bool((mask[:, 1:] & ~mask[:, :-1]).any()):  # no real token behind one that is not
            return mask, None
        real, visible = mask, torch.ones(pos, pos, dtype=torch.bool, device=mask.device).tril() & mask[:, None, :]
    visible.diagonal(dim1=1, dim2=2).logical_or_(~visible.any(-1))
    return real, visible


def resolve_positions(
    mask: Bool[Tensor, "batch pos"], given: Tensor | None, learned: int | None = None
) -> Int[Tensor, "batch pos"]:
    """Positions as given, or counted over real tokens; below `learned`, where so many have an embedding."""
    if given is None:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)
    if given.shape != mask.shape or given.is_floating_point() or bool((given < 0).any()):
        raise InputError(
            f"position_ids must be integers of at least 0 and of shape {tuple(mask.shape)}, got {given.dtype} of shape "
            f"{tuple(given.shape)}{', some negative' if bool((given < 0).any()) else ''}."
        )
    if learned is not None and int(given.max()) >= learned:
        raise InputError(
            f"position_ids go up to {int(given.max())}, but the model has embeddings of {learned} positions: pass them "
            f"below {learned}."
        )
    return given.to(mask.device).long()


def resolve_loops(
    n_loops: int | None, start_at_loop: int | None, stop_at_loop: int | None, cfg: LoopedConfig
) -> tuple[int, int, int]:
    """(n_loops, start, stop) as counts from 0, or an error."""
    total = cfg.n_loops if n_loops is None else check_count("n_loops", n_loops)
    start = 0 if start_at_loop is None else resolve_index("start_at_loop", start_at_loop, total)
    stop = total
    if stop_at_loop is not None and (stop_at_loop != total or isinstance(stop_at_loop, bool)):
        stop = resolve_index("stop_at_loop", stop_at_loop, total)
    if stop < start:
        raise InputError(f"stop_at_loop {stop} comes before start_at_loop {start}: no loop would run.")
    return total, start, stop


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


def check_state(cfg: LoopedConfig, rows: Rows, state: object, seed: object, dtype: torch.dtype) -> None:
    """Raise for an initial state or a seed that can't be that of these rows."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        bound = " and below 2**63" if type(seed) is int and seed > 0 else ""
        raise InputError(f"seed must be an integer of at least 0{bound}, got {seed!r}.")
    if state is None:
        return
    if seed is not None and cfg.draws_state:
        raise InputError("initial_state and seed both given: the state is either given or drawn, so leave one out.")
    shape = (len(rows), rows.longest, cfg.d_model)
    if not isinstance(state, Tensor):
        raise InputError(
            f"initial_state must be a tensor of shape {shape} = [batch, pos, d_model], got {type(state).__name__}."
        )
    by_position = state.ndim == 2 and state.shape[0] >= rows.longest and state.shape[1] == cfg.d_model
    if tuple(state.shape) != shape and not by_position:
        raise InputError(
            f"initial_state must be a tensor of shape {shape} = [batch, pos, d_model], got {tuple(state.shape)}; or "
            f"[pos, d_model] for all rows alike, with at least {rows.longest} positions."
        )
    if state.dtype != dtype:
        raise InputError(f"initial_state is {state.dtype}, the model {dtype}: pass state.to({dtype}).")


def resolve_state(
    cfg: LoopedConfig,
    positions: Int[Tensor, "batch pos"],
    given: Float[Tensor, "batch pos d_model"] | None,
    seed: int | None,
    dtype: torch.dtype,
    training: bool,
) -> tuple[Tensor | None, int | None]:
    """(the state to start from or None for the prelude's output, the seed that drew it)."""
    if given is not None:
        return given.to(positions.device), None
    if not cfg.draws_state:
        seed = None
    elif seed is None and not training:
        seed = DEFAULT_SEED
    return own_state(cfg, positions, seed, dtype), seed


def check_whole_run(run: Run, loops: int = 2) -> None:
    """Raise unless a run goes from the first loop to the last, and has at least so many."""
    if run.start or run.stop != run.n_loops:
        raise InputError("all loops are looked at: leave out start_at_loop and stop_at_loop.")
    if run.n_loops < loops:
        raise InputError(f"this compares loops, and the run has {run.n_loops}: pass n_loops of at least {loops}.")


def check_one_prompt(run: Run, tokens: int = 1) -> None:
    """Raise unless a run is of one prompt without padding, of at least so many tokens."""
    prompts, found = run.tokens.shape
    if prompts != 1:
        raise InputError(
            f"this looks at one prompt, got {prompts}: call it for each, or take measures with tl_looped.observe."
        )
    if not bool(run.attention_mask.all()):
        raise InputError("the prompt has padding, which would count as tokens: pass it without.")
    if found < tokens:
        raise InputError(
            f"the prompt has {found} token, and this needs {tokens}: a single token can only look at itself."
        )
