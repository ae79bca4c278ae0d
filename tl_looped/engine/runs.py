"""A run: checked input, made into what the model needs. Nothing is computed before all of it is right."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypedDict, TypeVar, Union, cast, get_type_hints

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.habits import no_argument
from tl_looped.engine.numbers import wide
from tl_looped.engine.prompts import Rows
from tl_looped.engine.schedule import LoopCount
from tl_looped.engine.span import Parted, Span
from tl_looped.engine.state import own_state
from tl_looped.engine.tokens import PaddingSide

DEFAULT_SEED = 0
"""Seed of the initial state where a model draws one at random and the caller says nothing."""

Prompts = Union[str, "os.PathLike[str]", Tensor, Mapping[str, Any], Iterable[Any], "Runs"]
"""What is run: text, token ids, a BatchEncoding, chat messages, a list of these, a Path to a file, a dataset, or what
`model.prepare` made of them. `engine.prompts.read_rows` says how each is read."""


@dataclass(frozen=True)
class Run(Parted):
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
        state: the state to start from, [batch, pos, d_state]; None where it is the prelude's output.
        seed: the seed of a drawn state; None where none was drawn from a seed.
        state_given: whether the caller gave the state.
        l_cycles: of two stacks that loop, how often the fast one runs in each loop; None where one does.
        prefix: tokens that see each other in both directions, [batch, pos]; None where none do.
        step_sizes: the step size of every loop of the whole run; None for a model whose loops have no time.
        start_at: the name of the stream that it starts from, at a layer; None where it starts at a loop's beginning.
        stop_at: the name of the stream that it returns, at a layer; None where it goes on.
        stream: what it starts from there, [batch, pos, d_model].
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Tensor
    visible: Tensor | None
    position_ids: Tensor
    n_loops: int
    start: int
    stop: int
    reads_out: bool
    state: Float[Tensor, "batch pos d_state"] | None
    seed: int | None
    state_given: bool
    l_cycles: int | None = None
    prefix: Tensor | None = None
    step_sizes: tuple[float, ...] | None = None
    start_at: str | None = None
    stop_at: str | None = None
    stream: Float[Tensor, "batch pos d_model"] | None = None

    def span(self, cfg: LoopedConfig) -> Span:
        """From where to where it goes."""
        end = None if self.reads_out else self.stop_at or self.stop
        return Span(cfg.schedule(self.counts), self.start_at or self.start, end)

    @property
    def counts(self) -> LoopCount:
        """What `n_loops` stands for this run: its loops, and with two stacks that loop both counts."""
        return self.n_loops if self.l_cycles is None else (self.n_loops, self.l_cycles)

    @property
    def last_positions(self) -> Int[Tensor, " batch"]:
        """Where each row's last real token is."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return places.expand_as(self.tokens).masked_fill(~self.attention_mask, -1).amax(-1)

    @property
    def predicts(self) -> Bool[Tensor, "batch pos_but_last"]:
        """Which positions predict the token behind them: both are real, and it is not seen, as in a prefix."""
        both = self.attention_mask[:, :-1] & self.attention_mask[:, 1:]
        return both if self.prefix is None else both & ~(self.prefix[:, :-1] & self.prefix[:, 1:])

    def describe(self) -> dict[str, object]:
        """Plain values that say what made a result."""
        source = "given" if self.state_given else "model" if self.seed is None else f"seed {self.seed}"
        more: dict[str, object] = {} if self.l_cycles is None else {"l_cycles": self.l_cycles}
        if self.prefix is not None:
            more["prefix_lengths"] = tuple(self.prefix.sum(-1).tolist())
        return {
            "n_loops": self.n_loops,
            "start_at_loop": self.start,
            "stop_at_loop": self.stop,
            "initial_state": source,
            **{name: at for name, at in (("start_at", self.start_at), ("stop_at", self.stop_at)) if at is not None},
            **({} if self.step_sizes is None else {"step_sizes": list(self.step_sizes)}),
            **more,
        }


class RunOptions(TypedDict, total=False):
    """What every call that runs a model takes besides prompts and `n_loops`, by name.

    Attributes:
        initial_state: the state that enters the first loop, in the model's dtype: [batch, pos, d_model], or
            [pos, d_model] for the same in all rows, counted over their real tokens. (Of two states both, side by side:
            what a stopped run returns.)
        seed: seed of the drawn initial state, where the model draws one; None for 0. Every position has its own draw,
            the same in all rows, so a prompt's numbers do not depend on its batch.
        attention_mask: which tokens are real, [batch, pos]; or who may attend to whom in full, [batch, query, key].
        position_ids: positions for rotary, [batch, pos]; None: counted over real tokens.
        prefix_length: of a model trained with prefixes: so many tokens of every prompt, or of each, see each other in
            both directions; those behind see what comes before them. None: none do.
        token_type_ids: the same token by token, [batch, pos]: 1 for those that see each other.
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
    prefix_length: int | Sequence[int] | None
    token_type_ids: Tensor | None
    prepend_bos: bool | None
    padding_side: PaddingSide | None
    field: str | None
    limit: int | None
    step_sizes: Sequence[float] | None


Call = TypeVar("Call", bound=Callable[..., Any])


def with_run_options(function: Call) -> Call:
    """`writing_out` of `RunOptions`."""
    return writing_out(function, RunOptions)


def writing_out(function: Call, options: type) -> Call:
    """Write out `**options: Unpack[...]` in a function's signature, and refuse other names in its own words.

    Type checkers read the names from `Unpack`; help() and notebooks read them from here.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    kinds = get_type_hints(options)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kinds[name])
        for name in kinds
        if name not in signature.parameters
    ]
    return _refusing_others(function, signature.replace(parameters=[*own, *more]))


def with_named_arguments(function: Call) -> Call:
    """Refuse arguments that a function does not have in its own words, with the call that does it here."""
    return _refusing_others(function, inspect.signature(function))


def _refusing_others(function: Call, signature: inspect.Signature) -> Call:
    known = list(signature.parameters)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise InputError(no_argument(function.__name__, unknown[0], known))
        return function(*args, **kwargs)

    call.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return cast(Call, call)


@dataclass(frozen=True, eq=False)
class Runs(Parted):
    """Prompts and how to run them, checked: what `model.prepare` makes, and every call takes in place of prompts.

    Attributes:
        rows: the prompts as tokens.
        n_loops: loop count of the whole run.
        start: the first loop that runs.
        stop: the loop after the last one that runs.
        reads_out: whether runs go on to logits.
        initial_state: as given, [batch, pos, d_state] in the layout of the padded rows, or [pos, d_state]; else None.
        seed: as given.
        position_ids: as given, in the layout of the padded rows.
        visible: who may attend to whom, as given, [batch, query, key].
        l_cycles: of two stacks that loop, how often the fast one runs in each loop; None where one does.
        prefix: tokens that see each other in both directions, [batch, pos] in the layout of the padded rows.
        step_sizes: the step size of every loop of the whole run; None for a model whose loops have no time.
        start_at, stop_at, stream: as in `Run`, the stream in the layout of the padded rows.
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
    l_cycles: int | None = None
    prefix: Tensor | None = None
    step_sizes: tuple[float, ...] | None = None
    start_at: str | None = None
    stop_at: str | None = None
    stream: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        loops = f"loops {self.start} to {self.stop - 1} of {self.n_loops}" if self.stop > self.start else "no loop"
        loops += "".join(f", {word} {at}" for word, at in (("from", self.start_at), ("before", self.stop_at)) if at)
        loops += "" if self.l_cycles is None else f" with {self.l_cycles} L cycles"
        return f"Runs({len(self)} prompts, up to {self.rows.longest} tokens, {loops})"

    @property
    def counts(self) -> LoopCount:
        """See `Run`."""
        return self.n_loops if self.l_cycles is None else (self.n_loops, self.l_cycles)

    @property
    def whole(self) -> bool:
        """Whether they go from the first loop to the logits."""
        return self.start == 0 and self.reads_out and self.start_at is None

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
    tokens: Int[Tensor, "batch pos"], given: Tensor | None, padding: Tensor | None, prefix: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(attention_mask [batch, pos], visible [batch, query, key] or None where the causal triangle does).

    `given` is the caller's mask, [batch, pos], or [batch, query, key] to say who sees whom in full; `padding`, True for
    real tokens, what is known without it, and beside a full mask what still tells which tokens count; `prefix`, True
    for tokens that see each other in both directions. A mask of
    [batch, query, key] costs memory and the fastest kernels, so it is made only where real tokens would else see
    padding: where that comes before them. Behind them it is nothing that they see. A query that would see nothing, as
    padding at the left, sees itself: patterns stay finite and sum to one.
    """
    batch, pos = tokens.shape
    if given is not None and not bool(((given == 0) | (given == 1)).all()):
        raise InputError("attention_mask must be of zeros and ones: 1 for tokens that are seen, 0 for others.")
    mask = padding if given is None else given.to(tokens.device).bool()
    if mask is None and prefix is None:
        return torch.ones_like(tokens, dtype=torch.bool), None
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    if mask.ndim != 2:
        check_full_mask(mask, batch, pos)
        real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else padding
        visible = mask.clone()
    else:
        if prefix is None and not bool((mask[:, 1:] & ~mask[:, :-1]).any()):  # no real token behind one that is not
            return mask, None
        sees = torch.ones(pos, pos, dtype=torch.bool, device=mask.device).tril()[None]
        if prefix is not None:
            sees = sees | (prefix[:, :, None] & prefix[:, None, :])
        real, visible = mask, sees & mask[:, None, :]
    visible.diagonal(dim1=1, dim2=2).logical_or_(~visible.any(-1))
    return real, visible


def resolve_prefix(
    cfg: LoopedConfig, prompts: Prompts, rows: Rows, options: RunOptions, full: Tensor | None
) -> Bool[Tensor, "batch pos"] | None:
    """Which tokens see each other in both directions, in the layout of the padded rows; None where none do.

    Raises:
        InputError: the model was not trained so, or what is given is not of these rows; the message says which prompt.
    """
    length, kinds = options.get("prefix_length"), options.get("token_type_ids")
    if cfg.n_token_types:  # here they are of kinds that have an embedding, and say nothing of who sees whom
        kinds = prompts.get("token_type_ids") if kinds is None and isinstance(prompts, Mapping) else kinds
        if kinds is not None and bool(torch.as_tensor(kinds).any()):
            raise InputError(
                f"token_type_ids has tokens of another kind than 0, which is not implemented for {cfg.model_name}: "
                "leave it out, and all are of kind 0."
            )
        kinds = None
    given = [name for name, value in (("prefix_length", length), ("token_type_ids", kinds)) if value is not None]
    if given and not cfg.prefix_lm:
        raise InputError(
            f"{cfg.model_name} was not trained with prefixes (cfg.prefix_lm): leave out {given[0]}, or say who sees "
            "whom with attention_mask=, [batch, query, key]."
        )
    if given and full is not None:
        raise InputError(f"attention_mask says who sees whom in full: leave out {given[0]}.")
    if len(given) == 2:
        raise InputError("prefix_length and token_type_ids say the same: leave one out.")
    if kinds is None and length is None and cfg.prefix_lm and isinstance(prompts, Mapping):
        kinds = prompts.get("token_type_ids")
    if full is not None or (cfg.causal and length is None and kinds is None):
        return None
    _, real = rows.padded()
    if not cfg.causal:
        return real
    if length is not None:
        each = isinstance(length, (list, tuple))
        prefix = _leading(real, list(length) if each else [cast(int, length)] * len(rows))
    else:
        prefix = torch.as_tensor(kinds).cpu()
        prefix = prefix[None] if prefix.ndim == 1 else prefix
        if prefix.shape != real.shape or not bool(((prefix == 0) | (prefix == 1)).all()):
            raise InputError(
                f"token_type_ids must be of zeros and ones and of shape {tuple(real.shape)} = [batch, pos], 1 for "
                f"tokens that see each other, got shape {tuple(prefix.shape)}."
            )
        prefix = prefix.bool() & real
    return prefix if bool(prefix.any()) else None


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], run: Run, per_token: bool = False
) -> Float[Tensor, ""] | Float[Tensor, "batch pos_but_last"]:
    """Cross entropy of the token behind each position, in nats: its mean, or with `per_token` each, 0 where none is."""
    if run.prefix is None:
        return lm_cross_entropy_loss(wide(logits), run.tokens, run.attention_mask, per_token)
    each = lm_cross_entropy_loss(wide(logits), run.tokens, per_token=True).masked_fill(~run.predicts, 0.0)
    return each if per_token else each.sum() / run.predicts.sum()


def check_puzzles(cfg: LoopedConfig, rows: Rows) -> None:
    """Raise unless every prompt begins with the tokens of one puzzle, where the model has puzzles."""
    if cfg.puzzles is None:
        return
    for index in range(len(rows)):
        ids = rows.unpadded(index)
        of_puzzle = ids[: cfg.puzzles.rows] - cfg.d_vocab
        puzzle = max(0, int(of_puzzle[0])) // cfg.puzzles.rows
        begins = ids[: cfg.puzzles.rows].tolist() == cfg.puzzle_tokens(puzzle)
        if not begins or bool((ids[cfg.puzzles.rows :] >= cfg.d_vocab).any()):
            raise InputError(
                f"prompt {index} must begin with the tokens of one puzzle, and have them nowhere else: put "
                f"model.cfg.puzzle_tokens(puzzle) before it, such as {cfg.puzzle_tokens(0)}."
            )


def tell_of_prefixes(cfg: LoopedConfig) -> None:
    """Say that a model that was trained with prefixes runs without one."""
    warnings.warn(
        f"{cfg.model_name} was trained with a prefix whose tokens see each other in both directions, and none is "
        "given, so it runs causally: pass prefix_length= or token_type_ids=.",
        stacklevel=4,
    )


def _leading(real: Bool[Tensor, "batch pos"], lengths: Sequence[int]) -> Bool[Tensor, "batch pos"]:
    """The first so many real tokens of every row."""
    if len(lengths) != len(real):
        raise InputError(f"prefix_length has {len(lengths)} lengths for {len(real)} prompts: pass one for each.")
    for index, (length, tokens) in enumerate(zip(lengths, real.sum(-1).tolist(), strict=True)):
        if check_count("prefix_length", length, minimum=0) > tokens:
            raise InputError(f"prefix_length is {length}, but prompt {index} has {tokens} tokens: pass no more.")
    return real & (real.long().cumsum(-1) <= torch.tensor(lengths)[:, None])


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


def check_state(
    cfg: LoopedConfig, rows: Rows, state: object, seed: object, dtype: torch.dtype, to_read: bool = False
) -> None:
    """Raise for an initial state or a seed that can't be that of these rows.

    With `to_read` the state is one that the head reads: of two states that one alone will do.
    """
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        bound = " and below 2**63" if type(seed) is int and seed > 0 else ""
        raise InputError(f"seed must be an integer of at least 0{bound}, got {seed!r}.")
    if state is None:
        return
    if seed is not None and cfg.draws_state:
        raise InputError("initial_state and seed both given: the state is either given or drawn, so leave one out.")
    width, axis = cfg.d_state, "d_model" if cfg.d_state == cfg.d_model else f"{cfg.d_state // cfg.d_model} * d_model"
    if to_read and isinstance(state, Tensor) and state.shape[-1:] == (cfg.d_model,):
        width, axis = cfg.d_model, "d_model"
    shape = (len(rows), rows.longest, width)
    if not isinstance(state, Tensor):
        raise InputError(
            f"initial_state must be a tensor of shape {shape} = [batch, pos, {axis}], got {type(state).__name__}."
        )
    by_position = state.ndim == 2 and state.shape[0] >= rows.longest and state.shape[1] == width
    if tuple(state.shape) != shape and not by_position:
        raise InputError(
            f"initial_state must be a tensor of shape {shape} = [batch, pos, {axis}], got {tuple(state.shape)}; or "
            f"[pos, {axis}] for all rows alike, with at least {rows.longest} positions."
        )
    if state.dtype != dtype:
        raise InputError(f"initial_state is {state.dtype}, the model {dtype}: pass state.to({dtype}).")


def resolve_state(
    cfg: LoopedConfig,
    positions: Int[Tensor, "batch pos"],
    given: Float[Tensor, "batch pos d_state"] | None,
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
    if run.start or run.stop != run.n_loops or run.start_at is not None or run.stop_at is not None:
        raise InputError(f"all loops are looked at: leave out {run.parted_by}.")
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
