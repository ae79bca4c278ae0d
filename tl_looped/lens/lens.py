"""The logit lens with a loop axis: what the model would say at every loop and layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.engine.checks import check_eval
from tl_looped.engine.errors import InputError, check_count, resolve_index
from tl_looped.engine.numbers import log_probs_of
from tl_looped.engine.runs import Prompts, RunOptions, check_one_prompt, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.lens.jacobian import JacobianLens
from tl_looped.lens.measures import entropy, kl_divergence, token_rank, top_ids
from tl_looped.lens.reads import (
    TRANSLATED,
    LensKind,
    LensSite,
    Place,
    Positions,
    Reads,
    Targets,
    Translator,
    check_kind,
    choose_reads,
    converter,
    read_states,
    resolve_targets,
)
from tl_looped.lens.result import LogitLens
from tl_looped.lens.tuned import TunedLens
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe.batch import chunks
from tl_looped.viz.tokens import LoopTokens, token_log_probs


@with_run_options
def logit_lens(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    kind: LensKind = "exact",
    site: LensSite = "state",
    loops: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    positions: Positions = -1,
    targets: Targets = None,
    top_k: int = 5,
    translator: Translator | None = None,
    stack: str | None = None,
    **options: Unpack[RunOptions],
) -> LogitLens:
    """What the model would say at every loop (and layer), measured against what it says in the end.

    A state x is read by

    - "exact": what the model outputs if it stops there. For a state that leaves a loop: final norm, coda, final norm,
      head (Huginn); coda, final norm, head (retrofitted models); head (Ouro, whose state is normed already). That
      equals a run with t + 1 loops. A residual stream within a loop is taken as if it left the loop: the layers (and,
      at resid_mid, the MLP) that would come after it in its loop are not run, the norm that closes a loop is.
    - "direct": final norm and head, on any residual stream; the coda is not run. On Ouro's state no second norm.
    - "coda": "exact", for models that have a coda; the others refuse. The name that the literature uses.
    - "tuned": "direct", on the state translated by `translator`.
    - "jacobian": final norm and head, on the state carried to what that norm reads by `translator`, a `JacobianLens`.

    The run is made once. Logits of one place are formed for a piece of the positions at a time and never kept.

    Args:
        model: the model.
        prompts: in any form; they run as one padded batch.
        n_loops: loops to run; None for the count it was trained with.
        kind: how a state is read.
        site: "state" (leaving each loop), or "resid_pre", "resid_mid", "resid_post" of the core layers.
        loops, layers: which to read; None for all. Negative numbers count from the end.
        positions: an index, several, a slice, or None for all; the last by default, as in TransformerLens.
        targets: tokens to follow: a text that is one token, an id, or several of them, everywhere; a tensor of ids
            [batch] or [batch, pos] (of the positions read), one for each row; None: what the run itself says at last.
        top_k: how many of the most probable tokens to keep.
        translator: for the kinds "tuned" and "jacobian".
        stack: which of two stacks that loop to read, and whose loops and layers count; None for the one whose state the
            head reads, or the only core.
        options: see `RunOptions`.

    Raises:
        InputError: before the run; the message says what to change.

    Source:
        Logit lens: nostalgebraist 2020; coda lens and rank trajectories over loops: arXiv 2507.02199; exact read-outs:
        arXiv 2502.05171, 2510.25741.
    """
    check_eval(check_looped(model, several_stacks=True))
    runs = model.prepare(prompts, n_loops, **options)
    reads = choose_reads(model, runs, site, loops, layers, positions, stack)
    check_kind(model, kind, translator is not None, reads.stack)
    if translator is not None:
        check_translator(translator, kind)
        translator.check(model, runs.counts, reads)
    check_count("top_k", top_k)
    run = model.batch_of(runs)
    real = run.attention_mask[:, list(reads.positions)]
    blind = (~real.any(1)).nonzero().flatten().tolist()
    if blind:
        raise InputError(
            f"rows {blind} have only padding at the positions read: pass padding_side='left' to read the last tokens "
            "of prompts of different length, or positions=None for all."
        )
    ids, names = resolve_targets(model, run.tokens, len(reads.positions), targets)
    read = {*reads.loops, *(t - 1 for t in reads.loops if t)}  # KL to the loop before, though it is not asked for
    if isinstance(translator, JacobianLens):
        read &= {*translator.loops}
    convert = converter(model, run, reads, kind, None if translator is None else translator.translate)
    states, final = read_states(model, run, reads, convert, read)
    ids = final.argmax(-1).view(*real.shape, 1) if ids is None else ids
    values = {}
    for name, value in measure_states(model, reads, states, final, ids.flatten(0, 1), top_k).items():
        value = value.unflatten(0, reads.shape).unflatten(len(reads.shape), real.shape)
        padding = (~real).view(*real.shape, *(1,) * (value.ndim - len(reads.shape) - 2))
        values[name] = value.masked_fill(padding, float("nan") if value.is_floating_point() else -1).cpu()
    return LogitLens(
        made_by={"model": model.cfg.model_name, **run.describe(), "kind": kind, **model.cfg.made_of(reads.stack)},
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


def check_translator(translator: object, kind: str) -> None:
    """An error for a translator that is not of this kind of lens."""
    wanted = TunedLens if kind == "tuned" else JacobianLens
    if not isinstance(translator, wanted):
        raise InputError(
            f"translator must be a {wanted.__name__}, as {TRANSLATED[kind]} gives it, for kind={kind!r}, "
            f"got {translator!r}."
        )


@torch.no_grad()
def measure_states(
    model: LoopedModel,
    reads: Reads,
    states: dict[Place, Float[Tensor, "rows d_model"]],
    final: Float[Tensor, "rows d_vocab"],
    targets: Int[Tensor, "rows target"],
    top_k: int,
) -> dict[str, Tensor]:
    """Every measure, [place, rows, ...]; log probabilities of a piece of the rows exist for two loops at a time."""
    found: dict[Place, list[dict[str, Tensor]]] = defaultdict(list)
    for piece in chunks(*final.shape):
        last = log_probs_of(final[piece])
        for layer, site in reads.streams.items():
            before: dict[int, Tensor] = {}
            for loop in sorted(t for t, of in states if of == layer):
                logits = model.transformer.unembed(states[loop, layer][piece])
                log_probs = log_probs_of(logits)
                if bool(log_probs.isnan().any()):
                    raise InputError(
                        f"the read-out of {site.at(loop).name!r} is not a number (NaN): look for NaN or infinity in "
                        "the weights, the dtype or a hook there or before."
                    )
                if loop in reads.loops:
                    found[loop, layer].append(
                        _said(logits, log_probs, last, before.get(loop - 1), targets[piece], top_k)
                    )
                before = {loop: log_probs}
    places = [found[loop, layer] for loop in reads.loops for layer in reads.streams]
    return {name: torch.stack([torch.cat([part[name] for part in parts]) for parts in places]) for name in places[0][0]}


def _said(
    logits: Float[Tensor, "rows d_vocab"],
    log_probs: Float[Tensor, "rows d_vocab"],
    last: Float[Tensor, "rows d_vocab"],
    before: Float[Tensor, "rows d_vocab"] | None,
    targets: Int[Tensor, "rows target"],
    top_k: int,
) -> dict[str, Tensor]:
    """What one read-out says, in numbers."""
    top = top_ids(logits, min(top_k, logits.shape[-1]))
    kl_to_final = kl_divergence(last, log_probs)
    return {
        "entropy": entropy(log_probs),
        "kl_to_final": kl_to_final,
        "kl_to_previous": torch.full_like(kl_to_final, float("nan"))
        if before is None
        else kl_divergence(before, log_probs),
        "top_ids": top,
        "top_probs": log_probs.gather(-1, top).exp(),
        "target_probs": log_probs.gather(-1, targets).exp(),
        "target_ranks": token_rank(logits, targets),
    }


def _texts(model: LoopedModel, *ids: Tensor) -> dict[str, str]:
    """The text of every token id that occurs, by the id as text; a model without tokenizer shows ids."""
    seen = sorted({one for tensor in ids for one in tensor.unique().tolist() if one >= 0})
    return dict(zip(map(str, seen), model.token_texts(torch.tensor(seen)), strict=True))


@with_run_options
def view_prompt(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    loop: int = -1,
    kind: LensKind = "exact",
    top_k: int = 10,
    translator: Translator | None = None,
    **options: Unpack[RunOptions],
) -> LoopTokens:
    """How probable each token of a prompt is after every loop, given what comes before it; the reader picks the loop.

    A probability too small for its number format (1e-38 in float32) is shown as the smallest that it has.

    Args:
        model, n_loops, kind, top_k, translator, options: as in `logit_lens`; the states that leave the loops are read.
        prompts: one of at least two tokens, without padding, in any form.
        loop: the loop to show first.

    Raises:
        InputError: several prompts, one that is too short or padded, or what `logit_lens` refuses.
    """
    check_eval(check_looped(model, several_stacks=True))
    runs = model.prepare(prompts, n_loops, **options)
    model.cfg.check_causal("view_prompt")
    run = model.batch_of(runs)
    check_one_prompt(run)
    if run.prefix is not None:
        raise InputError("tokens of a prefix see each other, so they are not predicted: leave the prefix out.")
    if run.tokens.shape[1] < 2:
        raise InputError("the prompt has one token, which nothing predicts: pass one of at least two.")
    start = resolve_index("loop", loop, run.n_loops)
    reads = {"positions": slice(0, -1), "targets": run.tokens[:, 1:]}
    result = logit_lens(model, runs, kind=kind, top_k=top_k, translator=translator, **reads)
    prompt = [result.text(int(token)) for token in result.tokens[0]]
    probs, ranks, tops = (x[:, 0] for x in (result.target_probs, result.target_ranks, result.top_probs))
    return token_log_probs(
        prompt, _log(probs[..., 0]), ranks[..., 0], _log(tops), result.top_tokens(), result.loops, start
    )


def _log(probs: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    return probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
