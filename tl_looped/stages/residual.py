"""The residual stream's shape: tensor functions on streams of any model, [..., pos, d_model].

With TransformerLens: `matrix_entropy(cache["resid_post", layer])`, of a looped model
`matrix_entropy(cache.stack("resid_post"))`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.checks import check_finite, check_floats
from tl_looped.engine.numbers import length, wide


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
