"""The tokens whose probability and rank a lens follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.engine.errors import InputError
from tl_looped.engine.runs import Run
from tl_looped.lens.reads import Reads
from tl_looped.model import LoopedModel

Targets = str | int | Sequence[str | int] | Tensor | None

FINAL = "final top token"
PER_ROW = "target"


def target_name(target: str | int) -> str:
    """What a target is called in a result: a text as it is; an id so that it is not taken for a text of digits."""
    return target if isinstance(target, str) else f"id {target}"


def resolve_targets(
    model: LoopedModel, run: Run, reads: Reads, targets: Targets
) -> tuple[Int[Tensor, "batch pos target"] | None, tuple[str, ...]]:
    """(ids at every position read, names); ids are None where they are the run's own top tokens, not known before it.

    Raises:
        InputError: a text that is not one token, an id out of the vocabulary, or a tensor of the wrong shape.
    """
    batch, pos = run.tokens.shape[0], len(reads.positions)
    if targets is None:
        return None, (FINAL,)
    if isinstance(targets, Tensor):
        return _per_row(targets, batch, pos, model.cfg.d_vocab).to(run.tokens.device), (PER_ROW,)
    wanted = [targets] if isinstance(targets, (str, int)) else list(targets)
    if not wanted:
        raise InputError("targets is empty: leave it out to follow the run's own top token.")
    ids = [_one(model, target) for target in wanted]
    names = tuple(target_name(target) for target in wanted)
    if len(set(ids)) < len(ids):
        raise InputError(f"targets names a token twice: {list(wanted)}.")
    return torch.tensor(ids, device=run.tokens.device).expand(batch, pos, -1), names


def _one(model: LoopedModel, target: str | int) -> int:
    if isinstance(target, str):
        return model.to_single_token(target)
    if isinstance(target, bool) or not isinstance(target, int):
        raise InputError(f"a target must be a text or a token id, got {target!r}.")
    if not 0 <= target < model.cfg.d_vocab:
        raise InputError(f"target {target} is out of the vocabulary [0, {model.cfg.d_vocab}).")
    return target


def _per_row(targets: Tensor, batch: int, pos: int, d_vocab: int) -> Int[Tensor, "batch pos target"]:
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise InputError(f"targets must be token ids, got {targets.dtype}.")
    if targets.shape == (batch,):
        targets = targets[:, None].expand(batch, pos)
    if targets.shape != (batch, pos):
        raise InputError(
            f"a tensor of targets has one for each row, [{batch}], or for each row and position read, "
            f"[{batch}, {pos}], got shape {tuple(targets.shape)}: pass a list to follow several tokens everywhere."
        )
    low, high = (int(end) for end in torch.aminmax(targets))
    if low < 0 or high >= d_vocab:
        raise InputError(f"target {low if low < 0 else high} is out of the vocabulary [0, {d_vocab}).")
    return targets.long()[..., None]


def top_tokens(logits: Float[Tensor, "batch pos d_vocab"]) -> Int[Tensor, "batch pos 1"]:
    """The run's own top tokens, as targets."""
    return logits.argmax(-1, keepdim=True)
