"""What a loop makes of the state, where that takes weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class UpdateGate(nn.Module):
    """A = exp(−δ ⊙ exp(a)) with δ = softplus(W₂ W₁ step + b): how far every component of the state moves, in (0, 1).

    Args:
        d_model: components of the state.
        rank: rows of W₁.

    Source:
        arXiv 2605.11011.
    """

    def __init__(self, d_model: int, rank: int):
        super().__init__()
        self.inner = nn.Linear(d_model, rank, bias=False)
        self.outer = nn.Linear(rank, d_model)
        self.log_rate = nn.Parameter(torch.ones(d_model))

    def forward(self, step: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims d_model"]:
        """The gate, from the step that the layers propose."""
        return (-F.softplus(self.outer(self.inner(step))) * self.log_rate.exp()).exp()
