"""The stages of inference: tensor functions on activations of any model, and the measures that `observe` takes of them.

Those of attention read patterns [..., query, key], and are NaN where there is a single key: attention then has no
choice, and a number would say nothing of the model. The others read the residual stream, [..., pos, d_model]. With
TransformerLens: `mixing_score(cache["pattern", layer])`, of a looped model `mixing_score(cache.stack("pattern"))`.

`STAGE_MEASURES` are those of arXiv 2604.11791 that depend on the input; prediction and suppression neurons do not, see
`tl_looped.stages.neurons`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.attention.patterns import checked_pattern
from tl_looped.engine.checks import check_finite, check_floats, check_number
from tl_looped.engine.errors import resolve_index
from tl_looped.engine.numbers import length, wide
from tl_looped.observe import Measure


def colsum_concentration(pattern: Float[Tensor, "*dims query key"]) -> Float[Tensor, "*dims"]:
    r"""Whether all queries look at the same few keys: C = 1 + (1 / log S) Σ_j ĉ_j log ĉ_j, ĉ_j = (1 / Q) Σ_i A_ij.

    With S keys and Q queries (Q = S for a whole pattern). 0 where every key gets the same attention, 1 where one gets
    all. The paper prints the unnormalised column sum c where ĉ is meant. A causal pattern of uniform rows is above 0,
    as early keys are seen by more queries.

    Args:
        pattern: attention of each head.

    Returns:
        A share in [0, 1] for each pattern; NaN for a single key, where log S = 0.

    Raises:
        InputError: not patterns.

    Source:
        arXiv 2604.11791, ColSum concentration.
    """
    shares = checked_pattern(pattern).mean(-2)
    keys = shares.shape[-1]
    if keys == 1:
        return torch.full_like(shares[..., 0], math.nan)
    # Rounding may leave the shares' sum a little off one, and the entropy a little outside its range.
    return (1 - torch.special.entr(shares).sum(-1) / math.log(keys)).clamp(0, 1)


def sink_score(pattern: Float[Tensor, "*dims query key"], key: int = 0) -> Float[Tensor, "*dims"]:
    """(1 / Q) Σ_i A_ij: the attention that key j gets, mean over queries.

    The queries before j, who can't see it in a causal model, and query 0, which sees nothing but key 0, count too.

    Args:
        pattern: attention of each head.
        key: j, negative from the end; 0 for the sink that most models have.

    Returns:
        A share in [0, 1] for each pattern; NaN for a single key.

    Raises:
        InputError: not patterns, or no such key.

    Source:
        arXiv 2604.11791, sink score; Gu et al. 2024, arXiv 2410.10781.
    """
    shares = checked_pattern(pattern)
    index = resolve_index("key", key, shares.shape[-1])
    score = shares[..., index].mean(-1)
    return score if shares.shape[-1] > 1 else torch.full_like(score, math.nan)


def sink_rate(
    pattern: Float[Tensor, "*dims head query key"], key: int = 0, threshold: float = 0.3
) -> Float[Tensor, "*dims"]:
    """The share of heads whose sink score at a key is at least a threshold.

    Args:
        pattern: attention of all heads of a layer.
        key: as in `sink_score`.
        threshold: what makes a head a sink head.

    Returns:
        A share in [0, 1] for each layer; NaN for a single key.

    Raises:
        InputError: not patterns of several heads, no such key, or a threshold outside [0, 1].

    Source:
        arXiv 2604.11791, sink rate with threshold 0.3.
    """
    check_floats(pattern, "pattern", "[..., head, query, key]", 3)
    check_number("threshold", threshold, 0.0, 1.0, low_too=True, high_too=True)
    score = sink_score(pattern, key)
    rate = (score >= threshold).to(score.dtype).mean(-1)
    return torch.where(score.isnan().any(-1), math.nan, rate)


def mixing_score(pattern: Float[Tensor, "*dims query key"]) -> Float[Tensor, "*dims"]:
    """(1 / Q) Σ_i Σ_j −A_ij log A_ij: the entropy of each query's attention, mean over queries, in nats.

    0 where every query looks at one key; log S where each looks at all S keys alike. In a causal model query i sees
    i + 1 keys, so at most (1 / S) Σ_i log(i + 1).

    Args:
        pattern: attention of each head.

    Returns:
        Nats for each pattern; NaN for a single key.

    Raises:
        InputError: not patterns.

    Source:
        arXiv 2604.11791, mixing score.
    """
    shares = checked_pattern(pattern)
    score = torch.special.entr(shares).sum(-1).mean(-1)
    return score if shares.shape[-1] > 1 else torch.full_like(score, math.nan)


def matrix_entropy(resid: Float[Tensor, "*dims pos d_model"]) -> Float[Tensor, "*dims"]:
    """Entropy of the tokens' Gram matrix X Xᵀ, −Σ λ_i log λ_i with its eigenvalues made to sum to one, in nats.

    0 where all tokens point along one line, as under one massive activation; log of the smaller of pos and d_model
    where they spread evenly over all directions. In float64, whatever the stream's dtype.

    Args:
        resid: the residual stream of one layer call, all of its tokens real.

    Returns:
        Nats for each prompt, float64; NaN for a single token, and where the stream is zero.

    Raises:
        InputError: no floats [..., pos, d_model], or NaN or infinity in them.

    Source:
        arXiv 2604.11791, residual entropy; matrix-based entropy: Skean et al. 2025, arXiv 2502.02013.
    """
    x = _checked(resid).double()
    # Both Gram matrices have the same eigenvalues but for zeros; the smaller one is faster. Scaling the stream scales
    # them all, and keeps the squares of large activations finite.
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)  # below zero by rounding only
    total = eigenvalues.sum(-1, keepdim=True)
    entropy = torch.special.entr(eigenvalues / total).sum(-1)
    defined = (total[..., 0] > 0) & (x.shape[-2] > 1)
    return torch.where(defined, entropy, math.nan)


def residual_magnitude(resid: Float[Tensor, "*dims pos d_model"]) -> Float[Tensor, "*dims pos"]:
    """‖x‖ of every token, the Euclidean norm of its residual stream; the paper's magnitude is their mean.

    Args:
        resid: the residual stream of one layer call.

    Raises:
        InputError: no floats [..., pos, d_model], or NaN or infinity in them.

    Source:
        arXiv 2604.11791, residual magnitude.
    """
    return length(_checked(resid))


def _checked(resid: Tensor) -> Tensor:
    """The stream in float32 at least."""
    check_finite(check_floats(resid, "resid", "[..., pos, d_model]", 2))
    return wide(resid)


_PATTERN, _RESID = "attn.hook_pattern", "hook_resid_post"

COLSUM = Measure("colsum", "ColSum concentration", "", _PATTERN, colsum_concentration, axes=("head",))
"""Whether all queries look at the same few keys, from 0 to 1."""

SINK = Measure("sink", "sink score of the first token", "", _PATTERN, sink_score, axes=("head",))
"""Attention that the first token gets, mean over queries."""

SINK_RATE = Measure("sink_rate", "sink rate of the first token", "", _PATTERN, sink_rate)
"""Share of heads that give the first token at least 0.3."""

MIXING = Measure("mixing", "mixing score", "nats", _PATTERN, mixing_score, axes=("head",))
"""Entropy of each query's attention, mean over queries."""

RESIDUAL_ENTROPY = Measure("residual_entropy", "residual entropy", "nats", _RESID, matrix_entropy)
"""Matrix-based entropy of the tokens' Gram matrix after each layer."""

MAGNITUDE = Measure("magnitude", "residual magnitude ‖x‖", "L2 norm", _RESID, residual_magnitude, axes=("pos",))
"""Euclidean norm of each token after each layer."""

STAGE_MEASURES = (COLSUM, SINK, SINK_RATE, MIXING, RESIDUAL_ENTROPY, MAGNITUDE)
