"""The logit lens with a loop axis: what the model would say at every loop and layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.engine.checks import check_eval
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.numbers import wide_dtype
from tl_looped.lens.measures import entropy, kl_divergence, log_probs_of, token_rank, top_ids
from tl_looped.lens.reads import (
    LensKind,
    LensSite,
    Place,
    Positions,
    Reads,
    check_kind,
    check_rows,
    choose_reads,
    chunks,
    converter,
    read_states,
    real_positions,
)
from tl_looped.lens.result import LoopLensResult
from tl_looped.lens.targets import Targets, resolve_targets, top_tokens
from tl_looped.lens.tuned import TunedLens
from tl_looped.model import LoopedModel, check_looped


def loop_lens(
    model: LoopedModel,
    input: str | list[str] | Tensor,
    n_loops: int | None = None,
    *,
    kind: LensKind = "exact",
    site: LensSite = "state",
    loops: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    positions: Positions = -1,
    targets: Targets = None,
    top_k: int = 5,
    translator: TunedLens | None = None,
    **options: Any,
) -> LoopLensResult:
    """What the model would say at every loop (and layer), measured against what it says in the end.

    A state x is read by

    - "exact": what the model outputs if it stops there. For a state that leaves a loop: final norm, coda, final norm,
      head (Huginn); coda, final norm, head (retrofitted models); head (Ouro, whose state is normed already). That
      equals a run with t + 1 loops. A residual stream within a loop is taken as if it left the loop: the layers (and,
      at resid_mid, the MLP) that would come after it in its loop are not run, the norm that closes a loop is.
    - "direct": final norm and head, on any residual stream; the coda is not run. On Ouro's state no second norm.
    - "coda": "exact", for models that have a coda; the others refuse. The name that the literature uses.
    - "tuned": "direct", on the state translated by `translator`.

    The run is made once. Logits of one place are formed for a piece of the positions at a time and never kept.

    Args:
        model: the model.
        input: text, texts, or token ids [batch, pos].
        n_loops: loops to run; None for the count it was trained with.
        kind: how a state is read.
        site: "state" (leaving each loop), or "resid_pre", "resid_mid", "resid_post" of the core layers.
        loops, layers: which to read; None for all. Negative numbers count from the end.
        positions: an index, several, a slice, or None for all; the last by default, as in TransformerLens.
        targets: tokens to follow: a text that is one token, an id, or several of them, everywhere; a tensor of ids
            [batch] or [batch, pos] (of the positions read), one for each row; None: what the run itself says at last.
        top_k: how many of the most probable tokens to keep.
        translator: for kind "tuned".
        options: `initial_state`, `seed`, `attention_mask`, `position_ids`, `prepend_bos`, `padding_side`, as in
            `LoopedModel.forward`.

    Raises:
        InputError: before the run; the message says what to change.

    Source:
        Logit lens: nostalgebraist 2020; coda lens and rank trajectories over loops: arXiv 2507.02199; exact read-outs:
        arXiv 2502.05171, 2510.25741.
    """
    check_eval(check_looped(model))
    run = model.batch(input, n_loops, **options)
    check_kind(model, kind, translator is not None)
    reads = choose_reads(model, run, site, loops, layers, positions)
    check_rows(run, reads)
    if translator is not None:
        if not isinstance(translator, TunedLens):
            raise InputError(f"translator must be a TunedLens, as fit_tuned_lens gives it, got {translator!r}.")
        translator.check(model, run, reads)
    kept_top = min(check_count("top_k", top_k), model.cfg.d_vocab)
    ids, names = resolve_targets(model, run, reads, targets)
    before = {t - 1 for t in reads.loops if t > 0}  # KL to the previous loop, though it is not among those asked for
    translate = None if translator is None else translator.translate
    states, final = read_states(model, run, reads, converter(model, run, reads, kind, translate), before)
    ids = top_tokens(final) if ids is None else ids
    values = _measure(model, reads, states, final, ids, kept_top)
    real = real_positions(run, reads)
    for name, value in values.items():
        trailing = value.ndim - len(reads.axes)
        nothing = float("nan") if value.is_floating_point() else -1
        values[name] = value.masked_fill(~real.reshape(*real.shape, *(1,) * trailing), nothing).cpu()
    return LoopLensResult(
        made_by={"model": model.cfg.model_name, **run.describe(), "kind": kind},
        site=site,
        loops=reads.loops,
        layers=reads.layers,
        positions=reads.positions,
        tokens=run.tokens.cpu(),
        real=real.cpu(),
        target_ids=ids.cpu(),
        target_names=names,
        texts=_texts(model, run.tokens, values["top_ids"], ids),
        **values,
    )


@torch.no_grad()
def _measure(
    model: LoopedModel,
    reads: Reads,
    states: dict[Place, Float[Tensor, "batch pos d_model"]],
    final: Float[Tensor, "batch pos d_vocab"],
    targets: Int[Tensor, "batch pos target"],
    top_k: int,
) -> dict[str, Tensor]:
    """Every measure, [*axes] or [*axes, top or target]; logits of a piece of the rows exist for two loops at a time."""
    n_layers = 1 if reads.layers is None else len(reads.layers)
    batch, pos, n_targets = targets.shape
    shape = (len(reads.loops), n_layers, batch * pos)
    floats = {name: final.new_full(shape, float("nan"), dtype=wide_dtype(final.dtype)) for name in _SCALARS}
    floats |= {"top_probs": final.new_zeros(*shape, top_k, dtype=wide_dtype(final.dtype))}
    floats |= {"target_probs": final.new_zeros(*shape, n_targets, dtype=wide_dtype(final.dtype))}
    ints = {name: targets.new_zeros(*shape, n) for name, n in (("top_ids", top_k), ("target_ranks", n_targets))}
    rows, ids = final.flatten(0, 1), targets.flatten(0, 1)
    flat = {place: state.flatten(0, 1) for place, state in states.items()}
    for piece in chunks(batch * pos, final.shape[-1]):
        last = log_probs_of(rows[piece])
        for index in range(n_layers):
            previous: tuple[int, Tensor] | None = None
            for loop in sorted(t for t, i in flat if i == index):
                logits = model.transformer.unembed(flat[loop, index][piece])
                log_probs = log_probs_of(logits)
                _check_numbers(log_probs, reads, loop, index)
                if loop in reads.loops:
                    at = (reads.loops.index(loop), index, piece)
                    floats["entropy"][at] = entropy(log_probs)
                    floats["kl_to_final"][at] = kl_divergence(last, log_probs)
                    if previous is not None and previous[0] == loop - 1:
                        floats["kl_to_previous"][at] = kl_divergence(previous[1], log_probs)
                    top = top_ids(logits, top_k)
                    floats["top_probs"][at], ints["top_ids"][at] = log_probs.gather(-1, top).exp(), top
                    floats["target_probs"][at] = log_probs.gather(-1, ids[piece]).exp()
                    ints["target_ranks"][at] = token_rank(logits, ids[piece])
                previous = (loop, log_probs)
    values = {name: value.unflatten(2, (batch, pos)) for name, value in (floats | ints).items()}
    return values if reads.layers is not None else {name: value.squeeze(1) for name, value in values.items()}


_SCALARS = ("entropy", "kl_to_final", "kl_to_previous")


def _check_numbers(log_probs: Tensor, reads: Reads, loop: int, index: int) -> None:
    if bool(log_probs.isnan().any()):
        raise InputError(
            f"the read-out of {reads.names(loop)[index]!r} is not a number (NaN): look for NaN or infinity in the "
            "weights, the dtype or a hook there or before."
        )


def _texts(model: LoopedModel, *ids: Tensor) -> dict[str, str]:
    """The text of every token id that occurs, by the id as text; a model without tokenizer shows ids."""
    seen = sorted({one for tensor in ids for one in tensor.unique().tolist() if one >= 0})
    return dict(zip(map(str, seen), model.token_texts(torch.tensor(seen)), strict=True))
