"""How attention spreads: tensor functions on patterns of any model, [..., query, key].

All are NaN where there is a single key: attention then has no choice, and a number would say nothing of the model. With
TransformerLens: `mixing_score(cache["pattern", layer])`, of a looped model `mixing_score(cache.stack("pattern"))`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.attention.patterns import checked_pattern
from tl_looped.engine.checks import check_floats, check_number
from tl_looped.engine.errors import resolve_index


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
    wide = checked_pattern(pattern)
    index = resolve_index("key", key, wide.shape[-1])
    score = wide[..., index].mean(-1)
    return score if wide.shape[-1] > 1 else torch.full_like(score, math.nan)


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
    wide = checked_pattern(pattern)
    score = torch.special.entr(wide).sum(-1).mean(-1)
    return score if wide.shape[-1] > 1 else torch.full_like(score, math.nan)
