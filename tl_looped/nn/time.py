"""What layers know of the time of a loop, and what they do with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_WAVES = 128
_LONGEST = 10000.0


def clock(steps: Sequence[float], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "loop 2"]:
    """(when it begins, its step size) of every loop; times add up in the model's dtype."""
    sizes = torch.tensor(steps, dtype=dtype, device=device)
    begins = [torch.zeros_like(sizes[0])]
    for size in sizes[:-1]:
        begins.append(begins[-1] + size)
    return torch.stack((torch.stack(begins), sizes), dim=1)


class TimeEmbed(nn.Module):
    """W₂ SiLU(W₁ φ(t) + b₁) + b₂ with φ(t) = [cos(t f); sin(t f)], f_j = 10000^(−j / 128), j < 128.

    Args:
        d_model: width of the embedding.

    Source:
        arXiv 2602.11451.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.inner = nn.Linear(2 * _WAVES, d_model)
        self.outer = nn.Linear(d_model, d_model)

    def forward(self, t: Float[Tensor, ""]) -> Float[Tensor, " d_model"]:
        """The embedding of one time, or of one step size."""
        turns = t * _LONGEST ** (-torch.arange(_WAVES, dtype=torch.float32, device=t.device) / _WAVES)
        waves = torch.cat((turns.cos(), turns.sin())).to(t.dtype)
        return self.outer(F.silu(self.inner(waves)))


class Modulation(NamedTuple):
    """What a layer's sub-layers are gated and scaled by: x + gate ⊙ f(N(x) ⊙ (1 + scale)); rows of one vector."""

    gate_attn: Tensor
    gate_mlp: Tensor
    scale_attn: Tensor
    scale_mlp: Tensor
