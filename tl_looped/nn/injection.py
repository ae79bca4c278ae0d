"""How a loop mixes the prelude's output into the state, where that takes more than one linear map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_looped.engine.hooks import HookGroup


class DiagonalInjection(nn.Module):
    """a ⊙ x + δ ⊙ B e with δ = softplus(b) and a = exp(−δ ⊙ exp(A)): every component of the state shrinks by itself.

    Args:
        d_model: components of the state.

    Source:
        arXiv 2604.12946.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.log_rate = nn.Parameter(torch.ones(d_model))
        self.step_bias = nn.Parameter(torch.zeros(d_model))
        self.input = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], e: Float[Tensor, "batch pos d_model"], loop: int, hooks: HookGroup
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the first core layer reads; `hooks` see a and δ, at every position."""
        kept = hooks.hook_injection_decay(self.decay().expand_as(x), loop) * x
        return kept + hooks.hook_injection_step(self.step().expand_as(x), loop) * self.input(e)

    def step(self) -> Float[Tensor, " d_model"]:
        """δ: how much of B e every component takes."""
        return F.softplus(self.step_bias)

    def decay(self) -> Float[Tensor, " d_model"]:
        """a: how much every component keeps."""
        return (-self.step() * self.log_rate.exp()).exp()
