"""circuitsvis views of what a lens reads, which show themselves in a notebook."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.lens.lens import loop_lens
from tl_looped.lens.reads import LensKind
from tl_looped.lens.result import LoopLensResult
from tl_looped.model import LoopedModel
from tl_looped.viz.readout import PLACES
from tl_looped.viz.tokens import LoopTokens, token_log_probs, top_tokens_table


def view_prompt(
    model: LoopedModel,
    input: str | Tensor,
    n_loops: int | None = None,
    *,
    loop: int = -1,
    kind: LensKind = "exact",
    top_k: int = 10,
    **options: Any,
) -> LoopTokens:
    """How probable each token of a prompt is after every loop, given what comes before it; the reader picks the loop.

    A probability too small for its number format (1e-38 in float32) is shown as the smallest that it has.

    Args:
        model, n_loops, kind, top_k, options: as in `loop_lens`; the states that leave the loops are read.
        input: one prompt of at least two tokens, without padding.
        loop: the loop to show first.

    Raises:
        InputError: several prompts, one that is too short or padded, or what `loop_lens` refuses.
    """
    run = model.batch(input, n_loops, **options)
    batch, pos = run.tokens.shape
    if batch != 1 or pos < 2 or not bool(run.attention_mask.all()):
        padded = "" if bool(run.attention_mask.all()) else ", some of them padding"
        raise InputError(
            f"the view is of one prompt of at least two tokens, got {batch} of {pos} tokens{padded}: "
            "pass one at a time, as text or without its padding."
        )
    start = resolve_index("loop", loop, run.n_loops)
    positions, targets = slice(0, -1), run.tokens[:, 1:]
    result = loop_lens(model, input, n_loops, kind=kind, positions=positions, targets=targets, top_k=top_k, **options)
    prompt = [result.text(int(token)) for token in result.tokens[0]]
    probs, ranks, tops = (x[:, 0] for x in (result.target_probs, result.target_ranks, result.top_probs))
    return token_log_probs(
        prompt, _log(probs[..., 0]), ranks[..., 0], _log(tops), result.top_tokens(), result.loops, start
    )


def view_top_tokens(result: LoopLensResult, batch: int = 0) -> LoopTokens:
    """A table of one prompt's top tokens, a column for each position read; the reader picks loop and layer.

    Args:
        result: of `loop_lens`.
        batch: the prompt.
    """
    tops, probs = result.top_tokens(batch), result.top_probs.select(result.axes.index("batch"), batch)
    if result.layers is None:
        return top_tokens_table(probs[:, None], [[loop] for loop in tops], result.loops, ["state"], result.positions)
    places = [f"{PLACES[result.site]} {layer}" for layer in result.layers]
    return top_tokens_table(probs, tops, result.loops, places, result.positions)


def _log(probs: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    return probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
