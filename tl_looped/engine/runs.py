"""A run: checked input, made into what the model needs. Nothing is computed before all of it is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, check_count, resolve_index
from tl_looped.engine.state import random_state

DEFAULT_SEED = 0
"""Seed of the initial state where a model draws one at random and the caller says nothing."""


@dataclass(frozen=True)
class Run:
    """One run of a model: what goes in, and which loops are run.

    Attributes:
        tokens: token ids, [batch, pos].
        attention_mask: True for real tokens, [batch, pos].
        visible: who may attend to whom, [batch or 1, query, key].
        causal: whether `visible` is the plain causal triangle.
        position_ids: positions for the rotary embedding, [batch or 1, pos].
        n_loops: loop count of the whole run.
        start: the first loop that runs.
        stop: the loop after the last one that runs.
        reads_out: whether the run goes on to logits.
        state: the state to start from, [batch, pos, d_model]; None where it is the prelude's output.
        seed: the seed of a drawn state; None where none was drawn from a seed.
        state_given: whether the caller gave the state.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Tensor
    visible: Tensor
    causal: bool
    position_ids: Tensor
    n_loops: int
    start: int
    stop: int
    reads_out: bool
    state: Float[Tensor, "batch pos d_model"] | None
    seed: int | None
    state_given: bool

    def describe(self) -> dict[str, object]:
        """Plain values that say what made a result."""
        source = "given" if self.state_given else "model" if self.seed is None else f"seed {self.seed}"
        return {
            "n_loops": self.n_loops,
            "start_at_loop": self.start,
            "stop_at_loop": self.stop,
            "initial_state": source,
        }


def check_tokens(tokens: Tensor, cfg: LoopedConfig) -> Int[Tensor, "batch pos"]:
    """Token ids as [batch, pos], int64; an error for anything that is not."""
    if tokens.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise InputError(f"tokens must be integers, got dtype {tokens.dtype}: pass token ids, or text.")
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise InputError(f"tokens must be [batch, pos] with at least one token, got shape {tuple(tokens.shape)}.")
    if tokens.shape[1] > cfg.n_ctx:
        raise InputError(
            f"the prompt has {tokens.shape[1]} tokens, more than the model's context of {cfg.n_ctx}: shorten it."
        )
    low, high = (int(end) for end in torch.aminmax(tokens))
    if low < 0 or high >= cfg.d_vocab:
        raise InputError(f"token id {low if low < 0 else high} is out of the vocabulary [0, {cfg.d_vocab}).")
    return tokens.long()


def padding_mask(
    tokens: Int[Tensor, "batch pos"], tokenizer: PreTrainedTokenizerBase | None
) -> Bool[Tensor, "batch pos"]:
    """True for real tokens, judged by the padding tokens at either end.

    Where padding shares its id with the beginning (or the end) of text, and every row has it there, one of each row's
    run is that and counts as real. A row without one shows that no row has one: then the whole run is padding.
    """
    if tokenizer is None or tokenizer.pad_token_id is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    pad = cast(int, tokenizer.pad_token_id)
    padding = tokens.eq(pad)
    whole = padding.all(-1, keepdim=True)
    leading = _padding_run(padding, pad == tokenizer.bos_token_id)
    trailing = _padding_run((padding & ~whole).flip(-1), pad == tokenizer.eos_token_id).flip(-1)
    return ~(leading | trailing)


def _padding_run(padding: Bool[Tensor, "batch pos"], shared: bool) -> Bool[Tensor, "batch pos"]:
    """The run at the beginning of each row, without its last token where that has a meaning of its own in every row."""
    run = padding.long().cumprod(-1).bool()
    if shared and bool(run[:, 0].all()):
        return torch.cat((run[:, 1:], torch.zeros_like(run[:, :1])), dim=-1)
    return run


def visibility(
    tokens: Int[Tensor, "batch pos"], given: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor, bool]:
    """(attention_mask [batch, pos], visible [batch or 1, query, key], whether it is the plain triangle).

    `given` is the caller's mask, [batch, pos], or [batch, query, key] to say who sees whom in full; `padding` what the
    tokens show. A query that would see nothing, as padding does, sees itself: patterns stay finite and sum to one.
    """
    batch, pos = tokens.shape
    if given is not None and not bool(((given == 0) | (given == 1)).all()):
        raise InputError("attention_mask must be of zeros and ones: 1 for tokens that are seen, 0 for others.")
    triangle = torch.ones(1, pos, pos, dtype=torch.bool, device=tokens.device).tril()
    mask = padding if given is None else given.to(tokens.device).bool()
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool), triangle, True
    if mask.shape == (batch, pos, pos):
        real, visible = torch.ones_like(tokens, dtype=torch.bool), mask
    elif mask.shape == (batch, pos):
        if bool(mask.all()):
            return mask, triangle, True
        real, visible = mask, triangle & mask[:, None, :]
    else:
        raise InputError(
            f"attention_mask must have shape {(batch, pos)}, or {(batch, pos, pos)} to say who sees whom, "
            f"got {tuple(mask.shape)}."
        )
    blind = ~visible.any(-1, keepdim=True)
    return real, visible | (blind & torch.eye(pos, dtype=torch.bool, device=tokens.device)), False


def resolve_positions(mask: Bool[Tensor, "batch pos"], given: Tensor | None) -> Int[Tensor, "batch pos"]:
    """Positions for the rotary embedding and the drawn state: as given, or counted over real tokens."""
    if given is None:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)
    if given.shape != mask.shape or given.is_floating_point() or bool((given < 0).any()):
        raise InputError(
            f"position_ids must be integers of at least 0 and of shape {tuple(mask.shape)}, got {given.dtype} of shape "
            f"{tuple(given.shape)}{', some negative' if bool((given < 0).any()) else ''}."
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


def resolve_state(
    cfg: LoopedConfig,
    positions: Int[Tensor, "batch pos"],
    initial_state: Tensor | None,
    seed: int | None,
    dtype: torch.dtype,
    training: bool,
) -> tuple[Tensor | None, int | None]:
    """(the state to start from or None for the prelude's output, the seed that drew it)."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        bound = " and below 2**63" if type(seed) is int and seed > 0 else ""
        raise InputError(f"seed must be an integer of at least 0{bound}, got {seed!r}.")
    shape = (*positions.shape, cfg.d_model)
    if initial_state is not None:
        if seed is not None and cfg.random_state:
            raise InputError("initial_state and seed both given: the state is either given or drawn, so leave one out.")
        if not isinstance(initial_state, Tensor) or tuple(initial_state.shape) != shape:
            seen = tuple(initial_state.shape) if isinstance(initial_state, Tensor) else type(initial_state).__name__
            raise InputError(f"initial_state must be a tensor of shape {shape} = [batch, pos, d_model], got {seen}.")
        if initial_state.dtype != dtype:
            raise InputError(f"initial_state is {initial_state.dtype}, the model {dtype}: pass state.to({dtype}).")
        return initial_state.to(positions.device), None
    if cfg.initial_state == "prelude":
        return None, None
    if cfg.initial_state == "zeros":
        return torch.zeros(shape, dtype=dtype, device=positions.device), None
    if seed is None and not training:
        seed = DEFAULT_SEED
    return random_state(cfg, positions, seed, dtype), seed
